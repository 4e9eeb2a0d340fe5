"""Run a model-written program against asserts where it can do no harm and cannot fake a pass.

Not a command. `run_python("def f(x): return x + 1", ["assert f(1) == 2"]).passed`. The child side, with what it allows
and why a pass cannot be forged, is sandbox_child.py. Linux only. A program is killed with its whole process group.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from console import UserError, progress

CHILD = Path(__file__).with_name("sandbox_child.py")
MAX_VERDICT = 1 << 16  # bytes read from the verdict pipe
START_SECONDS = 5.0  # an interpreter on a busy machine; not part of the program's time


@dataclass(frozen=True)
class Verdict:
    """``reason``: passed, failed (an assert), error, memory, timeout or killed; ``detail`` is one line about it."""

    passed: bool
    reason: str
    detail: str
    seconds: float


def frame(value: object) -> bytes:
    data = json.dumps(value, separators=(",", ":")).encode()
    return b"%010d" % len(data) + data


def _exchange(child: subprocess.Popen, request: bytes, verdict: int, deadline: float) -> bytes:
    """Send the job and read the verdict pipe to its end, both without blocking, until the deadline."""
    assert child.stdin is not None
    stdin, received = child.stdin.fileno(), b""
    os.set_blocking(stdin, False)
    view = memoryview(request)
    while (left := deadline - time.monotonic()) > 0:
        readable, writable, _ = select.select([verdict], [stdin] if view else [], [], left)
        if writable:
            try:
                view = view[os.write(stdin, view) :]
            except BrokenPipeError:
                view = view[:0]
        if readable:
            part = os.read(verdict, 1 << 16)
            if not part or len(received) > MAX_VERDICT:
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
        reply = json.loads(received[10:]) if len(received) >= 10 and int(received[:10]) == len(received) - 10 else None
    except ValueError:
        reply = None
    if not isinstance(reply, dict) or reply.get("token") != token:
        return Verdict(False, "killed", "the tests' process ended without a verdict", seconds)
    return Verdict(reply["reason"] == "passed", reply["reason"], reply["detail"], seconds)


def run_python(
    program: str, tests: Sequence[str], timeout_s: float = 5.0, memory_mib: int = 512, entry_point: str = ""
) -> Verdict:
    """Run ``program``, then the ``tests`` (lines of asserts), in a jailed child. ``entry_point`` names the function
    asked for, if it shadows a builtin. Limits: ``timeout_s`` wall and CPU seconds, ``memory_mib`` of address space."""
    if sys.platform != "linux":
        raise UserError("the code sandbox needs Linux; grade this benchmark there")
    token, started = secrets.token_hex(16), time.monotonic()
    limits = {"cpu_seconds": max(1, round(timeout_s + 0.5)), "memory_mib": memory_mib}
    job = {"program": program, "tests": list(tests), "entry_point": entry_point, "token": token}
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory(prefix="sandbox-") as empty:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD), str(writer)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=empty,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}, pass_fds=(writer,), start_new_session=True,
        )  # fmt: skip
        os.close(writer)
        try:
            received = _exchange(child, frame(limits) + frame(job), reader, started + START_SECONDS + timeout_s)
        except TimeoutError:
            return Verdict(False, "timeout", f"{timeout_s:g} s", time.monotonic() - started)
        finally:
            _kill_group(child)
            os.close(reader)
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
    return _parse(received, token, time.monotonic() - started)


def run_many(
    jobs: Sequence[tuple[str, Sequence[str], str]], workers: int = 2, timeout_s: float = 5.0, memory_mib: int = 512
) -> list[Verdict]:
    """Verdicts of (program, tests, entry point), in order, ``workers`` at a time."""

    def one(job: tuple[str, Sequence[str], str]) -> Verdict:
        return run_python(job[0], job[1], timeout_s, memory_mib, job[2])

    with progress(len(jobs), "sandbox", "program") as bar, ThreadPoolExecutor(workers) as pool:
        verdicts = []
        for verdict in pool.map(one, jobs):
            verdicts.append(verdict)
            bar.update()
    return verdicts
