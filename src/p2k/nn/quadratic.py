"""Second-order auxiliary vectors: products of two linear maps of a token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.checks import check_positive

__all__ = ["LowRankQuadratic", "QuadraticFeatures", "WideQuadratic", "scaled_down"]

# A lifted branch of RMS 1 would start three times as large as the main vector (section on initialisation).
LIFT_SCALE = 0.1


def scaled_down(weight: Tensor) -> None:
    """Shrink a freshly drawn weight, so that the auxiliary branch starts as a small addition."""
    with torch.no_grad():
        weight.mul_(LIFT_SCALE)


class QuadraticFeatures(nn.Module):
    """RMS-normalised elementwise product of two low-rank maps of each token.

    Without the norm the features scale with the square of the token, with it they do not depend on its length.

    Args:
        dim: width of a token, ``>= 1``.
        rank: number of features, ``>= 1``.
        norm_eps: added to the mean square before the root, ``> 0``.
        device, dtype: of the parameters.

    Raises:
        ValueError: `dim`, `rank` or `norm_eps` is not positive.

    Source: wang2026oqc, eq:oqc-quadratic, eq:oqc-rmsnorm; ``2 dim rank + rank`` weights.
    Chapter: oqc
    """

    def __init__(self, dim: int, rank: int, *, norm_eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("QuadraticFeatures", dim=dim, rank=rank, norm_eps=norm_eps)
        self.rank, self.norm_eps = rank, norm_eps
        self.maps = nn.Linear(dim, 2 * rank, bias=False, device=device, dtype=dtype)
        self.norm_weight = nn.Parameter(torch.ones(rank, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Draw the maps again and set the norm's weight to one."""
        self.maps.reset_parameters()
        nn.init.ones_(self.norm_weight)

    def factors(
        self, x: Float[Tensor, "*tokens dim"]
    ) -> tuple[Float[Tensor, "*tokens rank"], Float[Tensor, "*tokens rank"]]:
        """Both linear maps of the token."""
        left, right = self.maps(x).chunk(2, dim=-1)
        return left, right

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens rank"]:
        """The normalised product, computed in at least float32 and rounded once to the dtype of the factors."""
        left, right = self.factors(x)
        wide = torch.promote_types(left.dtype, torch.float32)
        product = left.to(wide) * right.to(wide)
        scale = (product.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
        return (self.norm_weight.to(wide) * product * scale).to(left.dtype)

    def extra_repr(self) -> str:
        """Rank and stabiliser."""
        return f"rank={self.rank}, norm_eps={self.norm_eps}"


class LowRankQuadratic(nn.Module):
    """Quadratic features lifted to the hidden width.

    Args:
        dim: width of a token, ``>= 1``.
        hidden: width of the result, ``>= 1``.
        rank: number of features, ``>= 1``.
        norm_eps: added to the mean square before the root, ``> 0``.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size or `norm_eps` is not positive.

    Source: wang2026oqc, eq:oqc-lift; ``2 dim rank + hidden rank + rank`` weights.
    Chapter: oqc
    """

    def __init__(self, dim: int, hidden: int, rank: int, *, norm_eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("LowRankQuadratic", hidden=hidden)
        self.features = QuadraticFeatures(dim, rank, norm_eps=norm_eps, device=device, dtype=dtype)
        self.lift = nn.Linear(rank, hidden, bias=False, device=device, dtype=dtype)
        scaled_down(self.lift.weight)

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        self.features.reset_parameters()
        self.lift.reset_parameters()
        scaled_down(self.lift.weight)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens hidden"]:
        """The auxiliary vector of each token."""
        return self.lift(self.features(x))


class WideQuadratic(nn.Module):
    """Elementwise product of two linear maps at full hidden width: the other reading of the full variant.

    It has neither lift nor norm, so its start is made small through one of the two factors.

    Args:
        dim: width of a token, ``>= 1``.
        hidden: width of the result, ``>= 1``.
        device, dtype: of the parameters.

    Raises:
        ValueError: a width is not positive.

    Source: wang2026oqc, reconstructed alternative; ``2 dim hidden`` weights.
    Chapter: oqc
    """

    def __init__(self, dim: int, hidden: int, *, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("WideQuadratic", dim=dim, hidden=hidden)
        self.maps = nn.Linear(dim, 2 * hidden, bias=False, device=device, dtype=dtype)
        scaled_down(self.maps.weight[:hidden])

    def reset_parameters(self) -> None:
        """Draw both maps again."""
        self.maps.reset_parameters()
        scaled_down(self.maps.weight[: self.maps.out_features // 2])

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens hidden"]:
        """The auxiliary vector of each token."""
        left, right = self.maps(x).chunk(2, dim=-1)
        return left * right
