"""Every attention of the book by its name in one model: one script compares them all."""

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.models.gpt import ATTENTIONS, GPT, GPTConfig, KVCache

VOCAB = 11
every = pytest.mark.parametrize("attention", sorted(ATTENTIONS))
# Sharpened weights pass on rounding errors up to 15 times as large, through two layers.
BOUND = 15 * 15 * tolerance(torch.float64)


def build(attention, depth=2):
    torch.manual_seed(0)
    options = {"dim": 16, "depth": depth, "heads": 2, "positions": "rotary", "attention": attention}
    model = GPT(GPTConfig(VOCAB, 16, **options)).double()
    for parameter in model.parameters():  # far from the initial near-uniform model, so that errors are visible
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=generator(1))


def test_all_attentions_of_the_book_are_there():
    ours = {"sdpa", "attention-entropy", "lucid", "softplus", "reweighted-softplus", "log-length"}
    assert ours <= set(ATTENTIONS)


def test_one_set_of_weights_serves_all_and_they_differ():
    weights, found = build("sdpa").state_dict(), {}
    for name in sorted(ATTENTIONS):
        model = build(name)
        assert model.state_dict().keys() == weights.keys()
        model.load_state_dict(weights)
        found[name] = model(tokens(2, 8))
    assert relative_errors(found["attention-entropy"], found["sdpa"])[1] <= BOUND  # the same function, another kernel
    others = [x for name, x in found.items() if name != "attention-entropy"]
    assert all((x - y).abs().max() > 1e-3 for i, x in enumerate(others) for y in others[:i])


@every
def test_a_cache_and_left_padding_change_nothing(attention):
    model, ids = build(attention), tokens(3, 8)
    whole, cache = model(ids), KVCache.allocate(model, 3, 8)
    pieces = torch.cat([model(piece, cache=cache) for piece in ids.split([3, 1, 4], 1)], 1)
    assert relative_errors(pieces, whole)[1] <= BOUND
    padded, valid = torch.nn.functional.pad(ids, (4, 0)), (torch.arange(12) >= 4).expand(3, -1)
    assert relative_errors(model(padded, valid=valid)[:, 4:], whole)[1] <= BOUND


@every
def test_no_token_sees_a_later_one(attention):
    model, ids = build(attention), tokens(2, 8)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    before, after = model(ids), model(changed)
    assert relative_errors(after[:, :5], before[:, :5])[1] <= BOUND
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("attention", sorted(set(ATTENTIONS) - {"reweighted-softplus-3"}))
def test_it_trains_under_compile_in_one_graph(attention):
    model, ids = build(attention, depth=1), tokens(2, 8)

    def loss():
        return torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(*(torch.autograd.grad(f(), list(model.parameters())) for f in (compiled, loss)), strict=True):
        assert relative_errors(x, y, scale=y.abs().clamp_min(1e-3))[1] <= BOUND
