"""Reading and writing safetensors against the library's own reader and writer; broken files are refused by name."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import Checkpoint
from console import UserError
from safetensors_file import CheckpointWriter

TENSORS = {
    "a.weight": torch.randn(7, 16).bfloat16(),
    "b.weight": torch.randn(3, 4, 8),
    "c": torch.arange(5, dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "half": torch.randn(9).half(),
}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.mark.parametrize("shard_bytes", [1 << 30, 300])
def test_round_trip_with_the_library(directory, shard_bytes):
    plan = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]
    with CheckpointWriter(directory, plan, shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            for start in range(0, len(tensor), 2):
                writer.append(name, tensor[start : start + 2])
    files = sorted(directory.glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 300)
    theirs = {name: tensor for file in files for name, tensor in load_file(file).items()}
    checkpoint = Checkpoint(directory)
    assert set(theirs) == set(TENSORS) == set(checkpoint.tensors)
    for name, tensor in TENSORS.items():
        assert torch.equal(theirs[name], tensor) and torch.equal(checkpoint.read(name), tensor)
        pieces = [piece for _, piece in checkpoint.read_chunks(name, 40)]
        assert torch.equal(torch.cat(pieces), tensor)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert checkpoint.sha256() == (digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest())


def test_a_plan_that_is_not_written_in_full_is_an_error(directory):
    with pytest.raises(ValueError, match="not written in full"), CheckpointWriter(directory, [("a", torch.float32, (2,))], 99):
        pass


def broken(data: bytes, kind: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if kind == "truncated":
        return data[:-3]
    if kind == "too long":
        return data + b"x"
    if kind == "header cut":
        return data[:20]
    if kind == "garbage":
        return b"\xff" * 64
    entry = header["a.weight"]
    if kind == "overlap":
        entry["data_offsets"] = [offset - 8 for offset in entry["data_offsets"]]
    if kind == "wrong size":
        entry["shape"] = [7, 17]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("kind", ["truncated", "too long", "header cut", "garbage", "overlap", "wrong size"])
def test_broken_files_are_refused(directory, kind):
    file = directory / "model.safetensors"
    save_file({"a.weight": TENSORS["a.weight"], "b.weight": TENSORS["b.weight"]}, file)
    Checkpoint(directory)
    file.write_bytes(broken(file.read_bytes(), kind))
    with pytest.raises(UserError, match="model.safetensors"):
        Checkpoint(directory)


def test_an_index_must_agree_with_its_shards(directory):
    save_file({"a": torch.zeros(2)}, directory / "model-1.safetensors")
    index = directory / "model.safetensors.index.json"
    for weight_map, message in (
        ({"a": "model-1.safetensors", "b": "model-1.safetensors"}, "lists b"),
        ({"a": "model-2.safetensors"}, "shards missing"),
        ({"a": "../model-1.safetensors"}, "not a file name"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            Checkpoint(directory)
