"""vLLM's own engine, on a CPU and in an environment of its own, beside the transformers backend.

Runs where pipelines/vllm_cpu_env.sh has made .venv-vllm, or where MOE_LOWBIT_VLLM_VENV names such an environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from records import read_result
from sample_log import read_samples
from speed_multi_gpu import same_tokens
from vllm_form import write_form

VENV = Path(os.environ.get("MOE_LOWBIT_VLLM_VENV") or REPO / ".venv-vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (VENV / ".moe-lowbit-ready").exists(), reason="bash pipelines/vllm_cpu_env.sh makes its environment"
    ),
]


@pytest.fixture(scope="module")
def hybrid_moe(tmp_path_factory):
    """razor-tiny as a Qwen3-Next: a trained Gated-DeltaNet mixture of experts of a class that vLLM runs on a CPU (its module
    of Qwen3.5 imports torchvision)."""
    path = tmp_path_factory.mktemp("models") / "hybrid-moe"
    write_form("qwen3_next", REPO / "models/razor-tiny", path)
    return path


@pytest.fixture
def stranger(tmp_path):
    """A directory whose installed vLLM plugin leaves a mark if it is loaded; (directory, mark)."""
    path, mark = tmp_path / "stranger", tmp_path / "loaded"
    (path / "stranger-1.dist-info").mkdir(parents=True)
    (path / "stranger-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1\n")
    (path / "stranger-1.dist-info/entry_points.txt").write_text("[vllm.general_plugins]\nstranger = stranger:mark\n")
    (path / "stranger.py").write_text(f"def mark():\n    open({str(mark)!r}, 'w').close()\n")
    return path, mark


ENVIRONMENT = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # the machine may be busy


def evaluate(python, model, out, backend, extra_path=None, parallel=1):
    """Run the command as a user would; {key: row} of its samples."""
    run = [python, REPO / "src/eval/vllm_eval8.py", "--model", model, "--tag", backend, "--backend", backend, "--out", out]
    run += ["--benchmarks", "tiny_math,tiny_know", "--limit", "6", "--temperature", "0", "--tensor-parallel", parallel]
    environment = dict(ENVIRONMENT)
    if extra_path:
        environment["PYTHONPATH"] = os.pathsep.join([environment["PYTHONPATH"], str(extra_path)])
    done = subprocess.run([str(part) for part in run], capture_output=True, text=True, cwd=REPO, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(row["benchmark"], row["id"]): row for row in read_samples(out / f"{backend}.samples.jsonl")[1]}


def test_vllm_answers_as_transformers_does(hybrid_moe, tmp_path, stranger):
    """Greedy, on the same weights: the same prompt ids and, but for bfloat16 against float32, the same tokens."""
    from transformers import AutoTokenizer

    path, mark = stranger
    ours = evaluate(VENV / "bin/python", hybrid_moe, tmp_path, "vllm", path)
    theirs = evaluate(sys.executable, hybrid_moe, tmp_path, "hf")
    assert not mark.exists() and ours.keys() == theirs.keys() and len(ours) == 12
    tokenizer = AutoTokenizer.from_pretrained(hybrid_moe, local_files_only=True)
    for key, row in ours.items():
        assert row["prompt_ids_sha256"] == theirs[key]["prompt_ids_sha256"] and row["prompt_ids_sha256"]
        assert row["prompt_tokens"] == theirs[key]["prompt_tokens"] and row["finish_reason"] == "stop"
    found = same_tokens(*(ids_of(tokenizer, rows, sorted(ours)) for rows in (ours, theirs)))
    assert found["tokens"] > 500 and found["same_tokens"] / found["tokens"] > 0.9, found
    assert sum(row["correct"] for row in ours.values()) >= 11
    divided = evaluate(VENV / "bin/python", hybrid_moe, tmp_path / "two", "vllm", parallel=2)
    found = same_tokens(*(ids_of(tokenizer, rows, sorted(ours)) for rows in (ours, divided)))
    assert found["same_tokens"] / found["tokens"] > 0.9, found


def ids_of(tokenizer, rows, keys):
    """Token ids of the answers, as text."""
    ids = [tokenizer(rows[key]["text"], add_special_tokens=False)["input_ids"] for key in keys]
    return [" ".join(map(str, row)) for row in ids]


def test_speed_at_forced_lengths(hybrid_moe, tmp_path):
    """No end token ends a row, batches of any size go through one engine, and a row is the same by itself and among others."""
    run = [VENV / "bin/python", REPO / "src/eval/speed_eval.py", "--model", hybrid_moe, "--backend", "vllm", "--batches", "1,4"]
    run += ["--prompt", 24, "--generate", 40, "--answers", tmp_path / "ids.json", "--result", tmp_path / "r.json", "--tag", "t"]
    done = subprocess.run([str(part) for part in run], capture_output=True, text=True, cwd=REPO, timeout=500, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    speed, ids = (
        read_result(tmp_path / "r.json", "bench")["metrics"]["eval_speed"],
        json.loads((tmp_path / "ids.json").read_text()),
    )
    assert [len(row.split()) for row in ids["1"] + ids["4"]] == [40] * 5
    assert same_tokens(ids["1"], ids["4"][:1])["equal_first_tokens"] == 1
    assert speed["vllm"]["4"]["tokens_per_s"] > speed["vllm"]["1"]["tokens_per_s"] > 0
    assert speed["tensor_parallel"] == 1 and 15e6 < speed["parameters"] < 17e6
