"""Orthogonal quadratic complements as feed-forward blocks, and the table of all arms by name.

The main vector is the host's hidden vector and the full variant has the low-rank branch of `LowRankQuadratic`; what is
public of the paper's text leaves both open, and `oqc-output` and `oqc-wide` are the other readings.
"""

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.backend import Backend
from p2k.core.checks import check_positive
from p2k.core.seeding import generator
from p2k.linalg.projection import project_off
from p2k.nn.afbo import AFBOFeedForward
from p2k.nn.ffn import GELUFeedForward, GLUFeedForward
from p2k.nn.hosted import AuxiliaryFeedForward, HostedFeedForward, OutputAsMain, SquaresFeedForward
from p2k.nn.injection import Branches, DynamicGate, PlainAdd, ProjectOffDirection, ProjectOffMain, StaticGate
from p2k.nn.quadratic import LowRankQuadratic, QuadraticFeatures, WideQuadratic
from p2k.nn.rank_space import TiedRankSpace, UntiedRankSpace
from p2k.ops.oqc import rank_project

__all__ = [
    "FEED_FORWARDS",
    "DynamicGate",
    "OQCFeedForward",
    "OQCLowRankFeedForward",
    "StaticGate",
    "build_feed_forward",
    "width_step",
]


class OQCFeedForward(AuxiliaryFeedForward):
    """Full OQC: lifted quadratic features, projected off the main vector at hidden width.

    Args:
        host: feed-forward host.
        rank: number of quadratic features, ``>= 1``.
        gate: `StaticGate`, `DynamicGate` or None.
        eps: added to the squared length of the main vector, ``>= 0``.
        backend: `auto`, `torch` or `triton`.
        device, dtype: of the new parameters.

    Raises:
        ValueError: `rank` or `eps` is out of range.

    Source: wang2026oqc, eq:oqc-inject; ``2 dim rank + hidden rank + rank`` weights beside the host and the gate.
    Chapter: oqc
    """

    def __init__(
        self,
        host: nn.Module,
        rank: int,
        gate: nn.Module | None = None,
        *,
        eps: float = 1e-6,
        backend: Backend = "auto",
        device=None,
        dtype=None,
    ) -> None:
        auxiliary = LowRankQuadratic(host.dim, host.hidden_features, rank, device=device, dtype=dtype)
        super().__init__(host, auxiliary, ProjectOffMain(eps=eps, backend=backend), gate)


class OQCLowRankFeedForward(HostedFeedForward):
    """OQC-LR: project the quadratic features off the main vector in rank space, then lift.

    Args:
        host: feed-forward host.
        rank: number of quadratic features, ``>= 1``.
        gate: `StaticGate`, `DynamicGate` or None.
        space: class of the maps between hidden width and rank space, `UntiedRankSpace` or `TiedRankSpace`.
        eps: added to the squared length of the rank-space main vector, ``>= 0``.
        backend: `auto`, `torch` or `triton`.
        device, dtype: of the new parameters.

    Raises:
        ValueError: `rank` or `eps` is out of range.

    Source: wang2026oqc, eq:oqc-rank; ``2 dim rank + 2 hidden rank + rank`` weights beside the host and the gate, tied
    ``hidden rank`` fewer.
    Chapter: oqc
    """

    def __init__(
        self,
        host: nn.Module,
        rank: int,
        gate: nn.Module | None = None,
        *,
        space: Callable[..., nn.Module] = UntiedRankSpace,
        eps: float = 1e-6,
        backend: Backend = "auto",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(host, gate)
        check_positive("OQCLowRankFeedForward", zero_allowed=True, eps=eps)
        self.eps, self.backend = eps, backend
        self.features = QuadraticFeatures(host.dim, rank, device=device, dtype=dtype)
        self.space = space(host.hidden_features, rank, device=device, dtype=dtype)

    def hidden(self, x: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens hidden"]:
        """Main vector plus the lifted, gated complement."""
        main = self.host.hidden(x)
        left, right = self.features.factors(x)
        complement = rank_project(
            left,
            right,
            self.space.lower(main).to(left.dtype),
            self.features.norm_weight.to(left.dtype),
            self.factor(x, left),
            eps=self.eps,
            norm_eps=self.features.norm_eps,
            backend=self.backend,
        )
        return main + self.space.lift(complement).to(main.dtype)

    @torch.no_grad()
    def rank_branches(self, x: Float[Tensor, "*batch tokens dim"]) -> Branches:
        """Main, auxiliary and injected vectors in rank space, where the projection happens."""
        features = self.features(x)
        lowered = self.space.lower(self.host.hidden(x)).to(features.dtype)
        complement = project_off(features, lowered, eps=self.eps)
        factor = self.factor(x, features)
        return Branches(lowered, features, complement if factor is None else factor * complement)

    @torch.no_grad()
    def branches(self, x: Float[Tensor, "*batch tokens dim"]) -> Branches:
        """Main, lifted auxiliary before the projection, and injected vectors at hidden width, without gradients."""
        main = self.host.hidden(x)
        ranks = self.rank_branches(x)
        return Branches(main, *(self.space.lift(part).to(main.dtype) for part in (ranks.aux, ranks.injected)))

    def extra_repr(self) -> str:
        """Stabiliser and backend."""
        return f"eps={self.eps}, backend={self.backend!r}"


def _auxiliary(injection: Callable[..., nn.Module], host, rank, backend, factory) -> nn.Module:
    """A control: the branch of the full variant, joined in another way."""
    branch = LowRankQuadratic(host.dim, host.hidden_features, rank, **factory)
    return AuxiliaryFeedForward(host, branch, injection(host.hidden_features, backend=backend, **factory))


def _wide(host, rank, backend, factory) -> nn.Module:
    branch = WideQuadratic(host.dim, host.hidden_features, **factory)
    return AuxiliaryFeedForward(host, branch, ProjectOffMain(backend=backend))


def _full(gate: Callable[..., nn.Module] | None, host, rank, backend, factory) -> nn.Module:
    return OQCFeedForward(host, rank, gate and gate(host.dim, **factory), backend=backend, **factory)


def _output(host, rank, backend, factory) -> nn.Module:
    return OQCFeedForward(OutputAsMain(host), rank, backend=backend, **factory)


def _low_rank(space: Callable[..., nn.Module], host, rank, backend, factory) -> nn.Module:
    return OQCLowRankFeedForward(host, rank, space=space, backend=backend, **factory)


def _squares(injection: Callable[..., nn.Module], host, rank, backend, factory) -> nn.Module:
    return SquaresFeedForward(host, injection(host.hidden_features, backend=backend, **factory), **factory)


def _static(dim: int, **factory) -> StaticGate:
    return StaticGate(**factory)


def _plain(width: int, **options) -> PlainAdd:
    return PlainAdd()


def _off_main(width: int, *, backend: Backend, **factory) -> ProjectOffMain:
    return ProjectOffMain(backend=backend)


def _off_random(width: int, *, device, dtype, **options) -> ProjectOffDirection:
    # Its own generator: the control must neither depend on the global seed nor shift the draws of the weights.
    direction = torch.randn(width, generator=generator(0), device="cpu", dtype=dtype)
    return ProjectOffDirection(direction.to(device or torch.get_default_device()))


def _off_ones(width: int, *, device, dtype, **options) -> ProjectOffDirection:
    return ProjectOffDirection(torch.ones(width, device=device, dtype=dtype))


# Each host with the step of its hidden width: AFBO's groups must divide it.
_HOSTS = {"gelu": (GELUFeedForward, 1), "glu": (GLUFeedForward, 1), "afbo": (AFBOFeedForward, 4)}
_RANKED = {
    "aux": partial(_auxiliary, _plain),
    "fixed": partial(_auxiliary, _off_random),
    "oqc": partial(_full, None),
    "oqc-static": partial(_full, _static),
    "oqc-dynamic": partial(_full, DynamicGate),
    "oqc-output": _output,
    "oqc-lr": partial(_low_rank, UntiedRankSpace),
    "oqc-lr-tied": partial(_low_rank, TiedRankSpace),
}
_UNRANKED = {
    "oqc-wide": _wide,
    "squares": partial(_squares, _plain),
    "squares-oqc": partial(_squares, _off_main),
    "squares-fixed": partial(_squares, _off_ones),
}


def _build(name: str, dim: int, hidden: int, *, rank=None, grid=None, backend="auto", device=None, dtype=None):
    host_name, _, variant = name.partition("+")
    factory = {"device": device, "dtype": dtype}
    if host_name == "afbo" and grid is None:
        raise ValueError(f"build_feed_forward: {name} needs grid=(rows, columns) of the tokens, got None")
    if variant in _RANKED and rank is None:
        raise ValueError(f"build_feed_forward: {name} needs rank, the number of quadratic features, got None")
    shape = {"grid": grid} if host_name == "afbo" else {}
    host = _HOSTS[host_name][0](dim, hidden, **shape, **factory)
    return (_RANKED | _UNRANKED)[variant](host, rank, backend, factory) if variant else host


_SQUARES = [variant for variant in _UNRANKED if variant.startswith("squares")]
FEED_FORWARDS: dict[str, Callable[..., nn.Module]] = {
    name: partial(_build, name)
    for name in (
        *_HOSTS,
        *(f"{host}+{variant}" for host in _HOSTS for variant in (*_RANKED, "oqc-wide")),
        *(f"gelu+{variant}" for variant in _SQUARES),
    )
}


def build_feed_forward(
    name: str,
    dim: int,
    hidden: int,
    *,
    rank: int | None = None,
    grid: tuple[int, int] | None = None,
    backend: Backend = "auto",
    device=None,
    dtype=None,
) -> nn.Module:
    """Build the feed-forward block of one arm.

    Args:
        name: a key of `FEED_FORWARDS`: a host (``gelu``, ``glu``, ``afbo``), or a host, ``+`` and a variant.
        dim: width of a token.
        hidden: width of the host's hidden vector; with ``afbo`` a multiple of `width_step`.
        rank: number of quadratic features; unused by hosts, ``oqc-wide`` and the squares.
        grid: rows and columns of the tokens; used by ``afbo``.
        backend: `auto`, `torch` or `triton`, for the arms that project.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown name, a missing or unusable size.

    Chapter: oqc
    """
    _check_name("build_feed_forward", name)
    return FEED_FORWARDS[name](dim, hidden, rank=rank, grid=grid, backend=backend, device=device, dtype=dtype)


def width_step(name: str) -> int:
    """The number that divides every hidden width with which arm `name` can be built.

    Raises:
        ValueError: an unknown name.
    """
    _check_name("width_step", name)
    return _HOSTS[name.partition("+")[0]][1]


def _check_name(op: str, name: str) -> None:
    if name not in FEED_FORWARDS:
        raise ValueError(f"{op}: name must be one of {', '.join(FEED_FORWARDS)}, got {name!r}")
