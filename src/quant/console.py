"""What every command line of the project shares: errors, progress bars, atomic writes, digests of files.

Not a command by itself. A module's last lines are

    if __name__ == "__main__":
        run_cli(main)

Exit codes: 0 done, 1 a check or a gate failed, 2 bad input (one line says what, where and how to mend it), 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import importlib
import io
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

HELP = {"-h", "--help"}
DIGESTS = min(16, os.cpu_count() or 1)  # files digested at once


class Lines(io.TextIOBase):
    """A stream in which what would overwrite its line begins a new one: a log holds lines, no carriage returns."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if shown := text.replace("\r", "").replace("\x1b[A", "").strip():  # tqdm moves up from a bar within a bar
            self.stream.write(shown + "\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (
    *FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EIO, errno.ENAMETOOLONG
)  # fmt: skip


class UserError(Exception):
    """Bad input or a machine that cannot do what was asked. Its text is one line: what, where, how to mend it."""


class WriteError(UserError):
    """A full disk, or one that cannot be written. What a run that can go on has made by then stays."""


class SourceError(UserError):
    """A source that cannot be read for now. What a run that can go on has made by then stays."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run ``main`` and turn what a user can mend into one line on stderr and an exit code. Bugs keep their traceback.
    ``--help`` ends with the module's docstring: its example, and what the options mean together."""
    if not os.path.exists("/dev/nvidiactl"):  # a CPU has no faster kernels that one could install
        logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    as_keys = any(option.startswith("--config") for option in sys.argv[1:])  # a pipeline's settings are variables
    try:
        code = main() or 0
        sys.stdout.flush()
    except SystemExit as end:  # argparse ends a process that it has helped
        if not end.code and not HELP.isdisjoint(sys.argv[1:]):
            print("\n" + main.__globals__["__doc__"].strip())
        raise
    except UserError as error:
        print(f"error: {str(error).replace('--force', 'FORCE=1') if as_keys else error}", file=sys.stderr)
        code = 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        what = ". ".join(str(error).split(". ")[:2])
        print(f"error: the GPU's memory ran out ({what}); end what else is on it, or take smaller batches", file=sys.stderr)
        code = 2
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        print(f"error: {error.filename or 'the output'}: cannot be written ({error.strerror})", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        code = 130
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    sys.exit(code)


@contextlib.contextmanager
def explained(where: str) -> Iterator[None]:
    """A :class:`UserError` inside begins with ``where``."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def run_script(script: str, *arguments: object) -> None:
    """Run one of the project's commands by its path in the repository; its failure, already explained, is this run's."""
    root = Path(__file__).resolve().parents[2]
    if code := subprocess.run([sys.executable, str(root / script), *map(str, arguments)]).returncode:
        sys.exit(code)


def run_inside(script: str, *arguments: object, processes: int = 1, **_: object) -> None:
    """The same in this process, which has imported torch already; printed first, its GPU memory is counted from here. Its
    failure is raised."""
    if processes != 1:
        raise UserError("the parts of a study run in one process each")
    print("+ " + shlex.join(["python", script, *map(str, arguments)]), flush=True)
    gc.collect()
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, sys.argv = sys.argv, [str(Path(__file__).resolve().parents[2] / script), *map(str, arguments)]
    try:
        importlib.import_module(Path(script).stem).main()
    finally:
        sys.argv = before


class Bar(tqdm):
    """A progress bar on stderr, drawn by the clock: 5 times a second on a terminal, else a line every 10 s. Where work comes in
    batches, one drawn at the first update of a batch would give a batch's time to one item. The rate is that of the whole run.
    ``delay``: seconds before it is drawn at all."""

    monitor_interval = 0  # tqdm's own thread draws bars that are seldom updated

    def __init__(self, *args: Any, delay: float = 0.0, **more: Any) -> None:
        shown = sys.stderr.isatty()
        look: dict[str, Any] = (
            {"dynamic_ncols": True, "file": sys.stderr} if shown else {"ncols": 100, "file": Lines(sys.stderr)}
        )
        super().__init__(*args, **more | look, delay=delay, miniters=1, mininterval=1e9)
        self._ended, self._steps = threading.Event(), 0.2 if shown else 10.0
        threading.Thread(target=self._draw, args=(delay,), daemon=True).start()

    def _draw(self, delay: float) -> None:
        while not self._ended.wait(max(delay, self._steps)):
            delay, self.last_print_t = 0.0, time.time()
            self.refresh()

    def close(self) -> None:
        if not self.disable:
            self._ended.set()
        super().close()


def progress(total: float, desc: str, unit: str = "it", unit_scale: bool = False, done: float = 0, delay: float = 0.0) -> Bar:
    """A :class:`Bar` of ``total`` units of work (not of batches that differ in it), of which a resumed run has ``done``."""
    return Bar(total=total, desc=desc, unit=unit, unit_scale=unit_scale, initial=done, delay=delay)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` on success, remove it on any failure."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with writing(path):
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in FULL:
            raise WriteError(f"{path}: cannot write ({error.strerror})") from None
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, or one that cannot be written, is a :class:`WriteError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: cannot write ({error.strerror})") from None


def check_writable(path: Path) -> None:
    """Raise :class:`UserError` unless the file ``path`` could be written: said before the work, not after it."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; give the name of a file")
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be created, {ancestor} is not a directory that you can write to")


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder in $SCRATCH (made if missing; unset: in the system's temporary folder), then remove it."""
    scratch = os.environ.get("SCRATCH")
    if scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moe-lowbit-", dir=scratch or None) as folder:
        yield Path(folder)


def say(text: str) -> None:
    """A line beside what a command answers."""
    print(text, file=sys.stderr, flush=True)


def numbers(text: str) -> list[int]:
    """The type of an option that is a list, "1,2,4"; argparse turns a ValueError into its own message."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    with writing(Path(path)), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, without the byte-order mark that some editors put before it; what cannot be read as one is a
    :class:`UserError` that names it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is a :class:`UserError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # no JSON, or not UTF-8
        raise UserError(f"{path}: not valid JSON ({error})") from None


def read_object(path: str | Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has these keys; a file of another kind is a :class:`UserError` that names it."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    if missing := [key for key in keys if key not in value]:
        raise UserError(f"{path}: has no {missing[0]!r}; it is another file than its name says, or of another version")
    return value


def file_sha256(path: Path, advance: Callable[[int], Any] | None = None) -> str:
    """SHA-256 of a file; ``advance`` is told the bytes of each step."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 22))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
            if advance:
                advance(size)
    return digest.hexdigest()


def files_sha256(files: Sequence[Path]) -> str:
    """SHA-256 of what is stored in one file, as the hub shows it, or over the digests of several in order. One thread digests 1
    to 2 GB a second, so that several are read at once."""
    total = sum(file.stat().st_size for file in files)
    with progress(total, "sha256", "B", True, delay=2) as bar, ThreadPoolExecutor(DIGESTS, "digest") as pool:

        def advance(size: int) -> None:
            with bar.get_lock():
                bar.update(size)

        digests = list(pool.map(lambda file: file_sha256(file, advance), files))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
