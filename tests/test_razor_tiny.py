"""The model that the repository carries: what it must be, and the smoke pipeline on it."""

import json
import os
import subprocess
import sys

from conftest import REPO

from records import describe_model, read_result

MODEL = REPO / "models/razor-tiny"


def test_it_is_what_its_training_record_says():
    record = read_result(REPO / "results/train/razor_tiny.json", "train")
    assert describe_model(MODEL) == record["model"]
    assert sum(file.stat().st_size for file in MODEL.iterdir()) <= 32_000_000
    config = json.loads((MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3_5MoeForCausalLM"] and config["model_type"].startswith("qwen3_5_moe")
    assert config["hidden_size"] == config["moe_intermediate_size"] == 256 and config["vocab_size"] <= 1024
    kinds = config["layer_types"]
    assert kinds == (["linear_attention"] * 3 + ["full_attention"]) * (len(kinds) // 4)
    assert config["num_experts"] >= 8 and 2 <= config["num_experts_per_tok"] <= 4
    load = [point["min_load"] for point in record["metrics"]["curve"]][-1]
    assert load >= 0.1


def test_smoke_quantizes_and_measures_it(tmp_path):
    config = (REPO / "configs/smoke_tiny.env").read_text().replace("LIMIT=48 ", "LIMIT=8 ").replace("KL_ITEMS=16", "KL_ITEMS=2")
    (tmp_path / "smoke.env").write_text(config)
    environment = {**os.environ, "MOE_LOWBIT_VENV": sys.prefix, "SMOKE_CONFIG": str(tmp_path / "smoke.env")}
    environment["SCRATCH"] = str(tmp_path)
    run = ["bash", REPO / "pipelines/smoke.sh"]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0 and done.stdout.endswith("SMOKE OK\n"), done.stderr
    original = read_result(tmp_path / "smoke/eval/original.json", "eval")["metrics"]
    assert all(metrics["n"] == 8 and metrics["correct"] >= 6 for metrics in original.values()), original
    kl = read_result(tmp_path / "smoke/kl/quantized.json", "kl")["metrics"]["kl"]
    assert 0.001 < kl["mean"] < 0.05 and read_result(tmp_path / "smoke/eval/quantized.json")["peak_rss_mib"] < 3000
