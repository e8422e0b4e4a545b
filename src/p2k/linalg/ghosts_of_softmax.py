"""The log-partition function of a softmax along a line of logits: its Taylor radius, its bounds and its series.

Along a step the logits move as ``z + t a`` with slopes ``a`` per unit of ``t``. The partition function is
``F(t) = sum_k exp(z_k + a_k t)``, and the cross-entropy is ``log F(t)`` plus a linear term. Everything here takes
logits and slopes and knows nothing of networks or optimizers. `p2k.linalg.partition_zeros` finds the zeros of F.
"""

import math

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from p2k.core.checks import check_floating, check_same_device

__all__ = [
    "binary_radius",
    "kl_remainder_bound",
    "log_partition_series",
    "logit_spread",
    "radius_bound",
    "relative_partition",
    "series_radius",
    "step_ratio",
    "zero_free_bound",
]


def logit_spread(slopes: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """Largest minus smallest slope: how fast the fastest pair of logits moves apart.

    Args:
        slopes: change of each logit per unit of the step, at least one class.

    Raises:
        TypeError: not floating point.
        ValueError: no class.

    Source: sao2026ghosts, eq:ghosts-of-softmax-bound.
    Chapter: ghosts-of-softmax
    """
    check_floating("logit_spread", slopes=slopes)
    if slopes.ndim == 0 or slopes.shape[-1] == 0:
        raise ValueError(f"logit_spread: slopes must be [..., classes] with a class, got {tuple(slopes.shape)}")
    return slopes.amax(-1) - slopes.amin(-1)


def radius_bound(slopes: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch"]:
    """``pi / spread``: no zero of the partition function is nearer to the origin; inf where no logit difference moves.

    For a batch take the smallest. Arguments and errors as in `logit_spread`.

    Source: sao2026ghosts, eq:ghosts-of-softmax-bound.
    Chapter: ghosts-of-softmax
    """
    return math.pi / logit_spread(slopes)


def step_ratio(changes: Float[Tensor, "*batch classes"]) -> Float[Tensor, ""]:
    """Length of a step as a multiple of its radius bound: the largest spread in the batch over pi.

    Args:
        changes: first-order change of each logit over the *whole* step, for every example; at least one example. The
            length of the step cancels, so it is not asked for.

    Returns:
        0-d tensor ``>= 0``; below 1 the Taylor series of the loss along the step converges at its end, if the logits
        are linear in it.

    Raises:
        TypeError: not floating point.
        ValueError: no example or no class.

    Source: sao2026ghosts, eq:ghosts-of-softmax-ratio.
    Chapter: ghosts-of-softmax
    """
    spread = logit_spread(changes)
    if spread.numel() == 0:
        raise ValueError(f"step_ratio: changes must hold at least one example, got shape {tuple(changes.shape)}")
    return spread.amax() / math.pi


def binary_radius(logits: Float[Tensor, "*batch 2"], slopes: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
    """Exact radius for two classes, ``sqrt(gap^2 + pi^2) / spread``; inf where the slopes agree.

    Args:
        logits: at the start of the step.
        slopes: change of each logit per unit of the step.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: the last dimension is not 2, or the shapes differ.

    Source: sao2026ghosts, eq:ghosts-of-softmax-binary.
    Chapter: ghosts-of-softmax
    """
    _check_pair("binary_radius", logits, slopes)
    if logits.shape[-1] != 2:
        raise ValueError(f"binary_radius: logits must have two classes, got {logits.shape[-1]}")
    gap = logits[..., 0] - logits[..., 1]
    return torch.hypot(gap, torch.full_like(gap, math.pi)) / logit_spread(slopes)


def relative_partition(
    logits: Float[Tensor, "*batch classes"],
    slopes: Float[Tensor, "*batch classes"],
    steps: Complex[Tensor, "*batch points"],
) -> Complex[Tensor, "*batch points"]:
    """``F(t) / F(Re t)``: the characteristic function of the slopes under the softmax at ``Re t``, taken at ``Im t``.

    It has the zeros of F, modulus at most 1, and does not overflow.

    Args:
        logits: at the origin, float64; -inf removes a class.
        slopes: change of each logit per unit of the step.
        steps: complex points t, the leading dimensions broadcast against those of `logits`.

    Raises:
        TypeError: dtypes differ or are not floating point, or `steps` is not complex.
        ValueError: the shapes differ.

    Source: sao2026ghosts, eq:ghosts-of-softmax-characteristic.
    Chapter: ghosts-of-softmax
    """
    op = "relative_partition"
    _check_pair(op, logits, slopes)
    if not steps.is_complex():
        raise TypeError(f"{op}: steps must be complex, got {steps.dtype}")
    tilted = logits[..., None, :] + slopes[..., None, :] * steps.real[..., None]
    return torch.polar(tilted.softmax(-1), slopes[..., None, :] * steps.imag[..., None]).sum(-1)


def zero_free_bound(spread: Float[Tensor, "*#batch"], height: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch"]:
    """``cos(spread height / 2)``: a lower bound of ``|F(t)| / F(Re t)`` at ``|Im t| = height``; 0 from ``pi / spread``.

    Attained by two classes of equal weight.

    Args:
        spread: of the slopes.
        height: distance from the real axis, ``>= 0``.

    Source: sao2026ghosts, eq:ghosts-of-softmax-strip.
    Chapter: ghosts-of-softmax
    """
    return torch.cos((spread * height / 2).clamp(max=math.pi / 2))


def log_partition_series(
    logits: Float[Tensor, "*batch classes"], slopes: Float[Tensor, "*batch classes"], order: int
) -> Float[Tensor, "*batch terms"]:
    """Taylor coefficients of ``log(F(t) / F(0))`` at 0, orders 0 to `order`: cumulants over factorials.

    Use float64: the recursion loses about a digit per ten orders.

    Args:
        logits: at the origin.
        slopes: change of each logit per unit of the step.
        order: last order, ``>= 1``.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: the shapes differ, or `order` is not positive.

    Source: sao2026ghosts, eq:ghosts-of-softmax-series.
    Chapter: ghosts-of-softmax
    """
    _check_pair("log_partition_series", logits, slopes)
    if order < 1:
        raise ValueError(f"log_partition_series: order must be at least 1, got {order}")
    weights = logits.softmax(-1)
    mean = (weights * slopes).sum(-1)
    centred = slopes - mean[..., None]
    power, moments = weights, [torch.ones_like(mean)]
    for n in range(1, order + 1):
        power = power * centred / n
        moments.append(power.sum(-1))
    series = [torch.zeros_like(mean)]
    # n f_n = sum_k k c_k f_(n-k) for f = exp(c), with f_0 = 1.
    for n in range(1, order + 1):
        known = sum((k * series[k] * moments[n - k] for k in range(1, n)), torch.zeros_like(mean))
        series.append(moments[n] - known / n)
    series[1] = series[1] + mean
    return torch.stack(series, -1)


def series_radius(series: Float[Tensor, "*batch terms"], *, tail: int = 20) -> Float[Tensor, "*batch"]:
    """Radius of convergence by the root test, from the largest ``|c_n|^(1/n)`` of the last `tail` terms.

    A pair of conjugate logarithmic singularities at modulus R gives ``|c_n| = (2 / n) R^-n |cos(n angle)|``. The factor
    ``2 / n`` is divided out first, and the largest of several orders has a cosine near 1.

    Args:
        series: coefficients from order 0 on.
        tail: how many of the last orders to use, at least 1 and fewer than there are terms.

    Raises:
        ValueError: `tail` out of range.

    Source: sao2026ghosts, eq:ghosts-of-softmax-series.
    Chapter: ghosts-of-softmax
    """
    terms = series.shape[-1]
    if not 1 <= tail < terms:
        raise ValueError(f"series_radius: tail must lie in [1, {terms}), got {tail}")
    n = torch.arange(terms - tail, terms, dtype=series.dtype, device=series.device)
    return 1 / ((series[..., -tail:].abs() * n / 2).log() / n).exp().amax(-1)


def kl_remainder_bound(spread: Float[Tensor, "*#batch"], step: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch"]:
    """``|t|^3 spread^3 / (36 sqrt 3)``: how far ``KL(p(0) || p(t))`` may be from half the variance times ``t^2``.

    It holds for every real step, inside the radius or not. Twice this bounds the other direction, ``KL(p(t) || p(0))``.

    Args:
        spread: of the slopes, ``>= 0``.
        step: real t.

    Source: sao2026ghosts, eq:ghosts-of-softmax-kl.
    Chapter: ghosts-of-softmax
    """
    return (step * spread).abs() ** 3 / (36 * math.sqrt(3))


def _check_pair(op: str, logits: Tensor, slopes: Tensor) -> None:
    check_floating(op, logits=logits, slopes=slopes)
    check_same_device(op, logits=logits, slopes=slopes)
    if logits.shape != slopes.shape or logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{op}: logits and slopes must have one shape [..., classes], "
            f"got {tuple(logits.shape)} and {tuple(slopes.shape)}"
        )
