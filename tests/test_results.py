"""The record of a run, the sample log that resumes, the page and the checker that trusts nothing."""

import json
import math
import time

import numpy as np
import pytest
from conftest import REPO, log_row, write_evaluation

from check_results import check_text, refreshed
from console import UserError
from intervals import clustered_mcnemar, minimum_detectable, paired_interval, paired_ratio, wilson
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
        rows = [log_row("tiny_math", i, correct=i in right) for i in range(first, limit)]
        write_evaluation(results, tag, rows, {"limit": limit})

    evaluation("base", range(180))
    evaluation("worse", range(150))
    evaluation("same", range(1, 181))
    evaluation("other", range(180), first=30)
    done = command("src/eval/compare_tags.py", "base", "worse", "--results", results)
    assert done.returncode == 0 and "90.0 ->  75.0" in done.stdout and "  loss" in done.stdout, done.stderr
    axis = json.loads((results / "compare/base__worse.json").read_text())["metrics"]["tiny_math"]
    assert axis["lost"] == 30 and axis["won"] == 0 and axis["difference_high"] < 0 and axis["p"] == 2 / 2**30
    done = command("src/eval/compare_tags.py", "base", "same", "--results", results)
    assert "no difference shown (n 200, minimum detectable 3.9)" in done.stdout
    count, faults = check_text(page(results), results)
    assert not faults and "## Differences" in page(results) and count == 18
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
    log.append([log_row("b", 1, x=1), log_row("b", 2, x=2)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])  # killed while writing
    log.close()
    log = SampleLog(path, settings)
    assert list(log.done) == [("b", "1", 0)]
    log.append([log_row("b", 2, x=2)])
    log.close()
    assert path.read_bytes() == whole and read_samples(path)[0] == settings
    with pytest.raises(UserError, match="other settings \\(seed\\)"):
        SampleLog(path, settings | {"seed": 2})


def test_statistics_against_published_values():
    low, high = wilson(81, 263)  # Newcombe 1998, Table I: 0.2553 to 0.3662
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0 and round(wilson(0, 20)[1], 4) == 0.1611 and wilson(5, 5)[1] == 1
    assert clustered_mcnemar([1] * 10, [0] * 10) == pytest.approx(2 / 1024)
    assert minimum_detectable(1000, 0.1) == pytest.approx(2.8016 * 0.01, abs=1e-4)
    e = math.e  # logarithms 1, 2, 3, 4, 5: mean 3, standard deviation 1.5811, t 2.7764
    ratio, low, high = paired_ratio([1] * 5, [e, e**2, e**3, e**4, e**5])
    assert [math.log(v) for v in (ratio, low, high)] == pytest.approx([3, 3 - 1.9632, 3 + 1.9632], abs=1e-4)


@pytest.mark.parametrize("n,lost,won", [(4, 0, 0), (50, 12, 2), (1000, 40, 4), (20, 0, 1), (10, 0, 10)])
def test_the_interval_of_a_paired_difference_inverts_its_score_test(n, lost, won):
    """Against the definition: the likeliest share of losses under each difference is looked for on a grid."""
    a, b = [1] * lost + [0] * won + [1] * (n - lost - won), [0] * lost + [1] * won + [1] * (n - lost - won)
    mean, low, high = paired_interval(a, b)
    assert mean == pytest.approx((won - lost) / n) and low < mean <= high and (mean < high or high == 1)
    for true, z in ((low, 1.959964), (high, -1.959964)):
        if abs(true) == 1:
            continue
        losses = np.linspace(max(0, -true), (1 - true) / 2, 200_003)[1:-1]
        logs = (lost * np.log(losses), won * np.log(losses + true), (n - lost - won) * np.log(1 - 2 * losses - true))
        best = losses[sum(part for part, count in zip(logs, (lost, won, n - lost - won)) if count).argmax()]
        assert (won - lost - n * true) / math.sqrt(n * (2 * best + true - true**2)) == pytest.approx(z, abs=2e-3)


def test_the_interval_of_shares_covers():
    assert paired_interval([0.5] * 3, [0.5] * 3) == paired_interval([1] * 3, [1] * 3)
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):  # items of different difficulty, four answers to each; the second model loses 5 points on each
        chance = rng.beta(2, 1, 60)
        a, b = (rng.binomial(4, share) / 4 for share in (chance, np.clip(chance - 0.05, 0, 1)))
        _, low, high = paired_interval(a, b)
        covered += low <= float((np.clip(chance - 0.05, 0, 1) - chance).mean()) <= high
    assert covered / 300 > 0.92


def test_a_spread_is_over_texts_and_at_equal_bytes():
    found = spread([[1.0, 2.0, 4.0], [0.5, 1.0, 2.0]])
    assert found["llama"]["mean"] == pytest.approx(7 / 3) and found["llama"]["deviation"] == pytest.approx(1.5275, abs=1e-4)
    assert found["ratio"] == found["ratio_low"] == found["ratio_high"] == pytest.approx(0.5)
    llama = {"tag": "a", "model": {"bytes": 1_000_000}, "data": [{"sha256": "0"}], "judge": "a"}
    check_pairs([(llama, llama | {"model": {"bytes": 1_000_500}})])
    with pytest.raises(UserError, match="not the same types"):
        check_pairs([(llama, llama | {"model": {"bytes": 1_010_000}})])
    with pytest.raises(UserError, match="different transcripts"):
        check_pairs([(llama, llama), (llama, llama | {"judge": "b"})])
