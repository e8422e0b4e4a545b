"""Bugs to plant in the attention kernels, and the probe that must catch every one of them.

The probe calls a kernel module's launchers on adversarial cases and compares with the reference in float64. It needs
Triton's interpreter or a GPU, and judges the original module as sound.

Chapter: inflection
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.attention_entropy import reference

# Tiles so small that a few dozen tokens bring loops, tails and skipped tiles.
SMALL_TILES = {program: {(4, 64): (16, 16, 4, 1)} for program in ("forward", "query_gradient", "key_gradient")}

MUTANTS = [
    Mutant("t + fall * total", "t", "entropy: a new maximum does not shift the moment t"),
    Mutant("t = shrink * (t + fall * total)", "t = t + fall * total", "entropy: a new maximum does not rescale t"),
    Mutant("total = shrink * total + tl.sum(p, 1)", "total = total + tl.sum(p, 1)", "a new maximum does not rescale l"),
    Mutant("log_sum - t / total", "log_sum + t / total", "entropy: wrong sign of the mean score"),
    Mutant("log_sum - t / total", "tl.log2(total) - t / total", "entropy: nats and bits are mixed"),
    Mutant("acc = acc * shrink[:, None] + ", "acc = acc + ", "output: tiles before a new maximum keep their old scale"),
    Mutant("total = tl.where(total == 0, 1.0, total)", "total = total", "a row that sees nothing divides by zero"),
    Mutant("reference = tl.where(highest == float(\"-inf\"), 0.0, highest)", "reference = highest",
           "a row that has seen nothing yet subtracts infinities"),
    Mutant("visible &= key <= query", "visible &= key < query", "causal: the diagonal is lost"),
    Mutant("stop = tl.minimum(keys, (tile + 1) * BLOCK_Q)", "stop = tl.minimum(keys, tile * BLOCK_Q)",
           "causal: the diagonal tile is skipped", 2),
    Mutant("first = tile * BLOCK_K // BLOCK_Q * BLOCK_Q", "first = tile * BLOCK_K + BLOCK_Q",
           "causal: dk and dv start a tile too late"),
    Mutant("(query < queries) & (key < keys)", "query < queries", "keys past the end count with score 0"),
    Mutant("(query < queries) & (key < keys)", "(query < queries) & (key < keys - 1)", "the last key is lost"),
    Mutant("visible &= given", "visible &= ~given", "the boolean mask is inverted"),
    Mutant("s += given.to(s.dtype)", "s += given.to(s.dtype) * 0.5", "the additive mask is scaled"),
    Mutant("key * mask_column", "key", "the column stride of the mask is ignored"),
    Mutant("head // group * k_head", "head * k_head", "a shared key head is read at the query head's place", 2),
    Mutant("slope = d_a - delta", "slope = d_a", "dS: the row term is left out"),
    Mutant("slope -= d_entropy * (log_a + entropy)", "slope -= d_entropy * log_a", "dS: the entropy term is left out"),
    Mutant("slope -= d_entropy * (log_a + entropy)", "slope += d_entropy * (log_a + entropy)", "dS: wrong sign of dH"),
    Mutant("queries, width, acc * scale", "queries, width, acc", "dq: the scale is lost"),
    Mutant("keys, width, dk * scale", "keys, width, dk", "dk: the scale is lost"),
    Mutant("dv += _dot(", "dv = _dot(", "dv: every tile overwrites the sum of those before it"),
    Mutant("head = key_head * group + member", "head = key_head * group", "dk, dv: a group hears of one query head"),
    Mutant("plane // heads * grad_batch + plane % heads * grad_head", "plane * grad_head",
           "the upstream gradient's batch stride is ignored"),
]  # fmt: skip


def probe(kernel: ModuleType) -> bool:
    """True when `kernel` disagrees with the float64 reference on any adversarial case."""
    with mock.patch.object(kernel, "LAUNCH", SMALL_TILES):
        return any(_wrong(actual, truth) for actual, truth in _cases(kernel))


def _wrong(actual: Tensor, truth: Tensor) -> bool:
    # Not `error > bound`: NaN is wrong too.
    return not max(relative_errors(actual, truth)) <= 4 * tolerance(actual.dtype, dot=True)


def _cases(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(kernel, float64 reference) pairs: grouped heads and odd lengths, plain, causal and under both kinds of mask."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = generator(0, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device)

    # Every second column of a wider mask: a column stride of its own.
    additive = random(1, 1, 19, 42)[..., ::2]
    additive[random(1, 1, 19, 21) > 1.5] = -torch.inf
    seen = random(1, 2, 19, 21) > 0
    seen[0, :, 3], seen[0, 1, :, :16] = False, False
    for batch, mask, causal in ((2, None, False), (1, None, True), (1, seen, False), (1, additive, False)):
        q, k, v = 3 * random(batch, 2, 19, 5), random(batch, 1, 21, 5), random(batch, 1, 21, 6)
        # Strides as after a projection [B, T, H, V] seen head by head.
        grad, grad_entropy = random(batch, 19, 2, 6).transpose(1, 2), random(batch, 2, 19)
        out, entropy, *rest = kernel.forward(q, k, v, mask, causal, 0.5)
        found = kernel.backward(grad, grad_entropy, (q, k, v), mask, (out, entropy, *rest), causal, 0.5, [True] * 3)
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        truth = reference.attention_entropy(*wide, mask, causal, 0.5)
        gradients = torch.autograd.grad(truth, wide, (grad.double(), grad_entropy.double()))
        yield from zip((out, entropy, *found), (*(x.detach() for x in truth), *gradients), strict=True)
