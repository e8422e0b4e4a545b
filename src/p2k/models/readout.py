"""How the outputs of the last two blocks become one feature vector per image.

One comparison uses one readout: moving it changes accuracy by as much as the arms differ.
"""

from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["READOUTS", "LastReadout", "PenultimateNormedReadout", "PenultimateReadout"]


class LastReadout(nn.Module):
    """Norm and mean of the last block's tokens.

    Args:
        dim: width of a token.
        device, dtype: of the parameters.

    Chapter: oqc
    """

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(
        self, last: Float[Tensor, "batch tokens dim"], penultimate: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch dim"]:
        """Pool the last block; the other is not used."""
        return self.norm(last).mean(-2)


class PenultimateReadout(LastReadout):
    """Norm and mean of the sum of the last two blocks, with the fixed coefficient 1.

    Source: wang2026oqc, eq:oqc-readout; the paper names this readout, its formula is our reading.
    Chapter: oqc
    """

    def forward(
        self, last: Float[Tensor, "batch tokens dim"], penultimate: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch dim"]:
        """Pool the sum."""
        return super().forward(last + penultimate, penultimate)


class PenultimateNormedReadout(nn.Module):
    """Sum of the normed means of the last two blocks, with the fixed coefficient 1 and a norm for each.

    Args:
        dim: width of a token.
        device, dtype: of the parameters.

    Source: wang2026oqc, another reading of eq:oqc-readout.
    Chapter: oqc
    """

    def __init__(self, dim: int, *, device=None, dtype=None) -> None:
        super().__init__()
        self.last_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.penultimate_norm = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(
        self, last: Float[Tensor, "batch tokens dim"], penultimate: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch dim"]:
        """Pool, norm, add."""
        return self.last_norm(last.mean(-2)) + self.penultimate_norm(penultimate.mean(-2))


READOUTS = {
    "last": LastReadout,
    "penultimate": PenultimateReadout,
    "penultimate-normed": PenultimateNormedReadout,
}
