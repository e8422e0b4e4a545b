"""One comparison repeated over several conditions: paired intervals, signed-rank tests and Holm's correction."""

from collections.abc import Sequence
from dataclasses import dataclass

from p2k.core.checks import require
from p2k.experiments.statistics import PairedDifference, paired_difference


@dataclass(frozen=True)
class Comparison:
    """Two arms under one condition.

    Args:
        condition: its name.
        difference: mean of first minus second over seeds, with its interval.
        p_value: two-sided Wilcoxon signed-rank test of the pairs.
        adjusted: the same after Holm's correction over all conditions compared together.
    """

    condition: str
    difference: PairedDifference
    p_value: float
    adjusted: float


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that rejecting those below a level keeps the chance of any false rejection below it.

    The k-th smallest of n is multiplied by ``n - k + 1``, made monotone and cut at 1. The order of the input is kept.

    Raises:
        ValueError: a value outside [0, 1].

    Source: holm1979, step-down procedure.
    Chapter: adpo
    """
    if not all(0 <= value <= 1 for value in p_values):
        raise ValueError(f"holm: p-values must lie in [0, 1], got {list(p_values)}")
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted


def signed_rank_p(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test on pairs; 1 where all pairs agree.

    With n pairs it cannot fall below ``2 ** (1 - n)``: five seeds never reach 0.05.
    """
    if all(a == b for a, b in zip(first, second, strict=True)):
        return 1.0
    stats = require("scipy.stats", extra="book", purpose="the signed-rank test")
    return float(stats.wilcoxon(first, second).pvalue)


def compare(
    conditions: Sequence[str], first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]
) -> list[Comparison]:
    """Compare two arms under several conditions.

    Args:
        conditions: names.
        first, second: per condition one value per seed, the same seeds in both.

    Raises:
        ValueError: the lengths differ, or fewer than two seeds.
    """
    rows = list(zip(conditions, first, second, strict=True))
    differences = [paired_difference(a, b) for _, a, b in rows]
    p_values = [signed_rank_p(a, b) for _, a, b in rows]
    columns = zip(conditions, differences, p_values, holm(p_values), strict=True)
    return [Comparison(*column) for column in columns]
