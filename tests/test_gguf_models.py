"""The direct path on other models than razor-tiny: dense Qwen3.5, one with a vision tower; and an imatrix of the probe."""

import json
import re
import subprocess

import gguf
import numpy as np
import pytest
import torch
from conftest import untrained_vl
from safetensors.torch import save_file
from test_source_formats import AS_PUBLISHED
from transformers import AutoTokenizer

from checkpoint import Checkpoint
from gguf_dequant import read_alone
from gguf_format import GgufFile, read_imatrix, run_converter, same_file
from gguf_layout import read_parameter, to_gguf
from gguf_pack import write_pack
from llama_cpp import tool
from pack_plan import plan_pack
from speed_families import tiny_family
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


FAMILIES = (
    "llama qwen2 qwen3 qwen3_moe qwen2_moe qwen3_next mixtral olmoe deepseek_v3 deepseek_v2 gemma3_text gpt_oss llama4_text"
    " nemotron_h granitemoehybrid qwen3_moe+fp8 gpt_oss+mxfp4 deepseek_v3+int4"
).split()
STORED = dict(zip(("fp8", "mxfp4", "int4"), AS_PUBLISHED.values()))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_of_any_architecture_is_that_of_llama_cpps_tools(model_type, quick_converter, tmp_path, monkeypatch):
    """Converted and quantized without a mixture of types: keys, names, types, shapes and bytes."""
    monkeypatch.setattr("gguf_pack.check_loads", lambda path: None)  # not all of these toys are models to llama.cpp
    model_type, _, stored = model_type.partition("+")
    model = tiny_family(tmp_path / model_type, model_type)
    config = json.loads((model / "config.json").read_text())
    config.pop("eos_token_id")  # the tokenizer's alone: another end would be a key that llama.cpp does not write
    (model / "generation_config.json").unlink()
    if model_type == "llama":  # a tensor that no weight is part of: rope_freqs
        config["rope_parameters"] = LLAMA3 | {"original_max_position_embeddings": 128}
    if stored:  # as a publisher may: both read the weights that it stands for
        convert, config["quantization_config"] = STORED[stored]
        tensors = {name: Checkpoint(model).read(name) for name in Checkpoint(model).tensors}
        for file in model.glob("model*"):
            file.unlink()
        save_file(dict(convert(tensors)), model / "model.safetensors", metadata={"format": "pt"})
    (model / "config.json").write_text(json.dumps(config))
    mtp = ["--no-mtp"] if model_type == "qwen3_next" else []
    run_converter("convert", model, "--outfile", tmp_path / "plain.gguf", "--outtype", "bf16", *mtp)
    for kind in ("F16", "Q8_0"):
        command = [tool("llama-quantize"), "--pure", "--allow-requantize"]
        run(*command, tmp_path / "plain.gguf", tmp_path / f"{kind}.gguf", kind)
    if model_type == "llama":  # the file alone, by transformers: queries and keys in the original's order
        read_alone(tmp_path / "plain.gguf", tmp_path / "alone")
        given, alone = Checkpoint(model), Checkpoint(tmp_path / "alone")
        assert all(torch.equal(given.read(name).bfloat16(), alone.read(name)) for name in given.tensors)
        own, read = (AutoTokenizer.from_pretrained(path) for path in (model, alone.path))
        assert own(TEXT)["input_ids"] == read(TEXT)["input_ids"]
    if model_type == "qwen3":  # a name that nothing here knows
        (model / "config.json").write_text(json.dumps(config | {"model_type": "of_nobody"}))
    pack, notes = plan_pack(Checkpoint(model), "f16", [], "nearest")
    assert any("header carries" in note for note in notes)  # what is not compared
    assert any(piece.function == "converter" for piece in pack.pieces) == (model_type == "llama")
    write_pack(pack, tmp_path / "ours")
    assert same_file(tmp_path / "ours" / pack.file_name, tmp_path / "F16.gguf") == []
    pack, theirs = plan_pack(pack.checkpoint, "q8_0", [], "nearest")[0], GgufFile(tmp_path / "Q8_0.gguf")
    assert pack.types == {name: theirs.kind(name) for name in pack.types}
    for piece in pack.pieces:  # our rounding to q8_0 looks for a better unit than theirs
        if pack.types[piece.name] == "q8_0":
            value = to_gguf(piece, read_parameter(pack.checkpoint, piece)).float().numpy()
            rounded = gguf.quants.quantize(value, gguf.GGMLQuantizationType.Q8_0)
            assert np.array_equal(rounded.ravel(), theirs.tensors[piece.name].data.ravel()), piece.name


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
