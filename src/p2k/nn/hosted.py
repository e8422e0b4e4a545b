"""Feed-forward blocks around a host: one auxiliary vector per token joins the host's main vector.

Every block has the host's interface (`dim`, `hidden_features`, `hidden`, `down`, `forward`) and one method more:
`branches(x)` returns main, auxiliary and injected vectors for figures, and keeps nothing.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from p2k.nn.ffn import GELUFeedForward
from p2k.nn.injection import Branches, ScalarGate

__all__ = ["AuxiliaryFeedForward", "HostedFeedForward", "OutputAsMain", "SquaresFeedForward"]


class HostedFeedForward(nn.Module):
    """Base of the blocks around a host; a subclass defines `hidden` and `branches`.

    Args:
        host: feed-forward host.
        gate: `ScalarGate`, `StaticGate`, `DynamicGate`, or None for a factor of 1.
    """

    def __init__(self, host: nn.Module, gate: nn.Module | None = None) -> None:
        super().__init__()
        self.host, self.gate = host, gate
        self.dim, self.hidden_features = host.dim, host.hidden_features

    @property
    def down(self) -> nn.Module:
        """The host's output map."""
        return self.host.down

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        for part in self.children():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()

    def factor(self, x: Tensor, like: Tensor) -> Tensor | None:
        """The gate's factor in the dtype of `like`: autocast leaves parameters in float32 and rounds main vectors."""
        return None if self.gate is None else self.gate(x).to(like.dtype)

    def forward(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Map each token through its main vector plus what joins it."""
        return self.down(self.hidden(x))


class AuxiliaryFeedForward(HostedFeedForward):
    """A host, an auxiliary branch as wide as its hidden vector, and an injection that joins them.

    Args:
        host: feed-forward host.
        auxiliary: module from ``[*batch, tokens, dim]`` to ``[*batch, tokens, hidden]``.
        injection: `PlainAdd`, `ProjectOffDirection` or `ProjectOffMain`.
        gate: as in `HostedFeedForward`.

    Source: wang2026oqc, eq:oqc-inject.
    Chapter: oqc
    """

    def __init__(
        self, host: nn.Module, auxiliary: nn.Module | None, injection: nn.Module, gate: nn.Module | None = None
    ) -> None:
        super().__init__(host, gate)
        self.auxiliary, self.injection = auxiliary, injection

    def pair(
        self, x: Float[Tensor, "*batch tokens dim"]
    ) -> tuple[Float[Tensor, "*batch tokens hidden"], Float[Tensor, "*batch tokens hidden"]]:
        """Main and auxiliary vector of each token, in one dtype."""
        main = self.host.hidden(x)
        return main, self.auxiliary(x).to(main.dtype)

    def hidden(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens hidden"]:
        """Main vector plus injection."""
        main, aux = self.pair(x)
        return self.injection(main, aux, self.factor(x, main))

    @torch.no_grad()
    def branches(self, x: Float[Tensor, "*batch tokens dim"]) -> Branches:
        """Main, auxiliary and injected vectors, without gradients."""
        main, aux = self.pair(x)
        return Branches(main, aux, self.injection.injected(main, aux, self.factor(x, main)))


class OutputAsMain(nn.Module):
    """A host whose main vector is its output, ``dim`` wide: what a block around it adds joins after the output map.

    Args:
        host: feed-forward host; it keeps its parameters and their names below ``host``.

    Source: wang2026oqc, eq:oqc-inject; the other reading of its main vector.
    Chapter: oqc
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host, self.down = host, nn.Identity()
        self.dim = self.hidden_features = host.dim

    def reset_parameters(self) -> None:
        """Draw all parameters again."""
        self.host.reset_parameters()

    def hidden(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """The host's output."""
        return self.host(x)

    def forward(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
        """Map each token as the host does."""
        return self.host(x)


class SquaresFeedForward(AuxiliaryFeedForward):
    """GELU host whose auxiliary vector is the square of its own pre-activation: second order for one new parameter.

    Args:
        host: `GELUFeedForward`.
        injection: `PlainAdd`, `ProjectOffDirection` or `ProjectOffMain`.
        init: start of the one new parameter, the factor on the injected part.
        device, dtype: of that parameter.

    Chapter: oqc
    """

    def __init__(
        self, host: GELUFeedForward, injection: nn.Module, *, init: float = 0.3, device=None, dtype=None
    ) -> None:
        super().__init__(host, None, injection, ScalarGate(init, device=device, dtype=dtype))

    def pair(
        self, x: Float[Tensor, "*batch tokens dim"]
    ) -> tuple[Float[Tensor, "*batch tokens hidden"], Float[Tensor, "*batch tokens hidden"]]:
        """Activation and square of one pre-activation."""
        preactivation = self.host.preactivation(x)
        return F.gelu(preactivation), preactivation.square()
