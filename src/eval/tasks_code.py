"""The benchmarks whose answers are programs: humaneval, mbpp, lcb. All run in the sandbox, two at a time.

Not a command: bench8_loaders registers them. The programs and their tests reach the sandbox through a pipe.
"""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from code_sandbox import run_many, run_python
from console import UserError, progress
from graders import extract_code, fenced_blocks, program_of
from hub_data import HubBenchmark, Row, Source
from livecodebench import MEMORY_MIB, TEST_SECONDS, problem_tests, sandbox_job, total_seconds
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


class CodeBenchmark(HubBenchmark):
    """Answers are programs. ``job`` gives what the sandbox runs for one of them."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_code(answer, item.meta["entry_point"])

    def job(self, item: Item, code: str) -> tuple[str, list[str], str]:
        """(program, tests, entry point) for code_sandbox.run_many."""
        raise TypeError(f"{type(self).__name__} does not define job")

    def grade(self, item: Item, extracted: str | None) -> bool:
        return self.grade_all([item], [extracted])[0]

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


class LiveCodeBench(CodeBenchmark):
    """LiveCodeBench v6: the 175 problems that release_v6 added (January to April 2025)."""

    name = "lcb"
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

    def stratum(self, item: Item) -> str:
        return item.meta["stratum"]

    def extract(self, item: Item, answer: str) -> str | None:
        """The fence that defines the class or function asked for; for a script the last fence, as the official run."""
        if item.meta["function"]:
            name = "Solution" if "class Solution" in item.meta["row"]["starter_code"] else item.meta["function"]
            return extract_code(answer, name)
        blocks, unclosed = fenced_blocks(answer)
        return unclosed or (blocks[-1] if blocks else None)

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Tests are decoded one problem at a time: together they may be gigabytes."""
        with progress(len(items), "lcb", "program") as bar, ThreadPoolExecutor(2) as pool:
            verdicts = []
            for passed in pool.map(self.passes, items, extracted):
                verdicts.append(passed)
                bar.update()
        return verdicts

    def passes(self, item: Item, code: str | None) -> bool:
        if not code:
            return False
        tests = problem_tests(item.meta["row"])
        program, checks = sandbox_job(code, tests, item.meta["function"])
        limits = {"timeout_s": total_seconds(len(tests)), "test_timeout_s": TEST_SECONDS, "memory_mib": MEMORY_MIB}
        return run_python(program, checks, **limits).passed


CODE_BENCHMARKS = (HumanEval, Mbpp, LiveCodeBench)
