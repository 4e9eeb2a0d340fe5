"""What a benchmark is: load, prompt, extract, grade. One small class each; runner maps names to classes.

Not a command. The rows of a published benchmark come from the hub at a pinned commit, or from DIR/NAME.jsonl (or .jsonl.gz) of
the same columns (--data-dir); there is no other source and no fallback.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import heapq
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console import UserError
from intervals import strata_interval
from task_text import Item

Row = dict[str, Any]


class Benchmark:
    """The interface that every benchmark has. Subclasses set ``name`` and ``revision`` and fill in four methods."""

    name: str
    revision: str
    max_tokens: int | None = None  # a limit of its own below that of the run, for tasks whose answers are short

    def __init__(self, data_dir: Path | None = None) -> None:
        self.data_dir = data_dir  # local rows of a published benchmark

    converses = False  # a dialogue with tools, which a server alone can hold

    chosen = "first of a seeded generator"  # how ``load`` takes n items; the record says it

    def load(self, n: int | None = None) -> list[Item]:
        """``n`` test items (all when None), always the same ones in the same order; those of a smaller n are among them."""
        raise TypeError(f"{type(self).__name__} does not define load")

    def messages(self, item: Item) -> list[dict[str, Any]]:
        """The chat turns that the model is asked to continue. The same for every backend."""
        return [{"role": "user", "content": item.question}]

    def given(self, item: Item, render: Callable[[list[dict[str, Any]]], Any]) -> Any:
        """What an engine is given."""
        return render(self.messages(item))

    def extract(self, item: Item, answer: str) -> str | None:
        """The final answer found in the text after the thinking, or None."""
        raise TypeError(f"{type(self).__name__} does not define extract")

    def right(self, item: Item, answer: str) -> bool:
        """Whether an extracted answer is right."""
        return answer == item.gold

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Grade many answers; None is wrong. Benchmarks whose judge is a process override this to ask it side by side."""
        return [answer is not None and self.right(item, answer) for item, answer in zip(items, extracted, strict=True)]

    def grade(self, item: Item, extracted: str | None) -> bool:
        return self.grade_all([item], [extracted])[0]

    def standard(self, item: Item) -> Any:
        """What an answer is judged by, as JSON: the gold answer, and the tests of one that is run."""
        return item.gold

    def stratum(self, item: Item) -> str | None:
        """The group (task, language, subject) whose accuracy is reported too, or None."""
        return item.meta.get("stratum")

    def aggregate(self, items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Metrics beside plain accuracy, from log rows (with ``id`` and ``correct``) of these items: the accuracy of each
        stratum, and what a benchmark's own headline is when it is not plain accuracy."""
        group_of = {item.id: self.stratum(item) for item in items}
        groups: dict[str, dict[str, list[bool]]] = {}
        for row in rows:
            if (stratum := group_of[row["id"]]) is not None:
                groups.setdefault(stratum, {}).setdefault(row["id"], []).append(bool(row["correct"]))
        if not groups:
            return {}
        names = sorted(groups)
        counts = [(sum(sum(own) / len(own) for own in groups[name].values()), len(groups[name])) for name in names]
        sizes = [sum(map(len, groups[name].values())) for name in names]
        strata = {name: {"n": n, "acc": right / k} for name, n, (right, k) in zip(names, sizes, counts)}
        made: dict[str, Any] = {"strata": strata}
        for key, value in self.headline({name: own["acc"] for name, own in strata.items()}).items():

            def drawn(values: Sequence[float], key: str = key) -> float:
                return self.headline(dict(zip(names, values)))[key]

            made[key] = value
            made[f"{key}_low"], made[f"{key}_high"] = strata_interval(counts, drawn)
        return made

    def headline(self, accuracies: Mapping[str, float]) -> dict[str, float]:
        """The official aggregate of the strata's accuracies, if it is not plain accuracy."""
        return {}


@dataclass(frozen=True)
class Source:
    """A data set on the hub. ``revision``: a commit hash. ``files``: read these JSON-lines files of the repository
    instead of a configuration."""

    repository: str
    revision: str
    split: str = "test"
    config: str | None = None
    files: tuple[str, ...] = ()
    gated: bool = False


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSON-lines file, gzipped or not; a broken line is named."""
    rows, number = [], 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
            for line in stream:
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {number} is not JSON ({error})") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    return rows


def local_file(data_dir: Path, name: str) -> Path:
    """data_dir/NAME.jsonl or .jsonl.gz."""
    for path in (data_dir / f"{name}.jsonl", data_dir / f"{name}.jsonl.gz"):
        if path.is_file():
            return path
    raise UserError(f"{data_dir}: has no {name}.jsonl or {name}.jsonl.gz; put it there, or leave out --data-dir")


def download(source: Source, config: str | None, split: str) -> Iterable[Row]:
    """The rows of one configuration at the pinned commit, through `datasets` (and its cache); images as their files' bytes."""
    from datasets import Image, load_dataset

    with reachable(source):
        if source.files:
            where = f"hf://datasets/{source.repository}@{source.revision}/"
            data = load_dataset("json", data_files=[where + file for file in source.files], split="train")
        else:
            data = load_dataset(source.repository, config, split=split, revision=source.revision)
    for name, feature in data.features.items():
        if isinstance(feature, Image):
            data = data.cast_column(name, Image(decode=False))
    return data


@contextlib.contextmanager
def reachable(source: Source) -> Iterator[None]:
    """What keeps a data set from being fetched is one line: no network, no login, no such revision."""
    from datasets import exceptions
    from huggingface_hub import errors

    try:
        yield
    except (OSError, ValueError, exceptions.DatasetsError, *errors.HfHubHTTPError.__bases__) as error:  # its HTTP client's too
        why = " ".join(str(error).split())[:200]
        page = f"huggingface.co/datasets/{source.repository}"
        mend = f"it is gated: accept its terms at {page} and log in with `hf auth login`, or " if source.gated else ""
        raise UserError(
            f"{source.repository}@{source.revision[:12]}: cannot be loaded ({type(error).__name__}: {why}); {mend}"
            "get the machine on line, or pass --data-dir DIR with local copies"
        ) from None


def sampling_key(name: str, number: int) -> str:
    """The place of a row in the seeded order of its benchmark, which hangs neither on other rows nor on how many are asked."""
    return hashlib.sha256(f"{name}:{number}".encode()).hexdigest()


def stratified(items: Sequence[Item], stratum: Callable[[Item], str], seed: str) -> list[Item]:
    """The items in an order in which every first n is a fair sample: each stratum has its share, within one item.

    Systematic sampling: the items of a stratum are shuffled and spread evenly, from a random start, over the whole.
    """
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(stratum(item), []).append(item)
    placed = []
    for name, members in sorted(groups.items()):
        rng = random.Random(f"{seed}:{name}")
        rng.shuffle(members)
        start = rng.random()
        placed += [((place + start) / len(members), name, item) for place, item in enumerate(members)]
    placed.sort(key=lambda entry: entry[:2])
    return [item for _, _, item in placed]


class HubBenchmark(Benchmark):
    """A published benchmark. Subclasses set ``name``, ``source`` and ``columns`` (those that they read), and write ``item``.
    ``revision``: the pinned commit, or the digests of the local files that were read. ``configs``: each has a local file of its
    own, NAME_CONFIG, unless ``one_file``. --limit takes a seeded sample; ``order_by_stratum``: a stratified one."""

    source: Source
    columns: tuple[str, ...]
    configs: Sequence[str | None] = (None,)
    one_file = False
    local_name = ""  # name of the local file, if it is not ``name``
    order_by_stratum = False

    def __init__(self, data_dir: Path | None = None) -> None:
        super().__init__(data_dir)
        self.chosen = "stratified sample" if self.order_by_stratum else "seeded sample"
        self.local: dict[str, str] = {}  # file name -> sha256, of what was read locally
        self.revision = f"{self.source.repository}@{self.source.revision}" if data_dir is None else "local"

    def rows(self, config: str | None = None, split: str | None = None, suffix: str = "") -> Iterator[Row]:
        """The checked rows of one configuration; ``suffix`` names the local file of another split or configuration."""
        if self.data_dir is None:
            rows = download(self.source, config or self.source.config, split or self.source.split)
            where = self.source.repository
        else:
            path = local_file(self.data_dir, (self.local_name or self.name) + suffix)
            rows, where = read_rows(path), str(path)
            self.local[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            self.revision = "local " + ", ".join(f"{name} sha256:{digest}" for name, digest in sorted(self.local.items()))
        number = 0
        for number, row in enumerate(rows, 1):
            if missing := [column for column in self.columns if not isinstance(row, dict) or column not in row]:
                needs = f"{self.name} needs {', '.join(self.columns)}"
                raise UserError(f"{where}: row {number} lacks {', '.join(missing)}; {needs}")
            yield row
        if not number:
            raise UserError(f"{where}: has no rows")

    def all_rows(self) -> Iterator[tuple[str | None, Row]]:
        """(configuration, row) of the whole benchmark."""
        for config in (None,) if self.data_dir and self.one_file else self.configs:
            yield from ((config, row) for row in self.rows(config, suffix=f"_{config}" if config else ""))

    def keep(self, row: Row) -> bool:
        """Whether a row belongs to the benchmark."""
        return True

    def item(self, row: Row, number: int, config: str | None) -> Item:
        """One question from one row; ``number`` counts the kept rows from 0."""
        raise TypeError(f"{type(self).__name__} does not define item")

    def load(self, n: int | None = None) -> list[Item]:
        rows: Iterable[tuple[int, tuple[str | None, Row]]]
        rows = enumerate(pair for pair in self.all_rows() if self.keep(pair[1]))
        if n is not None and not self.order_by_stratum:  # files are sorted: their first rows are no fair sample
            rows = sorted(heapq.nsmallest(n, rows, key=lambda row: sampling_key(self.name, row[0])), key=lambda row: row[0])
        items = [self.item(row, number, config) for number, (config, row) in rows]
        if len({item.id for item in items}) != len(items):
            raise UserError(f"{self.name}: two rows have the same id; the file holds rows twice")
        return stratified(items, self.sampling_stratum, self.name)[:n] if self.order_by_stratum else items

    def sampling_stratum(self, item: Item) -> str:
        return self.stratum(item) or ""
