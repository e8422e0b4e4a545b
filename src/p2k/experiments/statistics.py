"""Intervals and paired comparisons over seeds.

Seeds are few, so read the intervals with care. The bootstrap resamples what it has: with five normal values its 95 %
interval covers the truth in about 86 of 100 cases, with eight in 89 (a test measures the former). `student_interval`
holds its level there if the values are roughly normal. Both describe the scatter over seeds on one test set, not over
test sets.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from p2k.core.checks import require


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Args:
        mean: of the values.
        low, high: ends of the interval, ``low <= high``.
        n: number of values.
        confidence: between 0 and 1.
    """

    mean: float
    low: float
    high: float
    n: int
    confidence: float


@dataclass(frozen=True)
class PairedDifference(Interval):
    """Mean of ``a - b`` over pairs, with its interval.

    Args:
        standard_error: of the mean difference.
        wins: number of pairs in which ``a > b``; a tie is no win.
    """

    standard_error: float
    wins: int


@dataclass(frozen=True)
class DiscordantPairs:
    """Items on which exactly one of two classifiers is right, and the exact McNemar test on them.

    Args:
        only_first: items that only the first gets right.
        only_second: items that only the second gets right.
        p_value: two-sided, under the hypothesis that both counts are equally likely; 1 when they agree everywhere.
    """

    only_first: int
    only_second: int
    p_value: float


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of the mean.

    Equal values give an interval of length zero.

    Args:
        values: one per seed, at least two, finite.
        confidence: between 0 and 1.
        seed: of the resampling.

    Raises:
        ValueError: fewer than two values, NaN or inf among them, or a confidence out of range.
        MissingDependency: scipy is not installed.

    Source: efron1987bca.
    Chapter: oqc
    """
    sample = _sample("bootstrap_interval", values, confidence)
    mean = float(sample.mean())
    if np.ptp(sample) == 0:
        return Interval(mean, mean, mean, len(sample), confidence)
    stats = require("scipy.stats", extra="book", purpose="the bootstrap")
    rng = np.random.default_rng(seed)
    with warnings.catch_warnings():
        # Values equal up to rounding: the acceleration is 0/0 and the percentile interval below is the limit.
        warnings.simplefilter("ignore")
        found = stats.bootstrap((sample,), np.mean, confidence_level=confidence, method="BCa", rng=rng)
        low, high = map(float, found.confidence_interval)
        if not (np.isfinite(low) and np.isfinite(high)):
            found = stats.bootstrap((sample,), np.mean, confidence_level=confidence, method="percentile", rng=rng)
            low, high = map(float, found.confidence_interval)
    return Interval(mean, low, high, len(sample), confidence)


def student_interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean, exact for normal values of any number; arguments as `bootstrap_interval`."""
    sample = _sample("student_interval", values, confidence)
    stats = require("scipy.stats", extra="book", purpose="Student's interval")
    half = float(stats.t.ppf((1 + confidence) / 2, len(sample) - 1) * _standard_error(sample))
    mean = float(sample.mean())
    return Interval(mean, mean - half, mean + half, len(sample), confidence)


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> PairedDifference:
    """Compare two arms run with the same seeds: bootstrap interval of the mean of ``a - b``.

    Args:
        a, b: one value per seed, in the same order of seeds, at least two.
        confidence: between 0 and 1.
        seed: of the resampling.

    Raises:
        ValueError: the lengths differ, or as in `bootstrap_interval`.
    """
    if len(a) != len(b):
        raise ValueError(f"paired_difference: a and b must have one value per seed each, got {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    interval = bootstrap_interval(difference.tolist(), confidence=confidence, seed=seed)
    error = float(_standard_error(difference))
    return PairedDifference(**vars(interval), standard_error=error, wins=int((difference > 0).sum()))


def compare_items(first: Bool[Tensor, " items"], second: Bool[Tensor, " items"]) -> DiscordantPairs:
    """Exact McNemar test on which test items two classifiers get right.

    It asks about these two trained models; `paired_difference` asks about the two training recipes.

    Args:
        first, second: correctness per item, in the same order.

    Raises:
        ValueError: the shapes differ.

    Source: mcnemar1947.
    Chapter: oqc
    """
    if first.shape != second.shape:
        raise ValueError(f"compare_items: shapes must agree, got {tuple(first.shape)} and {tuple(second.shape)}")
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    if only_first + only_second == 0:
        return DiscordantPairs(0, 0, 1.0)
    stats = require("scipy.stats", extra="book", purpose="the McNemar test")
    p_value = float(stats.binomtest(only_first, only_first + only_second).pvalue)
    return DiscordantPairs(only_first, only_second, p_value)


def _sample(op: str, values: Sequence[float], confidence: float) -> np.ndarray:
    """Values as float64 after the checks all intervals share."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) < 2:
        raise ValueError(f"{op}: at least two values are needed, got shape {sample.shape}")
    if not np.isfinite(sample).all():
        raise ValueError(f"{op}: values must be finite, got {sample.tolist()}")
    if not 0 < confidence < 1:
        raise ValueError(f"{op}: confidence must lie between 0 and 1, got {confidence}")
    return sample


def _standard_error(sample: np.ndarray) -> float:
    return sample.std(ddof=1) / np.sqrt(len(sample))
