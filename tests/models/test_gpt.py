import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.models import gpt as gpt_module
from p2k.models.generation import choose_tokens, completion_logps, generate, scaled_log_softmax
from p2k.models.gpt import GPT, GPT_PRESETS, GPTConfig, KVCache, gpt_preset, register_attention

EOS, PAD, VOCAB = 1, 0, 11


def build(positions="learned", *, tie=True, context=12, seed=0) -> GPT:
    torch.manual_seed(seed)
    options = {"positions": positions, "tie_weights": tie}
    model = GPT(GPTConfig(VOCAB, context, dim=16, depth=2, heads=2, **options)).double()
    for parameter in model.parameters():  # far from the initial near-uniform policy, so that errors are visible
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def close(actual, expected) -> bool:
    return relative_errors(actual, expected)[1] <= tolerance(torch.float64)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("chunks", [(5, 1, 1, 1), (1,) * 8, (3, 4, 1)])
def test_cache_gives_the_logits_of_the_whole_sequence(positions, chunks):
    model = build(positions, tie=positions == "learned")
    tokens = torch.randint(VOCAB, (3, sum(chunks)), generator=generator(1))
    cache = KVCache.allocate(model, 3, sum(chunks))
    pieces = [model(piece, cache=cache) for piece in tokens.split(list(chunks), 1)]
    assert close(torch.cat(pieces, 1), model(tokens))


def test_a_token_sees_no_later_one():
    model, tokens = build(), torch.randint(VOCAB, (2, 8), generator=generator(1))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_left_padding_changes_no_completion(positions):
    model = build(positions)
    prompts = torch.randint(2, VOCAB, (4, 3), generator=generator(2))
    padded = torch.cat((torch.full((4, 2), PAD), prompts), 1)
    valid = torch.tensor([[False, False, True, True, True]]).expand(4, -1)
    plain = generate(model, prompts, 5, eos=EOS, pad=PAD, generator=generator(3))
    left = generate(model, padded, 5, eos=EOS, pad=PAD, generator=generator(3), valid=valid)
    assert torch.equal(plain.tokens, left.tokens)
    assert close(left.logps, plain.logps)
    scored, _ = completion_logps(model, padded, left.tokens, left.mask, valid=valid)
    assert close(scored, plain.logps)


def test_rotary_logits_depend_on_distances_only():
    model, tokens = build("rotary"), torch.randint(VOCAB, (2, 4), generator=generator(1))
    hidden = torch.randn(2, 2, 4, 8, dtype=torch.float64, generator=generator(1))
    positions = torch.arange(4)[None]
    near, far = (gpt_module.rotate(hidden, positions + shift) for shift in (0, 7))
    # Angles are float32 numbers, so scores agree to float32 only.
    assert relative_errors(far @ far.mT, near @ near.mT)[1] <= tolerance(torch.float32)
    assert not torch.allclose(model(tokens), model(tokens.flip(1)).flip(1))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
def test_sampled_logps_equal_those_of_one_full_pass(temperature):
    model = build()
    prompts = torch.randint(2, VOCAB, (64, 4), generator=generator(4))
    sample = generate(model, prompts, 6, eos=EOS, pad=PAD, generator=generator(5), temperature=temperature)
    logps, entropy = completion_logps(model, prompts, sample.tokens, sample.mask, temperature=temperature)
    assert close(sample.logps, logps.detach())
    assert bool((entropy[sample.mask] > 0).all())
    assert not entropy[~sample.mask].any()


def test_rows_end_at_eos_and_are_padded_after_it():
    sample = generate(build(), torch.full((256, 2), 3), 6, eos=EOS, pad=PAD, generator=generator(6))
    ended = (sample.tokens == EOS).int().cumsum(1) - (sample.tokens == EOS).int() > 0
    assert torch.equal(sample.mask, ~ended)
    assert 0 < int(ended.sum()) < ended.numel()
    assert not sample.tokens[ended].any()
    assert not sample.logps[ended].any()


def test_generation_without_cache_gives_the_same_tokens():
    model, prompts = build(), torch.randint(2, VOCAB, (16, 3), generator=generator(7))
    sample = generate(model, prompts, 5, eos=EOS, pad=PAD, generator=generator(8))
    random, tokens = generator(8), prompts
    alive = torch.ones(16, dtype=torch.bool)
    for _ in range(5):
        drawn = choose_tokens(scaled_log_softmax(model(tokens)[:, -1], 1.0), torch.rand(16, generator=random))
        tokens = torch.cat((tokens, torch.where(alive, drawn, PAD)[:, None]), 1)
        alive &= drawn != EOS
    assert torch.equal(sample.tokens, tokens[:, 3:])


def test_sampling_follows_the_distribution_and_never_draws_zero_probability():
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    log_probs = probabilities.log().expand(200_000, -1)
    drawn = choose_tokens(log_probs, torch.rand(200_000, generator=generator(9)))
    share = torch.bincount(drawn, minlength=6) / 200_000
    assert torch.equal(share == 0, probabilities == 0)
    # Five standard errors of a share of one half.
    assert float((share - probabilities).abs().max()) < 5 * 0.5 / 200_000**0.5
    edge = torch.tensor(1.0 - 2**-24)
    assert int(choose_tokens(probabilities.log(), edge)) == 4
    assert int(choose_tokens(probabilities.log(), torch.tensor(0.0))) == 1


def test_presets_hold_the_parameters_their_names_say():
    for name, millions in (("gpu-10m", 10), ("gpu-25m", 25), ("gpu-50m", 50)):
        with torch.device("meta"):
            model = GPT(gpt_preset(name, vocab_size=16, context=64))
        count = sum(parameter.numel() for parameter in model.parameters())
        assert 0.9 * millions < count / 1e6 < 1.1 * millions
    assert GPT_PRESETS["cpu"]["dim"] == 64


def test_another_attention_plugs_in_by_name(monkeypatch):
    monkeypatch.setattr(gpt_module, "ATTENTIONS", dict(gpt_module.ATTENTIONS))

    @register_attention("uniform-average")
    def build_average(heads, head_dim):
        def attend(query, key, value, visible):
            weight = torch.ones(query.shape[-2], key.shape[-2], dtype=value.dtype)
            weight = weight if visible is None else weight * visible
            return weight / weight.sum(-1, keepdim=True) @ value

        return attend

    config = GPTConfig(VOCAB, 8, dim=16, heads=2, attention="uniform-average")
    model, tokens = GPT(config).double(), torch.randint(VOCAB, (2, 6), generator=generator(1))
    cache = KVCache.allocate(model, 2, 6)
    pieces = torch.cat([model(piece, cache=cache) for piece in tokens.split(1, 1)], 1)
    assert close(pieces, model(tokens))
    with pytest.raises(ValueError, match="taken"):
        register_attention("sdpa")(build_average)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPTConfig(0, 8), "vocab_size"),
        (lambda: GPTConfig(8, 8, dim=10, heads=4), "dim / heads"),
        (lambda: GPTConfig(8, 8, dim=6, heads=2, positions="rotary"), "even"),
        (lambda: GPTConfig(8, 8, positions="alibi"), "positions"),
        (lambda: GPTConfig(8, 8, attention="none"), "sdpa"),
        (lambda: gpt_preset("huge", vocab_size=8, context=8), "cpu-tiny"),
        (lambda: build(context=4)(torch.zeros(1, 5, dtype=torch.long)), "context"),
        (lambda: build()(torch.zeros(1, 5, dtype=torch.long), valid=torch.ones(1, 4, dtype=torch.bool)), "cover"),
        (lambda: generate(build(), torch.zeros(1, 2, dtype=torch.long), 0, eos=1, pad=0), "length"),
        (lambda: generate(build(), torch.zeros(1, 2, dtype=torch.long), 2, eos=1, pad=0), "generator"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_full_cache_refuses_more():
    model = build()
    cache = KVCache.allocate(model, 1, 3)
    with pytest.raises(ValueError, match="capacity"):
        model(torch.zeros(1, 4, dtype=torch.long), cache=cache)
