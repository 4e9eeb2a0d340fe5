"""Who gets how many bits, from numbers alone: the best choice within a budget, and the orders that published studies compare.

Not a command; moe_alloc and moe_study use it. A strategy gives every expert of a layer a score, and the experts with the
highest scores get the most bits, the same number in every layer:

    blind       every expert alike (the uniform recipe)        random      a seeded order
    frequency   share of the tokens routed to it               inverse     the reverse of composite
    wmass       share of the routing weights                   wfro        Frobenius norm of its matrices
    asal        energy of its activations (squared inputs of its down projection, times the routing weight squared)
    composite   mean rank of frequency, wmass, asal and wfro
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata

from console import UserError

SIGNALS = ("frequency", "wmass", "asal", "wfro")
STRATEGIES = ("blind", "random", "inverse", *SIGNALS, "composite")


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """For each item the index of its option so that the summed loss is least and the summed cost at most ``budget``.

    Exact dynamic programming over the cost in units of its greatest common divisor. Raises :class:`UserError` when even
    the cheapest options cost more.
    """
    floor = sum(min(row) for row in costs)
    if floor > budget:
        raise UserError(f"the budget of {budget} is below the {floor} of the cheapest choice; raise --expert-bits")
    unit = int(np.gcd.reduce([cost for row in costs for cost in row]))
    size = budget // unit + 1
    best = np.zeros(size)
    choices = np.zeros((len(costs), size), dtype=np.int8)
    for index, (row, loss) in enumerate(zip(costs, losses, strict=True)):
        table = np.full((len(row), size), np.inf)
        for option, (cost, value) in enumerate(zip(row, loss, strict=True)):
            step = cost // unit
            if step < size:
                table[option, step:] = best[: size - step] + value
        choices[index], best = table.argmin(0), table.min(0)
    picked, left = [0] * len(costs), int(best.argmin())
    for index in reversed(range(len(costs))):
        picked[index] = int(choices[index, left])
        left -= costs[index][picked[index]] // unit
    return picked


def scores(strategy: str, signals: Mapping[str, Sequence[float]], seed: int = 0) -> list[float]:
    """A score for each expert of one layer from its ``signals`` (those of :data:`SIGNALS`); more is more important."""
    count = len(signals[SIGNALS[0]])
    if strategy == "random":
        return random.Random(seed).sample([float(i) for i in range(count)], count)
    if strategy in SIGNALS:
        return list(signals[strategy])
    ranks = [rankdata(signals[name]) - 1 for name in SIGNALS]  # equal ones share the mean of their ranks
    together = [float(sum(each)) for each in zip(*ranks)]
    if strategy == "composite":
        return together
    if strategy == "inverse":
        return [-value for value in together]
    raise UserError(f"strategy {strategy!r} is unknown; known: {', '.join(STRATEGIES)}")


def bits_by_score(values: Sequence[float], mean: float, options: Sequence[int], share: float) -> list[int]:
    """Whole bits for experts with these scores, whose mean is exactly ``mean``.

    Two ``options`` (low, high): the best get high, as many as the mean allows. Three (low, middle, high) with the mean in
    the middle: the best ``share`` of the experts get high, as many of the worst low. Ties go to the lower index.
    """
    count = len(values)
    best = sorted(range(count), key=lambda e: (-values[e], e))
    low, high = options[0], options[-1]
    if len(options) == 2:
        raised, lowered, middle = (mean - low) / (high - low) * count, 0.0, low
    elif len(options) == 3 and options[1] == mean and 2 * mean == low + high:
        raised, lowered, middle = share * count, share * count, options[1]
    else:
        raise UserError(f"options {list(options)} at a mean of {mean:g} bits: give two, or three with the mean in the middle")
    if not 0 <= raised <= count or raised != int(raised) or raised + lowered > count:
        raise UserError(f"{raised:g} of {count} experts cannot have {high} bits; choose another share or other options")
    bits = [middle] * count
    for place in best[: int(raised)]:
        bits[place] = high
    for place in best[count - int(lowered) :]:
        bits[place] = low
    return bits


def bits_by_signal(
    strategy: str, signals: Mapping[str, Mapping[str, Sequence[float]]], mean: float, options: Sequence[int],
    share: float = 0.25, seed: int = 0,
) -> dict[str, list[int]]:  # fmt: skip
    """The bits of each expert, by module of experts, from the ``signals`` of every module."""
    if strategy == "blind":
        if mean != int(mean):
            raise UserError(f"strategy blind: {mean:g} bits must be a whole number")
        return {module: [int(mean)] * len(own[SIGNALS[0]]) for module, own in signals.items()}
    return {module: bits_by_score(scores(strategy, own, seed), mean, options, share) for module, own in signals.items()}
