"""A text model of Qwen3.5 in a form that vLLM runs: the published one, or that of Qwen3-Next.

    python src/eval/vllm_form.py --model models/razor-tiny --out work/razor-tiny-35 [--key-heads 4]
    python src/eval/vllm_form.py --model models/razor-tiny --out work/razor-tiny-next --form qwen3_next
    python src/eval/vllm_form.py --model work/synthetic-35b --in-place

qwen3_5, which Qwen publishes: names nested under model.language_model, and with them the configuration of a vision tower and of
its processor. The tower itself has no weights here: with no picture allowed (VllmBackend) vLLM does not build it.
qwen3_next: the same function in a class that vLLM runs on a CPU (its module of Qwen3.5 imports torchvision).

vLLM divides the key heads of Gated DeltaNet among GPUs. A model with fewer gets copies of them (--key-heads), which is the same
function: a key head serves several value heads, and each copy some of those. A model in one file is converted; a synthetic
checkpoint, whose names are nested already, is given what it lacks: --in-place.
"""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, read_json, run_cli, write_json
from families import text_config
from records import REPO
from safetensors_file import SINGLE

SEEING = REPO / "models" / "razor-tiny-vl"  # its tower's sizes and its processor stand in
PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json")
FORMS = ("qwen3_5", "qwen3_next")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def complete(model: Path) -> None:
    """Give a checkpoint of nested names the published class's configuration, around that of the text model: a tower, a
    processor and, where it has none, a tokenizer."""
    for file in (*PROCESSOR, *TOKENIZER):
        if not (model / file).exists():
            shutil.copyfile(SEEING / file, model / file)
    seeing, text = read_json(SEEING / "config.json"), text_config(read_json(model / "config.json"))
    kept = {key: value for key, value in seeing.items() if key in ("architectures", "model_type") or key.endswith("_token_id")}
    tower = {**seeing["vision_config"], "out_hidden_size": text["hidden_size"]}
    tied = {"dtype": "bfloat16", "tie_word_embeddings": text["tie_word_embeddings"]}
    write_json(model / "config.json", {**kept, **tied, "text_config": text, "vision_config": tower})


def repeated_key_heads(tensors: dict[str, Tensor], config: dict[str, Any], heads: int) -> dict[str, Tensor]:
    """Tensors of the same function with ``heads`` key heads in every Gated DeltaNet, each of the model's so many times; head k
    serves its value heads in order. Raises :class:`UserError` where the numbers do not divide."""
    own, values, size = (config[f"linear_{key}"] for key in ("num_key_heads", "num_value_heads", "key_head_dim"))
    if heads % own or values % heads:
        raise UserError(f"--key-heads {heads}: must be a multiple of {own} that divides the {values} value heads")

    def repeat(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (own, size)).repeat_interleave(heads // own, 0).flatten(0, 1)

    made = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("linear_attn.in_proj_qkv.weight", "linear_attn.conv1d.weight")):
            q, k, v = tensor.split([own * size, own * size, len(tensor) - 2 * own * size])
            made[name] = torch.cat([repeat(q), repeat(k), v])
    return made


def text_model(model: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, tensors) of a text model in one file."""
    config = read_json(model / "config.json")
    if config.get("model_type") != "qwen3_5_moe_text" or not (model / SINGLE).is_file():
        raise UserError(f"{model}: not a qwen3_5_moe_text model in one file, {SINGLE}")
    return config, load_file(model / SINGLE)


def as_qwen3_next(tensors: dict[str, Tensor], heads: int, key: int, value: int) -> dict[str, Tensor]:
    """Qwen3.5's tensors in Qwen3-Next's layout, which is the same function: q, k, v and z of one key head lie together there,
    and so do b and a. ``heads`` key heads, ``key`` and ``value``: rows of q or k, and of v or z, that belong to one of them."""

    def together(*parts: Tensor) -> Tensor:
        return torch.cat([part.view(heads, -1, part.shape[-1]) for part in parts], dim=1).flatten(0, 1)

    made = dict(tensors)
    for name in [name for name in tensors if name.endswith("in_proj_qkv.weight")]:
        stem = name.removesuffix("qkv.weight")
        qkv, z, b, a = (made.pop(f"{stem}{part}.weight") for part in ("qkv", "z", "b", "a"))
        made[f"{stem}qkvz.weight"] = together(*qkv.split([heads * key, heads * key, heads * value]), z)
        made[f"{stem}ba.weight"] = together(b, a)
    return {name: tensor.contiguous() for name, tensor in made.items()}


def next_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the converted model. Of text alone, mrope is rope."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    renamed = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}
    more = {"rope_parameters": rope, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return {**config, **renamed, **more, "intermediate_size": config["moe_intermediate_size"]}


def write_form(form: str, model: Path, out: Path, heads: int | None = None) -> None:
    """``model`` in one of :data:`FORMS` in the new directory ``out``, with ``heads`` key heads where a number is given; where
    ``out`` is the model itself, it is given what it lacks of qwen3_5."""
    if out == model:
        if not any(name.startswith("model.language_model.") for name in Checkpoint(model).tensors):
            raise UserError(f"{model}: its names are not nested under model.language_model; give --out")
        complete(model)
        return
    config, tensors = text_model(model)
    if out.exists():
        raise UserError(f"{out}: exists; choose another --out")
    if heads:
        tensors = repeated_key_heads(tensors, config, heads)
        config["linear_num_key_heads"] = heads
    out.mkdir(parents=True)
    for file in TOKENIZER:
        shutil.copyfile(model / file, out / file)
    if form == "qwen3_next":
        heads = config["linear_num_key_heads"]
        value = config["linear_value_head_dim"] * config["linear_num_value_heads"] // heads
        tensors = as_qwen3_next(tensors, heads, config["linear_key_head_dim"], value)
        write_json(out / "config.json", next_config(config))
    else:
        tensors = {re.sub(r"^model\.", "model.language_model.", name): tensor for name, tensor in tensors.items()}
        write_json(out / "config.json", config)
        complete(out)
    save_file(tensors, out / SINGLE, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a text model of qwen3_5_moe: in one file, or nested")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="directory to make")
    where.add_argument("--in-place", action="store_true", help="only add what a checkpoint of nested names lacks")
    parser.add_argument("--form", choices=FORMS, default=FORMS[0], help="class that it is written for (default qwen3_5)")
    parser.add_argument("--key-heads", type=int, help="give it so many, by repeating its own: vLLM divides them among GPUs")
    args = parser.parse_args()
    write_form(args.form, args.model, args.model if args.in_place else args.out, args.key_heads)
    print(f"wrote {args.out or args.model}", flush=True)


if __name__ == "__main__":
    run_cli(main)
