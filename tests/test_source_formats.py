"""Weights in FP8, MXFP4, INT4 and INT8, decoded bit for bit as the library that owns the format does."""

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from calibration import Calibration
from checkpoint import Checkpoint
from console import UserError
from hf_model import load_model
from packed_format import pack_codes
from quant_save import quantize_checkpoint
from recipe import Recipe
from source_formats import unpack_words
from speed_families import tiny_family


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def checkpoint_of(directory, tensors, quantization):
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "llama", "vocab_size": 8}
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return Checkpoint(directory)


def same_in_pieces(checkpoint, name, wanted):
    """The tensor, whole and in chunks of three rows, is ``wanted`` bit for bit."""
    assert checkpoint.info(name).dtype == torch.bfloat16
    assert torch.equal(checkpoint.read(name), wanted)
    row = checkpoint.info(name).bytes // wanted.shape[0]
    assert torch.equal(torch.cat([piece for _, piece in checkpoint.read_chunks(name, 3 * row)]), wanted)


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_fp8_blocks_are_those_of_transformers(tmp_path, scale_dtype):
    tensors, wanted = {"model.norm.weight": random(128).bfloat16()}, {}
    for name, shape in {"a.weight": (256, 384), "b.experts.gate_up_proj": (4, 128, 256)}.items():
        codes, grid = random(*shape).to(torch.float8_e4m3fn), (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
        scale = (random(*grid).abs() / 100 + 1e-4).to(scale_dtype)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
        wanted[name] = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)
    checkpoint = checkpoint_of(tmp_path, tensors, FP8)
    assert sorted(checkpoint.tensors) == ["a.weight", "b.experts.gate_up_proj", "model.norm.weight"]
    assert "quantization_config" not in checkpoint.config and checkpoint.source_format == "fp8 e4m3"
    for name, value in wanted.items():
        same_in_pieces(checkpoint, name, value)


def test_fp8_blocks_may_end_early(tmp_path):
    """DeepSeek-V3's kv_a_proj_with_mqa has 576 rows, so its last block holds 64."""
    codes, scale = random(192, 320).to(torch.float8_e4m3fn), random(2, 3).abs()
    checkpoint = checkpoint_of(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scale}, FP8)
    spread = scale.repeat_interleave(128, 0)[:192].repeat_interleave(128, 1)[:, :320]
    same_in_pieces(checkpoint, "a.weight", (codes.float() * spread).bfloat16())


def test_mxfp4_is_that_of_transformers(tmp_path):
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (5, 12, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 256, (5, 12, 2), dtype=torch.uint8, generator=generator)
    stored = {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}
    stored["mlp.experts.down_proj_bias"] = random(5, 12).bfloat16()
    checkpoint = checkpoint_of(tmp_path, stored, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    assert checkpoint.info("mlp.experts.down_proj").shape == (5, 64, 12)
    same_in_pieces(checkpoint, "mlp.experts.down_proj", convert_moe_packed_tensors(blocks, scales))


INT = {"type": "int", "strategy": "group", "group_size": 32}
SCHEMES = {
    "int4, groups": ("pack-quantized", {**INT, "num_bits": 4}),
    "int4, groups, zero points": ("pack-quantized", {**INT, "num_bits": 4, "symmetric": False}),
    "int4, channels": ("pack-quantized", {**INT, "num_bits": 4, "strategy": "channel", "group_size": None}),
    "int8, groups": ("pack-quantized", {**INT, "num_bits": 8}),
    "int8, channels": ("int-quantized", {"type": "int", "num_bits": 8, "strategy": "channel"}),
    "fp8, channels": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel"}),
    "fp8, tensor": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "tensor"}),
    "fp8, blocks": ("float-quantized", {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [32, 64]}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_are_those_of_the_library(tmp_path, name, dtype):
    form, arguments = SCHEMES[name]
    args = QuantizationArgs(**arguments)
    rows, inputs = (64, 128) if args.strategy != "channel" else (40, 100)
    weight = random(rows, inputs).to(dtype)
    shapes = {"group": (rows, inputs // 32, 32), "channel": (rows, 1, inputs), "tensor": (1, -1)}
    if args.strategy == "block":
        grouped = weight.view(2, 32, 2, 64).transpose(1, 2).flatten(2)
    else:
        grouped = weight.view(shapes[args.strategy])
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    state = {"weight": weight, "weight_scale": scale.to(dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero
    stored = compressor.compress(state, scheme)
    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "input_activations": None}
    tensors = {f"model.x.{key}": value.contiguous() for key, value in stored.items()}
    tensors["model.x.input_scale"] = torch.ones(1)
    found = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}, "ignore": ["lm_head"]}
    checkpoint = checkpoint_of(tmp_path, tensors, found)
    assert list(checkpoint.tensors) == ["model.x.weight"]
    same_in_pieces(checkpoint, "model.x.weight", compressor.decompress(stored, scheme)["weight"].bfloat16())


def test_an_order_of_activations_is_followed(tmp_path):
    """weight_g_idx names the group of each input: quantizing sorted columns, then sorting back, is the same matrix."""
    args = QuantizationArgs(**INT, num_bits=4)
    index = torch.arange(128).remainder(4).int()
    order = index.argsort(stable=True)
    back = order.argsort()
    weight, scale = random(16, 128).bfloat16(), (random(16, 4).abs() / 4 + 0.01).bfloat16()
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = compressor.compress({"weight": weight[:, order], "weight_scale": scale}, scheme)
    wanted = compressor.decompress(stored, scheme)["weight"][:, back]
    codes = unpack_words(stored["weight_packed"], 4, 128)[:, back]
    stored |= {"weight_packed": pack_codes(codes, 4), "weight_g_idx": index}
    group = {"targets": ["re:.*x$"], "weights": args.model_dump(mode="json") | {"actorder": "group"}}
    found = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    checkpoint = checkpoint_of(tmp_path, {f"model.x.{key}": value for key, value in stored.items()}, found)
    same_in_pieces(checkpoint, "model.x.weight", wanted)


CODES = random(128, 128).to(torch.float8_e4m3fn)
GOOD = {"a.weight": CODES, "a.weight_scale_inv": random(1, 1)}


@pytest.mark.parametrize(
    ("tensors", "quantization", "said"),
    [
        (GOOD, {"quant_method": "awq"}, "quant_method 'awq' is not read here"),
        (GOOD, {"quant_method": "fp8", "rotation": 1}, "not known here: rotation"),
        (GOOD, FP8 | {"fmt": "e5m2"}, "fmt 'e5m2' is not read here"),
        ({"a.weight": CODES}, FP8, "a.weight has no a.weight_scale_inv"),
        (GOOD | {"a.weight_scale_inv": random(2, 1)}, FP8, r"\[2, 1\], which does not fit a.weight"),
        ({"a.weight": random(8, 8), "b.weight_scale_inv": random(1, 1)}, FP8, "b.weight_scale_inv is F32 without"),
        (GOOD, None, "a.weight_scale_inv without a quantization_config"),
        (GOOD, {"quant_method": "compressed-tensors", "transform_config": {"R1": 1}}, "transform_config is not read"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tmp_path, tensors, quantization, said):
    with pytest.raises(UserError, match=said):
        checkpoint_of(tmp_path, tensors, quantization)


def to_fp8(tensors):
    for name, value in tensors.items():
        if name.endswith("_proj.weight") or ".experts." in name and name.endswith((".w1.weight", ".w2.weight", ".w3.weight")):
            scale = value.float().abs().amax().view(1, 1) / 448
            yield name, (value.float() / scale).to(torch.float8_e4m3fn)
            yield f"{name}_scale_inv", scale
        else:
            yield name, value


def to_mxfp4(tensors):
    generator = torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = value.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator)
            yield f"{name}_blocks", blocks
            yield f"{name}_scales", torch.full(blocks.shape[:-1], 121, dtype=torch.uint8)
        else:
            yield name, value


def to_int4(tensors):
    args = QuantizationArgs(**INT, num_bits=4)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for name, value in tensors.items():
        if ".experts." in name:
            groups = value.view(len(value), -1, 32)
            scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
            state = {"weight": value, "weight_scale": scale.bfloat16()}
            for key, part in compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args)).items():
                yield f"{name.removesuffix('weight')}{key}", part.contiguous()
        else:
            yield name, value


GROUP = {"targets": ["Linear"], "weights": QuantizationArgs(**INT, num_bits=4).model_dump(mode="json")}
AS_PUBLISHED = {  # family -> how its publisher stores it
    "minimax_m2": (to_fp8, FP8),
    "gpt_oss": (to_mxfp4, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}),
    "kimi_k2": (to_int4, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"g": GROUP}}),
}


@pytest.mark.parametrize("family", AS_PUBLISHED)
def test_a_checkpoint_in_its_published_format_is_quantized_as_its_bf16(family, tmp_path, capsys):
    convert, quantization = AS_PUBLISHED[family]
    source, plain = tiny_family(tmp_path / "source", family), tmp_path / "plain"
    tensors = {name: Checkpoint(source).read(name) for name in Checkpoint(source).tensors}
    for file in source.glob("model*"):
        file.unlink()
    config = json.loads((source / "config.json").read_text())
    save_file(dict(convert(tensors)), source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    shutil.copytree(source, plain)
    decoded = Checkpoint(source)
    save_file({name: decoded.read(name) for name in decoded.tensors}, plain / "model.safetensors", metadata={"format": "pt"})
    (plain / "config.json").write_text(json.dumps(config))
    for name in ("source", "plain"):
        ids = torch.randint(5, 800, (8, 32), generator=torch.Generator().manual_seed(0))
        text = Calibration(ids, {"name": "random"}, token_power=0.4)
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-q", Recipe(3, 4, 16, 1, method="gptq"), calibration=text)
    one, other = Checkpoint(tmp_path / "source-q"), Checkpoint(tmp_path / "plain-q")
    assert one.tensors.keys() == other.tensors.keys() and "quantization_config" not in json.loads(
        (one.path / "config.json").read_text()
    )
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name)), name
    with torch.no_grad():
        logits = [load_model(tmp_path / name)(torch.arange(5, 40)[None]).logits for name in ("source", "plain")]
    assert torch.equal(*logits)
