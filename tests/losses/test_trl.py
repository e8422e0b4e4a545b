"""The losses that TRL has too, against TRL's own trainers: their loss methods run on a stand-in for the trainer."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

from p2k.core.seeding import generator
from p2k.losses.advantages import group_advantages
from p2k.losses.dpo import dpo_loss
from p2k.losses.registry import get_policy_loss

# Float32 sums of a few dozen numbers of order 1, in another order.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}
TOKENS = 4


def stand_in(**attributes):
    """An object with the attributes a loss method reads; its logging swallows everything."""
    trainer = MagicMock()
    trainer.model.training = True
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.num_processes = 1
    trainer.accelerator.gather.side_effect = trainer.accelerator.gather_for_metrics.side_effect = lambda x: x
    for name, value in {"aux_loss_enabled": False, "current_gradient_accumulation_steps": 1, **attributes}.items():
        setattr(trainer, name, value)
    return trainer


def rows(seed=0, count=8):
    rng = generator(seed)
    old = -torch.rand(count, TOKENS, generator=rng)
    new = (old + 0.4 * torch.randn(count, TOKENS, generator=rng)).requires_grad_()
    mask = (torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (count, 1), generator=rng)).long()
    return old, new, mask, torch.randn(count, generator=rng)


def trl_policy_loss(old, new, mask, advantages, *, loss_type, level, low, high):
    """GRPOTrainer's loss for given log-probabilities."""
    trainer = stand_in(
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        loss_type=loss_type,
        epsilon_low=low,
        epsilon_high=high,
        max_completion_length=TOKENS,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize(
    ("loss_type", "level", "name", "mode", "options"),
    [
        ("grpo", "token", "vanilla", "seq-mean-token-mean", {"clip_ratio": 0.2}),
        ("dapo", "token", "vanilla", "token-mean", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}),
        ("bnpo", "token", "vanilla", "token-mean", {"clip_ratio": 0.2}),
        ("dr_grpo", "token", "vanilla", "seq-mean-token-sum-norm", {"loss_scale_factor": 8.0 * TOKENS}),
        ("grpo", "sequence", "gspo", "seq-mean-token-mean", {"clip_ratio_low": 0.1, "clip_ratio_high": 0.15}),
    ],
)
def test_policy_losses(loss_type, level, name, mode, options):
    old, new, mask, advantages = rows()
    low = options.get("clip_ratio_low", 0.2)
    high = options.get("clip_ratio_high", 0.2)
    expected = trl_policy_loss(old, new, mask, advantages, loss_type=loss_type, level=level, low=low, high=high)
    # verl caps the loss of a negative advantage by default, TRL does not.
    options = {**options, "clip_ratio_c": None} if name == "vanilla" else options
    loss, _ = get_policy_loss(name)(old, new, advantages.unsqueeze(-1).expand_as(new), mask, mode, options)
    torch.testing.assert_close(loss, expected, **CLOSE)
    ours, theirs = (torch.autograd.grad(x, new, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, **CLOSE)


PAIRS = [
    ("sigmoid", 0.0),
    ("hinge", 0.0),
    ("ipo", 0.0),
    ("exo_pair", 0.1),
    ("robust", 0.1),
    ("apo_zero", 0.0),
    ("apo_down", 0.0),
]


@pytest.mark.parametrize(("loss_type", "smoothing"), PAIRS)
def test_pair_losses(loss_type, smoothing):
    old, new, _, _ = rows(1)
    chosen, rejected = new.sum(-1).chunk(2)
    ref_chosen, ref_rejected = old.sum(-1).chunk(2)
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=smoothing,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {
        "input_ids": torch.zeros(8, TOKENS + 1, dtype=torch.long),
        "attention_mask": torch.ones(8, TOKENS + 1, dtype=torch.long),
        # The first position is the prompt; completions of one token keep IPO's length average equal to its sum.
        "completion_mask": torch.tensor([0, 1, 0, 0, 0]).expand(8, -1)
        if loss_type == "ipo"
        else torch.tensor([0, 1, 1, 1, 1]).expand(8, -1),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    zero = torch.zeros_like(new)
    outputs = MagicMock(log_probs=new, entropy=zero, mean_logits=zero, is_top1=zero.bool())
    expected = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False)
    options = {"beta": 0.3, "loss_type": loss_type, "label_smoothing": smoothing}
    loss, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    torch.testing.assert_close(loss, expected, **CLOSE)
    logged = {call.args[0] for call in trainer._metrics.__getitem__.return_value.__getitem__.call_args_list}
    assert set(metrics) <= logged


def test_advantages_follow_the_trainers_constant():
    rewards = torch.randn(8, generator=generator(2))
    grouped = rewards.view(2, 4)
    expected = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(-1, keepdim=True) + 1e-4)
    ours = group_advantages(rewards, torch.arange(2).repeat_interleave(4), eps=1e-4)
    torch.testing.assert_close(ours, expected.flatten(), **CLOSE)
