"""Every published benchmark on small rows of its published shape, offline. `pytest tests/test_bench8_loaders.py`."""

import base64
import gzip
import json
import pickle
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench8_loaders import MMMLU_LANGUAGES, TEXT_BENCHMARKS, bbeh_match
from console import UserError
from runner import get_benchmarks
from task import Source, download, stratified
from task_text import Item
from tasks_code import HumanEval, decode_tests, same_output, unpickle_str

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="benchmark files are not part of the repository")


def packed(tests: list[dict]) -> str:
    """As LiveCodeBench publishes private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def test_case(given: str, want: str, kind: str) -> dict:
    return {"input": given, "output": want, "testtype": kind}


test_case.__test__ = False  # type: ignore[attr-defined]
PRO = {
    "question_id": 7,
    "question": "What is 2+2?",
    "options": ["1", "4", "N/A"],
    "answer": "B",
    "category": "math",
    "cot_content": "",
}
SHOT = PRO | {"cot_content": "A: Let's think step by step. It is 4. The answer is (B)."}
MMMLU = {"Question": "2+2?", "A": "1", "B": "4", "C": "5", "D": "6", "Answer": "B", "Subject": "arithmetic"}
GPQA = {"Record ID": "rec1", "Question": "Q?", "Correct Answer": "right\n"} | {
    f"Incorrect Answer {k}": f"w{k}" for k in (1, 2, 3)
}
STDIN = {
    "question_id": "abc1",
    "question_content": "Add.",
    "starter_code": "",
    "difficulty": "easy",
    "contest_date": "2025-02-01T00:00:00",
    "public_test_cases": json.dumps([test_case("1 2\n", "3\n", "stdin")]),
    "private_test_cases": packed([test_case("5 6", "11.0", "stdin")]),
    "metadata": "{}",
}
FUNCTIONAL = STDIN | {
    "question_id": "3701",
    "starter_code": "class Solution:\n    def add(self, a: List[int]) -> int:\n        ",
    "difficulty": "hard",
    "public_test_cases": json.dumps([test_case("[1, 2]", "[1, 3]", "functional")]),
    "private_test_cases": packed([test_case("[]", "[]", "functional")]),
    "metadata": json.dumps({"func_name": "add"}),
}
HLE = {"id": "h1", "question": "Q?", "image": "", "answer": "42", "answer_type": "exactMatch", "category": "Math"}
ROWS = {
    "mmlu_pro": [PRO],
    "mmlu_pro_validation": [SHOT] * 5,
    "gpqa": [GPQA],
    **{f"mmmlu_{language}": [MMMLU] for language in MMMLU_LANGUAGES},
    "bbeh": [
        {"input": f"{task} {k}", "target": "(a)", "task": task, "mini": k == 0} for task in ("t1", "t2") for k in (0, 1, 1)
    ],
    "gsm8k": [{"question": "1+1?", "answer": "1+1=<<1+1=2>>2\n#### 2"}],
    "math500": [
        {
            "problem": "1/2?",
            "answer": "\\frac{1}{2}",
            "unique_id": "test/algebra/1.json",
            "level": 1,
            "subject": "Algebra",
            "solution": "",
        }
    ],
    "aime": [{"id": "0", "problem": "p", "answer": "025"}],
    "aime2026": [{"id": "0", "problem": "p", "answer": 25}],
    "hmmt": [{"problem_idx": 1, "problem": "p", "answer": "\\sqrt{2}", "problem_type": ["Algebra"]}],
    "hmmt_nov": [{"problem_idx": 1, "problem": "p", "answer": "7", "problem_type": ["Algebra"]}],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": "import math\ndef f(x):\n    '''floor'''\n",
            "canonical_solution": "    return math.floor(x)\n",
            "test": "def check(candidate):\n    assert candidate(1.5) == 1\n",
            "entry_point": "f",
        }
    ],
    "mbpp": [
        {
            "task_id": t,
            "text": "double",
            "code": "def g(x): return 2 * x",
            "test_list": ["assert set([g(2)]) == {4}"],
            "test_setup_code": "",
        }
        for t in (1, 11, 510, 511)
    ],
    "lcb": [STDIN, FUNCTIONAL],
    "hle": [
        HLE,
        HLE | {"id": "h2", "image": "data:image/png;base64,AA"},
        HLE | {"id": "h3", "answer": "C", "answer_type": "multipleChoice"},
    ],
}
# benchmark -> right answers of its items, then wrong ones
ANSWERS = {
    "mmlu_pro": (["The answer is (B)."], ["The answer is (A). B is wrong."]),
    "bbeh": (["The answer is: (a)"] * 4, ["The answer is: (b)"] * 4),
    "bbeh_mini": (["**The answer is: a.**"] * 2, ["I say a"] * 2),
    "gsm8k": (["\\boxed{2}"], ["\\boxed{3}"]),
    "math500": (["\\boxed{0.5}"], ["\\boxed{2}"]),
    "aime": (["\\boxed{25}"], ["\\boxed{025.5}"]),
    "aime2026": (["\\boxed{025}"], ["\\boxed{26}"]),
    "hmmt": (["\\boxed{2^{1/2}}"], ["\\boxed{2}"]),
    "hmmt_nov": (["\\boxed{7}"], ["7"]),
    "humaneval": (["```python\ndef f(x):\n    return math.floor(x)\n```"], ["```python\nimport sys; sys.exit(0)\n```"]),
    "mbpp": (["```python\ndef g(x): return x + x\n```"] * 2, ["```python\ndef g(x): return x\n```"] * 2),
    "lcb": (
        [
            "```python\nimport sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))\n```",
            "```python\nclass Solution:\n    def add(self, a: List[int]): return tuple(accumulate(a))\n```",
        ],
        ["```python\nprint(3)\n```", "```python\nclass Solution:\n    def add(self, a): return a\n```"],
    ),
    "hle": (
        ["Explanation: x\nAnswer: 42\nConfidence: 90%", "Answer: C\nConfidence: 50%"],
        ["Answer: 43\nConfidence: 90%", "Answer: A"],
    ),
}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    for name, rows in ROWS.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if name == "gsm8k":
            (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ANSWERS)
def test_benchmark(name: str, local: Path) -> None:
    benchmark = get_benchmarks([name], local)[0]
    items = sorted(benchmark.load(), key=lambda item: item.id)
    for answers, verdict in zip(ANSWERS[name], (True, False), strict=True):
        assert len(items) == len(answers)
        if name == "lcb":
            answers = [answers[item.id == "lcb-3701"] for item in items]
        if name == "hle":
            answers = [answers[item.id == "hle-h3"] for item in items]
        extracted = [benchmark.extract(item, answer) for item, answer in zip(items, answers, strict=True)]
        assert benchmark.grade_all(items, extracted) == [verdict] * len(items), extracted
    assert all(message["content"] for item in items for message in benchmark.messages(item))
    assert benchmark.revision.startswith("local ") and "sha256:" in benchmark.revision


def test_every_benchmark_is_covered() -> None:
    names = {benchmark.name for benchmark in TEXT_BENCHMARKS}
    assert names == set(ANSWERS) | {"gpqa", "mmmlu", "tau2"}
    for benchmark in TEXT_BENCHMARKS:
        if benchmark.name != "tau2":
            revision = benchmark.source.revision
            assert len(revision) == 40 and int(revision, 16)


def test_gpqa_shuffles_by_item(local: Path) -> None:
    rows = [GPQA | {"Record ID": f"rec{k}"} for k in range(400)]
    (local / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = get_benchmarks(["gpqa"], local)[0].load()
    gpqa = get_benchmarks(["gpqa"], local)[0]
    assert items == gpqa.load()
    for answer in "ABCD":  # each gold letter passes, every other letter fails
        extracted = [gpqa.extract(item, f"Some thoughts on A.\n\nAnswer: {answer}") for item in items]
        assert gpqa.grade_all(items, extracted) == [item.gold == answer for item in items]
    for item in items:
        assert f"{item.gold}) right\n" in item.question + "\n"
    assert all(70 < count < 130 for count in Counter(item.gold for item in items).values())
    (local / "gpqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[200:]))
    assert get_benchmarks(["gpqa"], local)[0].load() == items[200:]  # the order of an item does not hang on the others


def test_mmmlu_has_all_languages(local: Path) -> None:
    mmmlu = get_benchmarks(["mmmlu"], local)[0]
    items = mmmlu.load()
    assert {item.meta["stratum"] for item in items} == set(MMMLU_LANGUAGES)
    extracted = [mmmlu.extract(item, "الإجابة: ب" if item.meta["stratum"] == "AR_XY" else "答案：B") for item in items]
    assert all(mmmlu.grade_all(items, extracted))
    rows = [{"id": item.id, "correct": item.meta["stratum"] != "YO_NG"} for item in items]
    metrics = mmmlu.aggregate(items, rows)
    assert metrics["strata"]["YO_NG"] == {"n": 1, "acc": 0.0} and metrics["mean_of_languages"] == pytest.approx(13 / 14)
    (local / "mmmlu_YO_NG.jsonl").unlink()
    with pytest.raises(UserError, match="mmmlu_YO_NG.jsonl"):
        get_benchmarks(["mmmlu"], local)[0].load()


def test_bbeh_headline(local: Path) -> None:
    bbeh = get_benchmarks(["bbeh"], local)[0]
    items = bbeh.load()
    rows = [{"id": item.id, "correct": item.meta["stratum"] == "t1"} for item in items]
    metrics = bbeh.aggregate(items, rows)
    assert metrics["harmonic_mean"] == pytest.approx(2 / (1 / 1.01 + 1 / 0.01))
    for answer, gold, right in (
        ("42.0", "42", True),
        ("[1, 2]", "1,2", True),
        ("yes?", "Yes", True),
        ("b", "(a)", False),
        ("4", "5", False),
    ):
        assert bbeh_match(answer, gold) is right


@pytest.mark.parametrize("name", ["gsm8k", "math500", "humaneval", "mbpp", "aime", "lcb"])
def test_a_limit_takes_a_seeded_sample(name: str, local: Path) -> None:
    """Not the first rows; the same ones each time, in the file's order; fewer are among more; ids as in the whole."""
    key = {"humaneval": "task_id", "mbpp": "task_id", "aime": "id", "lcb": "question_id", "math500": "unique_id"}.get(name, "")
    numbers = range(11, 411) if name == "mbpp" else range(400)
    rows = [ROWS[name][0] | ({key: number if name == "mbpp" else str(number)} if key else {}) for number in numbers]
    (local / "gsm8k.jsonl.gz").unlink()
    (local / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = get_benchmarks([name], local)[0]
    whole = benchmark.load()
    fifty = benchmark.load(50)
    assert benchmark.chosen == "seeded sample" and fifty == get_benchmarks([name], local)[0].load(50)
    places = [whole.index(item) for item in fifty]
    assert places == sorted(places) and len(set(places)) == 50 and 120 < sum(places) / 50 < 280
    assert {item.id for item in benchmark.load(20)} < {item.id for item in fifty} and len(benchmark.load(900)) == 400


def test_the_harmonic_mean_has_an_interval(local: Path) -> None:
    """It covers the mean of true accuracies; a task of which none was right does not narrow it to a point."""
    bbeh, rng, covered = get_benchmarks(["bbeh"], local)[0], np.random.default_rng(0), 0
    items = [Item(f"{task}-{k}", "", "", {"stratum": task}) for task in "abcdef" for k in range(100)]
    truth = dict(zip("abcdef", (0.9, 0.7, 0.5, 0.3, 0.2, 0.15), strict=True))
    for _ in range(100):
        rows = [{"id": item.id, "correct": rng.random() < truth[item.meta["stratum"]]} for item in items]
        made = bbeh.aggregate(items, rows)
        covered += made["harmonic_mean_low"] <= bbeh.headline(truth)["harmonic_mean"] <= made["harmonic_mean_high"]
    assert covered >= 88
    made = bbeh.aggregate(items, [{"id": item.id, "correct": item.meta["stratum"] != "a"} for item in items])
    assert made["harmonic_mean_low"] <= made["harmonic_mean"] < made["harmonic_mean_high"] - 0.01


def test_stratified_prefixes() -> None:
    from task_text import Item

    items = [Item(f"{kind}{k}", "", "", {"kind": kind}) for kind, n in (("a", 600), ("b", 300), ("c", 100)) for k in range(n)]
    order = stratified(items, lambda item: item.meta["kind"], "seed")
    assert sorted(item.id for item in order) == sorted(item.id for item in items)
    for n in (10, 50, 200, 777):
        counts = Counter(item.meta["kind"] for item in order[:n])
        assert all(abs(counts[kind] - n * share) <= 2 for kind, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)))


def test_bad_input(local: Path) -> None:
    (local / "aime.jsonl").write_text('{"problem": "p", "answer": "\\\\sqrt{2}"}\n')
    (local / "hmmt.jsonl").write_text('{"problem": "p"}\n')
    (local / "hmmt_nov.jsonl").write_text("{broken\n")
    (local / "math500.jsonl").write_text("")
    (local / "hle.jsonl").unlink()
    for name, words in (
        ("aime", "not an integer"),
        ("hmmt", "row 1 lacks answer"),
        ("hmmt_nov", "line 1 is not JSON"),
        ("math500", "no rows"),
        ("hle", "has no hle.jsonl"),
        ("tau2", "tau2"),
    ):
        with pytest.raises(UserError, match=words):
            get_benchmarks([name], local)[0].load()


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="gated: accept its terms at .*datasets/a/b .*, or get the machine") as error:
        download(Source("a/b", "0" * 40, gated=True), None, "test")
    assert "\n" not in str(error.value)


def test_private_tests_admit_one_string_only() -> None:
    cases = [test_case("1", "2" * 300_000, "stdin")]
    assert decode_tests(packed(cases)) == decode_tests(json.dumps(cases)) == cases
    for protocol in range(2, 6):
        assert unpickle_str(pickle.dumps("ü" * 70_000, protocol)) == "ü" * 70_000

    class Evil:
        def __reduce__(self) -> tuple:
            return (print, ("executed",))

    for value in (Evil(), ["a"], 5, b"a", ("a", "b")):
        with pytest.raises(ValueError, match="pickle"):
            unpickle_str(pickle.dumps(value))
    with pytest.raises(UserError, match="cannot be decoded"):
        decode_tests(packed(cases)[:-40])


@pytest.mark.parametrize(
    "printed,expected,same",
    [
        ("1 2\n", "1 2", True),
        ("1 2  \n\n", "1 2", True),
        ("1.0 2", "1 2.00", True),
        ("1  2", "1 2", True),
        ("a  b", "a b", False),
        ("1\n2", "1 2", False),
        ("50000000000000001", "50000000000000000", False),
        ("0.1", "0.10000000001", False),
        ("Yes", "YES", False),
        ("", "0", False),
    ],
)
def test_official_comparison(printed: str, expected: str, same: bool) -> None:
    assert same_output(printed, expected) is same


SCRIPTS = {  # adds two numbers, by each way to read and write
    "input": "a, b = map(int, input().split())\nprint(a + b)",
    "main": "def main():\n    a, b = map(int, open(0).read().split())\n    print(a + b)\n    exit()\n"
    "if __name__ == '__main__':\n    main()",
    "os.write": "import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())",
    "readline": "from sys import stdin, stdout\nstdout.write(str(sum(map(int, stdin.readline().split()))))",
    "thread": "import threading\nthreading.stack_size(1 << 26)\n"
    "t = threading.Thread(target=lambda: print(sum(map(int, input().split()))))\nt.start(); t.join()",
}
CHEATS = {
    "nothing": "pass",
    "exit": "import os; os._exit(0)",
    "error after": "print(sum(map(int, input().split())))\nraise ValueError",
    "for ever": "while True: print(1)",
    "patched": "import sys\nclass S(str):\n    def __eq__(self, other): return True\n"
    "sys.modules['program'].run = lambda text: S('x')\nprint(1)",
}


def test_scripts_in_the_sandbox(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tasks_code

    monkeypatch.setattr(tasks_code, "TEST_SECONDS", 2.0)
    lcb = get_benchmarks(["lcb"], local)[0]
    item = next(item for item in lcb.load() if item.id == "lcb-abc1")
    answers = [f"Text\n```python\n{code}\n```" for code in (*SCRIPTS.values(), *CHEATS.values())]
    verdicts = lcb.grade_all([item] * len(answers), [lcb.extract(item, answer) for answer in answers])
    assert verdicts == [True] * len(SCRIPTS) + [False] * len(CHEATS)


def test_large_input_of_a_script(local: Path) -> None:
    """More than a pipe or a command line holds, read whole or not at all."""
    lcb = get_benchmarks(["lcb"], local)[0]
    item = next(item for item in lcb.load() if item.id == "lcb-abc1")
    numbers = " ".join(map(str, range(200_000)))
    item.meta["row"]["private_test_cases"] = packed([test_case(numbers, str(sum(range(200_000))), "stdin")])
    reads = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
    ignores = "print(3 if len(input()) < 9 else 19999900000)"
    assert lcb.grade_all([item] * 2, [reads, ignores]) == [True, True]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("name,file,n", [("humaneval", "HumanEval.jsonl.gz", 164), ("mbpp", "mbpp.jsonl", 974)])
def test_reference_programs_pass(name: str, file: str, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / (f"{name}.jsonl.gz" if file.endswith("gz") else f"{name}.jsonl")).symlink_to(DATA / file)
    benchmark = get_benchmarks([name], tmp_path)[0]
    assert len(benchmark.load()) == {"humaneval": 164, "mbpp": 500}[name]
    monkeypatch.setattr(type(benchmark), "keep", lambda self, row: True)
    items = benchmark.load()
    assert len(items) == n
    opening = {"humaneval": lambda item: item.meta["prompt"], "mbpp": lambda item: ""}[name]
    answers = [f"Here:\n```python\n{opening(item)}{item.gold}\n```\nDone." for item in items]
    extracted = [benchmark.extract(item, answer) for item, answer in zip(items, answers, strict=True)]
    verdicts = benchmark.grade_all(items, extracted)
    assert not [item.id for item, verdict in zip(items, verdicts, strict=True) if not verdict]


def test_tau2_counts_tasks_and_trials(command, tmp_path) -> None:  # noqa: ANN001
    from tau2_runner import summarize

    rewards = {"t1": (1.0, 1.0, 0.0, 1.0), "t2": (1.0, 1.0, 1.0, 1.0), "t3": (None, 0.0, 0.0, 0.0)}
    rows = [{"task_id": t, "reward_info": None if r is None else {"reward": r}} for t, four in rewards.items() for r in four]
    metrics = summarize(rows, 4)
    assert metrics["n"] == 3 and metrics["acc"] == pytest.approx(7 / 12) and metrics["acc_low"] < 7 / 12 < metrics["acc_high"]
    assert metrics["pass^2"] == pytest.approx((3 / 6 + 1 + 0) / 3) and metrics["pass^4"] == pytest.approx(1 / 3)
    with pytest.raises(UserError, match="3 of 4 trials"):
        summarize(rows[1:], 4)
    error = {"termination_reason": "infrastructure_error", "info": {"error": "no", "error_traceback": "File judge.py"}}
    assert summarize([{**rows[0], **error}, *rows[1:]], 4)["ended"]["infrastructure_error"] == 1  # an error of its own
    error["info"]["error_traceback"] = "File litellm/main.py"
    with pytest.raises(UserError, match="a server lost t1"):
        summarize([{**rows[0], **error}, *rows[1:]], 4)
    run = ("src/eval/tau2_runner.py", "--endpoint", "http://localhost:1/v1", "--model", "m", "--tag", "t", "--out", tmp_path)
    for python, told in (((), "not installed"), (("--python", "/nowhere/python"), "/nowhere/python: No such file")):
        done = command(*run, *python)
        assert done.returncode == 2 and told in done.stderr


def test_tau2_is_started_and_its_log_read(command, tmp_path) -> None:  # noqa: ANN001
    """A package that writes the log as version 1.0 does: a folder of the run, which goes on with one of its name."""
    python = tmp_path / "python"
    python.write_text(
        f"""#!{sys.executable}
import json, pathlib, sys
data = pathlib.Path({str(tmp_path)!r})
if sys.argv[1] == "-c":
    print("noise", data, sep="\\n")
else:
    log = data / "simulations" / sys.argv[sys.argv.index("--save-to") + 1]
    kept = json.loads((log / "results.json").read_text())["simulations"] if log.exists() else []
    log.mkdir(parents=True, exist_ok=True)
    new = [{{"task_id": "a", "reward_info": {{"reward": 1.0}}, "termination_reason": "user_stop"}}]
    (log / "results.json").write_text(json.dumps({{"simulations": kept + new}}))
"""
    )
    python.chmod(0o755)
    run = ("src/eval/tau2_runner.py", "--endpoint", "http://localhost:1/v1", "--model", "m", "--tag", "t", "--domains", "mock")
    run += ("--out", tmp_path / "eval", "--python", python, "--trials", "1")
    for more in ((), ("--force",), ("--force", "--agent-args", '{"temperature": 1.0}')):
        done = command(*run, *more)
        assert done.returncode == 0, done.stderr
        metrics = json.loads((tmp_path / "eval/t.json").read_text())["metrics"]["tau2_mock"]
        assert (metrics["n"], metrics["acc"], metrics["ended"]) == (1, 1.0, {"user_stop": 1})
    assert len(list((tmp_path / "simulations").iterdir())) == 2  # other settings, another log


def test_helpers_of_the_tests_are_those_of_the_prompt() -> None:
    """HumanEval 32, 38 and 50: a program that redefines what the tests compute with gains nothing."""
    prompt = "def poly(x):\n    return x - 3\n\n\ndef root():\n"
    meta = {"prompt": prompt, "entry_point": "root", "test": "def check(candidate):\n    assert poly(candidate()) == 0"}
    item = Item("32", prompt, "", meta)
    forged = "def poly(x):\n    return 0\n\ndef root():\n    return 8"
    assert HumanEval().grade_all([item] * 2, [forged, "def root():\n    return 3"]) == [False, True]


def test_an_answer_in_degrees_is_an_integer(local: Path) -> None:
    row = {"problem": "An arc?", "answer": "336^\\circ", "id": "9"}
    (local / "aime.jsonl").write_text(json.dumps(row) + "\n")
    benchmark = get_benchmarks(["aime"], local)[0]
    items = benchmark.load()
    assert benchmark.grade_all(items * 3, ["336", "336^\\circ", "335^\\circ"]) == [True, True, False]
