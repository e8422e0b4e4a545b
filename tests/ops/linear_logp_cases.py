"""Inputs and comparisons that the linear_logp tests share."""

import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as
from p2k.ops.linear_logp import linear_logp, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")
ABSENT = -100


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed, DEVICE), dtype=torch.float64, device=DEVICE).to(dtype)


def targets(*shape, vocab, seed=0):
    return torch.randint(0, vocab, shape, generator=generator(seed, DEVICE), device=DEVICE)


def head(*tokens, vocab, dim=8, bias=True, dtype=torch.float32, seed=0):
    """(hidden, weight, bias) and the targets."""
    tensors = random(*tokens, dim, seed=seed, dtype=dtype), random(vocab, dim, seed=seed + 1, dtype=dtype)
    bias = random(vocab, seed=seed + 2, dtype=dtype) if bias else None
    return (*tensors, bias), targets(*tokens, vocab=vocab, seed=seed + 3)


def upstream(target, *, dtype=torch.float32, seed=9):
    """A gradient for each of the three results."""
    return [random(*target.shape, seed=seed + index, dtype=dtype) for index in range(3)]


def full(hidden, weight, target, *, bias=None, temperature=1.0, ignore_index=ABSENT, **_):
    """The reference under the signature of the op."""
    return reference.linear_logp(hidden, weight, target, bias, temperature, ignore_index)


def run(function, inputs, target, grads, **keywords):
    """The three results and the gradient of every input that is there."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    hidden, weight, bias = leaves
    results = function(hidden, weight, target, bias=bias, **keywords)
    present = [x for x in leaves if x is not None]
    found = torch.autograd.grad(results, present, [g.to(r.dtype) for g, r in zip(grads, results, strict=True)])
    return *(result.detach() for result in results), *found


def terms(inputs, target, grads, *, temperature=1.0, ignore_index=ABSENT, **_):
    """Magnitude of the terms that each result sums, in float64.

    An error is small or large against these terms, not against what cancellation leaves of them.
    """
    hidden, weight, bias = (None if x is None else x.double() for x in inputs)
    hidden, target = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    there = (target != ignore_index)[:, None].double()
    z = hidden @ weight.T + (0 if bias is None else bias)
    size = (hidden.abs() @ weight.abs().T + (0 if bias is None else bias.abs())) / temperature
    s = torch.log_softmax(z / temperature, -1)
    p, entropy = s.exp(), -(s.exp() * s).sum(-1, keepdim=True)
    hot = torch.nn.functional.one_hot(target.clamp_min(0), len(weight))
    g, l, e = (grad.double().reshape(-1, 1).abs() for grad in grads)  # noqa: E741
    d = there * (g * (hot + p) + l * p + e * p * (s.abs() + entropy) + 1e-3 * (g + l + e) * p * size) / temperature
    rows = there * size.amax(-1, keepdim=True)
    return *(rows[:, 0],) * 3, d @ weight.abs(), d.T @ hidden.abs(), d.sum(0)


def assert_as_good_as_full(inputs, target, *, backend, seed=9, **keywords):
    """Results within twice, gradients within three times the error of torch in the same dtype with all logits."""
    grads = upstream(target, seed=seed)
    truth = run(full, [None if x is None else x.double() for x in inputs], target, grads, **keywords)
    eager = run(full, inputs, target, grads, **keywords)
    actual = run(linear_logp, inputs, target, grads, backend=backend, **keywords)
    names = ("logp", "logsumexp", "entropy", "hidden", "weight", "bias")
    for name, found, exact, base, term in zip(
        names, actual, truth, eager, terms(inputs, target, grads, **keywords), strict=False
    ):
        assert found.shape == exact.shape
        factor = 2 if name in names[:3] else 3
        scale = term.reshape(exact.shape)
        assert_as_good_as(found, exact, base, factor=factor, dot=True, scale=scale, name=name)
    assert (actual[0] <= 0).all()
