"""Packed checkpoints in vLLM on a CPU, whose compressed-tensors 0.17 reads codes of 4 and 8 bits: --packed-bits 4.

Runs where pipelines/vllm_cpu_env.sh has made .venv-vllm, or where MOE_LOWBIT_VLLM_VENV names such an environment.
"""

import json
import os
import subprocess

import pytest
from conftest import REPO
from test_vllm_cpu import VENV, hybrid_moe  # noqa: F401  (a fixture)

from packed_export import pack
from quant_save import quantize_checkpoint
from recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (VENV / ".moe-lowbit-ready").exists(), reason="bash pipelines/vllm_cpu_env.sh makes its environment"
    ),
]
RECIPE = Recipe(3, 4, 128, 16)


def run(*arguments):
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # the machine may be busy
    done = subprocess.run(
        [str(part) for part in (VENV / "bin/python", *arguments)], capture_output=True, text=True, cwd=REPO, timeout=500,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def quantized(hybrid_moe, tmp_path_factory):  # noqa: F811
    """razor-tiny as a Qwen3-Next at int3 / int4."""
    path = tmp_path_factory.mktemp("packed") / "plain"
    quantize_checkpoint(hybrid_moe, path, RECIPE)
    return path


def agreement(packed, plain, *more):
    flags = ["--model", packed, "--reference", plain, "--tag", "t", "--items", 8, "--out", packed.parent, *more]
    print(run(REPO / "src/eval/vllm_tokens.py", *flags))
    return json.loads((packed.parent / "t.json").read_text())["metrics"]


def test_vllm_reads_packed_linears(quantized, tmp_path):
    """Stock vLLM on any CPU: the backbone packed, the routed experts in BF16."""
    pack(quantized, tmp_path / "packed", experts=False, least=4)
    found = agreement(tmp_path / "packed", quantized)
    assert any("CPUWNA16LinearKernel" in line for line in found["kernels"]) and found["likeliest"]["places"] > 4000
    assert found["likeliest"]["share"] > 0.99 and found["generated"]["share"] > 0.99, found


def test_vllm_reads_packed_experts(quantized, tmp_path):
    """All of it packed. vLLM offers its CPU kernel of 4-bit experts only where AMX is; the kernel itself lies in the build that
    vLLM loads where AVX-512 has BF16, so the test lifts that one condition. It rounds activations to 8 bits, which no GPU
    kernel does."""
    if "avx512_bf16" not in open("/proc/cpuinfo").read():
        pytest.skip("needs a processor with AVX-512 BF16")
    pack(quantized, tmp_path / "packed", least=4)
    found = agreement(tmp_path / "packed", quantized, "--unlock-cpu-experts")
    assert any("'CPU' WNA16 MoE" in line for line in found["kernels"])
    assert found["likeliest"]["share"] > 0.98 and found["generated"]["share"] > 0.95, found
