"""Intervals for accuracies and for differences of two models on the same items. Pure functions of numbers.

Not a command. Sources: Wilson 1927 (score interval); McNemar 1947, exact binomial form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of ``correct`` of ``n``; (0, 1) when n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, factor = correct / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / factor
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / factor
    return (0.0 if correct == 0 else max(0.0, centre - half)), (1.0 if correct == n else min(1.0, centre + half))


def discordant(a: Sequence[bool], b: Sequence[bool]) -> tuple[int, int]:
    """(items that only ``a`` has right, items that only ``b`` has right)."""
    pairs = list(zip(a, b, strict=True))
    return sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p-value that two models are equally good, from the items on which exactly one of them is right."""
    lost, won = discordant(a, b)
    n, k = lost + won, min(lost, won)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def paired_bootstrap(a: Sequence[bool], b: Sequence[bool], seed: int = 0, rounds: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high) of accuracy(b) - accuracy(a): 95 % percentile interval over resampled items."""
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
