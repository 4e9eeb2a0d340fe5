"""Evaluation on several devices, here processes on the CPU: the same completions in one log, errors in one line."""

import json
import sys
import time

import pytest
import torch

import vllm_eval8
from backend import HfBackend, Replicas, Sampling
from console import UserError
from hf_model import load_model, spread_map
from runner import get_benchmarks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def copies(random_tiny):
    found = Replicas(random_tiny, [CPU, CPU], batch=3)
    yield found
    found.close()


def test_two_copies_complete_what_one_does(random_tiny, copies):
    task = get_benchmarks(["tiny_math"])[0]
    one = HfBackend(random_tiny, batch=3)
    prompts = [one.render(task.messages(item)) for item in task.load(8)]
    for sampling in (Sampling(max_tokens=8), Sampling(temperature=1.0, max_tokens=8, seed=3)):
        expected = dict(one.generate(prompts, sampling))
        assert dict(copies.generate(prompts, sampling)) == expected and len(expected) == 8
    assert copies.render(task.messages(task.load(1)[0])) == prompts[0]


def test_what_a_copy_cannot_do_is_one_line(copies):
    with pytest.raises(UserError, match="the model's context is 2048"):
        list(copies.generate(["x " * 4000], Sampling(max_tokens=8)))
    for worker in copies.workers:  # the one that failed ends by itself
        worker.kill()
        worker.join()
    started = time.monotonic()
    with pytest.raises(UserError, match="a copy of the model ended with code"):
        list(copies.generate(["a"] * 7, Sampling(max_tokens=2)))
    assert time.monotonic() - started < 30


def test_the_evaluation_command_takes_devices(random_tiny, tmp_path, monkeypatch):
    arguments = ["vllm_eval8", "--model", str(random_tiny), "--benchmarks", "tiny_know", "--limit", "4", "--backend", "hf"]
    arguments += ["--out", str(tmp_path), "--temperature", "0"]
    for tag, more in (("one", []), ("copies", ["--devices", "cpu,cpu"]), ("spread", ["--devices", "cpu,cpu", "--spread"])):
        monkeypatch.setattr(sys, "argv", [*arguments, "--tag", tag, *more])
        vllm_eval8.main()
    logs = [(tmp_path / f"{tag}.samples.jsonl").read_text().splitlines() for tag in ("one", "copies", "spread")]
    assert sorted(logs[0]) == sorted(logs[1]) == sorted(logs[2]) and len(logs[0]) == 5
    assert json.loads((tmp_path / "copies.json").read_text())["devices"] == "cpu,cpu"


def test_layers_lie_in_equal_runs(random_tiny):
    devices = [torch.device("cuda", index) for index in range(3)]
    places = spread_map(random_tiny, devices)  # four layers
    runs = [places[f"model.layers.{index}"].index for index in range(4)]
    assert runs == [0, 0, 1, 2] and places["model.embed_tokens"].index == 0
    assert places["model.norm"].index == places["lm_head"].index == 2
    modules = {name.split(".layers.")[0] if ".layers." in name else name for name in places}
    state = load_model(random_tiny).state_dict()
    assert all(any(key.startswith(f"{name}.") for name in places) for key in state), modules
