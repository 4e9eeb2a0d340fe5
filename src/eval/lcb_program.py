"""The program side of a LiveCodeBench run, sent into the sandbox ahead of the model's code; `prepare(code)` follows it.

Not a command and not imported by the harness: tasks_code reads this file as text. Only the standard library. Whatever
the model's code does to these functions, it passes only by giving the right outputs: the tests are in another process.
"""

import io
import os
import sys
import threading

OUTPUT_LIMIT = 12 << 20  # bytes: below the sandbox's limit for one value
SPACE: dict = {}
PROGRAM: list = []
IDLE: list = []

# LiveCodeBench runs each program after these imports (lcb_runner/evaluation/testing_util.py, import_string).
STARRED = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
PRELUDE = [f"from {name} import *" for name in [*STARRED.split(), "builtins", "typing"]]
PRELUDE += [f"import {name}" for name in STARRED.split()] + ["sys.setrecursionlimit(50000)"]


def prepare(code: str, functional: bool) -> None:
    """Compile the code; a functional task's definitions are made once, as the official runner does."""
    exec("\n".join(PRELUDE), SPACE)
    PROGRAM.append(compile(code, "solution.py", "exec", dont_inherit=True))
    if functional:
        exec(PROGRAM[0], SPACE)
        SPACE["holder"] = SPACE["Solution"]() if "class Solution" in code else None
    else:
        IDLE.extend((os.dup(0), os.dup(1)))


def call(name: str, args: list) -> object:
    """The result of the method (or function) that a functional task asks for."""
    function = getattr(SPACE["holder"], name) if SPACE["holder"] is not None else SPACE[name]
    return function(*args)


def feed(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError:  # the program ended without reading all
        pass
    os.close(descriptor)


def collect(descriptor: int, parts: list) -> None:
    size = 0
    while part := os.read(descriptor, 1 << 16):
        size += len(part)
        if size <= OUTPUT_LIMIT:
            parts.append(part)
    os.close(descriptor)
    if size > OUTPUT_LIMIT:
        parts.append(b"\noutput beyond the limit")


def run(text: str) -> str:
    """Run the program as a script with ``text`` on its standard input; what it wrote to its standard output.

    Real pipes at descriptors 0 and 1, so that input(), sys.stdin.buffer, open(0), print and os.write all work.
    """
    (given, feeding), (collecting, out), parts = os.pipe(), os.pipe(), []
    threads = [
        threading.Thread(target=feed, args=(feeding, text.encode()), daemon=True),
        threading.Thread(target=collect, args=(collecting, parts), daemon=True),
    ]
    os.dup2(given, 0), os.dup2(out, 1), os.close(given), os.close(out)
    for thread in threads:
        thread.start()
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    written = sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)), encoding="utf-8")
    space = dict(SPACE, __name__="__main__", stdin=sys.stdin, stdout=sys.stdout)
    try:
        exec(PROGRAM[0], space)
    except SystemExit:
        pass
    finally:
        for stream in {id(stream): stream for stream in (sys.stdout, written)}.values():
            try:
                stream.flush()
            except (ValueError, OSError, AttributeError):  # closed, or replaced by the program
                pass
        os.dup2(IDLE[0], 0), os.dup2(IDLE[1], 1)  # ends both pipes
        threads[1].join()
    return b"".join(parts).decode("utf-8", "replace")
