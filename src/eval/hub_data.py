"""Rows of a published benchmark: from the hub at a pinned commit, or from a local file of the same columns.

Not a command. `HubBenchmark` is what the classes of bench8_loaders share. With ``data_dir`` the rows of benchmark NAME come
from data_dir/NAME.jsonl or NAME.jsonl.gz and nothing is downloaded. There is no other source and no fallback.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from console import UserError
from task import Benchmark
from task_text import Item

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set on the hub. ``revision``: a commit hash. ``files``: read these JSON-lines files of the repository
    instead of a configuration. ``access``: for a gated set, how to get it."""

    repository: str
    revision: str
    split: str = "test"
    config: str | None = None
    files: tuple[str, ...] = ()
    access: str = ""


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


def download(source: Source, config: str | None, split: str) -> list[Row]:
    """The rows of one configuration at the pinned commit, through `datasets` (and its cache)."""
    from datasets import exceptions, load_dataset
    from huggingface_hub import errors

    try:
        if source.files:
            where = f"hf://datasets/{source.repository}@{source.revision}/"
            data = load_dataset("json", data_files=[where + file for file in source.files], split="train")
        else:
            data = load_dataset(source.repository, config, split=split, revision=source.revision)
    except (OSError, ValueError, exceptions.DatasetsError, *errors.HfHubHTTPError.__bases__) as error:  # its HTTP client's too
        why = " ".join(str(error).split())[:200]
        mend = f"{source.access}, or " if source.access else ""
        raise UserError(
            f"{source.repository}@{source.revision[:12]}: cannot be loaded ({type(error).__name__}: {why}); {mend}"
            "get the machine on line, or pass --data-dir DIR with local copies"
        ) from None
    return [dict(row) for row in data]


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
    """A published benchmark. Subclasses set ``name``, ``source``, ``columns`` (those that they read) and ``n_published``,
    and write ``item``. ``order_by_stratum``: whether --limit takes a stratified sample instead of the first rows."""

    source: Source
    columns: tuple[str, ...]
    configs: tuple[str | None, ...] = (None,)
    local_name = ""  # name of the local file, if it is not ``name``
    order_by_stratum = False

    def __init__(self, data_dir: str | Path | None = None) -> None:
        self.data_dir = Path(data_dir) if data_dir else None
        self.local: dict[str, str] = {}  # file name -> sha256, of what was read locally

    @property
    def revision(self) -> str:  # type: ignore[override]
        """Where the rows come from: the pinned commit, or the digests of the local files that were read."""
        if self.data_dir is None:
            return f"{self.source.repository}@{self.source.revision}"
        return "local " + ", ".join(f"{name} sha256:{digest}" for name, digest in sorted(self.local.items()))

    def rows(self, config: str | None = None, split: str | None = None, suffix: str = "") -> list[Row]:
        """The checked rows of one configuration; ``suffix`` names the local file of another split or configuration."""
        split = split or self.source.split
        if self.data_dir is None:
            rows = download(self.source, config or self.source.config, split)
            where = self.source.repository
        else:
            path = local_file(self.data_dir, (self.local_name or self.name) + suffix)
            rows, where = read_rows(path), str(path)
            self.local[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        if not rows:
            raise UserError(f"{where}: has no rows")
        for number, row in enumerate(rows, 1):
            if missing := [column for column in self.columns if not isinstance(row, dict) or column not in row]:
                raise UserError(
                    f"{where}: row {number} lacks {', '.join(missing)}; {self.name} needs {', '.join(self.columns)}"
                )
        return rows

    def all_rows(self) -> Iterable[tuple[str | None, Row]]:
        """(configuration, row) of the whole benchmark."""
        for config in self.configs:
            suffix = f"_{config}" if config else ""
            yield from ((config, row) for row in self.rows(config, suffix=suffix))

    def keep(self, row: Row) -> bool:
        """Whether a row belongs to the benchmark."""
        return True

    def item(self, row: Row, number: int, config: str | None) -> Item:
        """One question from one row; ``number`` counts the kept rows from 0."""
        raise TypeError(f"{type(self).__name__} does not define item")

    def load(self, n: int | None = None) -> list[Item]:
        kept = [(config, row) for config, row in self.all_rows() if self.keep(row)]
        items = [self.item(row, number, config) for number, (config, row) in enumerate(kept)]
        if len({item.id for item in items}) != len(items):
            raise UserError(f"{self.name}: two rows have the same id; the file holds rows twice")
        if self.order_by_stratum:
            items = stratified(items, self.sampling_stratum, self.name)
        return items[:n]

    def sampling_stratum(self, item: Item) -> str:
        return self.stratum(item) or ""
