"""The budget solver against every choice there is, and an allocation from measurement to checkpoint."""

import itertools
import json
import re
import shutil
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import moe_alloc
from checkpoint import Checkpoint
from console import UserError
from quant_save import quantize_checkpoint
from recipe import Recipe, read_recipe
from sensitivity import bits_by_score, expert_norms, scores, solve


def test_the_solver_is_exact():
    rng = np.random.default_rng(0)
    for _ in range(30):
        count, options = int(rng.integers(1, 6)), int(rng.integers(2, 4))
        costs = (rng.integers(1, 9, (count, options)) * 7).tolist()
        losses = rng.random((count, options)).tolist()
        budget = int(sum(min(row) for row in costs) + rng.integers(0, 80))
        picked = solve(costs, losses, budget)
        assert sum(costs[i][o] for i, o in enumerate(picked)) <= budget
        every = itertools.product(range(options), repeat=count)
        fits = [c for c in every if sum(costs[i][o] for i, o in enumerate(c)) <= budget]
        least = min(sum(losses[i][o] for i, o in enumerate(c)) for c in fits)
        assert sum(losses[i][o] for i, o in enumerate(picked)) == pytest.approx(least)
    with pytest.raises(UserError, match="below the 6"):
        solve([[3, 4], [3, 5]], [[1, 0], [1, 0]], 5)


def test_an_allocation_is_measured_and_kept(random_tiny, tmp_path, command):
    out = tmp_path / "alloc.json"
    done = command("src/quant/moe_alloc.py", "--model", random_tiny, "--expert-bits", 3, "--items", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    overrides = json.loads(out.read_text())["overrides"]
    assert len(overrides) == 8 and "bits an expert weight" in done.stdout
    flags = ["--expert-bits", 3, "--linear-bits", 4, "--allocation", out, "--out", tmp_path / "q", "--clip-steps", 1]
    done = command("src/quant/quant_save.py", "--model", random_tiny, *flags)
    assert done.returncode == 0, done.stderr
    assert dict(read_recipe(tmp_path / "q").overrides) == overrides
    made = Checkpoint(tmp_path / "q")
    for name, bits in overrides.items():
        prefix, part = name.rsplit(".", 1)
        on_disk = f"{prefix}.0.{part.replace('gate_up', 'gate')}.weight"
        levels = max(len(row.unique()) for row in made.read(on_disk)[:, :128].float().abs())
        assert levels <= 2 ** (bits - 1) and (levels > 2 ** (bits - 2) or bits == 2), (name, bits, levels)


def test_whole_layers_have_one_width(random_tiny, tmp_path, monkeypatch):
    """gate_up and down of a layer together: 2 bits where their sum loses least, not in layer 0, where gate_up loses none."""
    each = {"gate_up_proj": (0.0, 0.1, 0.15, 1.0), "down_proj": (1.0, 0.1, 0.15, 1.0)}
    losses = {f"model.layers.{n}.mlp.experts.{part}": [own[n], 0.0, 0.0] for n in range(4) for part, own in each.items()}
    monkeypatch.setattr(moe_alloc, "measured", lambda settings: (losses, {}))
    out = tmp_path / "layers.json"
    settings = types.SimpleNamespace(model=random_tiny, out=out, choices=[2, 3, 4], whole_layers=True)
    moe_alloc.bits_for_budget(settings, 2.5)
    found = json.loads(out.read_text())["overrides"]
    assert found == {name: 2 if re.search(r"\.[12]\.", name) else 3 for name in losses}


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


def test_scores_and_bits_of_experts():
    signals = {"frequency": [4, 1, 3, 2], "wmass": [4, 1, 3, 2], "asal": [4, 1, 2, 3], "wfro": [1, 1, 1, 1]}
    composite = scores("composite", signals)
    assert composite == [10.5, 1.5, 6.5, 5.5] and scores("inverse", signals) == [-v for v in composite]
    assert sorted(scores("random", signals)) == [0, 1, 2, 3] and scores("asal", signals) == [4, 1, 2, 3]
    assert bits_by_score(composite, 3, [2, 3, 4], 0.25) == [4, 2, 3, 3]
    assert bits_by_score(composite, 2.5, [2, 3], 0.25) == [3, 2, 3, 2]
    assert bits_by_score([1, 1, 1, 1], 3, [2, 4], 0.25) == [4, 4, 2, 2]  # ties: the lower index first
    for options, mean in (([2, 3, 4], 2.5), ([2, 3], 2.6)):
        with pytest.raises(UserError):
            bits_by_score(composite, mean, options, 0.25)


def levels_of(weight):
    """The largest number of magnitudes that one group of 128 inputs holds."""
    return max(len(group.unique()) for group in weight.float().abs().reshape(-1, 128))


@pytest.mark.parametrize("method", ["clip", "wclip"])
def test_every_expert_has_its_own_bits(random_tiny, tmp_path, method, command):
    out = tmp_path / "alloc.json"
    few = ["--strategy", "wfro", "--calib-sequences", 2, "--calib-length", 64]
    done = command("src/quant/moe_alloc.py", "--model", random_tiny, "--expert-bits", 3, "--out", out, *few)
    assert done.returncode == 0, done.stderr
    allocation = json.loads(out.read_text())["experts"]
    flags = ["--method", method, "--linear-bits", 4, "--expert-bits", 3, "--calib-sequences", 2, "--calib-length", 64]
    done = command("src/quant/quant_save.py", "--model", random_tiny, "--allocation", out, "--out", tmp_path / "q", *flags)
    assert done.returncode == 0, done.stderr
    made, norms = Checkpoint(tmp_path / "q"), expert_norms(Checkpoint(random_tiny))
    for module, bits in allocation.items():
        assert sorted(bits) == [2, 2, 3, 3, 3, 3, 4, 4]
        assert bits[norms[module].index(max(norms[module]))] == 4
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
