"""Grading of the tiny tasks: tiny_know, tiny_math, tiny_reason, tiny_code. Their text is src/quant/task_text.py.

Not a command; the same interface as the real benchmarks (task.Benchmark).
"""

from __future__ import annotations

from collections.abc import Sequence

from code_sandbox import run_many
from graders import extract_boxed, extract_code, extract_letter, grade_integer
from task import Benchmark
from task_text import CodeText, Item, KnowText, MathText, ReasonText, letters_of


class TinyKnow(KnowText, Benchmark):
    """The letter of the memorised fact."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_letter(answer, letters_of(self.options))


class TinyMath(MathText, Benchmark):
    """The integer in the box."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_boxed(answer)

    def grade(self, item: Item, extracted: str | None) -> bool:
        return grade_integer(extracted, int(item.gold))


class TinyReason(ReasonText, Benchmark):
    """The letter of the age."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_letter(answer, letters_of(self.options))


class TinyCode(CodeText, Benchmark):
    """The function, run against its asserts."""

    def extract(self, item: Item, answer: str) -> str | None:
        return extract_code(answer, item.meta["entry_point"])

    def grade(self, item: Item, extracted: str | None) -> bool:
        return self.grade_all([item], [extracted])[0]

    def grade_all(self, items: Sequence[Item], extracted: Sequence[str | None]) -> list[bool]:
        """Run every program in the sandbox, two at a time; an answer without a program is wrong."""
        pairs = zip(items, extracted, strict=True)
        jobs = [(program, item.meta["tests"], item.meta["entry_point"]) for item, program in pairs if program]
        verdicts = iter(run_many(jobs))
        return [next(verdicts).passed if program else False for program in extracted]


TINY_TASKS = (TinyKnow, TinyMath, TinyReason, TinyCode)
