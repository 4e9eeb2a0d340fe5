"""The log of an evaluation: a JSON line a sample, appended as it finishes, so that a killed run resumes and is graded again.

Not a command. TAG.samples.jsonl lies beside results/eval/TAG.json, packed (.gz) once it is finished.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from console import UserError, atomic_path, read_json, write_json

Key = tuple[str, str, int]  # benchmark, item, number of the sample


def sample_key(row: Mapping[str, Any]) -> Key:
    """What a log row answers; logs from before --samples have one sample an item."""
    return row["benchmark"], row["id"], row.get("sample", 0)


class SampleLog:
    """Append-only JSON lines of finished samples; the first line holds the settings that make samples comparable.

    Opening a log of the same settings resumes it; a last line that a killed run left torn is dropped, which is said. Other
    settings and a damaged line before the last are a :class:`UserError`, so samples of two different runs never mix and
    none is lost unseen. A packed log is unpacked first. ``done``: {(benchmark, id, sample): row}.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.done: dict[Key, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if packed_path(self.path).exists():
            unpack_log(self.path)
        if self.path.exists():
            self._resume(json.loads(json.dumps(settings)))
        else:
            write_json_line(self.path, {"settings": dict(settings)}, "w")

    def _resume(self, settings: dict[str, Any]) -> None:
        rows, kept, size = read_log(self.path)
        if kept < size:
            print(f"{self.path}: the last line was cut short; it is dropped and made again", file=sys.stderr, flush=True)
            os.truncate(self.path, kept)
        if not rows:
            write_json_line(self.path, {"settings": settings}, "w")
            return
        held = rows[0]["settings"]
        if changed := sorted(key for key in settings.keys() | held.keys() if settings.get(key) != held.get(key)):
            raise UserError(
                f"{self.path}: holds samples of other settings ({', '.join(changed)}); give another --tag or remove it"
            )
        self.done = {sample_key(row): row for row in rows[1:]}

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            self.done[sample_key(row)] = dict(row)
            write_json_line(self.path, row, "a")


def packed_path(path: Path) -> Path:
    """Where the packed form of a log lies."""
    return path.with_name(path.name + ".gz")


def find_log(path: str | Path) -> Path:
    """A finished log as it lies there: TAG.samples.jsonl, else its packed form; the plain name when there is neither."""
    path = Path(path)
    return packed_path(path) if not path.exists() and packed_path(path).exists() else path


def log_bytes(path: Path) -> bytes:
    """The lines of a log, plain or packed."""
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); restore it from a copy, or remove it and run again") from None


def write_log(path: Path, lines: bytes) -> None:
    """A whole log, atomically; packed when the name ends in .gz, the same bytes each time (no name and time in it)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(gzip.compress(lines, 9, mtime=0) if path.suffix == ".gz" else lines)


def pack_log(path: Path) -> Path:
    """Put the packed form in a log's place."""
    write_log(packed_path(path), path.read_bytes())
    path.unlink()
    return packed_path(path)


def unpack_log(path: Path) -> None:
    """Put the plain form in a packed log's place; a plain log beside it is the one of which packing was cut short."""
    if not path.exists():
        write_log(path, log_bytes(packed_path(path)))
    packed_path(path).unlink()


def read_log(path: Path) -> tuple[list[dict[str, Any]], int, int]:
    """(settings line and sample rows, bytes that they take, bytes in all) of a log, plain or packed, whose last line may be
    torn."""
    rows: list[dict[str, Any]] = []
    data = log_bytes(path)
    kept, lines = 0, data.splitlines(keepends=True)  # of bytes: that of a str also breaks a line at U+2028
    for number, line in enumerate(lines):
        wanted = ("benchmark", "id") if number else ("settings",)
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict) or any(key not in row for key in wanted):
            if number == len(lines) - 1:
                break
            mend = "restore it from a copy, or remove the file and run again"
            raise UserError(f"{path}: line {number + 1} is damaged; {mend}")
        rows.append(row)
        kept += len(line)
    return rows, kept, len(data)


class WorkClock:
    """Seconds of work on a run that may be killed and resumed: the sum over its parts, in a small file beside the log.

    ``save`` with every flush of the log: work that a kill throws away is then not counted, work that is kept is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        before = read_json(self.path) if self.path.exists() else {"seconds": 0.0, "started": time.time(), "parts": 0}
        self.before, self.started, self.parts = before["seconds"], before["started"], before["parts"] + 1
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def save(self) -> None:
        write_json(self.path, {"seconds": self.seconds, "started": self.started, "parts": self.parts})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def write_json_line(path: Path, value: Mapping[str, Any], mode: str) -> None:
    with path.open(mode, encoding="utf-8") as stream:
        stream.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def read_samples(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(settings, rows) of a finished sample log; ``path``: TAG.samples.jsonl, which may lie there packed."""
    path = find_log(path)
    try:
        rows, kept, size = read_log(path)
    except OSError as error:
        raise UserError(f"{path}: not a sample log ({error})") from None
    if not rows or kept < size:
        raise UserError(f"{path}: not a finished sample log (line {len(rows) + 1}); run the same evaluation again to finish it")
    return rows[0]["settings"], rows[1:]
