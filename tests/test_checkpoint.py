"""Reading and writing safetensors against the library's own reader and writer; broken files are refused by name."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint as checkpoint_module
from checkpoint import Checkpoint, different_file, model_name, sample_spans, source_identity
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


def grown(file, tensors, monkeypatch):
    """The file's identity when it counts as large, so that pieces of it are read."""
    save_file(tensors, file)
    monkeypatch.setattr(checkpoint_module, "WHOLE_BYTES", 1000)
    return source_identity(file)


def test_the_identity_notices_any_replaced_tensor_or_deciding_file_and_knows_a_copy(directory, tmp_path_factory, monkeypatch):
    tensors = {f"layers.{n}.experts": torch.randn(4, 300, 300) for n in range(3)} | {"norm": torch.ones(64)}
    tensors["embed"] = torch.randn(3000, 100)
    file = directory / "model.safetensors"
    before = grown(file, tensors, monkeypatch)
    for name, tensor in tensors.items():
        parts = [slice(None)] if tensor.ndim < 3 else [slice(e, e + 1) for e in range(len(tensor))]  # an expert alone
        for part in parts:
            changed = tensor.clone()
            changed[part] += 1
            found = different_file(before, grown(file, tensors | {name: changed}, monkeypatch))
            assert found == "model.safetensors differs (same size, other content)", (name, part)
    save_file(tensors, file)
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        (directory / name).write_text("{}")
    before = source_identity(directory)
    copy = tmp_path_factory.mktemp("elsewhere")  # as the hub's cache has it: links to blobs
    for name in [f.name for f in directory.iterdir()]:
        (copy / f"blob-{name}").write_bytes((directory / name).read_bytes())
        (copy / "snapshot").mkdir(exist_ok=True)
        (copy / "snapshot" / name).symlink_to(copy / f"blob-{name}")
    assert different_file(before, source_identity(copy / "snapshot")) is None
    (directory / "README.md").write_text("more")
    assert different_file(before, source_identity(directory)) is None
    for name in ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"):
        kept = (directory / name).read_text()
        (directory / name).write_text(kept + " ")
        assert different_file(before, source_identity(directory)) == f"{name} differs ({len(kept)} bytes, now {len(kept) + 1})"
        (directory / name).write_text(kept)
    assert different_file(before, source_identity(directory)) is None and different_file([], before)


@pytest.mark.parametrize(
    "shape", [(), (0, 4), (7,), (4, 5000, 1), (2, 3, 4), (64, 3, 2, 16, 16), (3, 1 << 22), (8, 1 << 12, 1 << 12)]
)
def test_pieces_lie_inside_the_tensor_and_reach_both_its_ends(shape):
    size = 2 * int(torch.Size(shape).numel())
    spans = list(sample_spans(100, shape, size))
    assert all(100 <= begin and begin + count <= 100 + size for begin, count in spans)
    assert not size or spans[0][0] == 100 and sum(spans[-1]) == 100 + size
    assert sum(count for _, count in spans) <= max(size, 1) and len(spans) <= 3 * (
        shape[0] if len(shape) > 2 else 1
    ) + size // (1 << 24)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models--Qwen--Qwen3-30B-A3B/snapshots/0123abcd", "Qwen3-30B-A3B"),
        ("models--gpt2/snapshots/0123abcd", "gpt2"),
        ("models--o--a--b/snapshots/0123abcd", "a--b"),
        ("mine/snapshots/0123abcd", "0123abcd"),
        ("models/razor-tiny", "razor-tiny"),
    ],
)
def test_a_model_in_the_hubs_cache_has_its_own_name(tmp_path, path, name):
    (tmp_path / path).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / path)
    assert model_name(tmp_path / path) == model_name(tmp_path / "link") == name
