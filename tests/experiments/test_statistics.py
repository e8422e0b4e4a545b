"""Intervals against closed forms and by their measured coverage; paired tests against enumeration."""

import math

import numpy as np
import pytest
import torch

from p2k.experiments.statistics import (
    bootstrap_interval,
    compare_items,
    paired_difference,
    student_interval,
)


def test_student_interval_is_the_textbook_one() -> None:
    # Student (1908), table of t: the 97.5 % point at 4 degrees of freedom is 2.776.
    interval = student_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776 * math.sqrt(2.5 / 5)
    assert interval.mean == 3
    assert interval.high - 3 == pytest.approx(half, rel=2e-4)
    assert 3 - interval.low == pytest.approx(half, rel=2e-4)


def test_bootstrap_interval_nears_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 2000)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    # 10,000 resamples leave about 2 % noise in each end's distance from the mean.
    assert interval.high - interval.mean == pytest.approx(half, rel=0.06)
    assert interval.mean - interval.low == pytest.approx(half, rel=0.06)


def test_bootstrap_interval_leans_with_the_skew() -> None:
    interval = bootstrap_interval(np.random.default_rng(0).exponential(size=30))
    assert interval.high - interval.mean > 1.1 * (interval.mean - interval.low)


def test_intervals_do_not_depend_on_anything_but_values_and_seed() -> None:
    values = [0.81, 0.84, 0.79, 0.88, 0.83]
    assert bootstrap_interval(values) == bootstrap_interval(values)
    # Doubling is exact in floating point, so that no tie between resampled means falls differently.
    doubled = bootstrap_interval([2 * v for v in values])
    assert doubled.low == 2 * bootstrap_interval(values).low


def test_measured_coverage_at_five_seeds() -> None:
    """Of 300 normal samples of five values: the bootstrap covers the truth in 86 %, Student's interval in 98 %."""
    samples = np.random.default_rng(1).normal(size=(300, 5))
    covered = {
        interval.__name__: np.mean([found.low <= 0 <= found.high for found in map(interval, samples)])
        for interval in (bootstrap_interval, student_interval)
    }
    # The binomial standard error of a share of 300 is at most 0.023 here; the bounds are three of them.
    assert 0.79 <= covered["bootstrap_interval"] <= 0.92, covered
    assert 0.91 <= covered["student_interval"] < 1, covered


@pytest.mark.parametrize("interval", [bootstrap_interval, student_interval])
def test_equal_values_give_a_point(interval) -> None:
    found = interval([0.5, 0.5, 0.5])
    assert (found.low, found.mean, found.high) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "values", [[0.1, 0.1 + 1e-17, 0.1], [1.0, 1.0, 1.0 + 2e-16], [1.0, 1.0, 1.0, 1.0, 2.0], [0.0, 1.0]]
)
def test_nearly_equal_and_lopsided_values_give_finite_ends(values) -> None:
    found = bootstrap_interval(values)
    assert min(values) <= found.low <= found.high <= max(values)


@pytest.mark.parametrize("interval", [bootstrap_interval, student_interval])
@pytest.mark.parametrize(
    ("values", "confidence", "reason"),
    [
        ([1.0], 0.95, "at least two"),
        ([], 0.95, "at least two"),
        ([1.0, math.nan], 0.95, "finite"),
        ([1.0, math.inf], 0.95, "finite"),
        ([1.0, 2.0], 1.0, "confidence"),
    ],
)
def test_values_without_an_interval_are_refused(interval, values, confidence, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        interval(values, confidence=confidence)


def test_paired_difference_removes_what_the_seeds_share() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(size=8)
    a, b = shared + 0.3 + 0.01 * rng.normal(size=8), shared
    found = paired_difference(a, b)
    difference = a - b
    assert found.mean == pytest.approx(difference.mean())
    assert found.standard_error == pytest.approx(difference.std(ddof=1) / math.sqrt(8))
    assert (found.wins, found.n) == (8, 8)
    assert 0.27 < found.low < found.high < 0.33
    assert paired_difference(b, a).wins == 0
    assert paired_difference(b, b).wins == 0


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="got 3 and 2"):
        paired_difference([1, 2, 3], [1, 2])


def test_mcnemar_equals_the_enumerated_tail() -> None:
    first = torch.tensor([True] * 9 + [False] * 2 + [True] * 50)
    second = torch.tensor([False] * 9 + [True] * 2 + [True] * 50)
    found = compare_items(first, second)
    tail = sum(math.comb(11, k) for k in (0, 1, 2)) / 2**11
    assert (found.only_first, found.only_second) == (9, 2)
    assert found.p_value == pytest.approx(2 * tail)
    assert compare_items(first, first).p_value == 1
    with pytest.raises(ValueError, match="shapes"):
        compare_items(first, second[:3])
