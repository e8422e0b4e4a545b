"""Asymmetric factorised bilinear feed-forward: the baseline that OQC is compared with.

No code of the method is public. Read off its framework figure: the overlapped cycle map on one side, the grouped
cross map on the other, a 3x3 depth-wise convolution after each, SiLU on the overlapped side only, the product of the
two sides, an output map. Reconstructed, because neither figure nor abstract fixes it: the group counts (4 and 2, as
drawn), which neighbour a group overlaps with (the next, cyclically), the order in which the cross map interleaves
its outputs, zero padding, and where biases stand.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.checks import check_positive
from p2k.nn.ffn import check_tokens

__all__ = ["AFBOFeedForward", "GroupedCross", "OverlappedCycle"]


class OverlappedCycle(nn.Module):
    """Grouped linear map whose group ``k`` reads input groups ``k`` and ``k + 1``, cyclically.

    Args:
        dim: input width, a multiple of `groups`.
        hidden: output width, a multiple of `groups`.
        groups: number of groups, ``>= 2`` (a single group would read itself twice).
        device, dtype: of the parameters.

    Raises:
        ValueError: fewer than two groups or a width that they do not divide.

    Source: wu2025afbo, eq:oqc-afbo; ``2 dim hidden / groups`` weights.
    Chapter: oqc
    """

    def __init__(self, dim: int, hidden: int, groups: int, *, device=None, dtype=None) -> None:
        super().__init__()
        if groups < 2:
            raise ValueError(f"OverlappedCycle: groups must be at least 2, got {groups}")
        _check_divides("OverlappedCycle", groups, dim=dim, hidden=hidden)
        self.groups = groups
        shape = (groups, hidden // groups, 2 * dim // groups)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform within the inverse square root of the fan-in, as `torch.nn.Linear` draws."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens hidden"]:
        """Apply each group's map to its own and the next group."""
        own = x.unflatten(-1, (self.groups, -1))
        window = torch.cat([own, own.roll(-1, dims=-2)], dim=-1)
        return torch.einsum("...gi,goi->...go", window, self.weight).flatten(-2)

    def extra_repr(self) -> str:
        """Groups and widths of one group's map."""
        return f"groups={self.groups}, weight={tuple(self.weight.shape)}"


class GroupedCross(nn.Module):
    """`groups` small linear maps, each applied to each of `groups` channel groups, outputs interleaved over the groups.

    The maps share their inputs, so they are stored as one matrix. Output channel ``j * groups + g`` is row ``j`` of
    that matrix applied to group ``g``.

    Args:
        dim: input width, a multiple of `groups`.
        hidden: output width, a multiple of ``groups ** 2``.
        groups: number of groups, ``>= 1``.
        device, dtype: of the parameters.

    Raises:
        ValueError: a width that the groups do not divide.

    Source: wu2025afbo, eq:oqc-afbo; ``dim hidden / groups ** 2`` weights.
    Chapter: oqc
    """

    def __init__(self, dim: int, hidden: int, groups: int, *, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("GroupedCross", groups=groups)
        _check_divides("GroupedCross", groups, dim=dim)
        _check_divides("GroupedCross", groups**2, hidden=hidden)
        self.groups = groups
        self.maps = nn.Linear(dim // groups, hidden // groups, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the maps again."""
        self.maps.reset_parameters()

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens hidden"]:
        """Apply every map to every group."""
        return self.maps(x.unflatten(-1, (self.groups, -1))).transpose(-1, -2).flatten(-2)

    def extra_repr(self) -> str:
        """Groups."""
        return f"groups={self.groups}"


class AFBOFeedForward(nn.Module):
    """Asymmetric factorised bilinear host: ``silu(conv(cycle x)) * conv(cross x)``, then linear.

    Args:
        dim: width of a token, a multiple of both group counts.
        hidden: width of the hidden vector, a multiple of `cycle_groups` and of ``cross_groups ** 2``.
        grid: rows and columns of tokens; an input holds ``rows * columns`` tokens in row-major order.
        cycle_groups: groups of the overlapped cycle map.
        cross_groups: groups of the grouped cross map.
        bias: give both convolutions and the output map a bias (one before a convolution would add nothing new).
        device, dtype: of the parameters.

    Raises:
        ValueError: a width that the groups do not divide, an empty grid, or an input of another width or token count.

    Source: wu2025afbo, eq:oqc-afbo; ``2 dim hidden / G1 + dim hidden / G2 ** 2 + 18 hidden + dim hidden`` weights. The
    module's docstring says which parts are reconstructed.
    Chapter: oqc
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        grid: tuple[int, int],
        cycle_groups: int = 4,
        cross_groups: int = 2,
        bias: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        rows, columns = grid
        check_positive("AFBOFeedForward", dim=dim, hidden=hidden, rows=rows, columns=columns)
        factory = {"device": device, "dtype": dtype}
        self.dim, self.hidden_features, self.grid = dim, hidden, (rows, columns)
        self.cycle = OverlappedCycle(dim, hidden, cycle_groups, **factory)
        self.cross = GroupedCross(dim, hidden, cross_groups, **factory)
        self.cycle_conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=bias, **factory)
        self.cross_conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=bias, **factory)
        self.down = nn.Linear(hidden, dim, bias=bias, **factory)

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        for part in self.children():
            part.reset_parameters()

    def hidden(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens hidden"]:
        """The main hidden vector of each token; it depends on the token's neighbours on the grid."""
        check_tokens(self, x, self.dim)
        rows, columns = self.grid
        if x.shape[-2] != rows * columns:
            raise ValueError(
                f"AFBOFeedForward: x must hold {rows * columns} tokens for a {rows} x {columns} grid, got {x.shape[-2]}"
            )
        return F.silu(self._mix(self.cycle(x), self.cycle_conv)) * self._mix(self.cross(x), self.cross_conv)

    def forward(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Map each token through its hidden vector."""
        return self.down(self.hidden(x))

    def extra_repr(self) -> str:
        """Widths and grid."""
        return f"dim={self.dim}, hidden={self.hidden_features}, grid={self.grid}"

    def _mix(self, tokens: Tensor, convolution: nn.Conv2d) -> Tensor:
        """Convolve over the grid: tokens as pixels, hidden channels as image channels."""
        images = tokens.reshape(math.prod(tokens.shape[:-2]), *self.grid, self.hidden_features).movedim(-1, 1)
        return convolution(images).movedim(1, -1).reshape(tokens.shape)


def _check_divides(op: str, divisor: int, **sizes: int) -> None:
    """Raise ValueError unless `divisor` divides every size."""
    for name, size in sizes.items():
        if size < 1 or size % divisor:
            raise ValueError(f"{op}: {name} must be a positive multiple of {divisor}, got {size}")
