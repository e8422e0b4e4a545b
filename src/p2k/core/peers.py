"""Other projects' implementations that a benchmark compares with where they are installed: the extra `peers`."""

import importlib
from collections.abc import Callable

from torch import Tensor

from p2k.core.device import version_of

# Distributions of the extra. Their versions stand in every benchmark record, because they change its numbers.
DISTRIBUTIONS = ("liger-kernel", "cut-cross-entropy", "flash-linear-attention", "fast-hadamard-transform")


def peer(distribution: str, target: str) -> dict[str, Callable[..., Tensor]]:
    """One entry for `Workload.peers`, ``{distribution: callable}``; empty where the distribution is not installed.

    Args:
        distribution: one of `DISTRIBUTIONS`.
        target: ``module:name`` of a callable that takes what the workload's `make_inputs` returns.

    Raises:
        ValueError: an unlisted distribution, whose version no record would show.
    """
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"peer: distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    if version_of(distribution) is None:
        return {}
    module, _, name = target.partition(":")
    return {distribution: getattr(importlib.import_module(module), name)}


def peer_versions() -> dict[str, str | None]:
    """Installed version of every peer, None where it is missing."""
    return {name: version_of(name) for name in DISTRIBUTIONS}
