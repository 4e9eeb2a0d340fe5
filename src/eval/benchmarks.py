"""What a benchmark is: load, prompt, extract, grade. One small class each; a dict maps names to classes.

Not a command. `python src/eval/vllm_eval8.py --benchmarks tiny_math,tiny_know` runs the classes that register here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from console import UserError


@dataclass(frozen=True)
class Item:
    """One question. ``question`` is the user turn; ``gold`` is what the grader compares with."""

    id: str
    question: str
    gold: str
    meta: dict[str, Any] = field(default_factory=dict)


class Benchmark:
    """The interface that every benchmark has. Subclasses set ``name`` and ``revision`` and fill in four methods."""

    name: str
    revision: str
    max_tokens: int | None = None  # a limit of its own below that of the run, for tasks whose answers are short

    def load(self, n: int | None = None) -> list[Item]:
        """The first ``n`` test items (all when None), always in the same order."""
        raise TypeError(f"{type(self).__name__} does not define load")

    def messages(self, item: Item) -> list[dict[str, str]]:
        """The chat turns that the model is asked to continue. The same for every backend."""
        return [{"role": "user", "content": item.question}]

    def extract(self, item: Item, answer: str) -> str | None:
        """The final answer found in the text after the thinking, or None."""
        raise TypeError(f"{type(self).__name__} does not define extract")

    def grade(self, item: Item, extracted: str | None) -> bool:
        """Whether the extracted answer is right. None is wrong."""
        return extracted is not None and extracted == item.gold

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Grade many answers; benchmarks that run code override this to run them side by side."""
        return [self.grade(item, answer) for item, answer in zip(items, extracted, strict=True)]

    def stratum(self, item: Item) -> str | None:
        """The group (task, language, subject) whose accuracy is reported too, or None."""
        return None

    def aggregate(self, items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Metrics beside plain accuracy, from log rows (with ``id`` and ``correct``) of these items: the accuracy of each
        stratum, and what a benchmark's own headline is when it is not plain accuracy."""
        of = {item.id: self.stratum(item) for item in items}
        groups: dict[str, list[bool]] = {}
        for row in rows:
            if (stratum := of[row["id"]]) is not None:
                groups.setdefault(stratum, []).append(bool(row["correct"]))
        strata = {name: {"n": len(hits), "acc": sum(hits) / len(hits)} for name, hits in sorted(groups.items())}
        return {"strata": strata, **self.headline({name: group["acc"] for name, group in strata.items()})} if strata else {}

    def headline(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """The official aggregate of the strata's accuracies, if it is not plain accuracy."""
        return {}


def check_data_dir(data_dir: Path | None) -> None:
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: no such directory")


def get_benchmarks(names: Sequence[str], data_dir: Path | None = None) -> list[Benchmark]:
    """Instances of the named benchmarks, or one line that lists the known ones. ``data_dir``: local rows, see hub_data."""
    from bench8_loaders import TEXT_BENCHMARKS
    from tiny_tasks import TINY_TASKS

    check_data_dir(data_dir)
    known: dict[str, Any] = {task.name: task for task in TINY_TASKS}
    known |= {task.name: functools.partial(task, data_dir) for task in TEXT_BENCHMARKS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"unknown benchmark {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return [known[name]() for name in names]
