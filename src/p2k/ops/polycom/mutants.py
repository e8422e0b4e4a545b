"""Bugs to plant in the polycom kernels, and the probe that must catch every one of them.

The probe calls a kernel module's launchers on adversarial cases and compares with the reference in float64. It needs
Triton's interpreter or a GPU, and judges the original module as sound.

Chapter: polycom
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.polycom import reference

MUTANTS = [
    Mutant("s3 * k * k * k + _sum(q * q * q)", "s3 * k * k * k + _sum(q * q)",
           "forward: the cubic is normed as a square"),
    Mutant("s2 * k * k + _sum(q * q)", "s2 * k + _sum(q * q)", "forward: a sum is rescaled by too small a power"),
    Mutant("_downscale(grown) / _downscale(largest)", "1.0", "forward: sums of smaller tiles are not rescaled"),
    Mutant("tl.max(tl.abs(x), 1)", "tl.max(x, 1)", "forward: a large negative element is not seen"),
    Mutant("return tl.exp2(-tl.minimum(tl.floor(tl.log2(largest)), 126.0))", "return 0.0 * largest + 1.0",
           "rows of huge values are not scaled: sixth powers overflow"),
    Mutant("s3 / width + eps * d * d * d", "s3 / width + eps", "forward: the epsilon is not scaled with the row"),
    Mutant("s1 / width + eps * d)", "s1 / width)", "forward: the epsilon of the linear term is lost"),
    Mutant("rsqrt(s2 / width", "rsqrt(s2", "forward: the square is divided by its norm, not by its root mean square"),
    Mutant("a1 = tl.load(weight_ptr).to(ACC) * rho1\n    a2 = tl.load(weight_ptr + 1).to(ACC) * rho2\n"
           "    a3 = tl.load(weight_ptr + 2)",
           "a1 = tl.load(weight_ptr + 2).to(ACC) * rho1\n    a2 = tl.load(weight_ptr + 1).to(ACC) * rho2\n"
           "    a3 = tl.load(weight_ptr)", "forward: coefficients in the order of the public code"),
    Mutant("b + y * (a1", "y * (a1", "forward: the constant term is dropped"),
    Mutant("mask=inside, other=0.0).to(ACC)", "mask=inside, other=0.0).to(tl.float16).to(ACC)",
           "a row is rounded to 16 bits before its powers"),
    Mutant("mask=inside, other=0.0)", "mask=inside, other=1.0)", "what lies beyond a row enters its sums"),
    Mutant("start = tl.multiple_of(rows * stride", "start = tl.multiple_of(rows * width", "a row stride is ignored"),
    Mutant("tl.max_constancy(columns < width", "tl.max_constancy(columns < width - 1", "the last column is lost", 2),
    Mutant("first = a1 * rho1 * (g - c1 * y)", "first = a1 * rho1 * g", "dx: the norm of the linear term is constant"),
    Mutant("2.0 * a2 * rho2 * y", "a2 * rho2 * y", "dx: the factor of the square is missing"),
    Mutant("(g - c3 * q * y)", "(g + c3 * q * y)", "dx: wrong sign in the cubic's norm"),
    Mutant("down * (first + second + third)", "(first + second + third)", "dx: the row's scale is forgotten"),
    Mutant("d2 + rho2 * s2, d3", "d2 + s2, d3", "dweight: the square is not normed"),
    Mutant("d1 + rho1 * s1", "rho1 * s1", "dweight: every group overwrites the sum of those before it"),
    Mutant("s0, s1 = s0 + _sum(g), s1", "s0, s1 = s0, s1", "dbias of PolyNorm is never added up"),
    Mutant("tl.num_programs(0)):\n        at = (tl.zeros", "1):\n        at = (tl.zeros",
           "PolyReLU: blocks are counted twice"),
    Mutant("(a1 + r * (a2 + r * a3))\n    tl.store", "(a1 + r * (a2 + a3))\n    tl.store",
           "PolyReLU: the cubic is a square"),
    Mutant("r = tl.where(x < 0.0, 0.0, x)  #", "r = x  #", "PolyReLU: negative inputs pass"),
    Mutant("tl.where(x <= 0.0, 0.0, g * slope)", "g * slope", "PolyReLU dx: the gradient leaks below zero"),
    Mutant("(3.0 * a3)", "a3", "PolyReLU dx: the derivative of the cubic lacks its factor"),
    Mutant("d3 + g * r * r * r, db", "d3 + g * r * r, db", "PolyReLU dweight: the cubic counts as a square"),
]  # fmt: skip


def probe(kernel: ModuleType) -> bool:
    """True when `kernel` disagrees with the float64 reference on any adversarial case."""
    # Small sizes bring tails, tile loops and several groups per program within an interpreter's reach.
    small = {"LAUNCH": {16: (4, 4)}, "BLOCK": 16, "PARTIALS": 2}
    with mock.patch.multiple(kernel, **small):
        return any(_wrong(actual, truth) for case in (_norm_cases, _relu_cases) for actual, truth in case(kernel))


def _wrong(actual: Tensor, truth: Tensor) -> bool:
    # Not `error > bound`: NaN is wrong too.
    return not max(relative_errors(actual, truth)) <= 4 * tolerance(actual.dtype)


def _inputs(tokens: int, width: int, seed: int) -> tuple[Tensor, ...]:
    """Upstream gradient and pre-activations with a row stride of their own, coefficients, constant term."""
    source = generator(seed, "cuda" if torch.cuda.is_available() else "cpu")
    wider = torch.randn(2, tokens, width + 3, generator=source, device=source.device)
    weight, bias = (torch.randn(shape, generator=source, device=source.device) for shape in ((3,), ()))
    return wider[0, :, 1:-2], wider[1, :, 1:-2], weight, bias


def _norm_cases(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(kernel, float64 reference) pairs: one tile with a tail, then several of growing size and a negative peak."""
    for tokens, width, eps in ((9, 13, 0.5), (10, 35, 0.1)):
        grad, x, weight, bias = _inputs(tokens, width, seed=width)
        if width > 16:
            x[:, 20] = -40.0
            x[1] *= 2.0**40
            x[2, 20] = -(2.0**40)
        out, saved = kernel.norm_forward(x, weight, bias, eps)
        gradients = kernel.norm_backward(grad, x, weight, saved, [True] * 3)
        found = (out, *gradients)
        truth = _truth(lambda *t, eps=eps: reference.poly_norm(*t, eps), (x, weight, bias), grad)
        yield from zip(found, truth, strict=True)
        if width > 16:
            # The gradient of a huge row is tiny: judged by itself, not beside those of the others.
            yield gradients[0][1], truth[1][1]


def _relu_cases(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for PolyReLU: several blocks with a tail."""
    grad, x, weight, bias = _inputs(5, 17, seed=1)
    out, saved = kernel.relu_forward(x, weight, bias)
    gradients = kernel.relu_backward(grad, x, weight, saved, [True] * 3)
    yield from zip((out, *gradients), _truth(reference.poly_relu, (x, weight, bias), grad), strict=True)


def _truth(function, inputs: tuple, grad: Tensor) -> tuple[Tensor, ...]:
    """Result and autograd gradients of the reference in float64."""
    wide = [tensor.double().requires_grad_() for tensor in inputs]
    out = function(*wide)
    return out.detach(), *torch.autograd.grad(out, wide, grad.double())
