"""The code sandbox: honest programs pass, forged passes do not, and nothing is left behind.

`pytest tests/test_code_sandbox.py`. Most cheats would pass in a runner that shares its process with them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import code_sandbox
from code_sandbox import CHILD, Verdict, run_many, run_python, run_script
from console import UserError
from tasks_code import LCB_PRELUDE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is Linux only")
TEST = "assert f(20) == 27 and f(3) == 10"  # what a cheat must get past without computing it


def run(program: str, tests: str | list[str] = TEST, **options: object) -> Verdict:
    return run_python(program, tests, **{"timeout_s": 5.0} | options)


def children(*graders: str) -> set[str]:
    """Live processes and zombies that a sandbox of this process (or of ``graders``) started, orphans among them; those of
    tests that run beside this one hang below another process."""
    parents, marked, me = {}, set(), str(os.getpid())
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                parents[entry.name] = (entry / "stat").read_text().rsplit(")", 1)[1].split()[1]
                if str(CHILD).encode() in (entry / "cmdline").read_bytes():
                    marked.add(entry.name)
        except OSError:  # gone meanwhile
            continue

    def ours(pid: str) -> bool:
        while pid in marked:
            pid = parents.get(pid, "1")
        return pid in ("1", me, *graders)

    return {pid for pid in marked if ours(pid)} | {pid for pid, parent in parents.items() if parent == me}


HONEST = {
    "plain": ("def f(x): return x + 7", TEST),
    "types": (
        "from fractions import Fraction\ndef f(x): return [(1, 2.5), {'a': {3}}, b'x', None, 2**5000, Fraction(x, 3)]",
        "from fractions import Fraction\nassert f(2) == [(1, 2.5), {'a': {3}}, b'x', None, 2**5000, Fraction(2, 3)]",
    ),
    "class": (
        "class S:\n    def __init__(self): self.n = 0\n    def add(self, k=1, *, op=2): self.n += k * op; return self",
        "s = S()\nassert s.add(2).add(op=5) is not None and s.n == 9",
    ),
    "in place": ("def f(a): a.sort(); a[0] = [a[0]]", "x = [3, 1, 2]\nassert f(x) is None\nassert x == [[1], 2, 3]"),
    "generator": ("def f(n): yield from range(n)", "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0"),
    "callback": ("def f(g, xs): return g and sorted(xs, key=g)", "assert f(lambda x: -x, [1, 3, 2]) == [3, 2, 1]"),
    "node of the tests": (
        "def f(n):\n    s = 0\n    while n: s += n.v; n.v = 0; n = n.next\n    return s",
        "class N:\n    def __init__(self, v, next): self.v, self.next = v, next\nn = N(1, N(2, None))\n"
        "assert f(n) == 3 and n.v == 0",
    ),
    "builtin types": (
        "def f(xs, kind): return [x for x in xs if isinstance(x, kind)]\ndef g(x): return type(x)",
        "assert f((4, 'a', 2.5), str) == ['a'] and g(1) is int and g('') == str and g(1) != str",
    ),
    "raises": (
        "def f(x): raise ValueError('no')",
        "try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert 'no' in str(e)",
    ),
    "tests that print": ("def f(x): return x + 7", "print('0000000001' * 10**6)\n" + TEST),
    "check(candidate)": ("def f(x): return x + 7", "def check(candidate):\n    assert candidate(20) == 27\ncheck(f)"),
    "math pow": (
        "from math import *\nfrom builtins import pow\ndef f(a, b, m): return pow(a, b, m) + floor(sqrt(4))",
        "assert f(3, 4, 5) == pow(3, 4, 5) + 2",
    ),
    "math pow in the tests": ("from math import *\ndef f(x): return sqrt(x)", "assert f(pow(3, 4, 5)) == 1.0"),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**6)\ndef f(x): return 0 if x == 0 else 1 + f(x - 1)",
        "assert f(50_000) == 50_000",
    ),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor as P\n"
        "def f(n):\n    with P(4) as p: return sum(p.map(abs, range(n)))",
        "assert f(9) == 36",
    ),
    "asyncio": (
        "import asyncio\nasync def g(x): await asyncio.sleep(0.001); return x + 7\ndef f(x): return asyncio.run(g(x))",
        TEST,
    ),
    "much output": (
        "import os\nfor _ in range(300): print('x' * 10**5); os.write(2, b'y' * 10**5)\ndef f(x): return x + 7",
        TEST,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_program_passes(name: str) -> None:
    verdict = run(*HONEST[name])
    assert verdict.passed and verdict.reason == "passed", verdict


def test_entry_point_named_like_a_builtin() -> None:
    program = "def sum(xs): return 42"
    assert run(program, "assert sum([1]) == 42", entry_point="sum").passed
    assert not run(program, "assert sum([1]) == 42").passed  # else a program could replace what the tests count with
    assert run("def bisect(x): return x", "assert bisect(3) == 3").passed  # a module's name


def test_wrong_program_says_which_assert() -> None:
    verdict = run("def f(x): return x + 7", ["assert f(1) == 8", "y = 2\nassert f(y) == 10, 'two'"])
    assert (verdict.reason, verdict.detail) == ("failed", "test 1: assert f(y) == 10, 'two' two")
    assert run("def f(x) return").detail.startswith("SyntaxError")
    assert run("x = 1").detail.startswith("NameError")


ALWAYS_EQUAL = """
class E(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
class O:
    def __eq__(self, other): return True
def f(x): return {}
"""
READ_TESTS = """
import gc, os, re, sys
def everything():
    frame = sys._getframe()
    while frame:
        yield repr(frame.f_locals) + repr(frame.f_globals); frame = frame.f_back
    yield from (repr(o) for o in gc.get_objects() if type(o) in (str, list, dict, tuple, bytes))
    for name in ("cmdline", "environ", "maps", "fd/0"):
        try: yield open(f"/proc/{os.getppid()}/{name}", errors="replace").read()
        except OSError: pass
def f(x): return 10 if x == 3 else 27 if any(re.search(r"=[=] 27 and", text) for text in everything()) else 0
"""
READ_MEMORY = """
import os
def f(x):
    for pid in [p for p in os.listdir("/proc") if p.isdigit() and int(p) != os.getpid()]:
        try:
            open(f"/proc/{pid}/mem", "rb"); return x + 7
        except OSError: pass
"""
FORGED_FRAMES = """
import json, os
for _ in range(9):
    for reply in ({"value": True}, {"value": None}, {"token": "", "reason": "passed", "detail": "", "jail": ""}):
        text = json.dumps(reply).encode()
        for fd in range(20):
            try: os.write(fd, b"%010d" % len(text) + text)
            except OSError: pass
"""
ESCAPE_BY_CALLBACK = """
def f(g):
    for thing in ("", 0, [], {}, g):
        for name in ("__class__", "__init__", "__globals__", "__code__", "join", "append"):
            try:
                g._peer.ask("getattr", thing, name); return True
            except AttributeError: pass
    for op in ("run", "lookup"):
        try:
            g._peer.ask(op, "1"); return True
        except KeyError: pass
"""
REPLACED_HANDLER = """
import sys
def f(*x): return 1
frame = sys._getframe()
while frame:
    for thing in [*frame.f_locals.values()]:
        if hasattr(thing, "handlers"):
            thing.handlers["lookup"] = lambda names: dict.fromkeys([*names, "tuple", "abs"], f)
    frame = frame.f_back
"""
COUNTED = "assert tuple(abs(f(i)) for i in range(9)) == tuple(abs(i + 7) for i in range(9))"  # with builtins of the referee
CHEATS = {
    "handler replaced": (REPLACED_HANDLER, COUNTED),
    "reduce": (
        "class P(int):\n    def __reduce__(self): return (int, (27,))\n    __class__ = str\ndef f(x): return P(0)",
        TEST,
    ),
    "int text": (
        "class P(int):\n    def __repr__(self): return '27'\n    __str__ = __format__ = __index__ = __repr__\n"
        "def f(x): return P(10)",
        TEST,
    ),
    "json replaced": (
        "import json\njson.dumps = json.JSONEncoder.encode = lambda *a, **k: '{\"value\":true}'\ndef f(x): return 0",
        TEST,
    ),
    "class": (
        "class f:\n    def __new__(c, x): return object.__new__(c)\n    def __eq__(s, o): return True\n"
        "    def __bool__(s): return True\n    __class__ = int",
        TEST,
    ),
    "error in eq": (
        "class E:\n    def __eq__(s, o): raise AssertionError\ndef f(x): return E()",
        "import contextlib\nwith contextlib.suppress(TypeError):\n    assert f(1) == 2",
    ),
    "atexit and signals": (
        "import atexit, os, signal\natexit.register(os._exit, 0)\nfor s in range(1, 32):\n"
        "    try: signal.signal(s, lambda *a: os._exit(0))\n    except (OSError, ValueError): pass\ndef f(x): return 0",
        TEST,
    ),
    "thread that answers": (
        "import os, threading\ndef g():\n    while True: os.write(4, b'0000000014{\"value\":true}')\n"
        "threading.Thread(target=g, daemon=True).start()\ndef f(x): return 0",
        TEST,
    ),
    "sys.exit": ("import sys; sys.exit(0)", TEST),
    "os._exit": ("import os; os._exit(0)", TEST),
    "exit in the call": ("import os\ndef f(x): os._exit(0)", TEST),
    "SystemExit": ("def f(x): raise SystemExit(0)", TEST),
    "print": ("print('PASS'); print('passed'); print('1.000000')\ndef f(x): return 0", TEST),
    "AssertionError": (
        "import builtins\nbuiltins.AssertionError = Exception\nAssertionError = None\ndef f(x): pass",
        TEST,
    ),
    "builtins": (
        "import builtins\nbuiltins.set = set = lambda x: 1\nbuiltins.len = len = lambda x: 3\ndef f(x): return [0]",
        "assert set(f(1)) == set([1, 2, 3]) or len(f(1)) == 3",
    ),
    "module": (
        "class math:\n    isclose = lambda *a, **k: True\ndef f(x): return 0",
        "assert math.isclose(f(1), 0.5)",
    ),
    "always equal": (ALWAYS_EQUAL.format("O()"), TEST),
    "always equal int": (ALWAYS_EQUAL.format("E()"), TEST),
    "always equal in a list": (ALWAYS_EQUAL.format("[O(), E()]"), "assert f(1) == [1, 2]"),
    "StopIteration": ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == x + 7, [20, 3]))"),
    "no failure seen": ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept BaseException:\n    pass"),
    "tests in memory": (READ_TESTS, TEST),
    "memory of others": (READ_MEMORY, TEST),
    "forged frames": (FORGED_FRAMES + "def f(x): pass", TEST),
    "escape by callback": (ESCAPE_BY_CALLBACK, "assert f(lambda x: x)"),
    "kill the parent": ("import os\ndef f(x):\n    for p in (os.getppid(), 0, -1): os.kill(p, 9)", TEST),
}


# a program that has taken over its end of the line, and says what it likes
FORGER = """
import json, os
def say(value):
    data = json.dumps(value).encode(); data = b"%010d" % len(data) + data
    while data: data = data[os.write(4, data):]
def hear():
    size, data = int(os.read(3, 10)), b""
    while len(data) < size: data += os.read(3, size - len(data))
    return json.loads(data)
say({"value": None})
while True:
    say(LOOKUP if hear()["ask"] == "lookup" else ANSWER)
"""
NAMES = ["f", "tuple", "abs", "set", "all", "len"]
GIVEN = ["d", *([name, ["mine", number]] for number, name in enumerate(NAMES))]
FORGED_LOOKUPS = (
    {"value": GIVEN},
    {"value": [*GIVEN, ["__builtins__", ["mine", 9]]]},
    {"value": [*GIVEN, ["range", ["mine", 9]], ["__name__", "builtins"]]},
    {"value": GIVEN, "changed": [["l", *NAMES]]},  # the list of the names that are asked for
    {"value": {name: 1 for name in NAMES}},
    {"value": ["mine", 1]},
    {"value": ["l", *(["t", name, ["mine", number]] for number, name in enumerate(NAMES))]},
    {"value": ["d", ["f", ["mine", 0]], ["tuple", ["ty", "bool"]]]},
)
FORGED_ANSWERS = (
    *({"value": value} for value in (
        1, True, float("nan"), {"a": 1}, ["mine", 3], ["mine", [3]], ["yours", 0], ["yours", -1], ["yours", "f"],
        ["ty", "bool"], ["ty", "object"], ["x", "decimal.Decimal", "NaN"], ["x", "os.system", "true"], ["range", 0, 0, 0], [],
        ["l", ["mine", 1]],
    )),
    *({"raise": [[kind, "Exception"], ""]} for kind in ("StopIteration", "AssertionError", "KeyError", "eval", "Warning")),
    *({"raise": [[kind, "BaseException"], ""]} for kind in ("SystemExit", "GeneratorExit", "KeyboardInterrupt")),
    {"raise": []}, {"ask": "call", "args": [[["ty", "list"]], ["d"]]}, {"ask": "getattr", "args": [["", "join"], ["d"]]},
    {"ask": "run", "args": []}, {"value": 1, "changed": [27]}, {"reason": "passed", "token": ""}, {}, [], None,
)  # fmt: skip


def test_forged_answers_do_not_pass() -> None:
    """Every lookup with a harmless answer, and every answer with an honest lookup."""
    honest = {"value": ["d", ["f", ["mine", 0]]]}
    pairs = [(lookup, {"value": 1}) for lookup in FORGED_LOOKUPS] + [(honest, answer) for answer in FORGED_ANSWERS]
    jobs = [
        (f"nan = float('nan')\nLOOKUP = {lookup!r}\nANSWER = {answer!r}\n{FORGER}", test)
        for lookup, answer in pairs
        for test in (TEST, COUNTED)
    ]
    verdicts = run_many(jobs, timeout_s=2.0)
    assert not [(job[0][:300], job[1]) for job, verdict in zip(jobs, verdicts, strict=True) if verdict.passed]
    assert {verdict.reason for verdict in verdicts} <= {"failed", "error", "timeout"}


def test_data_is_out_of_reach(tmp_path: Path) -> None:
    """A program reads the standard library and no other file, by whatever call."""
    data = tmp_path / "humaneval.jsonl.gz"
    data.write_bytes(b"gold")
    installed = [Path(pytest.__file__), *Path(os.__file__).parent.glob("site-packages/*/__init__.py")][:2]
    hidden = [data, *installed, Path(__file__), CHILD, "/etc/passwd", "/proc/self/environ", f"/proc/{os.getpid()}/cmdline"]
    program = f"""
import ctypes, io, os, pathlib
libc = ctypes.CDLL(None)
def by_link(path):
    fd = os.open(path, os.O_PATH)
    return open(f"/proc/self/fd/{{fd}}", "rb").read(1)
def by_folder(path):
    fd = os.open(os.path.dirname(path), os.O_PATH)
    return os.read(os.open(os.path.basename(path), os.O_RDONLY, dir_fd=fd), 1)
def by_c(path):
    fd = libc.open(path.encode(), 0)
    if fd < 0: raise OSError
    return os.read(fd, 1)
def by_raw_call(path):
    fd = libc.syscall(257, -100, path.encode(), 0)
    if fd < 0: raise OSError
    return os.read(fd, 1)
def by_up(path): return open("/usr/share/zoneinfo/../../.." + path, "rb").read(1)
ways = (lambda p: open(p, "rb").read(1), lambda p: io.FileIO(p).read(1), by_link, by_folder, by_c, by_raw_call, by_up,
    lambda p: os.link(p, "/tmp/sandbox-link"), lambda p: os.symlink(p, "/tmp/sandbox-link"))
done = []
for path in {[*map(str, hidden)]!r}:
    for number, way in enumerate(ways):
        try: way(path); done.append((path, number))
        except OSError: pass
for folder in ("/", "/tmp", "/proc", "/root", {str(tmp_path)!r}):
    try: os.listdir(folder); done.append(folder)
    except OSError: pass
can = pathlib.Path(os.__file__).read_text() != "" and open("/dev/null").read() == ""
"""
    verdict = run(program, "assert done == [], done\nassert can")
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", CHEATS)
def test_cheat_does_not_pass(name: str) -> None:
    verdict = run(*CHEATS[name])
    assert not verdict.passed and verdict.reason in ("failed", "error"), verdict


def test_a_jailed_worker_keeps_its_memory_to_itself() -> None:
    worker = subprocess.Popen([sys.executable, CHILD.with_name("math_answers.py"), "2048"], stdin=-1, stdout=-1)
    try:
        assert b"ready" in worker.stdout.read(17)  # it is in its jail now: a frame of ten digits and the word in quotes
        verdict = run(READ_MEMORY)
        assert not verdict.passed and verdict.reason in ("failed", "error"), verdict
    finally:
        worker.stdin.close()
        worker.wait(timeout=10)


def test_limits() -> None:
    bomb = "import os, sys\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    endless = (
        bomb,
        "while True: pass",
        "import os\nwhile True: os.write(1, b'x' * 65536)",
        "import signal\nsignal.signal(14, signal.SIG_IGN)\nwhile True: pass",
    )
    started = time.monotonic()
    verdicts = run_many([(program, TEST) for program in endless], timeout_s=1.0)
    assert [verdict.reason for verdict in verdicts] == ["timeout"] * len(endless)
    assert time.monotonic() - started < 20
    fatal = {  # with the usual time, since a slow machine takes long to touch the pages
        "x = bytearray(10 << 30)": "memory",
        "x = []\nwhile True: x.append(bytearray(50 << 20))": "memory",
        "import sys\nsys.setrecursionlimit(10**9)\ndef g(): exec(c)\nc = compile('g()', '', 'exec')\ng()": "killed",
        "import os\nos.abort()": "killed",
    }
    verdicts = run_many([(program, TEST) for program in fatal])
    assert [verdict.reason for verdict in verdicts] == list(fatal.values())
    slow_test = run("def f(x): return x", "x = f(9) ** 9 ** 9 ** 9", timeout_s=0.5)  # in C, deaf to the referee's alarm
    assert slow_test.reason in ("timeout", "memory")
    huge = run("def f(x): return ' ' * (17 << 20)")
    assert huge.reason == "error" and "limit" in huge.detail


FORBIDDEN = {
    "write": "open('out', 'w')",
    "append": "open('/tmp/sandbox-escape', 'a')",
    "create": "os.open('/tmp/sandbox-escape', os.O_CREAT)",
    "unlink": "os.unlink(MARK)",
    "rename": "os.rename(MARK, MARK + '2')",
    "chmod": "os.chmod(MARK, 0)",
    "mkdir": "os.mkdir('/tmp/sandbox-escape')",
    "socket": "socket.socket()",
    "datagram pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "fork": "os.fork()",
    "spawn": "subprocess.run(['/bin/true'], check=True)",
    "exec": "os.execv('/bin/true', ['true'])",
    "setsid": "os.setsid()",
    "setpgid": "os.setpgid(0, 0)",
    "kill": "os.kill(os.getppid(), 9)",
    "kill by owner": "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())",
    "kill by raw call": "check(libc.syscall(62, os.getppid(), 9))",
    "ptrace": "check(libc.ptrace(16, os.getppid(), 0, 0))",
    "raise limits": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
}


def test_jail_forbids(tmp_path: Path) -> None:
    """One program tries everything; each thing must raise, and the marked file must be as it was."""
    mark = tmp_path / "mark"
    mark.write_text("kept")
    program = f"""
import os, socket, subprocess, fcntl, resource, ctypes
MARK = {str(mark)!r}
libc = ctypes.CDLL(None)
def check(result):
    if result == -1: raise OSError
done = []
for name, act in {FORBIDDEN!r}.items():
    try:
        exec(act); done.append(name)
    except (OSError, ValueError): pass
"""
    verdict = run(program, "assert done == [], done")
    assert verdict.passed, verdict
    assert mark.read_text() == "kept" and not os.path.exists("/tmp/sandbox-escape")


def test_nothing_is_left_alive() -> None:
    before = children()
    daemon = """
import os, threading, time
for start in (os.fork, os.setsid, lambda: os.posix_spawn("/bin/sleep", ["sleep", "98.7654"], {})):
    try: start()
    except OSError: pass
threading.Thread(target=time.sleep, args=(99,)).start()
def f(x):
    if x == 0: time.sleep(99)
    return x + 7
"""
    verdicts = run_many([(daemon, TEST), (daemon, "f(0)"), ("import os\nos.close(4)\nwhile 1: pass", TEST)], timeout_s=1.0)
    assert [verdict.reason for verdict in verdicts] == ["passed", "timeout", "error"]
    deadline = time.monotonic() + 10  # on a busy machine the kernel takes a while to end what was killed
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert children() - before == set()
    assert subprocess.run(["pgrep", "-f", "sleep 98.7654"], capture_output=True).stdout == b""


def test_grader_killed_takes_its_programs_along(tmp_path: Path) -> None:
    before = children()
    code = "from code_sandbox import run_python; run_python('while True: pass', '', timeout_s=60)"
    grader = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(tmp_path)})
    deadline = time.monotonic() + 10
    while len(children(str(grader.pid)) - before - {str(grader.pid)}) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    grader.kill()
    grader.wait()
    while children() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children() - before


def test_long_tests_and_programs_in_order() -> None:
    """More than a command line or a pipe holds, and answers in the order of the jobs."""
    tests = [f"assert f({i}) == {i + 7}  # {'x' * 300}" for i in range(1000)]
    assert sum(map(len, tests)) > 300 << 10
    program = "def f(x): return x + 7\n" + "# padding\n" * 40_000
    verdicts = run_many([(program, tests), ("def f(x): return 0", tests), (program, tests, "f")])
    assert [verdict.passed for verdict in verdicts] == [True, False, True]


def test_same_verdict_every_time() -> None:
    program = "def f(): return list({'a', 'b', 'c', 'd'})[0] + repr(hash('x'))"
    details = {run(program, "assert f() == '', f()").detail for _ in range(3)}
    assert len(details) == 1


def test_fast_enough() -> None:
    """At least half as many programs a second as bare interpreters run, on as many workers."""
    from speed_eval import program_rates  # it loads torch

    program = ("from typing import List\ndef f(x): return x + 7", [TEST])
    rates = program_rates([program] * 30, workers=2)
    assert rates["passed"] == rates["bare_passed"] == 30 and rates["per_s"] > rates["bare_per_s"] / 2, rates


FAST_IO = """
import os, sys
from io import BytesIO, IOBase
class Fast(IOBase):
    newlines = 0
    def __init__(self, file):
        self.number, self.buffer = file.fileno(), BytesIO()
        self.writes = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writes else None
    def readline(self):
        while not self.newlines:
            part = os.read(self.number, max(os.fstat(self.number).st_size, 8192))
            self.newlines = part.count(b"\\n") + (not part)
            place = self.buffer.tell(); self.buffer.seek(0, 2); self.buffer.write(part); self.buffer.seek(place)
        self.newlines -= 1
        return self.buffer.readline()
    def flush(self):
        if self.writes: os.write(self.number, self.buffer.getvalue()); self.buffer.truncate(0); self.buffer.seek(0)
class Text(IOBase):
    def __init__(self, file):
        self.buffer = Fast(file); self.flush, self.writable = self.buffer.flush, self.buffer.writes
        self.write = lambda s: self.buffer.write(s.encode()); self.readline = lambda: self.buffer.readline().decode()
sys.stdin, sys.stdout = Text(sys.stdin), Text(sys.stdout)
input = lambda: sys.stdin.readline().rstrip()
a, b = map(int, input().split()); c = int(input()); print(a + b + c)
"""
TOTAL, PIPED = (f"sum(map(int, {file}.read().split()))" for file in ("open(0)", "sys.stdin"))
ADDS = {  # scripts that add three numbers on two lines, by the ways in which scripts read, write and end
    "input": "a, b = map(int, input().split()); c = int(input())\nprint(a + b + c)",
    "quit": "print(sum(int(x) for x in open(0).read().split())); quit(); print(1)",
    "exit": "print(TOTAL)\nif True: exit(0)\nprint(1)",
    "exit 1": "import sys\nprint(PIPED); sys.exit(1)",
    "raise SystemExit": "print(sum(map(int, __import__('sys').stdin.read().split())))\nraise SystemExit('done')",
    "os._exit": "import os, sys\nprint(PIPED, flush=True); os._exit(0)",
    "fast io": FAST_IO,
    "atexit": "import atexit, io, sys\nout = io.StringIO(); real = sys.stdout; sys.stdout = out\n"
    "atexit.register(lambda: real.write(out.getvalue()))\nprint(PIPED)",
    "fileinput": "import fileinput\nprint(sum(int(x) for line in fileinput.input() for x in line.split()))",
    "argv": "import sys\nassert len(sys.argv) == 1\nprint(PIPED)",
    "main": "import sys\ndef main(): print(PIPED)\nif __name__ == '__main__': main()",
    "main module": "import __main__\nx = TOTAL\nprint(__main__.x)",
    "thread": "import threading\nthreading.Thread(target=lambda: print(TOTAL)).start()",
    "slow thread": "import threading, time\ndef f(): time.sleep(.2); print(TOTAL)\n"
    "threading.Thread(target=f).start()",
    "deep thread": "import sys, threading\nsys.setrecursionlimit(10**6); threading.stack_size(1 << 26)\n"
    "def f(n): return n and 1 + f(n - 1)\n"
    "t = threading.Thread(target=lambda: print(f(20000) - 20000 + TOTAL))\nt.start(); t.join()",
    "pool": "from concurrent.futures import ThreadPoolExecutor as P\nwith P() as p: print(p.submit(lambda: TOTAL).result())",
    "mmap": "import mmap\nprint(sum(map(int, mmap.mmap(0, 0, access=mmap.ACCESS_READ).read().split())))",
    "__builtins__": "__builtins__.print(TOTAL) or __file__",
    "os.read": "import os\nos.write(1, str(sum(map(int, os.read(0, 10**6).split()))).encode())",
    "buffer": "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.read().split())))",
    "readlines": "from sys import stdin, stdout\nstdout.write(str(sum(int(x) for s in stdin.readlines() for x in s.split())))",
    "/dev/stdin": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "open(1)": "out = open(1, 'w')\nout.write(str(TOTAL))",
    "writelines": "import sys\nsys.stdout.writelines([str(TOTAL), '\\n']); sys.stdout.flush()",
    "file=": "import io, sys\nout = io.StringIO()\nprint(PIPED, file=out)\nprint(out.getvalue(), end='')",
    "past the end": "xs = []\ntry:\n    while True: xs += map(int, input().split())\nexcept EOFError: pass\nprint(sum(xs))",
    "iter": "print(sum(int(x) for line in iter(input, '') for x in line.split()))",
    "closed": "import sys\nprint(PIPED); sys.stdin.close(); sys.stdout.flush(); sys.stdout.close()",
    "reassigned": "import sys\ninput = sys.stdin.readline\nprint = sys.stdout.write\na, b = map(int, input().split())\n"
    "print(f'{a + b + int(input())}\\n')",
    "names of the imports":
    "from sys import stdin\nprint(reduce(add, map(int, stdin.read().split())), ceil(.5) - 1 or '')",
    "import *": "from math import *\nfrom collections import *\nprint(Counter(a=TOTAL)['a'])",
    "future": "from __future__ import annotations\ndef f(x: Undefined): return x\nprint(f(TOTAL))",
    "dataclass": "from dataclasses import dataclass\n@dataclass(order=True)\nclass A: x: int\nprint(A(TOTAL).x)",
    "pickle": "import pickle\nclass A: pass\na = A(); a.x = TOTAL\nprint(pickle.loads(pickle.dumps(a)).x)",
    "asyncio": "import asyncio, sys\nasync def f(): print(PIPED)\nasyncio.run(f())",
    "stderr": "import sys\nsys.stderr.write('x' * 10**6)\nprint(PIPED)",
    "locals": "a, b = map(int, input().split())\nc = int(input())\nprint(eval('a + b + c'), locals()['a'] - a or '')",
    "signal": "import signal\nsignal.alarm and print(TOTAL)",
}  # fmt: skip
FAILS = {  # what fails as a script: reason
    "error after": ("print(6)\nraise ValueError", "error"),
    "syntax": ("print(6", "error"),
    "no input left": ("print(6)\ninput(); input(); input()", "error"),
    "exit code": ("import os\nprint(6, flush=True)\nos._exit(3)", "error"),
    "signal": ("import os\nprint(6, flush=True)\nos.abort()", "killed"),
    "for ever": ("print(6, flush=True)\nwhile True: pass", "timeout"),
    "thread for ever": ("import threading, time\nprint(6)\nthreading.Thread(target=time.sleep, args=(99,)).start()", "timeout"),
    "output": ("while True: print('x' * 10**6)", "error"),
    "memory": ("x = bytearray(10 << 30)", "error"),
    "fork": ("import os\nprint(6)\nos.fork()", "error"),
    "file": ("print(6)\nopen('/etc/passwd')", "error"),
}


@pytest.mark.parametrize("prelude", ["", LCB_PRELUDE], ids=["bare", "lcb"])
def test_scripts_run_as_scripts(prelude: str) -> None:
    names = [name for name in ADDS if prelude or name != "names of the imports"]
    programs = [ADDS[name].replace("TOTAL", TOTAL).replace("PIPED", PIPED) for name in names]
    runs = [run_script(program, "1 2\n3\n\n", timeout_s=10.0, prelude=prelude) for program in programs]
    wrong = [(name, run) for name, run in zip(names, runs, strict=True) if not run.passed or run.output.strip() != "6"]
    assert not wrong
    failed = {
        name: run_script(program, "1 2\n3", timeout_s=1.0, prelude=prelude).reason for name, (program, _) in FAILS.items()
    }
    assert failed == {name: reason for name, (_, reason) in FAILS.items()}


def test_large_input_and_output_of_a_script() -> None:
    text = "x\u00e9" * 1_000_000
    assert run_script("print(input()[::-1])", text).output == text[::-1] + "\n"
    assert run_script("print(1)", text).output == "1\n"  # not read at all
    assert run_script("import os\nos.close(0); print(1)", text).output == "1\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_ordinary_user(tmp_path: Path) -> None:
    """The same as nobody, with a copy of the two files, where that user can reach an interpreter."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    as_nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    version = "import sys; assert sys.version_info >= (3, 11)"
    if not python or subprocess.run([python, "-c", version], cwd="/", capture_output=True, **as_nobody).returncode:
        pytest.skip("no Python 3.11 that another user may run")
    (tmp_path / "console.py").write_text("class UserError(Exception): pass\nprogress = None\n")  # tqdm is not needed
    script = f"""
from code_sandbox import run_python
forged = {FORGED_FRAMES!r} + "def f(x): pass"
for program in ("def f(x): return x + 7", {READ_MEMORY!r}, forged, "import os; os.fork()"):
    print(run_python(program, {TEST!r}).reason)
"""
    with tempfile.TemporaryDirectory() as folder:  # not below tmp_path, which is root's alone
        for source in (CHILD, CHILD.with_name("code_sandbox.py"), tmp_path / "console.py"):
            shutil.copy(source, folder)
        for path in (Path(folder), *Path(folder).iterdir()):
            path.chmod(0o755)
        command = [python, "-c", script]
        environment = {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, **as_nobody)
    assert done.stdout.split() == ["passed", "error", "error", "error"], done.stderr


def test_without_landlock_no_file_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that makes a call of no kernel stands for a kernel without Landlock."""
    child = tmp_path / "sandbox_child.py"
    child.write_text(CHILD.read_text().replace("LANDLOCK_RESTRICT = 444", "LANDLOCK_RESTRICT = 9444"))
    monkeypatch.setattr(code_sandbox, "CHILD", child)
    with pytest.warns(RuntimeWarning, match="no Landlock"):
        assert run("import dataclasses, decimal, hashlib\ndef f(x): return x + 7").passed
    for way in ("open('/dev/null')", "import os; os.open('/dev/null', 0)", "import os; os.listdir('/')"):
        with pytest.warns(RuntimeWarning, match="no Landlock"):
            assert "PermissionError" in run(way).detail


def test_without_seccomp_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A child for an unknown machine stands for a kernel without seccomp."""
    child = tmp_path / "sandbox_child.py"
    child.write_text(CHILD.read_text().replace("machine = os.uname().machine", "machine = 'abacus'"))
    monkeypatch.setattr(code_sandbox, "CHILD", child)
    with pytest.raises(UserError, match="seccomp"):
        run("def f(x): return x + 7")
    monkeypatch.setenv(code_sandbox.UNCONFINED, "1")
    with pytest.warns(RuntimeWarning, match="without a jail"):
        assert run("def f(x): return x + 7").passed
