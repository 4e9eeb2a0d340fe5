"""The log of an evaluation: a JSON line a sample, appended as it finishes, so that a killed run resumes and is graded again.

Not a command. TAG.samples.jsonl lies beside results/eval/TAG.json, packed (.gz) once it is finished.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sys
import time
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from console import UserError, atomic_path, read_object, write_json, writing
from records import read_result, sha256_json

Key = tuple[str, str, int]  # benchmark, item, number of the sample
# What a row must hold, in a log of answers to benchmarks also what graded it
FIELDS: dict[str, tuple[type, ...]] = {
    "benchmark": (str,), "id": (str,), "prompt_sha256": (str,), "tokens": (int,), "finish_reason": (str,), "text": (str,),
}  # fmt: skip
GRADED_FIELDS: dict[str, tuple[type, ...]] = {"extracted": (str, type(None)), "gold": (str,), "correct": (bool,)}
ASKED = {  # alike in all samples of an item; logs of older versions lack some
    "messages_sha256": "question", "prompt_sha256": "prompt", "prompt_ids_sha256": "prompt (its token ids)",
    "gold": "gold answer", "standard_sha256": "gold answer or tests",
}  # fmt: skip
TORN = (b'{"settings": ', b'{"benchmark": ')  # how a line begins
SEAL = "row_sha256"  # rows of older versions have none
MEND = "restore it from a copy, or remove the file and run again"


def sample_key(row: Mapping[str, Any]) -> Key:
    """What a log row answers; logs from before --samples have one sample an item."""
    return row["benchmark"], row["id"], row.get("sample", 0)


class SampleLog:
    """Append-only JSON lines of finished samples; the first line holds the settings that make samples comparable.

    Opening a log of the same settings resumes it; a last line that a killed run left torn is dropped, which is said. What
    :func:`read_log` refuses, other settings, and a log that another run holds are a :class:`UserError`, so that samples of two
    runs never mix and none is lost unseen. A packed log is unpacked first. ``done``: {(benchmark, id, sample): row}.

    ``graded``: of answers to benchmarks. ``fresh``: what is there is removed. ``settled`` False: more settings follow
    (`settle`). ``close`` gives the log free; it also does so by itself when nothing refers to it, and when the process ends.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], *, graded: bool = False, fresh: bool = False, settled: bool = True
    ) -> None:
        self.path = Path(path)
        self.done: dict[Key, dict[str, Any]] = {}
        self.held: dict[str, Any] = {}
        self.settings = json.loads(json.dumps(settings))
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self.close = weakref.finalize(self, unlock, lock_log(self.path))
        if fresh:
            for old in (self.path, packed_path(self.path)):
                old.unlink(missing_ok=True)
        if find_log(self.path).exists():
            self._resume(graded)
        self._agree(settled)

    def __enter__(self) -> SampleLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _resume(self, graded: bool) -> None:
        rows, kept, size = read_log(find_log(self.path), graded)
        self.held = rows[0]["settings"] if rows else {}
        self.done = {sample_key(row): row for row in rows[1:]}
        if kept < size:
            print(f"{self.path}: the last line was cut short; it is dropped and made again", file=sys.stderr, flush=True)
            os.truncate(self.path, kept)

    def _agree(self, settled: bool) -> None:
        """Raise unless the samples that are there were made with these settings; without samples the log takes them."""
        settings, held = self.settings, self.held
        keys = settings.keys() | held.keys() if settled else settings.keys()
        if self.done and (changed := sorted(key for key in keys if settings.get(key) != held.get(key))):
            raise UserError(
                f"{self.path}: holds samples of other settings ({', '.join(changed)}); give another --tag or remove it"
            )
        if packed_path(self.path).exists():
            unpack_log(self.path)
        if not self.done and settings != held:
            write_log(self.path, log_line({"settings": settings}).encode())
            self.held = dict(settings)

    def settle(self, more: Mapping[str, Any]) -> None:
        """Add the settings that only a started engine can tell, and compare them all."""
        self.settings |= json.loads(json.dumps(more))
        self._agree(settled=True)

    def line(self, key: Key) -> int:
        """The number of the line that holds a sample."""
        return list(self.done).index(key) + 2

    def check(self, key: Key, asked: Mapping[str, Any]) -> None:
        """Raise unless a sample that is there was asked and judged by what stands in ``asked`` (of the fields ASKED)."""
        if changed := changed_fields(self.done[key], asked):
            raise UserError(
                f"{self.path}: line {self.line(key)}: {key[1]} of {key[0]} had another {ASKED[changed[0]]}; "
                "give back the data and the chat template that it was asked with, or give another --tag"
            )

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows; on a disk that is full the log stays as it was."""
        size, written = self.path.stat().st_size, [sealed(row) for row in rows]
        try:
            with writing(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(map(log_line, written))
        except UserError:
            os.truncate(self.path, size)
            raise
        self.done |= {sample_key(row): row for row in written}


def changed_fields(row: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What of ASKED differs between two rows, where both have it."""
    return [name for name in ASKED if None not in (row.get(name), other.get(name)) and row[name] != other[name]]


def lock_log(path: Path) -> filelock.BaseFileLock:
    """The lock of a log, which one process holds; it dies with the process, however that ends."""
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
    with writing(path):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # an OSError too
            raise UserError(f"{path}: another run is writing this log; wait for it, stop it, or give another --tag") from None
    return lock


def unlock(lock: filelock.BaseFileLock) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


@contextlib.contextmanager
def held_log(path: Path) -> Iterator[None]:
    """Hold the lock of a finished log while it is rewritten."""
    if not path.parent.is_dir():
        raise UserError(f"{path.parent}: no such directory")
    lock = lock_log(path)
    try:
        yield
    finally:
        unlock(lock)


def log_line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with a digest of itself at its end (the digest of the settings stands in the record)."""
    bare = {key: value for key, value in row.items() if key != SEAL}
    return bare | {SEAL: sha256_json(bare)[:16]}


def packed_path(path: Path) -> Path:
    """Where the packed form of a log lies."""
    return path.with_name(path.name + ".gz")


def find_log(path: str | Path) -> Path:
    """A finished log as it lies there: TAG.samples.jsonl, else its packed form; the plain name when there is neither."""
    path = Path(path)
    return packed_path(path) if not path.exists() and packed_path(path).exists() else path


def log_bytes(path: Path) -> bytes:
    """The lines of a log, plain or packed."""
    try:
        data = path.read_bytes()
        return data if path.suffix != ".gz" else gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); {MEND}") from None
    except OSError as error:
        raise UserError(f"{path}: not a sample log ({error.strerror})") from None


def write_log(path: Path, lines: bytes) -> None:
    """A whole log, atomically; packed when the name ends in .gz, the same bytes each time (no name and time in it)."""
    with writing(path), atomic_path(path) as temporary:
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


def read_log(path: Path, graded: bool = False) -> tuple[list[dict[str, Any]], int, int]:
    """(settings line and sample rows, bytes that they take, bytes in all) of a log, plain or packed, whose last line may be
    torn. The one reader of logs: a line that is damaged, changed, lacks a field, comes twice or belongs to another run is an
    error with its number. ``graded``: the rows are answers to benchmarks."""
    rows: list[dict[str, Any]] = []
    data = log_bytes(path)
    kept, lines = 0, data.splitlines(keepends=True)  # of bytes: that of a str also breaks a line at U+2028
    for number, line in enumerate(lines, 1):
        if number == len(lines) and was_cut(line):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}: line {number} is damaged (not JSON); {MEND}") from None
        wanted = {"settings": (dict,)} if number == 1 else FIELDS | GRADED_FIELDS if graded else FIELDS
        check_fields(row, wanted, f"{path}: line {number}")
        if row.get(SEAL) is not None and row != sealed(row):
            raise UserError(f"{path}: line {number} ({row['id']}) was changed after it was written; {MEND}")
        rows.append(row)
        kept += len(line)
    check_rows(rows, path)
    return rows, kept, len(data)


def was_cut(line: bytes) -> bool:
    """Whether a last line is one that a kill or a power cut left unfinished: the beginning of a row, or zeros."""
    begun = any(line.startswith(start[: len(line)]) for start in TORN)
    return begun and not line.endswith(b"\n") or b"\0" in line


def check_fields(row: Any, wanted: Mapping[str, tuple[type, ...]], where: str) -> None:
    """Raise unless a line is an object with these fields of these types (a bool is no int)."""
    if not isinstance(row, dict):
        raise UserError(f"{where} is damaged (not a row); {MEND}")
    if lost := [name for name in wanted if name not in row]:
        raise UserError(f"{where} is damaged: it lacks {', '.join(lost)}; {MEND}")
    if wrong := [name for name, kinds in wanted.items() if type(row[name]) not in kinds]:
        raise UserError(f"{where} is damaged: {wrong[0]} is {str(row[wrong[0]])[:40]!r}; {MEND}")


def check_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Raise on a row that comes twice, is of other settings, or was asked otherwise than its item's first sample."""
    settings = rows[0]["settings"] if rows else {}
    if type(samples := settings.get("samples", 1)) is not int:
        raise UserError(f"{path}: line 1 is damaged: samples is {samples!r}; {MEND}")
    seen: dict[Key, int] = {}
    first: dict[tuple[str, str], Mapping[str, Any]] = {}
    for number, row in enumerate(rows[1:], 2):
        key, where = sample_key(row), f"{path}: line {number}"
        name = f"{row['id']} of {row['benchmark']}, sample {key[2]}"
        if key in seen:
            raise UserError(f"{where} repeats line {seen[key]} ({name}); remove the line that does not belong there")
        if type(key[2]) is not int or not 0 <= key[2] < samples:
            raise UserError(f"{where} is not of this run: {name}, where an item has {samples}; remove it")
        if row.get("grader", settings.get("grader")) != settings.get("grader"):
            raise UserError(f"{where} is not of this run: grader {row['grader']!r}, not {settings.get('grader')!r}; remove it")
        if changed := changed_fields(row, first.setdefault(key[:2], row)):
            raise UserError(f"{where} is not of this run: {name} has another {ASKED[changed[0]]} than its first; remove it")
        seen[key] = number


class WorkClock:
    """Seconds of work on a run that may be killed and resumed: the sum over its parts, in a small file beside the log.

    ``save`` with every flush of the log: work that a kill throws away is then not counted, work that is kept is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        before = {"seconds": 0.0, "started": time.time(), "parts": 0}
        if self.path.exists():
            before = read_object(self.path)
            kinds = dict.fromkeys(("seconds", "started"), (float, int)) | {"parts": (int,)}
            check_fields(before, kinds, str(self.path))
        self.before, self.started, self.parts = before["seconds"], before["started"], before["parts"] + 1
        self.begun = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def save(self) -> None:
        write_json(self.path, {"seconds": self.seconds, "started": self.started, "parts": self.parts})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def read_samples(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(settings, rows) of a finished sample log; ``path``: TAG.samples.jsonl, which may lie there packed."""
    path = find_log(path)
    rows, kept, size = read_log(path, graded=True)
    if not rows or kept < size:
        raise UserError(f"{path}: not a finished sample log (line {len(rows) + 1}); run the same evaluation again to finish it")
    return rows[0]["settings"], rows[1:]


def read_evaluation(result: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """(record, settings, rows) of a finished evaluation, whose log must be the one that the record was made of."""
    record = read_result(result, "eval")
    log = find_log(result.parent / str(record.get("samples")))
    settings, rows = read_samples(log)
    mend = "restore the log from a copy, or run the evaluation again with --force"
    if record.get("settings_sha256") not in (None, sha256_json(settings)):
        raise UserError(f"{log}: line 1 has other settings than the run that {result.name} tells of; {mend}")
    for name, m in record["metrics"].items():
        check_fields(m, {"n": (int,), "correct": (int,)}, f"{result}: metrics.{name}")
    left = {name: m["n"] * m.get("samples", 1) for name, m in record["metrics"].items()}
    for number, row in enumerate(rows, 2):
        left[row["benchmark"]] = left.get(row["benchmark"], 0) - 1
        if left[row["benchmark"]] < 0:
            of = f"{row['id']} of {row['benchmark']}"
            raise UserError(f"{log}: line {number} ({of}) is one more than {result.name} counts; {mend}")
    if short := [name for name, count in left.items() if count]:
        raise UserError(f"{log}: lacks {left[short[0]]} of the samples of {short[0]} that {result.name} counts; {mend}")
    for name, m in record["metrics"].items():
        right = sum(row["correct"] for row in rows if row["benchmark"] == name)
        if right != m["correct"]:
            raise UserError(f"{log}: {right} right answers to {name} where {result.name} counts {m['correct']}; {mend}")
    return record, settings, rows
