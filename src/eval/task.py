"""What a benchmark is: load, prompt, extract, grade. One small class each; task_list maps names to classes.

Not a command.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from console import UserError
from task_text import Item


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
