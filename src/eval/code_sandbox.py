"""Run a model-written program against asserts where it can do no harm and cannot fake a pass.

Not a command. `run_python("def f(x): return x + 1", ["assert f(1) == 2"]).passed`; `run_script("print(input())", "a").output`.
The child side, with what it allows and why a pass cannot be forged, is sandbox_child.py. Each thread has a child that
forks for every program; it is killed with its whole process group. Programs and tests have the standard library only.
Linux only. Where kernel or container forbid seccomp nothing runs, unless CODE_SANDBOX_UNCONFINED=1 says that the machine
may be written to and left with processes; where they lack Landlock, programs open no file, and a warning says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sandbox_child
from console import UserError, progress
from sandbox_child import frame

CHILD = Path(sandbox_child.__file__)
START_SECONDS = 10.0  # an interpreter on a busy machine; not part of the program's time
UNCONFINED = "CODE_SANDBOX_UNCONFINED"
CLOSED = "this kernel has no Landlock: programs may open no file, so a few rarely used modules fail to import"
T = TypeVar("T")
_THREAD = threading.local()
Job = tuple[str, Sequence[str]] | tuple[str, Sequence[str], str]


@dataclass(frozen=True)
class Verdict:
    """``reason``: passed, failed (an assert), error, memory, timeout or killed; ``detail`` is one line about it."""

    passed: bool
    reason: str
    detail: str
    seconds: float
    output: str = ""  # of a script


class _Child:
    """One thread's interpreter that forks for every program; killed with all that it started when the thread ends (the
    kernel does the same: a parent's death signal is about the thread that made the child)."""

    def __init__(self) -> None:
        self.source, self.owner, empty = CHILD, os.getpid(), tempfile.TemporaryDirectory(prefix="sandbox-")
        self.process = subprocess.Popen(
            [sys.executable, "-s", "-S", "-P", "-B", str(CHILD), str(self.owner)],  # -I would ignore the hash seed
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=empty.name,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},  # one verdict every time
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        self.end = weakref.finalize(self, _end, self.process, empty, self.owner)

    def usable(self) -> bool:
        return self.source == CHILD and self.owner == os.getpid() and self.process.poll() is None


def _end(process: subprocess.Popen, folder: tempfile.TemporaryDirectory, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the grader
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    folder.cleanup()


def _exchange(child: subprocess.Popen, request: bytes, deadline: float) -> bytes:
    """Send the job and read one frame (or to the end), both without blocking, until the deadline."""
    assert child.stdin is not None and child.stdout is not None
    stdin, stdout, received, view = child.stdin.fileno(), child.stdout.fileno(), bytearray(), memoryview(request)
    os.set_blocking(stdin, False)
    poll = select.poll()  # not select: an inference process may have more than 1024 open files
    poll.register(stdout, select.POLLIN)
    poll.register(stdin, select.POLLOUT)
    while (left := deadline - time.monotonic()) > 0:
        ready = dict(poll.poll(left * 1000))
        if stdin in ready:
            with contextlib.suppress(BrokenPipeError):  # the other pipe then ends too
                view = view[os.write(stdin, view) :]
            if not view or ready[stdin] & select.POLLERR:
                poll.unregister(stdin)
        if stdout in ready:
            part = os.read(stdout, 1 << 16)
            received += part
            if not part or (len(received) >= 10 and len(received) >= 10 + int(received[:10])):
                return bytes(received)
    raise TimeoutError


def _parse(received: bytes, token: str, seconds: float) -> tuple[Verdict, bool]:
    """(verdict, whether the child may serve again). Only a whole frame that carries the token counts; anything else
    means that the referee itself died."""
    try:
        reply = json.loads(received[10:]) if int(received[:10]) == len(received) - 10 else None
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or reply.get("token") != token:
        return Verdict(False, "killed", "the tests' process ended without a verdict", seconds), False
    if reply["jail"] and not os.environ.get(UNCONFINED):
        raise UserError(f"the code sandbox is not safe here: {reply['jail']}; allow seccomp, or set {UNCONFINED}=1")
    if reply["jail"]:
        warnings.warn(f"programs run without a jail: {reply['jail']}", RuntimeWarning, stacklevel=4)
    elif not reply["opens"]:
        warnings.warn(CLOSED, RuntimeWarning, stacklevel=4)
    verdict = Verdict(reply["reason"] == "passed", reply["reason"], reply["detail"], seconds, reply.get("output", ""))
    return verdict, not reply["jail"]


def _run(job: dict[str, Any], timeout_s: float, test_timeout_s: float | None, memory_mib: int) -> Verdict:
    if sys.platform != "linux":
        raise UserError("the code sandbox needs Linux; grade this benchmark there")
    token, started = secrets.token_hex(16), time.monotonic()
    limits = {
        "seconds": timeout_s,
        "test_seconds": test_timeout_s,
        "cpu_seconds": int(timeout_s) + 2,
        "memory_mib": memory_mib,
        "unconfined": bool(os.environ.get(UNCONFINED)),
        "script": "stdin" in job,
    }
    child = getattr(_THREAD, "child", None)
    if child is None or not child.usable():
        child = _Child()
    _THREAD.child, again = None, False  # kept only if this run ends as it should
    try:
        request = frame(limits) + frame(job | {"token": token})
        received = _exchange(child.process, request, started + START_SECONDS + timeout_s)
        verdict, again = _parse(received, token, time.monotonic() - started)
        return verdict
    except TimeoutError:  # the referee keeps the time itself; only a test that never comes back to it ends here
        return Verdict(False, "timeout", f"{timeout_s:g} s", time.monotonic() - started)
    finally:
        if again:
            _THREAD.child = child
        else:
            child.end()


def run_python(
    program: str,
    tests: str | Sequence[str],
    timeout_s: float = 10.0,
    memory_mib: int = 512,
    entry_point: str = "",
    test_timeout_s: float | None = None,
    prelude: str = "",
) -> Verdict:
    """Run ``program`` (after ``prelude``), then the ``tests`` (assert statements), in a jailed child. ``entry_point`` names
    the function asked for, if it shadows a builtin. Limits: ``timeout_s`` of wall clock for all, ``test_timeout_s`` for the
    program's start and for each test, ``memory_mib`` of address space."""
    tests = [tests] if isinstance(tests, str) else list(tests)
    job = {"program": [prelude, program], "tests": tests, "entry_point": entry_point}
    return _run(job, timeout_s, test_timeout_s, memory_mib)


def run_script(program: str, stdin: str, timeout_s: float = 10.0, memory_mib: int = 512, prelude: str = "") -> Verdict:
    """Run ``program`` (after ``prelude``) as a script of a process of its own that reads ``stdin``. ``output`` is what it
    wrote; it passed if it ended by itself, by an exit or without an error."""
    return _run({"program": [prelude, program], "stdin": stdin}, timeout_s, None, memory_mib)


def run_many(
    jobs: Sequence[Job],
    workers: int = 2,
    timeout_s: float = 10.0,
    memory_mib: int = 512,
    test_timeout_s: float | None = None,
) -> list[Verdict]:
    """Verdicts of (program, tests) or (program, tests, entry point), in order, ``workers`` at a time."""

    def one(job: Job) -> Verdict:
        return run_python(job[0], job[1], timeout_s, memory_mib, *job[2:], test_timeout_s=test_timeout_s)

    return side_by_side(one, jobs, name="sandbox", unit="program", workers=workers)


def side_by_side(judge: Callable[..., T], *work: Sequence, name: str, unit: str, workers: int = 2) -> list[T]:
    """What ``judge`` says of the items of ``work``, in order, ``workers`` at a time, with a progress bar."""
    found = []
    with progress(len(work[0]), name, unit) as bar, ThreadPoolExecutor(workers) as pool:
        for verdict in pool.map(judge, *work):
            found.append(verdict)
            bar.update()
    return found
