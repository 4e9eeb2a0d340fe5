"""How reasoning drifts between two models: what of an answer is counted, in pairs, through the logs and the comparison."""

import json

import numpy as np
import pytest
from conftest import log_row, write_evaluation

from reasoning import (
    LOOP_CHARACTERS,
    LOOP_TIMES,
    MEASURES,
    count_waits,
    described,
    drift,
    loop_period,
    right_but_unemitted,
    stated,
)

PROSE = "".join(f"Step {n}: {n} times {n} is {n * n}, which is less than {n * n + 7}. " for n in range(60))


def slow_period(text):
    for period in range(1, len(text) // LOOP_TIMES + 1):
        span = max(LOOP_TIMES * period, LOOP_CHARACTERS)
        if span <= len(text) and all(text[i] == text[i - period] for i in range(len(text) - span + period, len(text))):
            return period
    return None


@pytest.mark.parametrize(
    "text,period",
    [
        ("", None),
        (PROSE, None),  # it counts: no two turns are alike
        (PROSE + "2" * 199, None),
        (PROSE + " " + "2" * 200, 1),
        (PROSE + "\n" * 300, 1),
        (PROSE + "Wait, let me check that again. " * 7, 31),
        (PROSE + "Wait, let me check that again. " * 7 + "Wait, let me ch", 31),  # cut within a turn
        (PROSE + "Wait, let me check that again. " * 7 + "So the answer is 4.", None),  # it found its way out
        (PROSE * 2, None),  # said twice is no loop yet
        (PROSE * 3, len(PROSE)),
        (("ab" * 50 + "c") * 2 + "ab" * 50 + "d", None),
    ],
)
def test_a_loop_is_a_period_at_the_end(text, period):
    assert loop_period(text) == period == slow_period(text)


def test_loops_of_random_texts_are_those_of_the_slow_search():
    rng, found = np.random.default_rng(0), set()
    for _ in range(300):
        turn = "".join(rng.choice(list("ab"), rng.integers(1, 120)))
        text = "".join(rng.choice(list("ab"), rng.integers(0, 150))) + turn * int(rng.integers(1, 6))
        assert loop_period(text) == slow_period(text), text
        found.add(loop_period(text) is None)
    assert found == {True, False}


def test_words_of_self_correction_are_whole_words_in_any_case():
    text = "Wait, but... WAIT! Hmmm. Let me re-think; butter awaits a rebut. Actually, maybe. Let me double-check. Recheck."
    assert count_waits(text) == 9
    assert count_waits("so x = 4, and therefore the answer is 4") == 0


@pytest.mark.parametrize(
    "text,gold,right",
    [
        ("So the answer is B.\nWait, let me look again at C", "B", 1),
        ("So the answer is C.\nWait", "B", 0),
        ("A. water\nB. oil\nC. sand\nOption B looks plausible", "B", 0),  # it only discusses the option
        ("3 + 4 = 7, and 7 * 2 = 14", "14", 0),  # a number that occurs is no statement
        ("thus \\boxed{14}. But wait, \\boxed{15}?", "14", 1),
        ("so the answer is 1,014.0. Hmm", "1014", 1),
        ("The answer is $\\frac{2}{4}$. Hmm", "\\frac{1}{2}", 1),
        ("The answer is $\\frac{2}{3}$. Hmm", "\\frac{1}{2}", 0),
        ("The answer is Yes. But maybe", "yes", 1),
        ("answer: def f(): return 1", "def f():\n    return 1", None),  # tests judge programs
        (None, "B", None),
    ],
)
def test_a_right_answer_that_was_there_and_not_emitted(text, gold, right):
    row = {"text": text, "gold": gold, "extracted": None}
    assert right_but_unemitted([row]) == [right]
    emitted = right_but_unemitted([row | {"extracted": "B"}])
    assert emitted == [None if right is None else 0], "what was emitted, right or wrong, does not count"
    assert right_but_unemitted([{"text": text, "gold": gold}]) == [None]


def test_what_the_lines_of_a_thought_state():
    text = "I think the answer is A.\nNo: \\boxed{D}.\nThe answer is D, since A is wrong."
    assert stated(text, "A") == ["A", "D"]
    assert stated("the answer is 3.\n\\boxed{4}", "4") == ["4", "3"]


def row(n, **more):
    return log_row("tiny_math", n, tokens=100, text="so \\boxed{4}") | more


def test_drift_is_over_the_items_that_both_logs_tell_of():
    """Two samples an item count as their mean; the second model's cut answers loop."""
    loop = {"tokens": 300, "finish_reason": "length", "extracted": None}
    loop["text"] = "The answer is 4.\n" + "Wait, but maybe. " * 40
    pairs = [([row(n), row(n)], [row(n), row(n) | (loop if n < 30 else {})]) for n in range(100)]
    made = drift(pairs)
    assert made.keys() == MEASURES.keys() and all(m["n"] == 100 for m in made.values())
    length = made["length"]
    assert (length["base"], length["other"], length["unit"], length["ratio"]) == (100, 130, "tokens", 1.3)
    assert 1 < length["ratio_low"] < 1.3 < length["ratio_high"] < 1.5
    for key in ("truncated", "loops", "unemitted"):
        assert (made[key]["base"], made[key]["other"]) == (0, 0.15) and made[key]["low"] > 0, key
    assert made["waits"]["other"] == pytest.approx(0.15 * 120) and made["waits"]["low"] > 0
    assert made["wait_rate"]["other"] == pytest.approx(0.15 * 120 / 130)  # waits over tokens, not a mean of shares
    swapped = drift([(b, a) for a, b in pairs])
    assert swapped["length"]["ratio"] == pytest.approx(1 / 1.3) and swapped["loops"]["high"] < 0
    assert described("loops", made["loops"])[0] == "0.0 -> 15.0 %"
    assert described("length", length)[0] == "100.0 -> 130.0 tokens"
    same = drift([(a, a) for a, _ in pairs])
    assert same["loops"]["low"] < 0 < same["loops"]["high"], "of none in 100 an interval of 0 to 0 is too sure"


@pytest.mark.parametrize(
    "field,measures",
    [
        ("finish_reason", {"truncated"}),
        ("text", {"loops", "unemitted", "waits", "wait_rate"}),
        ("extracted", {"unemitted"}),
        ("gold", {"unemitted"}),
    ],
)
def test_a_field_that_one_log_lacks_is_not_recorded_and_no_zero(field, measures):
    lacking = [{key: value for key, value in row(n).items() if key != field} for n in range(20)]
    made = drift([([row(n)], [lacking[n]]) for n in range(20)])
    assert {name for name, m in made.items() if m is None} == measures
    assert all(described(name, made[name]) == ("not recorded", "") for name in measures)
    partly = drift([([row(n)], [lacking[n] if n < 5 else row(n)]) for n in range(20)])
    assert {name for name, m in partly.items() if m["n"] == 15} == measures


def test_without_tokens_lengths_are_words():
    bare = [{key: value for key, value in row(n, text="one two three").items() if key != "tokens"} for n in range(9)]
    made = drift([([row(n, text="one two")], [bare[n]]) for n in range(9)])
    assert (made["length"]["unit"], made["length"]["base"], made["length"]["ratio"]) == ("words", 2, 1.5)


def test_the_comparison_of_two_logs_tells_it(tmp_path, command):
    cut = {"tokens": 400, "finish_reason": "length", "extracted": None, "correct": False}
    loop = {"text": "The answer is 4.\n" + "Wait, is it? " * 30}
    write_evaluation(tmp_path, "base", [row(n) for n in range(60)])
    write_evaluation(tmp_path, "low", [row(n) | (cut | loop if n < 20 else {}) for n in range(60)])
    done = command("src/eval/compare_tags.py", "base", "low", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {line.rpartition("  tiny_math  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert "100.0 -> 200.0 tokens" in rows["length"] and "x 2.00 [" in rows["length"] and rows["length"].endswith(" 60")
    assert "0.0 -> 33.3 %" in rows["loops"] and "0.0 -> 33.3 %" in rows["right, not emitted"]
    made = json.loads((tmp_path / "compare/base__low.json").read_text())["metrics"]["tiny_math"]["reasoning"]
    assert made["truncated"]["difference"] == pytest.approx(1 / 3) and made["truncated"]["low"] > 0
    program = {"gold": "def f():\n    return 4"}
    for tag in ("one", "two"):
        write_evaluation(tmp_path, tag, [row(n) | program for n in range(9)])
    done = command("src/eval/compare_tags.py", "one", "two", "--results", tmp_path)
    assert "right, not emitted  tiny_math  not recorded" in done.stdout, done.stdout
