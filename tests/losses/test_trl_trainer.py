"""Our losses in TRL's trainer, made offline on a tiny random model, against the trainer's own losses."""

import pyarrow
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from p2k.core.seeding import generator
from p2k.losses.adapters import policy_loss_trainer

# Float32 sums of a few dozen numbers of order 1, in another order.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefghijklm"]
TOKENS = 4


def make(cls, folder, **settings):
    """A trainer that samples 2 prompts, 4 completions each, on a CPU."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    shape = {"vocab_size": len(WORDS), "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **silent, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    # A trainer with a KL term reads its reference model from where the model says it came from.
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    batch = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": TOKENS}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    args = GRPOConfig(str(folder), **{**batch, **quiet, "logging_steps": 1, "temperature": 1.0, **settings})
    return cls(
        model=model,
        reward_funcs=lambda completions, **_: [float(text.count("a") + text.count("b")) for text in completions],
        args=args,
        # Named, because the hash that would name it does not pickle with every pair of pyarrow and dill.
        train_dataset=Dataset(pyarrow.table({"prompt": ["a b c", "d e f", "g h i", "j k l"]}), fingerprint="prompts"),
        processing_class=tokenizer,
    )


def fake_inputs(trainer):
    rng = generator(1)
    draw = {"generator": rng}
    ids = torch.randint(3, len(WORDS), (8, 3 + TOKENS), **draw)
    mask = (torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (8, 1), **draw)).long()
    inputs = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.ones(8, 3, dtype=torch.long),
        "completion_ids": ids[:, 3:],
        "completion_mask": mask,
        "advantages": torch.randn(8, **draw),
        "num_items_in_batch": mask.sum(),
    }
    with torch.no_grad():
        seen = torch.cat([inputs["prompt_mask"], mask], 1)
        now, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, seen, TOKENS)
    return {**inputs, "old_per_token_logps": now + 0.4 * torch.randn(8, TOKENS, **draw)}


def loss_and_gradient(trainer):
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    loss = trainer._compute_loss(trainer.model, fake_inputs(trainer))
    return loss.detach(), torch.autograd.grad(loss, list(trainer.model.parameters()))


CASES = [
    ("vanilla", {"loss_type": "grpo"}),
    ("vanilla", {"loss_type": "bnpo"}),
    ("vanilla", {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("vanilla", {"loss_type": "dr_grpo"}),
    ("vanilla", {"loss_type": "grpo", "delta": 1.3}),
    ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_same_loss_and_gradients_as_the_trainers_own(name, settings, tmp_path):
    ours, gradient = loss_and_gradient(make(policy_loss_trainer(name), tmp_path, **settings))
    theirs, expected = loss_and_gradient(make(GRPOTrainer, tmp_path, **settings))
    assert any(part.abs().max() > 1e-3 for part in expected)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize("name", ["gopo", "adpo", "apo", "online_dpo"])
def test_a_loss_per_group_trains_and_does_not_see_the_shuffle(name, tmp_path):
    settings = {"loss_type": "grpo", "scale_rewards": "none", "num_iterations": 2, "max_steps": 2}
    trainer = make(policy_loss_trainer(name), tmp_path, **settings)
    inputs = {**fake_inputs(trainer), "sample_order": torch.arange(8)}
    shuffle = torch.tensor([5, 0, 3, 6, 1, 7, 2, 4])
    shuffled = {key: value[shuffle] if value.ndim else value for key, value in inputs.items()}
    trainer.current_gradient_accumulation_steps = 1
    losses = [trainer._compute_loss(trainer.model, batch) for batch in (inputs, shuffled)]
    torch.testing.assert_close(*losses, **CLOSE)
    del shuffled["sample_order"]
    assert (trainer._compute_loss(trainer.model, shuffled) - losses[0]).abs() > 1e-3
    names = set(trainer._metrics["train"])
    before = [part.clone() for part in trainer.model.parameters()]
    trainer.train()
    assert names
    assert names <= set().union(*trainer.state.log_history)
    assert any((old != new).any() for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "settings", "named"),
    [
        ("vanilla", {"beta": 0.1}, "beta"),
        ("vanilla", {"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ("vanilla", {"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold"),
        ("vanilla", {"loss_type": "sapo"}, "loss_type"),
        ("vanilla", {"importance_sampling_level": "sequence", "loss_type": "grpo"}, "importance_sampling_level"),
        ("vanilla", {"entropy_coef": 0.01}, "entropy_bonus"),
        ("gopo", {}, "loss_type"),
        ("gopo", {"loss_type": "grpo", "gradient_accumulation_steps": 2}, "steps_per_generation"),
        ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 1.5}, "delta"),
    ],
)
def test_settings_that_a_loss_does_not_honour_raise(name, settings, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        make(policy_loss_trainer(name), tmp_path, **settings)


def test_an_unknown_option_raises(tmp_path):
    with pytest.raises(ValueError, match="clip_radius"):
        loss_and_gradient(make(policy_loss_trainer("vanilla", clip_radius=1.0), tmp_path, loss_type="grpo"))
