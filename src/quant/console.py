"""What every command line of the project shares: errors, progress bars, atomic writes, digests of files.

Not a command by itself. A module's last lines are

    if __name__ == "__main__":
        run_cli(main)

Exit codes: 0 done, 1 a check or a gate failed, 2 bad input (one line says what, where and how to mend it), 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
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
        if shown := text.replace("\r", "").strip():
            self.stream.write(shown + "\n")
        return len(text)

    def flush(self) -> None:
        self.stream.flush()


class UserError(Exception):
    """Bad input or a machine that cannot do what was asked. Its text is one line: what, where, how to mend it."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run ``main`` and turn what a user can mend into one line on stderr and an exit code. Bugs keep their traceback.
    ``--help`` ends with the module's docstring: its example, and what the options mean together."""
    if not os.path.exists("/dev/nvidiactl"):  # a CPU has no faster kernels that one could install
        logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)
    try:
        code = main() or 0
    except SystemExit as end:  # argparse ends a process that it has helped
        if not end.code and not HELP.isdisjoint(sys.argv[1:]):
            print("\n" + main.__globals__["__doc__"].strip())
        raise
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        code = 130
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


def progress(total: int, desc: str, unit: str = "it", unit_scale: bool = False) -> tqdm:
    """A progress bar on stderr with rate and remaining time; a line every 10 s where stderr is not a terminal."""
    if sys.stderr.isatty():
        look: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.2, "file": sys.stderr}
    else:
        look = {"ncols": 100, "mininterval": 10.0, "maxinterval": 10.0, "miniters": 0, "file": Lines(sys.stderr)}
    return tqdm(total=total, desc=desc, unit=unit, unit_scale=unit_scale, **look)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` on success, remove it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk, or one that cannot be written, is a :class:`UserError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write ({error.strerror})") from None


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a new folder in $SCRATCH (made if missing; unset: in the system's temporary folder), then remove it."""
    scratch = os.environ.get("SCRATCH")
    if scratch:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="moe-lowbit-", dir=scratch or None) as folder:
        yield Path(folder)


def numbers(text: str) -> list[int]:
    """The type of an option that is a list, "1,2,4"; argparse turns a ValueError into its own message."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. NaN and infinity are refused: they are not JSON."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is a :class:`UserError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None


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
    with ThreadPoolExecutor(DIGESTS, "digest") as pool:
        digests = list(pool.map(file_sha256, files))
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
