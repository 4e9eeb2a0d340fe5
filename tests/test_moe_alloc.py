"""The budget solver against every choice there is, and an allocation from measurement to checkpoint."""

import itertools
import json

import numpy as np
import pytest

from checkpoint import Checkpoint
from console import UserError
from moe_alloc import solve
from quant_save import quantize_checkpoint
from recipe import Recipe, read_recipe


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
