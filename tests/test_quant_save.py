"""The builder: every tensor accounted for, equal to the pure grid, reloadable; bad input leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from checkpoint import Checkpoint
from families import Role, role_of, roles_of
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
    assert read_recipe(tmp_path / "q") == RECIPE
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


def test_unknown_tensors_and_families_raise():
    from console import UserError

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
    """A llama checkpoint of 600 MB whose tensors are all of one size."""
    path = tmp_path_factory.mktemp("large")
    tensors = {}
    for layer in range(24):
        for name in ("gate_proj", "up_proj", "down_proj"):
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = torch.randn(2048, 2048).bfloat16()
    from safetensors.torch import save_file

    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 24}))
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
    second = command("src/quant/quant_save.py", *same)
    assert second.returncode == 2 and "another run is writing" in second.stderr
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
        "from records import peak_rss_mib as peak\nbefore = peak()\n"
        "quantize_checkpoint(sys.argv[1], sys.argv[2], Recipe(3, 4, 128, 1), chunk_bytes=8 << 20)\n"
        "print('grown by', peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(large), str(tmp_path / "q")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 200  # MiB; the file has 604
