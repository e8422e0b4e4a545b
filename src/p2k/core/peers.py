"""Other projects' implementations that a benchmark compares with where they are installed: the extra `peers`.

fast-hadamard-transform waits for an op that rotates. No op is an optimizer's step, so torch's fused ones have none to
be compared with. Liger's losses are left out: they overwrite their inputs, or give no gradient per token.
"""

import functools
import importlib
import operator
from collections.abc import Callable

from torch import Tensor

from p2k.core.device import version_of

# Distributions of the extra. Their versions stand in every benchmark record, because they change its numbers.
DISTRIBUTIONS = ("liger-kernel", "cut-cross-entropy", "flash-linear-attention", "fast-hadamard-transform")


def peer(distribution: str, target: str) -> dict[str, Callable[..., Tensor]]:
    """One entry for `Workload.peers`, ``{distribution: callable}``; a call fails where it is not installed.

    Nothing is imported before the first call, whose error a benchmark records as the reason of an absence.

    Args:
        distribution: one of `DISTRIBUTIONS`.
        target: ``module:name`` or ``module:class.name`` of a callable that takes what the workload's `make_inputs`
            returns.

    Raises:
        ValueError: an unlisted distribution, whose version no record would show.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"peer: distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    find = functools.cache(functools.partial(_find, distribution, target))
    return {distribution: lambda *inputs: find()(*inputs)}


def _find(distribution: str, target: str) -> Callable[..., Tensor]:
    if version_of(distribution) is None:
        raise ImportError(f"{distribution} is not installed")
    module, _, name = target.partition(":")
    return operator.attrgetter(name)(importlib.import_module(module))


def peer_versions() -> dict[str, str | None]:
    """Installed version of every peer, None where it is missing."""
    return {name: version_of(name) for name in DISTRIBUTIONS}
