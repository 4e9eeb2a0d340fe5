"""vLLM's own engine, on a CPU and in an environment of its own, beside the transformers backend.

Runs where pipelines/vllm_cpu_env.sh has made .venv-vllm, or where MOE_LOWBIT_VLLM_VENV names such an environment.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO
from safetensors.torch import load_file, save_file

from results_store import read_samples

VENV = Path(os.environ.get("MOE_LOWBIT_VLLM_VENV") or REPO / ".venv-vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (VENV / ".moe-lowbit-ready").exists(), reason="bash pipelines/vllm_cpu_env.sh makes its environment"
    ),
]
RENAMED = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}


def as_qwen3_next(tensors, heads, key, value):
    """Qwen3.5's tensors in Qwen3-Next's layout, which is the same function: q, k, v and z of one key head lie together there,
    and so do b and a. ``heads`` key heads, ``key`` and ``value``: rows of q or k, and of v or z, that belong to one of them."""
    made = dict(tensors)
    for name in [name for name in tensors if name.endswith("in_proj_qkv.weight")]:
        stem = name.removesuffix("qkv.weight")
        qkv, z, b, a = (made.pop(f"{stem}{part}.weight") for part in ("qkv", "z", "b", "a"))
        q, k, v = qkv.split([heads * key, heads * key, heads * value])
        rows = [part.view(heads, -1, part.shape[-1]) for part in (q, k, v, z)]
        made[f"{stem}qkvz.weight"] = torch.cat(rows, dim=1).flatten(0, 1)
        made[f"{stem}ba.weight"] = torch.cat([part.view(heads, -1, part.shape[-1]) for part in (b, a)], dim=1).flatten(0, 1)
    return {name: tensor.contiguous() for name, tensor in made.items()}


@pytest.fixture(scope="module")
def hybrid_moe(tmp_path_factory):
    """razor-tiny as a Qwen3-Next: a trained Gated-DeltaNet mixture of experts of a class that vLLM runs on a CPU (its module
    of Qwen3.5 imports torchvision)."""
    path = tmp_path_factory.mktemp("models") / "hybrid-moe"
    path.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(REPO / "models/razor-tiny" / file, path)
    config = json.loads((REPO / "models/razor-tiny/config.json").read_text())
    heads = config["linear_num_key_heads"]
    value = config["linear_value_head_dim"] * config["linear_num_value_heads"] // heads
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}  # of text alone, mrope is rope
    more = {"rope_parameters": rope, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    (path / "config.json").write_text(json.dumps({**config, **RENAMED, **more, "intermediate_size": 256}))
    tensors = load_file(REPO / "models/razor-tiny/model.safetensors")
    save_file(as_qwen3_next(tensors, heads, config["linear_key_head_dim"], value), path / "model.safetensors", {"format": "pt"})
    return path


def evaluate(python, model, out, backend):
    """Run the command as a user would; {key: row} of its samples and its record."""
    run = [python, REPO / "src/eval/vllm_eval8.py", "--model", model, "--tag", backend, "--backend", backend, "--out", out]
    run += ["--benchmarks", "tiny_math,tiny_know", "--limit", "6", "--temperature", "0"]
    done = subprocess.run([str(part) for part in run], capture_output=True, text=True, cwd=REPO, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    _, rows = read_samples(out / f"{backend}.samples.jsonl")
    return {(row["benchmark"], row["id"]): row for row in rows}, json.loads((out / f"{backend}.json").read_text())


def test_vllm_answers_as_transformers_does(hybrid_moe, tmp_path):
    from transformers import AutoTokenizer

    ours, _ = evaluate(VENV / "bin/python", hybrid_moe, tmp_path, "vllm")
    theirs, _ = evaluate(sys.executable, hybrid_moe, tmp_path, "hf")
    assert ours.keys() == theirs.keys() and len(ours) == 12
    tokenizer = AutoTokenizer.from_pretrained(hybrid_moe, local_files_only=True)
    same = total = 0
    for key, row in ours.items():
        assert row["prompt_ids_sha256"] == theirs[key]["prompt_ids_sha256"] and row["prompt_ids_sha256"]
        assert row["prompt_tokens"] == theirs[key]["prompt_tokens"]
        mine, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row["text"], theirs[key]["text"]))
        same += next((i for i, (a, b) in enumerate(zip(mine, other)) if a != b), min(len(mine), len(other)))
        total += max(len(mine), len(other))
    assert total > 200 and same / total > 0.8, (same, total)
