"""Losses of the spherical family: functions of the mean, the scatter and the target's output, and of nothing else.

Letters: o outputs, D classes, c target, m mean, S scatter, t = o_c - m deviation, z = t / sqrt(S / D) z-score of the
target; a sharpness and b location of the Z-loss. Not the auxiliary "z-loss" on log-partition functions.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from p2k.core.checks import check_positive
from p2k.linalg.spherical import SphericalStatistics, spherical_statistics
from p2k.losses.reduction import reduce


def target_z_score(statistics: SphericalStatistics) -> Tensor:
    """The target's output in standard deviations above the mean of its row, at most ``sqrt(D - 1)``.

    Outputs without spread have no z-score. They get 0, with a gradient of 0.

    Source: debrebisson2016zloss, eq:z-loss-score.
    Chapter: z-loss
    """
    spread = statistics.scatter > 0
    variance = torch.where(spread, statistics.scatter, 1.0) / statistics.classes
    return torch.where(spread, statistics.deviation / variance.sqrt(), 0.0)


def z_loss_of(statistics: SphericalStatistics, *, sharpness: float, location: float, reduction: str = "mean") -> Tensor:
    """The Z-loss of outputs that are known by their statistics only, as `FactoredOutput` returns them.

    Arguments as in `z_loss`.

    Source: debrebisson2016zloss, eq:z-loss-loss.
    Chapter: z-loss
    """
    check_positive("z_loss", sharpness=sharpness)
    if not -math.inf < location < math.inf:
        raise ValueError(f"z_loss: location must be finite, got {location}")
    short = location - target_z_score(statistics)
    # softplus(a x) / a in the form that neither overflows for a large `a` nor loses the digits of x.
    losses = short.clamp(min=0) + torch.log1p(torch.exp(-sharpness * short.abs())) / sharpness
    return reduce(losses, reduction, statistics.counted)


def taylor_softmax_of(statistics: SphericalStatistics, *, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood under ``p_k ~ 1 + o_k + o_k^2 / 2``; the numerator is at least one half.

    Source: debrebisson2015spherical, eq:z-loss-taylor.
    Chapter: z-loss
    """
    m, D = statistics.mean, statistics.classes
    o_c = m + statistics.deviation
    total = D * (1 + m) + 0.5 * statistics.sum_of_squares
    losses = total.log() - (0.5 * (1 + (1 + o_c).square())).log()
    return reduce(losses, reduction, statistics.counted)


def spherical_softmax_of(statistics: SphericalStatistics, *, eps: float = 1e-3, reduction: str = "mean") -> Tensor:
    """Negative log-likelihood under ``p_k ~ o_k^2 + eps``: even in the outputs, so the sign carries no information.

    Args:
        eps: added to every square, ``> 0``, in squared units of the outputs.

    Source: debrebisson2015spherical, eq:z-loss-spherical-softmax.
    Chapter: z-loss
    """
    check_positive("spherical_softmax", eps=eps)
    o_c = statistics.mean + statistics.deviation
    losses = (statistics.sum_of_squares + statistics.classes * eps).log() - (o_c.square() + eps).log()
    return reduce(losses, reduction, statistics.counted)


def squared_error_of(statistics: SphericalStatistics, *, reduction: str = "mean") -> Tensor:
    """Half the squared distance of the outputs to the one-hot target.

    Source: vincent2015sparse, eq:z-loss-squared.
    Chapter: z-loss
    """
    o_c = statistics.mean + statistics.deviation
    return reduce(0.5 * (statistics.sum_of_squares - 2 * o_c + 1), reduction, statistics.counted)


def quadratic_bound_of(statistics: SphericalStatistics, *, reduction: str = "mean") -> Tensor:
    """``log D + S / 4 - t``, which is never below the log-softmax loss and equal to it where all outputs are equal.

    Source: bohning1992, eq:z-loss-bound.
    Chapter: z-loss
    """
    losses = math.log(statistics.classes) + 0.25 * statistics.scatter - statistics.deviation
    return reduce(losses, reduction, statistics.counted)


def z_loss(
    logits: Float[Tensor, "*items classes"],
    target: Int[Tensor, "*items"],
    *,
    sharpness: float,
    location: float,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``softplus(a (b - z)) / a`` of the target's z-score among all outputs: neither shift nor scale matters.

    The range of z grows with the number of classes, so a and b have no default. Every output enters the spread:
    ``-inf`` does not mask a class.

    Args:
        logits: outputs o, finite. Rows are divided by their largest deviation first, so that squares stay in range.
        target: index of the right class, or `ignore_index`.
        sharpness: a ``> 0``; large is a hinge, small is linear in z.
        location: b in standard deviations; z beyond it is rewarded less and less.
        ignore_index: label of items that do not count and receive no gradient.
        reduction: `none`, `mean` over counted items (0 without any) or `sum`.

    Raises:
        ValueError: shapes or devices disagree, no class, or an option is out of range.
        TypeError: logits are not floating point, or targets no integers.

    Source: debrebisson2016zloss, eq:z-loss-loss.
    Chapter: z-loss
    """
    return z_loss_of(
        spherical_statistics(_scaled(logits), target, ignore_index=ignore_index),
        sharpness=sharpness,
        location=location,
        reduction=reduction,
    )


def _scaled(logits: Tensor) -> Tensor:
    """Deviations from the first output over the largest of them; a constant factor is nothing to a Z-loss."""
    if not logits.is_floating_point() or logits.ndim == 0 or logits.shape[-1] == 0:
        return logits  # refused by `spherical_statistics`, in its words
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Halved, because the difference of two finite outputs need not be finite.
    shifted = 0.5 * wide - 0.5 * wide[..., :1].detach()
    largest = shifted.detach().abs().amax(-1, keepdim=True)
    return shifted / torch.where(largest > 0, largest, 1.0)


def taylor_softmax_loss(
    logits: Float[Tensor, "*items classes"],
    target: Int[Tensor, "*items"],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """`taylor_softmax_of` from outputs; arguments and errors as in `z_loss`.

    Source: debrebisson2015spherical, eq:z-loss-taylor.
    Chapter: z-loss
    """
    return taylor_softmax_of(spherical_statistics(logits, target, ignore_index=ignore_index), reduction=reduction)


class ZLoss(nn.Module):
    """`z_loss` as a module.

    Args:
        sharpness, location, ignore_index, reduction: as in `z_loss`.

    Chapter: z-loss
    """

    def __init__(self, sharpness: float, location: float, *, ignore_index: int = -100, reduction: str = "mean") -> None:
        super().__init__()
        check_positive("ZLoss", sharpness=sharpness)
        self.sharpness, self.location = sharpness, location
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, logits: Float[Tensor, "*items classes"], target: Int[Tensor, "*items"]) -> Tensor:
        """Loss of outputs."""
        options = {"sharpness": self.sharpness, "location": self.location, "reduction": self.reduction}
        return z_loss(logits, target, ignore_index=self.ignore_index, **options)

    def extra_repr(self) -> str:
        return f"sharpness={self.sharpness}, location={self.location}"
