"""Distribution, apart from everything else: one process as it is, or FSDP2 over torchrun's processes.

Not a command. `world = start_world()` reads what torchrun sets (WORLD_SIZE, RANK, LOCAL_RANK); with one process every function
here does nothing or the obvious. Each decoder layer is a unit: gathered for its forward and again for its backward. Frozen
latent weights (int8) are sharded like the adapters; only the adapters have gradients, which are summed over the processes.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from console import UserError


@dataclasses.dataclass(frozen=True)
class World:
    """The processes of a run; ``device`` is this one's."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start_world() -> World:
    """Join the processes that torchrun started, by NCCL on GPUs and gloo on CPUs."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    # RANK alone may be the key of a config: that of the adapters
    rank, local = (int(os.environ.get(key, 0)) if "WORLD_SIZE" in os.environ else 0 for key in ("RANK", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(f"torchrun started process {local}, but there are {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


def shared_cores(processes: int) -> dict[str, str]:
    """The variable that gives each of ``processes`` its share of the cores, where it is not set; torchrun would give it one."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))}


def end_world(world: World) -> None:
    """End the process, where there are several: all at once, and not through the end of the interpreter, where a thread of
    gloo that is still there would abort it (torch 2.13)."""
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def shard(module: nn.Module, world: World) -> None:
    """Shard the parameters of ``module`` (a decoder layer, or at last the whole) over the processes."""
    if world.size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=init_device_mesh(world.device.type, (world.size,)))


def own_rows(rows: int, world: World) -> slice:
    """Which of the first axis :func:`shard` leaves to this process: FSDP2 shards as torch.chunk does."""
    size = -(-rows // world.size)
    return slice(min(rows, world.rank * size), min(rows, (world.rank + 1) * size))


def full(tensor: Tensor) -> Tensor:
    """All of a tensor on every process; all processes must ask together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(values: Mapping[str, Tensor], first: bool) -> dict[str, Tensor]:
    """The tensors whole in the host's memory, on the ``first`` process alone; all processes must ask together."""
    found = {}
    for name, value in values.items():
        whole = full(value)
        if first:
            found[name] = whole.cpu().contiguous()
    return found


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy ``value``, whole on every process, into ``target``, which may be sharded."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(value)


def gathered_layer(layer: nn.Module) -> None:
    """Gather the parameters of a sharded layer until :func:`release_layer`."""
    if hasattr(layer, "unshard"):
        layer.unshard()


def release_layer(layer: nn.Module) -> None:
    if hasattr(layer, "reshard"):
        layer.reshard()


def summed(value: Tensor, world: World) -> Tensor:
    """The sum of a small tensor over the processes."""
    if world.size > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def from_each(value: Any, world: World) -> list[Any]:
    """What every process gives, in the order of their ranks; all processes must ask together."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values
