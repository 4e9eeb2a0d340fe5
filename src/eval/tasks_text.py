"""Likelihood tasks made of a corpus of real text: the true continuation, recall of rare facts, the line that closes a block.

Not a command. An item is a prompt and four choices as token ids, of which one is true; a model answers with the likeliest.
All are pure functions of documents (rows of make_text.sh's SPLIT.jsonl.gz) and a seed. `continuations(...)` and
`closing_lines(...)` read held-out documents. `facts(...)` reads training documents for what they state (`from MODULE import
NAME`, an option and its explanation in a manual) and asks for it in sentences that do not stand there.
"""

from __future__ import annotations

import collections
import gzip
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from console import UserError
from intervals import bounds, paired_interval, resampled, weighted_means, wilson

CHOICES = 4
PREFIX, NEXT = 64, 32  # tokens before a continuation, and of it
BLOCK = 96  # tokens before the line that closes a block
RARE = range(3, 101)  # how often training text imports a name that recall asks for
FACT_DOCUMENTS = ("manual pages", "prose")  # strata that explain options
IMPORT = re.compile(r"^[ \t]*from ([A-Za-z]\w*(?:\.\w+)+) import (?:\(([^()#]*)\)|([^\n(#;\\]+))$", re.M)
OPTION = re.compile(
    r"^[ \t]*(?:-\w(?:,| or)?[ \t]+)?(--[a-z][\w-]+)(?:[= \[<][^\n]{0,30})?\n+[ \t]*([A-Z][^\n]{20,160})$", re.M
)
Row = Mapping[str, Any]
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Item:
    """``answer``: the place of the true one among the ``choices``."""

    prompt: list[int]
    choices: tuple[list[int], ...]
    answer: int


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The documents of SPLIT.jsonl.gz: package, path, stratum, text."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; bash pipelines/make_text.sh makes it")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row = json.loads(line)
                if not isinstance(row, dict) or not {"package", "path", "stratum", "text"} <= row.keys():
                    raise UserError(f"{path}: line {number} has no package, path, stratum and text; make the corpus again")
                yield row
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); make the corpus again") from None


def by_stratum(rows: Iterable[Row], seed: int) -> dict[str, list[Row]]:
    """The documents of each stratum, in an order that is random and always the same."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["stratum"], []).append(row)
    for name, own in found.items():
        random.Random(f"{seed}:{name}").shuffle(own)
    return dict(sorted(found.items()))


def shuffled(rng: random.Random, true: Any, others: Sequence[Any]) -> tuple[tuple[Any, ...], int]:
    """(all choices in random order, the place of the true one)."""
    order = list(range(len(others) + 1))
    rng.shuffle(order)
    return tuple([true, *others][i] for i in order), order.index(0)


def continuation(ids: Sequence[int], rng: random.Random) -> Item | None:
    """A place in a document: its next tokens, and as many from three other places of it that overlap with none of it."""
    places = len(ids) - PREFIX - NEXT
    if places < 2 * CHOICES * NEXT:
        return None
    start = rng.randrange(places)
    true, found = list(ids[start + PREFIX : start + PREFIX + NEXT]), list[int]()
    for place in rng.sample(range(places + PREFIX), min(64, places)):
        apart = all(abs(place - other) >= NEXT for other in found)
        if apart and not start - NEXT < place < start + PREFIX + NEXT and list(ids[place : place + NEXT]) != true:
            found.append(place)
        if len(found) == CHOICES - 1:
            others = [list(ids[place : place + NEXT]) for place in found]
            distinct = len({tuple(each) for each in others}) == len(others)
            return Item(list(ids[start : start + PREFIX]), *shuffled(rng, true, others)) if distinct else None
    return None


def continuations(documents: Mapping[str, Sequence[Row]], encode: Encode, count: int, seed: int = 0) -> list[Item]:
    """``count`` items, an equal share of each stratum; one of a document before a second of any."""
    made = []
    for number, (name, rows) in enumerate(documents.items()):
        share = count * (number + 1) // len(documents) - count * number // len(documents)
        rng, long = random.Random(f"continuation:{seed}:{name}"), [row for row in rows if len(row["text"]) > 1000]
        ids: dict[int, list[int]] = {}
        kept: list[Item] = []
        for i in itertools.islice(itertools.cycle(range(len(long))), 20 * share):
            if len(kept) == share:
                break
            if i not in ids:
                ids[i] = encode(long[i]["text"])
            if (item := continuation(ids[i], rng)) and item not in kept[-len(long) :]:
                kept.append(item)
        made += kept
    return made


def closings(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(what stands before, the line, other lines of the same indentation) for each line behind a block that is deeper."""
    lines = text.splitlines()
    kept = [i for i, line in enumerate(lines) if line.strip()]
    depth = [len(line) - len(line.lstrip()) for line in lines]
    alike = collections.defaultdict(dict)  # by indentation
    for i in kept:
        alike[lines[i][: depth[i]]].setdefault(lines[i], i)
    for before, i in itertools.pairwise(kept):
        own = lines[i]
        if depth[before] > depth[i] and len(own.strip()) > 3:
            others = [other for other in alike[own[: depth[i]]] if other != own and len(other.strip()) > 3]
            if len(others) >= CHOICES - 1:
                yield "\n".join([*lines[max(0, i - 40) : i], ""]), own, others


def closing_lines(rows: Iterable[Row], encode: Encode, count: int, seed: int = 0) -> list[Item]:
    """``count`` items of code, one of a document before a second of any."""
    rng, waiting = random.Random(f"closing:{seed}"), []
    for row in rows:
        found = list(closings(row["text"]))
        rng.shuffle(found)
        waiting.append(found)
    made: list[Item] = []
    for before, true, others in (place for part in itertools.zip_longest(*waiting) for place in part if place):
        if len(made) == count:
            break
        prompt = encode(before)[-BLOCK:]
        choices, answer = shuffled(rng, true, rng.sample(others, CHOICES - 1))
        if len(prompt) == BLOCK:
            made.append(Item(prompt, tuple(encode(choice) for choice in choices), answer))
    return made


@dataclass(frozen=True)
class Fact:
    """A question and what may stand behind it; ``kind``: module or option."""

    kind: str
    question: str
    choices: tuple[str, ...]
    answer: int


def facts(rows: Iterable[Row], count: int, seed: int = 0) -> list[Fact]:
    """``count`` facts that the documents state, at most half of them of options: which module a name is imported from, of names
    that come from one module only, are rare and do not tell it; how a manual explains a program's option. Distractors are other
    modules of the package, other options of the program (or, where it has few, of others)."""
    modules: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    options: dict[tuple[str, str], set[str]] = collections.defaultdict(set)
    for row in rows:
        if row["path"].endswith(".py"):
            for module, inside, line in IMPORT.findall(row["text"]):
                for name in re.findall(r"(?:^|,)\s*(\w+)\s*(?=,|$)", inside or line):
                    modules[name][module] += 1
        elif row["stratum"] in FACT_DOCUMENTS:
            program = PurePosixPath(row["path"]).name.split(".")[0]
            for option, line in OPTION.findall(row["text"]):
                options[program, option].add(" ".join(line.split()[:14]))
    rng = random.Random(f"facts:{seed}")
    made = _option_facts({key: min(own) for key, own in options.items() if len(own) == 1}, rng)[: count // 2]
    rare = {
        name: next(iter(own))
        for name, own in sorted(modules.items())
        if len(own) == 1 and own.total() in RARE and len(name) > 5
    }
    return made + _module_facts(rare, rng)[: count - len(made)]


def _option_facts(options: Mapping[tuple[str, str], str], rng: random.Random) -> list[Fact]:
    made, everything = [], sorted(set(options.values()))
    for (program, option), true in sorted(options.items()):
        own = sorted({text for (other, _), text in options.items() if other == program} - {true})
        pool = own if len(own) >= CHOICES - 1 else [text for text in everything if text != true]
        if len(pool) >= CHOICES - 1:
            question = f"The program {program} understands {option}. In the words of its manual:"
            made.append(Fact("option", question, *shuffled(rng, true, rng.sample(pool, CHOICES - 1))))
    rng.shuffle(made)
    return made


def _module_facts(homes: Mapping[str, str], rng: random.Random) -> list[Fact]:
    """One of a package in turn."""
    siblings: dict[tuple[str, int], set[str]] = collections.defaultdict(set)  # by package and depth: of like length
    for module in homes.values():
        siblings[module.split(".")[0], module.count(".")].add(module)
    waiting: dict[str, list[Fact]] = collections.defaultdict(list)
    for name, module in homes.items():
        package, *inner = module.split(".")
        others = sorted(siblings[package, module.count(".")] - {module})
        told = any(len(part.strip("_")) > 3 and part.strip("_").lower() in name.lower() for part in inner)
        if len(others) >= CHOICES - 1 and not told and name.lower() not in module.replace("_", ""):
            question = f"Whoever looks for {name} finds it in the module"
            waiting[package].append(Fact("module", question, *shuffled(rng, module, rng.sample(others, CHOICES - 1))))
    for own in waiting.values():
        rng.shuffle(own)
    return [fact for part in itertools.zip_longest(*waiting.values()) for fact in part if fact]


def fact_items(found: Iterable[Fact], encode: Encode) -> list[Item]:
    return [Item(encode(f.question), tuple(encode(f" {choice}") for choice in f.choices), f.answer) for f in found]


def answers(items: Sequence[Item], sums: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Metrics of a task; ``right``: a digit an item, answered by the mean of a choice's tokens."""
    true = np.array([item.answer for item in items])
    by_mean, by_sum = ((found.argmax(1) == true) for found in (sums / counts, sums))
    low, high = wilson(int(by_mean.sum()), len(items))
    own = -sums[np.arange(len(items)), true] / counts[np.arange(len(items)), true]
    figures = {"accuracy": by_mean.mean(), "low": low, "high": high, "accuracy_sum": by_sum.mean(), "nll_true": own.mean()}
    shown = {name: float(value) for name, value in figures.items()}
    return {"items": len(items), **shown, "right": "".join("01"[int(each)] for each in by_mean)}


def paired_answers(base: str, other: str) -> dict[str, Any]:
    """The difference in accuracy, other minus base, with Tango's interval; from the digits of both."""
    if len(base) != len(other):
        raise UserError("the two were asked different items; judge both with the same --items")
    difference, low, high = paired_interval(list(map(int, base)), list(map(int, other)))
    lost, won = (sum((a, b) == pair for a, b in zip(base, other, strict=True)) for pair in (("1", "0"), ("0", "1")))
    return {"difference": difference, "low": low, "high": high, "lost": lost, "won": won}


def paired_kl(text: Mapping[str, Any], base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Mean KL of ``other`` over that of ``base`` (two entries of ``models`` in records) and their difference, each with its
    95 % interval by bootstrap over the documents of ``text`` (the record's); to a base without KL there is no ratio."""
    weights = resampled(text["strata"])
    a, b = (weighted_means(weights, model["kl_sums"], text["positions"]) for model in (base, other))
    ratio, difference = bounds(b / a) if a.min() > 0 else (None,) * 3, bounds(b - a)
    names = ("ratio", "ratio_low", "ratio_high", "difference", "difference_low", "difference_high")
    found = dict(zip(names, (*ratio, *difference), strict=True))
    return found | {"positions": int(sum(text["positions"])), "documents": len(text["positions"])}


def pair(text: Mapping[str, Any], base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """KL and answers of two entries of ``models``, other against base."""
    tasks = {name: paired_answers(own["right"], other["tasks"][name]["right"]) for name, own in base["tasks"].items()}
    return {"kl": paired_kl(text, base, other), "tasks": tasks}
