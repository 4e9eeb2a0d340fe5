"""Packed checkpoints: what is packed unpacks to the same bits, the same files, in the same places; anything else is refused."""

import collections
import dataclasses
import json
import re
import shutil

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from conftest import REPO
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import packed_format
from calibration import Calibration
from checkpoint import PACKED, Checkpoint
from console import UserError
from families import BOTH_ENDS, Role
from moe_ptq import Grid, Statistics, round_weight
from moe_quant import Quantized, dequantize, quantize_group
from packed_export import check, pack, sizes, unpack
from packed_format import codes_of, pack_codes, plan_container
from plans import plan_jobs
from quant_save import quantize_checkpoint
from recipe import Recipe
from safetensors_file import open_tensors
from source_formats import unpack_words, word_count

# What a packed checkpoint holds in BF16 is not rounded: with these left alone in the plain one too, the two are the same model.
KEPT = {"overrides": tuple((f"*{name}.weight", 16) for name in ("embed_tokens", "in_proj_a", "in_proj_b"))}
RECIPE = Recipe(3, 4, 128, 4, **KEPT)
SHARD = 1 << 20


def calibration():
    ids = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, {"name": "random", "revision": "0", "sha256": None, "n": 4}, batch=4, device=torch.device("cpu"))


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.fixture(scope="module")
def fused(random_tiny, tmp_path_factory):
    """random_tiny with the experts of a layer in one tensor, as the hub's Qwen3.5 has them."""
    path = tmp_path_factory.mktemp("models") / "fused"
    shutil.copytree(random_tiny, path)
    tensors = load_file(path / "model.safetensors")
    for layer in range(4):
        stem = f"model.layers.{layer}.mlp.experts"
        each = [[tensors.pop(f"{stem}.{e}.{part}_proj.weight") for part in ("gate", "up", "down")] for e in range(8)]
        tensors[f"{stem}.gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        tensors[f"{stem}.down_proj"] = torch.stack([down for *_, down in each])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_of_the_format(bits):
    """A row is one number: code k, offset, times 2 ** (k bits)."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 64), dtype=torch.int8)
    rows = [sum((int(c) + 2 ** (bits - 1)) << bits * k for k, c in enumerate(row)) for row in codes]
    words = pack_codes(codes, bits)
    assert [[w % 2**32 for w in row] for row in words.tolist()] == [
        [row >> 32 * j & 2**32 - 1 for j in range(2 * bits)] for row in rows
    ]
    for inputs in (64, 33, 8, 5):  # rows of other lengths end within a word
        assert torch.equal(unpack_words(words[:, : word_count(inputs, bits)], bits, inputs), codes[:, :inputs])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codes_and_scales_are_recovered_from_the_values_alone(bits, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    weight = torch.randn(32, 512, dtype=torch.float64).mul_(torch.logspace(-3, 1, 512)).bfloat16().to(device)
    weight[5, :128] = 0
    made = quantize_group(weight, bits, 128, 16)
    found = codes_of(dequantize(made, 128), (bits,), 128)
    assert torch.equal(found.codes, made.codes) and torch.equal(found.scale, made.scale)
    codes = unpack_words(pack_codes(found.codes, bits), bits, 512)
    assert same_bits(dequantize(Quantized(codes, found.scale.bfloat16().float()), 128), dequantize(made, 128))
    off = dequantize(made, 128)
    off[3, 7] = 0.37 * off[3, :128].abs().max()
    with pytest.raises(UserError, match=f"not on a symmetric grid of {bits} bits"):
        codes_of(off, (bits,), 128)


@pytest.mark.parametrize(
    "method,expert_bits", [("absmax", 3), ("clip", 2), ("wclip", 2.5), pytest.param("gptq_refit", 3, marks=pytest.mark.slow)]
)
def test_every_tensor_and_every_file_comes_back(random_tiny, tmp_path, method, expert_bits):
    recipe, more = Recipe(expert_bits, 4, 128, 4, method=method, **KEPT), {}
    if method not in ("absmax", "clip"):
        more = {"calibration": calibration()}
    quantize_checkpoint(random_tiny, tmp_path / "plain", recipe, shard_bytes=SHARD, **more)
    report = quantize_checkpoint(random_tiny, tmp_path / "packed", recipe, shard_bytes=SHARD, packed=True, **more)
    plain, packed = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "packed")
    assert list(plain.tensors) == list(packed.tensors) and len(packed.files) > 2
    assert all(same_bits(packed.read(name), plain.read(name)) for name in plain.tensors)
    stored = sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in packed.files)
    assert report.container["bytes"] == stored < (0.22 if expert_bits == 2 else 0.28) * plain.bytes
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "plain")
    pack(tmp_path / "plain", tmp_path / "later", shard_bytes=SHARD)
    assert check(tmp_path / "later", tmp_path / "plain")["bit_equal"] == len(plain.tensors)
    if method in ("absmax", "clip"):  # no layer begins a file, so these are the very same
        assert contents(tmp_path / "later") == contents(tmp_path / "packed")


def test_fused_experts_lie_one_by_one_and_come_back_fused(fused, random_tiny, tmp_path):
    recipe = Recipe(3, 4, 128, 4, **KEPT, experts=(("model.layers.1.mlp.experts", (2, 3, 4, 3, 2, 4, 3, 3)),))
    quantize_checkpoint(fused, tmp_path / "plain", recipe, shard_bytes=SHARD, chunk_bytes=300_000)
    quantize_checkpoint(fused, tmp_path / "packed", recipe, shard_bytes=SHARD, chunk_bytes=300_000, packed=True)
    quantize_checkpoint(random_tiny, tmp_path / "single", recipe, packed=True)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "plain")
    one, other = ({}, {})
    for found, path in ((one, "packed"), (other, "single")):
        for file in Checkpoint(tmp_path / path).files:
            found.update(load_file(file))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    name = "model.layers.2.mlp.experts.gate_up_proj"
    whole, rows = Checkpoint(tmp_path / "packed"), []
    for start, part in whole.read_chunks(name, 300_000):
        assert start == len(rows)
        rows += list(part)
    assert same_bits(torch.stack(rows), whole.read(name)) and whole.info(name).shape == (8, 512, 256)
    assert one["model.layers.2.mlp.experts.3.up_proj.weight_shape"].tolist() == [256, 256]


def test_a_run_cut_short_anywhere_goes_on_to_the_same_bytes(fused, tmp_path, monkeypatch):
    put, puts = packed_format.PackedWriter._put, []

    def cut(self, name, value):
        if name == kill["at"]:
            raise OSError("stands for a kill")
        puts.append(name)
        put(self, name, value)

    monkeypatch.setattr(packed_format.PackedWriter, "_put", cut)
    kill = {"at": None}
    quantize_checkpoint(fused, tmp_path / "alone", RECIPE, shard_bytes=SHARD // 4, packed=True)
    expected = contents(tmp_path / "alone")
    for kill["at"] in list(puts)[40::70]:
        with pytest.raises(OSError, match="stands for a kill"):
            quantize_checkpoint(fused, tmp_path / "cut", RECIPE, shard_bytes=SHARD // 4, packed=True)
    assert len(puts) < 3 * len(set(puts))  # what was complete was not made again; from the start it would be more than 4
    kill["at"] = None
    with pytest.raises(UserError, match=r"unfinished run with other settings \(packed\)"):
        quantize_checkpoint(fused, tmp_path / "cut", RECIPE, shard_bytes=SHARD // 4)
    quantize_checkpoint(fused, tmp_path / "cut", RECIPE, shard_bytes=SHARD // 4, packed=True)
    assert contents(tmp_path / "cut") == expected


def test_compressed_tensors_and_transformers_read_the_same_bits(random_tiny, tmp_path):
    """The package's own decompression of every matrix, of each width; then the whole model by transformers, by that package."""
    recipe = Recipe(3, 4, 128, 4, overrides=(*RECIPE.overrides, ("model.layers.2.linear_attn.out_proj.weight", 2)))
    quantize_checkpoint(random_tiny, tmp_path / "packed", recipe, packed=True)
    unpack(tmp_path / "packed", tmp_path / "plain")
    config = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    schemes = {target: scheme for scheme in groups for target in scheme.targets}
    stored, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "plain"))
    equal = collections.Counter()
    for name in [name for name in stored if name.endswith(".weight_packed")]:
        stem = name.removesuffix("_packed")
        own = [key for key in schemes if key.startswith("re:") and re.match(key[3:], stem.removesuffix(".weight"))]
        scheme = schemes[own[0] if own else "Linear"]
        parts = {f"weight_{part}": stored[f"{stem}_{part}"] for part in ("packed", "scale", "shape")}
        made = BaseCompressor.get_value_from_registry(scheme.format).decompress(parts, scheme)["weight"]
        equal[scheme.weights.num_bits] += same_bits(made, expected.pop(stem))
    assert equal == {2: 1, 3: 96, 4: 12 + 3 + 9 + 1}
    assert all(same_bits(stored[name], value) for name, value in expected.items())
    ids, logits = torch.randint(0, 300, (2, 64)), []
    for name in ("packed", "plain"):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert same_bits(*logits)
    (tmp_path / "packed" / PACKED).unlink()  # as another's file of this format, which config.json alone describes
    plain, bare = Checkpoint(tmp_path / "plain"), Checkpoint(tmp_path / "packed")
    assert bare.tensors.keys() == plain.tensors.keys()
    assert all(same_bits(bare.read(name), plain.read(name)) for name in plain.tensors)


def test_several_devices_write_the_same_bytes(fused, tmp_path):
    for count in (1, 3):
        devices = (torch.device("cpu"),) * count
        quantize_checkpoint(fused, tmp_path / str(count), RECIPE, shard_bytes=SHARD // 4, packed=True, devices=devices)
    assert contents(tmp_path / "1") == contents(tmp_path / "3") and len(Checkpoint(tmp_path / "3").files) > 6


def test_what_is_not_packed_is_what_the_config_ignores(random_tiny, tmp_path, capsys):
    """Each linear is packed or ignored; what vLLM fuses shares its lot; what is left in BF16 is as it was."""
    kept, odd = "model.layers.3.self_attn.q_proj.weight", "model.layers.2.linear_attn.in_proj_z.weight"
    recipe = Recipe(3, 4, 128, 4, overrides=((kept, 16), (odd, 6), ("lm_head.weight", 5), ("model.layers.1.mlp.experts.*", 2)))
    quantize_checkpoint(random_tiny, tmp_path / "packed", recipe, packed=True)
    config = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    stored = load_file(tmp_path / "packed/model.safetensors")
    packed = {name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")}
    linears = {name.removesuffix(".weight") for name, t in stored.items() if name.endswith(".weight") and t.ndim == 2}
    linears -= {"model.embed_tokens"}
    patterns = [x.removeprefix("re:") if x.startswith("re:") else re.escape(x) for x in config["ignore"]]
    ignored = {name for name in packed | linears if any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert ignored == linears and packed and not packed & linears
    attention = {f"model.layers.3.self_attn.{part}_proj" for part in "qkv"}
    assert attention <= linears and "model.layers.3.self_attn.o_proj" in packed
    assert {"model.layers.0.linear_attn.in_proj_a", "model.layers.0.mlp.gate"} <= linears
    groups = {}
    for group in config["config_groups"].values():
        weights = group["weights"]
        assert weights["symmetric"] and weights["group_size"] == 128
        groups |= {target: weights["num_bits"] for target in group["targets"]}
    bits = {}
    for name in packed:  # those that a loader makes one matrix of have one width
        own = [size for target, size in groups.items() if target.startswith("re:") and re.match(target[3:], name)]
        assert len(own) < 2
        bits[name] = own[0] if own else groups["Linear"]
        assert stored[f"{name}.weight_packed"].shape[1] == stored[f"{name}.weight_shape"][1] * bits[name] / 32
    assert bits["lm_head"] == 5 and bits["model.layers.0.linear_attn.out_proj"] == 4
    assert {bits[f"model.layers.2.linear_attn.in_proj_{part}"] for part in ("qkv", "z")} == {6}
    assert [bits[f"model.layers.{layer}.mlp.experts.7.up_proj"] for layer in range(4)] == [3, 2, 3, 3]
    assert "experts of 2, 3 bits: vLLM reads them, transformers does not" in capsys.readouterr().out
    source = Checkpoint(random_tiny)
    assert all(same_bits(stored[f"{name}.weight"], source.read(f"{name}.weight")) for name in linears | {"model.embed_tokens"})


def test_a_packed_checkpoint_runs_like_the_plain_one(random_tiny, tmp_path):
    from hf_model import load_model

    quantize_checkpoint(random_tiny, tmp_path / "plain", RECIPE)
    quantize_checkpoint(random_tiny, tmp_path / "packed", RECIPE, packed=True)
    ids = torch.randint(0, 300, (2, 32))
    logits = [load_model(tmp_path / name)(ids).logits for name in ("plain", "packed")]
    assert torch.equal(*logits)


def test_a_calibrated_pass_goes_on_from_a_packed_embedding(random_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "family", dataclasses.replace(Checkpoint(random_tiny).family, packed_ends=BOTH_ENDS))
    recipe = dataclasses.replace(RECIPE, method="gptq", overrides=RECIPE.overrides[1:])
    for name, packed in (("plain", False), ("packed", True)):
        quantize_checkpoint(random_tiny, tmp_path / name, recipe, calibration=calibration(), packed=packed)
    one, other = (Checkpoint(tmp_path / name) for name in ("plain", "packed"))
    assert any(name.endswith("embed_tokens.weight_packed") for name in open_tensors(other.path)[1])
    for name in one.tensors:
        assert torch.equal(one.read(name), other.read(name)), name


def test_multi_token_prediction_is_packed_as_a_layer_or_ignored_whole(random_tiny):
    jobs = plan_jobs(Checkpoint(random_tiny), Recipe(3, 4, 128, 4, overrides=(("model.layers.1.mlp.experts.*", 2),)))
    stem = "model.layers.3."
    layer = [
        dataclasses.replace(job, name=job.name.replace(stem, "mtp.layers.0."), role=Role.MTP)
        for job in jobs if job.name.startswith(stem)
    ]  # fmt: skip
    joined = next(job for job in layer if job.name.endswith("q_proj.weight"))
    joined = dataclasses.replace(joined, name="mtp.fc.weight")
    found = plan_container([*jobs, *layer, joined], RECIPE)
    assert found.kept["mtp.fc.weight"] == "vLLM reads mtp.fc in BF16" and "mtp.fc" in found.config["ignore"]
    groups = [(group["weights"]["num_bits"], group["targets"]) for group in found.config["config_groups"].values()]
    for job in (job for job in layer if job.bits):
        module = job.name.removesuffix(".weight")
        assert not any(re.match(name[3:], module) for name in found.config["ignore"] if name.startswith("re:")), module
        own = [bits for bits, targets in groups for name in targets if name[:3] == "re:" and re.match(name[3:], module)]
        assert (own or [4]) == [found.bits[job.name]] == [found.bits[job.name.replace("mtp.layers.0.", stem)]], module
    for wide, narrow in ((8, 4), (4, 8)):  # widths of their own, in and outside of the block
        own = [dataclasses.replace(job, bits=wide if job.bits == 4 else job.bits) for job in layer]
        rest = [dataclasses.replace(job, bits=narrow if job.bits == 4 else job.bits) for job in jobs]
        found = plan_container([*rest, *own], RECIPE)
        groups = [(group["weights"]["num_bits"], group["targets"]) for group in found.config["config_groups"].values()]
        assert groups[0][0] == 3 and any("experts" in name for name in groups[0][1])  # what transformers takes for all experts
        (linear,) = (bits for bits, targets in groups if "Linear" in targets)
        for name in found.packed:
            module = name.removesuffix(".weight")
            named = {bits for bits, targets in groups for name in targets if name[:3] == "re:" and re.match(name[3:], module)}
            assert (named or {linear}) == {found.bits[name]}, (module, named)
    left = [dataclasses.replace(job, bits=None) for job in (*layer, joined)]
    assert r"re:.*mtp\..*" in plan_container([*jobs, *left], RECIPE).config["ignore"]


def test_a_vision_tower_is_left_alone(tmp_path):
    from transformers import AutoModelForImageTextToText

    from hf_model import load_weights
    from tiny_data import build_vl_tokenizer, vl_texts
    from tiny_model import build_vl_model, vl_config

    build_vl_model(vl_config(build_vl_tokenizer(vl_texts(100)), 2, 1), 0).bfloat16().save_pretrained(tmp_path / "m")
    recipe = dataclasses.replace(RECIPE, overrides=(*RECIPE.overrides, ("lm_head.weight", 16)))  # 374 tokens are no tiles
    quantize_checkpoint(tmp_path / "m", tmp_path / "plain", recipe)
    quantize_checkpoint(tmp_path / "m", tmp_path / "packed", recipe, packed=True)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "plain")
    config = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert r"re:.*visual\..*" in config["ignore"] and not any("visual.blocks" in name for name in config["ignore"])
    one, other = (load_weights(AutoModelForImageTextToText, tmp_path / x, torch.float32) for x in ("packed", "plain"))
    other = other.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in one.state_dict().items()) and len(other) > 20


def test_a_zero_has_no_sign():
    weight = torch.randn(2, 64, 256)
    hessian = torch.eye(256).expand(2, -1, -1).contiguous()
    for method in ("wclip", "gptq", "gptq_refit"):
        made = round_weight(weight, Grid(3, 128, 4), Statistics(hessian, torch.ones(2) * 1000), method)
        assert bool((made == 0).any()) and not bool(torch.signbit(made[made == 0]).any()), method


def test_the_size_of_the_122b_is_counted_from_its_shapes():
    facts = sizes(REPO / "configs/shape_122b.json", Recipe(3, 4, 128, 16))
    experts = 48 * 256 * 3 * 1024 * 3072
    rest = 36 * (2 * 2048 + 8192 + 8192 + 8192) * 3072 + 12 * (2 * 8192 + 2 * 512 + 8192) * 3072 + 48 * 3 * 1024 * 3072
    head, matrices = 248320 * 3072, 48 * (256 * 3 + 3) + 36 * 3 + 12 * 4 + 1
    assert facts["parameters_by_bits"] == {"3": experts, "4": rest + head}
    assert facts["packed_bytes"] == (3 * experts + 4 * (rest + head)) // 8 + (experts + rest + head) // 64 + 16 * matrices
    assert facts["kept_bytes"]["vLLM reads embeddings in BF16"] == 2 * head and round(facts["dequantized_bytes"] / 1e9) == 245
    table = facts["bytes_of"]  # the marks: without mtp, with it packed, with it in BF16
    assert all(size <= mark * 1e9 for size, mark in zip(table["in BF16"], (52, 53.06, 57)))
    assert table["packed"][1] <= 51e9 and 46.4e9 < facts["code_bytes"] < 46.6e9
    eighths = sizes(REPO / "configs/shape_122b.json", Recipe(2.75, 4, 128, 16))
    assert eighths["parameters_by_bits"]["2"] == experts // 4 and eighths["bytes"] < facts["bytes"] - 3.6e9


def test_recipes_and_shapes_that_do_not_fit_are_refused(random_tiny, tmp_path, command):
    flags = ["--model", random_tiny, "--expert-bits", 3, "--linear-bits", 4, "--packed", "--out", tmp_path / "q"]
    for more, message in (
        (["--method", "rtn_asym"], "--packed: method rtn_asym is not a symmetric grid"),
        (["--group", 16], "--packed: no kernel has groups of 16; use --group 32, 64, 128, 256"),
        (["--packed-bits", 9], "--packed-bits 9 is outside 2..8"),
        (["--expert-bits", 16, "--linear-bits", 16], "--packed: no matrix can be packed: nothing is quantized"),
    ):
        done = command("src/quant/quant_save.py", *flags, *more)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    jobs = plan_jobs(Checkpoint(random_tiny), RECIPE)
    experts = [job.role is Role.ROUTED_EXPERT for job in jobs]
    infos = [dataclasses.replace(job.info, shape=(96, 192) if own else job.info.shape) for job, own in zip(jobs, experts)]
    narrow = [dataclasses.replace(job, info=info) for job, info in zip(jobs, infos)]
    with pytest.raises(UserError, match=r"no kernel takes experts of 96 by 192 \(hidden a multiple of 128, inner of 128\)"):
        plan_container(narrow, RECIPE)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "inner,group,fits,sizes", [(192, 64, True, [1]), (192, 32, True, [1]), (96, 32, False, []), (512, 128, True, [1, 2, 4])]
)
def test_shapes_of_experts_and_the_ranks_that_their_groups_allow(random_tiny, inner, group, fits, sizes):
    jobs = []
    for job in plan_jobs(Checkpoint(random_tiny), dataclasses.replace(RECIPE, group=group)):
        if job.role is Role.ROUTED_EXPERT:
            shape = (256, inner) if "down" in job.name else (inner, 256)
            jobs.append(dataclasses.replace(job, info=dataclasses.replace(job.info, shape=shape)))
    if not fits:
        with pytest.raises(UserError, match="no kernel takes experts of 256 by 96"):
            plan_container(jobs, dataclasses.replace(RECIPE, group=group))
        return
    container = plan_container(jobs, dataclasses.replace(RECIPE, group=group))
    assert len(container.packed) == len(jobs) and packed_format.parallel_sizes(jobs, container) == sizes


def test_a_packed_checkpoint_that_was_tampered_with_or_misused_is_one_line(random_tiny, tmp_path, command):
    quantize_checkpoint(random_tiny, tmp_path / "plain", RECIPE)
    quantize_checkpoint(random_tiny, tmp_path / "packed", RECIPE, packed=True)
    export = "src/quant/packed_export.py"
    quantize = ["src/quant/quant_save.py", "--expert-bits", 3, "--linear-bits", 4]
    shutil.copytree(tmp_path / "packed", tmp_path / "lacking")
    manifest = json.loads((tmp_path / "lacking" / PACKED).read_text())
    manifest["tensors"], manifest["shards"] = manifest["tensors"][1:], [len(manifest["tensors"]) - 1]
    (tmp_path / "lacking" / PACKED).write_text(json.dumps(manifest))
    shutil.copytree(tmp_path / "plain", tmp_path / "off")
    tensors = load_file(tmp_path / "off/model.safetensors")
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    tensors[name][0, 0] += 0.3
    save_file(tensors, tmp_path / "off/model.safetensors", {"format": "pt"})
    before = sorted(tmp_path.iterdir())
    for run, message in (
        ([export, "--unpack", tmp_path / "plain", "--out", tmp_path / "x"], "is not packed"),
        ([export, "--unpack", tmp_path / "lacking", "--out", tmp_path / "x"], "is not in packed.json"),
        ([export, "--model", tmp_path / "off", "--out", tmp_path / "x"], f"tensor {name}: not on a symmetric grid of 3 bits"),
        ([export, "--model", tmp_path / "packed", "--out", tmp_path / "x"], "already quantized"),
        ([*quantize, "--model", tmp_path / "packed", "--out", tmp_path / "x"], "already quantized"),
        ([export, "--model", tmp_path / "plain"], "give --model and --out"),
    ):
        done = command(*run)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr
    assert sorted(tmp_path.iterdir()) == before
    done = command(export, "--check", tmp_path / "packed", "--model", tmp_path / "off")
    assert done.returncode == 1 and "1 values differ" in done.stdout


def test_experts_that_stay_are_written_one_by_one_beside_packed_ones(fused, tmp_path):
    """One fused tensor among matrices of single experts would make vLLM take all of them for fused."""
    recipe = dataclasses.replace(RECIPE, overrides=(*RECIPE.overrides, ("model.layers.1.mlp.experts.*", 16)))
    quantize_checkpoint(fused, tmp_path / "plain", recipe)
    quantize_checkpoint(fused, tmp_path / "packed", recipe, packed=True)
    stored = [name for file in (tmp_path / "packed").glob("*.safetensors") for name in load_file(file)]
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in stored
    assert not any(re.search(r"experts\.(gate_up|down)_proj$", name) for name in stored)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "plain")
    name, checkpoint = "model.layers.1.mlp.experts.gate_up_proj", Checkpoint(tmp_path / "packed")
    pieces = torch.cat([piece for _, piece in checkpoint.read_chunks(name, checkpoint.info(name).bytes // 8 * 3)])
    assert same_bits(pieces, Checkpoint(fused).read(name))
