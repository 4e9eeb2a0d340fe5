"""LiveCodeBench's own parts: decode its tests, compare outputs as it does, turn a problem into sandbox jobs.

Not a command. `same_output("1 2.0\\n", "1 2") is True`. The rules are those of LiveCodeBench's
lcb_runner/evaluation/testing_util.py; where ours differ, docs/BENCHMARKS.md says so. The private tests are a pickled
string: they are read by their opcodes, and anything in them but one string is refused, so that nothing is executed.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import json
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from console import UserError

PROGRAM_SIDE = Path(__file__).with_name("lcb_program.py")
TEST_SECONDS = 6.0  # the official time for one test
MEMORY_MIB = 4096  # the official note: "max memory is set to 4GB"
MAX_TESTS_BYTES = 1 << 30
STRING_OPCODES = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
HARMLESS_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}


def unpickle_str(data: bytes) -> str:
    """The string that a pickle of one string holds. Nothing is built or called; any other content is a ValueError."""
    found = None
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in STRING_OPCODES and found is None:
            found = argument
        elif opcode.name not in HARMLESS_OPCODES:
            raise ValueError(f"a pickle of more than one string ({opcode.name})")
    if found is None:
        raise ValueError("a pickle without a string")
    return found


def decode_tests(text: str) -> list[dict[str, str]]:
    """The tests of a column ``private_test_cases``: JSON, or base64 of zlib of a pickled string of JSON."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), MAX_TESTS_BYTES)
        if not stream.eof:
            raise ValueError("cut short, or too large")
        return json.loads(unpickle_str(data))
    except (ValueError, binascii.Error, zlib.error) as error:
        raise UserError(f"private_test_cases cannot be decoded ({error}); get the file again") from None


def problem_tests(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Public, then private tests of one problem, as the official runner orders them."""
    return [*json.loads(row["public_test_cases"]), *decode_tests(row["private_test_cases"])]


def same_output(printed: str, expected: str) -> bool:
    """LiveCodeBench's comparison of what a program printed: line by line without outer space, equal as text or, number
    by number, as Decimal. This function's source also travels to the sandbox, so it imports what it needs itself."""
    from decimal import Decimal, InvalidOperation

    lines = [line.strip() for line in printed.strip().split("\n")]
    wanted = [line.strip() for line in expected.strip().split("\n")]
    if len(lines) != len(wanted):
        return False
    for line, want in zip(lines, wanted):
        if line == want:
            continue
        try:
            if [Decimal(word) for word in line.split()] != [Decimal(word) for word in want.split()]:
                return False
        except InvalidOperation:
            return False
    return True


def same_value(value: object, expected: object) -> bool:
    """LiveCodeBench's comparison of what a method returned: equal, with a tuple counted as a list at the top."""
    return (list(value) if isinstance(value, tuple) else value) == expected


def sandbox_job(code: str, tests: Sequence[Mapping[str, str]], function: str | None) -> tuple[str, list[str]]:
    """(program, tests) for code_sandbox.run_many. ``function``: what a functional task calls; None for stdin tasks."""
    program = f"{PROGRAM_SIDE.read_text(encoding='utf-8')}\nprepare({code!r}, {function is not None})\n"
    if function is None:
        checks = [f"assert same_output(run({test['input']!r}), {test['output']!r})" for test in tests]
        return program, [inspect.getsource(same_output), *checks]
    checks = []
    for test in tests:
        args = [json.loads(line) for line in test["input"].split("\n")]
        checks.append(f"assert same_value(call({function!r}, {args!r}), {json.loads(test['output'])!r})")
    return program, [inspect.getsource(same_value), *checks]


def total_seconds(tests: int) -> float:
    """The official limit for all tests of one problem."""
    return (TEST_SECONDS + 1) * tests + 5
