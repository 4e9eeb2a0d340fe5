"""What quantization does to the way a model reasons, from two sample logs: pure functions of strings and numbers.

Not a command. Quantized reasoners doubt what is right and go on (arXiv 2606.00206). Of each answer: its length, whether it was
cut, whether it ends in a loop, whether it states a right answer that it never emits, and its words of self-correction. Each is
compared over the same items. A log that lacks a field leaves the measures of that field None, "not recorded".
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graders import boxes, extract_letter, extract_math, parse_integer
from intervals import bounds, paired_interval, resampled
from math_answers import judge_math

LOOP_CHARACTERS, LOOP_TIMES, PROBE = 200, 3, 64
LETTERS = "ABCDEFGHIJ"
# English words that open another branch. "wait", "but" and "alternatively" are named by arXiv 2606.00206, which penalizes fifty
# such tokens; the others are ours.
WAITS = (
    "wait", "but", "alternatively", "hmm+", "hold on", "actually", "however", "maybe", "perhaps", "on second thought",
    "double[- ]check", "re-?check", "let me (?:check|verify|re-?think|re-?read|re-?consider)",
)  # fmt: skip
_WAITS = re.compile(rf"(?i)\b(?:{'|'.join(WAITS)})\b")
_STATING = re.compile(r"(?i)\banswer\b|\\boxed|####")
# Measure -> (heading, unit behind the two values, factor, digits). All but the length and the words are shares of the answers.
MEASURES = {
    "length": ("length", "", 1, 1),
    "truncated": ("cut", "%", 100, 1),
    "loops": ("loops", "%", 100, 1),
    "unemitted": ("right, not emitted", "%", 100, 1),
    "waits": ("waits an answer", "", 1, 2),
    "wait_rate": ("waits in 1,000", "", 1000, 2),
}
Row = Mapping[str, Any]


def loop_period(text: str) -> int | None:
    """The period in characters of the loop that a text ends in, or None: the least p for which its last max(3 p, 200)
    characters repeat every p. The cut may fall within a turn. Loops that count or vary ("Step 41", "Step 42") are none."""
    size, end = len(text), len(text) - 1
    while (place := text.rfind(text[-PROBE:], 0, end)) >= 0:  # a turn earlier the last characters stand there too
        period, end = size - PROBE - place, place + PROBE - 1
        span = max(LOOP_TIMES * period, LOOP_CHARACTERS)
        if span > size:
            return None
        if text[size - span : size - period] == text[size - span + period :]:
            return period
    return None


def count_waits(text: str) -> int:
    """Words of self-correction (WAITS), whole words in any case."""
    return len(_WAITS.findall(text))


def stated(text: str, gold: str) -> list[str]:
    """The different answers that lines of a text state, as the graders find them: the letter of "the answer is B" where the
    gold answer is one, else boxes and what follows "answer is". A letter or number that only occurs is none."""
    lines = [line for line in text.splitlines() if _STATING.search(line)]
    if len(gold) == 1 and gold in LETTERS:
        found = [extract_letter(line, LETTERS) for line in lines]
    else:
        found = [*(content for *_, content in boxes(text)), *map(extract_math, lines)]
    return list(dict.fromkeys(answer for answer in found if answer))


def right_but_unemitted(rows: Sequence[Row]) -> list[float | None]:
    """For each answer 1 if no final answer was found in it (it was cut, its thought never ended) though it states a right one,
    else 0; None where the log does not tell, or a program is asked for. Mathematics is judged as the benchmarks judge it."""
    made: list[float | None] = []
    pairs: list[tuple[str, str]] = []
    places: list[int] = []
    for place, row in enumerate(rows):
        gold = (row.get("gold") or "").strip()
        known = gold and "\n" not in gold and "extracted" in row and row.get("text") is not None
        answers = stated(row["text"], gold) if known and row["extracted"] is None else []
        whole = parse_integer(gold)
        right = any(a.casefold() == gold.casefold() or whole is not None and parse_integer(a) == whole for a in answers)
        made.append(float(right) if known else None)
        if whole is None and not right and re.search(r"[\d\\]", gold):
            pairs += [(answer, gold) for answer in answers]
            places += [place] * len(answers)
    for place, right in zip(places, judge_math(pairs) if pairs else (), strict=True):
        made[place] = max(made[place], float(right))
    return made


def measured(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """{measure: its value for each answer, None where the log lacks the field}."""
    texts = [row.get("text") for row in rows]
    return {
        "tokens": [row.get("tokens") for row in rows],
        "words": [None if text is None else len(text.split()) for text in texts],
        "truncated": [float(row["finish_reason"] != "stop") if row.get("finish_reason") else None for row in rows],
        "loops": [None if text is None else float(loop_period(text) is not None) for text in texts],
        "unemitted": right_but_unemitted(rows),
        "waits": [None if text is None else float(count_waits(text)) for text in texts],
    }


def drift(pairs: Sequence[tuple[Sequence[Row], Sequence[Row]]]) -> dict[str, dict[str, Any] | None]:
    """{measure of MEASURES: means of both models and their difference, other minus base} from the samples of each item,
    (base's, other's); None where no item has the measure on both sides, and ``n`` counts those that have.

    Means are over items of the mean of an item's samples. Intervals are of 95 %: of shares Tango's, as for accuracies, since a
    bootstrap of a loop that never occurred says 0 to 0; of the length (with the ratio of the means), words and words in a
    thousand tokens a percentile bootstrap over items.
    """
    sides = []
    for side in zip(*pairs, strict=True):
        values, ends = measured([row for rows in side for row in rows]), np.cumsum([len(rows) for rows in side])
        parts = [slice(end - len(rows), end) for rows, end in zip(side, ends, strict=True)]
        sides.append({
            key: np.array([np.nan if None in own[part] else np.mean(own[part]) for part in parts])
            for key, own in values.items()
        })  # fmt: skip

    def both(key: str) -> np.ndarray:
        """[2, items] of the items that have the measure on both sides."""
        found = np.stack([side[key] for side in sides])
        return found[:, ~np.isnan(found).any(0)]

    unit = "tokens" if both("tokens").size else "words"
    made: dict[str, dict[str, Any] | None] = {"length": resampled_means(both(unit), unit)}
    for key in ("truncated", "loops", "unemitted"):
        shares = both(key)
        if made.setdefault(key, None) is None and shares.size:
            difference, low, high = paired_interval(*shares)
            made[key] = {"n": shares.shape[1], "base": float(shares[0].mean()), "other": float(shares[1].mean())}
            made[key] |= {"difference": difference, "low": low, "high": high}
    made["waits"] = resampled_means(both("waits"))
    stacked = np.stack([np.stack([side["waits"], side[unit]]) for side in sides], 1)  # [waits and length, 2, items]
    stacked = stacked[..., ~np.isnan(stacked).any((0, 1)) & (stacked[1] > 0).all(0)]
    made["wait_rate"] = resampled_means(stacked[0], unit, stacked[1])
    return made


def resampled_means(values: np.ndarray, unit: str = "", over: np.ndarray | None = None) -> dict[str, Any] | None:
    """Means of ``values`` [2, items] and their difference with a bootstrap interval over items; with ``over`` [2, items] sums
    of the first over sums of the second, else with a ``unit`` also the ratio of the two means."""
    items = values.shape[1]
    if not items:
        return None
    weights = resampled([0] * items)
    base, other = (values @ weights.T) / (np.full(len(weights), items) if over is None else over @ weights.T)
    difference, low, high = bounds(other - base)
    made = {"n": items, "base": float(base[0]), "other": float(other[0]), "difference": difference, "low": low, "high": high}
    if unit:
        made["unit"] = unit
    if unit and over is None and (base > 0).all():
        made["ratio"], made["ratio_low"], made["ratio_high"] = bounds(other / base)
    return made


def direction(m: Mapping[str, Any] | None) -> str:
    """Whether there is more or less of a measure; nothing where its interval holds no change, or it is not recorded."""
    if m is None:
        return ""
    low, high, none = (m["ratio_low"], m["ratio_high"], 1) if "ratio" in m else (m["low"], m["high"], 0)
    return "more" if low > none else "less" if high < none else ""


def described(name: str, m: Mapping[str, Any] | None) -> tuple[str, str]:
    """(both values, difference or ratio with its interval) of a measure, as tables show them."""
    if m is None:
        return "not recorded", ""
    _, unit, factor, digits = MEASURES[name]
    values = f"{factor * m['base']:,.{digits}f} -> {factor * m['other']:,.{digits}f}"
    values = " ".join(filter(None, (values, unit or m.get("unit", ""))))
    if "ratio" in m:
        return values, f"x {m['ratio']:.2f} [{m['ratio_low']:.2f}, {m['ratio_high']:.2f}]"
    return values, f"{factor * m['difference']:+.{digits}f} [{factor * m['low']:+.{digits}f}, {factor * m['high']:+.{digits}f}]"
