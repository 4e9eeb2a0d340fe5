r"""Letters and mathematics: tables of answers that must and must not count. `pytest tests/test_answer_grading.py`."""

import json
import random
import re
import time
from pathlib import Path

import pytest

from code_sandbox import run_many
from graders import extract_code, extract_letter, extract_math, program_of, split_thinking
from math_answers import judge_math
from runner import get_benchmarks
from sample_log import read_samples

REPO = Path(__file__).resolve().parent.parent
DATA = REPO.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="benchmark files are not part of the repository")

LETTERS = [
    ("The answer is D. Option A ignores friction.", "D"),  # prose after the answer
    ("Answer: B\n\nNote that the answer is A if friction is considered.", "B"),
    ("The final answer is $\\boxed{B}$. A is wrong.", "B"),
    ("Option B is correct; option A is not.", "B"),
    ("C is the correct answer because A fails.", "C"),
    ("A. wrong\nB. right\nC. wrong", None),
    ("B. because water boils", "B"),
    ("The answer is A or B.", None),
    ("Answer: A and C", None),
    ("The answer is not B.", None),
    ("answer: A good one", None),
    ("The answer is (c).", None),
    ("Answer: b", "B"),
    ("ANSWER: $C$", "C"),
    ("**Final Answer: C**", "C"),
    ("The answer is $\\mathbf{D}$", "D"),
    ("Answer: B) Paris", "B"),
    ("The answer is B. Paris is the capital.", "B"),
    ("I choose option D.", "D"),
    ("\\boxed{A} is tempting, but the result is \\boxed{\\text{(C)}}", "C"),
    ("The best answer is therefore not here", None),
    ("Answers differ: A, B and C all have merit", None),
    ("الإجابة: ب", "B"),
    ("الإجابة الصحيحة هي: ج", "C"),
    ("الإجابة هي د.", "D"),
    ("الجواب بسيط", None),  # begins with the letter, but is a word
    ("উত্তর: অ", "A"),
    ("উত্তরঃ B", "B"),
    ("উত্তর: ঢ", "D"),
    ("答案：B", "B"),
    ("答案是C，因为", "C"),
    ("答案：Ｃ", "C"),
    ("答え：Ｄ", "D"),
    ("答えはBです。", "B"),
    ("정답: C", "C"),
    ("정답은 B입니다.", "B"),
    ("उत्तर: D", "D"),
    ("सही उत्तर B है।", "B"),
    ("Die richtige Antwort ist B.", "B"),
    ("La respuesta correcta es B.", "B"),
    ("La risposta corretta è C.", "C"),
    ("La bonne réponse est D.", "D"),
    ("Réponse : B", "B"),
    ("A resposta correta é C.", "C"),
    ("Jawaban yang benar adalah C.", "C"),
    ("Jibu sahihi ni A.", "A"),
    ("Ìdáhùn: B", "B"),
    ("Answer: A (B is wrong)", "A"),  # the word "a" of one language is no link before a letter in another
    ("The answer is A (B is a distractor).", "A"),
    ("Answer: AB", None),
    ("\\boxed{A, C}", None),
    ("\\boxed{A \\text{ and } C}", None),
    ("Answer: A, B", None),
    ("Answer: B und C", None),
    ("答案：A和B", None),
    ("The answer is A, B is wrong.", "A"),
    ("The answer is D. If we ignored friction, the answer would be A.", "D"),
    ("The answer is D. The answer is A only if friction is ignored.", "D"),
    ("If all of this holds, the answer would be C.", "C"),
    ("The correct option is (B).", "B"),
    ("The right choice is C, since D fails.", "C"),
    ("The answer is definitely D.", "D"),
    ("答案是（B）。", "B"),
    ("La réponse est la lettre B.", "B"),
]


@pytest.mark.parametrize("answer,letter", LETTERS)
def test_letters(answer: str, letter: str | None) -> None:
    assert extract_letter(answer, "ABCD") == letter


def test_long_repetitions_cost_nothing() -> None:
    started = time.monotonic()
    for unit in (
        "*",
        " ",
        "\n",
        "* ",
        "answer ",
        "Answer: ",
        "answer is ",
        "The answer is A or ",
        "(",
        "\\boxed{",
        "```\n",
        "은 ",
        "#### ",
    ):
        text = "Answer" + unit * (60_000 // len(unit)) + "x"
        extract_letter(text, "ABCDEFGHIJ")
        extract_math(text)
        extract_code(text, "f")
    assert time.monotonic() - started < 20


def test_ten_options() -> None:
    assert extract_letter("the answer is (J).", "ABCDEFGHIJ") == "J"
    assert extract_letter("I think the answer is I think hard to say", "ABCDEFGHIJ") is None


EQUAL = [
    ("\\dfrac{1}{2}", "\\frac{1}{2}"),
    ("\\frac12", "0.5"),
    ("1/2", "\\frac{1}{2}"),
    ("2\\frac{1}{2}", "2.5"),
    ("-\\tfrac{3}{4}", "-0.75"),
    ("90^\\circ", "90"),
    ("90^{\\circ}", "90"),
    ("90 degrees", "90"),
    ("\\$18", "18"),
    ("50\\%", "50"),
    ("1{,}234", "1234"),
    ("1,234.00", "1234"),
    ("12 apples", "12"),
    ("5\\text{ cm}", "5"),
    ("15\\mbox{ cm}^2", "15"),
    ("3 square feet", "3"),
    ("25 mph", "25"),
    ("x = 5", "5"),
    ("5", "x=5"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("2,1", "1,2"),
    ("\\{2, 1\\}", "1,2"),
    ("1 \\text{ and } 2", "1,2"),
    ("1 or 2", "2, 1"),
    ("1 \\pm \\sqrt{19}", "1-\\sqrt{19},1+\\sqrt{19}"),
    ("\\left(3,\\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
    ("(-\\infty, 2) \\cup (3,\\infty)", "(3,\\infty)\\cup(-\\infty,2)"),
    ("\\sqrt{117}", "3\\sqrt{13}"),
    ("(x+1)^2", "x^2+2x+1"),
    ("2x+3=y", "y=2x+3"),
    ("\\text{Evelyn}", "Evelyn"),
    ("evelyn", "\\text{Evelyn}"),
    ("C", "\\text{(C)}"),
    ("4210", "4210_{5}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}"),
    ("6 - 5i", "6-5i"),
    ("11\\sqrt2", "11\\sqrt{2}"),
    ("$\\pi$", "\\pi"),
    ("p-q.", "p - q"),
    ("2 1/2", "\\frac{5}{2}"),
    ("1\\,234\\,567", "1234567"),
    ("ba", "ab"),
    ("x = 5 or x = 6", "5,6"),
    ("3 \\times 10^8", "300000000"),
    ("3e8", "300000000"),
    ("1.5E-2", "0.015"),
    ("10080", "10,\\!080"),
    ("10,\\!080", "10080"),
    ("\\varnothing", "\\emptyset"),
    ("(x, y) = (1, 2)", "(1,2)"),
]
UNEQUAL = [
    ("1,2", "12"),
    ("-5", "5"),
    ("(2,1)", "(1,2)"),
    ("[0,1)", "(0,1]"),
    ("[0,1]", "(0,1)"),
    ("(1,2)", "\\{1,2\\}"),
    ("1,2,2", "1,2"),
    ("3 million", "3"),
    ("0.333", "\\frac{1}{3}"),
    ("1000000000000000", "1000000000000001"),
    ("q-p", "p-q"),
    ("\\frac{14}{4}", "\\frac{14}{3}"),
    ("\\text{Evelina}", "\\text{Evelyn}"),
    ("4210_6", "4210_5"),
    ("\\text{June 21}", "\\text{June 20}"),
    ("B", "\\text{(C)}"),
    ("(3,\\frac{\\pi}{3})", "(3,\\frac{\\pi}{2})"),
    ("", "0"),
    ("5 or 6", "5"),
    ("1 \\pm \\sqrt{18}", "1 \\pm \\sqrt{19}"),
    ("\\begin{pmatrix}1\\\\3\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("x > 3", "x < 3"),
    ("2x", "x"),
    ("5 + ", "6"),
    ("__import__('os')", "1"),
    (None, "1"),
    ("9" * 5000, "9"),
    ("[1,2,3,4,5", "1"),
    ("\\frac{1}{0}", "0"),
    ("3.14", "\\pi"),
    ("10^{15}+1", "10^{15}"),
    ("2 1/2", "21/2"),
    ("1 2", "12"),
    ("6", "6m"),
    ("6s", "6m"),
    ("2 pi", "2"),
    ("5 squared", "5"),
    ("5 times x", "5"),
    ("2 xy", "2"),
    ("3e7", "300000000"),
    ("(y, x) = (1, 2)", "(1,2)"),
]


def test_mathematics_equal() -> None:
    wrong = [pair for pair, verdict in zip(EQUAL, judge_math(EQUAL), strict=True) if not verdict]
    assert not wrong


def test_mathematics_unequal() -> None:
    wrong = [pair for pair, verdict in zip(UNEQUAL, judge_math(UNEQUAL), strict=True) if verdict]
    assert not wrong
    assert len(LETTERS) + len(EQUAL) + len(UNEQUAL) >= 110


def test_expression_that_never_ends_costs_its_limit_only() -> None:
    tower = "2^{2^{2^{2^{2^{10}}}}}"
    started = time.monotonic()
    assert judge_math([(tower, "7 x"), ("\\sqrt{4}", "2"), ("9" * 1900 + "!", "x")], workers=1, seconds=1.5) == [
        False,
        True,
        False,
    ]
    assert time.monotonic() - started < 60


def test_extracted_mathematics() -> None:
    assert extract_math("so \\boxed{\\frac{1}{2}}. Done with 7.") == "\\frac{1}{2}"
    assert extract_math("He has 5.\n#### 18") == "18"
    assert extract_math("**The final answer is: 42.**") == "42"
    assert extract_math("Answer: 3.5\n") == "3.5"
    assert extract_math("I count 7 and 8.") is None


def test_code_keeps_what_the_prompt_gives() -> None:
    prompt = "import math\n\ndef half(x):\n    return x / 2\n\ndef f(x):\n    '''doc'''\n"
    whole = extract_code("1. Code:\n   ```python\n   def f(x):\n       return half(math.floor(x))\n   ```", "f")
    body = extract_code("```\nreturn half(math.floor(x))\n```", "f")
    unclosed = extract_code("```python\ndef f(x):\n    return half(math.floor(x))", "f")
    jobs = [(program_of(prompt, code, "f"), "assert f(5.5) == 2.5") for code in (whole, body, unclosed)]
    assert [verdict.reason for verdict in run_many(jobs)] == ["passed"] * 3


def test_time_for_each_test() -> None:
    program = "import time\ndef f(x): time.sleep(x); return x"
    slow, quick = ["assert f(0) == 0", "assert f(3) == 3"], ["assert f(0.2) == 0.2"] * 6
    verdicts = run_many([(program, slow), (program, quick)], timeout_s=20, test_timeout_s=0.8)
    assert [verdict.reason for verdict in verdicts] == ["timeout", "passed"]


def test_old_verdicts_stay() -> None:
    """A sample of the recorded runs: the graders of today give the verdicts of then."""
    rng, seen = random.Random(0), 0
    for path in sorted((REPO / "results/eval").glob("*.samples.jsonl*")):
        rows = read_samples(path)[1]
        if rows[0]["benchmark"] not in {"tiny_know", "tiny_math", "tiny_reason", "tiny_code"}:
            continue  # pictures: tests/test_mm_eval.py
        rows = rng.sample(rows, 120)
        for task in get_benchmarks(["tiny_know", "tiny_math", "tiny_reason", "tiny_code"]):
            mine = [row for row in rows if row["benchmark"] == task.name][:: 4 if task.name == "tiny_code" else 1]
            items = {item.id: item for item in task.load(1000)}
            answers = [split_thinking(row["text"])[1] if row["finish_reason"] == "stop" else None for row in mine]
            chosen = [items[row["id"]] for row in mine]
            extracted = [None if text is None else task.extract(item, text) for item, text in zip(chosen, answers, strict=True)]
            assert extracted == [row["extracted"] for row in mine]
            assert task.grade_all(chosen, extracted) == [row["correct"] for row in mine]
            seen += len(mine)
    assert seen > 400


def mutations(gold: str) -> list[str]:
    """Wrong answers close to a gold one: off by one at the last and first number, the other sign, swapped members."""
    numbers, wrong = list(re.finditer(r"\d+", gold)), []
    for found in {numbers[0].start(): numbers[0], numbers[-1].start(): numbers[-1]}.values() if numbers else ():
        if not re.search(r"\\(?:text|mbox){[^}]*}\^\Z", gold[: found.start()]):  # the exponent of a unit is not the answer
            wrong.append(gold[: found.start()] + str(int(found[0]) + 1) + gold[found.end() :])
    if gold != "0":
        wrong.append(gold[1:] if gold.startswith("-") else "-" + gold)
    pair = re.fullmatch(r"(\\left)?\(([^,()]+),([^,()]+?)(\\right)?\)", gold)
    if pair and pair[2].strip() != pair[3].strip():
        wrong.append(f"({pair[3].strip()},{pair[2].strip()})")
    return wrong


@needs_data
@pytest.mark.parametrize("name,file,n", [("math500", "math500.jsonl", 500), ("gsm8k", "gsm8k_test.jsonl", 1319)])
def test_golds_pass_and_mutations_do_not(name: str, file: str, n: int, tmp_path: Path) -> None:
    (tmp_path / f"{name}.jsonl").symlink_to(DATA / file)
    benchmark = get_benchmarks([name], tmp_path)[0]
    items = benchmark.load()
    assert len(items) == n

    def verdicts(answers: list[tuple[int, str]]) -> list[bool]:
        chosen = [items[i] for i, _ in answers]
        extracted = [benchmark.extract(item, text) for item, (_, text) in zip(chosen, answers, strict=True)]
        return benchmark.grade_all(chosen, extracted)

    right = [(i, f"Thus the answer is \\boxed{{{item.gold}}}.") for i, item in enumerate(items)]
    assert sum(verdicts(right)) == n
    wrong = [(i, f"Thus \\boxed{{{text}}}.") for i, item in enumerate(items) for text in mutations(item.gold)]
    accepted = [wrong[k] for k, verdict in enumerate(verdicts(wrong)) if verdict]
    assert len(wrong) > n and not accepted
    if name == "gsm8k":
        solutions = [json.loads(line)["answer"] for line in (DATA / file).read_text().splitlines()]
        assert all(verdicts(list(enumerate(solutions))))
