"""Intervals for accuracies and for differences of two models on the same items. Pure functions of numbers.

Not a command. Sources: Wilson 1927 (score interval); McNemar 1947, exact binomial form.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)  # Student's t for 1 to 9 degrees of freedom


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


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """(b over a, its 95 % interval) from 2 to 10 pairs of positive values: the geometric mean of their ratios, and Student's
    interval of its logarithm."""
    logs = [math.log(y / x) for x, y in zip(a, b, strict=True)]
    mean, half = statistics.fmean(logs), T95[len(logs) - 2] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def discordant(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int]:
    """(items that only ``a`` has right, items that only ``b`` has right)."""
    pairs = list(zip(a, b, strict=True))
    return sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p-value that two models are equally good, from the items on which exactly one of them is right."""
    lost, won = discordant(a, b)
    n, k = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def clustered_mcnemar(a: Sequence[int], b: Sequence[int]) -> float:
    """McNemar's test where each item was sampled several times: right answers of each model [N], the same number of samples.

    Exact and two-sided: if the models are equal on every item, each difference of counts is as likely with either sign; the
    p-value is the share of all sign patterns whose sum is at least as far from zero. With one sample it is `mcnemar`.
    """
    sizes = [abs(y - x) for x, y in zip(a, b, strict=True) if x != y]
    if not sizes:
        return 1.0
    total, seen = sum(sizes), abs(sum(b) - sum(a))
    chance = np.zeros(2 * total + 1)  # of each sum from -total to total
    chance[total] = 1.0
    for size in sizes:
        moved = np.zeros_like(chance)
        moved[size:] += chance[:-size] / 2
        moved[:-size] += chance[size:] / 2
        chance = moved
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


def minimum_detectable(n: int, share: float, power_z: float = 0.8416212335729143) -> float:
    """The smallest difference in accuracy that n paired items show at 5 % with 80 % power when a ``share``
    of the items differs between the models (Connor 1987, normal approximation)."""
    return (Z95 + power_z) * math.sqrt(share / n) if n else 1.0


def discordance(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean squared difference of two models on the same items, which `minimum_detectable` takes: with one sample an item the
    share of items on which they differ. When none differs, the upper 95 % bound of that share, 3 / N."""
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return float(np.mean(difference**2)) or 3 / len(difference)


def common_prefix(one: Sequence[object], other: Sequence[object]) -> int:
    """Members up to the first that differs."""
    return next((place for place, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
