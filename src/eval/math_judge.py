"""Compare many mathematical answers with a time limit for each: `judge_math([("0.5", r"\\frac{1}{2}")]) == [True]`.

Not a command. The comparisons run in worker processes (math_worker); one that does not answer in time is killed and
replaced, and its answer is wrong. So `2^{2^{2^{2^{10}}}}` costs its limit and nothing else.
"""

from __future__ import annotations

import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from console import UserError, progress
from sandbox_child import read_frame, write_frame

WORKER = Path(__file__).with_name("math_worker.py")
START_SECONDS = 60.0  # sympy loads in about a second; on a busy machine in ten


class MathWorker:
    """One worker process. ``equal`` returns within ``seconds`` (plus a restart after a comparison that took longer)."""

    def __init__(self, seconds: float, memory_mib: int) -> None:
        self.seconds, self.memory_mib = seconds, memory_mib
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(WORKER.parent)
        process = subprocess.Popen(
            [sys.executable, "-B", str(WORKER), str(self.memory_mib)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
            start_new_session=True, bufsize=0,
        )  # fmt: skip
        self.process = process
        if self.answer(START_SECONDS) != "ready":
            self.stop()
            raise UserError("math answers cannot be graded: math_worker.py does not start; pip install math-verify")
        return process

    def answer(self, seconds: float) -> object:
        """What the worker says next, or None when it says nothing in time or has died."""
        assert self.process and self.process.stdout
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        try:
            return read_frame(self.process.stdout.fileno(), 1 << 16)
        except EOFError:
            return None

    def equal(self, answer: str, gold: str) -> bool:
        process = self.process or self.start()
        assert process.stdin
        try:
            write_frame(process.stdin.fileno(), [answer, gold])
        except BrokenPipeError:
            reply = None
        else:
            reply = self.answer(self.seconds)
        if reply is None:
            self.stop()
        return reply is True

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream:
                    stream.close()
            self.process = None


def judge_math(
    pairs: Sequence[tuple[str | None, str]], workers: int = 2, seconds: float = 5.0, memory_mib: int = 2048
) -> list[bool]:
    """Verdicts of (answer, gold) pairs in order. An answer that is None is wrong."""
    idle: SimpleQueue[MathWorker] = SimpleQueue()
    crew = [MathWorker(seconds, memory_mib) for _ in range(min(workers, len(pairs)))]
    for worker in crew:
        idle.put(worker)

    def one(pair: tuple[str | None, str]) -> bool:
        answer, gold = pair
        if answer is None or not answer.strip():
            return False
        worker = idle.get()
        try:
            return worker.equal(answer, gold)
        finally:
            idle.put(worker)

    try:
        with ThreadPoolExecutor(max(1, len(crew))) as pool, progress(len(pairs), "math answers", "answer") as bar:
            verdicts = []
            for verdict in pool.map(one, pairs):
                verdicts.append(verdict)
                bar.update()
    finally:
        for worker in crew:
            worker.stop()
    return verdicts
