"""Feed-forward hosts: each makes one hidden vector per token and maps it back to the model width."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.checks import check_positive

__all__ = ["GELUFeedForward", "GLUFeedForward", "check_tokens"]


def check_tokens(module: nn.Module, x: Tensor, dim: int) -> None:
    """Raise ValueError unless `x` is ``[*batch, tokens, dim]``."""
    if x.ndim < 2 or x.shape[-1] != dim:
        raise ValueError(f"{type(module).__name__}: x must be [*batch, tokens, {dim}], got {tuple(x.shape)}")


class GELUFeedForward(nn.Module):
    """The plain transformer block: linear, GELU, linear.

    Args:
        dim: width of a token, ``>= 1``.
        hidden: width of the hidden vector, ``>= 1``.
        bias: give both linear maps a bias.
        device, dtype: of the parameters, as in `torch.nn.Linear`.

    Raises:
        ValueError: a width is not positive, or an input is not ``[*batch, tokens, dim]``.

    Source: wang2026oqc, eq:oqc-host-gelu; ``2 dim hidden`` weights.
    Chapter: oqc
    """

    def __init__(self, dim: int, hidden: int, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("GELUFeedForward", dim=dim, hidden=hidden)
        self.dim, self.hidden_features = dim, hidden
        self.up = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        self.up.reset_parameters()
        self.down.reset_parameters()

    def preactivation(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens hidden"]:
        """What enters the GELU."""
        check_tokens(self, x, self.dim)
        return self.up(x)

    def hidden(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens hidden"]:
        """The main hidden vector of each token."""
        return F.gelu(self.preactivation(x))

    def forward(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Map each token through its hidden vector."""
        return self.down(self.hidden(x))

    def extra_repr(self) -> str:
        """Widths."""
        return f"dim={self.dim}, hidden={self.hidden_features}"


class GLUFeedForward(nn.Module):
    """Gated linear unit with a SiLU gate: ``silu(gate x) * (value x)``, then linear.

    Args:
        dim: width of a token, ``>= 1``.
        hidden: width of the hidden vector, ``>= 1``.
        bias: give all three linear maps a bias.
        device, dtype: of the parameters, as in `torch.nn.Linear`.

    Raises:
        ValueError: a width is not positive, or an input is not ``[*batch, tokens, dim]``.

    Source: wang2026oqc, eq:oqc-host-glu; ``3 dim hidden`` weights.
    Chapter: oqc
    """

    def __init__(self, dim: int, hidden: int, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("GLUFeedForward", dim=dim, hidden=hidden)
        self.dim, self.hidden_features = dim, hidden
        # One matrix for gate and value: one product instead of two over the same input.
        self.up = nn.Linear(dim, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.down = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        self.up.reset_parameters()
        self.down.reset_parameters()

    def hidden(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens hidden"]:
        """The main hidden vector of each token."""
        check_tokens(self, x, self.dim)
        gate, value = self.up(x).chunk(2, dim=-1)
        return F.silu(gate) * value

    def forward(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Map each token through its hidden vector."""
        return self.down(self.hidden(x))

    def extra_repr(self) -> str:
        """Widths."""
        return f"dim={self.dim}, hidden={self.hidden_features}"
