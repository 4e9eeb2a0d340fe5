"""A checkpoint directory: its config, and its tensors by name, read whole or in chunks.

Not a command. `Checkpoint(directory)` reads and checks headers only; `read(name)` is in memory of its own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from console import UserError, files_sha256, read_json, write_json
from packed_view import PACKED, unpacked_tensors
from safetensors_file import CheckpointWriter, TensorInfo, open_tensors

SYNTHETIC = "synthetic.json"  # beside the config.json of what synthetic_moe made: its seed, its shape, the shards still empty
CONSUMED = "consumed.json"  # in a checkpoint whose weights were given up while it was read: {"out": the output that has them}


class Checkpoint:
    """A checkpoint directory: ``config`` (config.json), ``tensors`` (name -> :class:`TensorInfo`, in the order of the
    shards and of their bytes), ``files`` (the shards). Opening reads and checks headers only. A packed checkpoint shows the
    tensors that it unpacks to, and unpacks what is read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise UserError(f"{self.path}: no such model directory")
        if not self.path.is_dir():
            raise UserError(f"{self.path}: not a directory; give the directory that holds config.json")
        if not (self.path / "config.json").is_file():
            raise UserError(f"{self.path}: no config.json in it; is this a model directory?")
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        if not isinstance(self.config, dict):
            raise UserError(f"{self.path / 'config.json'}: not a JSON object")
        self.files, self.tensors = open_tensors(self.path)
        if self.is_packed:
            self.tensors = unpacked_tensors(self.path, self.tensors)

    @property
    def is_packed(self) -> bool:
        return (self.path / PACKED).is_file()

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)

    @functools.cached_property
    def config_sha256(self) -> str:
        return hashlib.sha256((self.path / "config.json").read_bytes()).hexdigest()

    def sha256(self) -> str:
        """One digest of all weight files: console.files_sha256."""
        return files_sha256(self.files)

    def info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise UserError(f"{self.path}: no tensor {name}")
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        """The whole tensor, in memory of its own."""
        return self.info(name).read()

    def read_chunks(self, name: str, max_bytes: int) -> Iterator[tuple[int, Tensor]]:
        """(start, slice along axis 0) pieces of at most ``max_bytes``, never less than one row of axis 0."""
        info = self.info(name)
        if not info.shape or not info.numel:
            yield 0, self.read(name)
            return
        row = info.bytes // info.shape[0]
        step = max(1, max_bytes // row)
        for start in range(0, info.shape[0], step):
            yield start, info.read(start, min(step, info.shape[0] - start))


def is_synthetic(model: Path) -> bool:
    """Whether a checkpoint is one of synthetic_moe, which can be made again."""
    return (model / SYNTHETIC).is_file()


class SourceShards:
    """The shards of a checkpoint that is consumed: each gives its disk back once all its tensors lie in complete shards of the
    output. Its header and size stay until :meth:`remove`, so that a killed run goes on; the weights then read as zeros."""

    def __init__(self, checkpoint: Checkpoint, out: Path) -> None:
        self.checkpoint, self.out = checkpoint, out
        self.lock = threading.Lock()  # several writers sweep
        self.left: dict[Path, list[str]] = {}
        for name, info in checkpoint.tensors.items():
            self.left.setdefault(info.file, []).append(name)

    def begin(self, resumed: bool) -> None:
        """Raise :class:`UserError` where another run has consumed the checkpoint; else say that this one will."""
        mark = self.checkpoint.path / CONSUMED
        if mark.exists() and not (resumed and read_json(mark).get("out") == str(self.out)):
            raise UserError(f"{self.checkpoint.path}: its weights were consumed by a run into {read_json(mark).get('out')}")
        write_json(mark, {"out": str(self.out)})

    def sweep(self, writer: CheckpointWriter) -> None:
        """Give back what the output holds by now."""
        with self.lock:
            for file, names in list(self.left.items()):
                if all(writer.is_complete(name) for name in names):
                    size, start = file.stat().st_size, min(self.checkpoint.tensors[name].begin for name in names)
                    os.truncate(file, start)
                    os.truncate(file, size)
                    del self.left[file]

    def remove(self) -> None:
        """Delete the shards, when the output is complete."""
        for file in self.checkpoint.files:
            file.unlink()
