"""Bugs to plant in the StableMax kernel, and the probe that must catch every one of them.

The probe calls a kernel module's launchers on adversarial cases and compares with the reference in float64. It needs
Triton's interpreter or a GPU, and judges the original module as sound.

Chapter: stablemax
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.stablemax import reference

MUTANTS = [
    Mutant("z * UNIT + UNIT", "z * UNIT", "forward: s(z) = z on the upper half"),
    Mutant("return unit / (1.0 - z)", "return unit * (1.0 + z)", "s goes on as a line below 0"),
    Mutant("return larger, (larger - total) - value", "return larger, 0.0 * value", "the sum is not corrected"),
    Mutant("return larger, (larger - total) - value", "return larger, value - (larger - total)",
           "the correction has the wrong sign"),
    Mutant("positive + negative * (UNIT * UNIT)", "positive + negative", "two sums in different units are added"),
    Mutant("negative + positive)", "negative * 0.0)", "a row of negative logits has no sum"),
    Mutant("at[None, :] != label[:, None]", "at[None, :] >= 0", "the target counts among the others"),
    Mutant('mask=inside, other=float("-inf")', "mask=inside, other=0.0", "columns behind the row count as logits 0"),
    Mutant("(columns < width, ALIGN)", "(columns < width - 1, ALIGN)", "the last class is not read"),
    Mutant("(at < width, ALIGN)", "(at < width - 1, ALIGN)", "the last class has no gradient"),
    Mutant("(rows < tokens)[:, None]", "(rows < tokens - 1)[:, None]", "the last row is lost", 2),
    Mutant("start = tl.multiple_of(rows * stride", "start = tl.multiple_of(rows * width", "a row stride is ignored"),
    Mutant("ptr + rows * stride + tl.where(known", "ptr + rows * width + tl.where(known",
           "the target's logit is read without the row stride"),
    Mutant(".to(ACC)\n\n\n@triton.jit\ndef _numbers", ".to(tl.float16).to(ACC)\n\n\n@triton.jit\ndef _numbers",
           "logits are rounded to 16 bits"),
    Mutant("(z < 0.0) == 0", "z >= 0.0", "NaN passes for an absent class"),
    Mutant('(own == float("inf")) | ', "", "an infinite target is a sure one"),
    Mutant("(label >= width) | (own", "(own", "a wrong target has a plausible loss"),
    Mutant("tl.where(ratio > 1.0, apart, 0.0) + _log1p", "_log1p", "losses stop at log 2"),
    Mutant("_log1p(tl.where(ratio > 1.0, 1.0 / ratio, ratio))",
           "tl.log(1.0 + tl.where(ratio > 1.0, 1.0 / ratio, ratio))", "small losses are rounded to multiples of 6e-8"),
    Mutant("tl.log(rest) - tl.log(unit)", "tl.log(rest)", "the unit stays in a loss whose ratio overflows"),
    Mutant("tl.where(label == ignore_index, 0.0, loss)", "loss", "absent tokens have a loss"),
    Mutant("d = tl.where(label == ignore_index, 0.0, d)", "d = d", "absent tokens have a gradient"),
    Mutant("-rest, s * inverse", "s * inverse - 1.0, s * inverse", "backward: 1 - p_y is a difference"),
    Mutant("-rest, s * inverse", "rest, s * inverse", "backward: the target is pushed down"),
    Mutant(" / (1.0 + tl.abs(z)) * g", " * g", "backward: the slope of the symmetric logarithm is lost"),
    Mutant(" / (1.0 + tl.abs(z)) * g", " / (1.0 + tl.abs(z))", "backward: the upstream gradient is lost"),
    Mutant("grad_ptr + rows * grad_stride", "grad_ptr + rows", "backward: the stride of the upstream gradient is lost"),
    Mutant("UNIT = 2.0**-24", "UNIT = 1.0", "sums of the largest logits overflow"),
]  # fmt: skip


def probe(kernel: ModuleType) -> bool:
    """True when `kernel` disagrees with the float64 reference on any adversarial case."""
    # A small launch table brings tails and tile loops to sizes an interpreter can afford.
    with mock.patch.object(kernel, "LAUNCH", {16: (4, 4)}):
        return any(_wrong(actual, truth) for actual, truth in _cases(kernel))


def _wrong(actual: Tensor, truth: Tensor) -> bool:
    if not torch.equal(actual.isnan(), truth.isnan()):
        return True
    # Not `error > bound`: inf is wrong too.
    return not max(relative_errors(actual.nan_to_num(0.0), truth.nan_to_num(0.0))) <= 4 * tolerance(actual.dtype)


def _cases(kernel: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(kernel, float64 reference) pairs, cheap ones first."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = generator(0, device)
    for tokens, classes, offset, scale in ((6, 13, 0.0, 3.0), (5, 35, -50.0, 9.0), (3, 20, 3e38, 1e37)):
        wide = torch.randn(tokens, classes + 3, generator=source, device=device) * scale + offset
        target = torch.randint(0, classes, (tokens,), generator=source, device=device)
        target[-1] = classes - 1
        yield from _compared(kernel, wide[:, 1:-2], target, source)
    # Others far ahead: the ratio leaves float32.
    logits = torch.full((1, 20), 1e38, device=device)
    logits[0, 3] = -1e38
    yield from _compared(kernel, logits, torch.full((1,), 3, device=device), source)
    # Targets far ahead: losses and target gradients of 1e-3 to 1e-7, one row at a time since a norm sees the largest.
    logits = torch.randn(1, 20, generator=source, device=device)
    for ahead in (1e4, 1e8):
        logits[0, 3] = ahead
        yield from _compared(kernel, logits, torch.full((1,), 3, device=device), source)
    yield from _special(kernel, source, device)
    # One large number and many ones that its rounding swallows.
    many = torch.zeros(1, 16 * 90, device=device)
    many[0, :16], many[0, -1] = 2.0**24 - 1, 2.0**30
    yield from _compared(kernel, many, torch.tensor([many.shape[1] - 1], device=device), source)


def _compared(
    kernel: ModuleType, logits: Tensor, target: Tensor, source: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Losses, gradients, and the gradients of the targets alone."""
    grad = torch.randn(len(target), 2, generator=source, device=logits.device)[:, 0]
    exact = logits.double().requires_grad_()
    truth = reference.cross_entropy(exact, target, -100)
    (slope,) = torch.autograd.grad(truth, exact, grad.double())
    loss, numbers = kernel.forward(logits, target, -100)
    found = kernel.backward(grad, logits, target, numbers, -100)
    yield from ((loss, truth.detach()), (found, slope))
    yield tuple(x.gather(1, target[:, None]) for x in (found, slope))


def _special(kernel: ModuleType, source: torch.Generator, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Absent tokens full of NaN, NaN and infinities elsewhere, a target out of range."""
    logits = torch.randn(5, 18, generator=source, device=device)
    target = torch.tensor([2, -100, 17, 5, 18], device=device)
    logits[1], logits[2, 4], logits[3, 5] = torch.nan, torch.nan, torch.inf
    expected = reference.cross_entropy(logits[:1].double(), target[:1], -100)[0]
    loss, numbers = kernel.forward(logits, target, -100)
    yield loss, torch.stack([expected, 0 * expected, *[torch.nan * expected] * 3])
    found = kernel.backward(torch.ones_like(loss), logits, target, numbers, -100)
    yield found[1:], torch.tensor([0.0] + [torch.nan] * 3, device=device).double()[:, None].expand(4, 18)
