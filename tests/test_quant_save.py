"""The builder: every tensor accounted for, equal to the pure grid, reloadable; bad input leaves nothing behind."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from checkpoint import Checkpoint
from console import UserError
from families import Role, role_of, roles_of
from hf_model import check_complete
from moe_quant import fake_quant
from quant_save import quantize_checkpoint
from recipe import Recipe, read_recipe

SCRIPT = Path(__file__).resolve().parent.parent / "src/quant/quant_save.py"
RECIPE = Recipe(expert_bits=3, linear_bits=4, group=128, clip_steps=16)


def test_every_tensor_is_the_grids_or_a_copy(random_tiny, tmp_path):
    report = quantize_checkpoint(random_tiny, tmp_path / "q", RECIPE, shard_bytes=4 << 20, chunk_bytes=100_000)
    source, made = Checkpoint(random_tiny), Checkpoint(tmp_path / "q")
    assert len(made.files) > 1 and {n: (i.dtype, i.shape) for n, i in made.tensors.items()} == {
        n: (i.dtype, i.shape) for n, i in source.tensors.items()
    }
    roles = roles_of({name: info.shape for name, info in source.tensors.items()}, source.config)
    for name, role in roles.items():
        bits = RECIPE.bits_for(role)
        expected = source.read(name) if bits is None else fake_quant(source.read(name), bits, 128, 16)
        assert torch.equal(made.read(name), expected), name
    kept = {role for role in roles.values() if RECIPE.bits_for(role) is None}
    assert kept == {Role.ROUTER, Role.NORM, Role.SSM_STATE}
    assert report.tensors == len(roles) == sum(entry.tensors for entry in report.roles.values())
    assert report.parameters == sum(info.numel for info in source.tensors.values())
    assert read_recipe(tmp_path / "q") == dataclasses.replace(RECIPE, mtp_bits=16)  # it has none
    quantize_checkpoint(random_tiny, tmp_path / "whole", RECIPE)
    whole = Checkpoint(tmp_path / "whole")
    assert all(torch.equal(whole.read(name), made.read(name)) for name in roles)


def test_transformers_reloads_it_whole(random_tiny, tmp_path):
    quantize_checkpoint(random_tiny, tmp_path / "q", RECIPE)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


TINY = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 128,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES = "qwen3_5_moe_text qwen3_5_text qwen3_next qwen3_moe mixtral olmoe deepseek_v3 llama qwen2 qwen3 gemma2".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_that_transformers_writes_have_roles(family, tmp_path):
    from transformers import AutoConfig

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY))
    parameters = sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint(tmp_path / "m")
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    assert sum(checkpoint.tensors[name].numel for name in roles) >= parameters
    is_moe = any(word in family for word in ("moe", "next", "mixtral", "deepseek"))
    assert (Role.ROUTED_EXPERT in roles.values()) == (Role.ROUTER in roles.values()) == is_moe
    if is_moe:
        experts = sum(checkpoint.tensors[name].numel for name, role in roles.items() if role is Role.ROUTED_EXPERT)
        assert experts % (3 * 4 * 64 * 64) == 0 and experts > 0
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", Recipe(3, 4, 32, 1))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tied = info_of_tied(checkpoint)
    for name in [name for name in checkpoint.tensors if ".layers." not in name or ".layers.2." in name]:
        info = checkpoint.tensors.pop(name)
        if name in tied:
            check_complete(checkpoint)
        else:
            with pytest.raises(UserError, match=f"1 tensors are missing: {re.escape(name)};"):
                check_complete(checkpoint)
        checkpoint.tensors[name] = info


def info_of_tied(checkpoint):
    """What a tied checkpoint may hold and need not."""
    return {"lm_head.weight"} if checkpoint.config.get("tie_word_embeddings") else set()


def test_tensors_that_the_config_does_not_ask_for(random_tiny, tmp_path):
    """Named alone, and exactly: other numbers of experts, of layers and of rows, a fused layout, another nesting."""

    def refused(message, config=None, **tensors):
        checkpoint = Checkpoint(random_tiny)
        if config:
            shutil.copytree(random_tiny, tmp_path / "m", dirs_exist_ok=True)
            (tmp_path / "m/config.json").write_text(json.dumps(checkpoint.config | config))
            checkpoint = Checkpoint(tmp_path / "m")
        for name, like in tensors.items():
            checkpoint.tensors[name] = checkpoint.tensors[like]
        with pytest.raises(UserError, match=message):
            check_complete(checkpoint)

    stem = "model.layers.1.mlp.experts"
    norms = {f"model.layers.{i}.input_layernorm.weight": "model.norm.weight" for i in (4, 5)}
    more = {f"{stem}.{e}.up_proj.weight": f"{stem}.0.up_proj.weight" for e in (8, 9)}
    refused(r"2 tensors are none of the model's.*experts\.8\.", **more)
    refused(r"24 tensors are missing: model\.layers\.0\.mlp\.experts\.8\.gate_proj\.weight", {"num_experts": 10})
    refused(r"num_hidden_layers 4, so no layer 4 would ever run", **norms)
    refused(r"num_hidden_layers 3, so no layer 3 would ever run", {"num_hidden_layers": 3})
    shape = r"model\.embed_tokens\.weight \[\d+, 256\] instead of \[512, 256\]"
    refused(f"2 tensors have another shape: .*{shape}", {"vocab_size": 512, "pad_token_id": 0})
    bias = {f"model.layers.3.self_attn.{x}_proj.bias": "model.norm.weight" for x in "qkv"}
    refused(r"3 tensors are none of the model's and would be lost: model\.layers\.3\.self_attn\.q_proj\.bias", **bias)
    refused(r"4 tensors are missing: model\.layers\.3\.self_attn\.q_proj\.bias", {"attention_bias": True})
    checkpoint = Checkpoint(random_tiny)
    gate = checkpoint.tensors["model.layers.0.mlp.experts.0.gate_proj.weight"]
    for name in [name for name in checkpoint.tensors if "layers.0.mlp.experts." in name]:
        del checkpoint.tensors[name]
    with pytest.raises(UserError, match=r"24 tensors are missing: model\.layers\.0\.mlp\.experts\.0\.gate_proj\.weight, "):
        check_complete(checkpoint)
    checkpoint.tensors["model.layers.0.mlp.experts.gate_up_proj"] = dataclasses.replace(gate, shape=(8, 512, 256))
    with pytest.raises(UserError, match=r"8 tensors are missing: model\.layers\.0\.mlp\.experts\.0\.down_proj\.weight, "):
        check_complete(checkpoint)
    checkpoint.tensors["model.layers.0.mlp.experts.down_proj"] = dataclasses.replace(gate, shape=(8, 256, 256))
    check_complete(checkpoint)
    assert role_of("model.layers.4.mlp.gate.weight", (8, 256), "deepseek_v3", 4, 1) is Role.MTP


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.experts.3.up_proj", "model.layers.3.self_attn.q_proj", "lm_head"])
def test_a_damaged_checkpoint_stops_every_command_before_it_begins(random_tiny, tmp_path, command, lost):
    tensors = load_file(random_tiny / "model.safetensors")
    kept = tensors.pop(f"{lost}.weight")
    shutil.copytree(random_tiny, tmp_path / "m")
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    commands = [
        ["src/quant/quant_save.py", *arguments(tmp_path / "m", tmp_path / "q")],
        ["src/quant/quant_save.py", *arguments(tmp_path / "m", tmp_path / "q", method="gptq")],
        ["src/quant/gguf_pack.py", "--model", tmp_path / "m", "--out", tmp_path / "q", "--base-type", "q8_0"],
        ["src/eval/moe_eval.py", "--model", tmp_path / "m", "--out", tmp_path / "q", "--tag", "t"],
    ]
    for each in commands:
        done = command(*each)
        assert done.returncode == 2 and f"1 tensors are missing: {lost}.weight" in done.stderr, done.stderr
    kept[0, 0] = torch.nan
    save_file(tensors | {f"{lost}.weight": kept}, tmp_path / "m/model.safetensors", {"format": "pt"})
    for each in commands:
        done = command(*each)
        assert done.returncode == 2 and "contains NaN or infinity" in done.stderr, done.stderr
        assert lost in done.stderr or "experts.gate_up_proj" in done.stderr
    assert not (tmp_path / "q").exists() and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "name,value",
    [
        ("lm_head", 3e38),
        ("lm_head", 1e30),
        ("model.embed_tokens", 70000.0),
        ("model.layers.1.mlp.experts.3.up_proj", 1e30),
        ("model.layers.0.linear_attn.out_proj", -3e38),
    ],
)
def test_a_huge_weight_is_rounded_right_or_its_tensor_named(random_tiny, tmp_path, command, name, value):
    tensors = load_file(random_tiny / "model.safetensors")
    tensors[f"{name}.weight"][0, 0] = value
    shutil.copytree(random_tiny, tmp_path / "m")
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    report = quantize_checkpoint(tmp_path / "m", tmp_path / "q", RECIPE)
    made, plain = Checkpoint(tmp_path / "q").read(f"{name}.weight"), Checkpoint(random_tiny).read(f"{name}.weight")
    bits = 3 if "experts" in name else 4
    assert made[0, 0].item() == pytest.approx(value, rel=0.2) and torch.isfinite(made).all()
    assert torch.equal(made[0, 128:], fake_quant(plain, bits, 128, 16)[0, 128:]) and torch.equal(
        made[1:], fake_quant(plain, bits, 128, 16)[1:]
    )
    assert all(0 <= (role.relative_error or 0) < 1 for role in report.roles.values())
    pack = ["src/quant/gguf_pack.py", "--model", tmp_path / "m", "--out", tmp_path / "g", "--method", "nearest", "--base-type"]
    done = command(*pack, "f16", "--calib-sequences", 2, "--calib-length", 64)
    assert done.returncode == 2 and "is beyond what f16 holds" in done.stderr and done.stderr.count("error: ") == 1
    assert not (tmp_path / "g").exists()


def test_a_dense_model_needs_no_bits_of_experts_and_odd_groups_are_named_together(tmp_path, random_tiny, command):
    from transformers import AutoConfig

    sizes = TINY | {"hidden_size": 192, "intermediate_size": 320}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).bfloat16().save_pretrained(tmp_path / "m")
    flags = ["--model", tmp_path / "m", "--out", tmp_path / "q", "--linear-bits", 4]
    done = command("src/quant/quant_save.py", *flags, "--group", 64)
    assert done.returncode == 0, done.stderr
    assert read_recipe(tmp_path / "q").expert_bits == 16
    done = command("src/quant/quant_save.py", *flags, "--group", 128)
    assert done.returncode == 2 and "choose a --group that divides 64, which divides all" in done.stderr
    assert "group 128 does not divide the inputs of 30 of 30 tensors" in done.stderr
    done = command("src/quant/quant_save.py", "--model", random_tiny, *flags[2:])
    assert done.returncode == 2 and "the model has routed experts: give --expert-bits" in done.stderr


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_token_beyond_the_embedding_is_one_line(random_tiny, tmp_path, command, file):
    shutil.copytree(random_tiny, tmp_path / "m")
    value = json.loads((tmp_path / "m" / file).read_text())
    if file == "tokenizer.json":
        value["added_tokens"].append(value["added_tokens"][0] | {"id": 832, "content": "<|new|>"})
    else:
        value["added_tokens_decoder"] = {"832": {"content": "<|new|>", "special": True}}
    (tmp_path / "m" / file).write_text(json.dumps(value))
    for each in (
        ["src/quant/quant_save.py", *arguments(tmp_path / "m", tmp_path / "q")],
        ["src/quant/gguf_pack.py", "--model", tmp_path / "m", "--out", tmp_path / "q", "--base-type", "q8_0", "--dry-run"],
        ["src/eval/moe_eval.py", "--model", tmp_path / "m", "--out", tmp_path / "q", "--tag", "t"],
    ):
        done = command(*each)
        assert done.returncode == 2 and "token '<|new|>' has id 832, but config.json says vocab_size 832" in done.stderr


def test_unknown_tensors_and_families_raise():
    with pytest.raises(UserError, match="no rule for it"):
        role_of("model.layers.0.mlp.surprise.weight", (4, 4), "qwen3_moe")
    with pytest.raises(UserError, match="'rwkv9' is not supported"):
        role_of("model.norm.weight", (4,), "rwkv9")
    assert role_of("model.language_model.layers.3.mlp.experts.gate_up_proj", (8, 4, 4), "qwen3_5_moe") is Role.ROUTED_EXPERT
    assert role_of("model.visual.blocks.0.attn.qkv.weight", (4, 4), "qwen3_5_moe") is Role.VISION
    assert role_of("mtp.layers.0.mlp.experts.down_proj", (8, 4, 4), "qwen3_5_moe") is Role.MTP


def arguments(model, out, **changes):
    flags = {"expert-bits": 3, "linear-bits": 4, "group": 128, "clip-steps": 1} | changes
    return ["--model", model, "--out", out, *(x for key, value in flags.items() for x in (f"--{key}", value))]


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"expert-bits": 1}, "expert_bits 1 is outside 2..8"),
        ({"linear-bits": 9}, "linear_bits 9 is outside 2..8"),
        ({"group": 96}, "group 96 does not divide"),
        ({"model": "nowhere"}, "nowhere: no such model directory"),
        ({"model": "truncated"}, "model.safetensors: truncated"),
        ({"out": "file/q"}, "file is not a directory that you can write to"),
        ({"out": "exists"}, "exists; use --force"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(random_tiny, tmp_path, command, changes, message):
    (tmp_path / "file").touch()
    (tmp_path / "exists").mkdir()
    shutil.copytree(random_tiny, tmp_path / "truncated")
    os.truncate(tmp_path / "truncated/model.safetensors", 1_000_000)
    before = sorted(tmp_path.rglob("*"))
    model, out = changes.pop("model", random_tiny), changes.pop("out", "q")
    done = command("src/quant/quant_save.py", *arguments(model, out, **changes), cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and sorted(tmp_path.rglob("*")) == before


def test_force_replaces_and_the_record_is_written(random_tiny, tmp_path, command):
    out, record = tmp_path / "q", tmp_path / "r.json"
    for bits in (3, 2):
        extra = ["--force", "--result", record, "--tag", "t"]
        done = command("src/quant/quant_save.py", *arguments(random_tiny, out, **{"expert-bits": bits}), *extra)
        assert done.returncode == 0, done.stderr
        assert read_recipe(out).expert_bits == bits == json.loads(record.read_text())["recipe"]["expert_bits"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q", "r.json"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A llama checkpoint of 590 MB whose matrices are all of one size."""
    from transformers import AutoConfig

    from hf_model import meta_model

    path = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 10, "vocab_size": 128}
    config = AutoConfig.for_model("llama", num_attention_heads=16, num_key_value_heads=16, **sizes)
    config.save_pretrained(path)
    shapes = {name: tensor.shape for name, tensor in meta_model(config).state_dict().items()}
    save_file({name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}, path / "model.safetensors")
    return path


def start(large, out, *more):
    """A run on ``large`` that has begun to write and has seconds to go."""
    flags = [str(x) for x in [*arguments(large, out, **{"clip-steps": 64}), "--shard-gib", 0.05, *more]]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # A background job of a shell ignores Ctrl-C, and so would its children.
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], preexec_fn=heard, **streams)
    deadline = time.monotonic() + 60
    while not list((out.parent / f".{out.name}.partial").glob("model-00003-of-*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_ctrl_c_leaves_nothing_and_a_killed_run_refuses_other_settings(large, tmp_path, command):
    process = start(large, tmp_path / "q")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in errors and not list(tmp_path.iterdir())
    process = start(large, tmp_path / "q")
    same = [*arguments(large, tmp_path / "q", **{"clip-steps": 64}), "--shard-gib", 0.05]
    for second in (same, arguments(large, tmp_path / "q")):  # of other settings too: what is alive is said first
        done = command("src/quant/quant_save.py", *second)
        assert done.returncode == 2 and "another run is writing" in done.stderr, done.stderr
    process.kill()
    process.communicate()
    assert [p.name for p in tmp_path.iterdir()] == [".q.partial"]
    other = command("src/quant/quant_save.py", *arguments(large, tmp_path / "q"))
    assert other.returncode == 2 and "other settings (recipe, shard_bytes)" in other.stderr
    resumed = command("src/quant/quant_save.py", *same)
    assert resumed.returncode == 0 and "(resumed)" in resumed.stdout and [p.name for p in tmp_path.iterdir()] == ["q"]


def test_memory_stays_far_below_the_checkpoint(large, tmp_path):
    code = (
        "import sys\nfrom quant_save import quantize_checkpoint\nfrom recipe import Recipe\n"
        "from transformers import LlamaForCausalLM\nfrom records import peak_rss_mib as peak\nbefore = peak()\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], Recipe(3, 4, 128, 1), chunk_bytes=8 << 20)\n"
        "print('grown by', peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(large), str(tmp_path / "q")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 200  # MiB; the file has 604


def test_a_source_that_is_quantized_already_is_said(random_tiny, tmp_path, command):
    source = shutil.copytree(random_tiny, tmp_path / "w3")
    base = ["--out", tmp_path / "q", "--model", source, "--dry-run"]
    for script, more in (
        ("src/quant/quant_save.py", ["--expert-bits", 3, "--linear-bits", 4]),
        ("src/quant/gguf_pack.py", ["--base-type", "q8_0", "--method", "nearest", "--token-power", 0]),
    ):
        done = command(script, *base, *more)
        assert done.returncode == 0 and "quantized already" not in done.stdout, done.stderr
        (source / "recipe.json").write_text("{}")
        done = command(script, *base, *more)
        assert done.returncode == 0 and "w3 is quantized already (recipe.json in it)" in done.stdout, done.stderr
        (source / "recipe.json").unlink()
    done = command("src/quant/gguf_pack.py", *base, "--base-type", "q8_0", "--method", "nearest", "--token-power", 0.3)
    assert done.returncode == 2 and "of method ldlq; nearest counts all tokens alike" in done.stderr


@pytest.mark.parametrize(
    "change,message",
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is more than the 8 experts"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers 'two' is not a whole number"),
        ({"num_hidden_layers": 3, "num_nextn_predict_layers": 1}, "so no layer 3 would ever run"),
    ],
)
def test_a_config_that_no_model_can_have_is_named(random_tiny, tmp_path, command, change, message):
    shutil.copytree(random_tiny, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | change))
    done = command("src/quant/quant_save.py", *arguments(tmp_path / "m", tmp_path / "q"))
    assert done.returncode == 2 and message in done.stderr and not (tmp_path / "q").exists(), done.stderr


@pytest.mark.parametrize(
    "overrides,message",
    [
        ({"model.layers.9.mlp.experts.*": 2}, "no parameter of .* has such a name"),
        ({"model.layers.0.mlp.gate.weight": 4}, "is a router, which is never quantized"),
        ({"model.layers.0.mlp.experts.*": 9}, "bits 9 is outside 2..8"),
    ],
)
def test_an_override_that_cannot_be_is_an_error(random_tiny, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        quantize_checkpoint(random_tiny, tmp_path / "q", Recipe(3, 4, 128, 1, overrides=tuple(overrides.items())))
    assert not list(tmp_path.iterdir())


def levels_of(weight):
    """The largest number of magnitudes that one group of 128 inputs holds."""
    return max(len(group.unique()) for group in weight.float().abs().reshape(-1, 128))


@pytest.mark.parametrize("method", ["clip", "wclip"])
def test_every_expert_has_its_own_bits(random_tiny, tmp_path, method, command):
    allocation = {f"model.layers.{layer}.mlp.experts": [2, 3, 3, 4, 2, 3, 3, 4] for layer in range(4)}
    (out := tmp_path / "alloc.json").write_text(json.dumps({"experts": allocation}))
    flags = ["--method", method, "--linear-bits", 4, "--expert-bits", 3, "--calib-sequences", 2, "--calib-length", 64]
    done = command("src/quant/quant_save.py", "--model", random_tiny, "--allocation", out, "--out", tmp_path / "q", *flags)
    assert done.returncode == 0, done.stderr
    made = Checkpoint(tmp_path / "q")
    for module, bits in allocation.items():
        for expert, own in enumerate(bits):
            levels = levels_of(made.read(f"{module}.{expert}.down_proj.weight"))
            assert 2 ** (own - 2) < levels <= 2 ** (own - 1), (module, expert, own, levels)


def test_bits_of_experts_in_a_fused_tensor(random_tiny, tmp_path):
    fused = write_fused(random_tiny, tmp_path / "fused")
    bits = {"model.layers.0.mlp.experts": (2, 3, 4, 5, 2, 3, 4, 5)}
    recipe = Recipe(3, 4, 128, 1, experts=tuple(bits.items()))
    report = quantize_checkpoint(fused, tmp_path / "q", recipe, chunk_bytes=300_000)  # several chunks a tensor
    alone = quantize_checkpoint(random_tiny, tmp_path / "alone", recipe)
    assert report.packed_bytes == alone.packed_bytes
    down = Checkpoint(tmp_path / "q").read("model.layers.0.mlp.experts.down_proj")
    for expert, own in enumerate(bits["model.layers.0.mlp.experts"]):
        on_disk = Checkpoint(tmp_path / "alone").read(f"model.layers.0.mlp.experts.{expert}.down_proj.weight")
        assert torch.equal(down[expert], on_disk) and levels_of(down[expert]) <= 2 ** (own - 1)
    missing, short = {"model.layers.9.mlp.experts": (3,)}, {"model.layers.0.mlp.experts": (3, 3)}
    for wrong, message in ((missing, "no such module"), (short, "2 bits, but")):
        with pytest.raises(UserError, match=message):
            quantize_checkpoint(fused, tmp_path / "bad", Recipe(3, 4, 128, 1, experts=tuple(wrong.items())))
    assert not (tmp_path / "bad").exists()


def write_fused(model, out):
    """The same checkpoint with each layer's experts in two fused tensors, as some families store them."""
    state, fused = load_file(model / "model.safetensors"), {}
    for name, value in state.items():
        if ".mlp.experts.0.down_proj" in name:
            module, count = name.rpartition(".0.down_proj")[0], 8
            each = [[state[f"{module}.{e}.{part}_proj.weight"] for e in range(count)] for part in ("gate", "up", "down")]
            fused[f"{module}.gate_up_proj"] = torch.cat([torch.stack(each[0]), torch.stack(each[1])], 1)
            fused[f"{module}.down_proj"] = torch.stack(each[2])
        elif ".mlp.experts." not in name:
            fused[name] = value
    shutil.copytree(model, out)
    save_file(fused, out / "model.safetensors", {"format": "pt"})
    return out
