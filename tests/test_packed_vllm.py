"""Packed checkpoints in the programs that they are made for: the package compressed-tensors, transformers, vLLM on a CPU.

Runs where pipelines/vllm_cpu_env.sh has made .venv-vllm, or where MOE_LOWBIT_VLLM_VENV names such an environment.
"""

import json
import os
import subprocess
import textwrap

import pytest
from conftest import REPO
from test_vllm_cpu import VENV, hybrid_moe  # noqa: F401  (a fixture)

from packed_export import pack, unpack
from quant_save import quantize_checkpoint
from recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (VENV / ".moe-lowbit-ready").exists(), reason="bash pipelines/vllm_cpu_env.sh makes its environment"
    ),
]
RECIPE = Recipe(3, 4, 128, 16)

TRANSFORMERS = textwrap.dedent("""
    # The package's own decompression of every matrix, then the whole model by transformers with that package.
    import collections, json, re, sys, torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    packed, plain = sys.argv[1:]
    config = json.load(open(f"{packed}/config.json"))["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    targets = {target: scheme for scheme in groups for target in scheme.targets}
    stored, expected = load_file(f"{packed}/model.safetensors"), load_file(f"{plain}/model.safetensors")
    equal = collections.Counter()
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        named = [key for key in targets if key.startswith("re:") and re.match(key[3:], stem.removesuffix(".weight"))]
        scheme = targets[named[0] if named else "Linear"]
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        parts = {key: stored[f"{stem}_{key.partition('_')[2]}"] for key in ("weight_packed", "weight_scale", "weight_shape")}
        made, want = compressor.decompress(parts, scheme)["weight"], expected.pop(stem)
        same = made.dtype == want.dtype and torch.equal(made.view(torch.int16), want.view(torch.int16))
        equal[scheme.weights.num_bits] += same
    rest = [name for name, value in expected.items() if not torch.equal(stored[name], value)]

    def load(path):
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.bfloat16, local_files_only=True, output_loading_info=True
        )
        return model, [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]

    (one, lost), (other, _) = load(packed), load(plain)
    ids = torch.randint(0, 800, (2, 64))
    with torch.no_grad():
        same = torch.equal(one(ids).logits, other(ids).logits)
    print(json.dumps({"equal": equal, "rest": rest, "lost": lost, "same": same}))
""")


def run(*arguments):
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}  # the machine may be busy
    done = subprocess.run(
        [str(part) for part in (VENV / "bin/python", *arguments)], capture_output=True, text=True, cwd=REPO, timeout=500,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_compressed_tensors_and_transformers_read_the_same_bits(tmp_path):
    quantize_checkpoint(REPO / "models/razor-tiny", tmp_path / "packed", RECIPE, packed=True)
    unpack(tmp_path / "packed", tmp_path / "plain")
    found = json.loads(run("-c", TRANSFORMERS, tmp_path / "packed", tmp_path / "plain").splitlines()[-1])
    assert found == {"equal": 192 + 24 + 8 + 18, "rest": [], "lost": [], "same": True}


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
    pack(quantized, tmp_path / "packed", experts=False)
    found = agreement(tmp_path / "packed", quantized)
    assert any("CPUWNA16LinearKernel" in line for line in found["kernels"]) and found["likeliest"]["places"] > 4000
    assert found["likeliest"]["share"] > 0.99 and found["generated"]["share"] > 0.99, found


def test_vllm_reads_packed_experts(quantized, tmp_path):
    """All of it packed. vLLM offers its CPU kernel of 4-bit experts only where AMX is; the kernel itself lies in the build that
    vLLM loads where AVX-512 has BF16, so the test lifts that one condition. It rounds activations to 8 bits, which no GPU
    kernel does."""
    if "avx512_bf16" not in open("/proc/cpuinfo").read():
        pytest.skip("needs a processor with AVX-512 BF16")
    pack(quantized, tmp_path / "packed")
    found = agreement(tmp_path / "packed", quantized, "--unlock-cpu-experts")
    assert any("'CPU' WNA16 MoE" in line for line in found["kernels"])
    assert found["likeliest"]["share"] > 0.98 and found["generated"]["share"] > 0.95, found
