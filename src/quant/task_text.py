"""The text of the tiny tasks, from a seeded generator: questions, golds and reference solutions on four axes of capability.

Not a command. Training, calibration and held-out KL read it; src/eval/tasks_tiny.py grades answers to it. Splits cannot
overlap: an item belongs to the split that the hash of its defining content says (for tiny_know the hash of the fact asked
about), so no seed can put one item in both.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

TEST_ITEMS = 1000
TEST_SHARE = 16  # one key in 16 belongs to the test split
GENERATOR_REVISION = "tiny-tasks-5"
PERSONS = (
    "Ada Ben Cleo Dan Eve Finn Gus Hana Ivo Jane Kit Lea Max Nora Otto Pia Quin Rosa Sam Tess Uma Vic Wim Xena Yan Zoe"
).split()
WORLD_SEED = 20261124
ONSETS = "b d f g h k l m n p r s t v z br dr gl kr pl st tr".split()
RIMES = "a e i o u al en ir on ur".split()
RELATIONS = ("city", "guild", "pet", "dish")
VALUES_PER_RELATION = 64
PEOPLE = 16_384
SPELLS = 96


# ---- the invented world: words, people, facts and the cookbook of list spells, all from one seed ----


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


# ---- the tasks ----


@dataclass(frozen=True)
class Item:
    """One question. ``question`` is the user turn; ``gold`` is what the grader compares with."""

    id: str
    question: str
    gold: str
    meta: dict[str, Any] = field(default_factory=dict)


def split_of(key: str) -> str:
    """'train' or 'test', a pure function of what defines the item."""
    return "test" if int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % TEST_SHARE == 0 else "train"


def letters_of(n: int) -> str:
    return "ABCDEFGH"[:n]


def option_list(options: Sequence[str]) -> str:
    """`Options: x(A), y(B), ...`: the letter directly after its option, as the written steps repeat it."""
    marked = [f"{option}({letter})" for letter, option in zip(letters_of(len(options)), options, strict=True)]
    return "Options: " + ", ".join(marked) + "."


class TaskText:
    """Shared part: draw items of a split, de-duplicate the test set, build the training transcript."""

    name: str
    max_tokens = 400  # the longest reference solution has about 210
    revision = GENERATOR_REVISION

    def messages(self, item: Item) -> list[dict[str, Any]]:
        """The chat turns that the model is asked to continue."""
        return [{"role": "user", "content": item.question}]

    def draw(self, rng: random.Random) -> tuple[str, Item, str]:
        """One random item: (key that decides its split, item without id, reference assistant turn with thinking)."""
        raise TypeError(f"{type(self).__name__} does not define draw")

    def generate(self, rng: random.Random, split: str) -> tuple[Item, str]:
        """One item of ``split`` and its reference solution, drawn from ``rng``."""
        while True:
            key, item, solution = self.draw(rng)
            if split_of(key) == split:
                return item, solution

    def load_with_solutions(self, n: int | None = None, split: str = "test") -> list[tuple[Item, str]]:
        """The first ``n`` distinct items of a split with their reference assistant turns, the same on every machine."""
        rng = random.Random(f"{self.name}:{self.revision}:{split}")
        found: dict[str, tuple[Item, str]] = {}
        while len(found) < (TEST_ITEMS if n is None else n):
            item, solution = self.generate(rng, split)
            if item.question not in found:
                numbered = Item(f"{self.name}-{split}-{len(found):05d}", item.question, item.gold, item.meta)
                found[item.question] = (numbered, solution)
        return list(found.values())

    def load(self, n: int | None = None) -> list[Item]:
        return [item for item, _ in self.load_with_solutions(n)]


class KnowText(TaskText):
    """Multiple choice over memorised facts. Every fact is stated in training; the test facts are never asked there."""

    name = "tiny_know"
    options = 8
    wordings = {
        "city": "Which city is {} from?",
        "guild": "Which guild is {} in?",
        "pet": "Which pet does {} keep?",
        "dish": "Which dish does {} cook?",
    }

    def draw(self, rng: random.Random) -> tuple[str, Item, str]:
        world = default_world()
        person, relation = rng.choice(world.people), rng.choice(RELATIONS)
        value = world.facts[person][relation]
        options = rng.sample([v for v in world.values[relation] if v != value], self.options - 1)
        place = rng.randrange(self.options)
        options.insert(place, value)
        letter = letters_of(self.options)[place]
        question = self.wordings[relation].format(person) + "\n" + option_list(options)
        solution = f"<think>\n{person}: {relation} {value}({letter}).\n</think>\n\nThe answer is {letter}."
        return f"{person}:{relation}", Item("", question, letter), solution


class MathText(TaskText):
    """A chain of 4 to 10 integer operations on values up to 9999, worked out step by step, answer in a box."""

    name = "tiny_math"
    steps = (4, 10)
    limit = 9999

    def draw(self, rng: random.Random) -> tuple[str, Item, str]:
        value = rng.randint(10, 999)
        clauses, lines = [f"Start with {value}."], []
        for _ in range(rng.randint(*self.steps)):
            clause, line, value = self.operation(rng, value)
            clauses.append(clause)
            lines.append(line)
        question = " ".join(clauses) + " What is the result?"
        work = "\n".join(lines)
        solution = f"<think>\n{work}\n</think>\n\nThe result is \\boxed{{{value}}}."
        return question, Item("", question, str(value)), solution

    def operation(self, rng: random.Random, value: int) -> tuple[str, str, int]:
        """One step that keeps the value within 0..limit: (clause of the question, line of the work, new value)."""
        kinds = [kind for kind, allowed in (
            ("add", value + 10 <= self.limit), ("subtract", value >= 10), ("multiply", 2 <= value <= self.limit // 2)
        ) if allowed]  # fmt: skip
        kind = rng.choice(kinds)
        if kind == "multiply":
            k = rng.randint(2, min(9, self.limit // value))
            return f"Multiply by {k}.", f"{value} * {k} = {value * k}", value * k
        top = min(10 ** rng.randint(2, 4) - 1, self.limit - value if kind == "add" else value)
        k = rng.randint(10, top)
        if kind == "add":
            return f"Add {k}.", f"{value} + {k} = {value + k}", value + k
        return f"Subtract {k}.", f"{value} - {k} = {value - k}", value - k


class ReasonText(TaskText):
    """Ages through 3 to 6 shuffled clues (some need inverting) among clues about strangers; multiple choice.

    A written step quotes its clue and then calculates with numbers, as in tiny_math.
    """

    name = "tiny_reason"
    options = 6
    hops = (3, 6)

    def draw(self, rng: random.Random) -> tuple[str, Item, str]:
        hops, strangers = rng.randint(*self.hops), rng.randint(2, 4)
        names = rng.sample(PERSONS, hops + 1 + strangers)
        chain, others = names[: hops + 1], names[hops + 1 :]
        age = rng.randint(15, 90)
        clues, lines, ages = [f"{chain[0]} is {age}."], [f"{chain[0]} is {age}."], [age]
        for known, new in zip(chain, chain[1:], strict=False):
            clue, line, age = self.link(rng, known, new, age)
            clues.append(clue)
            lines.append(line)
            ages.append(age)
        for a, b in zip(others, others[1:], strict=False):
            clues.append(self.link(rng, a, b, 50)[0])
        rng.shuffle(clues)
        options, letter = self.make_options(rng, ages)
        question = " ".join(clues) + f" How old is {chain[-1]}?\n" + option_list(options)
        work = "\n".join(lines)
        solution = f"<think>\n{work}\n{ages[-1]}({letter})\n</think>\n\nThe answer is {letter}."
        return question, Item("", question, letter), solution

    @staticmethod
    def link(rng: random.Random, known: str, new: str, age: int) -> tuple[str, str, int]:
        """A clue that ties ``new`` to ``known``: (clue, line of the work, age of new), ages kept within 1..199."""
        kind = rng.choice(["older", "older", "younger", "younger", "twice" if age < 100 else "younger"])
        if kind == "twice":
            clue = f"{new} is twice as old as {known}."
            return clue, f"{clue} {age} * 2 = {age * 2}", age * 2
        if kind == "older" and age > 150 or kind == "younger" and age < 12:
            kind = "younger" if kind == "older" else "older"
        k = rng.randint(2, min(48, age - 1)) if kind == "younger" else rng.randint(2, 48)
        result = age + k if kind == "older" else age - k
        inverse = {"older": "younger", "younger": "older"}[kind]
        clue = f"{new} is {k} {kind} than {known}." if rng.random() < 0.5 else f"{known} is {k} {inverse} than {new}."
        return clue, f"{clue} {age} {'+' if kind == 'older' else '-'} {k} = {result}", result

    def make_options(self, rng: random.Random, ages: list[int]) -> tuple[list[str], str]:
        """Six ages: the right one, ages met on the way, and near misses."""
        gold = ages[-1]
        wrong = set(rng.sample(ages[:-1], 2))
        while len(wrong - {gold}) < self.options - 1:
            wrong.add(max(1, gold + rng.choice([-20, -10, -4, -3, -2, -1, 1, 2, 3, 4, 10, 20])))
        options = sorted(wrong - {gold})[: self.options - 1]
        rng.shuffle(options)
        place = rng.randrange(self.options)
        options.insert(place, gold)
        return [str(option) for option in options], letters_of(self.options)[place]


class CodeText(TaskText):
    """A short Python function from 2 to 5 list steps, half of them memorised spells, run against three asserts."""

    name = "tiny_code"
    steps = (2, 5)

    def draw(self, rng: random.Random) -> tuple[str, Item, str]:
        world = default_world()
        name, finish = rng.choice(world.function_names), rng.choice(FINISHES)
        cases = [[rng.randint(-20, 60) for _ in range(rng.randint(8, 12))] for _ in range(3)]
        values: list[object] = []
        while len(set(map(repr, values))) < 2:  # a program that gives one result for every list proves nothing
            pools = [world.spells if rng.random() < 0.5 else world.steps for _ in range(rng.randint(*self.steps))]
            steps = [rng.choice(pool) for pool in pools]
            values = [expected([*steps, finish], xs) for xs in cases]
        question = (
            f"Write a Python function {name}(xs) for a list of integers: "
            + "; ".join(step.text for step in steps)
            + f"; return {finish.text}."
        )
        program = f"def {name}(xs):\n" + "\n".join(f"    {step.code}" for step in [*steps, finish])
        plan = "\n".join(f"{step.text}: {step.code}" for step in steps)
        solution = f"<think>\n{plan}\n</think>\n\n```python\n{program}\n```"
        tests = [f"assert {name}({xs}) == {value!r}" for xs, value in zip(cases, values, strict=True)]
        return question, Item("", question, program, {"entry_point": name, "tests": tests}), solution


def expected(steps: Sequence[Step], xs: list[int]) -> object:
    """What a program of these steps returns, from the steps themselves and not from the text of the program."""
    value: Any = list(xs)
    for step in steps:
        value = step.apply(value)
    return value


TASK_TEXTS = (KnowText, MathText, ReasonText, CodeText)
