"""Bugs to plant in the softplus attention kernels, and the probe that must catch every one of them.

The probe calls a kernel module's launchers on adversarial cases and compares with the reference in float64. It needs
Triton's interpreter or a GPU, and judges the original module as sound.

Chapter: softplus-attention
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.softplus_attention import layout, reference

# Tiles so small that a few dozen tokens bring loops, tails and skipped tiles.
SMALL_TILES = {program: {(2, 64): (16, 16, 4, 1), (4, 64): (16, 16, 4, 1)} for program in layout.LAUNCH}

MUTANTS = [
    Mutant("mass += tl.sum(weight, 1)", "mass = tl.sum(weight, 1)", "the row sum forgets the tiles before"),
    Mutant("total += tl.sum(a, 1)", "total = tl.sum(a, 1)", "re-weighting: the first walk forgets the tiles before"),
    Mutant("top = tl.maximum(top, tl.max(a, 1))", "top = tl.max(a, 1)", "re-weighting: the largest of the last tile"),
    Mutant("u / tl.where(w == 1, 1.0, w - 1)", "1.0", "softplus loses its digits far below 0"),
    Mutant("tl.where(s >= 0, 1.0, u) / w", "tl.where(s >= 0, u, 1.0) / w", "softplus: slope of the other sign"),
    Mutant("count = tl.minimum(rows + 1, keys)", "count = tl.zeros_like(rows) + keys", "causal rows take N = keys"),
    Mutant("count_ptr += plane * queries", "count_ptr += 0", "every head counts the first head's keys", 2),
    Mutant("tl.log2(count) * LN2", "tl.log2(count)", "the length factor is in bits", 3),
    Mutant("tl.where(count > 3, 1.0, 0.0)", "1.0", "short rows lose what lies below the average", 2),
    Mutant("top = tl.where(top <= FLAT, 0.0, top)", "top = top", "a uniform row is sharpened by its rounding"),
    Mutant("tl.where(top == 0, a, ", "tl.where(top == 0, 0.0, ", "a uniform row loses its weights"),
    Mutant("tl.exp2(power * tl.log2(ratio))", "tl.exp2(2 * tl.log2(ratio))", "the power is fixed"),
    Mutant("steep = count * power * weight", "steep = power * weight", "re-weighting: N is lost in the gradient"),
    Mutant("own += tl.sum(slope * (a / total), 1)", "own += tl.sum(slope * a, 1)",
           "re-weighting: the row term is not in A"),
    Mutant("d_s = (slope - own[:, None]) / total * rise", "d_s = slope / total * rise", "dq: the row term is left out"),
    Mutant("d_s = (slope - own) / total", "d_s = slope / total", "dk: the row term is left out"),
    Mutant("weight, slope = a / total, d_a - delta", "weight, slope = a / total, d_a",
           "dS: rowsum(dO * O) is left out"),
    Mutant("acc = (acc - along * tl.sum(along * acc, 1)[:, None])", "acc = acc", "dq: the part along q passes"),
    Mutant("dk = (dk - along * tl.sum(along * dk, 1)[:, None])", "dk = dk", "dk: the part along k passes"),
    Mutant("visible &= key <= query", "visible &= key < query", "causal: the diagonal is lost"),
    Mutant("stop = tl.minimum(keys, (tile + 1) * BLOCK_Q)", "stop = tl.minimum(keys, tile * BLOCK_Q)",
           "causal: the diagonal tile is skipped", 2),
    Mutant("first = tile * BLOCK_K // BLOCK_Q * BLOCK_Q", "first = tile * BLOCK_K + BLOCK_Q",
           "causal: dk and dv start a tile too late"),
    Mutant("(query < queries) & (key < keys)", "query < queries", "keys past the end weigh softplus(0) = log 2"),
    Mutant("key * mask_column, visible, 0)", "key, visible, 0)", "the column stride of the mask is ignored"),
    Mutant("head // group * k_head", "head * k_head", "a shared key head is read at the query head's place", 2),
    Mutant("k_inverse_ptr += (batch * (heads // group) + head // group) * keys", "k_inverse_ptr += plane * keys",
           "lengths of keys are read at the query head's place", 2),
    Mutant("dv += _dot(", "dv = _dot(", "dv: every tile overwrites the sum of those before it"),
    Mutant("head = key_head * group + member", "head = key_head * group", "dk, dv: a group hears of one query head"),
    Mutant("x = x / tl.where(peak == 0, 1.0, peak)[:, None]", "peak = tl.where(peak == 0, 0.0, 1.0)",
           "lengths: squares of large entries overflow"),
    Mutant("acc += unit * _dot((weight / unit)", "acc += _dot((weight)", "float16: small weights vanish"),
]  # fmt: skip


def probe(kernel: ModuleType) -> bool:
    """True when `kernel` disagrees with the float64 reference on any adversarial case."""
    with mock.patch.object(layout, "LAUNCH", SMALL_TILES):
        return any(_wrong(actual, truth) for actual, truth in _cases(kernel))


def _wrong(actual: Tensor, truth: Tensor) -> bool:
    # Not `error > bound`: NaN is wrong too. A power of 5 multiplies the relative error of its base by 5.
    return not max(relative_errors(actual, truth)) <= 5 * tolerance(actual.dtype, dot=True)


def _cases(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(kernel, float64 reference) pairs: opposed and uniform rows, a huge query, grouped heads, a strided mask."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = generator(0, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device)

    seen = (random(1, 2, 17, 36) > 0)[..., ::2]
    # Rows that see nothing, two keys, one key of the second tile.
    seen[0, :, 3], seen[0, :, 5], seen[0, 1, :, :16] = False, False, False
    seen[0, :, 5, 11:13] = True
    yield from _far_rows(kernel, random)
    for batch, mask, causal, power in ((1, seen, False, 5.0), (2, None, True, None)):
        q, k, v = random(batch, 2, 17, 5), random(batch, 1, 18, 5), random(batch, 1, 18, 6)
        # A row equal to all keys but a few, rows far from all keys, a row orthogonal to all, entries of 1e20.
        q[..., 4], k[..., 4], k[..., 3] = 0, 0, k[..., 3].abs()
        q[:, :, 7], q[:, :, 7, 4] = 0, 1
        q[:, :, 9], q[:, :, 9, 3], q[:, :, 11] = 0, -1, 1e20 * q[:, :, 11]
        # Strides as after a projection [B, T, H, V] seen head by head.
        grad = random(batch, 17, 2, 6).transpose(1, 2)
        grad[:, :, 11] = 0
        saved = kernel.forward(q, k, v, mask, causal, 2.0, power)
        found = kernel.backward(grad, (q, k, v), mask, saved, causal, 2.0, power, [True] * 3)
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        function = reference.softplus_attention if power is None else reference.reweighted_softplus_attention
        truth = function(*wide, mask, causal, 2.0, *(() if power is None else (power,)))
        gradients = torch.autograd.grad(truth, wide, grad.double())
        yield from zip((saved[0], *found), (truth.detach(), *gradients), strict=True)


def _far_rows(kernel: ModuleType, random) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys of one direction and many lengths, then keys opposite every query: weights of the size e^-scale."""
    q = random(1, 1, 3, 4)[:, :, :1].expand(1, 1, 3, 4)
    v = random(1, 1, 20, 5)
    k = q[:, :, :1] * random(1, 1, 20, 1).exp()
    yield kernel.forward(q, k, v, None, False, 2.0, 5.0)[0], v.double().mean(2, keepdim=True).expand(1, 1, 3, 5)
    k = -q[:, :, :1] + 0.3 * random(1, 1, 20, 4)
    for dtype in (torch.float32, torch.float16):
        low = [x.to(dtype) for x in (q, k, v)]
        truth = reference.softplus_attention(*(x.double() for x in low), None, False, 8.0)
        yield kernel.forward(*low, None, False, 8.0, None)[0], truth
