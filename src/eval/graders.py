"""Find the final answer in a model's text and compare it with the gold answer. Pure functions of strings.

Not a command. `extract_letter("The answer is D.", "ABCD") == "D"`. GRADER_VERSION is recorded with every verdict, so a
change here is visible in the logs and old samples can be graded again without a GPU.
"""

from __future__ import annotations

import re

GRADER_VERSION = "1"
THINK_END = "</think>"

_NUMBER = re.compile(r"[+-]?\d+(?:,\d{3})*(?:\.0*)?")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*\1[ \t]*$", re.DOTALL | re.MULTILINE)


def split_thinking(text: str) -> tuple[str, str | None]:
    """(thinking, answer) of a completion that began inside `<think>`. The answer is None when thinking never ended:
    a truncated answer is no answer."""
    thinking, end, answer = text.rpartition(THINK_END)
    return (thinking, answer.strip()) if end else (text, None)


def extract_letter(answer: str, letters: str) -> str | None:
    """The option letter that an answer states, or None. ``letters``: the options that exist, such as "ABCD".

    In order: the last \\boxed{X}; the last "answer is X" or "Answer: X"; a text that is nothing but a letter; the last
    letter that stands alone at the start of a line. A letter must stand alone: "The correct answer is D." is not "A".
    """
    one = f"[{letters}]"
    wrapped = rf"[\s*_(\[{{\"'`$]*(?:\\(?:text|mathrm|mathbf)\s*{{)?({one})(?![A-Za-z0-9'])"
    patterns = (
        rf"\\boxed\s*{{{wrapped}",
        rf"(?i:answer|option|choice)\s*(?i:is|would be|:|=)?\s*:?{wrapped}",
        rf"\A{wrapped}[\s*_.)\]}}\"'`$]*\Z",
        rf"(?m)^{wrapped}[.):*\]]",
    )
    for pattern in patterns:
        found = re.findall(pattern, answer)
        if found:
            return found[-1]
    return None


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


def extract_code(answer: str, entry_point: str) -> str | None:
    """The last fenced block that defines ``entry_point``, else the last fenced block, else a bare definition of it."""
    blocks = [body for _, _, body in _FENCE.findall(answer)]
    defining = rf"(?m)^\s*(?:async\s+)?(?:def|class)\s+{re.escape(entry_point)}\b|^{re.escape(entry_point)}\s*="
    for body in reversed(blocks):
        if re.search(defining, body):
            return body
    if blocks:
        return blocks[-1]
    bare = re.search(defining, answer)
    return answer[bare.start() :] if bare else None
