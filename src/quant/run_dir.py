"""An output directory that takes its name only when it is complete, and a killed run that goes on where it stopped.

Not a command. The work lies in `.NAME.partial` beside the output, with the settings of the run and the identity of its inputs
(checkpoint.source_identity) in job.json and a lock that dies with its process. Ctrl-C and bad input remove it; after `kill -9`,
a crash or a full disk the same command resumes it, and a command with other settings or inputs is refused. What only a run
that resumes needs lies in its folder `run`, which is no part of the output. :func:`share` is for work that several processes,
on any machines that see the disk, do together.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock

from checkpoint import different_file
from console import FULL, SourceError, UserError, WriteError, read_object, write_json, writing
from recipe import RECIPE_FILE

JOB, LOCK, RUN = "job.json", "lock", "run"
INPUTS = ("source", "gguf")  # keys of a job that hold a checkpoint.source_identity


def beside(out: Path, suffix: str) -> Path:
    """A file beside an output."""
    return Path(f"{str(out).rstrip('/')}.{suffix}")


def partial_of(out: Path) -> Path:
    """Where the output ``out`` lies while it is being made."""
    return out.parent / f".{out.name}.partial"


def replaced_of(out: Path) -> Path:
    """Where an output that is being replaced lies for the moment between two renames."""
    return out.parent / f".{out.name}.replaced"


def check_output(model: Path, out: Path, force: bool, needed: int, mark: str = RECIPE_FILE) -> None:
    """Raise :class:`UserError` unless ``needed`` bytes can be written to ``out``. Touches nothing. ``mark``: the file
    that every output of the command holds; another directory is never replaced."""
    source = model.resolve()
    if out == source or out in source.parents or source in out.parents:
        raise UserError(f"{out}: is the model itself, or a directory inside or around it; choose another --out")
    check_alone(out)
    if out.exists() and not force:
        raise UserError(f"{out}: exists; use --force to replace it")
    if out.exists() and not (out / mark).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: not an output of this command (no {mark}); --force will not delete it, remove it")
    ancestor = next(parent for parent in out.parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"{out}: cannot be created, {ancestor} is not a directory that you can write to")
    partial = partial_of(out)
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(ancestor).free
    if free + there < needed:
        raise UserError(f"{out}: needs {needed / 1e9:.2f} GB, {(free + there) / 1e9:.2f} GB free on that disk")


def check_resume(out: Path, job: Mapping[str, Any]) -> bool:
    """Whether an unfinished run of the same settings is there; other settings are a :class:`UserError`."""
    check_alone(out)
    return same_job(out, job)


def same_job(out: Path, job: Mapping[str, Any]) -> bool:
    """The same, whoever is at work there."""
    path = partial_of(out) / JOB
    if not path.exists():
        return False
    before = read_object(path)
    if before == dict(job):
        return True
    changed = sorted(key for key in before.keys() | job.keys() if before.get(key) != job.get(key))
    inputs = [key for key in changed if key in INPUTS]
    changed += [f"{key}: {different_file(before.get(key), job.get(key, {}))}" for key in inputs]
    changed = [text for text in changed if text not in inputs]
    raise UserError(
        f"{partial_of(out)}: an unfinished run with other settings ({', '.join(changed)}); "
        "repeat that run to finish it, or remove the directory"
    )


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory; it ends with the process, however that ends."""
    try:
        lock = filelock.FileLock(directory / LOCK, timeout=0).acquire()
    except filelock.Timeout:
        raise UserError(f"{directory}: another run is writing this output; wait for it or stop it") from None
    with lock:
        yield


def check_alone(out: Path) -> None:
    """Raise :class:`UserError` while another run makes ``out``: of one that is alive nothing else is worth saying."""
    if partial_of(out).is_dir():
        with _locked(partial_of(out)):
            pass


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of ``out`` for work that comes before its :func:`staged_directory`, or that needs none."""
    partial = partial_of(out)
    made = [folder for folder in (partial, *partial.parents) if not folder.exists()]
    with writing(partial):
        partial.mkdir(parents=True, exist_ok=True)
    try:
        with _locked(partial):
            yield
    finally:
        with contextlib.suppress(OSError):  # what holds more than a lock stays
            if made and all(file.name == LOCK for file in partial.iterdir()):
                shutil.rmtree(partial)
                for folder in made[1:]:
                    folder.rmdir()


@contextlib.contextmanager
def staged_directory(out: Path, force: bool, job: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the directory of the work, new or resumed; when the block succeeds it takes the name ``out``, with ``force``
    in place of what was there. Bad input or Ctrl-C removes it, with the parents made for it; what was there is untouched."""
    if replaced_of(out).exists():  # killed between two renames
        shutil.rmtree(replaced_of(out)) if out.exists() else replaced_of(out).rename(out)
    partial = partial_of(out)
    resumed = check_resume(out, job)
    created = _make(out)
    with _locked(partial), _kept_or_removed(partial, created):
        for file in partial.iterdir():
            if file.name != LOCK and (not resumed or file.name.startswith(".")):  # dots: half-written by a killed run
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        if not resumed:
            write_json(partial / JOB, dict(job))
        (partial / RUN).mkdir(exist_ok=True)
        yield partial
        _publish(partial, out, force)


def _make(out: Path) -> list[Path]:
    """Make the directory of the work; the parents that were made for it, the innermost first."""
    created = [parent for parent in out.parents if not parent.exists()]
    try:
        partial_of(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be created ({error.strerror})") from None
    return created


@contextlib.contextmanager
def _kept_or_removed(partial: Path, created: Sequence[Path], alone: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """A full disk keeps the directory of the work; bad input or Ctrl-C removes it, with the parents ``created`` for it, if
    nobody else is at work there."""
    try:
        yield
    except SourceError as error:
        raise SourceError(f"{error}; what is done is kept in {partial}") from None
    except (WriteError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        said = error if isinstance(error, WriteError) else f"{partial}: cannot write ({error.strerror})"
        raise WriteError(f"{said}; what is done is kept in {partial}: make room and run the same command again") from None
    except (UserError, KeyboardInterrupt):
        if alone():
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # a parent that another program has filled meanwhile stays
                for parent in created:
                    parent.rmdir()
        raise


def _publish(partial: Path, out: Path, force: bool) -> None:
    if out.exists() and not force:
        raise UserError(f"{out}: appeared while this run was writing; use --force to replace it")
    (partial / JOB).unlink()  # first: a run that is killed from here on starts anew and misses nothing
    shutil.rmtree(partial / RUN)
    (partial / LOCK).unlink()
    if out.exists():
        out.rename(replaced_of(out))
    partial.rename(out)
    shutil.rmtree(replaced_of(out), ignore_errors=True)


@contextlib.contextmanager
def _held(path: Path, how: int, waiting: str = "") -> Iterator[bool]:
    """Hold the lock of a file as flock has it, or yield False; ``waiting`` is said, and then it is waited for. It dies with the
    process."""
    with path.open("a+") as file:  # a shared lock on a network's disk needs a file that can be read
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waiting:
                yield False
                return
            print(waiting, flush=True)
            fcntl.flock(file, how)
        yield True


def share(
    out: Path, job: Mapping[str, Any], names: Sequence[str], make: Callable[[Path], None], finish: Callable[[Path], None]
) -> None:
    """Make the output ``out`` of the files ``names`` with every process that is called with the same ``job``, on any machine
    that sees the disk: each takes a file that is missing and that nobody is at, and ``make(path)`` writes it at once. Who ends
    last calls ``finish(partial)`` and gives the output its name; the others wait for that. A process that dies leaves its file
    to them."""
    partial, created = partial_of(out), _make(out)
    lock = partial / LOCK

    def alone() -> bool:
        with _held(lock, fcntl.LOCK_EX) as got:
            return got

    with _held(partial / f".{JOB}.lock", fcntl.LOCK_EX, f"{partial}: another process begins"):
        if not same_job(out, job):
            write_json(partial / JOB, dict(job))
    try:
        with _kept_or_removed(partial, created, alone):
            while not out.exists():
                with _held(lock, fcntl.LOCK_SH, f"{partial}: another process ends"):
                    for name in names:
                        with _held(partial / f".{name}.lock", fcntl.LOCK_EX) as mine:
                            if mine and not (partial / name).exists():
                                make(partial / name)
                with _held(lock, fcntl.LOCK_EX, f"{partial}: waiting for the files that other processes are at"):
                    if not out.exists() and all((partial / name).exists() for name in names):
                        finish(partial)
                        for file in partial.glob(".*"):  # locks, and what a killed process has half written
                            file.unlink()
                        partial.rename(out)
                        for name in (JOB, LOCK):
                            (out / name).unlink()
    except FileNotFoundError:  # between two looks the directory has taken its name
        if not out.exists():
            raise
    shutil.rmtree(partial, ignore_errors=True)  # made again by a process that came late
