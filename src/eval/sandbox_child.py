"""The child side of code_sandbox: a referee that runs the tests, and a jailed program that only answers with values.

Not a command: code_sandbox starts it. One interpreter with its modules loaded serves a thread of the grader; for every
program it forks two processes, because whoever shares memory with the tests can forge a pass:

    referee  holds tests and token, runs the asserts, alone holds the verdict pipe
    program  forked before the tests arrive; jailed, then runs the model's code and answers calls as plain data

Where a test says ``f(2) == 5`` the referee sends ``call f (2)`` and compares the number that comes back. So exiting,
printing, patching builtins, always-equal objects and searching frames or memory gain nothing: the only way to pass is
to send right values. What is not plain data (generators, instances, functions) stays in the program: a :class:`Proxy`.
Only the names that the referee asked for reach the tests, and never a builtin or a standard module.

The other direction is as narrow: of what the tests hand over, the program may call functions, walk iterators and use
public attributes of instances of the tests' own classes. More (``f.__globals__``) would lead it to the token.

A script has no tests here: the referee gives it a standard input and sends what it wrote to the grader; the expected
output never leaves that.

The jail is a seccomp allow-list (compute, start threads, use open descriptors; no writing to any file, no network, no
child process, no signal to others, no leaving the process group) and Landlock: the program reads the standard library,
shared libraries and time zones, and no other file. On a kernel without Landlock it opens no file at all, and what it
may import is loaded before. Every start runs this file anew, so its own imports are few.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time

TYPE_CHECKING = False  # typing's own flag would cost its import, 4 ms, at every start
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

MAX_FRAME = 16 << 20  # bytes: no honest answer is larger, and the referee must not be filled by one
MAX_OUTPUT = 12 << 20  # bytes of a script
MAX_NESTING = 50  # callbacks inside callbacks
TESTS_MODULE = "tests"  # __name__ while the tests run, so also the __module__ of the classes that they define
STACK = 128 << 20  # bytes: deep recursion is honest
LINE = 3, 4  # the descriptors by which the program hears and answers the referee
TOP = 64  # above every descriptor of this process
# loaded before the first fork: what the referee needs and what programs import most
WARM = (
    "ast atexit bisect collections copy datetime decimal fractions functools hashlib heapq io itertools math operator "
    "random re site statistics string threading typing"
)
# where no program may open a file the whole standard library is loaded, but what opens windows or prints, and these parts
NOT_LOADED = {"antigravity", "idlelib", "lib2to3", "this", "tkinter", "turtle", "turtledemo"}
WARM_PARTS = "concurrent.futures.thread encodings.idna encodings.latin_1 encodings.utf_16 xml.etree.ElementTree"
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CLONE_NEWUSER, CLONE_THREAD = 0x10000000, 0x10000
SOCKET_KINDS = 0x0E  # bits of a socket type that SOCK_STREAM lacks: a datagram pair can send to any local socket
OWNER_COMMANDS = 0x08  # the bit of F_SETOWN, F_SETSIG and F_SETOWN_EX, which make the kernel signal other processes
FIONBIO = 0x5421
CAP_DAC_READ_SEARCH = 1 << 2  # kept for root: the interpreter may lie in another user's home
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every machine
READ_FILE, READ_DIR, EVERY_ACCESS = 1 << 2, 1 << 3, (1 << 13) - 1  # of the first version of Landlock
EACCES, ENOSYS = 13, 38  # EACCES and not EPERM: the interpreter itself falls back on it where it can

# What a program that only computes needs: name, number on x86_64, number on aarch64 (- where it has none).
ALLOWED = """
read 0 63, readv 19 65, pread64 17 67, write 1 64, writev 20 66, close 3 57, fstat 5 80, newfstatat 262 79, stat 4 -,
lstat 6 -, statx 332 291, lseek 8 62, getdents64 217 61, getcwd 79 17, access 21 -, faccessat 269 48,
faccessat2 439 439, readlink 89 -, readlinkat 267 78, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59,
fadvise64 221 223, mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, brk 12 214, madvise 28 233,
membarrier 324 283, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132,
restart_syscall 219 128, getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getrandom 318 278, uname 63 160, sysinfo 99 179, times 100 153, getrusage 98 165,
time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101,
sched_getaffinity 204 123, sched_yield 24 124, futex 202 98, set_robust_list 273 99, get_robust_list 274 100,
rseq 334 293, exit 60 93, exit_group 231 94, select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, eventfd2 290 19,
epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, sendto 44 206, recvfrom 45 207,
getrlimit 97 163
"""
ARCHITECTURES = {"x86_64": (1, 0xC000003E), "aarch64": (2, 0xC00000B7)}  # column in ALLOWED, audit number


# ---- frames and values ----


class ProgramEnded(BaseException):
    """The program cannot answer any more. Not an Exception: a test's ``except Exception`` must not hide it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_exactly(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(descriptor: int, limit: int = 1 << 62) -> Any:
    """One JSON value: ten digits of length, then that many bytes."""
    size = int(read_exactly(descriptor, 10))
    if not 0 <= size <= limit:
        raise ProgramEnded("error", f"the program sent a value of {size} bytes; the limit is {limit}")
    return json.loads(read_exactly(descriptor, size))


def frame(value: Any) -> bytes:
    """A JSON value as :func:`read_frame` reads it."""
    data = json.dumps(value, separators=(",", ":")).encode()
    return b"%010d" % len(data) + data


def write_frame(descriptor: int, value: Any) -> None:
    view = memoryview(frame(value))
    while view:
        view = view[os.write(descriptor, view) :]


STANDARD = {  # standard value types that tests compare with: how to write one as text and how to read it back
    "fractions.Fraction": str,
    "decimal.Decimal": str,
    "datetime.date": str,
    "datetime.datetime": lambda value: value.isoformat(),
}

TYPES = {kind.__name__: kind for kind in (int, float, bool, complex, str, bytes, list, tuple, dict, set, frozenset)}


def pack(value: Any, other: Callable[[Any], list]) -> Any:
    """``value`` as JSON: scalars as they are, the rest as [tag, ...]. Subclasses lose their overridden methods;
    what is not plain data goes to ``other``."""
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        value = int.__int__(value)
        return value if value.bit_length() < 1000 else ["i", hex(value)]  # decimal text has a length limit
    if isinstance(value, complex):
        return ["c", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["b" if isinstance(value, bytes) else "ba", value.hex()]
    for kind, tag in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "fs")):
        if isinstance(value, kind):
            return [tag, *(pack(item, other) for item in value)]
    if isinstance(value, dict):
        return ["d", *([pack(key, other), pack(item, other)] for key, item in value.items())]
    if type(value) is range:
        return ["range", value.start, value.stop, value.step]
    if type(value) is type and TYPES.get(value.__name__) is value:
        return ["ty", value.__name__]
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name == "collections.deque":
        return ["dq", *(pack(item, other) for item in value)]
    return ["x", name, STANDARD[name](value)] if name in STANDARD else other(value)


def unpack(item: Any, other: Callable[[list], Any]) -> Any:
    """The inverse of :func:`pack`; ``other`` reads the tags that only one side knows."""
    if item is None or isinstance(item, (bool, str, int, float)):
        return item
    if not isinstance(item, list):
        raise TypeError("not a packed value")
    tag, *rest = item
    containers = {"l": list, "t": tuple, "s": set, "fs": frozenset}
    if tag in containers:
        return containers[tag](unpack(part, other) for part in rest)
    if tag == "d":
        return {unpack(key, other): unpack(part, other) for key, part in rest}
    if tag in ("i", "c", "range"):
        return int(rest[0], 16) if tag == "i" else {"c": complex, "range": range}[tag](*rest)
    if tag in ("b", "ba"):
        return {"b": bytes, "ba": bytearray}[tag].fromhex(rest[0])
    if tag == "ty":
        return TYPES[rest[0]]
    if tag == "dq":
        return __import__("collections").deque(unpack(part, other) for part in rest)
    if tag == "x" and rest[0] in STANDARD:
        module, _, name = rest[0].partition(".")
        kind = getattr(__import__(module), name)
        return kind.fromisoformat(rest[1]) if module == "datetime" else kind(rest[1])
    return other(item)


# ---- calls between the two processes ----


class Peer:
    """One end of the line. Either side may ask: the program does when it calls a function that a test handed to it."""

    def __init__(self, reader: int, writer: int, handlers: dict[str, Callable], limit: int) -> None:
        self.reader, self.writer, self.handlers, self.limit = reader, writer, handlers, limit
        self.kept: list[Any] = []  # what the other side knows by number
        self.numbers: dict[int, int] = {}  # id -> number; kept objects live as long as this, so an id stays theirs
        self.depth = 0

    def give(self, value: Any) -> list:
        """What is not plain data crosses as the number by which its owner knows it."""
        if isinstance(value, Proxy):
            return ["yours", value._number]
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.kept)
            self.kept.append(value)
        return ["mine", self.numbers[id(value)]]

    def echo(self, value: Any) -> list:
        """:meth:`give` as the other side would have written it."""
        whose, number = self.give(value)
        return ["mine" if whose == "yours" else "yours", number]

    def take(self, item: list) -> Any:
        whose, number = item
        return self.kept[number] if whose == "yours" else Proxy(self, number)

    def ask(self, op: str, /, *args: Any, **kwargs: Any) -> Any:
        """Have the other side do ``op``. Arguments that it changed in place are changed here too."""
        packed = [pack([*args], self.give), pack(kwargs, self.give)]
        try:
            write_frame(self.writer, {"ask": op, "args": packed})
            reply = self.listen()
        except (EOFError, BrokenPipeError):
            raise ProgramEnded("ended", "") from None
        if "raise" in reply:
            error = rebuilt_error(*reply["raise"])
            if isinstance(error, StopIteration) and op != "next":  # it would end ``all(map(check, cases))`` with True
                raise RuntimeError("the function raised StopIteration")
            raise error
        if op == "call" and "changed" in reply:  # or a program would rewrite the list of names that it is asked for
            for old, new in zip(args, unpack(reply["changed"], self.take), strict=True):
                change_in_place(old, new)
        return unpack(reply["value"], self.take)

    def listen(self) -> dict:
        """Serve questions until a reply comes."""
        while True:
            message = read_frame(self.reader, self.limit)
            if "ask" not in message:
                return message
            self.depth += 1
            if self.depth > MAX_NESTING:
                raise ProgramEnded("error", f"more than {MAX_NESTING} callbacks inside callbacks")
            write_frame(self.writer, self.answer(message["ask"], *message["args"]))
            self.depth -= 1

    def answer(self, op: str, packed_args: list, packed_kwargs: list) -> dict:
        try:
            args = unpack(packed_args, self.take)
            value = self.handlers[op](*args, **unpack(packed_kwargs, self.take))
            reply = {"value": pack(value, self.give)}
            changed = op == "call" and pack(args, self.echo) != packed_args
            return reply | {"changed": pack(args, self.give)} if changed else reply
        except ProgramEnded:
            raise
        except BaseException as error:  # whatever the program raises, SystemExit too, is an answer and not an end
            return {"raise": [[kind.__name__ for kind in type(error).__mro__], short_text(error)]}


class Proxy:
    """Something that lives on the other side. Equal to itself only: comparison and arithmetic are not passed on, so
    that no object of the program can decide a test."""

    __slots__ = ("_peer", "_number")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proxy) and other._number == self._number

    def __hash__(self) -> int:
        return hash(self._number)


def forwarded(op: str) -> Callable:
    return lambda self, /, *args, **kwargs: self._peer.ask(op, self, *args, **kwargs)


def only_of_tests(function: Callable) -> Callable:
    """``getattr`` or ``setattr`` for the program's use on what the tests handed over."""

    def checked(target: Any, name: str, *value: Any) -> Any:
        if type(target).__module__ != TESTS_MODULE or name.startswith("_"):
            raise AttributeError(f"{name} of an object of the tests is out of reach")
        return function(target, name, *value)

    return checked


FORWARDED = {
    "call": lambda function, /, *args, **kwargs: function(*args, **kwargs),
    "getattr": getattr, "setattr": setattr, "getitem": lambda target, key: target[key],
    "len": len, "iter": iter, "next": next, "bool": bool, "str": str, "repr": repr,
}  # fmt: skip
FOR_PROGRAM = FORWARDED | {"getattr": only_of_tests(getattr), "setattr": only_of_tests(setattr)}
for _op in FORWARDED:
    setattr(Proxy, f"__{_op}__", forwarded(_op))


def change_in_place(old: Any, new: Any) -> None:
    if isinstance(old, (list, bytearray)) and type(old) is type(new):
        old[:] = new
    elif isinstance(old, (dict, set)) and type(old) is type(new):
        old.clear()
        old.update(new)


def short_text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # a hostile __str__
        return ""


def rebuilt_error(names: list[str], text: str) -> BaseException:
    """The nearest builtin exception, so that a test's ``except ValueError`` works; exits end the run."""
    for name in names:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception) and kind is not Exception:
            return kind.__new__(kind, text if name == names[0] else f"{names[0]}: {text}")
    if "Exception" in names:
        return Exception(f"{names[0]}: {text}")
    return ProgramEnded("error", f"the program raised {names[0]}")


# ---- the jailed program ----


def seccomp_filter(opens: bool) -> bytes | None:
    """The allow-list as classic BPF (8 bytes an instruction), or None on a machine whose call numbers are unknown.
    ``opens``: files may be opened, to read."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        return None
    column, audit = ARCHITECTURES[machine]
    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    allow, deny = 0x7FFF0000, 0x00050000
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (end, 0, 0, deny | EACCES), (load, 0, 0, 0)]
    for entry in ALLOWED.split(","):
        if (number := entry.split()[column]) != "-":
            code += [(equal, 0, 1, int(number)), (end, 0, 0, allow)]
    # allowed for some arguments: (numbers, argument, test, value, whether the test must hold)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    for numbers, argument, test, value, must_hold in (
        *(((2, -1), 1, any_bit, writing, False), ((257, 56), 2, any_bit, writing, False))[: 2 * opens],  # open, openat
        ((56, 220), 0, any_bit, CLONE_THREAD, True),  # clone, for a thread
        ((234, 131), 0, equal, os.getpid(), True),  # tgkill, at itself (abort)
        ((302, 261), 0, equal, 0, True),  # prlimit64, its own
        ((72, 25), 1, any_bit, OWNER_COMMANDS, False),  # fcntl
        ((53, 199), 1, any_bit, SOCKET_KINDS, False),  # socketpair, which asyncio needs
        ((16, 29), 1, equal, FIONBIO, True),  # ioctl, for the same
    ):
        if (number := numbers[column - 1]) >= 0:
            yes, no = (0, 1) if must_hold else (1, 0)
            code += [(load, 0, 0, 0), (equal, 0, 3, number), (load, 0, 0, 16 + 8 * argument), (test, yes, no, value)]
            code += [(end, 0, 0, allow)]
    # clone3 hides its flags behind a pointer: "no such call" makes the C library use clone instead
    code += [(load, 0, 0, 0), (equal, 0, 1, 435), (end, 0, 0, deny | ENOSYS), (end, 0, 0, deny | EACCES)]
    order = sys.byteorder
    return b"".join(op.to_bytes(2, order) + bytes((yes, no)) + k.to_bytes(4, order) for op, yes, no, k in code)


def drop_capabilities(libc: ctypes.CDLL) -> None:
    """Root keeps only the right to read; another user enters a user namespace of its own where the machine allows one.
    Either way the kernel then refuses it the memory of the processes outside."""
    if os.geteuid():
        libc.unshare(CLONE_NEWUSER)
        return
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    kept = sets[1] & CAP_DAC_READ_SEARCH
    sets[:] = [kept, kept, 0, 0, 0, 0]
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def readable() -> Iterator[str]:
    """What a program may read: the standard library, file by file without the packages that are installed into it (they
    may hold a benchmark), the shared libraries that it loads, time zones and harmless devices."""
    for root in sys.path:  # under -S that of the standard library only
        if os.path.isdir(root):
            yield from (item.path for item in os.scandir(root) if item.name not in ("site-packages", "dist-packages"))
    for root in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", f"{sys.base_prefix}/lib"):
        if os.path.isdir(root):
            yield from (item.path for item in os.scandir(root) if ".so" in item.name)
            yield f"{root}/{getattr(sys.implementation, '_multiarch', '-')}"
    yield from (
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/usr/share/zoneinfo",
        "/dev/null",
        "/dev/zero",
        "/dev/urandom",
        "/dev/random",
    )


def landlock_rules(libc: ctypes.CDLL) -> int:
    """A descriptor of Landlock's rules for :func:`readable`; -1 where the kernel has no Landlock."""

    def call(number: int, *arguments: Any) -> int:
        return libc.syscall(number, *(ctypes.c_long(a) if isinstance(a, int) else a for a in arguments))

    rules = call(LANDLOCK_CREATE, EVERY_ACCESS.to_bytes(8, sys.byteorder), 8, 0)
    listed = [(path, READ_DIR) for path in sys.path] if rules >= 0 else []
    for path, access in [*listed, *((path, READ_FILE | READ_DIR) for path in readable() if rules >= 0)]:
        with contextlib.suppress(OSError):  # it does not exist
            target = os.open(path, os.O_PATH)
            access &= READ_FILE | (READ_DIR if os.path.isdir(path) else 0)
            rule = access.to_bytes(8, sys.byteorder) + target.to_bytes(4, sys.byteorder)
            call(LANDLOCK_ADD, rules, 1, rule, 0)
            os.close(target)
    return rules


def install_filter(libc: ctypes.CDLL, opens: bool) -> bool:
    code = seccomp_filter(opens)
    if code is None:
        return False
    text, program = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(16)  # struct sock_fprog
    program[0:2] = (len(code) // 8).to_bytes(2, sys.byteorder)
    program[8:16] = ctypes.addressof(text).to_bytes(8, sys.byteorder)
    return libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0) == 0


def limit_resources(limits: dict) -> None:
    memory = limits["memory_mib"] << 20
    for name, value in (
        ("CPU", limits["cpu_seconds"]),  # the wall clock comes first; this one needs nobody to watch it
        ("AS", memory),
        ("STACK", STACK),
        ("FSIZE", 0),
        ("CORE", 0),
        ("NOFILE", 64),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def enter_jail(limits: dict, parent: int, rules: int | None = None) -> str:
    """Shut this process in; what is missing, if something is. ``rules``: of Landlock, -1 to open no file; None leaves
    all files readable."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # or a jailed program beside this one, as weak as it, reads its memory
    try:
        limit_resources(limits)
        drop_capabilities(libc)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            return "the referee has gone"
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            return "no PR_SET_NO_NEW_PRIVS"
        if rules is not None and rules >= 0 and libc.syscall(LANDLOCK_RESTRICT, ctypes.c_long(rules), ctypes.c_long(0)):
            return f"Landlock: {os.strerror(ctypes.get_errno())}"
        if not install_filter(libc, opens=rules != -1):
            return f"no seccomp filter ({os.uname().machine}): {os.strerror(ctypes.get_errno())}"
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def serve_program(limits: dict, referee: int, rules: int) -> None:
    """The life of the program's process: enter the jail, say whether it holds; then run one script, or answer until the
    line is cut."""
    missing = enter_jail(limits, referee, rules)
    if rules >= 0:
        os.close(rules)
    write_frame(LINE[1], {"value": missing})
    module = type(sys)("__main__" if limits["script"] else "program")
    sys.modules[module.__name__], sys.argv = module, ["program.py"]
    vars(module).update(__file__="program.py", __builtins__=builtins)
    importlib.import_module("site").setquit()  # exit() and quit(), which -S leaves out

    def run(*sources: str) -> None:
        for source in sources:
            exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)

    def lookup(names: list[str]) -> dict[str, Any]:
        return {name: module.__dict__[name] for name in names if name in module.__dict__}

    if not limits["script"]:
        Peer(*LINE, {"run": run, "lookup": lookup, **FORWARDED}, 1 << 62).listen()
    else:
        sources = read_frame(LINE[0])
        os.close(LINE[0]), os.close(LINE[1])
        with contextlib.suppress(SystemExit):  # whatever it says: a script that exits has printed what it had to
            run(*sources)


# ---- the referee ----


def set_alarm(limits: dict, started: float) -> None:
    """The next step's time: that of one test, if there is one, and never more than what is left for all."""
    left = max(started + limits["seconds"] - time.monotonic(), 0.001)
    signal.setitimer(signal.ITIMER_REAL, min(limits["test_seconds"] or left, left))


def run_tests(peer: Peer, job: dict, limits: dict) -> None:
    """Run the program, then the tests; anything but a return is not a pass.

    The program never supplies a builtin or a standard module to the tests, or ``def set(x): return 1`` would pass
    ``set(f(x)) == set(y)``; the one exception is the entry point (a task may ask for a function called ``sum``).
    """
    import ast

    started = time.monotonic()
    set_alarm(limits, started)
    peer.ask("run", *job["program"])
    trees = [ast.parse(test) for test in job["tests"]]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    owners = [node.value for node in nodes if isinstance(node, ast.Attribute)]
    modules = {owner.id for owner in owners if isinstance(owner, ast.Name)} & sys.stdlib_module_names
    ours = (modules | set(dir(builtins))) - {job["entry_point"]}
    asked = {node.id for node in nodes if isinstance(node, ast.Name)} - ours
    given = peer.ask("lookup", sorted(asked))
    space = {"__builtins__": builtins, "__name__": TESTS_MODULE}  # neither is the program's to give
    space |= {name: __import__(name) for name in modules & ours}
    space |= {name: value for name, value in dict(given).items() if name in asked - {*space}}
    for number, tree in enumerate(trees):
        set_alarm(limits, started)
        exec(compile(tree, f"test {number}", "exec", dont_inherit=True), space)
    peer.ask("lookup", [])  # still alive: a test that swallows every error has not hidden its end


def watch_script(job: dict, limits: dict, line: int, stdin: int, stdout: int, program: int) -> tuple[str, str, str]:
    """(reason, detail, output) of a script that reads ``job["stdin"]``. A nonzero exit code is an error."""
    text, output, written = memoryview(job["stdin"].encode()), bytearray(), 0
    while written < len(text):
        written += os.pwrite(stdin, text[written:], written)  # the program's place in the file stays at its beginning
    set_alarm(limits, time.monotonic())
    write_frame(line, job["program"])
    while part := os.read(stdout, 1 << 16):
        output += part
        if len(output) > MAX_OUTPUT:
            return "error", f"the program wrote more than {MAX_OUTPUT} bytes", ""
    end = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
    passed = end is not None and (end.si_code, end.si_status) == (os.CLD_EXITED, 0)
    reason, detail = ("passed", "") if passed else end_of(program)
    return reason, detail, output.decode("utf-8", "replace")


def judge(peer: Peer, job: dict, limits: dict, program: int) -> tuple[str, str]:
    """(reason, detail) of one run."""
    try:
        run_tests(peer, job, limits)
        return "passed", ""
    except AssertionError as error:
        return "failed", f"{place_in_tests(error, job['tests'])} {short_text(error)}".strip()
    except MemoryError:
        return "memory", "MemoryError"
    except ProgramEnded as error:
        return end_of(program) if error.reason == "ended" else (error.reason, short_text(error))
    except BaseException as error:  # an error of the program, of the tests, or a broken reply: not a pass
        return "error", f"{type(error).__name__}: {short_text(error)}"


def place_in_tests(error: BaseException, tests: list[str]) -> str:
    """The line of the tests that raised."""
    place, step = "", error.__traceback__
    while step:
        name = step.tb_frame.f_code.co_filename
        if name.startswith("test "):
            place = f"{name}: {tests[int(name[5:])].splitlines()[step.tb_lineno - 1].strip()[:150]}"
        step = step.tb_next
    return place


def end_of(program: int) -> tuple[str, str]:
    """Why the program's process does not answer any more. It stays unreaped, so that its number stays its own."""
    for _ in range(20):
        end = os.waitid(os.P_PID, program, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end and end.si_code == os.CLD_EXITED:
            return "error", f"the program ended its process (exit code {end.si_status})"
        if end:
            return "killed", signal.Signals(end.si_status).name
        time.sleep(0.005)
    return "error", "the program closed its line"


def finish(verdict: int, program: int, report: dict) -> None:
    """Reap the program here (its next parent, process 1 of a container, may never do it), report, and be gone."""
    os.kill(program, signal.SIGKILL)
    os.waitpid(program, 0)
    write_frame(verdict, report | {"detail": report["detail"][:300]})
    os._exit(0)


def referee(limits: dict, server: int, rules: int) -> None:
    """Judge one program, which is forked before the job arrives. Returns in a script's process only, at its end."""
    protect(server)
    to_program, to_referee, stdout, me = os.pipe(), os.pipe(), os.pipe(), os.getpid()
    stdin, nothing = os.memfd_create("stdin"), os.open(os.devnull, os.O_RDWR)  # a script's input is a file, as on a judge
    program = os.fork()
    if not program:
        kept = (stdin, stdout[1], 2) if limits["script"] else (nothing, nothing, 2)
        # copied out of the way first, so that no copy lands on one that is still to be made
        copies = [fcntl.fcntl(old, fcntl.F_DUPFD, TOP // 2) for old in (*kept, to_program[0], to_referee[1])]
        rules = fcntl.fcntl(rules, fcntl.F_DUPFD, TOP) if rules >= 0 else rules
        for new, old in enumerate(copies):
            os.dup2(old, new)
        os.closerange(len(copies), TOP)
        serve_program(limits, me, rules)
        return
    os.close(to_program[0]), os.close(to_referee[1]), os.close(stdout[1])
    size = (limits["memory_mib"] << 21) + (1 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    job, verdict = read_frame(0), os.dup(1)
    os.dup2(nothing, 0), os.dup2(nothing, 1)  # tests may print
    peer = Peer(to_referee[0], to_program[1], FOR_PROGRAM, MAX_FRAME)
    report = {"token": job["token"], "jail": peer.listen()["value"], "opens": rules >= 0}
    if report["jail"] and not limits["unconfined"]:
        finish(verdict, program, report | {"reason": "error", "detail": "not run"})
    late = report | {"reason": "timeout", "detail": f"{limits['test_seconds'] or limits['seconds']:g} s"}
    signal.signal(signal.SIGALRM, lambda *_: finish(verdict, program, late))
    if limits["script"]:
        reason, detail, output = watch_script(job, limits, to_program[1], stdin, stdout[0], program)
    else:
        (reason, detail), output = judge(peer, job, limits, program), ""
    signal.setitimer(signal.ITIMER_REAL, 0)
    finish(verdict, program, report | {"reason": reason, "detail": detail, "output": output})


def protect(parent: int) -> None:
    """Nothing outlives the grader, and nobody of the same user reads this memory."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """``sandbox_child.py PARENT``. For every job two frames on stdin: the limits, then (after the forks) the job. The
    verdict goes to stdout."""
    protect(int(sys.argv[1]))
    rules, server = landlock_rules(ctypes.CDLL(None)), os.getpid()
    others = [*WARM_PARTS.split(), *sorted(sys.stdlib_module_names - NOT_LOADED)] if rules < 0 else []
    for name in [*WARM.split(), *others]:
        with contextlib.suppress(ImportError):  # this interpreter was built without it
            importlib.import_module(name)
    gc.freeze()
    while True:
        try:
            limits = read_frame(0)
        except EOFError:
            return
        child = os.fork()
        if not child:
            return referee(limits, server, rules)
        if os.waitpid(child, 0)[1]:  # no verdict: whoever waits for it learns so from the end of this process
            return


if __name__ == "__main__":
    main()
