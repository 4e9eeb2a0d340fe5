"""Hostile and honest programs in the sandbox: only right values pass, nothing is written, nothing stays alive."""

import contextlib
import time
from pathlib import Path

import pytest

from code_sandbox import run_many, run_python

TESTS = ["assert f(1) == 2", "assert f(5) == 6"]
GOOD = "def f(x):\n    return x + 1\n"

HOSTILE = {
    "exit": "import sys\nsys.exit(0)",
    "os exit": "import os\nos._exit(0)",
    "exit inside": "def f(x):\n    raise SystemExit(0)",
    "print": "print('PASS', flush=True)\ndef f(x):\n    return None",
    "always equal": "class E:\n    def __eq__(s, o):\n        return True\ndef f(x):\n    return E()",
    "int subclass": "class E(int):\n    def __eq__(s, o):\n        return True\ndef f(x):\n    return E(9)",
    "patched errors": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x):\n    return 0",
    "reads frames": "import sys, gc\ndef f(x):\n    return [o for o in gc.get_objects() if 'assert' in str(type(o))] or 0",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "memory": "x = bytearray(10 << 30)\n" + GOOD,
    "kills parent": "import os\nos.kill(os.getppid(), 9)\n" + GOOD,
    "new session": "import os\nos.setsid()\n" + GOOD,
    "shell": "import os, subprocess\nsubprocess.Popen(['sleep', '777'])\n" + GOOD,
    "socket": "import socket\nsocket.socket()\n" + GOOD,
    "forged verdict": "import os\n[os.write(d, b'0000000002{}') for d in range(3, 60)]\n" + GOOD,
    "syntax": "def f(x) return x",
}


def survivors():
    """Processes that the program of "shell" would have left."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(file.read_bytes())
    return [line for line in lines if line == b"sleep\x00777\x00"]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_do_not_pass(name):
    assert not run_python(HOSTILE[name], TESTS, timeout_s=2).passed
    assert not survivors()


def test_writing_is_refused(tmp_path):
    target = tmp_path / "written"
    verdict = run_python(f"open({str(target)!r}, 'w').write('x')\n{GOOD}", TESTS)
    assert not verdict.passed and not target.exists()


@pytest.mark.parametrize("program", ["def f(x):\n    while True: pass", "def f(x):\n    while True: print('x' * 9999)"])
def test_endless_programs_time_out(program):
    started = time.monotonic()
    assert run_python(program, TESTS, timeout_s=1).reason == "timeout"
    assert time.monotonic() - started < 8


def test_honest_programs_pass():
    assert run_python(GOOD, TESTS).passed
    deep = "import sys\nsys.setrecursionlimit(9000)\ndef f(x, n=5000):\n    return f(x, n - 1) if n else x + 1"
    assert run_python(deep, TESTS).passed
    assert run_python("def sum(xs):\n    return 7", ["assert sum([1]) == 7"], entry_point="sum").passed
    assert run_python("def f(xs):\n    xs.append(4)", ["a = [1]\nf(a)\nassert a == [1, 4]"]).passed
    assert run_python("from math import *\ndef f(x):\n    return x", ["assert f(pow(2, 3, 5)) == 3"]).passed
    long = ["assert f(1) == 2  # " + "x" * 1000] * 300  # more than a command line can hold
    assert run_python(GOOD, long).passed


def test_many_keep_their_order():
    jobs = [(f"def f(x):\n    return {i}", ["assert f(0) == 3"], "f") for i in range(6)]
    verdicts = run_many(jobs)
    assert [v.passed for v in verdicts] == [i == 3 for i in range(6)]
    assert verdicts[0].reason == "failed" and "assert f(0) == 3" in verdicts[0].detail
