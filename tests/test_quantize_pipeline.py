"""bash pipelines/quantize.sh: configuration, overrides from the environment, the probe first, and the record."""

import json
import os
import re
import subprocess
import sys

from conftest import REPO

import gguf_pack
import quant_save
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
    assert -1 < done.stdout.find("--expert-bits 2.5") < done.stdout.find("entropy") < done.stdout.find("memory at most")
    recipe = read_recipe(out)
    assert (recipe.expert_bits, recipe.linear_bits, recipe.method) == (2.5, 4, "gptq")
    assert json.loads((out / "recipe.json").read_text())["calibration"]["shape"] == [2, 64]
    again = quantize(tmp_path, **small)
    assert again.returncode == 2 and "exists; use FORCE=1" in again.stderr


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


def planned(capsys, monkeypatch, main, config, **settings):
    """What a dry run of a command prints with these settings in the environment."""
    with monkeypatch.context() as patch:
        for key, value in settings.items():
            patch.setenv(key, str(value))
        patch.setattr(sys, "argv", ["x.py", "--config", str(REPO / config), "--dry-run"])
        main()
    return capsys.readouterr().out


def test_a_dry_run_plans_what_the_run_would_do(random_tiny, tmp_path, capsys, monkeypatch):
    """PACKED, DEVICES and TOKEN_POWER change the plan as they change the run; only headers are read, nothing is written."""
    base = {"MODEL": random_tiny, "OUT": tmp_path / "q", "CALIB": "hf:nobody/nothing:train", "TAG": "dry"}
    text = base | {"METHOD": "gptq", "CALIB_LENGTH": 2048}

    def plan(**settings):
        return planned(capsys, monkeypatch, quant_save.main, "configs/clip_122b.env", **settings)

    def figure(pattern, out):
        return float(re.search(pattern, out)[1])

    disk, memory = r"disk ([\d.]+) GB", r"memory at most about ([\d.]+) GiB"
    plain, packed, many = plan(**base), plan(**base, PACKED=1), plan(**base, DEVICES="cpu,cpu,cpu")
    assert "packed for vLLM" in packed and figure(disk, packed) < figure(disk, plain)
    assert figure(memory, many) > figure(memory, plain)
    assert figure(disk, plan(**text, TOKEN_POWER=0.4)) > figure(disk, plan(**text))
    (tmp_path / "q").mkdir()
    (tmp_path / "q/recipe.json").touch()
    assert "note: the run would stop" in plan(**base) and "would stop" not in plan(**base, FORCE=1)
    pack = {"MODEL": random_tiny, "OUT": tmp_path / "g", "TENSOR_TYPES": "", "CALIB": base["CALIB"], "CALIB_LENGTH": 2048}
    with_, without, dequantized = (
        planned(capsys, monkeypatch, gguf_pack.main, "configs/gguf_iq3.env", **pack, **more)
        for more in ({}, {"TOKEN_POWER": 0}, {"DEQUANT_OUT": tmp_path / "d"})
    )
    assert figure(disk, with_) > figure(disk, without) and f"then {tmp_path / 'd'}: " in dequantized
    assert [path.name for path in tmp_path.iterdir()] == ["q"]
