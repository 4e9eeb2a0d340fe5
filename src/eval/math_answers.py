r"""Whether mathematical answers equal the gold ones: `judge_math([(r"\dfrac12", "0.5")])` is [True].

Not a command; it runs itself as a jailed worker, since a hostile expression may take for ever. What an answer is (a number, a
tuple, an interval, a set, a list, a text) is decided here and compared part by part; math-verify (sympy) only says whether two
single expressions are equal. So (1,2) is not (2,1), [0,1) is not (0,1], but 1,2 is 2,1.
"""

from __future__ import annotations

import logging
import os
import re
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from queue import SimpleQueue
from unicodedata import name, normalize

import console
from code_sandbox import side_by_side
from console import UserError
from graders import SCALES, boxes
from sandbox_child import enter_jail, read_frame, write_frame

START_SECONDS = 60.0  # sympy loads in about a second; on a busy machine in ten
MAX_LENGTH = 2000  # characters; no answer of the benchmarks has more than 200
OPENING, CLOSING = "([{", ")]}"
UNITS = (
    r"(?:square|sq|cubic|cu)?\s*(?:mm|cm|dm|km|inch|inches|ft|foot|feet|yd|yards?|miles?|mph|kg|mg|lbs?|pounds?|"
    r"ml|sec|seconds?|min|minutes?|hrs?|hours?|days?|weeks?|months?|years?|units?|degrees?|deg|radians?|rad|"
    r"cents?|dollars?|meters?|metres?|centimeters?|kilometers?|percent)"
)
_REWRITES = tuple(
    (re.compile(pattern), to)
    for pattern, to in (
        (r"(?:\^\s*{?\s*\\circ\s*}?|°)\s*(?:\\(?:text|mathrm)\s*{\s*)?C}?(?![A-Za-z])", r"\\text{ celsius}"),
        (r"(?:\^\s*{?\s*\\circ\s*}?|°)\s*(?:\\(?:text|mathrm)\s*{\s*)?F}?(?![A-Za-z])", r"\\text{ fahrenheit}"),
        (r"(?<=[\w}])\s*\\?%\s*\Z", r"\\text{ percent}"),
        (r"(?<=[\w}])(?:\s*\^\s*{?\s*\\circ\s*}?|\\degree|°)\s*\Z", r"\\text{ degrees}"),
        (r"(?<![\w)}])\*\*|\*\*(?![\w({\\])", ""),
        (r"\\(?:left|right|[bB]ig+[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"\\(?:dfrac|tfrac|cfrac)(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mbox|hbox|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|operatorname)\s*{", r"\\text{"),
        (r"\\(?:lbrace|\{)", "\u27e8"),  # one sign each for set braces, so that LaTeX groups stay distinct
        (r"\\(?:rbrace|\})", "\u27e9"),
        (r"(?<=\d)(?:,|\{,\})\\!(?=\d{3})", ","),  # 10,\!000: how MATH sets thousands
        (r"\A\\?\$\s*(\d[\d.,]*?)\.?\Z", r"\1\\text{ dollars}"),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"(?<!\\)\\[!,;:> ]|~|\\q?quad(?![A-Za-z])", " "),
        (r"\s*\^\s*{?\s*\\circ\s*}?|\\degree(?![A-Za-z])|°", ""),
        (r"\\?[%$]", ""),
        (r"\{,\}", ","),
        (r"[\u2212\u2013]", "-"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
        (r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*{", r"\\frac{\1}{"),
        (r"(\\frac{[^{}]*})\s*(\d)", r"\1{\2}"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    )
)
_NUMBER = re.compile(r"([+-]?)\s*(\d{1,3}(?:,\d{3})+|\d*)(\.\d*)?")
_FRACTION = re.compile(r"([+-]?)\s*(?:(\d+)\s*)?\\frac{\s*([+-]?\d+)\s*}{\s*([+-]?\d+)\s*}")
_RATIO = re.compile(r"([+-]?)(?:(\d+)\s+)?([+-]?\d+)\s*/\s*([+-]?\d+)")
_SCIENTIFIC = re.compile(r"([+-]?)(\d+)(?:\.(\d+))?[eE]([+-]?\d{1,3})")
_POWER_OF_TEN = re.compile(
    r"([+-]?)\s*(?:(\d+)(?:\.(\d+))?\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*\^\s*(?:{\s*([+-]?\d{1,3})\s*}|([+-]?\d{1,3}))"
)
_BASED = re.compile(r"([0-9A-Fa-f]+)_{?(?:\\text{)?(\d+)}*")
_ASSIGNED = re.compile(r"\s*(?:[A-Za-z]|\\[a-z]+)(?:_{?\w+}?)?\s*(?:\(\s*[a-z]\s*\))?\s*(?:=|\\in(?![a-z]))\s*(?=\S)")


_SIGNS: dict[int, str] = str.maketrans({
    "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ",
    "√": r"\sqrt", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "→": r"\to ", "′": "'", "∅": r"\emptyset ",
})  # fmt: skip


def latex(text: str) -> str:
    """Signs of Unicode as LaTeX writes them: π, √, ×, 10⁻³."""
    if text.isascii():
        return text
    text = re.sub("[⁰¹²³⁴-⁹⁺⁻]+", lambda run: f"^{{{normalize('NFKC', run[0])}}}", normalize("NFC", text))
    text = re.sub("[₀-₉]+", lambda run: f"_{{{normalize('NFKC', run[0])}}}", text)
    text = re.sub("[Α-Ωα-ω]", lambda sign: _greek(sign[0]), text)
    return text.translate(_SIGNS)


def _greek(sign: str) -> str:
    word = name(sign).rpartition(" ")[2].replace("LAMDA", "LAMBDA")
    return f"\\{word.title() if sign.isupper() else word.lower()} "


def clean(text: str) -> str:
    """The same answer with one spelling for each sign, without layout and currency signs; several boxes are a list."""
    text = latex(text.strip())
    if len(found := boxes(text)) > 1:
        text = ", ".join(content for _, _, content in found)
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), (r"\boxed{", "}")):
        if text.startswith(opening) and text.endswith(closing) and len(text) >= len(opening) + len(closing):
            text = text[len(opening) : len(text) - len(closing)].strip()
    for pattern, to in _REWRITES:
        text = pattern.sub(to, text)
    text = text.strip().rstrip(".").rstrip("\\").strip()
    return text.replace(" ", "") if re.fullmatch(r"[+-]?\d{1,3}(?: \d{3})+(?:\.\d+)?", text) else text


def split_top(text: str, mark: str = ",") -> list[str]:
    """``text`` cut at the marks that stand outside all brackets. Half-open intervals count as brackets too."""
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        sign = text[place]
        depth += (sign in OPENING or sign == "\u27e8") - (sign in CLOSING or sign == "\u27e9")
        if depth == 0 and text.startswith(mark, place):
            parts.append(text[start:place])
            place += len(mark)
            start = place
        else:
            place += 1
    return [part.strip() for part in [*parts, text[start:]]]


def wrapped(text: str) -> tuple[str, str] | None:
    """(the two outer brackets, what is between) when one pair encloses the whole text."""
    if len(text) < 2 or text[0] not in "([\u27e8" or text[-1] not in ")]\u27e9":
        return None
    depth = 0
    for place, sign in enumerate(text):
        depth += (sign in OPENING or sign == "\u27e8") - (sign in CLOSING or sign == "\u27e9")
        if depth == 0:
            return (text[0] + text[-1], text[1:-1].strip()) if place == len(text) - 1 else None
    return None


def squeezed(text: str) -> str:
    """Without spaces, except that digits on both sides of one do not become one number: 2 1/2 is not 21/2."""
    return re.sub(r"\s+", "", re.sub(r"(?<=\d)\s+(?=\d)", "_", text))


def plain_text(text: str) -> str:
    r"""The words of a text answer: without \text{}, spaces, and brackets around a single letter."""
    text = re.sub(r"\\text\s*{([^{}]*)}", r"\1", text)
    return re.sub(r"\A\((\w)\)\Z", r"\1", squeezed(text))


def exact_number(text: str) -> Fraction | None:
    """The rational number that the whole text is, or None: integers, decimals, a/b, \\frac, mixed numbers."""
    text = text.strip()
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1].strip()
    if (found := _NUMBER.fullmatch(text)) and re.search(r"\d", text):
        sign, whole, decimals = found[1], found[2].replace(",", ""), (found[3] or ".")[1:]
        return Fraction(int((whole or "0") + decimals) * (-1 if sign == "-" else 1), 10 ** len(decimals))
    if found := _FRACTION.fullmatch(text) or _RATIO.fullmatch(text):
        sign, whole, top, bottom = found.groups()
        if not int(bottom):
            return None
        return (Fraction(int(whole or 0)) + Fraction(int(top), int(bottom))) * (-1 if sign == "-" else 1)
    if found := _POWER_OF_TEN.fullmatch(text):
        return Fraction(f"{found[1]}{found[2] or 1}.{found[3] or 0}e{found[4] or found[5]}")
    if found := _SCIENTIFIC.fullmatch(text):
        return Fraction(f"{found[1]}{found[2]}.{found[3] or 0}e{found[4]}")
    return None


def without_units(text: str) -> str:
    r"""The quantity alone: a trailing \text{...}, a known unit, or words after a plain number. Words with digits and
    words that multiply ("3 million") stay."""
    bare = re.sub(r"(?<=[^\s=({\[,+*/^-])\s*\\text\s*{([^{}]*)}(?:\s*\^\s*{?\d}?)?\s*\Z", _unless_scale, text)
    if exact_number(bare) is None:
        bare = re.sub(rf"(?<=[\d}})])\s*{UNITS}(?:\s*\^\s*{{?\d}}?|/\w+)?\s*\Z", "", bare, flags=re.I)
    if found := re.fullmatch(r"([+-]?[\d.,/]*\d)\s+([A-Za-z][A-Za-z\s.'-]+)", bare):
        words = found[2].lower().split()
        variables = any(re.fullmatch("[nxyz]+", word) for word in words)
        if not SCALES & set(words) and not {"or", "and", "to"} & set(words) and not variables:
            bare = found[1]
    return bare.strip()


UNIT_WORDS = {"hr": "hour", "hrs": "hour", "min": "minute", "mins": "minute", "sec": "second", "secs": "second", "lb": "pound",
              "lbs": "pound", "in": "inch", "yr": "year", "yrs": "year", "usd": "dollar", "sq": "square",
              "cu": "cubic", "litre": "liter", "litres": "liter", "units": "unit"}  # fmt: skip


def _unit(text: str) -> tuple[str, ...]:
    """The words of a unit in one spelling: the name that sympy gives it, else the word itself; (power) after it."""
    from sympy.physics import units

    text = re.sub(r"\\text\s*{([^{}]*)}", r" \1 ", text).replace("metre", "meter").replace("mph", "mile/hour")
    text = re.sub(r"\bper\b", "/", re.sub(r"[{}\\.]", " ", text))
    words = []
    for word in re.findall(r"[A-Za-z\u00b5]+|[/^0-9]", text):
        word = UNIT_WORDS.get(word.lower(), word)
        known = getattr(units, word, getattr(units, word.lower() if len(word) > 3 else "", None))
        named = (
            str(known.name) if isinstance(known, units.Quantity) else word.lower().removesuffix("s") if len(word) > 3 else word
        )
        words.append(named)
    for place, word in enumerate(words):
        if word in ("square", "cubic", "squared", "cubed"):
            words = [*words[:place], *words[place + 1 :], "^", "2" if word.startswith("square") else "3"]
            break
    return tuple(word for word in words if word != "unit")


def units_differ(gold: str, answer: str) -> bool:
    """Whether both quantities name a unit, and not the same one: 3 hours is not 3 minutes; "12 red apples" are "12 apples"."""
    bare, other_bare = without_units(gold), without_units(answer)
    one, other = _unit(gold[len(bare) :]), _unit(answer[len(other_bare) :])
    named_more_closely = "".join(one + other).isalpha() and len(one) != len(other) and one[-1:] == other[-1:]
    return bool(one and other) and one != other and not named_more_closely


def same_ratio(gold: list[str], answer: list[str]) -> bool:
    """a:b:c by its members, or in proportion; a time of day (10:30) by its members only."""
    if len(gold) != len(answer):
        return False
    pairs = [(exact_number(one), exact_number(other)) for one, other in zip(gold, answer, strict=True)]
    if all(one and other for one, other in pairs) and not any(re.fullmatch(r"\d\d", part) for part in (*gold[1:], *answer[1:])):
        return len({one / other for one, other in pairs if one and other}) == 1
    return all(equal(one, other) for one, other in zip(gold, answer, strict=True))


def _unless_scale(found: re.Match) -> str:
    return found[0] if SCALES & set(found[1].lower().split()) else ""


def alternatives(text: str) -> list[str]:
    """The members of an answer that lists several: 1, 2 · 1 and 2 · 1 or 2 · 1 \\pm 2."""
    text = re.sub(r"\\text\s*{\s*,?\s*(?:and|or)\s*}|(?<=[\s\d}])(?:and|or)(?=\s)", ",", text)
    parts = [part for part in split_top(text) if part] or [text]
    if len(parts) > 1 and re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", without_units(text)):
        return [text]  # one number with its thousands marked
    spread = []
    for part in parts:
        signs = ("+", "-") if "\\pm" in part else ("",)
        spread += [re.sub(r"\A\s*\+", "", part.replace("\\pm", sign)) for sign in signs]
    return spread


def _without_names(text: str) -> str:
    """(x,y)=(1,2) without its left side, if the names stand in their usual order: (y,x)=(1,2) is another point."""
    found = re.match(r"\(\s*([a-zA-Z](?:\s*,\s*[a-zA-Z]){1,4})\s*\)\s*=\s*(?=\()", text)
    names = re.findall(r"[a-zA-Z]", found[1]) if found else []
    return text[found.end() :] if found and names == sorted(names) else text


def same_members(gold: list[str], answer: list[str]) -> bool:
    """Equal as multisets."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for member in gold:
        match = next((place for place, other in enumerate(left) if equal(member, other)), None)
        if match is None:
            return False
        left.pop(match)
    return True


def equal(gold: str, answer: str) -> bool:
    """Two cleaned answers, by their structure."""
    if not gold or not answer:
        return False
    if "=" not in gold and "\\in " not in gold:
        answer = _ASSIGNED.sub("", answer, count=1) if _ASSIGNED.match(answer) else answer
        answer = _without_names(answer)
    elif "=" not in answer and "\\in " not in answer and _ASSIGNED.match(gold):
        gold = _ASSIGNED.sub("", gold, count=1)
    if squeezed(gold) == squeezed(answer):
        return True
    for union in ("\\cup", "\u222a"):
        gold, answer = gold.replace(union, "\u222a"), answer.replace(union, "\u222a")
    if len(parts := split_top(gold, "\u222a")) > 1:
        return same_members(parts, split_top(answer, "\u222a"))
    members, others = _members(gold), _members(answer)
    if members is None and others is None:
        return _equal_single(_unwrap(gold), _unwrap(answer))
    if members is None or others is None:
        return False
    ordered, kind, inner = members
    ordered_too, other_kind, other_inner = others
    if ordered or ordered_too:
        same = kind == other_kind and len(inner) == len(other_inner)
        return same and all(equal(one, other) for one, other in zip(inner, other_inner, strict=True))
    return same_members(inner, other_inner)


def _members(text: str) -> tuple[bool, str, list[str]] | None:
    """(ordered, brackets, members) of a tuple, interval, set or bare list; None for a single expression."""
    if inside := wrapped(text):
        brackets, inner = inside
        parts = split_top(inner)
        if brackets == "\u27e8\u27e9":
            return False, "", alternatives(inner)
        return (True, brackets, parts) if len(parts) > 1 else None
    several = alternatives(text)
    return (False, "", several) if len(several) > 1 else None


def _unwrap(text: str) -> str:
    while (inside := wrapped(text)) and inside[0] == "()":
        text = inside[1]
    return text


def _equal_single(gold: str, answer: str) -> bool:
    words, other_words = plain_text(gold), plain_text(answer)
    if words == other_words:
        return True
    if (words.isalpha() and len(words) > 2) or ("\\text" in gold and re.fullmatch(r"[A-Za-z][A-Za-z,.'-]+\d*", words)):
        return words.casefold() == other_words.casefold()
    if units_differ(gold, answer):
        return False
    gold, answer = without_units(gold), without_units(answer)
    ratio, other_ratio = split_top(gold, ":"), split_top(answer, ":")
    if len(ratio) > 1 and len(other_ratio) > 1:
        return same_ratio(ratio, other_ratio)
    number, other = exact_number(gold), exact_number(answer)
    if number is not None and other is not None:
        return number == other
    based, other_based = _BASED.fullmatch(gold.replace(" ", "")), _BASED.fullmatch(answer.replace(" ", ""))
    if based:  # the question names the base, so an answer may leave it out
        digits = other_based.groups() if other_based else (answer.replace(" ", ""), based[2])
        return based.groups() == digits
    return same_expression(gold, answer)


_MERGED = re.compile(  # what latex2sympy drops, evaluates or takes for something else; the first two alternatives stay
    r"(?P<stays>\\text\s*{[^{}]*}|\\(?:begin|end)\s*{[^{}]*})"
    r"|\\frac\s*{\s*(?:d|\\partial)[^{}]{0,20}}\s*{\s*(?:d|\\partial)[^{}]{0,20}}"
    r"|(?:\\[A-Za-z]+|[A-Za-z])(?:\s*\^\s*{?\s*(?:\\prime\s*){1,3}}?|'{1,3})"
    r"|\\(?:gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Upsilon|Phi|Psi|Omega|Gamma(?!\s*\())(?![A-Za-z])|(?P<command>\\[A-Za-z]+)|[A-Z]"
)
GREEK = (
    "alpha beta delta epsilon varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega".split()
)


def told_apart(gold: str, answer: str) -> tuple[str, str]:
    """Both expressions with fresh small letters for what the parser would merge: capitals (it lowers them), primes and
    derivatives (it drops them), gamma (it takes it for a function)."""
    used = set("deilop") | set(re.sub(r"\\[A-Za-z]+", "", gold + answer).lower())
    fresh = (letter for letter in "uvwzstrqkjhgfcbamnxy" if letter not in used)
    letters: dict[str, str] = {}

    def renamed(found: re.Match) -> str:
        if found["stays"] or found["command"]:
            return found[0]
        token = re.sub(r"\s", "", found[0])
        if token not in letters:
            letters[token] = next(fresh, found[0])
        return f" {letters[token]}" if found[0].startswith("\\") else letters[token]

    letters_alone = re.compile(r"\\text\s*{(\s*\(?[A-Za-z]\)?\s*)}")
    gold, answer = (letters_alone.sub(r"\1", text) for text in (gold, answer))
    return _MERGED.sub(renamed, gold), _MERGED.sub(renamed, answer)


def _kept(text: str, parsed: object) -> bool:
    """Whether every name in the text is still in what the parser made of it."""
    said, commands = str(parsed).lower(), re.findall(r"\\([A-Za-z]+)", text)
    letters = set(re.findall("[a-z]", re.sub(r"\\text\s*{[^{}]*}|\\(?:begin|end)\s*{[^{}]*}|\\[A-Za-z]+", " ", text))) - set(
        "dei"
    )
    return all(letter in said for letter in letters) and all(word in said for word in commands if word in GREEK)


def same_expression(gold: str, answer: str) -> bool:
    """Whether math-verify shows two single LaTeX expressions to be equal. May take long."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import parse, verify
    from math_verify.parser import LatexExtractionConfig

    # its own removal of units would make 6m equal to 6
    reading = LatexExtractionConfig(normalization_config=NormalizationConfig(units=False, nits=True, malformed_operators=True))

    gold, answer = (text.replace("\u27e8", "\\{").replace("\u27e9", "\\}") for text in (gold, answer))
    gold, answer = told_apart(gold, answer)
    options = {"extraction_config": [reading], "fallback_mode": "no_fallback", "parsing_timeout": None}
    parsed, other = parse(f"${gold}$", **options), parse(f"${answer}$", **options)
    if not (parsed and other and _kept(gold, parsed[0]) and _kept(answer, other[0])):
        return False
    return verify(parsed, other, strict=True, timeout_seconds=None)


def grade_math(answer: str | None, gold: str) -> bool:
    """Whether an extracted answer equals the gold answer."""
    if answer is None or not answer.strip() or len(answer) > MAX_LENGTH:
        return False
    return equal(clean(gold), clean(answer))


# ---- many answers, each with a time limit ----


class MathWorker:
    """One worker process. ``equal`` returns within ``seconds`` (plus a restart after a comparison that took longer)."""

    def __init__(self, seconds: float, memory_mib: int) -> None:
        self.seconds, self.memory_mib = seconds, memory_mib
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        environment = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(console.__file__).parent)
        self.process = subprocess.Popen(
            [sys.executable, "-B", __file__, str(self.memory_mib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, env=environment, start_new_session=True, bufsize=0,
        )  # fmt: skip
        if self.answer(START_SECONDS) != "ready":
            self.stop()
            raise UserError("math answers cannot be graded: their worker does not start; pip install math-verify")
        return self.process

    def answer(self, seconds: float) -> object:
        """What the worker says next, or None when it says nothing in time or has died."""
        assert self.process and self.process.stdout
        poll = select.poll()
        poll.register(self.process.stdout, select.POLLIN)
        if not poll.poll(seconds * 1000):
            return None
        try:
            return read_frame(self.process.stdout.fileno(), 1 << 16)
        except EOFError:
            return None

    def equal(self, answer: str, gold: str) -> bool:
        process = self.process or self.start()
        assert process.stdin
        try:
            write_frame(process.stdin.fileno(), [answer, gold])
            reply = self.answer(self.seconds)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.stop()
        return reply is True

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


def judge_math(
    pairs: Sequence[tuple[str | None, str]], workers: int = 2, seconds: float = 5.0, memory_mib: int = 2048
) -> list[bool]:
    """Verdicts of (answer, gold) pairs in order. An answer that is None is wrong; one that a worker does not judge in time is
    too, and its worker is killed and replaced: `2^{2^{2^{2^{10}}}}` costs its limit and nothing else."""
    idle: SimpleQueue[MathWorker] = SimpleQueue()
    crew = [MathWorker(seconds, memory_mib) for _ in range(min(workers, len(pairs)))]
    for worker in crew:
        idle.put(worker)

    def one(pair: tuple[str | None, str]) -> bool:
        answer, gold = pair
        if answer is None or not answer.strip():
            return False
        worker = idle.get()
        try:
            return worker.equal(answer, gold)
        finally:
            idle.put(worker)

    try:
        return side_by_side(one, pairs, name="math answers", unit="answer", workers=max(1, len(crew)))
    finally:
        for worker in crew:
            worker.stop()


def judge_open(verdicts: list[bool], pairs: Mapping[int, tuple[str | None, str]]) -> list[bool]:
    """``verdicts`` with those at the places of ``pairs`` replaced by what the judge says of them."""
    judged = judge_math(list(pairs.values())) if pairs else []
    found = dict(zip(pairs, judged, strict=True))
    return [found.get(place, verdict) for place, verdict in enumerate(verdicts)]


def verdict_of(answer: str, gold: str) -> bool:
    """A comparison that the libraries cannot finish is not a proof of equality; memory is limited by the jail."""
    try:
        return grade_math(answer, gold)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        NotImplementedError,
        RecursionError,
        TypeError,
        ValueError,
    ):
        return False


def work() -> None:
    """``math_answers.py MEMORY_MIB``: a frame says ready, then one frame [answer, gold] in, one true or false out.

    When its libraries are loaded it enters the sandbox's jail (reads files, computes, nothing else), since the answers are a
    model's and a parser reads them.
    """
    import math_verify  # noqa: F401  loaded before the clock of the first answer starts
    import sympy.physics.units  # noqa: F401

    logging.disable(logging.CRITICAL)  # math-verify logs each answer that it cannot read
    sys.setrecursionlimit(5000)
    enter_jail({"cpu_seconds": 86_400, "memory_mib": int(sys.argv[1])}, os.getppid())
    write_frame(1, "ready")
    while True:
        try:
            answer, gold = read_frame(0)
        except EOFError:
            return
        write_frame(1, verdict_of(answer, gold))


if __name__ == "__main__":
    work()
