"""A Qwen3.5 mixture of experts as a Qwen3-Next, which is the same function in a class that vLLM runs on a CPU (its module of
Qwen3.5 imports torchvision).

    python src/eval/qwen3_next_form.py --model models/razor-tiny --out work/razor-tiny-next

For small models in one file: the evidence that packed checkpoints and vLLM agree (docs/PACKED.md), and the tests of vLLM.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from console import run_cli, write_json
from qwen3_5_form import begin
from safetensors_file import SINGLE

RENAMED = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}


def as_qwen3_next(tensors: dict[str, Tensor], heads: int, key: int, value: int) -> dict[str, Tensor]:
    """Qwen3.5's tensors in Qwen3-Next's layout, which is the same function: q, k, v and z of one key head lie together there,
    and so do b and a. ``heads`` key heads, ``key`` and ``value``: rows of q or k, and of v or z, that belong to one of them."""
    made = dict(tensors)
    for name in [name for name in tensors if name.endswith("in_proj_qkv.weight")]:
        stem = name.removesuffix("qkv.weight")
        qkv, z, b, a = (made.pop(f"{stem}{part}.weight") for part in ("qkv", "z", "b", "a"))
        q, k, v = qkv.split([heads * key, heads * key, heads * value])
        rows = [part.view(heads, -1, part.shape[-1]) for part in (q, k, v, z)]
        made[f"{stem}qkvz.weight"] = torch.cat(rows, dim=1).flatten(0, 1)
        made[f"{stem}ba.weight"] = torch.cat([part.view(heads, -1, part.shape[-1]) for part in (b, a)], dim=1).flatten(0, 1)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def next_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the converted model. Of text alone, mrope is rope."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    more = {"rope_parameters": rope, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return {**config, **RENAMED, **more, "intermediate_size": config["moe_intermediate_size"]}


def convert(model: Path, out: Path, heads: int | None = None) -> None:
    """Write the checkpoint in the other layout to the new directory ``out``. ``heads``: with so many key heads
    (:func:`qwen3_5_form.repeated_key_heads`)."""
    config, tensors = begin(model, out, heads)
    heads = config["linear_num_key_heads"]
    value = config["linear_value_head_dim"] * config["linear_num_value_heads"] // heads
    write_json(out / "config.json", next_config(config))
    made = as_qwen3_next(tensors, heads, config["linear_key_head_dim"], value)
    save_file(made, out / SINGLE, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint of qwen3_5_moe")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    parser.add_argument("--key-heads", type=int, help="give it so many, by repeating its own: vLLM divides them among GPUs")
    args = parser.parse_args()
    convert(args.model, args.out, args.key_heads)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    run_cli(main)
