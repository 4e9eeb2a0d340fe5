"""pipelines/multi_gpu.sh on two CPU processes with tiny sizes: its parts leave records, say what failed and go on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from check_results import check_text
from llama_cpp import tool
from page_results import page
from size_model import SHAPES
from speed_multi_gpu import random_teacher


def pipeline(tmp_path, *parts, **environment):
    own = {"TINY": "1", "PROCESSES": "2", "WORK": str(tmp_path / "work"), "RECORDS": str(tmp_path / "records")}
    return subprocess.run(
        ["bash", REPO / "pipelines/multi_gpu.sh", *parts], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MOE_LOWBIT_VENV": str(Path(sys.executable).parent.parent)}
        | own | environment,
    )  # fmt: skip


@pytest.mark.slow
def test_phase_c_at_a_size_leaves_a_record(tmp_path):
    done = pipeline(tmp_path, "train35b")
    assert done.returncode == 0 and "MULTI GPU OK: train35b" in done.stdout, done.stderr
    record = json.loads((tmp_path / "records/multi_gpu_train35b.json").read_text())
    made = record["metrics"]
    assert record["gpus"] == 0 and record["processes"] == len(made["train"]["ranks"]) == 2
    assert made["layers"] == SHAPES["tiny"].layers and len(made["curve"]) == made["steps"] == 4
    assert made["train"]["median_step_seconds"] > 0 and all(rank["peak_rss_mib"] > 0 for rank in made["train"]["ranks"])
    again = pipeline(tmp_path, "train35b")
    assert again.returncode == 0 and "done before" in again.stdout
    (tmp_path / "bench").mkdir()
    (tmp_path / "records/multi_gpu_train35b.json").rename(tmp_path / "bench/multi_gpu_train35b.json")
    shown = page(tmp_path)  # the memory of the fullest process, as its citation says
    assert shown.count("ranks.") == 1 and "on several GPUs" in shown
    assert check_text(shown, tmp_path)[1] == []


def test_a_part_out_of_time_is_said(tmp_path):
    done = pipeline(tmp_path, "quantize", LIMIT="1")
    assert done.returncode == 1 and "quantize: FAILED" in done.stderr and "failed: quantize" in done.stderr
    assert pipeline(tmp_path, "quantise").returncode == 2


def test_random_scores_are_log_probabilities():
    import torch

    from opd_score import score_batch

    rows = [(list(range(7)), 3), (list(range(5)), 2)]
    scores = score_batch(random_teacher(50), rows, 8, 1.0)
    assert [len(part.ids) for part in scores] == [4, 3]
    for part in scores:
        torch.testing.assert_close(part.events().exp().sum(-1), torch.ones(len(part.ids)), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_servers_side_by_side_leave_a_record(tmp_path, bf16_gguf):
    """With llama-server in place of vLLM."""
    serve = tmp_path / "serve"
    serve.write_text(f'#!/bin/bash\nexec {tool("llama-server")} -m {bf16_gguf} -c 4096 -np 4 --alias "$3" --port "$7"\n')
    serve.chmod(0o755)
    done = pipeline(tmp_path, "servers", SERVE=str(serve))
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "records/multi_gpu_servers.json").read_text())["metrics"]
    told, answers = made["greedy"], made["greedy"]["answers"]["2"]
    assert answers["answers"] == 8 and answers["equal_answers"] >= 7 and told["times_one"].keys() == {"1", "2"}
    assert [len(told["phases"][n]["servers"]["answers"]) for n in ("1", "2")] == [1, 2]
