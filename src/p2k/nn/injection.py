"""How an auxiliary vector joins the main one: three ways to inject it and three gates.

An injection has ``forward(main, aux, gate)``, the sum, and ``injected(main, aux, gate)``, the added part alone, which
figures and tests measure. A gate has ``forward(x)``, the factor made from the layer's input.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.backend import Backend
from p2k.core.checks import check_positive
from p2k.linalg.projection import project_off
from p2k.ops.oqc import project_and_inject

__all__ = ["Branches", "DynamicGate", "PlainAdd", "ProjectOffDirection", "ProjectOffMain", "ScalarGate", "StaticGate"]


class Branches(NamedTuple):
    """The vectors of one layer, ``[*tokens, width]`` each: main, auxiliary before injection, the part added to main."""

    main: Tensor
    aux: Tensor
    injected: Tensor


class PlainAdd(nn.Module):
    """Add the gated auxiliary vector as it is: the control without a projection.

    Source: wang2026oqc, the ablation without orthogonalisation.
    Chapter: oqc
    """

    def injected(
        self,
        main: Float[Tensor, "*tokens width"],
        aux: Float[Tensor, "*tokens width"],
        gate: Float[Tensor, ""] | Float[Tensor, "*tokens 1"] | None = None,
    ) -> Float[Tensor, "*tokens width"]:
        """The gated auxiliary vector."""
        return aux if gate is None else gate * aux

    def forward(
        self,
        main: Float[Tensor, "*tokens width"],
        aux: Float[Tensor, "*tokens width"],
        gate: Float[Tensor, ""] | Float[Tensor, "*tokens 1"] | None = None,
    ) -> Float[Tensor, "*tokens width"]:
        """Main vector plus the injected part."""
        return main + self.injected(main, aux, gate)


class ProjectOffDirection(PlainAdd):
    """Add the part of the auxiliary vector orthogonal to one fixed direction: the control for projecting at all.

    Args:
        direction: ``[width]``, not zero; kept as a buffer of unit length.

    Raises:
        ValueError: the direction is not one vector, is zero, or is not finite.

    Chapter: oqc
    """

    def __init__(self, direction: Float[Tensor, " width"]) -> None:
        super().__init__()
        length = direction.double().norm() if direction.ndim == 1 else torch.tensor(0.0)
        # On the meta device a model is only counted: there is no length to check.
        if not direction.is_meta and not (length > 0 and length.isfinite()):
            raise ValueError(
                f"ProjectOffDirection: direction must be one finite vector other than zero, got shape "
                f"{tuple(direction.shape)} and length {length.item()}"
            )
        self.register_buffer("direction", (direction.double() / length).to(direction.dtype))

    def injected(
        self,
        main: Float[Tensor, "*tokens width"],
        aux: Float[Tensor, "*tokens width"],
        gate: Float[Tensor, ""] | Float[Tensor, "*tokens 1"] | None = None,
    ) -> Float[Tensor, "*tokens width"]:
        """The gated auxiliary vector without its part along the direction."""
        return super().injected(main, project_off(aux, self.direction.to(aux.dtype)), gate)

    def extra_repr(self) -> str:
        """Width of the direction."""
        return f"width={self.direction.shape[0]}"


class ProjectOffMain(nn.Module):
    """Add the part of the auxiliary vector orthogonal to the main vector of the same token.

    Args:
        eps: added to the squared length of the main vector, ``>= 0``.
        backend: `auto`, `torch` or `triton`.

    Raises:
        ValueError: `eps` is negative or not finite.

    Source: wang2026oqc, eq:oqc-inject.
    Chapter: oqc
    """

    def __init__(self, *, eps: float = 1e-6, backend: Backend = "auto") -> None:
        super().__init__()
        check_positive("ProjectOffMain", zero_allowed=True, eps=eps)
        self.eps, self.backend = eps, backend

    def injected(
        self,
        main: Float[Tensor, "*tokens width"],
        aux: Float[Tensor, "*tokens width"],
        gate: Float[Tensor, ""] | Float[Tensor, "*tokens 1"] | None = None,
    ) -> Float[Tensor, "*tokens width"]:
        """The gated orthogonal part, computed apart: the sum minus the main vector would lose its low digits."""
        orthogonal = project_off(aux, main, eps=self.eps)
        return orthogonal if gate is None else gate * orthogonal

    def forward(
        self,
        main: Float[Tensor, "*tokens width"],
        aux: Float[Tensor, "*tokens width"],
        gate: Float[Tensor, ""] | Float[Tensor, "*tokens 1"] | None = None,
    ) -> Float[Tensor, "*tokens width"]:
        """Main vector plus the injected part, in one pass."""
        return project_and_inject(main, aux, gate, eps=self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        """Stabiliser and backend."""
        return f"eps={self.eps}, backend={self.backend!r}"


class ScalarGate(nn.Module):
    """One learned factor per layer, unbounded and of either sign.

    Args:
        init: start of the factor.
        device, dtype: of the parameter.

    Chapter: oqc
    """

    def __init__(self, init: float, *, device=None, dtype=None) -> None:
        super().__init__()
        self.init = init
        self.value = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the parameter to its start."""
        nn.init.constant_(self.value, self.init)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, ""]:
        """The factor, whatever the tokens are."""
        return self.value

    def extra_repr(self) -> str:
        """Start of the parameter."""
        return f"init={self.init}"


class StaticGate(ScalarGate):
    """One learned factor per layer between 0 and 1, the sigmoid of a scalar.

    Args:
        init: start of the scalar; the default opens the gate as far as `DynamicGate` does.
        device, dtype: of the parameter.

    Source: wang2026oqc, eq:oqc-gates; the sigmoid and its start are our reading.
    Chapter: oqc
    """

    def __init__(self, init: float = -2.0, *, device=None, dtype=None) -> None:
        super().__init__(init, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, ""]:
        """The factor, whatever the tokens are."""
        return self.value.sigmoid()


class DynamicGate(nn.Module):
    """One factor per token, the sigmoid of a linear map of the layer's input.

    Args:
        dim: width of a token, ``>= 1``.
        init: start of the bias; the weight starts at zero, so that all tokens begin with one factor.
        device, dtype: of the parameters.

    Raises:
        ValueError: `dim` is not positive.

    Source: wang2026oqc, eq:oqc-gates; the sigmoid and its start are our reading.
    Chapter: oqc
    """

    def __init__(self, dim: int, *, init: float = -2.0, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("DynamicGate", dim=dim)
        self.init = init
        self.linear = nn.Linear(dim, 1, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero weight, bias at its start."""
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, self.init)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens 1"]:
        """The factor of each token."""
        return self.linear(x).sigmoid()

    def extra_repr(self) -> str:
        """Start of the bias."""
        return f"init={self.init}"
