"""The synthetic checkpoint, the consumed source, and every measurement at full size, run small on a CPU."""

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

from checkpoint import Checkpoint
from console import UserError
from families import Role, roles_of
from page_sizes import MODELS, bytes_of, cost_table, put_into, read_records
from quant_save import quantize_checkpoint
from recipe import Recipe
from records import read_result
from size_model import SHAPES, Sizes, calibrated_fit, config_of, fit, plan_of, predict
from synthetic_moe import fill_all, fill_shard, prepare

REPO = Path(__file__).resolve().parent.parent
RECIPE = Recipe(3, 4, 128, 4)


@pytest.fixture
def synthetic(tmp_path):
    prepare(tmp_path / "m", SHAPES["tiny"], seed=3)
    fill_all(tmp_path / "m")
    return tmp_path / "m"


def test_shapes_are_those_of_the_published_models():
    from transformers import AutoConfig, AutoModelForCausalLM

    for name, billions in (("122b", 122.1), ("35b", 34.7)):
        plan = plan_of(SHAPES[name])
        assert sum(torch.Size(shape).numel() for _, _, shape in plan) / 1e9 == pytest.approx(billions, abs=0.05)
        config = config_of(SHAPES[name])
        roles = roles_of({tensor: shape for tensor, _, shape in plan}, config)
        assert set(roles.values()) >= {Role.ROUTED_EXPERT, Role.SHARED_EXPERT, Role.ATTENTION, Role.LINEAR_ATTENTION}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config["text_config"]))
        wanted = {n: tuple(p.shape) for n, p in model.named_parameters()}
        assert {n.replace("model.language_model.", "model."): shape for n, _, shape in plan} == wanted


def test_a_shard_can_be_made_at_any_time(synthetic, tmp_path):
    again = tmp_path / "again"
    shards = prepare(again, SHAPES["tiny"], seed=3)
    assert os.stat(shards[1]).st_blocks * 512 < os.stat(shards[1]).st_size / 4  # a hole
    fill_shard(again, shards[2], Checkpoint(again).tensors)
    assert shards[2].read_bytes() == (synthetic / shards[2].name).read_bytes()
    assert not any(shards[1].read_bytes()[-1000:])
    prepare(tmp_path / "other", SHAPES["tiny"], seed=4)
    fill_shard(tmp_path / "other", tmp_path / "other" / shards[2].name, Checkpoint(tmp_path / "other").tensors)
    assert shards[2].read_bytes() != (tmp_path / "other" / shards[2].name).read_bytes()


def test_weights_look_like_trained_ones(synthetic):
    weight = Checkpoint(synthetic).read("model.language_model.layers.0.mlp.experts.gate_up_proj").float()
    assert weight.std() == pytest.approx(1 / 16, rel=0.1)
    assert ((weight / weight.std()) ** 4).mean() > 4.5  # a normal distribution has 3
    rows = weight.norm(dim=-1)
    assert rows.std() / rows.mean() > 0.25


def test_a_consumed_source_gives_the_same_bytes_and_its_disk_back(synthetic, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(synthetic, copy)
    quantize_checkpoint(synthetic, tmp_path / "a", RECIPE, shard_bytes=3 << 20)
    quantize_checkpoint(copy, tmp_path / "b", RECIPE, shard_bytes=3 << 20, consume=True)
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert not list(copy.glob("*.safetensors"))
    with pytest.raises(UserError, match="missing"):
        quantize_checkpoint(copy, tmp_path / "c", RECIPE, consume=True)


CONSUME = """
import sys
import torch
from calibration import Calibration
from quant_save import quantize_checkpoint
from write_checkpoint import Sink
from recipe import Recipe
import quant_save, time
method, shard = sys.argv[3], int(sys.argv[4])
calibration = None
if method == "gptq":
    ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(ids, {"name": "random"}, device=torch.device("cpu"))
append = Sink._append
def slow(self, name, value):
    append(self, name, value)
    print(len(self.writer.closed), flush=True)
    time.sleep(0.03)
Sink._append = slow
recipe = Recipe(3, 4, 128, 4, method=method)
consume = sys.argv[5] == "consume"
quantize_checkpoint(sys.argv[1], sys.argv[2], recipe, shard_bytes=shard, calibration=calibration, consume=consume)
print("done", flush=True)
"""


def consuming(model, out, method, shard, consume="consume", kill=None):
    """Quantize in a process, which is killed when it has closed ``kill`` shards; how many it had closed."""
    run = [sys.executable, "-c", CONSUME, model, out, method, str(shard), consume]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(run, stdout=subprocess.PIPE, text=True, env=environment)
    closed = 0
    for line in child.stdout:
        closed = int(line) if line.strip().isdigit() else closed
        if closed == kill:
            child.send_signal(signal.SIGKILL)
            break
    assert child.wait() == (0 if kill is None else -signal.SIGKILL)
    child.stdout.close()
    return closed


@pytest.mark.slow
def test_a_calibrated_layer_is_consumed_when_it_is_whole(tmp_path):
    """Layers of several shards, in the source and the output: a run that resumes calibrates an unfinished one again."""
    prepare(tmp_path / "m", SHAPES["tiny"], seed=3, shard_bytes=1 << 19)
    fill_all(tmp_path / "m")
    shutil.copytree(tmp_path / "m", tmp_path / "copy")
    count = consuming(tmp_path / "m", tmp_path / "a", "gptq", 1 << 19, "keep")
    assert count > 2 * SHAPES["tiny"].layers
    for kill in (3, 4, 5):
        consuming(tmp_path / "copy", tmp_path / "b", "gptq", 1 << 19, kill=kill)
    consuming(tmp_path / "copy", tmp_path / "b", "gptq", 1 << 19)
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert not list((tmp_path / "copy").glob("*.safetensors"))


def test_a_killed_run_that_consumes_its_source_goes_on(synthetic, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(synthetic, copy)
    quantize_checkpoint(copy, tmp_path / "a", RECIPE, shard_bytes=3 << 20)
    consuming(synthetic, tmp_path / "b", "clip", 3 << 20, kill=4)  # some shards of the source are holes by now
    assert any(f.stat().st_blocks * 512 < f.stat().st_size / 2 for f in synthetic.glob("*.safetensors"))
    with pytest.raises(UserError, match="consumed"):  # zeros are never read as weights
        quantize_checkpoint(synthetic, tmp_path / "other", RECIPE)
    with pytest.raises(UserError, match="consumed"):
        quantize_checkpoint(synthetic, tmp_path / "other", RECIPE, consume=True)
    quantize_checkpoint(synthetic, tmp_path / "b", RECIPE, shard_bytes=3 << 20, consume=True)
    for file in sorted((tmp_path / "a").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_only_a_synthetic_source_is_consumed(command, tmp_path):
    done = command(
        "src/quant/quant_save.py", "--model", "models/razor-tiny", "--out", tmp_path / "q", "--consume-source",
        "--expert-bits", 3, "--linear-bits", 4,
    )  # fmt: skip
    assert done.returncode == 2 and "not of synthetic_moe.py" in done.stderr
    assert (REPO / "models/razor-tiny/model.safetensors").is_file()


def test_a_large_read_is_that_of_the_library(tmp_path):
    from safetensors.torch import load_file, save_file

    save_file({"a": torch.randn(3000, 4000), "b": torch.randn(5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    checkpoint, theirs = Checkpoint(tmp_path), load_file(tmp_path / "model.safetensors")
    assert torch.equal(checkpoint.read("a"), theirs["a"])
    pieces = [piece for _, piece in checkpoint.read_chunks("a", 17 << 20)]
    assert len(pieces) == 3 and torch.equal(torch.cat(pieces), theirs["a"])


def test_the_synthetic_gguf_holds_what_is_said(command, tmp_path):
    from gguf_format import GgufFile

    out = tmp_path / "t.gguf"
    done = command("src/quant/synthetic_moe.py", "--shape", "tiny", "--out", out, "--encode-experts", 4)
    assert done.returncode == 0, done.stderr
    file = GgufFile(out)
    assert file.kind("blk.2.ffn_up_exps.weight") == "iq3_xxs" and file.shape("token_embd.weight") == (1024, 256)
    one = file.data("blk.0.ffn_gate_exps.weight")
    assert torch.equal(one, file.data("blk.3.ffn_gate_exps.weight")) and torch.equal(one[:4], one[4:])
    assert not torch.equal(one[0], one[1])


def test_the_full_gguf_has_the_published_size():
    """InstinctRazor's file is 48.04 GiB with its vocabulary; ours counts the tensors."""
    packed, gguf, _ = bytes_of(MODELS["122B"])
    assert gguf / 2**30 == pytest.approx(48.04, abs=0.1)
    assert packed / 1e9 == pytest.approx(48.5, abs=0.1)


# ---------------------------------------------------------------- the cost model


def layers_record(seconds, tokens, rounding, vram=1000, rss=2000):
    times = {"worst_layer_seconds": seconds, "worst_rounding_seconds": rounding}
    return {"size_layers": times | {"tokens": tokens, "peak_vram_mib": vram, "peak_rss_mib": rss}}


def test_the_fit_gives_back_the_law_that_made_the_records():
    at = Sizes(1000, 500, 50, 10)
    law = lambda tokens: 0.02 * at.layer + 0.001 * tokens * at.layer_active  # noqa: E731
    records = {"gptq": layers_record(law(400), 400, 0.02 * at.layer)}
    assert calibrated_fit(records, "gptq", at) == pytest.approx((0.02, 0.001)) and calibrated_fit(records, "ldlq", at) is None
    found = predict(SHAPES["tiny"], at, 7, fit(records, at), 100)
    assert found["gptq_s"] == pytest.approx(4 * law(100)) and found["decode"] is None
    assert found["vram"] == pytest.approx(1000 * 2**20)


def test_the_page_shows_what_the_records_say():
    page = (REPO / "docs/COST_MODEL.md").read_text()
    made = cost_table(read_records(REPO / "results/bench", "h100_122b"), 65536)
    assert put_into(page, made) == page, "run python src/quant/page_sizes.py --write"


# ---------------------------------------------------------------- all of it


@pytest.mark.slow
def test_the_whole_measurement_runs_small_and_again_does_nothing(tmp_path):
    import llama_cpp

    environment = os.environ | {
        "TINY": "1", "RESULTS": str(tmp_path / "results"), "SCRATCH": str(tmp_path / "work"),
        "LLAMA_CPP": str(llama_cpp.tools()), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    run = ["bash", str(REPO / "pipelines/bench.sh"), "h100"]
    done = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=600)
    parts = ("disk", "gptq", "ldlq", "gguf", "eval_tiny", "eval_35b")
    made = {path.stem.removeprefix("h100_122b_"): path for path in (tmp_path / "results/bench").glob("*.json")}
    assert sorted(made) == sorted(parts) and done.returncode == 0, done.stdout + done.stderr
    metrics = {part: read_result(path, "bench")["metrics"] for part, path in made.items()}
    disk = metrics["disk"]["size_disk"]
    assert disk["quantize"]["bytes"] == sum(torch.Size(s).numel() * d.itemsize for _, d, s in plan_of(SHAPES["tiny"]))
    assert 0 < disk["share_of_copy"] and disk["whole"]["layers"] == 48
    assert len(metrics["ldlq"]["size_layers"]["layer_seconds"]) == 2
    assert metrics["gguf"]["placements"]["cpu"]["decode"]["2"]["tokens_per_s"] > 0
    assert not list((tmp_path / "work/bench_h100").glob("[dlg]*/*.gguf"))
    started = time.time()
    again = subprocess.run(run, capture_output=True, text=True, env=environment, timeout=60)
    assert again.stdout.count("is there") >= 2 and time.time() - started < 30
    page = subprocess.run(
        [sys.executable, REPO / "src/eval/page_results.py", "--results", tmp_path / "results"], capture_output=True, text=True
    )
    assert page.returncode == 0, page.stderr
    check = [sys.executable, REPO / "src/eval/check_results.py", tmp_path / "results/RESULTS.md"]
    checked = subprocess.run(check, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert json.loads((tmp_path / "results/bench/h100_122b_gptq.json").read_text())["kind"] == "bench"
