"""Several devices at once, here several threads on the CPU: the same bytes as one, errors that come out, resumption."""

import hashlib
import threading
import time

import pytest
import torch

import moe_ptq
import synthetic_moe
from calibration import Calibration
from console import UserError
from devices import OneBehind, Stopped, each_device, one_ahead, parse_devices
from moe_ptq import Grid, Statistics, round_weight
from quant_save import quantize_checkpoint
from recipe import Recipe
from safetensors_file import CheckpointWriter
from size_model import SHAPES

CPU = torch.device("cpu")


def digests(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


@pytest.mark.parametrize("devices", (2, 3))
def test_shards_on_several_devices_are_the_same_bytes(random_tiny, tmp_path, devices):
    recipe = Recipe(3, 4, 128, 4)
    one = quantize_checkpoint(random_tiny, tmp_path / "one", recipe, shard_bytes=2 << 20)
    many = quantize_checkpoint(random_tiny, tmp_path / "many", recipe, shard_bytes=2 << 20, devices=[CPU] * devices)
    assert one == many and len(list((tmp_path / "one").glob("*.safetensors"))) > 2 * devices
    assert digests(tmp_path / "one") == digests(tmp_path / "many")


def test_a_source_is_consumed_by_several_devices(tmp_path):
    model = tmp_path / "m"
    synthetic_moe.prepare(model, SHAPES["tiny"], 0, shard_bytes=4 << 20)
    synthetic_moe.fill_all(model)
    quantize_checkpoint(model, tmp_path / "one", Recipe(3, 4, 128, 1), shard_bytes=2 << 20)
    many = [CPU] * 3
    quantize_checkpoint(model, tmp_path / "many", Recipe(3, 4, 128, 1), shard_bytes=2 << 20, devices=many, consume=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "many") and not list(model.glob("*.safetensors"))


def test_a_killed_run_goes_on_with_another_number_of_devices(random_tiny, tmp_path, monkeypatch):
    recipe = Recipe(3, 4, 128, 1)
    expected = quantize_checkpoint(random_tiny, tmp_path / "one", recipe, shard_bytes=2 << 20)
    append = CheckpointWriter.append

    def dies(writer, name, tensor):
        if len(list(writer.out_dir.glob("*.safetensors"))) > 1:
            raise OSError("stands for a kill")
        append(writer, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, "append", dies)
        with pytest.raises(OSError, match="stands for a kill"):
            quantize_checkpoint(random_tiny, tmp_path / "two", recipe, shard_bytes=2 << 20, devices=[CPU, CPU])
    assert list((tmp_path / ".two.partial").glob("*.safetensors"))  # some shards are complete
    assert quantize_checkpoint(random_tiny, tmp_path / "two", recipe, shard_bytes=2 << 20, devices=[CPU] * 3) == expected
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


@pytest.mark.parametrize("experts", ((), (("model.layers.1.mlp.experts", (2, 3) * 4),)))
def test_calibrated_experts_on_several_devices_are_the_same_bytes(random_tiny, tmp_path, monkeypatch, experts):
    monkeypatch.setitem(moe_ptq.WORKING_BYTES, "cpu", 8e6)  # pieces of three experts at most
    recipe = Recipe(3, 4, 128, 4, method="gptq_refit", experts=experts)
    ids = torch.randint(0, 800, (4, 48), generator=torch.Generator().manual_seed(0))
    for name, devices in (("one", ()), ("two", (CPU, CPU))):
        calibration = Calibration(ids, {"name": "random"}, device=CPU)
        quantize_checkpoint(random_tiny, tmp_path / name, recipe, calibration=calibration, devices=devices)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_every_device_rounds_its_share(monkeypatch):
    seen = {}

    def noted(weight, grid, statistics):
        seen.setdefault(threading.current_thread().name, []).append(len(weight))
        return moe_ptq.wclip(weight, grid, statistics)

    monkeypatch.setitem(moe_ptq.WORKING_BYTES, "cpu", 1)
    monkeypatch.setitem(moe_ptq.METHODS, "wclip", moe_ptq.Method(noted, calibrated=True))
    weight, x = torch.randn(5, 16, 64), torch.randn(5, 200, 64)
    statistics = Statistics(x.transpose(1, 2) @ x, torch.full((5,), 200.0))
    one = round_weight(weight, Grid(3, 32), statistics, "wclip")
    assert list(seen.values()) == [[1] * 5]
    seen.clear()
    assert torch.equal(one, round_weight(weight, Grid(3, 32), statistics, "wclip", [CPU] * 2))
    assert sorted(map(sum, seen.values())) in ([5], [2, 3])  # one thread may be through before the other starts


def test_an_error_on_one_device_stops_the_others(random_tiny, tmp_path):
    def work(number, device, stop):
        if number == 1:
            raise UserError("tensor x: broken")
        assert stop.wait(10)
        raise Stopped

    with pytest.raises(UserError, match="tensor x: broken"):
        each_device([CPU] * 3, work)


@pytest.mark.parametrize("text", ("cuda:99", "gpu", "cpu,", "cpu:1", "cuda:x", "cpu,cuda:0"))
def test_unknown_devices_are_one_line(text):
    with pytest.raises(UserError, match=f"--devices {text}: ") as caught:
        parse_devices(text)
    assert "\n" not in str(caught.value)


# --- a step ahead, a step behind


def test_order_overlap_and_bound():
    made, used, written = [], [], []

    def items():
        for i in range(6):
            assert i <= len(used) + 2, "more than one ahead"
            made.append((i, threading.current_thread().name))
            yield i

    with one_ahead(items()) as ahead, OneBehind() as later:
        for i in ahead:
            deadline = time.monotonic() + 5
            while i < 5 and len(made) < i + 2 and time.monotonic() < deadline:
                time.sleep(0.001)
            assert i == 5 or len(made) == i + 2  # the next is there before this one is used
            used.append(i)
            later(lambda i=i: (time.sleep(0.005), written.append(i)))
    assert written == used == list(range(6)) and all(name.startswith("ahead") for _, name in made)


def test_errors_come_out():
    def broken():
        yield 1
        raise ValueError("reading failed")

    with pytest.raises(ValueError, match="reading failed"), one_ahead(broken()) as ahead:
        assert next(ahead) == 1
        next(ahead)

    def fail():
        raise OSError("writing failed")

    with pytest.raises(OSError, match="writing failed"), OneBehind() as later:
        later(fail)
    with pytest.raises(OSError, match="writing failed"), OneBehind() as later:
        later(fail)
        later(print, "never")
