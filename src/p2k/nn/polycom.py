"""Polynomial composition activations as modules, and the feed-forwards that are compared with them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.backend import Backend
from p2k.core.checks import check_positive
from p2k.nn.ffn import GELUFeedForward, GLUFeedForward, check_tokens
from p2k.ops.polycom import poly_norm, poly_relu

__all__ = [
    "FEED_FORWARDS",
    "ActivationFeedForward",
    "NormedGELU",
    "PolyNorm",
    "PolyReLU",
    "SquaredReLU",
    "build_feed_forward",
]


class PolyReLU(nn.Module):
    """Cubic polynomial of ReLU with four learned coefficients per layer.

    Args:
        bias: value at which the constant term starts; 0 in the authors' code. The other coefficients start at 1/3.
        backend: `auto`, `torch` or `triton`.
        device, dtype: of the coefficients; float32 coefficients also serve half-precision inputs.

    Source: zhuo2025polycom, eq:polycom-polyrelu.
    Chapter: polycom
    """

    def __init__(self, bias: float = 0.0, *, backend: Backend = "auto", device=None, dtype=None) -> None:
        super().__init__()
        self.start, self.backend = float(bias), backend
        self.weight = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the coefficients to their published start."""
        nn.init.constant_(self.weight, 1 / 3)
        nn.init.constant_(self.bias, self.start)

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply the polynomial to every element."""
        return poly_relu(x, self.weight, self.bias, backend=self.backend)


class PolyNorm(PolyReLU):
    """Weighted sum of a row's first three normalised powers, with four learned coefficients per layer.

    Args:
        bias: value at which the constant term starts: 0 in the authors' code, 1 in Liger-Kernel's module.
        eps: added to each mean square, ``> 0``.
        backend: `auto`, `torch` or `triton`.
        device, dtype: of the coefficients.

    Raises:
        ValueError: `eps` is not positive and finite.

    Source: zhuo2025polycom, eq:polycom-polynorm.
    Chapter: polycom
    """

    def __init__(
        self, bias: float = 0.0, *, eps: float = 1e-6, backend: Backend = "auto", device=None, dtype=None
    ) -> None:
        check_positive("PolyNorm", eps=eps)
        super().__init__(bias, backend=backend, device=device, dtype=dtype)
        self.eps = eps

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Apply the activation to every row."""
        return poly_norm(x, self.weight, self.bias, eps=self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        """The epsilon."""
        return f"eps={self.eps}"


class SquaredReLU(nn.Module):
    """``relu(x) ** 2``.

    Source: so2021primer.
    Chapter: polycom
    """

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Apply to every element."""
        return F.relu(x).square()


class NormedGELU(nn.Module):
    """GELU divided by the root mean square of its row: the control that has PolyNorm's norm and no polynomial.

    Args:
        eps: added to the mean square, ``> 0``.

    Chapter: polycom
    """

    def __init__(self, eps: float = 1e-6) -> None:
        check_positive("NormedGELU", eps=eps)
        super().__init__()
        self.eps = eps

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        """Apply to every row."""
        return F.rms_norm(F.gelu(x), (x.shape[-1],), eps=self.eps)


class ActivationFeedForward(nn.Module):
    """Linear, any activation, linear.

    Args:
        dim: width of a token, ``>= 1``.
        hidden: width of the hidden vector, ``>= 1``.
        activation: maps ``[*batch, tokens, hidden]`` to the same shape; its parameters belong to the block.
        bias: give both linear maps a bias.
        device, dtype: of the linear maps.

    Raises:
        ValueError: a width is not positive, or an input is not ``[*batch, tokens, dim]``.

    Source: zhuo2025polycom, eq:polycom-block; ``2 dim hidden`` weights.
    Chapter: polycom
    """

    def __init__(
        self, dim: int, hidden: int, activation: nn.Module, *, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__()
        check_positive("ActivationFeedForward", dim=dim, hidden=hidden)
        self.dim, self.hidden_features = dim, hidden
        self.up = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.down = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Map each token through its hidden vector."""
        check_tokens(self, x, self.dim)
        return self.down(self.activation(self.up(x)))


def _with(activation: Callable[[], nn.Module]) -> Callable[[int, int], nn.Module]:
    return lambda dim, hidden: ActivationFeedForward(dim, hidden, activation())


# Every arm of the chapter's comparison: (dim, hidden) -> module.
FEED_FORWARDS: dict[str, Callable[[int, int], nn.Module]] = {
    "gelu": GELUFeedForward,
    "swiglu": GLUFeedForward,
    "relu": _with(nn.ReLU),
    "relu2": _with(SquaredReLU),
    "polyrelu": _with(PolyReLU),
    "polynorm": _with(PolyNorm),
    "gelu-normed": _with(NormedGELU),
}


def build_feed_forward(name: str, dim: int, hidden: int) -> nn.Module:
    """The feed-forward called `name`, as ``GPT(config, feed_forward=lambda dim: build_feed_forward(name, dim, h))``.

    Args:
        name: a key of `FEED_FORWARDS`.
        dim: width of a token, ``>= 1``.
        hidden: width of the hidden vector, ``>= 1``; `swiglu` has three maps of this width, all others two.

    Raises:
        ValueError: the name is unknown or a width is not positive.

    Chapter: polycom
    """
    if name not in FEED_FORWARDS:
        raise ValueError(f"build_feed_forward: name must be one of {', '.join(FEED_FORWARDS)}, got {name!r}")
    return FEED_FORWARDS[name](dim, hidden)
