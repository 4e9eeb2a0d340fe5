"""The day of a new model: expectations in one place, a stage is kept, goes on or is refused, a rehearsal on a hub."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPO

import day_one
import llama_cpp
from console import UserError
from day_one import FIGURES, PREREGISTERED, Day, DaySettings, Stage, expectations, run_stages, verdict
from size_model import SHAPES
from synthetic_moe import prepare

TEXT = PREREGISTERED.read_text(encoding="utf-8")
ZEROS = "0" * 40


def test_expectations_are_those_of_the_document(tmp_path, monkeypatch):
    rows, of = expectations(TEXT)
    assert rows.keys() == FIGURES.keys() and of["model"] == "Qwen3.5-122B-A10B" and len(of["text"]) == 64
    assert rows["kl_q8"][:3] == (0.050, 0.077, 0.077) and rows["ppl"][0] == 4.95
    points = [line.split("|")[1:3] for line in TEXT.splitlines() if line.startswith(("| 44.9", "| 55.1"))]
    (low, a), (high, b) = [[float(cell) for cell in cells] for cells in points]
    assert a * (b / a) ** ((48.04 - low) / (high - low)) == pytest.approx(rows["kl_q8"][1], abs=5e-4)  # the line, read off
    assert [verdict(value, 0.050, 0.077) for value in (0.05, 0.06, 0.08)] == ["as expected", "missed", "refuted"]
    other = tmp_path / "other.md"
    other.write_text(TEXT.replace("| `kl_q8` | 0.050 ", "| `kl_q8` | 0.040 "), encoding="utf-8")
    monkeypatch.setattr(day_one, "PREREGISTERED", other)
    record = {"schema": 1, "kind": "kl", "tag": "t", "started": "", "seconds": 1, "code": {}, "model": {}, "recipe": None}
    (tmp_path / "kl").mkdir()
    text = json.dumps(record | {"data": [], "hardware": {}, "metrics": {"tool": {"mean": 0.045, "ppl": 5.2}}})
    (tmp_path / "kl/t_wiki.json").write_text(text)
    day = Day.__new__(Day)  # without its model
    wiki = REPO.parent / "shared/data/wiki.test.raw"
    day.settings, day.results, day.work, day.tag = DaySettings(model="m", chunks=0), tmp_path, tmp_path, "t"
    day.name, day.wiki = of["model"], wiki if wiki.is_file() else None
    said = {row[0]: row[3:] for row in day.expected()}
    if day.wiki:
        assert said[rows["kl_q8"][3]] == ["[0.0450](kl/t_wiki.json#metrics.tool.mean)", "missed"]
        assert said[rows["ppl"][3]][1] == "refuted" and said[rows["kl_bf16"][3]] == ["", "not measured"]
        (tmp_path / "kl/t_wiki.json").write_text(text.replace("5.2", '5.2, "ppl_reference": 4.9'))
        assert dict(row[::4] for row in day.expected())[rows["ppl"][3]].startswith("not judged: another ruler")
    day.name = "razor-tiny"
    assert {row[4] for row in day.expected()} == {"not judged: another model", "not measured"}
    with pytest.raises(UserError, match="differ in ppl"):
        expectations(TEXT.replace("| `ppl` |", "| ppl |"))


def copying(source, product, record, *more):
    """A stage that makes two files of one; each run leaves a line in a log."""
    script = f"echo run$2 >>{record}.log; cp {source} {product}; cp {source} {record}"
    command = ["bash", "-c", script, "x", *(more or ("",))]
    return Stage("copy", command, (source,), (product, record), force=True)


def test_a_stage_is_kept_goes_on_or_is_refused(tmp_path):
    marks, source, product, record = (tmp_path / name for name in ("stages", "source", "product", "record.json"))
    source.write_text("a")
    stage, log = copying(source, product, record), tmp_path / "record.json.log"
    assert stage.state(marks) == "to do" and run_stages([stage], marks) == 0
    assert stage.state(marks) == "kept" and run_stages([stage], marks) == 0 and log.read_text() == "run\n"
    record.unlink()  # killed between the product and its record
    assert stage.state(marks) == "goes on" and run_stages([stage], marks) == 0 and log.read_text() == "run\nrun--force\n"
    product.write_text("b")
    with pytest.raises(UserError, match="product: is not what stage copy made"):
        stage.state(marks)
    product.write_text("a")
    source.write_text("c")
    with pytest.raises(UserError, match="made of another .*source: .*remove"):
        stage.state(marks)
    source.write_text("a")
    with pytest.raises(UserError, match="made by another command"):
        copying(source, product, record, "more").state(marks)
    for text in (b"[1, 2]", b"{not json", b"", b'{"a": 1}', b'{"command": 1, "inputs": 2, "made": 3}'):
        (marks / "copy.json").write_bytes(text)
        with pytest.raises(UserError, match="copy"):
            stage.state(marks)
    (marks / "copy.json").unlink()
    with pytest.raises(UserError, match="product: exists, and was not made by stage copy"):
        stage.state(marks)
    later = Stage("later", ["true"], (tmp_path / "never",))
    failing = Stage("failing", ["bash", "-c", "exit 3"], (source,))
    kept = Stage("talk", ["echo", "hello"], (), log=tmp_path / "said")
    assert run_stages([failing, later, kept], marks) == 3 and (tmp_path / "said").read_text() == "hello\n"
    assert "exit code 3" in failing.skipped and "never, which is not there" in later.skipped
    with pytest.raises(KeyboardInterrupt):
        run_stages([Stage("stopped", ["bash", "-c", "exit 130"])], marks)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LLAMA_CPP"), reason="LLAMA_CPP is not set")
def test_the_plan_of_the_real_model_comes_from_its_headers(tmp_path, command):
    model = tmp_path / "Qwen3.5-122B-A10B"
    prepare(model, SHAPES["122b"], 0, published="3.5")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(REPO / "models/razor-tiny" / name, model)
    more = ("--benchmarks", "tiny_math,gpqa,tau2", "--data-dir", tmp_path, "--limit", 100)
    done = command("src/eval/day_one.py", "--model", model, "--work", tmp_path / "w", "--plan", *more)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()}
    assert rows["packed"][1:6] == ["to", "do", "19", "min", "51.9"] and rows["gguf"][3:6] == ["29", "min", "53.0"]
    assert "gpqa.jsonl" in done.stdout and "tau2-bench package is not installed" in done.stdout and "--wiki FILE" in done.stdout
    assert "tokens/s" in done.stdout and "in all" in done.stdout and not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_rehearsal_from_a_hub_survives_a_kill(tmp_path):
    """Headers, a packed checkpoint, a benchmark, the gate and the card; what this machine lacks is named on it."""
    shutil.copytree(REPO / "models/razor-tiny", tmp_path / "root/me/razor-tiny")
    port, out = tmp_path / "port", tmp_path / "run"
    server = subprocess.Popen([sys.executable, REPO / "tests/hub_server.py", tmp_path / "root", port, tmp_path / "log"])
    while not port.exists() or not port.read_text():
        time.sleep(0.02)
    config = tmp_path / "q.env"
    config.write_text("MODEL=m\nOUT=o\nEXPERT_BITS=3\nLINEAR_BITS=4\nGROUP=128\nMETHOD=absmax\n")
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port.read_text()}", "MOE_LOWBIT_CACHE": str(tmp_path / "c")}
    environment |= {"LLAMA_CPP": str(tmp_path), "LLAMA_CPP_SOURCE": str(llama_cpp.source())}  # no tool, only the converter
    line = [sys.executable, REPO / "src/eval/day_one.py", "--model", f"hf:me/razor-tiny@{ZEROS}", "--work", out, "--results"]
    line += [tmp_path / "results", "--quantize-config", config, "--benchmarks", "tiny_know,mathvision", "--data-dir", tmp_path]
    line += ["--limit", "2"]
    try:
        first = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
        for text in first.stdout:
            if text.startswith("== eval_tiny_know"):
                os.killpg(first.pid, signal.SIGKILL)
        first.wait()
        done = subprocess.run(line, env=environment, capture_output=True, text=True)
    finally:
        server.kill()
        server.wait()
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "== packed: kept" in done.stdout and "0 faults" in done.stdout
    card = (out / "README.md").read_text()
    assert "razor_tiny_eval_tiny_know.json#metrics.tiny_know.acc)" in card and "not measured" in card
    assert "- `gguf`: " in card and "- `eval_mathvision`: " in card and "- `wiki`: " in card and "- `panel_gguf`: " in card
