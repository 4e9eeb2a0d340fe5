"""Phase D: bake an adapter into a checkpoint of the same names, shapes, dtypes and bits.

    python src/distill/merge_adapter.py --student work/student --teacher models/razor-tiny --adapter work/adapter \
        --out work/recovered

The weights on the grid are computed as in training and written as they are: no scale is searched again. adapter.json has a
digest of each parameter as it was trained; one that comes out otherwise (another kind of device) stops the merge. Tensors
without an adapter are copied byte for byte. recipe.json says what was recovered, and how. For a ggml grid the packed blocks are
also written, to ggml.safetensors by parameter, for the GGUF writer.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, file_sha256, progress, read_json, run_cli, write_json
from fsdp_setup import World
from moe_lora import Adapter, digest
from opd_data import (
    ADAPTER,
    AdapterSettings,
    model_identity,
    named,
    opened,
    read_adapter,
    same_model,
    write_phase,
)
from opd_student import GridMaker
from plans import CHUNK_BYTES, sidecars
from recipe import RECIPE_FILE
from run_dir import check_output, staged_directory
from safetensors_file import CheckpointWriter, save_tensors

GGML_FILE = "ggml.safetensors"


def check_models(described: dict[str, Any], student: Path, teacher: Path, directory: Path) -> None:
    """Raise :class:`UserError` unless the adapter was trained on these two checkpoints."""
    for role, path in (("student", student), ("teacher", teacher)):
        if not same_model(described[role], model_identity(path)):
            raise UserError(f"{directory}: trained on another {role} than {path} ({named(described[role])})")


def trained_adapter(maker: GridMaker, name: str, directory: Path) -> Adapter:
    """The adapter of a parameter with its trained tensors; a shape that does not fit is a :class:`UserError`."""
    adapter = maker.make(name)
    if adapter is None:
        raise UserError(f"{directory}: adapts {name}, which the student's recipe leaves unquantized")
    with opened(directory / ADAPTER, "train again") as file, torch.no_grad():
        for leaf in ("a", "b", "growth"):
            target = getattr(adapter, leaf)
            if target is None:
                continue
            value = file.get_tensor(f"{name}.{leaf}")
            if value.shape != target.shape:
                raise UserError(f"{directory}: {name}.{leaf} is {list(value.shape)}, the model needs {list(target.shape)}")
            target.copy_(value)
    return adapter


class Bake:
    """The baked parameters, one at a time, in the order of the checkpoint's tensors."""

    def __init__(self, maker: GridMaker, described: dict[str, Any], directory: Path) -> None:
        self.maker, self.described, self.directory = maker, described, directory
        self.name, self.weights = "", torch.empty(0)
        self.packed: dict[str, Tensor] = {}
        self.changed = self.total = 0

    def parameter(self, name: str) -> Tensor:
        """The baked parameter on the CPU, its digest checked."""
        if self.name != name:
            adapter = trained_adapter(self.maker, name, self.directory)
            self.name, self.weights = name, adapter.baked().cpu()
            expected = self.described["parameters"][name]["sha256"]
            if digest(self.weights) != expected:
                own, trained = self.maker.device.type, self.described["device"]
                mend = f"trained on {trained}, merged on {own}: merge on {trained}" if own != trained else (
                    "on the same kind of device: the adapter was edited, or made with another version of the code or of torch"
                )  # fmt: skip
                raise UserError(f"{self.directory}: {name} comes out otherwise than it was trained, {mend}")
            before = self.maker.student.read(name)
            self.changed += int((before != self.weights).sum())
            self.total += before.numel()
            if self.described["parameters"][name]["grid"] == "ggml":
                self.packed[name] = adapter.packed().cpu()
        return self.weights


def merge(student: Path, teacher: Path, directory: Path, out: Path, force: bool, shard_bytes: int = 4 << 30) -> dict[str, Any]:
    """Write the recovered checkpoint; returns what recipe.json says of it. A killed run resumes to the same bytes."""
    started = time.monotonic()
    checkpoint, described = Checkpoint(student), read_adapter(directory)
    out = out.resolve()
    extras = sidecars(student)
    needed = sum(info.bytes for info in checkpoint.tensors.values()) + sum(file.stat().st_size for file in extras)
    check_output(student, out, force, needed)
    check_models(described, student, teacher, directory)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bake = Bake(GridMaker(student, teacher, AdapterSettings(**described["adapter"]), World(0, 1, device)), described, directory)
    job = {"adapter_sha256": file_sha256(directory / ADAPTER), "student": described["student"], "shard_bytes": shard_bytes}
    # tensors of one parameter follow one another, so that it is baked once
    names = sorted(checkpoint.tensors, key=order_key(checkpoint))
    with staged_directory(out, force, job) as partial:
        for file in extras:
            shutil.copyfile(file, partial / file.name)
        write_tensors(checkpoint, bake, names, partial, shard_bytes)
        recovery = recovery_record(described, job["adapter_sha256"], bake)
        write_json(partial / RECIPE_FILE, read_json(student / RECIPE_FILE) | {"recovery": recovery})
        if bake.packed:
            save_tensors(partial / GGML_FILE, bake.packed, {"type": described["adapter"]["ggml"]})
        share = round(bake.changed / max(1, bake.total), 6)
        write_phase(partial, "merge", time.monotonic() - started, 0, changed_share=share)
    return recovery


def order_key(checkpoint: Checkpoint) -> Callable[[str], int]:
    """Sort key of tensor names: parameters in the order in which the checkpoint first names them."""
    first: dict[str, int] = {}
    for number, place in enumerate(checkpoint.places.values()):
        first.setdefault(place.parameter, number)
    return lambda name: first[checkpoint.places[name].parameter]


def write_tensors(checkpoint: Checkpoint, bake: Bake, names: list[str], out: Path, shard_bytes: int) -> None:
    """Every tensor of the checkpoint, baked or copied."""
    plan = [(name, checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape) for name in names]
    total = sum(checkpoint.tensors[name].bytes for name in names)
    with progress(total, "merge", "B", True) as bar, CheckpointWriter(out, plan, shard_bytes) as writer:
        for name in names:
            place, info = checkpoint.places[name], checkpoint.tensors[name]
            if place.parameter in bake.described["parameters"]:
                baked = bake.parameter(place.parameter)
                turned = bake.maker.student.is_turned(place.parameter)
                value = place.view(baked.mT if turned else baked).reshape(info.shape)
                if not writer.is_done(name):
                    writer.append(name, value)
            elif not writer.is_done(name):
                for _, chunk in checkpoint.read_chunks(name, CHUNK_BYTES):
                    writer.append(name, chunk)
            bar.update(info.bytes)


def recovery_record(described: dict[str, Any], adapter_sha256: str, bake: Bake) -> dict[str, Any]:
    """What recipe.json says of the recovery."""
    keys = ("student", "teacher", "adapter", "data", "training")
    made = {key: described[key] for key in keys} | {"adapter_sha256": adapter_sha256}
    counts = {"parameters": len(described["parameters"]), "changed_weights": bake.changed, "adapted_weights": bake.total}
    return made | counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("student", "teacher", "adapter", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--shard-gib", type=float, default=4.0, help="largest weight file (default 4)")
    parser.add_argument("--force", action="store_true", help="replace an earlier output once the new one is complete")
    args = parser.parse_args()
    recovery = merge(args.student, args.teacher, args.adapter, args.out, args.force, int(args.shard_gib * 2**30))
    share = recovery["changed_weights"] / recovery["adapted_weights"]
    print(f"{recovery['changed_weights']:,} of {recovery['adapted_weights']:,} adapted weights changed "
          f"({100 * share:.2f} %); wrote {args.out}", flush=True)  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
