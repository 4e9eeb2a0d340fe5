"""Intervals for accuracies and for differences of two models on the same items. Pure functions of numbers.

Not a command. Sources: Wilson 1927 (score interval); McNemar 1947, exact binomial form. Quantiles are scipy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

Z95 = float(stats.norm.ppf(0.975))


def wilson(correct: float, n: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of ``correct`` of ``n``; (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, factor = correct / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / factor
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / factor
    return (0.0 if correct == 0 else max(0.0, centre - half)), (1.0 if correct == n else min(1.0, centre + half))


def clustered_interval(shares: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % interval of the mean of ``shares`` [N], each the share of right answers among ``samples`` to one item.

    Answers to one item are alike, so that they do not count as independent: Wilson's interval at the effective number of
    answers share (1 - share) / variance of the mean over items (Korn and Graubard 1998), which is N at least when
    nothing varies and N * samples at most. With one sample an item it is Wilson's interval itself.
    """
    n, mean = len(shares), sum(shares) / len(shares)
    if samples == 1:
        return wilson(round(mean * n), n)
    variance = float(np.var(np.asarray(shares, dtype=np.float64), ddof=1)) / n if n > 1 else 0.0
    effective = min(mean * (1 - mean) / variance, n * samples) if variance > 0 else float(n)
    return wilson(mean * effective if mean < 1 else effective, effective)


def clustered_mcnemar(a: Sequence[int], b: Sequence[int]) -> float:
    """McNemar's test where each item was sampled several times: right answers of each model [N], the same number of samples.

    Exact and two-sided: if the models are equal on every item, each difference of counts is as likely with either sign; the
    p-value is the share of all sign patterns whose sum is at least as far from zero. With one sample it is McNemar's own test.
    """
    sizes = [abs(y - x) for x, y in zip(a, b, strict=True) if x != y]
    if not sizes:
        return 1.0
    total, seen, chance = sum(sizes), abs(sum(b) - sum(a)), np.ones(1)
    for size in sizes:  # chance [2 * total + 1] of each sum from -total to total
        chance = np.convolve(chance, [0.5, *[0.0] * (2 * size - 1), 0.5])
    return min(1.0, float(chance[np.abs(np.arange(-total, total + 1)) >= seen].sum()))


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int = 0, rounds: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high) of accuracy(b) - accuracy(a): 95 % percentile interval over resampled items. ``a`` and ``b``: right or
    wrong, or the share of right answers among an item's samples; items are resampled, so that samples stay together."""
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    values, counts = np.unique(difference, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), size=rounds)
    means = drawn @ values / len(difference)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(difference.mean()), float(low), float(high)


def minimum_detectable(n: int, share: float, power: float = 0.8) -> float:
    """The smallest difference in accuracy that n paired items show at 5 % with this ``power`` when a ``share``
    of the items differs between the models (Connor 1987, normal approximation)."""
    return (Z95 + float(stats.norm.ppf(power))) * math.sqrt(share / n) if n else 1.0


def discordance(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean squared difference of two models on the same items, which `minimum_detectable` takes: with one sample an item the
    share of items on which they differ. When none differs, the upper 95 % bound of that share, 3 / N."""
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return float(np.mean(difference**2)) or 3 / len(difference)


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """(b over a, its 95 % interval) from pairs of positive values: the geometric mean of their ratios, and Student's interval
    of its logarithm."""
    logs = np.log(np.asarray(b) / np.asarray(a))
    bounds = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    return math.exp(logs.mean()), math.exp(bounds.low), math.exp(bounds.high)
