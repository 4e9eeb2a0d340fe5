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
__all__ += ["grade_integer", "parse_integer", "program_of", "opens_thinking", "split_thinking"]

GRADER_VERSION = "3"
THINK_END = "</think>"
THOUGHTS = (("<think>", THINK_END), ("<|channel>thought", "<channel|>"))  # Qwen, DeepSeek and most others; Gemma 4

_NUMBER = re.compile(r"[+-]?\d+(?:,\d{3})*(?:\.0*)?")
_NAMED = re.compile(r"\A[A-Za-z\\][A-Za-z\\\s+_]{0,40}=\s*")
_DEGREES = re.compile(r"\s*(?:\^\s*(?:\\circ|{\s*\\circ\s*})|°|\\degree)\Z")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, as the templates of Qwen3.5 do; others leave it to the model."""
    return any(prompt.rstrip().endswith(opening) for opening, _ in THOUGHTS)


def split_thinking(text: str, opened: bool = True) -> tuple[str, str | None]:
    """(thinking, answer) of a completion; ``opened``: its prompt ended inside a thought. The answer is None when a thought
    was opened, by either, and never ended: a truncated answer is no answer. What a model says without a thought is its
    answer."""
    for opening, ending in THOUGHTS:
        thinking, end, answer = text.rpartition(ending)
        if end:
            return thinking, answer.strip()
        opened = opened or text.lstrip().startswith(opening)
    return (text, None) if opened else ("", text.strip())


def extract_boxed(answer: str) -> str | None:
    """The content of the last complete \\boxed{...}, braces balanced, or None. One pass, whatever the text."""
    opened: list[tuple[bool, int]] = []  # (whether a box opens here, where its content starts)
    found: tuple[int, str] | None = None
    for brace in re.finditer(r"\\boxed\s{0,9}{|[{}]", answer):
        if brace[0] != "}":
            opened.append((len(brace[0]) > 1, brace.end()))
        elif opened:
            box, start = opened.pop()
            if box and (found is None or start > found[0]):
                found = start, answer[start : brace.start()].strip()
    return found[1] if found else None


def parse_integer(text: str) -> int | None:
    """The integer that the whole text is: sign, thousands in groups of three, a zero fraction, a name before "=", a degree
    sign. "1,2" is none."""
    cleaned = text.replace("{,}", ",").replace("\\,", "").replace("−", "-").strip(" $.\t\n")
    cleaned = _DEGREES.sub("", _NAMED.sub("", cleaned))
    if inner := re.fullmatch(r"\\(?:text|textbf|mathbf|mathrm){([^{}]*)}", cleaned):
        cleaned = inner[1].strip()
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
    marked = re.findall(r"(?m)^[ \t]{0,20}####[ \t]{0,20}(\S.*)$", answer)
    stated = re.findall(r"(?i)\banswer(?:[\s*_]{0,9}(?:is|=|:)){1,3}[ \t*_]{0,9}\n?[ \t]{0,20}([^\n]+)", answer)
    found = marked or [re.split(r"\.\s", text)[0] for text in stated]
    return found[-1].strip(" *_").rstrip(".").strip() or None if found else None


def fenced_blocks(answer: str) -> tuple[list[str], str | None]:
    """(contents of the closed code fences, what follows a last fence that is never closed). An indented fence's content is
    moved left."""
    blocks, end = [], 0
    for found in _FENCE.finditer(answer):
        blocks.append(textwrap.dedent(found[3]) if found[0][0] in " \t" else found[3])
        end = found.end()
    last = re.search(r"(?m)^[ \t]*(?:`{3,}|~{3,})[ \t]*[\w+-]*[^\n`]*\n", answer[end:])
    return blocks, answer[end + last.end() :] if last else None


def defines(code: str, entry_point: str) -> re.Match | None:
    name = re.escape(entry_point)
    return re.search(rf"(?m)^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+{name}\b|^{name}[ \t]*=", code)


def extract_code(answer: str, entry_point: str) -> str | None:
    """The last fenced block (closed or not) that defines ``entry_point``, else the last closed one, else a bare definition."""
    blocks, unclosed = fenced_blocks(answer)
    for body in [unclosed or "", *reversed(blocks)]:
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
