"""Bugs to plant in the OQC kernels, and the probe that must catch every one of them.

The probe calls a kernel module's launchers on adversarial cases and compares with the reference in float64. It needs
Triton's interpreter or a GPU, and judges the original module as sound.

Chapter: oqc
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.oqc import reference

MUTANTS = [
    Mutant("m + k * (a - c * m), A", "m + k * (a + c * m), A", "forward: the projection adds instead of subtracting"),
    Mutant("m + k * (a - c * m), A", "m + (a - c * m), A", "forward: the gate is dropped"),
    Mutant("inverse = _inverse(mm + eps, TINY)", "inverse = _inverse(mm, TINY)", "forward: the epsilon is lost"),
    Mutant("mm, am = mm + _sum(m * m), am", "mm, am = mm, am", "forward: a wide row's norm counts its first tile only"),
    Mutant("return tl.where(n < TINY, 0.0, 1.0 / tl.where(n < TINY, 1.0, n))", "return 1.0 / n",
           "a zero row with eps = 0 divides by zero"),
    Mutant("columns[None, :], mask=inside, other=0.0", "columns[None, :]", "loads past a row's end are not masked"),
    Mutant("tl.max_constancy(columns < width", "tl.max_constancy(columns < width - 1", "the last column is lost", 2),
    Mutant("(rows < tokens)[:, None] & ", "(rows < tokens - 1)[:, None] & ", "the last row is lost", 2),
    Mutant("start = tl.multiple_of(rows * stride", "start = tl.multiple_of(rows * width", "a row stride is ignored"),
    Mutant(".to(ACC)\n\n\n@triton.jit\ndef _write", ".to(ACC).to(tl.float16).to(ACC)\n\n\n@triton.jit\ndef _write",
           "operands are rounded to 16 bits before the sums"),
    Mutant("tau * (w * z - 2.0 * c * m)", "tau * (w * z - c * m)", "dmain: the norm's factor 2 is missing"),
    Mutant("g - c * v - tau * (w", "g + c * v - tau * (w", "dmain: wrong sign of the term in c"),
    Mutant("g - c * v - tau * (w", "-c * v - tau * (w", "dmain: the residual path is lost"),
    Mutant("da = v - tau * m", "da = v", "daux: the projection is left out of its own adjoint"),
    Mutant("width, w * da, A", "width, da, A", "daux: the channel gate is dropped"),
    Mutant("dpre += da * z", "dpre = da * z", "dpre_gate: every group overwrites the sum of those before it"),
    Mutant("dpre_ptr, group, at, width, da * z)", "dpre_ptr, tl.program_id(0), at, width, da * z)",
           "dpre_gate: the partial sum of a wide row starts again with every group"),
    Mutant("gp + _sum(g * (w * z - c * m))", "gp", "dgate: tiles after the first are not summed"),
    Mutant("return dgate.sum().to(gate.dtype) if dgate is not None and gate.ndim == 0 else dgate",
           "return dgate[..., :1].sum().to(gate.dtype) if dgate is not None and gate.ndim == 0 else dgate",
           "dgate: a 0-d gate hears of one token only"),
    Mutant("rho = tl.rsqrt(ss / width + norm_eps)", "rho = tl.rsqrt(ss / BLOCK + norm_eps)",
           "rank: the mean divides by the padded rank", 2),
    Mutant("tl.rsqrt(ss / width + norm_eps)", "tl.rsqrt(ss / width)", "rank: the norm's epsilon is lost", 2),
    Mutant("c = rho * fu * inverse", "c = fu * inverse", "rank forward: projects the features before their norm"),
    Mutant("(w * df - x * y * along)", "(w * df + x * y * along)", "rank: wrong sign in the norm's backward"),
    Mutant("along = rho * rho * (k * fg - tau * fu)", "along = rho * rho * (k * fg)",
           "rank: the norm's backward forgets the projection"),
    Mutant("width, ds * y, A", "width, ds * x, A", "rank: dleft multiplies by the left factor"),
    Mutant("rho * w * x * y - 2.0 * c * u", "rho * w * x * y - c * u", "rank dhost: the factor 2 is missing"),
    Mutant("dweight += rho * df * x * y", "dweight += df * x * y", "rank dweight: the norm is forgotten"),
    Mutant("rho * fg - c * gu)", "rho * fg)", "rank dgate: measured before the projection"),
]  # fmt: skip


def probe(kernel: ModuleType) -> bool:
    """True when `kernel` disagrees with the float64 reference on any adversarial case."""
    # A small launch table brings tails, tile loops and several groups per program to sizes an interpreter can afford.
    with mock.patch.object(kernel, "LAUNCH", {16: (4, 4)}), mock.patch.object(kernel, "PARTIALS", 2):
        return any(_wrong(actual, truth) for case in (_inject_cases, _rank_cases) for actual, truth in case(kernel))


def _wrong(actual: Tensor, truth: Tensor) -> bool:
    # Not `error > bound`: NaN is wrong too.
    return not max(relative_errors(actual, truth)) <= 4 * tolerance(actual.dtype)


def _random(*shape: int, source: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=source, device=source.device)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cases(operands: int, source: torch.Generator) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Operands with a row stride of their own, channel weights and a gate: one tile with a tail, then several."""
    for tokens, width, gates in ((9, 13, (9, 1)), (10, 35, ())):
        wider = _random(operands, tokens, width + 3, source=source)
        yield list(wider[..., 1:-2]), _random(width, source=source), _random(*gates, source=source)


def _inject_cases(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(kernel, float64 reference) pairs of the hidden-width stage: every output and gradient of every case."""
    for (main, aux, grad), pre_gate, gate in _cases(3, generator(0, _device())):
        inputs = (main, aux, gate, pre_gate)
        out, c, inverse = kernel.inject_forward(*inputs, 0.5)
        gradients = kernel.inject_backward(grad, *inputs, c, inverse, [True] * 4)
        yield from _pairs((out, *gradients), reference.project_and_inject, inputs, grad, 0.5)
    undirected = torch.zeros_like(main)
    yield kernel.inject_forward(undirected, aux, None, None, 0.0)[0], aux.double()


def _rank_cases(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(kernel, float64 reference) pairs of the rank-space stage."""
    for (left, right, host, grad), weight, gate in _cases(4, generator(1, _device())):
        inputs = (left, right, host, weight, gate)
        out, c, inverse = kernel.rank_forward(*inputs, 0.5, 0.1)
        gradients = kernel.rank_backward(grad, *inputs, c, inverse, 0.1, [True] * 5)
        yield from _pairs((out, *gradients), reference.rank_project, inputs, grad, 0.5, 0.1)


def _pairs(actual: tuple, function, inputs: tuple, grad: Tensor, *epsilons: float) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs of a kernel beside those of the reference and its autograd gradients in float64."""
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    truth = function(*wide, *epsilons)
    yield from zip(actual, (truth.detach(), *torch.autograd.grad(truth, wide, grad.double())), strict=True)
