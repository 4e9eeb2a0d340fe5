"""vLLM's own engine, on a CPU and in an environment of its own, beside the transformers backend.

Runs where pipelines/vllm_cpu_env.sh has made .venv-vllm, or where MOE_LOWBIT_VLLM_VENV names such an environment.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPO

from results_store import read_samples

VENV = Path(os.environ.get("MOE_LOWBIT_VLLM_VENV") or REPO / ".venv-vllm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (VENV / ".moe-lowbit-ready").exists(), reason="bash pipelines/vllm_cpu_env.sh makes its environment"
    ),
]
HYBRID = dict(
    hidden_size=128, intermediate_size=128, moe_intermediate_size=64, shared_expert_intermediate_size=64, num_experts=4,
    num_experts_per_tok=2, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32,
    max_position_embeddings=512, decoder_sparse_step=1, mlp_only_layers=[], tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def hybrid_moe(tmp_path_factory):
    """A Gated-DeltaNet mixture of experts of random weights that vLLM runs on a CPU, with razor-tiny's tokenizer."""
    from transformers import AutoTokenizer, Qwen3NextConfig, Qwen3NextForCausalLM

    path = tmp_path_factory.mktemp("models") / "hybrid-moe"
    tokenizer = AutoTokenizer.from_pretrained(REPO / "models/razor-tiny", local_files_only=True)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(Qwen3NextConfig(vocab_size=len(tokenizer), **HYBRID, **ids))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)  # logits far enough apart that rounding does not choose
    model.bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
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
    theirs, _ = evaluate(os.sys.executable, hybrid_moe, tmp_path, "hf")
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
