"""The record of a run, the sample log that resumes, the page and the checker that trusts nothing."""

import json
import math
import time

import pytest
from conftest import REPO

from check_results import check_text, refreshed
from console import UserError
from intervals import clustered_mcnemar, minimum_detectable, paired_bootstrap, paired_ratio, wilson
from page_results import page
from records import public_path, render, write_result
from sample_log import SampleLog, read_samples
from study_spread import check_pairs, spread


@pytest.fixture
def results(tmp_path):
    axis = {"acc": 0.9421, "acc_low": 0.93, "acc_high": 0.95, "n": 1000, "trunc": 0.0}
    kl = {"ppl": 1.5, "kl": {"mean": 0.0123, "standard_error": 0.001, "p99": 0.2, "p99_9": 0.4, "top1": 0.97}}
    started = time.time()
    write_result(tmp_path / "eval/a.json", kind="eval", tag="a", started=started, metrics={"tiny_math": axis})
    write_result(tmp_path / "kl/a.json", kind="kl", tag="a", started=started, metrics=kl)
    (tmp_path / "RESULTS.md").write_text(page(tmp_path))
    return tmp_path


def test_a_record_has_what_the_design_asks(results):
    record = json.loads((results / "eval/a.json").read_text())
    required = "schema kind tag command started seconds code model recipe data sampling hardware packages metrics".split()
    assert set(required) <= set(record) and record["peak_rss_mib"] > 10
    assert not any(text.startswith("/") for text in record["command"])
    assert public_path("/somewhere/else/model") == "model"
    with pytest.raises(UserError, match="kind 'evel' is unknown"):
        write_result(results / "eval/b.json", kind="evel", tag="b", started=0.0, metrics={})
    with pytest.raises(ValueError):  # NaN is not JSON, and nothing is left behind
        write_result(results / "eval/b.json", kind="eval", tag="b", started=0.0, metrics={"x": float("nan")})
    assert [p.name for p in (results / "eval").iterdir()] == ["a.json"]


def test_the_page_passes_and_every_kind_of_doctoring_fails(results):
    text = (results / "RESULTS.md").read_text()
    count, faults = check_text(text, results)
    assert count == 8 and not faults
    doctored = {
        text.replace("[94.2 %]", "[94.3 %]"): "is 94.2 %",
        text.replace("(eval/a.json#metrics.tiny_math.acc)", "(eval/b.json#metrics.tiny_math.acc)"): "does not exist",
        text.replace("tiny_math.n)", "tiny_math.m)"): "has no",
        text + "\nAccuracy rose by 7.3 points.\n": "7.3 is not cited",
        text + "\n[better](eval/a.json#metrics.tiny_math.acc)\n": "not a figure",
    }
    for bad, message in doctored.items():
        assert bad != text
        _, faults = check_text(bad, results)
        assert len(faults) == 1 and message in faults[0]
    assert refreshed(text.replace("[94.2 %]", "[12.3 %]"), results) == text
    absent = text.replace("tiny_math.n)", "tiny_math.m)")
    assert refreshed(absent, results) == absent
    (results / "RESULTS.md").unlink()


def test_the_page_of_our_records_is_current_with_one_figure_a_cell():
    text = (REPO / "results/RESULTS.md").read_text()
    assert page(REPO / "results") == text, "run python src/eval/page_results.py"
    cells = [cell for line in text.splitlines() if line.startswith("| ") for cell in line.strip("| ").split(" | ")]
    assert max(cell.count("](") for cell in cells) == 1


def test_the_checker_is_a_gate(results, command):
    assert command("src/eval/check_results.py", results / "RESULTS.md").returncode == 0
    (results / "RESULTS.md").write_text("We reach 99 %.\n")
    done = command("src/eval/check_results.py", results / "RESULTS.md")
    assert done.returncode == 1 and "99 is not cited" in done.stdout


def test_two_tags_are_compared_in_pairs(results, command):
    def evaluation(tag, right, limit=200, first=0):
        row = {"benchmark": "tiny_math"}
        rows = [row | {"id": str(i), "prompt_sha256": str(i), "correct": i in right} for i in range(first, limit)]
        SampleLog(results / f"eval/{tag}.samples.jsonl", {"sampling": {}, "limit": limit, "grader": "1"}).append(rows)
        write_result(results / f"eval/{tag}.json", kind="probe", tag=tag, started=0.0, metrics={})

    evaluation("base", range(180))
    evaluation("worse", range(150))
    evaluation("same", range(1, 181))
    evaluation("other", range(180), first=30)
    done = command("src/eval/compare_tags.py", "base", "worse", "--results", results)
    assert done.returncode == 0 and "90.0 ->  75.0" in done.stdout and "  loss" in done.stdout, done.stderr
    axis = json.loads((results / "compare/base__worse.json").read_text())["metrics"]["tiny_math"]
    assert axis["lost"] == 30 and axis["won"] == 0 and axis["difference_high"] < 0 and axis["p"] == 2 / 2**30
    done = command("src/eval/compare_tags.py", "base", "same", "--results", results)
    assert "no difference shown (n 200, minimum detectable 2.0)" in done.stdout
    count, faults = check_text(page(results), results)
    assert not faults and "## Differences" in page(results) and count == 10
    evaluation("fewer", range(20), limit=50)  # the first items of the same benchmark: those are compared
    done = command("src/eval/compare_tags.py", "base", "fewer", "--results", results)
    assert done.returncode == 0 and "100.0 ->  40.0" in done.stdout, done.stderr
    done = command("src/eval/compare_tags.py", "fewer", "other", "--results", results)
    assert done.returncode == 2 and "saw different prompts" in done.stderr
    done = command("src/eval/compare_tags.py", "base", "none", "--results", results)
    assert done.returncode == 2 and "no finished evaluation 'none'" in done.stderr


def test_pictures_are_of_razor_tiny_alone():
    """Neither its sibling that sees nor recovered models stand among its recipes."""
    from page_report import gguf_points, quantized

    made = quantized(REPO / "results")
    assert len(made) > 20 and not [r["tag"] for r in made if "_vl_" in r["tag"]]
    assert all(len(points) == 4 for points in gguf_points(REPO / "results").values())


def test_render():
    assert render(0.9421, 1, " %") == "94.2 %" and render(1234567, 0) == "1,234,567" and render(6.7e6, 2, " MB") == "6.70 MB"


def test_a_sample_log_resumes_and_drops_a_torn_line(tmp_path):
    path, settings = tmp_path / "a.samples.jsonl", {"model": "m", "seed": 1}
    log = SampleLog(path, settings)
    log.append([{"benchmark": "b", "id": "1", "x": 1}, {"benchmark": "b", "id": "2", "x": 2}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # killed while writing
    log = SampleLog(path, settings)
    assert list(log.done) == [("b", "1", 0)]
    log.append([{"benchmark": "b", "id": "2", "x": 2}])
    assert path.read_bytes() == whole and read_samples(path)[0] == settings
    with pytest.raises(UserError, match="other settings \\(seed\\)"):
        SampleLog(path, settings | {"seed": 2})


def test_statistics_against_published_values():
    low, high = wilson(81, 263)  # Newcombe 1998, Table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0 and round(wilson(0, 20)[1], 4) == 0.1611 and wilson(5, 5)[1] == 1
    assert clustered_mcnemar([1] * 10, [0] * 10) == pytest.approx(2 / 1024)
    a, b = [True] * 80 + [False] * 20, [True] * 70 + [False] * 30
    mean, low, high = paired_bootstrap(a, b)
    assert mean == pytest.approx(-0.1) and low < -0.1 < high < 0
    assert minimum_detectable(1000, 0.1) == pytest.approx(2.8016 * 0.01, abs=1e-4)
    e = math.e  # logarithms 1, 2, 3, 4, 5: mean 3, standard deviation 1.5811, t 2.7764
    ratio, low, high = paired_ratio([1] * 5, [e, e**2, e**3, e**4, e**5])
    assert [math.log(v) for v in (ratio, low, high)] == pytest.approx([3, 3 - 1.9632, 3 + 1.9632], abs=1e-4)


def test_a_spread_is_over_texts_and_at_equal_bytes():
    found = spread([[1.0, 2.0, 4.0], [0.5, 1.0, 2.0]])
    assert found["llama"]["mean"] == pytest.approx(7 / 3) and found["llama"]["deviation"] == pytest.approx(1.5275, abs=1e-4)
    assert found["ratio"] == found["ratio_low"] == found["ratio_high"] == pytest.approx(0.5)
    llama = {"tag": "a", "model": {"bytes": 1_000_000}, "data": [{"sha256": "0"}], "context": 512}
    check_pairs([(llama, llama | {"model": {"bytes": 1_000_500}})])
    with pytest.raises(UserError, match="not the same types"):
        check_pairs([(llama, llama | {"model": {"bytes": 1_010_000}})])
    with pytest.raises(UserError, match="different transcripts"):
        check_pairs([(llama, llama), (llama, llama | {"context": 256})])
