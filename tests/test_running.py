"""Running an evaluation: settings that are really read, samples, regrading, damaged logs, the gate, the report."""

import gzip
import json
import resource
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPO, log_row, write_evaluation
from scipy import stats

import runner as runs
from backend import Completion, Sampling
from compare_tags import compare, verdict_text
from console import UserError, write_json
from eval_settings import (
    GATED,
    NOT_GATED,
    GateRules,
    eval_records,
    gate_axis,
    gate_power,
    gate_status,
    gate_text,
    items_for_power,
    load_settings,
)
from gate import gate_lines
from graders import GRADER_VERSION, split_thinking
from intervals import clustered_interval, clustered_mcnemar, discordance, effective_answers, wilson
from records import sha256_json, write_result
from regrade import pack, regrade
from sample_log import SEAL, SampleLog, WorkClock, held_log, read_samples, sealed
from task import Benchmark
from task_text import Item

PLAIN = {"sampling": {}, "limit": 2, "grader": GRADER_VERSION}


# --- settings -----------------------------------------------------------------------------------------------------------


def test_the_sampling_of_a_run_is_what_the_file_says(random_tiny, tmp_path, command, monkeypatch):
    """Change the file: the run's record changes with it; an option of the command line wins over both."""
    model = tmp_path / "short"
    shutil.copytree(random_tiny, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 96}))  # answers of some 30 tokens
    text = (REPO / "configs/eval.env").read_text()
    assert 'SAMPLING__RAZOR_TINY="temperature=0"' in text
    (tmp_path / "own.env").write_text(text.replace('temperature=0"', 'temperature=0.7 top_p=0.9 top_k=5"', 1))
    monkeypatch.setenv("EVAL_CONFIG", str(tmp_path / "own.env"))
    run = ["src/eval/vllm_eval8.py", "--model", model, "--benchmarks", "tiny_know", "--limit", "1", "--out", tmp_path]
    done = command(*run, "--tag", "own", "--samples", "2", "--budget", "80k", "--top-k", "7")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "own.json").read_text())
    drawn, metrics = record["sampling"], record["metrics"]["tiny_know"]
    assert (drawn["temperature"], drawn["top_p"], drawn["top_k"], drawn["max_tokens"]) == (0.7, 0.9, 7, 81_920)
    assert drawn["source"] == "command line (top_k), else own.env: SAMPLING__RAZOR_TINY"
    assert record["model"]["family"] == "RAZOR_TINY" and metrics["n"] == 1 and metrics["samples"] == 2
    rows = read_samples(tmp_path / "own.samples.jsonl")[1]
    assert len({(row["id"], row["sample"]) for row in rows}) == 2
    by_item = [{row["text"] for row in rows if row["id"] == key} for key in {row["id"] for row in rows}]
    assert all(len(texts) == 2 for texts in by_item)  # the samples of an item are drawn apart


def test_vendor_sampling_and_families_by_shape():
    settings = load_settings()
    text = {"model_type": "qwen3_5_moe_text", "hidden_size": 3072, "num_hidden_layers": 48, "num_experts": 256}
    config = {"model_type": "qwen3_5_moe", "text_config": text}
    name = "Qwen3.5-122B-A10B"
    family = settings.family_of(config, [name])
    assert family == "QWEN3_5_122B_A10B"
    for other in (f"{name}-FP8", f"{name}-int3_int4_clip", f"{name}-UD-IQ3_XXS-00001-of-00002"):  # only the format differs
        assert settings.family_of(config, ["q", other]) == family
    for other in ("Qwen3.6-122B-A10B", f"{name}-Base", f"My-{name}", f"{name}-abliterated", "q"):
        assert settings.family_of(config, [other]) is None and settings.shaped_as(config) == family
    assert settings.sampling_for(family, config)[0] == {"temperature": 1.0, "top_p": 0.95, "top_k": 20}
    assert settings.family_of({**text, "num_experts": 128}, [name]) is None
    drawn, source = settings.sampling_for(None, {"model_type": "mixtral"})
    assert drawn == {} and source.startswith("greedy")
    assert all(0 < value <= 100 for own in settings.targets.values() for value in own.values())


@pytest.mark.parametrize(
    "line,message",
    [
        ('SAMPLING__X="temprature=1"', "unknown temprature"),
        ('SAMPLING__X="top_p=2"', "0 < top_p"),
        ("TARGET__NOBODY__GPQA=80", "no FAMILY__NOBODY"),
        ("GATE_POINT=2", "GATE_POINT: expected"),
    ],
)
def test_a_slip_in_the_settings_is_one_clear_error(tmp_path, line, message):
    (tmp_path / "x.env").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        load_settings(tmp_path / "x.env")


# --- statistics ---------------------------------------------------------------------------------------------------------


def test_clustered_statistics_are_the_plain_ones_for_one_sample():
    a, b = [1, 1, 1, 1, 1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1, 0, 1, 0]
    assert clustered_mcnemar(a, b) == pytest.approx(stats.binomtest(1, 5).pvalue)
    assert clustered_interval(a, 1) == wilson(7, 10)
    assert discordance(a, b) == 0.5 and discordance(a, a) == 0.3
    # by hand: differences 2, 2, -1; of the 8 sign patterns the sums 5, 3 and -3, -5 are at least 3 from zero
    assert clustered_mcnemar([0, 0, 1], [2, 2, 0]) == pytest.approx(4 / 8)


def test_copies_of_an_answer_do_not_narrow_the_interval():
    """Eight equal answers to each of 30 items say no more than one; eight independent ones say nearly eight times as much."""
    import numpy as np

    shares = [1.0] * 20 + [0.0] * 10
    copied, one = clustered_interval(shares, 8), wilson(20, 30)
    assert copied == pytest.approx(one, abs=0.01)
    rng = np.random.default_rng(0)
    free = clustered_interval(list(rng.binomial(8, 0.67, 30) / 8), 8)
    assert free[1] - free[0] < 0.5 * (one[1] - one[0])
    covered = 0
    for _ in range(400):  # items of different difficulty: the interval of the mean covers it as often as it says
        chance = rng.beta(2, 1, 60)
        low, high = clustered_interval(list(rng.binomial(4, chance) / 4), 4)
        covered += low <= 2 / 3 <= high
    assert covered / 400 > 0.92


def test_no_verdict_from_few_items():
    made = compare([1, 1, 0, 1], [1, 0, 0, 1])
    assert made["verdict"] == "no difference shown" and made["minimum_detectable"] > 0.5
    assert compare([1] * 50, [1] * 50)["minimum_detectable"] > 0.05  # nothing differed, which is not infinite precision
    assert compare([4, 4, 3, 4] * 10, [1, 2, 0, 1] * 10, 4)["verdict"] == "loss"


# --- the log and its clock ----------------------------------------------------------------------------------------------


def sample(number, **more):
    return log_row("b", number, **more)


TWO = PLAIN | {"samples": 2}


def test_damage_in_a_log(tmp_path, capsys):
    path = tmp_path / "a.samples.jsonl"
    SampleLog(path, TWO).append([sample(1), sample(2), sample(2, sample=1)])
    whole = path.read_bytes()
    for torn in (whole[:-9], whole[:-1], whole[:-60] + b"\0" * 60 + b"\n", whole + b'{"bench'):
        path.write_bytes(torn)
        line = 5 if torn.startswith(whole) else 4
        with pytest.raises(UserError, match=rf"line {line}.*finish it"):
            read_samples(path)
        assert sorted(SampleLog(path, TWO).done) == [("b", "1", 0), ("b", "2", 0), ("b", "2", 1)][: line - 2]
        assert "last line was cut short" in capsys.readouterr().err
    path.write_bytes(whole.replace(b'"id": "1"', b'"id" "1"'))
    for act in (lambda: SampleLog(path, TWO), lambda: read_samples(path)):
        with pytest.raises(UserError, match="line 2 is damaged"):
            act()
    path.write_bytes(b'{"sett')  # killed while the first line was written
    assert SampleLog(path, TWO).done == {} and read_samples(path) == (json.loads(json.dumps(TWO)), [])


def test_one_run_writes_a_log(tmp_path):
    """The second start of a tag is refused while the first lives, and goes on when that was killed."""
    path = tmp_path / "a.samples.jsonl"
    code = f"from sample_log import SampleLog; log = SampleLog({str(path)!r}, {PLAIN!r}); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        before = path.read_bytes()
        tries = (lambda: SampleLog(path, PLAIN), lambda: SampleLog(path, PLAIN, fresh=True), lambda: held_log(path).__enter__())
        for act in tries:
            with pytest.raises(UserError, match="another run is writing this log"):
                act()
        first.kill()
    assert path.read_bytes() == before
    with SampleLog(path, PLAIN) as log:
        log.append([sample(1)])
        with pytest.raises(UserError, match="another run"):
            SampleLog(path, PLAIN)
    assert [file.name for file in tmp_path.iterdir()] == [path.name] and len(SampleLog(path, PLAIN).done) == 1


def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path):
    """A limit on the size of files stands for the disk. Nothing else may run under it: git would leave a torn index."""
    log = SampleLog(tmp_path / "a.samples.jsonl", PLAIN)
    log.append([sample(1)])
    before, limits = log.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 200, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            log.append([sample(n) for n in range(2, 2000)])
        with pytest.raises(UserError, match="cannot write"):
            write_json(tmp_path / "a.json", list(range(999)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log.path.read_bytes() == before and list(log.done) == [("b", "1", 0)] and not (tmp_path / "a.json").exists()
    log.append([sample(2)])
    assert len(read_samples(log.path)[1]) == 2


def test_settings_that_the_engine_tells(tmp_path):
    """What a server says of itself is compared when it has started; a log without samples takes other settings."""
    path = tmp_path / "a.samples.jsonl"
    for model in ("other", "served"):
        with SampleLog(path, PLAIN, settled=False) as log:
            log.settle({"base_url": "http://a", "served": model})
    with SampleLog(path, PLAIN, settled=False) as log:
        log.settle({"base_url": "http://a", "served": "served"})
        log.append([sample(1)])
    for told in ({"base_url": "http://b", "served": "served"}, {}):
        with SampleLog(path, PLAIN, settled=False) as log, pytest.raises(UserError, match=r"other settings \(base_url"):
            log.settle(told)
    assert read_samples(path)[0]["served"] == "served"


def test_a_packed_log_is_the_same_log(tmp_path, command):
    """Packing twice gives the same bytes; readers and a run that goes on take the packed form; unfinished logs stay plain."""
    directory, rows = tmp_path / "eval", [sample(1), sample(1, sample=1), sample(2), sample(2, sample=1)]
    log, settings = write_evaluation(tmp_path, "a", rows, TWO), {"sampling": {}, "limit": None} | TWO
    SampleLog(directory / "b.samples.jsonl", TWO).append(rows)
    before, packed = log.read_bytes(), directory / "a.samples.jsonl.gz"
    seen = set()
    for _ in range(2):
        done = command("src/eval/regrade.py", "--pack", "--results", tmp_path)
        assert done.returncode == 0 and "not finished, left as they are: b" in done.stdout, done.stderr
        assert not log.exists() and (directory / "b.samples.jsonl").exists()
        seen.add(packed.read_bytes())
        assert read_samples(log) == (settings, [sealed(row) for row in rows])
        assert len(SampleLog(log, settings).done) == 4 and log.read_bytes() == before and not packed.exists()
    assert len(seen) == 1 and gzip.decompress(seen.pop()) == before
    packed.write_bytes(b"cut")
    log.unlink()
    with pytest.raises(UserError, match="a.samples.jsonl.gz: damaged"):
        read_samples(log)
    done = command("src/eval/regrade.py", "--pack", "c", "--results", tmp_path)
    assert done.returncode == 2 and "holds no plain log of c" in done.stderr
    done = command("src/eval/regrade.py", "--results", tmp_path)
    assert done.returncode == 2 and "name the evaluations" in done.stderr


def test_seconds_are_the_sum_over_the_parts_of_a_run(tmp_path):
    clock = WorkClock(tmp_path / ".a.clock")
    time.sleep(0.05)
    clock.save()
    saved, started = clock.seconds, clock.started
    resumed = WorkClock(tmp_path / ".a.clock")
    time.sleep(0.05)
    assert resumed.seconds >= 0.1 and resumed.seconds < saved + 1 and resumed.started == started and resumed.parts == 2
    resumed.remove()
    assert WorkClock(tmp_path / ".a.clock").seconds < 0.05


class Mortal:
    """A backend that is killed after so many answers, and remembers what it was asked."""

    def __init__(self, answers, opening=""):
        self.answers, self.asked, self.opening = answers, [], opening

    def render(self, messages):
        return self.opening + messages[0]["content"]

    def generate(self, prompts, sampling):
        for index, prompt in enumerate(prompts):
            if not self.answers:
                raise KeyboardInterrupt
            self.answers -= 1
            self.asked.append((prompt, sampling.seed))
            yield index, Completion("</think>\\boxed{7}", 4, 9, "stop", "ids")


def test_a_killed_run_asks_nothing_twice(tmp_path, monkeypatch):
    from runner import get_benchmarks

    monkeypatch.setattr(runs, "FLUSH_ROWS", 2)
    benchmark = get_benchmarks(["tiny_math"])[0]
    asked = []
    for answers in (5, 4, 99):
        backend = Mortal(answers)
        log = SampleLog(tmp_path / "l", PLAIN | {"samples": 3})
        runner = runs.Runner(backend, Sampling(temperature=1.0), 3, log, WorkClock(tmp_path / "c"))
        try:
            metrics = runner.run_all([(benchmark, benchmark.load(4))])["tiny_math"]
        except KeyboardInterrupt:
            kept = len(log.done)
            asked += backend.asked[: kept - len(asked)]
        else:
            asked += backend.asked
        log.close()
    assert len(asked) == len(set(asked)) == 12 and metrics["n"] == 4 and metrics["samples"] == 3
    assert len(log.done) == 12 and WorkClock(tmp_path / "c").parts == 4


# --- regrading ----------------------------------------------------------------------------------------------------------


class Echo(Benchmark):
    name, revision, gold, asks = "echo", "1", ("4", "6"), "twice {}?"

    def load(self, n=None):
        return [Item(f"echo-{i}", self.asks.format(i + 2), gold) for i, gold in enumerate(self.gold)][:n]

    def extract(self, item, answer):
        return answer.split()[-1] if answer else None

    def aggregate(self, items, rows):
        return {"first": [row["correct"] for row in rows if row["id"] == items[0].id]}


class Mended(Echo):
    def extract(self, item, answer):
        return answer.split()[-1].rstrip(".")


def evaluated(directory, monkeypatch, benchmark=Echo):
    """An evaluation as the runner makes it, with answers that the grader of Echo gets wrong."""
    monkeypatch.setattr("runner.get_benchmarks", lambda names, data_dir=None, pictures=False: [benchmark()])

    class Backend:
        def render(self, messages):
            return "<user>" + messages[0]["content"]

        def generate(self, prompts, sampling):
            for index, _ in enumerate(prompts):
                yield index, Completion(f"hm</think>It is {2 * (index + 2)}.", 5, 3, "stop", "ids")

    settings = {"sampling": {}, "limit": 2, "grader": GRADER_VERSION, "model": "gone", "samples": 1}
    with SampleLog(directory / "eval/t.samples.jsonl", settings) as log:
        runner = runs.Runner(Backend(), Sampling(), 1, log, WorkClock(directory / "eval/.t.clock"))
        metrics = runner.run_all([(benchmark(), benchmark().load(2))])
    model = {"path": "gone", "config_sha256": "0", "family": None}
    extra = {"samples": "t.samples.jsonl", "settings_sha256": sha256_json(log.settings), "parts": 3}
    data = [runs.benchmark_data(benchmark(), benchmark().load(2))]
    write_result(directory / "eval/t.json", kind="eval", tag="t", started=1e9, seconds=77.0, model=model, data=data,
                 sampling={"temperature": 0.0}, metrics=metrics, extra=extra)  # fmt: skip
    return metrics


def lines_of(rows, change, number=1):
    """The rows with one changed."""
    return [{**row, **change} if place == number else row for place, row in enumerate(rows)]


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


# what is done to the lines of a log of echo-0 and echo-1; what a run that goes on says (None: it cannot see it); what the
# others say ("": the same; "regrade": the same, seen by regrade only; None: none can)
FAULTS = {
    "a row twice": (lambda rows: [*rows, rows[1]], "line 4 repeats line 2 .echo-0 of echo, sample 0.", ""),
    "a row of another item": (
        lambda rows: [*rows, without(rows[1], SEAL) | {"id": "echo-9"}],
        "line 4: echo-9 of echo is not asked", "line 4 .echo-9 of echo. is one more than t.json counts",
    ),
    "a row of another benchmark": (
        lambda rows: [*rows, without(rows[1], SEAL) | {"benchmark": "b"}],
        "line 4: echo-0 of b is not asked", "line 4 .echo-0 of b. is one more",
    ),
    "a sample too many": (
        lambda rows: [*rows, without(rows[1], SEAL) | {"sample": 1}], "line 4 is not of this run: .*where an item has 1", "",
    ),
    "a row lost": (lambda rows: rows[:2], None, "lacks 1 of the samples of echo"),
    "other settings": (
        lambda rows: [{"settings": rows[0]["settings"] | {"limit": 3}}, *rows[1:]],
        "other settings .limit.", "line 1 has other",
    ),
    "no verdict": (lambda rows: [rows[0], without(rows[1], "correct"), rows[2]], "line 2 is damaged: it lacks correct", ""),
    "a row as it was not written": (lambda rows: lines_of(rows, {"text": "</think>4"}), "line 2 .echo-0. was changed", ""),
    "garbage": (lambda rows: [*rows, "garbage\n"], "line 4 is damaged .not JSON.", ""),
    "garbage without an end": (lambda rows: [*rows, "garbage"], "line 4 is damaged .not JSON.", ""),
    "brackets": (lambda rows: [*rows, "[" * 200_000 + "\n"], "line 4 is damaged .not JSON.", ""),
    "not UTF-8": (lambda rows: [*rows, "\udcff\n"], "line 4 is damaged .not JSON.", ""),
    "a number": (lambda rows: [*rows, "7\n"], "line 4 is damaged .not a row.", ""),
    "an empty line": (lambda rows: [*rows, "\n"], "line 4 is damaged", ""),
}  # fmt: skip
for name, change, resumed, others in (  # in rows of older versions, which have no digest
    ("no verdict yet", {"correct": None}, "line 2 is damaged: correct is 'None'", ""),
    ("a number for a verdict", {"correct": 1}, "line 2 is damaged: correct is '1'", ""),
    ("another grader", {"grader": "0"}, "line 2 is not of this run: grader '0'", ""),
    ("a verdict turned", {"correct": True}, None, "1 right answers to echo where t.json counts 0"),
    ("another gold", {"gold": "5"}, "line 2: echo-0 of echo had another gold", "regrade"),
    ("another question", {"messages_sha256": "0"}, "line 2: echo-0 of echo had another question", "regrade"),
    ("another prompt", {"prompt_sha256": "0"}, "line 2: echo-0 of echo had another prompt", None),  # needs the tokenizer
):
    FAULTS[f"{name}, no digest"] = (lambda rows, change=change: lines_of(rows, {SEAL: None, **change}), resumed, others)
    if others in ("regrade", None) and resumed:
        FAULTS[name] = (lambda rows, change=change: lines_of(rows, change), "line 2 .echo-0. was changed", "")


@pytest.mark.parametrize("fault", FAULTS)
def test_every_reader_refuses_what_does_not_belong_in_a_log(fault, tmp_path, monkeypatch):
    """A run that goes on, compare, regrade, the report and pack, each with the number of the line."""
    from compare_tags import load
    from page_report import sample_entries

    change, resumed, others = FAULTS[fault]
    evaluated(tmp_path, monkeypatch)
    directory, log = tmp_path / "eval", tmp_path / "eval/t.samples.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    lines = (row if isinstance(row, str) else json.dumps(row) + "\n" for row in change(rows))
    log.write_bytes("".join(lines).encode(errors="surrogateescape"))
    before = log.read_bytes()

    def resume():
        with SampleLog(log, rows[0]["settings"], graded=True) as kept:
            backend = Mortal(99, "<user>")
            runs.Runner(backend, Sampling(), 1, kept, WorkClock(directory / ".t.clock")).run_all([(Echo(), Echo().load())])

    readers = {
        "compare": lambda: load(directory, "t"),
        "regrade": lambda: regrade(directory, "t", None, None),
        "report": lambda: list(sample_entries("t", directory / "t.json", {})),
        "pack": lambda: pack(directory, ["t"]),
    }
    for name, act in readers.items():
        if others is not None and others in ("", name) or others not in (None, *readers):
            with pytest.raises(UserError, match=resumed if others in ("", name) else others):
                act()
    if resumed:
        with pytest.raises(UserError, match=resumed):
            resume()
    assert log.read_bytes() == before and not log.with_name(log.name + ".gz").exists()


def test_data_that_changed_between_two_parts_of_a_run(tmp_path, monkeypatch):
    """Killed after one of two items, then another gold or another chat template: nothing is generated."""
    evaluated(tmp_path, monkeypatch)
    log = tmp_path / "eval/t.samples.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    settings = json.loads(log.read_text().splitlines()[0])["settings"]
    clock = WorkClock(tmp_path / "c")

    def go_on(backend):
        with SampleLog(log, settings, graded=True) as kept:
            return runs.Runner(backend, Sampling(), 1, kept, clock).run_all([(Echo(), Echo().load())])

    for change, opening, message in (
        ({"gold": ("5", "6")}, "<user>", "line 2: echo-0 of echo had another gold answer"),
        ({"asks": "thrice {}?"}, "<user>", "line 2: echo-0 of echo had another question"),
        ({}, "<human>", "line 2: echo-0 of echo had another prompt"),
        ({}, "<user>", r"line 2: echo-0 of echo had another prompt .its token ids"),
        ({"standard": lambda self, item: [item.gold, "assert"]}, "<user>", "another gold answer or tests"),
    ):
        backend = Mortal(99, opening)
        if message.endswith("ids"):  # the text is the same, the tokenizer is not
            backend.tokenizer = lambda prompt, add_special_tokens: {"input_ids": [1, 2]}
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(Echo, name, value)
            with pytest.raises(UserError, match=message):
                go_on(backend)
        assert backend.asked == []
    assert go_on(Mortal(99, "<user>"))["echo"]["n"] == 2


def test_regrading_needs_no_model_and_keeps_the_generation(tmp_path, monkeypatch):
    assert evaluated(tmp_path, monkeypatch)["echo"]["correct"] == 0
    before = json.loads((tmp_path / "eval/t.json").read_text())
    monkeypatch.setattr("runner.get_benchmarks", lambda names, data_dir=None, pictures=False: [Mended()])
    monkeypatch.setattr("regrade.GRADER_VERSION", "next")
    record, changed = regrade(tmp_path / "eval", "t", None, None)
    assert changed == 2 and record["metrics"]["echo"]["acc"] == 1.0
    assert before["metrics"]["echo"]["first"] == [False] and record["metrics"]["echo"]["first"] == [True]
    assert record == json.loads((tmp_path / "eval/t.json").read_text())
    kept = ("command", "started", "seconds", "hardware", "packages", "model", "sampling", "parts", "code")
    assert {key: record[key] for key in kept} == {key: before[key] for key in kept} and record["seconds"] == 77.0
    regraded = record["regraded"]
    assert (regraded["from"], regraded["to"], regraded["changed"]) == (GRADER_VERSION, "next", 2)
    settings, rows = read_samples(tmp_path / "eval/t.samples.jsonl")
    assert settings["grader"] == "next" and [row["extracted"] for row in rows] == ["4", "6"]
    assert split_thinking(rows[0]["text"])[1] == "It is 4."  # the generation itself is as it was


def test_regrading_refuses_another_prompt(tmp_path, monkeypatch):
    evaluated(tmp_path, monkeypatch)
    before = (tmp_path / "eval/t.samples.jsonl").read_bytes(), (tmp_path / "eval/t.json").read_bytes()
    monkeypatch.setattr(Echo, "asks", "two times {}?")
    with pytest.raises(UserError, match="line 2: echo-0 of echo had another question"):
        regrade(tmp_path / "eval", "t", None, None)
    assert before == ((tmp_path / "eval/t.samples.jsonl").read_bytes(), (tmp_path / "eval/t.json").read_bytes())


# --- the gate -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "correct,n,status,why",
    [
        (866, 1000, "gated", "-0.1 from 86.7"),
        (840, 1000, "not gated", "more than 2 away"),
        (170, 198, "gated", "-0.8 from 86.7"),
        (13, 15, "not gated", "wider than 20"),  # 86.7 % of 15 items by luck proves nothing
        (10220, 12032, "not gated", "excludes it by more than 1"),  # 84.9 % of so many is shown to be more than a point off
        (10370, 12032, "gated", "-0.5"),
    ],
)
def test_gate_needs_nearness_and_a_fitting_interval(correct, n, status, why):
    low, high = wilson(correct, n)
    got, reason = gate_status({"acc": correct / n, "acc_low": low, "acc_high": high}, 86.7, GateRules())
    assert got == status and why in reason


def test_the_gate_says_what_it_can_tell():
    """Of 198 items half of the exact harnesses pass, and a third of those three points low: against drawn evaluations."""
    rules, rng = GateRules(), np.random.default_rng(0)
    for truth, about in ((80, 0.523), (77, 0.328)):
        assert gate_power(198, truth, 80, rules) == pytest.approx(about, abs=0.001)
        passed = 0
        for right in rng.binomial(198, truth / 100, 4000):
            low, high = wilson(int(right), 198)
            passed += gate_status({"acc": right / 198, "acc_low": low, "acc_high": high}, 80, rules)[0] == GATED
        assert passed / 4000 == pytest.approx(about, abs=0.03)
    needed = items_for_power(80, rules)
    assert 640 < needed < 680 and gate_power(needed, 80, 80, rules) >= 0.8 > gate_power(needed - 20, 80, 80, rules)
    record = {"recipe": None, "model": {"path": "x", "family": "QWEN3_5_122B_A10B"}, "tag": "t", "sampling": {}}
    metrics = {"n": 198, "acc": 171 / 198} | dict(zip(("acc_low", "acc_high"), wilson(171, 198)))
    gate = gate_axis(record | {"metrics": {"gpqa": metrics}}, "gpqa", load_settings())
    assert gate.power == "n 198 passes 60 % if exact, 34 % if 3 low; 80 % take n 488" and gate.power in gate_text(gate)
    low, high = clustered_interval([0.5] * 15 + [1.0] * 15, 4)  # 30 items of four answers count as more than 30
    assert 30 < effective_answers(0.75, high - low) < 120


def test_the_gate_of_bbeh_says_which_mean_it_takes(tmp_path):
    record = {"recipe": None, "model": {"path": "x", "family": "GEMMA_4_26B_A4B"}, "tag": "t", "sampling": {}}
    metrics = {"n": 4519, "acc": 0.648, "acc_low": 0.634, "acc_high": 0.662, "harmonic_mean": 0.41, "harmonic_mean_low": 0.39,
               "harmonic_mean_high": 0.43}  # fmt: skip
    gate = gate_axis(record | {"metrics": {"bbeh": metrics}}, "bbeh", load_settings())
    assert gate.status == GATED and gate.reason.startswith(
        "micro mean, as the target; harmonic 41.0 (39.0 to 43.0): +0.0 from 64.8"
    )


def test_a_trial_of_four_items_changes_no_gate():
    """Neither its own nor, as the latest evaluation of the original, that of any published one."""
    settings, found = load_settings(), eval_records(REPO / "results/eval")
    trial = next(r for r in found if r["tag"] == "razor_tiny_bf16") | {"tag": "me", "started": "2099-01-01T00:00:00+00:00"}
    low, high = wilson(3, 4)
    few = {"n": 4, "samples": 1, "acc": 0.75, "acc_low": low, "acc_high": high}
    trial |= {"metrics": dict.fromkeys(trial["metrics"], few)}
    before, _ = gate_lines(found, settings, [r["tag"] for r in found])
    after, _ = gate_lines([*found, trial], settings, [r["tag"] for r in found])
    assert after == before
    assert "wider than 20" in gate_axis(trial, "tiny_math", settings, [*found, trial]).reason


def test_a_quantized_model_has_the_gate_of_its_original():
    settings, found = load_settings(), eval_records(REPO / "results/eval")
    lines, failed = gate_lines(found, settings, ["razor_tiny_bf16", "razor_tiny_int2_int4_absmax"])
    assert len(lines) == 9 and failed == 0 and all(" gated (" in line for line in lines[1:])
    lossy = next(r for r in found if r["tag"] == "razor_tiny_int2_int4_absmax")
    originals = [r for r in found if r["model"]["path"] == "models/razor-tiny"]  # the study of recovery has one too
    latest = max(originals, key=lambda r: (r["metrics"]["tiny_math"]["n"], r["started"]))["tag"]
    assert {r["tag"] for r in originals} == {"razor_tiny_bf16", "recovery_bf16"}
    assert gate_axis(lossy, "tiny_math", settings, found).reference == latest
    assert (
        gate_axis(lossy, "tiny_math", settings, [lossy | {"model": lossy["model"] | {"family": "RAZOR_TINY"}}]).status
        == "not gated"
    )
    assert gate_axis(lossy, "gsm8k", settings, found).status == "no target"
    gguf = {"path": "x.gguf", "format": "gguf", "family": "RAZOR_TINY"}
    assert gate_axis(lossy | {"recipe": None, "model": gguf}, "tiny_math", settings, found).reference == latest
    decoded = {"path": "x", "family": "RAZOR_TINY", "decoded_from": {"file": "x.gguf", "bytes": 1}}
    assert gate_axis(lossy | {"recipe": None, "model": decoded}, "tiny_math", settings, found).reference == latest
    other = lossy | {"sampling": lossy["sampling"] | {"temperature": 1.0}}
    assert gate_axis(other, "tiny_math", settings, found).status == "not gated"


def test_a_target_for_the_mean_of_two_settings():
    """mmmu_pro is published as one number: both settings have the status of their mean, and none while one is missing."""
    settings = load_settings()
    target = settings.targets["QWEN3_5_35B_A3B"]["mmmu_pro"]

    def axis(off):
        acc = (target + off) / 100
        return {"n": 1730, "acc": acc, "acc_low": acc - 0.02, "acc_high": acc + 0.02}

    def judged(**metrics):
        record = {"recipe": None, "model": {"path": "x", "family": "QWEN3_5_35B_A3B"}, "tag": "t", "sampling": {}}
        return gate_axis(record | {"metrics": metrics}, "mmmu_pro_vision", settings)

    both = judged(mmmu_pro_standard=axis(5), mmmu_pro_vision=axis(-4))
    assert both.status == GATED and both.target == target
    assert both.reason.startswith("mean of mmmu_pro_standard, mmmu_pro_vision: +0.5")
    assert judged(mmmu_pro_standard=axis(5), mmmu_pro_vision=axis(0)).status == NOT_GATED
    alone = judged(mmmu_pro_vision=axis(0))
    assert alone.status == NOT_GATED and "mmmu_pro_standard was not evaluated" in alone.reason


def test_too_few_items_have_a_real_interval_and_no_detectable_difference():
    made = compare([1, 1, 1, 0], [1, 1, 1, 0])
    assert made["difference_low"] == pytest.approx(-0.49, abs=0.001) and made["difference_high"] == pytest.approx(
        0.49, abs=0.001
    )
    assert (
        made["minimum_detectable"] == 1.0 and verdict_text(made) == "no difference shown (n 4 can show none: 8 items at least)"
    )
    made = compare([1] * 100, [1] * 99 + [0])
    assert verdict_text(made) == "no difference shown (n 100, minimum detectable 7.8; 1.0 would need n 785)"


def test_questions_that_were_other_tokens_are_not_compared(tmp_path, command):
    """The same chat turns through another template are no other model: refused within a family, or where none is known;
    named where two families meet or --other-templates allows it. Without token ids the rendered text is compared."""

    def evaluation(tag, family, **ids):
        rows = [
            log_row("tiny_math", n, messages_sha256=str(n), **{key: f"{value} {n}" for key, value in ids.items()})
            for n in range(9)
        ]
        write_evaluation(tmp_path, tag, rows, model={"path": "gone", "config_sha256": "0", "family": family})

    evaluation("a", "RAZOR_TINY", prompt_ids_sha256="ids", prompt_sha256="text")
    evaluation("same", None, prompt_ids_sha256="ids", prompt_sha256="written otherwise")
    evaluation("b", "RAZOR_TINY", prompt_ids_sha256="other", prompt_sha256="text")
    evaluation("unknown", None, prompt_ids_sha256="other", prompt_sha256="text")
    evaluation("old", None, prompt_sha256="text")
    evaluation("older", None, prompt_sha256="other text")
    evaluation("gemma", "GEMMA_4_26B_A4B", prompt_ids_sha256="other", prompt_sha256="other text")
    compare = ("src/eval/compare_tags.py", "--results", tmp_path, "a")
    for tag, refused in {"same": False, "b": True, "unknown": True, "old": False, "older": True}.items():
        done = command(*compare, tag)
        assert done.returncode == 2 * refused, (tag, done.stdout, done.stderr)
        if refused:
            assert (
                "got 9 of 9 questions as other tokens, first 0 (lines 2 and 2)" in done.stderr and done.stderr.count("\n") == 1
            )
    for more in (("b", "--other-templates"), ("gemma",)):
        done = command(*compare, *more)
        assert done.returncode == 0 and "9 of 9 items reached the two as other tokens" in done.stdout, done.stderr
    evaluation("gold", "RAZOR_TINY", prompt_ids_sha256="ids", gold="5")
    done = command(*compare, "gold")
    assert done.returncode == 2 and "another gold answer" in done.stderr and "(lines 2 and 2 of their logs)" in done.stderr


def test_the_mission_table(tmp_path, command):
    for tag in ("razor_tiny_bf16", "razor_tiny_int3_int4_clip16", "razor_tiny_int3_int4_gptq_refit"):
        for end in (".json", ".samples.jsonl.gz"):
            (tmp_path / "eval").mkdir(exist_ok=True)
            shutil.copy(REPO / f"results/eval/{tag}{end}", tmp_path / "eval")
    done = command("src/eval/compare_tags.py", "razor_tiny_int3_int4_clip16", "razor_tiny_int3_int4_gptq_refit", "--teacher",
                   "razor_tiny_bf16", "--results", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "100.0" in rows["tiny_know"] and "razor_tiny_int3_int4_clip16 better" in rows["tiny_know"]
    assert "-3.6 [-5.0, -2.5]" in rows["tiny_know"] and rows["tiny_know"].endswith("gated")
    assert "no difference shown (n 1000, minimum detectable 0.8; 0.3 would need n 7,849)" in rows["tiny_reason"]
    name = "razor_tiny_bf16__razor_tiny_int3_int4_clip16__razor_tiny_int3_int4_gptq_refit"
    axis = json.loads((tmp_path / f"compare/{name}.json").read_text())["metrics"]["tiny_know"]
    assert axis["acc_teacher"] == 1.0 and axis["base_to_teacher"]["lost"] == 4 and axis["other_to_teacher"]["verdict"] == "loss"


def test_a_plan_scales_the_rates_of_models_of_another_size(tmp_path):
    """A model of a thousand times the bytes is not as fast as a toy."""
    rows = [log_row("tiny_math", n, tokens=100) for n in range(10)]
    write_evaluation(tmp_path, "toy", rows, model={"path": "toy", "bytes": 10**7}, seconds=10.0)
    record = json.loads((tmp_path / "eval/toy.json").read_text())
    (tmp_path / "eval/toy.json").write_text(json.dumps(record | {"sampling": {"backend": "hf"}}))
    for size, rate, note in ((15_000_000, 100, ""), (None, 100, ""), (10**10, 0.1, "of a model of 0.01 GB: scaled to 10 GB")):
        ((got, file),) = runs.token_rates(tmp_path, "hf", size).values()
        assert got == pytest.approx(rate) and file.partition(", ")[2] == note
    assert runs.token_rates(tmp_path, "vllm", 10**7) == {}


def test_the_plan_of_a_killed_run_counts_what_it_left(tmp_path):
    path = tmp_path / "a.samples.jsonl"
    SampleLog(path, PLAIN).append([log_row("tiny_know", 1), log_row("tiny_know", 2)])
    path.write_bytes(path.read_bytes()[:-5])
    assert runs.answered(path) == {"tiny_know": 1}
