"""A GGUF file written tensor by tensor behind a header made beforehand, and taken up again after a kill; reading one back.

Not a command. Format (llama.cpp, ggml/include/gguf.h): magic, key-values, a table of tensors with offsets, then the tensors,
each padded to 32 bytes. The offsets are known before the first tensor is, so the file only ever grows. A split model is several
such files, NAME-00001-of-00003.gguf and so on (llama.cpp, tools/gguf-split): the first has all key-values, each has split.no,
split.tensors.count and split.count, and tensors of its own; whatever reads a GGUF takes the first one's name for all.

llama.cpp's importance matrix is such a file too (tools/imatrix): for every weight a float32 tensor NAME.in_sum2 [matrices,
inputs], the summed squared inputs, and NAME.counts [matrices, 1], what they are divided by; keys general.type "imatrix",
imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size. `python src/quant/moe_probe.py --imatrix FILE` writes one.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

import llama_cpp
from console import FULL, UserError, WriteError, atomic_path, files_sha256, read_object, write_json, writing
from ggml_types import TYPES, row_bytes
from records import public_path

ALIGNMENT = 32
DRIVER = Path(__file__).with_name("gguf_convert.py")
HEADER = "header.bin"  # what make_header leaves in its directory


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_bytes(shape: Sequence[int], kind: str) -> int:
    """Bytes of a tensor of this type, without padding."""
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1])


def run_converter(*arguments: object) -> None:
    """llama.cpp's converter on ``arguments`` (see gguf_convert.py); its last words are the error's."""
    command = [sys.executable, str(DRIVER), str(llama_cpp.source()), *map(str, arguments)]
    code, output = llama_cpp.watched(command, "convert", "%")
    if code:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "no message")
        kind = WriteError if any(os.strerror(number) in output for number in FULL) else UserError
        raise kind(f"llama.cpp's converter failed: {last.strip()[:300]}")


def make_header(
    model: Path,
    tensors: Sequence[tuple[str, Sequence[int], str]],
    file_type: int,
    work: Path,
    mtp: str = "none",
    keys: Mapping[str, float] | None = None,
    ends: Sequence[int] = (),
) -> bytes:
    """What stands before the first tensor, with llama.cpp's own key-values for ``model``; ``work``: a directory to use.
    ``keys``: more of the architecture's own; ``ends``: tokens at which generation ends; ``mtp``: of gguf_convert.py."""
    rows = [[name, list(shape), TYPES[kind].ggml.name, tensor_bytes(shape, kind)] for name, shape, kind in tensors]
    plan, header = work / "plan.json", work / HEADER
    plan.write_text(
        json.dumps({"ftype": file_type, "mtp": mtp, "keys": dict(keys or {}), "ends": list(ends), "tensors": rows}),
        encoding="utf-8",
    )
    run_converter("header", model, plan, header)
    return header.read_bytes()


class ConverterValues:
    """The values of tensors that only llama.cpp's converter computes, one at a time; its process starts with the first and ends
    with this object."""

    def __init__(self, model: Path, mtp: str) -> None:
        self.model, self.mtp = model, mtp
        self._process: subprocess.Popen[str] | None = None

    def _start(self) -> subprocess.Popen[str]:
        self._work = tempfile.TemporaryDirectory()
        self._file, self._said = Path(self._work.name, "values"), Path(self._work.name, "said").open("w+b")
        command = [sys.executable, DRIVER, llama_cpp.source(), "values", self.model, self.mtp, self._file]
        streams: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said}
        process = subprocess.Popen(list(map(str, command)), text=True, **streams)
        weakref.finalize(self, process.kill)
        self._answered(process, "ready")
        return process

    def _answered(self, process: subprocess.Popen[str], word: str) -> None:
        if not any(line.strip() == word for line in process.stdout):
            self._said.seek(0)
            lines = [line for line in self._said.read().decode("utf-8", "replace").splitlines() if line.strip()]
            raise UserError(f"llama.cpp's converter failed: {(lines or ['no message'])[-1].strip()[:300]}")

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        """float32 of this shape."""
        self._process = process = self._process or self._start()
        process.stdin.write(f"{name}\n")
        process.stdin.flush()
        self._answered(process, "done")
        return torch.from_numpy(np.fromfile(self._file, np.float32)).view(*shape)


class Part(NamedTuple):
    """One file of a model: what stands before its first tensor, and how many tensors it holds."""

    header: bytes
    tensors: int


def text_bytes(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def split_groups(tensors: Sequence[tuple[str, Sequence[int], str]], limit: int) -> list[list[int]]:
    """Which of ``tensors`` [(name, shape, type)] stand in each file where one holds at most ``limit`` bytes of them, as
    `llama-gguf-split --split-max-size` has it: a tensor that is larger has a file of its own, but for the first
    (:class:`UserError`), at which the tool gives up as well."""
    groups: list[list[int]] = [[]]
    held = 0
    for index, (name, shape, kind) in enumerate(tensors):
        size = padded(tensor_bytes(shape, kind))
        if not index and size > limit:
            given, least = limit / 2**30, size / 2**30
            raise UserError(f"SPLIT_GIB={given:.4g}: the first tensor, {name}, takes {least:.4g} GiB alone; give that or more")
        held += size
        if held > limit:
            groups.append([])
            held = size
        groups[-1].append(index)
    return groups


def split_header(header: bytes, tensors: Sequence[tuple[str, Sequence[int], str]], limit: int) -> list[Part]:
    """The parts of a model by :func:`split_groups` from the ``header`` of the one file: the tool's, byte for byte."""
    groups = split_groups(tensors, limit)
    table = header.rindex(text_bytes(tensors[0][0]))  # behind it stand names of other tensors only
    (keys,) = struct.unpack_from("<Q", header, 16)
    parts = []
    for number, group in enumerate(groups):
        head = header[24:table] if number == 0 else b""
        for key, coded, code, value in (  # in the order in which the tool has set them last
            ("split.no", gguf.GGUFValueType.UINT16, "H", number),
            ("split.tensors.count", gguf.GGUFValueType.INT32, "i", len(tensors)),
            ("split.count", gguf.GGUFValueType.UINT16, "H", len(groups)),
        ):
            head += text_bytes(key) + struct.pack(f"<I{code}", coded, value)
        offset = 0
        for name, shape, kind in (tensors[index] for index in group):
            sides = list(reversed(shape))
            while len(sides) > 1 and sides[-1] == 1:  # ggml does not count them, gguf-py does
                sides.pop()
            head += text_bytes(name) + struct.pack(f"<I{len(sides)}Q", len(sides), *sides)
            head += struct.pack("<IQ", TYPES[kind].ggml, offset)
            offset += padded(tensor_bytes(shape, kind))
        head = header[:8] + struct.pack("<QQ", len(group), 3 + keys * (number == 0)) + head
        parts.append(Part(head.ljust(padded(len(head)), b"\0"), len(group)))
    return parts


def part_path(path: Path, number: int, count: int) -> Path:
    """The file of part ``number`` (from 1) of the model that would be ``path`` were it whole."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number:05d}-of-{count:05d}.gguf")


class GgufWriter:
    """Appends tensors in the order of ``plan`` [(name, bytes)] behind ``header``, or behind those of the parts of a split
    model. What :meth:`sync` has seen survives a kill: opening again with the same ``state`` file goes on behind it, and
    ``done`` says how many tensors there are. ``files``: what is written."""

    def __init__(self, path: Path, header: bytes | Sequence[Part], plan: Sequence[tuple[str, int]], state: Path) -> None:
        whole = isinstance(header, bytes)
        self.parts = [Part(header, len(plan))] if isinstance(header, bytes) else list(header)
        count = len(self.parts)
        self.files = [path] if whole else [part_path(path, number, count) for number in range(1, count + 1)]
        self.state, self.plan = state, list(plan)
        self.places: list[tuple[int, int]] = []  # the file and the offset of each tensor, and of the end
        self.sizes: list[int] = []  # of the files
        rest = iter(self.plan)
        for number, part in enumerate(self.parts):
            at = len(part.header)
            for _, (_, size) in zip(range(part.tensors), rest):
                self.places.append((number, at))
                at += padded(size)
            self.sizes.append(at)
        self.places.append((count - 1, self.sizes[-1]))
        self.facts: dict[str, Any] = {}
        self.done, self._written = 0, 0
        if state.exists():
            saved = read_object(state, "tensors", "facts")
            self.done, self.facts = saved["tensors"], saved["facts"]
        for file, size in zip(self.files[: self.places[self.done][0]], self.sizes):
            self._check_kept(file, size)
        self._open()

    def _check_kept(self, file: Path, size: int) -> None:
        if not file.exists() or file.stat().st_size < size:
            raise UserError(f"{file}: shorter than {self.state} says; remove {file.parent} and start again")

    def _open(self) -> None:
        """The file of the next tensor, cut where that begins."""
        number, at = self.places[self.done]
        self.path, header = self.files[number], self.parts[number].header
        with writing(self.path):
            if at == len(header):
                self._stream: BinaryIO = self.path.open("wb")
                self._stream.write(header)
            else:
                self._check_kept(self.path, at)
                self._stream = self.path.open("r+b")
                self._stream.truncate(at)
                self._stream.seek(at)

    def __enter__(self) -> GgufWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with writing(self.path), self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        if kind is None and self.done != len(self.plan):
            raise ValueError(f"{self.path}: {len(self.plan) - self.done} tensors of the plan were not written")

    def append(self, name: str, data: Tensor) -> None:
        """The bytes of ``name``, the next of the plan, or the next part of them; any contiguous tensor."""
        wanted, size = self.plan[self.done]
        view = memoryview(data.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        if name != wanted or self._written + len(view) > size:
            raise ValueError(f"{name} ({len(view)} bytes) is not next in the plan (next: {wanted})")
        with writing(self.path):
            self._stream.write(view)
            self._written += len(view)
            if self._written == size:
                self._stream.write(bytes(padded(size) - size))
                self.done, self._written = self.done + 1, 0
        if self.files[self.places[self.done][0]] != self.path:
            self._flush()
            self._stream.close()
            self._open()

    def _flush(self) -> None:
        with writing(self.path):
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def sync(self) -> None:
        """Make what was appended survive a kill."""
        self._flush()
        write_json(self.state, {"tensors": self.done, "facts": self.facts})


class GgufFile:
    """A GGUF on disk, all parts of a split one: ``fields`` (contents by key) and ``tensors`` by name; nothing is read until
    :meth:`data` asks."""

    def __init__(self, path: str | Path) -> None:
        self.path, parts = Path(path), open_parts(path)
        self.files = list(parts)
        self.fields = {key: field.contents() for key, field in parts[self.files[0]].fields.items()}
        self.tensors = {tensor.name: tensor for reader in parts.values() for tensor in reader.tensors}
        self._places = {tensor.name: file for file, reader in parts.items() for tensor in reader.tensors}

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def architecture(self) -> str:
        return str(self.fields.get("general.architecture"))

    def kind(self, name: str) -> str:
        """The type of a tensor, as in ggml_types."""
        ggml = self.tensors[name].tensor_type
        kind = next((kind.name for kind in TYPES.values() if kind.ggml == ggml), None)
        if kind is None:
            raise UserError(f"{self.path}: {name} is of type {ggml.name}, which this project does not read")
        return kind

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(reversed(self.tensors[name].shape.tolist()))

    def data(self, name: str) -> Tensor:
        """uint8 [..., bytes of a row] of a tensor, in memory of its own."""
        tensor, shape = self.tensors[name], self.shape(name)
        raw = torch.empty(int(tensor.n_bytes), dtype=torch.uint8)
        with self._places[name].open("rb") as stream:
            stream.seek(int(tensor.data_offset))
            if stream.readinto(memoryview(raw.numpy())) != len(raw):
                raise UserError(f"{self._places[name]}: truncated inside {name}; write it again")
        return raw.view(*shape[:-1], row_bytes(self.kind(name), shape[-1]))


MAY_DIFFER = ("general.name", "general.basename", "general.finetune", "general.version", "GGUF.kv_count")


def same_file(ours: Path, theirs: Path) -> list[str]:
    """How a GGUF differs from another, as lines of text: in metadata but for names, in names, types, shapes or bytes of
    tensors; empty where it does not."""
    one, other, lines = GgufFile(ours), GgufFile(theirs), []
    for key in sorted(one.fields.keys() | other.fields.keys()):
        if key not in MAY_DIFFER and one.fields.get(key) != other.fields.get(key):
            lines.append(f"{key}: {str(one.fields.get(key))[:60]} instead of {str(other.fields.get(key))[:60]}")
    for name in sorted(one.tensors.keys() | other.tensors.keys()):
        made = [
            (f.tensors[name].tensor_type.name, without_ones(f.shape(name))) if name in f.tensors else None for f in (one, other)
        ]
        if made[0] != made[1]:
            lines.append(f"{name}: {made[0]} instead of {made[1]}")
        elif not np.array_equal(one.tensors[name].data.ravel(), other.tensors[name].data.ravel()):
            lines.append(f"{name}: other bytes")
    return lines


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as llama-quantize writes it again, [1, I] as [I]."""
    first = next((axis for axis, size in enumerate(shape[:-1]) if size != 1), len(shape) - 1)
    return tuple(shape[first:])


class Entry(NamedTuple):
    """``sums`` [matrices, inputs] of (weighted) squared inputs and ``counts`` [matrices], both float32."""

    sums: np.ndarray
    counts: np.ndarray


def write_imatrix(path: str | Path, entries: Mapping[str, Entry], datasets: Iterable[str], chunks: int, length: int) -> None:
    """Write ``entries``; ``chunks`` sequences of ``length`` tokens were read. The file appears when it is complete."""
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch="")
        # Not gguf-py's own general.architecture: llama-quantize knows an imatrix by general.type alone.
        writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", length)
        for name, entry in sorted(entries.items()):
            writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(entry.sums, dtype=np.float32))
            writer.add_tensor(f"{name}.counts", np.ascontiguousarray(entry.counts, dtype=np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: str | Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """(entries, {"datasets", "chunk_count", "chunk_size"}) of an imatrix; another file is a :class:`UserError`."""
    file = GgufFile(path)
    if file.fields.get("general.type") != "imatrix":
        raise UserError(f"{path}: a GGUF file, but not an imatrix (general.type)")
    tensors = {name: np.array(tensor.data, dtype=np.float32) for name, tensor in file.tensors.items()}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    lost = next((name for name in names if f"{name}.counts" not in tensors), None)
    if lost or 2 * len(names) != len(tensors):
        raise UserError(f"{path}: {lost or 'a tensor'} has sums or counts but not both; write it again")
    entries = {name: Entry(tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"].reshape(-1)) for name in names}
    for name, entry in entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()):
            raise UserError(f"{path}: {name} holds NaN or infinity; make it again, of a model whose activations are finite")
    return entries, {key: file.fields[f"imatrix.{key}"] for key in ("datasets", "chunk_count", "chunk_size")}


if TYPE_CHECKING:
    from gguf import GGUFReader

MODEL_TYPES = {  # transformers' names of llama.cpp's architectures, where they differ
    "qwen35moe": "qwen3_5_moe_text",
    "qwen35": "qwen3_5_text",
    "qwen3next": "qwen3_next",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "deepseek2": "deepseek_v3",
}
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf$")


def is_gguf(path: str | Path) -> bool:
    return str(path).endswith(".gguf")


def is_first(name: str) -> bool:
    """Whether a file of this name is a model or the first part of one."""
    return not (match := SHARD.match(name)) or match[2] == "00001"


def part_names(name: str) -> list[str]:
    """The names of all parts of a split model from that of the first, or of another file its own; :class:`UserError` on a
    later part."""
    if not (match := SHARD.match(name)):
        return [name]
    if not is_first(name):
        first = f"{match[1]}-00001-of-{match[3]}.gguf"
        raise UserError(f"{name}: part {int(match[2])} of a split model; give the first, {first}")
    return [f"{match[1]}-{number:05d}-of-{match[3]}.gguf" for number in range(1, int(match[3]) + 1)]


def gguf_files(path: str | Path) -> list[Path]:
    """The file, or all files of a split model whose first file is given."""
    files = [Path(name) for name in part_names(str(path))]
    if not files[0].is_file():
        raise UserError(f"{path}: no such GGUF file")
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path}: the split model lacks {', '.join(missing)}")
    return files


def open_gguf(path: str | Path) -> GGUFReader:
    """Header and tensor table, checked against the file's length; a damaged file is a :class:`UserError`."""
    from gguf import GGUFReader  # here: machines that evaluate checkpoints only may lack it

    path = Path(path)
    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, IndexError, OverflowError, KeyError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: truncated, or not a GGUF file ({told}); copy or make it again") from None
    size = path.stat().st_size
    last = max(reader.tensors, key=lambda tensor: int(tensor.data_offset), default=None)
    needed = int(last.data_offset) + int(last.n_bytes) if last is not None else 0
    if size < needed:
        raise UserError(f"{path}: {size:,} bytes, its tensors need {needed:,}: truncated; copy or make it again")
    return reader


def open_parts(path: str | Path) -> dict[Path, GGUFReader]:
    """Every file of a model whose first is ``path``, opened; a part of another model is a :class:`UserError` that names it."""
    readers = {file: open_gguf(file) for file in gguf_files(path)}
    total = metadata(next(iter(readers.values())), "split.tensors.count")
    seen: set[str] = set()
    for number, (file, reader) in enumerate(readers.items()):
        own = [metadata(reader, f"split.{key}") for key in ("no", "count", "tensors.count")]
        said = "no part of a split model" if own[1] is None else f"part {own[0] + 1} of {own[1]} ({own[2]} tensors in all)"
        names = {tensor.name for tensor in reader.tensors}
        if SHARD.match(file.name) and not (len(readers) == 1 and own[1] is None):
            if own != [number, len(readers), total] or seen & names:
                twice = f", with {min(seen & names)} once more" if seen & names else ""
                raise UserError(f"{file}: its header says {said}{twice}: it does not belong to {path}; fetch or make it again")
        elif (own[1] or 1) > 1:
            raise UserError(f"{file}: its header says {said}; llama.cpp wants the name NAME-00001-of-{own[1]:05d}.gguf")
        seen |= names
    if total is not None and len(seen) != total:
        raise UserError(
            f"{path}: the parts hold {len(seen)} tensors of {total}: one is of another model; fetch or make them again"
        )
    return readers


def metadata(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a metadata key."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


# The pre-tokenizers of llama.cpp (src/llama-vocab.cpp) that put a beginning-of-text token where the file does not say.
BEGINS = set("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano tekken chameleon".split())


def bos_of(path: str | Path) -> int | None:
    """The token that llama.cpp puts before a text, and in place of each chunk's first token; None where there is none."""
    reader = open_gguf(path)
    model, pre = (metadata(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    adds = metadata(reader, "tokenizer.ggml.add_bos_token", model in ("llama", "bert") or pre in BEGINS)
    if not adds and "gemma4" not in (model, pre):  # which adds it whatever the file says
        return None
    return metadata(reader, "tokenizer.ggml.bos_token_id", {"llama": 1, "gpt2": 11}.get(model))


def architecture_value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """A value of the model's own section, such as ``context_length`` for ``qwen35moe.context_length``."""
    return metadata(reader, f"{metadata(reader, 'general.architecture')}.{key}", default)


def token_text(reader: GGUFReader, kind: str) -> str | None:
    """The text of the special token that ``tokenizer.ggml.KIND_token_id`` names."""
    index = metadata(reader, f"tokenizer.ggml.{kind}_token_id")
    if index is None:
        return None
    field = reader.get_field("tokenizer.ggml.tokens")
    return bytes(field.parts[field.data[int(index)]]).decode("utf-8")


def describe_gguf(path: str | Path, digest: bool = True) -> dict[str, Any]:
    """The model entry of a record: path, bytes, digest, tensors, architecture, and how many tensors have each type."""
    readers = open_parts(path)
    files = list(readers)
    types = Counter(tensor.tensor_type.name.lower() for reader in readers.values() for tensor in reader.tensors)
    return {
        "path": public_path(str(Path(path).resolve())),
        "format": "gguf",
        "architecture": metadata(readers[files[0]], "general.architecture"),
        "bytes": sum(file.stat().st_size for file in files),
        "tensors": sum(types.values()),
        "types": dict(sorted(types.items())),
        **({"weights_sha256": files_sha256(files)} if digest else {}),
    }


def config_of_gguf(path: str | Path) -> dict[str, Any]:
    """What config.json of the model said, as far as it tells which model it is."""
    reader = open_gguf(gguf_files(path)[0])
    architecture = metadata(reader, "general.architecture")
    layers = int(architecture_value(reader, "block_count", 0)) - int(architecture_value(reader, "nextn_predict_layers", 0))
    config = {"model_type": MODEL_TYPES.get(architecture, architecture), "num_hidden_layers": layers}
    for ours, theirs in (("hidden_size", "embedding_length"), ("num_experts", "expert_count")):
        if (value := architecture_value(reader, theirs)) is not None:
            config[ours] = int(value)
    return config
