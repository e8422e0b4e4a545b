"""Bugs to plant in the row programs, and the probe that must catch every one of them.

The probe calls a kernel module's launchers on adversarial cases and compares with float64, each probability relative
to itself. It needs Triton's interpreter or a GPU, and judges the original module as sound.

Chapter: two-pass-softmax
"""

import contextlib
import math
from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance

# A resident row has two parts and at most 16 columns, a wider one tiles of 16: tails and loops at small sizes.
SMALL = {"LAUNCH": {16: (8, 4)}, "WIDEST": 16, "WIDEST_BACKWARD": 16, "PART": 8, "TILE": 16, "TILED": (8, 4)}
INSIDE = ".to(ACC)\n\n\n@triton.jit\ndef _write"

MUTANTS = [
    Mutant("p * inverse * _power_of_two(k)", "p * inverse", "pairs: the exponent is lost in the second pass"),
    Mutant("m = m * _power_of_two(v - higher) + ", "m = m + ", "pairs: the old sum keeps its exponent"),
    Mutant("            v = higher\n", "            v = v\n", "pairs: the sum's exponent is not updated"),
    Mutant("total = terms + (term,), total + _sum(term)", "total = terms + (term,), _sum(term)",
           "pairs: a resident row's sum counts its last part only"),
    Mutant("part * PART + at, count", "at, count", "pairs: every part of a resident row is written to the first"),
    Mutant("0.693147182464599609375", "0.693147122859954834", "pairs: last digit of ln 2"),
    Mutant("0.166676521301269531", "0.0833382606506347655", "pairs: wrong cubic coefficient"),
    Mutant("return p * t + 1.0", "return p * t + 0.9999", "pairs: the polynomial is not 1 at 0"),
    Mutant("n = k + v\n", "n = k\n", "pairs: the reduction forgets the common exponent"),
    Mutant("tl.maximum(k, -127.0) + ", "k + ", "pairs: the exponent field wraps around"),
    Mutant("(MAGIC + 127.0)", "(MAGIC + 126.0)", "pairs: the exponent's bias is off by one"),
    Mutant("_bounded(_tile(", "(_tile(", "pairs: -inf reaches the reduction", 3),
    Mutant("return tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)",
           "return tl.where(x > LOWEST, x, LOWEST)", "pairs: NaN counts as a small number"),
    Mutant('tl.where(top > LOWEST, 1.0 / m, float("nan"))', "1.0 / m", "pairs: a row of -inf is not NaN"),
    Mutant("LOWEST = tl.constexpr(-1e9)", "LOWEST = tl.constexpr(-50.0)", "pairs: negative rows count as -inf"),
    Mutant("s = s * _exponentials(top, higher) + ", "s = s + ", "online: a new maximum does not rescale the sum"),
    Mutant("            top = higher\n", "            top = top\n", "online: the maximum is not kept"),
    Mutant("terms * (1.0 / _sum(terms))", "terms * (1.0 / _largest(terms))", "online: divides by the largest term"),
    Mutant('tl.where(top == float("-inf"), 0.0, top)', "top", "online: a tile of -inf subtracts infinities"),
    Mutant("0.0, top)) * LOG2_E)", "0.0, top)))", "online, three passes: powers of two for powers of e"),
    Mutant("s += _sum(", "s = _sum(", "three passes: the sum counts the last tile only"),
    Mutant("top = tl.maximum(top, _largest(x))\n        for", "top = _largest(x)\n        for",
           "three passes: the maximum of the last tile only"),
    Mutant("s = _sum(_exponentials(x, top))\n", "s = _largest(_exponentials(x, top))\n",
           "three passes: a resident row divides by its largest term"),
    Mutant("y * (g - _sum(g * y))", "y * g", "backward: the row term is left out"),
    Mutant("along += _sum(", "along = _sum(", "backward: the row term counts the last tile only"),
    Mutant("y * (g - along)", "g - along", "backward: the softmax is left out"),
    Mutant("_tile(grad_ptr, rows, grad_stride", "_tile(grad_ptr, rows, y_stride", "backward: the gradient's stride", 3),
    Mutant("at < columns, ALIGN", "at < columns - 1, ALIGN", "the last column is lost", 2),
    Mutant("(rows < count)[:, None]", "(rows < count - 1)[:, None]", "the last row is lost", 2),
    Mutant("rows * stride, ALIGN", "rows * columns, ALIGN", "a row stride is ignored"),
    Mutant("other=OUTSIDE", "other=0.0", "columns past the end count as 0"),
    Mutant(INSIDE, INSIDE.replace("(ACC)", "(tl.float16).to(ACC)", 1), "arguments are rounded to 16 bits"),
]  # fmt: skip


@contextlib.contextmanager
def small_tiles(kernel: ModuleType) -> Iterator[None]:
    """Launch sizes that bring parts, tails and tile loops to sizes an interpreter can afford."""
    with mock.patch.multiple(kernel, **SMALL):
        yield


def probe(kernel: ModuleType) -> bool:
    """True when `kernel` disagrees with float64 on any adversarial case."""
    with small_tiles(kernel):
        return any(_wrong(*case) for case in _cases(kernel))


def _wrong(actual: Tensor, truth: Tensor, bound: float) -> bool:
    """Whether any number is off relative to itself, or is or is not NaN where the other is not or is."""
    visible = truth.abs() > 1e-30
    error = torch.where(visible, (actual - truth).abs() / truth.abs().clamp_min(1e-30), actual.abs().double())
    return not torch.equal(actual.isnan(), truth.isnan()) or not (error[~truth.isnan()] <= bound).all()


def _cases(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor, float]]:
    """(kernel, float64 torch, bound) of every program: a resident row and one in tiles, then the backward pass."""
    single = tolerance(torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = generator(0, device)
    for rows, columns in ((9, 13), (10, 35)):
        wide = 5 * torch.randn(2 * rows, columns + 3, generator=source, device=device)
        # A gradient of zero mean would hide the row term.
        grad = (3 + torch.randn(rows, columns + 5, generator=source, device=device))[:, 2:-3]
        x = wide[:rows, 1:-2]
        _plant(x)
        for program in kernel.PROGRAMS:
            # Where e^x is 1e-30 of the largest, a product x log2(e) rounds 100 times as coarsely as it does near 1.
            bound = 2 * single if program == "pair" else 10 * single
            yield kernel.forward(x, program), torch.softmax(x.double(), -1), bound
        y = torch.softmax(wide[rows:, 1:-2] / 5, -1)
        truth = y.double() * (grad - (grad.double() * y).sum(-1, keepdim=True))
        actual = kernel.backward(grad, y)
        # dx is a difference: its error is relative to the larger term.
        scale = y.double() * grad.abs().amax(-1, keepdim=True)
        yield actual / scale + 1, truth / scale + 1, single


def _plant(x: Tensor) -> None:
    """Rows that ordinary numbers do not stand for, written into `x`."""
    columns = x.shape[1]
    x[0] = torch.linspace(-300.0, 0.0, columns)
    x[1] = torch.linspace(0.0, -300.0, columns)
    x[2] += 5000.0
    x[3] -= 5000.0
    x[4] = -math.inf
    x[5, columns // 2] = math.nan
    x[6, 3] = math.inf
    x[7, : columns - 2] = -math.inf
    x[8, columns // 2 :] = -math.inf
