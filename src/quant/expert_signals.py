"""Bits of each expert by a signal of how much it matters: the orders that published studies compare.

Not a command; `moe_alloc --strategy frequency` uses it. A strategy gives every expert of a layer a score, and the experts with
the highest scores get the most bits, the same number in every layer:

    blind       every expert alike (the uniform recipe)        random      a seeded order
    frequency   share of the tokens routed to it               inverse     the reverse of composite
    wmass       share of the routing weights                   wfro        Frobenius norm of its matrices
    asal        energy of its activations (squared inputs of its down projection, times the routing weight squared)
    composite   mean rank of frequency, wmass, asal and wfro
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from console import UserError

SIGNALS = ("frequency", "wmass", "asal", "wfro")
STRATEGIES = ("blind", "random", "inverse", *SIGNALS, "composite")


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of each value, 0 for the smallest; equal values share the mean of their ranks."""
    order = sorted(values)
    first = {value: order.index(value) for value in set(values)}
    return [first[value] + (order.count(value) - 1) / 2 for value in values]


def scores(strategy: str, signals: Mapping[str, Sequence[float]], seed: int = 0) -> list[float]:
    """A score for each expert of one layer from its ``signals`` (those of :data:`SIGNALS`); more is more important."""
    count = len(signals[SIGNALS[0]])
    if strategy == "random":
        return random.Random(seed).sample([float(i) for i in range(count)], count)
    if strategy in SIGNALS:
        return list(signals[strategy])
    together = [sum(each) for each in zip(*(ranks(signals[name]) for name in SIGNALS))]
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
