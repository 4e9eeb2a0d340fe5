"""Run a model-written program against asserts where it can do no harm and cannot fake a pass.

Not a command. `run_python("def f(x): return x + 1", ["assert f(1) == 2"]).passed`. The child side, with what it allows
and why a pass cannot be forged, is sandbox_child.py. A program is killed with its whole process group. Programs and
tests have the standard library only. Linux only, and where kernel or container forbid seccomp nothing runs, unless
CODE_SANDBOX_UNCONFINED=1 says that the machine may be written to and left with processes.
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
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import sandbox_child
from console import UserError, progress
from sandbox_child import frame

CHILD = Path(sandbox_child.__file__)
START_SECONDS = 5.0  # an interpreter on a busy machine; not part of the program's time
UNCONFINED = "CODE_SANDBOX_UNCONFINED"
T = TypeVar("T")
Job = tuple[str, Sequence[str]] | tuple[str, Sequence[str], str]


@dataclass(frozen=True)
class Verdict:
    """``reason``: passed, failed (an assert), error, memory, timeout or killed; ``detail`` is one line about it."""

    passed: bool
    reason: str
    detail: str
    seconds: float


def _exchange(child: subprocess.Popen, request: bytes, verdict: int, deadline: float) -> bytes:
    """Send the job and read the verdict pipe to its end, both without blocking, until the deadline."""
    assert child.stdin is not None
    stdin, received, view = child.stdin.fileno(), b"", memoryview(request)
    os.set_blocking(stdin, False)
    poll = select.poll()  # not select: an inference process may have more than 1024 open files
    poll.register(verdict, select.POLLIN)
    poll.register(stdin, select.POLLOUT)
    while (left := deadline - time.monotonic()) > 0:
        ready = dict(poll.poll(left * 1000))
        if stdin in ready:
            with contextlib.suppress(BrokenPipeError):  # the verdict pipe then ends too
                view = view[os.write(stdin, view) :]
            if not view or ready[stdin] & select.POLLERR:
                poll.unregister(stdin)
        if verdict in ready:
            part = os.read(verdict, 1 << 16)
            if not part:
                return received
            received += part
    raise TimeoutError


def _kill_group(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _parse(received: bytes, token: str, seconds: float) -> Verdict:
    """Only a whole frame that carries the token counts; anything else means that the referee itself died."""
    try:
        reply = json.loads(received[10:]) if int(received[:10]) == len(received) - 10 else None
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or reply.get("token") != token:
        return Verdict(False, "killed", "the tests' process ended without a verdict", seconds)
    if reply["jail"] and not os.environ.get(UNCONFINED):
        raise UserError(f"the code sandbox is not safe here: {reply['jail']}; allow seccomp, or set {UNCONFINED}=1")
    if reply["jail"]:
        warnings.warn(f"programs run without a jail: {reply['jail']}", RuntimeWarning, stacklevel=3)
    return Verdict(reply["reason"] == "passed", reply["reason"], reply["detail"], seconds)


def run_python(
    program: str,
    tests: str | Sequence[str],
    timeout_s: float = 10.0,
    memory_mib: int = 512,
    entry_point: str = "",
    test_timeout_s: float | None = None,
) -> Verdict:
    """Run ``program``, then the ``tests`` (assert statements), in a jailed child. ``entry_point`` names the function
    asked for, if it shadows a builtin. Limits: ``timeout_s`` of wall clock for all, ``test_timeout_s`` for the program's
    start and for each test, ``memory_mib`` of address space."""
    if sys.platform != "linux":
        raise UserError("the code sandbox needs Linux; grade this benchmark there")
    token, started = secrets.token_hex(16), time.monotonic()
    limits = {
        "seconds": timeout_s,
        "test_seconds": test_timeout_s,
        "cpu_seconds": int(timeout_s) + 2,
        "memory_mib": memory_mib,
        "unconfined": bool(os.environ.get(UNCONFINED)),
    }
    tests = [tests] if isinstance(tests, str) else list(tests)
    job = {"program": program, "tests": tests, "entry_point": entry_point, "token": token}
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as empty, open(reader, "rb"):
        try:
            child = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", str(CHILD), str(writer)],  # -I would ignore the hash seed
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=empty,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0"},  # one verdict every time
                pass_fds=(writer,), start_new_session=True, bufsize=0,
            )  # fmt: skip
        finally:
            os.close(writer)
        try:
            received = _exchange(child, frame(limits) + frame(job), reader, started + START_SECONDS + timeout_s)
        except TimeoutError:  # the referee keeps the time itself; only a test that never comes back to it ends here
            return Verdict(False, "timeout", f"{timeout_s:g} s", time.monotonic() - started)
        finally:
            _kill_group(child)
            child.stdin.close()
    return _parse(received, token, time.monotonic() - started)


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
