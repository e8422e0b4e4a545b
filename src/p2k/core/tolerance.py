"""The one table of tolerances, by dtype and reduction length, and the comparison that uses it."""

import math

import torch
from torch import Tensor

# Relative Frobenius error of a row-wise or elementwise result. Half-precision rows are about 4 unit round-offs,
# single and double rows leave room for the order of summation up to 1,024 terms.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# A matrix product in split-TF32 loses about one digit against an IEEE float32 sum.
DOT_FLOOR = {**FLOOR, torch.float64: 1e-12, torch.float32: 1e-5}


def tolerance(dtype: torch.dtype, length: int = 1, *, dot: bool = False) -> float:
    """Accepted relative error of a result that sums `length` terms in `dtype`.

    Rounding of a sum in random order grows with the square root of its length; the table holds up to 1,024.
    """
    floor = (DOT_FLOOR if dot else FLOOR)[dtype]
    return floor * max(1.0, math.sqrt(length / 1024))


def relative_errors(actual: Tensor, truth: Tensor, *, scale: Tensor | None = None) -> tuple[float, float]:
    """Return (Frobenius, max-abs) error of `actual` against a float64 `truth`, relative to `scale`.

    `scale` defaults to the truth. Where a result is a difference of large terms (a projection, say) pass the
    largest operand, because cancellation makes the error relative to the result meaningless.
    """
    if truth.dtype != torch.float64:
        raise TypeError(f"relative_errors: truth must be float64, got {truth.dtype}")
    if actual.shape != truth.shape:
        raise ValueError(f"relative_errors: actual must have shape {tuple(truth.shape)}, got {tuple(actual.shape)}")
    if truth.numel() == 0:
        return 0.0, 0.0
    difference = actual.double() - truth
    reference = (truth if scale is None else scale).double()
    tiny = torch.finfo(torch.float64).tiny
    frobenius = difference.norm() / reference.norm().clamp_min(tiny)
    largest = difference.abs().max() / reference.abs().max().clamp_min(tiny)
    return frobenius.item(), largest.item()


def assert_as_good_as(
    actual: Tensor,
    truth: Tensor,
    eager: Tensor,
    *,
    factor: float,
    length: int = 1,
    dot: bool = False,
    scale: Tensor | None = None,
    name: str = "result",
) -> None:
    """Assert that `actual` errs at most `factor` times as much as `eager` of the same dtype, plus the floor.

    The floor is a quarter of the table's entry, one unit round-off of a half type and four of float32: on a small
    tensor eager torch may by luck be nearly exact. Errors are taken in both norms. NaN and inf fail.

    Raises:
        AssertionError: `actual` is worse, in a message with both errors.
        TypeError: `actual` and `eager` differ in dtype, or `truth` is not float64.
        ValueError: the shapes differ.
    """
    if actual.dtype != eager.dtype:
        raise TypeError(f"assert_as_good_as: actual must have dtype {eager.dtype} like eager, got {actual.dtype}")
    floor = 0.25 * tolerance(actual.dtype, length, dot=dot)
    got = relative_errors(actual, truth, scale=scale)
    base = relative_errors(eager, truth, scale=scale)
    for norm, error, eager_error in zip(("frobenius", "max"), got, base, strict=True):
        bound = factor * eager_error + floor
        if not error <= bound < math.inf:
            raise AssertionError(
                f"{name}: {norm} error {error:.2e} exceeds {bound:.2e} ({factor} x eager {eager_error:.2e} + floor)"
            )
