"""Intervals for accuracies, for KL by stratum, and for differences of two models on the same items. Pure functions of numbers.

Not a command. Sources: Wilson 1927 (score interval); McNemar 1947, exact binomial form; Tango 1998 (score interval of a paired
difference, Statistics in Medicine 17:891). Quantiles and roots are scipy's.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

from kl import summarize_kl

Z95 = float(stats.norm.ppf(0.975))
SHARES = (0.5, 0.99, 0.999)  # quantiles of KL that are told with their errors
CONFIDENCE = (0.5, 0.9, 0.99, 0.999)  # of the reference's likeliest token: where positions are told apart


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


def paired_interval(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of accuracy(b) - accuracy(a) on the same items [N]: Tango's 95 % score interval. ``a`` and ``b``: right
    or wrong, or the share of right answers among an item's samples.

    It is wide where few items differ: of four items on which none does it says -49 to +49 points. Shares vary less than single
    answers; then lost and won count as that many more single answers (the design effect, as in `clustered_interval`).
    """
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    n, mean = len(difference), float(difference.mean())
    won, lost = (float(np.maximum(sign * difference, 0).mean()) for sign in (1, -1))
    single = won + lost - mean**2  # variance if every difference were a whole answer
    factor = float(np.mean(difference**2) - mean**2) / single if single > 0 else 1.0
    n_effective = n / factor if factor > 0 else n

    def score(true: float) -> float:
        """Standard errors from ``true`` to the mean, at the share of losses that is likeliest under ``true``."""
        linear = (2 - won + lost) * true - won - lost
        losses = (math.sqrt(max(0.0, linear**2 + 8 * lost * true * (1 - true))) - linear) / 4
        variance = max(2 * losses + true * (1 - true), 0.0) / n_effective
        return (mean - true) / math.sqrt(variance) if variance > 0 else math.copysign(1e9, mean - true)

    def bound(end: float, z: float) -> float:
        if mean == end:  # nothing lies beyond
            return end
        return float(optimize.bisect(lambda true: (0.0 if true == mean else score(true)) - z, mean, end, xtol=1e-10))

    return mean, bound(-1.0, Z95), bound(1.0, -Z95)


def detection(power: float = 0.8) -> float:
    """The square of the sum of the two quantiles in a sample size: of a test at 5 % and of its ``power``."""
    return (Z95 + float(stats.norm.ppf(power))) ** 2


def minimum_detectable(n: int, share: float, power: float = 0.8) -> float:
    """The smallest difference in accuracy that n paired items show at 5 % with this ``power`` when a ``share`` of the items
    differs between the models (Connor 1987, normal approximation). A difference of d needs a share of d at least, so that fewer
    than :func:`fewest_items` show none: 1, the whole."""
    if n < fewest_items(power):
        return 1.0
    return max(math.sqrt(detection(power) * share / n), detection(power) / n)


def fewest_items(power: float = 0.8) -> int:
    """The number of paired items from which on any difference at all can be shown: all of them lost."""
    return math.ceil(detection(power))


def items_needed(difference: float, share: float, power: float = 0.8) -> int:
    """The number of paired items that show this ``difference`` at 5 % with this ``power``: minimum_detectable inverted."""
    return math.ceil(detection(power) * max(share, abs(difference)) / difference**2)


def discordance(a: Sequence[float], b: Sequence[float]) -> float:
    """Mean squared difference of two models on the same items, which `minimum_detectable` takes: with one sample an item the
    share of items on which they differ. When none differs, the upper 95 % bound of that share, 3 / N (at most 1)."""
    difference = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    return float(np.mean(difference**2)) or min(1.0, 3 / len(difference))


def effective_answers(share: float, width: float) -> float:
    """The number of independent answers whose Wilson interval at this ``share`` is so wide; inverse of `wilson`."""

    def wider(n: float) -> float:
        low, high = wilson(share * n if share < 1 else n, n)
        return high - low - width

    return float(optimize.bisect(wider, 1e-6, 1e9)) if 1e-8 < width < 1 - 1e-8 else math.nan


def strata_interval(counts: Sequence[tuple[float, int]], headline: Callable[[Sequence[float]], float]) -> tuple[float, float]:
    """95 % interval of a function of the accuracies of strata, each (right answers, items): accuracies are drawn from their
    Jeffreys posteriors, Beta(right + 1/2, wrong + 1/2), which says of none in 20 that the accuracy is not zero for certain."""
    rng = np.random.default_rng(0)
    drawn = np.stack([rng.beta(right + 0.5, n - right + 0.5, 4000) for right, n in counts], axis=1)
    own = headline([right / n for right, n in counts])
    low, high = np.quantile([headline(row) for row in drawn.tolist()], [0.025, 0.975])
    return min(own, float(low)), max(own, float(high))


def paired_ratio(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float]:
    """(b over a, its 95 % interval) from pairs of positive values: the geometric mean of their ratios, and Student's interval
    of its logarithm."""
    logs = np.log(np.asarray(b) / np.asarray(a))
    bounds = stats.ttest_1samp(logs, 0).confidence_interval(0.95)
    return math.exp(logs.mean()), math.exp(bounds.low), math.exp(bounds.high)


@functools.lru_cache(maxsize=4)
def _drawn(strata: tuple[int, ...], draws: int, seed: int) -> np.ndarray:
    rng, own = np.random.default_rng(seed), np.asarray(strata)
    weights = np.ones((draws + 1, len(own)))
    for stratum in np.unique(own):
        places = np.flatnonzero(own == stratum)
        weights[1:, places] = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), draws)
    weights.flags.writeable = False
    return weights


def resampled(strata: Sequence[int], draws: int = 1000, seed: int = 0) -> np.ndarray:
    """[draws + 1, documents]: how often each document stands in a sample drawn with replacement from those of its stratum
    (Efron's bootstrap). The first row is the sample itself, so that a statistic of rows has its own value there."""
    return _drawn(tuple(strata), draws, seed)


def weighted_means(weights: np.ndarray, sums: Sequence[float] | np.ndarray, counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """Means over positions [draws + 1] of documents that have these sums over so many positions each."""
    return (weights @ np.asarray(sums, np.float64)) / (weights @ np.asarray(counts, np.float64))


def weighted_quantiles(weights: np.ndarray, owner: np.ndarray, values: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Quantiles over positions [draws + 1, shares]; ``owner`` [positions]: the document of each of the ``values``.

    The sorted values are cut into blocks, whose mass in every draw is one matrix product; only the block of a quantile is then
    looked at value by value.
    """
    order = np.argsort(values)
    sorted_values, owners, size = values[order], owner[order], max(1, math.isqrt(len(values)))
    blocks = -(-len(values) // size)
    counts = np.zeros((blocks, weights.shape[1]))
    np.add.at(counts, (np.arange(len(values)) // size, owners), 1)
    mass = np.cumsum(weights @ counts.T, 1)
    found = np.empty((len(weights), len(shares)))
    for row, own, out in zip(weights, mass, found, strict=True):
        for number, wanted in enumerate(np.asarray(shares) * own[-1]):
            block = min(int(np.searchsorted(own, wanted)), blocks - 1)
            part = slice(block * size, (block + 1) * size)
            inside = np.cumsum(row[owners[part]]) + (own[block - 1] if block else 0.0)
            place = min(int(np.searchsorted(inside, wanted)), len(inside) - 1)
            out[number] = sorted_values[part][place]
    return found


def bounds(found: np.ndarray) -> tuple[float, float, float]:
    """(value, its 95 % percentile interval) of a statistic of :func:`resampled` rows."""
    low, high = np.quantile(found[1:], [0.025, 0.975])
    return float(found[0]), float(low), float(high)


def by_document(owner: np.ndarray, values: np.ndarray, documents: int) -> np.ndarray:
    """Sums [documents] of values [positions]; ``owner``: the document of each."""
    return np.bincount(owner, values, documents)


def stratum_metrics(
    owner: np.ndarray, strata: Sequence[str], weights: np.ndarray, nll: np.ndarray, base_nll: np.ndarray | None = None,
    kl: np.ndarray | None = None, agree: np.ndarray | None = None, more: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """By stratum and for all: positions, documents, perplexity with its standard error and, against a reference, its ratio and
    the statistics of KL, from values [positions]; of ``more`` values the mean and its interval. ``owner``: the document of each
    position, ``strata``: the stratum of each document, ``weights``: :func:`resampled` documents."""
    names, made = np.array(strata), {}

    def sums(values: np.ndarray) -> np.ndarray:
        return by_document(owner, values, len(names))[documents]

    for name in dict.fromkeys(["all", *strata]):
        documents = np.flatnonzero((names == name) | (name == "all"))
        kept, own = np.isin(owner, documents), weights[:, documents]
        counts = sums(np.ones(len(nll)))
        losses = weighted_means(own, sums(nll), counts)
        ppl = np.exp(losses)
        entry = {"positions": int(kept.sum()), "documents": len(documents), "ppl": ppl[0], "ppl_error": ppl[1:].std(ddof=1)}
        if kl is not None and agree is not None and base_nll is not None:
            ratio = np.exp(losses - weighted_means(own, sums(base_nll), counts))
            entry |= dict(zip(("ppl_ratio", "ppl_ratio_low", "ppl_ratio_high"), bounds(ratio), strict=True))
            entry |= summarize_kl(kl[kept], agree[kept]) | {"median": np.median(kl[kept])}
            means = weighted_means(own, sums(kl), counts)
            entry |= {"standard_error": means[1:].std(ddof=1)} | dict(zip(("low", "high"), bounds(means)[1:], strict=True))
            places = np.searchsorted(documents, owner[kept])
            tails = weighted_quantiles(own, places, kl[kept], SHARES)[1:].std(0, ddof=1)
            entry |= dict(zip(("median_error", "p99_error", "p99_9_error"), tails, strict=True))
        for key, values in (more or {}).items():
            ends = bounds(weighted_means(own, sums(values), counts))
            entry |= dict(zip((key, f"{key}_low", f"{key}_high"), ends, strict=True))
        made[name] = {key: value if isinstance(value, int) else float(value) for key, value in entry.items()}
    return made


def by_confidence(likeliest: np.ndarray, kl: np.ndarray) -> dict[str, dict[str, float]]:
    """KL by the probability [positions] of the reference's likeliest token: positions, mean and median KL, and the bucket's
    share of all KL, from the least to the most certain."""
    found, total, edges = {}, float(kl.sum()), (0.0, *CONFIDENCE, 1.0)
    place = np.digitize(likeliest, CONFIDENCE)
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        own = kl[place == number]
        entry = {"low": low, "high": high, "positions": len(own)}
        if len(own):
            entry |= {"mean": float(own.mean()), "median": float(np.median(own)), "share": float(own.sum()) / (total or 1.0)}
        found[f"from_{low:g}".replace(".", "_")] = entry
    return found
