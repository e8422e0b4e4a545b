"""Parameter counts, the hidden width that meets a budget, and which parameters decay."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from p2k.core.checks import check_positive
from p2k.core.errors import BudgetUnreachable
from p2k.nn.injection import DynamicGate, ScalarGate

__all__ = ["Match", "count_parameters", "decay_groups", "decayed_names", "match_hidden"]


class Match(NamedTuple):
    """A width that meets a budget: hidden width, parameters there, and their signed relative distance from it."""

    hidden: int
    parameters: int
    gap: float


def count_parameters(module: nn.Module) -> int:
    """Number of learned numbers, shared ones once, buffers not."""
    return sum(parameter.numel() for parameter in module.parameters())


def match_hidden(
    build: Callable[[int], nn.Module], budget: int, *, multiple_of: int = 1, tolerance: float = 0.005
) -> Match:
    """Find the hidden width whose parameter count is closest to a budget.

    Args:
        build: makes the module for a hidden width; it is called on the meta device, where weights take no memory. Its
            parameter count must grow with the width.
        budget: parameters to meet, ``>= 1``.
        multiple_of: consider only multiples of this number, ``>= 1``.
        tolerance: accepted relative distance from the budget, ``>= 0``.

    Returns:
        The closest width; the smaller one where two are equally close.

    Raises:
        ValueError: an argument is out of range or the count does not grow with the width.
        BudgetUnreachable: the closest width is further away than `tolerance`; the message names both neighbours.

    Source: wang2026oqc, eq:oqc-budget.
    Chapter: oqc
    """
    op = "match_hidden"
    check_positive(op, budget=budget, multiple_of=multiple_of)
    check_positive(op, zero_allowed=True, tolerance=tolerance)

    def count(steps: int) -> int:
        with torch.device("meta"):
            return count_parameters(build(steps * multiple_of))

    below, above = _bracket(op, count, budget)
    matches = [Match(steps * multiple_of, total, total / budget - 1) for steps, total in (below, above)]
    best = min(matches, key=lambda match: (abs(match.parameters - budget), match.hidden))
    if abs(best.gap) > tolerance:
        nearest = " and ".join(f"{match.parameters:,} at width {match.hidden}" for match in matches)
        raise BudgetUnreachable(
            f"{op}: no multiple of {multiple_of} comes within {tolerance:.2%} of {budget:,} parameters; nearest are "
            f"{nearest}: change the budget, the rank or the tolerance"
        )
    return best


def _bracket(op: str, count: Callable[[int], int], budget: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two neighbouring steps with their counts around the budget, or the first two if it is smaller than both."""
    below, above = (1, count(1)), (2, count(2))
    while above[1] < budget:
        slope = (above[1] - below[1]) / (above[0] - below[0])
        if slope <= 0:
            raise ValueError(
                f"{op}: build must use more parameters at a larger width, got {below[1]:,} at step {below[0]} and "
                f"{above[1]:,} at step {above[0]}"
            )
        reach = above[0] + math.ceil((budget - above[1]) / slope)
        below, above = above, (reach, count(reach))
    # Counts are affine in the width for every arm here, so the first guess lands; halving covers all others.
    middle = above[0] - 1
    while above[0] - below[0] > 1:
        total = count(middle)
        below, above = (below, (middle, total)) if total >= budget else ((middle, total), above)
        middle = (above[0] + below[0]) // 2
    return below, above


def decayed_names(module: nn.Module) -> set[str]:
    """Names of the parameters that take weight decay: matrices and kernels, except those of gates.

    What has fewer than two dimensions (norm weights, biases, scalar factors) never decays.
    """
    gates = [part for part in module.modules() if isinstance(part, (ScalarGate, DynamicGate))]
    exempt = {id(parameter) for gate in gates for parameter in gate.parameters()}
    return {
        name for name, parameter in module.named_parameters() if parameter.ndim >= 2 and id(parameter) not in exempt
    }


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups for a torch optimizer: decayed first, then those without decay.

    Args:
        module: the model; a parameter that is used twice is listed once.
        weight_decay: ``>= 0``, for the first group.

    Raises:
        ValueError: `weight_decay` is negative or not finite.
    """
    check_positive("decay_groups", zero_allowed=True, weight_decay=weight_decay)
    decayed = decayed_names(module)
    named = list(module.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if name in decayed], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in named if name not in decayed], "weight_decay": 0.0},
    ]
