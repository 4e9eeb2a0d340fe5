"""The benchmarks whose answers are programs: humaneval, mbpp, lcb. All run in the sandbox, two at a time.

Not a command: bench8_loaders registers them. Programs and tests reach the sandbox through a pipe. LiveCodeBench's rules are
those of its lcb_runner/evaluation/testing_util.py; where ours differ, docs/BENCHMARKS.md says so. Its private tests are a
pickled string: they are read by their opcodes, and anything in them but one string is refused, so that nothing is executed.
"""

from __future__ import annotations

import ast
import base64
import binascii
import builtins
import inspect
import json
import pickletools
import zlib
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from code_sandbox import run_many, run_python, run_script, side_by_side
from console import UserError
from graders import extract_code, fenced_blocks, program_of
from task import HubBenchmark, Row, Source
from task_text import Item

# openai/simple-evals, humaneval_eval.py
HUMANEVAL_INSTRUCTION = (
    "Read the following function signature and docstring, and fully implement the function described. Your response "
    "should only contain the code for this function.\n"
)
# google-research/mbpp, README, without the few-shot markers [BEGIN] and [DONE]
MBPP_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n{tests}\n"
)
# LiveCodeBench, lcb_runner/prompts/code_generation.py
LCB_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests."
)
LCB_WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your code within delimiters."
)
LCB_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)
SANDBOX_SECONDS = 20.0  # for all tests of one HumanEval or MBPP task
# LiveCodeBench runs each program after these imports (lcb_runner/evaluation/testing_util.py, import_string).
LCB_MODULES = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
LCB_PRELUDE = "\n".join(
    [f"from {name} import *" for name in [*LCB_MODULES.split(), "builtins", "typing"]]
    + [f"import {name}" for name in LCB_MODULES.split()]
    + ["sys.setrecursionlimit(50000)"]
)
TEST_SECONDS = 6.0  # the official time for one test
MEMORY_MIB = 4096  # the official note: "max memory is set to 4GB"
MAX_TESTS_BYTES = 1 << 30
STRING_OPCODES = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
HARMLESS_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "STOP"}


class CodeBenchmark(HubBenchmark):
    """Answers are programs. ``job`` gives what the sandbox runs for one of them."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_code(answer, item.meta["entry_point"])

    def standard(self, item: Item) -> Any:
        return item.meta

    def job(self, item: Item, code: str) -> tuple[str, list[str], str]:
        """(program, tests, entry point) for code_sandbox.run_many."""
        raise TypeError(f"{type(self).__name__} does not define job")

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        jobs = [self.job(item, code) for item, code in zip(items, extracted, strict=True) if code]
        verdicts = iter(run_many(jobs, timeout_s=SANDBOX_SECONDS, memory_mib=1024))
        return [next(verdicts).passed if code else False for code in extracted]


class HumanEval(CodeBenchmark):
    """164 functions to complete."""

    name = "humaneval"
    source = Source("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544")
    columns = ("task_id", "prompt", "canonical_solution", "test", "entry_point")

    def item(self, row: Row, number: int, config: str | None) -> Item:
        meta = {key: row[key] for key in ("prompt", "test", "entry_point")}
        return Item(row["task_id"], HUMANEVAL_INSTRUCTION + row["prompt"], row["canonical_solution"], meta)

    def job(self, item: Item, code: str) -> tuple[str, list[str], str]:
        """Helpers that the tests use are those of the prompt, whatever the program makes of them (32, 38 and 50)."""
        name, prompt = item.meta["entry_point"], item.meta["prompt"]
        helpers = program_of(prompt, f"def {name}(): pass", name).rpartition("\n")[0]
        return program_of(prompt, code, name), [f"{helpers}\n{item.meta['test']}\ncheck({name})"], name


class Mbpp(CodeBenchmark):
    """The 500 test tasks (11 to 510) of MBPP's full set; a local file may hold all 974."""

    name = "mbpp"
    source = Source("google-research-datasets/mbpp", "4bb6404fdc6cacfda99d4ac4205087b89d32030c", config="full")
    columns = ("task_id", "text", "code", "test_list", "test_setup_code")

    def keep(self, row: Row) -> bool:
        return 11 <= row["task_id"] <= 510

    def item(self, row: Row, number: int, config: str | None) -> Item:
        question = MBPP_PROMPT.format(text=row["text"], tests="\n".join(row["test_list"]))
        meta = {"entry_point": called_function(row["test_list"][0]), "tests": row["test_list"], "setup": row["test_setup_code"]}
        return Item(f"mbpp-{row['task_id']}", question, row["code"], meta)

    def job(self, item: Item, code: str) -> tuple[str, list[str], str]:
        """The setup code of a task builds the program's own objects, so it runs beside the program."""
        return f"{code}\n{item.meta['setup']}", list(item.meta["tests"]), item.meta["entry_point"]


def called_function(test: str) -> str:
    """The function that an assert tests: the first called name that is no builtin, else the first called name."""
    calls = [node for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    names = [node.func.id for node in sorted(calls, key=lambda node: (node.lineno, node.col_offset))]
    own = [name for name in names if not hasattr(builtins, name)]
    if not names:
        raise UserError(f"mbpp: no function is called in {test[:80]!r}")
    return (own or names)[0]


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
    by number, as Decimal."""
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
    """LiveCodeBench's comparison of what a method returned: equal, with a tuple counted as a list at the top. Its source
    travels to the sandbox."""
    return (list(value) if isinstance(value, tuple) else value) == expected


def method_tests(code: str, tests: Sequence[Mapping[str, str]], function: str) -> list[str]:
    """Asserts that call ``function`` of one Solution, if the code has that class, as the official runner does."""
    called = f"holder.{function}" if "class Solution" in code else function
    asserts = ["holder = Solution()"] if called != function else []
    for test in tests:
        args = ", ".join(repr(json.loads(line)) for line in test["input"].split("\n"))
        asserts.append(f"assert same_value({called}({args}), {json.loads(test['output'])!r})")
    return [inspect.getsource(same_value), *asserts]


class LiveCodeBench(CodeBenchmark):
    """LiveCodeBench v6: the 175 problems that release_v6 added (January to April 2025)."""

    name = "lcb"
    # its repository is a loading script, which `datasets` no longer runs: the file is read
    source = Source("livecodebench/code_generation_lite", "0fe84c3912ea0c4d4a78037083943e8f0c4dd505", files=("test6.jsonl",))
    columns = (
        "question_id", "question_content", "starter_code", "difficulty", "contest_date",
        "public_test_cases", "private_test_cases", "metadata",
    )  # fmt: skip

    def item(self, row: Row, number: int, config: str | None) -> Item:
        name = json.loads(row["metadata"]).get("func_name")
        meta = {"row": row, "function": name, "stratum": row["difficulty"], "date": row["contest_date"][:10]}
        ask, shown = (LCB_WITH_STARTER, row["starter_code"]) if row["starter_code"] else (LCB_STDIN, "# YOUR CODE HERE")
        question = (
            f"### Question:\n{row['question_content']}\n\n### Format: {ask}\n```python\n{shown}\n```\n\n"
            "### Answer: (use the provided format with backticks)\n\n"
        )
        return Item(f"lcb-{row['question_id']}", question, "", meta)

    def messages(self, item: Item) -> list[dict[str, str]]:
        return [{"role": "system", "content": LCB_SYSTEM}, {"role": "user", "content": item.question}]

    def extract(self, item: Item, answer: str) -> str | None:
        """The fence that defines the class or function asked for; for a script the last fence, as the official run."""
        if item.meta["function"]:
            name = "Solution" if "class Solution" in item.meta["row"]["starter_code"] else item.meta["function"]
            return extract_code(answer, name)
        blocks, unclosed = fenced_blocks(answer)
        return unclosed or (blocks[-1] if blocks else None)

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Tests are decoded one problem at a time: together they may be gigabytes."""
        return side_by_side(self.passes, items, extracted, name="lcb", unit="program")

    def passes(self, item: Item, code: str | None) -> bool:
        if not code:
            return False
        tests = problem_tests(item.meta["row"])
        limits: dict[str, Any] = {"memory_mib": MEMORY_MIB, "prelude": LCB_PRELUDE}
        if function := item.meta["function"]:
            whole = (TEST_SECONDS + 1) * len(tests) + 5  # the official limit for all tests of one problem
            limits |= {"timeout_s": whole, "test_timeout_s": TEST_SECONDS, "entry_point": function}
            return run_python(code, method_tests(code, tests, function), **limits).passed
        runs = ((run_script(code, test["input"], timeout_s=TEST_SECONDS, **limits), test["output"]) for test in tests)
        return all(run.passed and same_output(run.output, output) for run, output in runs)


CODE_BENCHMARKS = (HumanEval, Mbpp, LiveCodeBench)
