"""bash pipelines/quantize.sh: configuration, overrides from the environment, the probe first, and the record."""

import json
import os
import subprocess
import sys

from conftest import REPO

from recipe import read_recipe


def quantize(tmp_path, **settings):
    environment = {**os.environ, "MOE_LOWBIT_VENV": sys.prefix, **{key: str(value) for key, value in settings.items()}}
    run = ["bash", REPO / "pipelines/quantize.sh"]
    return subprocess.run(run, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)


def test_overrides_win_and_the_probe_comes_first(random_tiny, tmp_path):
    out = tmp_path / "q"
    small = {"MODEL": random_tiny, "OUT": out, "METHOD": "gptq", "EXPERT_BITS": 2.5, "CALIB_SEQUENCES": 2, "CALIB_LENGTH": 64}
    done = quantize(tmp_path, PROBE=1, **small)
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert "quant_save.py" in commands[0] and "--expert-bits 2.5" in commands[0]
    assert "moe_probe.py" in commands[1] and len(commands) == 2
    assert "entropy" in done.stdout and "memory at most" in done.stdout
    recipe = read_recipe(out)
    assert (recipe.expert_bits, recipe.linear_bits, recipe.method) == (2.5, 4, "gptq")
    assert json.loads((out / "recipe.json").read_text())["calibration"]["shape"] == [2, 64]
    again = quantize(tmp_path, **small)
    assert again.returncode == 2 and "exists; use --force" in again.stderr


def test_a_wrong_setting_is_one_line(tmp_path):
    for settings, message in (
        ({"EXPERT_BITS": "three"}, "EXPERT_BITS=three: expected float"),
        ({"PROBE": "yes"}, "PROBE=yes: expected 0 or 1"),
        ({"MODEL": "nowhere"}, "nowhere: no such model directory"),
        ({"CONFIG": "none.env"}, "none.env: no such configuration file"),
    ):
        done = quantize(tmp_path, OUT=tmp_path / "q", **settings)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
