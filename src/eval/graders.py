"""Find the final answer in a model's text and compare it with the gold answer. Pure functions of strings.

Not a command. `extract_letter("The answer is D.", "ABCD") == "D"` (answer_letters); mathematical answers are compared in
math_answers, programs are run by code_sandbox. GRADER_VERSION is recorded with every verdict, so a change in any of them is
visible in the logs and old samples can be graded again without a GPU.
"""

from __future__ import annotations

import re
import textwrap

from answer_letters import extract_letter

__all__ = ["GRADER_VERSION", "THINK_END", "extract_boxed", "extract_code", "extract_letter", "extract_math"]
__all__ += ["grade_integer", "parse_integer", "program_of", "split_thinking"]

GRADER_VERSION = "2"
THINK_END = "</think>"

_NUMBER = re.compile(r"[+-]?\d+(?:,\d{3})*(?:\.0*)?")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)


def split_thinking(text: str) -> tuple[str, str | None]:
    """(thinking, answer) of a completion that began inside `<think>`. The answer is None when thinking never ended:
    a truncated answer is no answer."""
    thinking, end, answer = text.rpartition(THINK_END)
    return (thinking, answer.strip()) if end else (text, None)


def extract_boxed(answer: str) -> str | None:
    """The content of the last complete \\boxed{...}, braces balanced, or None."""
    start = len(answer)
    while (start := answer.rfind("\\boxed", 0, start)) >= 0:
        opening = re.match(r"\\boxed\s*{", answer[start:])
        if not opening:
            continue
        depth = 1
        for place in range(start + opening.end(), len(answer)):
            depth += {"{": 1, "}": -1}.get(answer[place], 0)
            if not depth:
                return answer[start + opening.end() : place].strip()
    return None


def parse_integer(text: str) -> int | None:
    """The integer that the whole text is: sign, thousands in groups of three, a zero fraction. "1,2" is none."""
    cleaned = text.replace("{,}", ",").replace("\\,", "").replace("−", "-").strip(" $.\t\n")
    if not _NUMBER.fullmatch(cleaned):
        return None
    return int(cleaned.replace(",", "").partition(".")[0])


def grade_integer(extracted: str | None, gold: int) -> bool:
    """Whether the extracted text is the integer ``gold``; -5 is not 5 and "1,2" is not 12."""
    return extracted is not None and parse_integer(extracted) == gold


def extract_math(answer: str) -> str | None:
    """A mathematical answer: the last box, else GSM8K's "#### x", else the rest of the last line "answer is x"."""
    if boxed := extract_boxed(answer):
        return boxed
    marked = re.findall(r"(?m)^\s*####\s*(\S.*)$", answer)
    stated = re.findall(r"(?i)\banswer(?:\s*[*_]*\s*(?:is|=|:)\s*[*_]*:?)+\s*([^\n]+?)[\s*_]*(?:\.\s|\.?\s*$|\n)", answer)
    found = marked or stated
    return found[-1].strip(" *") or None if found else None


def fenced_blocks(answer: str) -> list[str]:
    """The contents of the code fences. One that is never closed runs to the end; an indented fence is moved left."""
    blocks, end = [], 0
    for found in _FENCE.finditer(answer):
        blocks.append(textwrap.dedent(found[3]) if found[0][0] in " \t" else found[3])
        end = found.end()
    if last := re.search(r"(?m)^[ \t]*(?:`{3,}|~{3,})[ \t]*[\w+-]*[^\n`]*\n", answer[end:]):
        blocks.append(answer[end + last.end() :])
    return blocks


def defines(code: str, entry_point: str) -> re.Match | None:
    name = re.escape(entry_point)
    return re.search(rf"(?m)^\s*(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*=", code)


def extract_code(answer: str, entry_point: str) -> str | None:
    """The last fenced block that defines ``entry_point``, else the last fenced block, else a bare definition of it."""
    blocks = fenced_blocks(answer)
    for body in reversed(blocks):
        if defines(body, entry_point):
            return body
    if blocks:
        return blocks[-1]
    bare = defines(answer, entry_point)
    return answer[bare.start() :] if bare else None


def program_of(prompt: str, code: str, entry_point: str) -> str:
    """A whole program from a prompt that opens a function and the code that a model wrote: the prompt's imports and
    helpers stay in front of a full definition; a bare body is put below the prompt's own signature."""
    opened = [found.start() for found in re.finditer(rf"(?m)^(?:async\s+)?def\s+{re.escape(entry_point)}\b", prompt)]
    if defines(code, entry_point):
        return prompt[: opened[-1]] + "\n" + code if opened else code
    return prompt + textwrap.indent(textwrap.dedent(code), "    ")
