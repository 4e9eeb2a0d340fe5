"""What recovery needs on a machine, by arithmetic from the model's shape: memory of a GPU, hours, disk.

    python src/distill/opd_budget.py [--model DIR] [--gpus 4 --rank 8 --rows 16 --micro-rows 1 --tokens 8192 --steps 200 ...]

Without --model: the shape of Qwen3.5-122B-A10B. Memory is counted term by term as opd_train_fsdp allocates it. Hours rest on
the rates named in the output (`assumed`), which are arguments; measured is only what the grid costs (GRID_BYTES).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from console import UserError, read_json, run_cli
from families import text_config
from opd_student import HEAD_CHUNK
from records import REPO
from target_grid import IntGrid

GROUP = 128
GRID_BYTES = 96  # traffic of a weight each time: what two more layers of the 122B took (results/bench/multi_gpu_train122b.json)
FLOAT_COPIES = 4  # float32 tensors of a chunk that the grid holds at once: position, codes, product, gradient
# Keys of config.json by family, in the order of Shape's fields; a dense model has no experts.
SIZES = (
    ("num_hidden_layers",), ("num_experts", "num_local_experts", "n_routed_experts"), ("num_experts_per_tok",),
    ("hidden_size",), ("moe_intermediate_size", "intermediate_size"), ("vocab_size",),
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A mixture of experts whose layers all have them, or a dense model without. ``parameters`` and ``active``: all, and those
    that one token meets."""

    layers: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    vocabulary: int
    parameters: float
    active: float

    @property
    def routed(self) -> int:
        """Parameters in routed experts."""
        return self.layers * self.experts * 3 * self.inner * self.hidden

    def adapter_parameters(self, rank: int) -> int:
        """A and B of gate_up_proj [2I, H] and down_proj [H, I] of every expert."""
        return self.layers * self.experts * rank * ((2 * self.inner + self.hidden) + (self.hidden + self.inner))


def sizes_of(config: Mapping[str, Any], where: Path) -> list[int]:
    """The sizes of a config.json; no experts where it names none."""
    found = [next((config[key] for key in keys if isinstance(config.get(key), int)), 0) for keys in SIZES]
    if not all(found[place] for place in (0, 3, 4, 5)) or bool(found[1]) != bool(found[2]):
        missing = [keys[0] for keys, size in zip(SIZES, found, strict=True) if not size]
        raise UserError(f"{where / 'config.json'}: has no {', '.join(missing)}")
    return found


def shape_of(model: Path | None) -> Shape:
    """The shape of a checkpoint; without one that of Qwen3.5-122B-A10B, its parameters as its name rounds them."""
    if model is None:
        config = text_config(read_json(REPO / "configs/shape_122b.json"))
        return Shape(*sizes_of(config, REPO / "configs"), 122e9, 10e9)
    checkpoint = Checkpoint(model)
    config = text_config(checkpoint.config)
    total = sum(info.numel for info in checkpoint.tensors.values())
    shape = Shape(*sizes_of(config, checkpoint.path), total, total)
    return dataclasses.replace(shape, active=total - shape.routed * (1 - shape.top_k / max(1, shape.experts)))


@dataclass(frozen=True)
class Plan:
    """A run, and the rates that hours are computed with."""

    gpus: int = 4
    rank: int = 8
    rows: int = 16
    micro_rows: int = 1
    tokens: int = 8192  # of a rollout, prompt included
    steps: int = 200
    rollouts: int = 2000
    k: int = 64
    flops: float = 4e14  # of a GPU in BF16 matrix products, as achieved
    bandwidth: float = 2.98e12  # bytes a second of a GPU's memory, as achieved
    link: float = 3e11  # bytes a second that a GPU receives from the others
    generated: float = 2000.0  # tokens a second of the student's rollouts on all GPUs


def memory(shape: Shape, plan: Plan) -> dict[str, float]:
    """Bytes of one GPU in training, term by term."""
    layer = shape.routed / shape.layers
    adapters = shape.adapter_parameters(plan.rank)
    tokens = plan.micro_rows * plan.tokens
    frozen = shape.routed * (1 + 2 / GROUP) + 2 * (shape.parameters - shape.routed)
    gathered = layer * (1 + 2 / GROUP) + 2 * 4 * adapters / shape.layers  # latents, scales, adapters and their gradients
    routed_activations = shape.top_k * (2 * shape.hidden + 3 * shape.inner)
    return {
        "frozen weights, sharded (int8 latents, bfloat16 scales, the rest in bfloat16)": frozen / plan.gpus,
        "adapters with gradient and Adam's moments, sharded (16 bytes each)": 16 * adapters / plan.gpus,
        "two layers gathered (the next one is prefetched)": 2 * gathered,
        "one layer's experts on the grid and their gradient, bfloat16": 2 * 2 * layer,
        "float32 chunks of the grid": FLOAT_COPIES * 4 * IntGrid.chunk["cuda"],
        "root: embedding and head gathered": 2 * 2 * shape.vocabulary * shape.hidden,
        "layer inputs kept for recomputation": 2 * shape.layers * tokens * shape.hidden,
        "activations of the layer at work": 2 * tokens * (routed_activations + 20 * shape.hidden),
        f"logits of {HEAD_CHUNK} positions, three float32 copies": 3 * 4 * HEAD_CHUNK * shape.vocabulary,
    }


def hours(shape: Shape, plan: Plan) -> dict[str, float]:
    """Hours of each phase under the assumed rates."""
    micro_steps = plan.rows // (plan.micro_rows * plan.gpus)
    products = 8 * shape.active * plan.rows * plan.tokens / plan.gpus / plan.flops  # forward, again, and twice backward
    # each GPU puts all experts on the grid, forward, again and backward
    grid = micro_steps * 3 * GRID_BYTES * shape.routed / plan.bandwidth
    gather = micro_steps * 2 * shape.routed * (1 + 2 / GROUP) / plan.link
    total = plan.rollouts * plan.tokens
    return {
        "A rollouts": total / plan.generated / 3600,
        # layers lie on the GPUs one after the other, so that one works at a time; a sequence at a time keeps it at half speed
        "B scores": 2 * shape.active * total / (0.5 * plan.flops) / 3600,
        "C training": plan.steps * (products + grid + gather) / 3600,
        "C of which matrix products": plan.steps * products / 3600,
        "C of which the grid": plan.steps * grid / 3600,
        "C of which gathering": plan.steps * gather / 3600,
    }


def disk(shape: Shape, plan: Plan) -> dict[str, float]:
    """Bytes on disk."""
    return {
        "scores": plan.rollouts * plan.tokens * (8 * plan.k + 8),
        "adapter": 4 * shape.adapter_parameters(plan.rank),
        "training state": 12 * shape.adapter_parameters(plan.rank),
        "recovered checkpoint, dequantized": 2 * shape.parameters,
    }


def budget(model: Path | None, **plan: Any) -> dict[str, Any]:
    """Everything, in bytes and hours. ``plan``: what differs from the defaults of :class:`Plan`."""
    own, shape = Plan(**plan), shape_of(model)
    return {
        "shape": dataclasses.asdict(shape) | {"routed": shape.routed},
        "assumed": dataclasses.asdict(own),
        "adapter_parameters": shape.adapter_parameters(own.rank),
        "gpu": memory(shape, own),
        "hours": hours(shape, own),
        "disk": disk(shape, own),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="checkpoint whose shape is taken")
    for field in dataclasses.fields(Plan):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    values = vars(parser.parse_args())
    model = values.pop("model")
    if not all(0 < value < math.inf for value in values.values()) or values["rows"] % (values["micro_rows"] * values["gpus"]):
        raise UserError("every number must be above 0, and --rows a multiple of --micro-rows x --gpus")
    found = budget(model, **values)
    for kind, shown, unit in (("gpu", "gpu_gb", 1e9), ("hours", "hours", 1), ("disk", "disk_gb", 1e9)):
        found[shown] = {name: round(value / unit, 3) for name, value in found.pop(kind).items()}
    found["gpu_gb"]["total"] = round(sum(found["gpu_gb"].values()), 3)
    print(json.dumps(found, indent=2), flush=True)


if __name__ == "__main__":
    run_cli(main)
