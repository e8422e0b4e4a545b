"""Bugs to plant in the kernels of the preconditioned values, and the probe that must catch every one of them.

The probe calls a kernel module's launchers on keys that resemble each other and compares with a dense solve in
float64. It needs Triton's interpreter or a GPU, and judges the original module as sound.

Chapter: lucid
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance

# Blocks so small that a few dozen keys bring chains of blocks and a tail.
SMALL = {"SUBSTITUTE": (16, 16, 16, 4), "GRADIENT": {64: (16, 4)}}

MUTANTS = [
    Mutant("(cosine - 1.0) * strength", "cosine * strength", "the diagonal of T is not 1"),
    Mutant("start + tl.arange(0, BLOCK_D)", "tl.arange(0, BLOCK_D)", "every part of the features is the first"),
    Mutant("cosine += _dot", "cosine = _dot", "the last part of the features overwrites the others"),
    Mutant("* strength * LOG2E)", "* strength)", "powers of two instead of e"),
    Mutant("place[:, None] > place[None, :]", "place[:, None] >= place[None, :]",
           "inverse: the diagonal is subtracted a second time"),
    Mutant("(rows < size)[:, None], n, 0.0)", "(rows < size - 1)[:, None], n, 0.0)",
           "inverse: the last row couples to nothing"),
    Mutant("range(BLOCK - 1)", "range(BLOCK - 2)", "inverse: one step of the recursion is missing"),
    Mutant("x -= column[:, None] * row[None, :]", "x += column[:, None] * row[None, :]", "inverse: wrong sign"),
    Mutant("tl.where((place == step)[:, None], x, 0.0), 0)",
           "tl.where(place[:, None] == place[None, :], x, 0.0), 0)",
           "inverse: the first power of N instead of the recursion"),
    Mutant("inverse_ptr += (plane * blocks + block) * BLOCK * BLOCK", "inverse_ptr += block * BLOCK * BLOCK",
           "every matrix writes its inverses to the same place"),
    Mutant("inverse_ptr += plane * blocks * BLOCK * BLOCK", "inverse_ptr += plane * BLOCK * BLOCK",
           "the inverse of another matrix is read"),
    Mutant("_live(live_ptr + plane * size, rows, size, ACC)", "_live(live_ptr, rows, size, ACC)",
           "the mask of the first matrix serves all"),
    Mutant("live_ptr += plane * size", "live_ptr += 0", "the mask of the first matrix serves all further blocks", 2),
    Mutant("block = blocks - 1 - step", "block = step", "transposed: the first block is solved first"),
    Mutant("other = blocks - 1 - earlier", "other = earlier", "transposed: the blocks of the other end are used"),
    Mutant("                    n *= _live(live_ptr, rows, size, ACC)[:, None]",
           "                    n *= _live(live_ptr, columns, size, ACC)[None, :]",
           "transposed: the mask is not transposed"),
    Mutant("                    n *= _live(live_ptr, columns, size, ACC)[None, :]",
           "                    n *= _live(live_ptr, rows, size, ACC)[:, None]",
           "a masked key mends its own value instead of leaving others alone"),
    Mutant("range(step)", "range(step - 1)", "the block before is left out"),
    Mutant("value_width) - total", "value_width) + total", "substitution: wrong sign"),
    Mutant("inverse = tl.trans(inverse)", "inverse = inverse", "transposed: the diagonal block is not"),
    Mutant("tile * BLOCK_V + tl.arange(0, BLOCK_V)", "tl.arange(0, BLOCK_V)", "every tile computes the first columns"),
    Mutant("range(block + 1)", "range(block)", "du: the diagonal block as rows is left out"),
    Mutant("range(block, blocks)", "range(block + 1, blocks)", "du: the diagonal block as columns is left out"),
    Mutant("rows[:, None] < columns[None, :]", "rows[:, None] <= columns[None, :]",
           "du: the diagonal of T gets a gradient"),
    Mutant("a *= _live(live_ptr, rows, size, ACC)[:, None]", "a *= _live(live_ptr, columns, size, ACC)[None, :]",
           "du: as a column, the mask of the rows is used"),
    Mutant("-strength * du", "-du", "du: the strength is lost"),
    Mutant("-strength * du", "strength * du", "du: wrong sign"),
]  # fmt: skip


def probe(kernel: ModuleType) -> bool:
    """True when `kernel` disagrees with the float64 reference on an adversarial case."""
    with mock.patch.multiple(kernel, **SMALL):
        return any(_wrong(actual, truth) for actual, truth in _case(kernel))


def _wrong(actual: Tensor, truth: Tensor) -> bool:
    # Not `error > bound`: NaN is wrong too.
    return not max(relative_errors(actual, truth)) <= 4 * tolerance(actual.dtype, dot=True)


def _case(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(kernel, dense solve in float64): similar keys, two matrices of three blocks with a tail, one of them masked."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = generator(0, device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=device)

    u = torch.nn.functional.normalize(random(2, 1, 37, 18) + 1.5, dim=-1)
    v, grad, live = random(2, 1, 37, 18), random(2, 1, 37, 18), torch.ones(2, 1, 37, device=device)
    live[1] = (random(1, 37) > -0.3).float()
    wide, values = u.double().requires_grad_(), v.double().requires_grad_()
    t = torch.exp(3 * (wide @ wide.mT - 1)).tril(-1) * live.double().unsqueeze(-2)
    truth = torch.linalg.solve_triangular(t, values, upper=False, unitriangular=True)
    w, inverse = kernel.forward(u, v, live, 3.0)
    yield w, truth.detach()
    found = kernel.backward(grad, u, live, w, inverse, 3.0, True)
    yield from zip(found, torch.autograd.grad(truth, (wide, values), grad.double()), strict=True)
