"""The direct path on other models than razor-tiny: dense Qwen3.5, one with a vision tower; and an imatrix of the probe."""

import re
import subprocess

import gguf
import numpy as np
import pytest
import torch
from conftest import untrained_vl

from checkpoint import Checkpoint
from gguf_format import GgufFile, read_imatrix, run_converter
from gguf_pack import write_pack
from llama_cpp import tool
from pack_plan import plan_pack
from tiny_data import build_tokenizer

TEXT = "Sam is 30. Tess is 4 older than Sam. How old is Tess?\n" * 40


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """An untrained dense Qwen3.5 with razor-tiny's tokenizer."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    from tiny_model import tiny_config

    path = tmp_path_factory.mktemp("dense") / "dense-tiny"
    tokenizer = build_tokenizer()
    moe = tiny_config(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, layers=4).to_dict()
    own = {key: value for key, value in moe.items() if not key.startswith(("moe_", "num_experts", "model_type", "router"))}
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(**(own | {"intermediate_size": 512, "architectures": ["Qwen3_5ForCausalLM"]}))
    Qwen3_5ForCausalLM(config).bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """An untrained Qwen3_5MoeForConditionalGeneration with its processor."""
    return untrained_vl(tmp_path_factory.mktemp("seeing") / "seeing-tiny", 100, 4)


def check_equals_converter(model, work):
    """The BF16 file of the direct path against the converter's: every key and tensor. Returns the directory of ours."""
    run_converter("convert", model, "--outfile", work / "theirs.gguf", "--outtype", "bf16", "--no-mtp")
    pack, _ = plan_pack(Checkpoint(model), "bf16", [], "nearest")
    write_pack(pack, work / "ours")
    theirs, ours = (gguf.GGUFReader(path) for path in (work / "theirs.gguf", work / "ours" / pack.file_name))
    assert [k for k in theirs.fields if k not in ours.fields or theirs.fields[k].contents() != ours.fields[k].contents()] == []
    found = {tensor.name: tensor for tensor in ours.tensors}
    assert found.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        assert found[tensor.name].tensor_type == tensor.tensor_type, tensor.name
        assert np.array_equal(found[tensor.name].data, tensor.data), tensor.name
    return work / "ours"


def run(*arguments):
    done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def perplexity(file, text):
    """llama.cpp's logger may lose its last lines at the end of a process on a busy machine: then once more."""
    for _ in range(10):
        out = run(tool("llama-perplexity"), "-m", file, "-f", text, "-c", 128, "-b", 128, "--chunks", 4)
        if found := re.search(r"Final estimate: PPL = (\S+)", out):
            return float(found[1])
    raise AssertionError(out[-2000:])


@pytest.mark.slow
def test_a_dense_model_goes_into_llama_cpp(dense, tmp_path, command):
    check_equals_converter(dense, tmp_path)
    flags = ["--calib-sequences", 4, "--calib-length", 64, "--base-type", "q4_K", "--method", "ldlq"]
    done = command("src/quant/gguf_pack.py", "--model", dense, "--out", tmp_path / "q", *flags)
    assert done.returncode == 0, done.stderr
    (tmp_path / "text").write_text(TEXT)
    plain, small = (perplexity(f, tmp_path / "text") for f in (tmp_path / "theirs.gguf", tmp_path / "q/dense-tiny-Q4_K.gguf"))
    assert 100 < plain < 10000 and small == pytest.approx(plain, rel=0.1)


@pytest.mark.slow
def test_a_model_that_sees_gives_its_text_and_its_tower(seeing, tmp_path):
    ours = check_equals_converter(seeing, tmp_path)
    run_converter("convert", seeing, "--outfile", tmp_path / "tower.gguf", "--outtype", "f16", "--mmproj")
    theirs, tower = (gguf.GGUFReader(p) for p in (tmp_path / "tower.gguf", ours / "seeing-tiny-mmproj-f16.gguf"))
    assert len(tower.tensors) > 15 and all(t.name.startswith(("v.", "mm.")) for t in tower.tensors)
    for a, b in zip(theirs.tensors, tower.tensors, strict=True):
        assert a.name == b.name and np.array_equal(a.data, b.data)
    assert not any(name.startswith(("v.", "mm.")) for name in GgufFile(next(ours.glob("*-BF16.gguf"))).tensors)


@pytest.mark.slow
def test_the_probes_imatrix_is_read_by_both(random_tiny, tmp_path, command):
    flags = ["--calib-sequences", 4, "--calib-length", 64, "--imatrix", tmp_path / "i.gguf"]
    done = command("src/quant/moe_probe.py", "--model", random_tiny, *flags)
    assert done.returncode == 0, done.stderr
    run_converter("convert", random_tiny, "--outfile", tmp_path / "bf16.gguf", "--outtype", "bf16", "--no-mtp")
    (tmp_path / "types").write_text("token_embd=q8_0\n^output=q8_0\n")
    types = ["--tensor-type-file", tmp_path / "types", "--pure", "--imatrix", tmp_path / "i.gguf"]
    said = run(tool("llama-quantize"), *types, tmp_path / "bf16.gguf", tmp_path / "theirs.gguf", "IQ3_XXS")
    entries = read_imatrix(tmp_path / "i.gguf")[0]
    assert f"loaded {len(entries)} importance matrix entries" in said
    missed = set(re.findall(r"did not find weights for ([\w.]+\w)", said))
    assert missed <= {"token_embd.weight", "output.weight"}  # in no imatrix, llama-imatrix's own included
    base = ["--base-type", "iq3_xxs", "--method", "nearest", "--tensor-types", tmp_path / "types"]
    done = command(
        "src/quant/gguf_pack.py", "--model", random_tiny, "--out", tmp_path / "o", *base, "--imatrix", tmp_path / "i.gguf"
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = GgufFile(tmp_path / "theirs.gguf"), GgufFile(next((tmp_path / "o").glob("*.gguf")))
    assert {name: theirs.kind(name) for name in theirs.tensors} == {name: ours.kind(name) for name in ours.tensors}
