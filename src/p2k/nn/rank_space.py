"""Maps between the hidden width and the rank space in which OQC-LR projects."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.checks import check_positive
from p2k.nn.quadratic import LIFT_SCALE, scaled_down

__all__ = ["TiedRankSpace", "UntiedRankSpace"]


class UntiedRankSpace(nn.Module):
    """Two independent maps between hidden width and rank space.

    What is orthogonal in rank space is *not* orthogonal to the main vector after this lift.

    Args:
        hidden: hidden width, ``>= 1``.
        rank: width of the rank space, ``>= 1``.
        device, dtype: of the parameters.

    Source: wang2026oqc, eq:oqc-rank; ``2 hidden rank`` weights.
    Chapter: oqc
    """

    def __init__(self, hidden: int, rank: int, *, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("UntiedRankSpace", hidden=hidden, rank=rank)
        self.down_map = nn.Linear(hidden, rank, bias=False, device=device, dtype=dtype)
        self.up_map = nn.Linear(rank, hidden, bias=False, device=device, dtype=dtype)
        scaled_down(self.up_map.weight)

    def reset_parameters(self) -> None:
        """Draw both maps again."""
        self.down_map.reset_parameters()
        self.up_map.reset_parameters()
        scaled_down(self.up_map.weight)

    def lower(self, main: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens rank"]:
        """The main vector in rank space."""
        return self.down_map(main)

    def lift(self, features: Float[Tensor, "*tokens rank"]) -> Float[Tensor, "*tokens hidden"]:
        """Rank-space features at hidden width."""
        return self.up_map(features)


class TiedRankSpace(nn.Module):
    """One matrix and its transpose: orthogonality in rank space carries over to the hidden width.

    ``<lift(q), main> = 0.1 <q, lower(main)>``. The small start of the lift is a constant factor here, because shrinking
    the matrix would also shrink the rank-space main vector towards the projection's stabiliser.

    Args:
        hidden: hidden width, ``>= 1``.
        rank: width of the rank space, ``>= 1``.
        device, dtype: of the parameter.

    Source: wang2026oqc, our variant of eq:oqc-rank; ``hidden rank`` weights.
    Chapter: oqc
    """

    def __init__(self, hidden: int, rank: int, *, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("TiedRankSpace", hidden=hidden, rank=rank)
        self.up_map = nn.Linear(rank, hidden, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the map again."""
        self.up_map.reset_parameters()

    def lower(self, main: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens rank"]:
        """The main vector in rank space."""
        return F.linear(main, self.up_map.weight.mT)

    def lift(self, features: Float[Tensor, "*tokens rank"]) -> Float[Tensor, "*tokens hidden"]:
        """Rank-space features at hidden width."""
        return LIFT_SCALE * self.up_map(features)
