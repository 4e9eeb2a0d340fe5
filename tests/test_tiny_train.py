"""Training survives being stopped: two halves give the weights, the curve and the record of one run."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from checkpoint import Checkpoint
from console import UserError
from settings import parse_settings
from tiny_data import build_tokenizer
from tiny_train import Run, TrainSettings, train

CONFIG = Path(__file__).resolve().parent.parent / "configs/make_tiny.env"
SMALL = "--steps 4 --rows 1 --length 256 --warmup 2".split()


def test_a_resumed_run_equals_a_whole_one(tmp_path):
    config, _ = parse_settings(TrainSettings, "", argv=["--config", str(CONFIG), *SMALL])
    tokenizer, device = build_tokenizer(), torch.device("cpu")
    states = []
    for name, stops in (("whole", [4]), ("halves", [2, 4])):
        for stop in stops:
            run = Run(config, tokenizer, tmp_path / name, device)
            run.path.parent.mkdir(exist_ok=True)
            train(run, 0, save_every=99, stop=stop)
        states.append(run.model.state_dict())
        assert run.step == 4 and run.curve[-1]["step"] == 4
    whole, halves = states
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    other = dataclasses.replace(config, seed=2)
    with pytest.raises(UserError, match="made with other settings"):
        Run(other, tokenizer, tmp_path / "whole", device)


def test_the_command_writes_a_checkpoint_and_its_record(tmp_path, command):
    flags = ["--steps", "1", "--rows", "1", "--length", "128", "--probe-items", "0", "--workers", "0"]
    paths = ["--out", tmp_path / "m", "--work", tmp_path / "w", "--result", tmp_path / "r.json"]
    done = command("src/distill/tiny_train.py", *flags, *paths)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["kind"] == "train" and record["metrics"]["tokens"] == 128 and record["recipe"]["steps"] == 1
    checkpoint = Checkpoint(tmp_path / "m")
    assert sum(info.numel for info in checkpoint.tensors.values()) == record["metrics"]["parameters"] <= 16_000_000
    assert checkpoint.config["model_type"].startswith("qwen3_5_moe")
