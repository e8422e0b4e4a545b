"""The three numbers of an output vector that a spherical loss may read: mean, spread and the target's deviation.

Letters of the papers: o outputs, D classes, c target, ``s = sum o = D mean``, ``q = sum o^2 = scatter + D mean^2``.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p2k.core.checks import check_floating, check_same_device, check_shape

__all__ = ["SphericalStatistics", "check_targets", "spherical_statistics"]


class SphericalStatistics(NamedTuple):
    """What a spherical loss sees of the outputs of each item; a common offset enters the mean alone.

    Args:
        classes: number of outputs D, ``>= 1``.
        mean: of the outputs, ``[*items]``.
        scatter: sum of the squared deviations from the mean, ``>= 0``, ``[*items]``.
        deviation: the target's output minus the mean, ``[*items]``; 0 where the item does not count.
        counted: false where the label is to be ignored, ``[*items]``.
    """

    classes: int
    mean: Tensor
    scatter: Tensor
    deviation: Tensor
    counted: Tensor

    @property
    def sum_of_squares(self) -> Tensor:
        """Sum of the squared outputs."""
        return self.scatter + self.classes * self.mean.square()


def check_targets(op: str, target: Tensor, items: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless `target` holds one integer label per item."""
    if target.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
        raise TypeError(f"{op}: target must hold integers, got {target.dtype}")
    check_shape(op, "target", target, items)


def spherical_statistics(
    logits: Float[Tensor, "*items classes"], target: Int[Tensor, "*items"], *, ignore_index: int = -100
) -> SphericalStatistics:
    """Mean, scatter and the target's deviation of every row of outputs, in float32 or wider.

    The first output of a row is subtracted before anything is summed. Equal outputs then have scatter exactly 0, and
    a common offset costs no digit beyond those that storing the outputs has already cost.

    Args:
        logits: outputs o, finite; half precision is summed in float32.
        target: index of the right class in ``[0, classes)``, or `ignore_index`.
        ignore_index: label of items that do not count; their outputs may be anything, NaN included.

    Raises:
        ValueError: shapes or devices disagree, or there is no class.
        TypeError: logits are not floating point, or targets no integers.

    Source: debrebisson2016zloss, eq:z-loss-statistics.
    Chapter: z-loss
    """
    op = "spherical_statistics"
    check_floating(op, logits=logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits must be [*items, classes] with a class or more, got {tuple(logits.shape)}")
    check_targets(op, target, tuple(logits.shape[:-1]))
    check_same_device(op, logits=logits, target=target)
    counted = target != ignore_index
    o = torch.where(counted[..., None], logits.to(torch.promote_types(logits.dtype, torch.float32)), 0.0)
    pivot = o[..., :1].detach()
    shifted = o - pivot
    mean = shifted.mean(-1, keepdim=True)
    centred = shifted - mean
    index = torch.where(counted, target.long(), 0)[..., None]
    deviation = centred.gather(-1, index)[..., 0]
    return SphericalStatistics(logits.shape[-1], (mean + pivot)[..., 0], centred.square().sum(-1), deviation, counted)
