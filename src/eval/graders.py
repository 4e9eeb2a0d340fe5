"""Find the final answer in a model's text and compare it with the gold answer. Pure functions of strings.

Not a command. `extract_letter("The answer is D. Option A ignores friction.", "ABCD") == "D"`: only statements count, a letter
that merely appears in prose is none. Mathematical answers are compared in math_answers, programs are run by code_sandbox.
GRADER_VERSION is recorded with every verdict: a change in any of them is visible in the logs, and old samples can be graded
again.
"""

from __future__ import annotations

import re
import textwrap
from functools import cache

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


# ---- option letters, in English or one of MMMLU's languages ----

# The answer words of the fourteen languages and most letters of Arabic and Bengali options are those of openai/simple-evals
# (common.py).
# Letters that stand for A, B, C, D in option lists of other scripts: simple-evals (normalize_extracted_answer), and the
# alif without hamza and the Bengali consonants in their usual order, which it lacks.
OTHER_SCRIPTS = {
    "أ": "A", "ا": "A", "ب": "B", "ج": "C", "د": "D",
    "অ": "A", "ক": "A", "ব": "B", "খ": "B", "ড": "C", "গ": "C", "ঢ": "D", "ঘ": "D",
}  # fmt: skip
FULL_WIDTH = 0xFF21 - ord("A")

# How a line "Answer: X" begins. English first; the rest by language.
WORDS = (
    "answer", "antwort", "respuesta", "risposta", "réponse", "reponse", "resposta", "jawaban", "jibu",
    "idahun", "ìdáhùn", "idáhùn", "ìdáhun", "àmọ̀nà", "àdáhùn", "ànúgọ", "àṣàyàn",
    "উত্তর", "उत्तर", "답변", "정답", "답", "答案", "答复", "答曰", "答え", "回答", "解答", "正解", "答",
    "الإجابة", "الاجابة", "الجواب", "إجابة", "lösung", "solution", "solución",
)  # fmt: skip
# What may stand between that word and the letter.
LINKS = (
    "is", "would be", "should be", "must be", "will be", "option", "choice", "letter", "number", "the", "correct", "best",
    "final", "definitely", "clearly", "therefore", "thus", "hence", "indeed", "likely", "most likely", "probably",
    "ist", "lautet", "richtige", "die", "option",
    "es", "la", "opción", "letra", "correcta", "final", "est", "correcte", "l'option", "lettre",
    "è", "é", "l'opzione", "opzione", "lettera", "corretta", "opção", "alternativa", "correta",
    "adalah", "ialah", "yang benar", "benar", "opsi", "pilihan", "ni", "sahihi", "chaguo", "jẹ", "tó tọ́", "ni aṣayan",
    "হল", "হলো", "হচ্ছে", "সঠিক", "বিকল্প", "है", "सही", "विकल्प",
    "은", "는", "선택지", "は", "選択肢", "选项", "選項", "是", "为", "為",
    "هي", "هو", "الصحيحة", "النهائية", "النهائي", "الصحيح", "الخيار",
)  # fmt: skip
# A letter must not be the start of a word of its own script; after it a word of another script may follow directly.
WORD_SIGNS = "A-Za-z\u00c0-\u024f\u0300-\u036f\u1e00-\u1eff0-9'\u2019\u0621-\u064a\u0985-\u09cd\u0904-\u094d"
# Repetitions are bounded everywhere: a model may print a line of 30,000 stars.
DECORATION = r"[\s*_(\[{（「『【\"'`$:：=ঃ]{0,30}(?:\\(?:text|mathrm|mathbf|textbf|boldsymbol)\s*{\s*\(?)?"
CLOSING = r"[\s*_.,)\]}）」』】\"'`$。।!！\\]{0,30}"
# "A good one" and "I think" are words, not options
ARTICLE = r"(?!(?<=[AI]) (?!because|since|as |due |for |based |given |from |by )[a-z])"
# A second letter after the first is no answer; after a comma only where it is not the start of more prose ("A, B is wrong").
HEDGE = (
    r"(?!\s{0,9}\)?\s{0,9}(?:or|and|und|oder|et|ou|o|e|y|dan|atau|na|au|\\text\s?{\s{0,9}(?:or|and)\s{0,9}}|/|&|\+"
    r"|和|或|及|与|與|と|または|와|과|또는|और|या|এবং|বা|و|أو)\s{0,9}\(?\s{0,9}{one}{end}"
    r"|\s{0,9}\)?\s{0,9}[,،、，]\s{0,9}\(?\s{0,9}{one}{end}(?=[\s*_)$]{0,9}(?:[,،、，}.。\n]|\Z|and\b|or\b)))"
)
# "If ..., the answer would be A", "the answer is A if ...": not what the text answers, unless it says nothing else.
CONDITION = re.compile(r"(?i)[\s*_)\]}\"'`$]{0,20}\b(?:only )?(?:if|unless)\b")


def latin(letter: str) -> str:
    """The letter A, B, ... that a letter of another script or width stands for."""
    letter = OTHER_SCRIPTS.get(letter, letter)
    return chr(ord(letter) - FULL_WIDTH) if "\uff21" <= letter <= "\uff3a" else letter.upper()


@cache
def _patterns(letters: str) -> tuple[list[re.Pattern], list[re.Pattern]]:
    """(statements in the form that prompts ask for, looser ones in order of trust), each with the letter as group 1."""
    wide = "".join(chr(ord(letter) + FULL_WIDTH) for letter in letters)
    other = "".join(sign for sign, letter in OTHER_SCRIPTS.items() if letter in letters)
    upper, both = f"[{letters}{wide}{other}]", f"[{letters}{letters.lower()}{wide}{other}]"
    end = f"(?![{WORD_SIGNS}])"
    hedge = HEDGE.replace("{one}", upper).replace("{end}", end)
    words, links = "|".join(map(re.escape, WORDS)), "|".join(map(re.escape, sorted(LINKS, key=len, reverse=True)))
    link = rf"(?i:[\s*_:：=ঃ,\-–]{{0,20}}(?:{links}|(?-i:a))(?=[\s*_:：=ঃ(\[{{（「『【\"'`$\\]|{upper})){{0,6}}"
    line = r"(?im)^[ \t*_#>$\-]{0,20}(?:\\text\s?{)?(?:the |die |la |le |il |final |correct ){0,4}"
    line += rf"(?:{words}){link}[\s*_]{{0,9}}[:：ঃ]"
    formatted = [
        rf"\\boxed\s*{{{DECORATION}({both}){end}{hedge}",
        rf"{line}{DECORATION}({both}){end}{hedge}{CLOSING}$",
    ]
    loose = [
        rf"(?i:{words}){link}{DECORATION}({upper}){end}{hedge}{ARTICLE}",
        rf"(?i:\b(?:correct|right|best) (?:option|choice|letter)(?:\s{{0,9}}(?:is|:)){{1,2}})"
        rf"{DECORATION}({upper}){end}{hedge}{ARTICLE}",
        rf"(?i:\b(?:option|choice|choose|pick|select|selecting|go with)){DECORATION}({upper}){end}{hedge}"
        r"(?=[\s*_)\]}\"'`$]{0,20}(?i:\.?\Z|is (?:the )?(?:correct|right|best|answer|true)|as (?:the|my) answer))",
        rf"(?<![{WORD_SIGNS}])({upper}){end}[\s*_)\]}}\"'`$]{{0,20}}"
        r"(?i:is (?:the )?(?:correct|right|best) (?:answer|option|choice))",
    ]
    return [re.compile(text) for text in formatted], [re.compile(text) for text in loose]


@cache
def _bare(letters: str) -> tuple[re.Pattern, re.Pattern]:
    """(a text that is nothing but a letter, a letter that opens a line)."""
    wide = "".join(chr(ord(letter) + FULL_WIDTH) for letter in letters)
    other = "".join(sign for sign, letter in OTHER_SCRIPTS.items() if letter in letters)
    one = f"[{letters}{wide}{other}]"
    return (
        re.compile(rf"\A{DECORATION}([{letters.lower()}]|{one}){CLOSING}\Z"),
        re.compile(rf"(?m)^[ \t*_(\[{{\"'`$]{{0,20}}({one})(?![{WORD_SIGNS}])[.):*\]]"),
    )


def _asserted(answer: str, matches: list[re.Match]) -> list[re.Match]:
    """The statements that do not hang on a condition."""
    return [
        found for found in matches
        if not re.search(r"(?i)\bwould\b", found[0]) and not CONDITION.match(answer, found.end(1))
    ]  # fmt: skip


def extract_letter(answer: str, letters: str) -> str | None:
    """The option letter that an answer states, or None. ``letters``: the options that exist, such as "ABCD".

    In order: the last \\boxed{X} or line "Answer: X", whichever is later; the last "answer is X"; "option X" at the end
    or "option X is correct"; "X is the correct answer"; a text that is nothing but a letter; the letter that opens a
    line, if only one does. Two letters ("A or B") are no answer.
    """
    formatted, loose = _patterns(letters)
    found = [match for pattern in formatted for match in pattern.finditer(answer)]
    if found:
        return latin(max(found, key=lambda match: match.start(1))[1])
    for pattern in loose:
        if matches := list(pattern.finditer(answer)):
            return latin((_asserted(answer, matches) or matches)[-1][1])
    alone, opening = _bare(letters)
    if match := alone.match(answer):
        return latin(match[1])
    openers = {latin(letter) for letter in opening.findall(answer)}
    return openers.pop() if len(openers) == 1 else None
