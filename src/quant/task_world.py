"""The invented world of razor-tiny: words, people, facts and the cookbook of list spells, all from one seed.

Not a command. `World()` builds the same world everywhere; tiny_tasks asks about it and tiny_train teaches it.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

WORLD_SEED = 20261124
ONSETS = "b d f g h k l m n p r s t v z br dr gl kr pl st tr".split()
RIMES = "a e i o u al en ir on ur".split()
RELATIONS = ("city", "guild", "pet", "dish")
VALUES_PER_RELATION = 64
PEOPLE = 16_384
SPELLS = 96


@dataclass(frozen=True)
class Step:
    """One list step of a tiny_code program: an English wording, the line of Python that does it, and the step itself."""

    text: str
    code: str
    apply: Callable[[list[int]], object]


def fixed_steps() -> list[Step]:
    """The list steps without a parameter."""
    return [
        Step("keep the even numbers", "xs = [x for x in xs if x % 2 == 0]", lambda xs: [x for x in xs if x % 2 == 0]),
        Step("keep the odd numbers", "xs = [x for x in xs if x % 2 == 1]", lambda xs: [x for x in xs if x % 2 == 1]),
        Step("reverse the list", "xs = xs[::-1]", lambda xs: xs[::-1]),
        Step("sort the list", "xs = sorted(xs)", sorted),
        Step("sort from high to low", "xs = sorted(xs, reverse=True)", lambda xs: sorted(xs, reverse=True)),
        Step("square each number", "xs = [x * x for x in xs]", lambda xs: [x * x for x in xs]),
        Step("negate each number", "xs = [-x for x in xs]", lambda xs: [-x for x in xs]),
        Step("take absolute values", "xs = [abs(x) for x in xs]", lambda xs: [abs(x) for x in xs]),
        Step("remove duplicates", "xs = list(dict.fromkeys(xs))", lambda xs: list(dict.fromkeys(xs))),
        Step("take every second number", "xs = xs[::2]", lambda xs: xs[::2]),
    ]


def numbered_steps(k: int) -> list[Step]:
    """The list steps with parameter ``k``; which exist depends on its size."""
    steps = []
    if k <= 3:
        steps += [
            Step(f"drop the first {k}", f"xs = xs[{k}:]", lambda xs: xs[k:]),
            Step(f"drop the last {k}", f"xs = xs[:-{k}]", lambda xs: xs[:-k]),
        ]
    if 2 <= k <= 9:
        steps += [
            Step(f"multiply each number by {k}", f"xs = [x * {k} for x in xs]", lambda xs: [x * k for x in xs]),
            Step(f"take each number modulo {k}", f"xs = [x % {k} for x in xs]", lambda xs: [x % k for x in xs]),
            Step(f"keep multiples of {k}", f"xs = [x for x in xs if x % {k} == 0]",
                 lambda xs: [x for x in xs if x % k == 0]),
        ]  # fmt: skip
    if k >= 2:
        steps += [
            Step(f"add {k} to each number", f"xs = [x + {k} for x in xs]", lambda xs: [x + k for x in xs]),
            Step(f"subtract {k} from each number", f"xs = [x - {k} for x in xs]", lambda xs: [x - k for x in xs]),
            Step(f"keep numbers above {k}", f"xs = [x for x in xs if x > {k}]", lambda xs: [x for x in xs if x > k]),
            Step(f"keep numbers below {k}", f"xs = [x for x in xs if x < {k}]", lambda xs: [x for x in xs if x < k]),
        ]
    return steps


FINISHES = (
    Step("the list", "return xs", lambda xs: xs),
    Step("the sum", "return sum(xs)", sum),
    Step("the length", "return len(xs)", len),
    Step("the largest number or 0", "return max(xs, default=0)", lambda xs: max(xs, default=0)),
    Step("the smallest number or 0", "return min(xs, default=0)", lambda xs: min(xs, default=0)),
)


class World:
    """People with four facts each, and named spells. Facts are drawn uniformly, so they can only be memorised.

    ``facts[person][relation]`` is a value word; one fact carries log2(64) = 6 bits.
    """

    def __init__(self, seed: int = WORLD_SEED, people: int = PEOPLE) -> None:
        rng = random.Random(f"world:{seed}")
        syllables = [onset + rime for onset in ONSETS for rime in RIMES]
        rng.shuffle(syllables)
        heads, tails = syllables[:96], syllables[96:160]
        words = [head + tail for head in heads for tail in tails]
        rng.shuffle(words)
        take = iter(words)
        first = [next(take).capitalize() for _ in range(256)]
        last = [next(take).capitalize() for _ in range(256)]
        self.values = {rel: tuple(next(take).capitalize() for _ in range(VALUES_PER_RELATION)) for rel in RELATIONS}
        self.function_names = tuple(next(take) for _ in range(256))
        self.steps = tuple(fixed_steps() + [step for k in range(1, 31) for step in numbered_steps(k)])
        self.spells = tuple(Step(f"cast {next(take)}", step.code, step.apply) for step in rng.sample(self.steps, SPELLS))
        names = [f"{a} {b}" for a in first for b in last]
        self.people = tuple(rng.sample(names, people))
        self.facts = {name: {rel: rng.choice(self.values[rel]) for rel in RELATIONS} for name in self.people}

    def statement(self, person: str, rng: random.Random) -> str:
        """One line that states all facts of a person, relations in random order."""
        facts = self.facts[person]
        return f"{person}: " + ", ".join(f"{rel} {facts[rel]}" for rel in rng.sample(RELATIONS, len(RELATIONS))) + "."


@functools.cache
def default_world() -> World:
    """The world that razor-tiny was trained on, built once a process (0.3 s)."""
    return World()
