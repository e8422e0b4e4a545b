"""Inputs and comparisons that the cut_cross_entropy tests share."""

import torch
from linear_logp_cases import ABSENT, BACKENDS, DEVICE, head, random, targets, terms

from p2k.core.tolerance import assert_as_good_as
from p2k.ops.cut_cross_entropy import cut_cross_entropy, kernel, reference, tiles

__all__ = ["ABSENT", "BACKENDS", "DEVICE", "TILE", "as_good_as_full", "full", "head", "random", "run", "small_tiles"]
TILE = (16, 16) if DEVICE == "cuda" else (4, 8)


def small_tiles(monkeypatch):
    """Tails and loops over tiles at sizes that an interpreter can afford."""
    monkeypatch.setattr(tiles, "TILE", dict.fromkeys((2, 4, 8), TILE))
    monkeypatch.setattr(kernel, "FORWARD", dict.fromkeys((2, 4), (*TILE, TILE[1], 4, 1)))
    monkeypatch.setattr(kernel, "BACKWARD", dict.fromkeys((2, 4), (TILE[1], 4, 1)))
    monkeypatch.setattr(kernel, "PROGRAMS", 6)
    monkeypatch.setattr(reference, "ROWS", TILE[0])


def full(hidden, weight, target, *, bias=None, softcap=None, ignore_index=ABSENT, **_):
    """The specification under the signature of the op."""
    return reference.cut_cross_entropy(hidden, weight, target, bias, softcap, ignore_index)


def run(function, inputs, target, grads, **keywords):
    """Both results and the gradient of every input that is there."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    hidden, weight, bias = leaves
    results = function(hidden, weight, target, bias=bias, **keywords)
    found = torch.autograd.grad(
        results, [x for x in leaves if x is not None], [g.to(r.dtype) for g, r in zip(grads, results, strict=True)]
    )
    return *(result.detach() for result in results), *found


def peaky(tokens, vocab, dim, *, dtype=torch.float32, bias=False):
    """A head that knows most of its targets: hidden states are copies of their target's row, and noise."""
    (_, weight, found), target = head(tokens, vocab=vocab, dim=dim, bias=bias, dtype=dtype)
    noise = random(tokens, dim, seed=8, dtype=dtype)
    return (weight[target] + 0.3 * noise, weight, found), target


def as_good_as_full(inputs, target, *, backend, **keywords):
    """Results within twice, gradients within three times the error of torch with all logits; errors against terms."""
    grads = [random(*target.shape, seed=9 + index) for index in range(2)]
    wide = [None if x is None else x.double() for x in inputs]
    truth = run(full, wide, target, grads, **keywords)
    eager = run(full, inputs, target, grads, **keywords)
    actual = run(cut_cross_entropy, inputs, target, grads, backend=backend, **keywords)
    scales = terms(inputs, target, (*grads, torch.zeros_like(grads[0])), **keywords)
    scales = (*scales[:2], *scales[3:])
    names = ("loss", "logsumexp", "hidden", "weight", "bias")
    for name, found, exact, base, scale in zip(names, actual, truth, eager, scales, strict=False):
        factor = 2 if name in names[:2] else 3
        assert_as_good_as(found, exact, base, factor=factor, dot=True, scale=scale.reshape(exact.shape), name=name)


__all__ += ["peaky", "targets"]
