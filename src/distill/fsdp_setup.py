"""Distribution, apart from everything else: one process as it is, or FSDP2 over torchrun's processes.

Not a command. `world = start_world()` reads what torchrun sets (WORLD_SIZE, RANK, LOCAL_RANK); with one process every function
here does nothing or the obvious. Each decoder layer is a unit: gathered for its forward and again for its backward. Frozen
latent weights (int8) are sharded like the adapters; only the adapters have gradients, which are summed over the processes.
:func:`launch` starts a node's processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from console import UserError

TIMEOUT = timedelta(minutes=10)  # of a collective: how long a node that fell silent holds up the others
JOIN = 1800  # seconds that a node waits for the others to come to the rendezvous
LOST = 75  # exit code of a process whose peers are gone (EX_TEMPFAIL of sysexits.h)


class Nodes(NamedTuple):
    """``nnodes`` machines, of which this is number ``node_rank``, that meet at ``rdzv``, an address of number 0."""

    nnodes: int = 1
    node_rank: int = 0
    rdzv: str = ""


ONE_NODE = Nodes()


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
        if sys.platform == "linux":  # a process whose agent was killed would train on, without a node that waits for it
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
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


@contextlib.contextmanager
def losing_peers() -> Iterator[None]:
    """End the process by one line and the code LOST where a collective fails because other processes are gone."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        print(f"error: process {os.environ.get('RANK')}: another process is gone ({reason})", file=sys.stderr, flush=True)
        os._exit(LOST)  # as in end_world


def launch(command: Sequence[str], processes: int, nodes: Nodes) -> None:
    """Run a Python ``command`` in ``processes`` processes here and on each other node, as torchrun does, but a failure is a
    :class:`UserError` that says in one line what happened. Nothing is started again: a run goes on from its saved state."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = nodes.nnodes
    # the port of one node is any that is free; of several, node 0 holds the store, whatever it calls itself
    configs = {"timeout": JOIN, "read_timeout": JOIN, "is_host": nodes.node_rank == 0} if count > 1 else {}
    config = LaunchConfig(count, count, processes, run_id="moe-lowbit", rdzv_backend="c10d", max_restarts=0,
                          rdzv_endpoint=nodes.rdzv or "localhost:0", rdzv_configs=configs)  # fmt: skip
    again = f"; the same command{' on every node' * (count > 1)} goes on from the last saved state"
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    try:
        threads = [f"{key}={value}" for key, value in shared_cores(processes).items()]
        elastic_launch(config, "env")(*threads, sys.executable, *command)
    except ChildFailedError as error:
        why = "processes of another node are gone: it was lost, or its own last line says why it stopped"
        for rank, failure in error.failures.items():
            if (code := failure.exitcode) != LOST:
                why = f"process {rank} " + (f"was ended by {signal.Signals(-code).name}" if code < 0 else
                                            f"ended with exit code {code}, as said above")  # fmt: skip
        raise UserError(f"training stopped: {why}{again}") from None
    except (RendezvousError, dist.DistError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        meet = f"the {count} nodes did not meet at RDZV={nodes.rdzv}, or node 0, which holds it, is gone"
        raise UserError(f"training stopped: {meet} ({reason}){again}") from None
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise UserError(f"training stopped: {signal.Signals(error.sigval).name}{again}") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def own_share(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


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
