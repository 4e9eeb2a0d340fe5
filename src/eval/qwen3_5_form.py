"""A text model of Qwen3.5 in the form that Qwen publishes and vLLM runs: names nested under model.language_model, and with them
the configuration of a vision tower and of its processor.

    python src/eval/qwen3_5_form.py --model models/razor-tiny --out work/razor-tiny-35 [--key-heads 4]

vLLM divides the key heads of Gated DeltaNet among GPUs. A model with fewer gets copies of them (--key-heads), which is the same
function: a key head serves several value heads, and each copy some of those.

The tower itself has no weights here: with no picture allowed (VllmBackend) vLLM does not build it. A model in one file
is converted; a synthetic checkpoint, whose names are nested already, is given what it lacks: --model DIR --in-place.
"""

from __future__ import annotations

import argparse
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
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def nested_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the published class around that of a text model (or around its own text_config)."""
    seeing = read_json(SEEING / "config.json")
    text = text_config(config)
    tower = {**seeing["vision_config"], "out_hidden_size": text["hidden_size"]}
    tokens = {key: value for key, value in seeing.items() if key.endswith("_token_id")}
    return {
        "architectures": seeing["architectures"], "model_type": seeing["model_type"], "dtype": "bfloat16",
        "tie_word_embeddings": text["tie_word_embeddings"], **tokens, "text_config": text, "vision_config": tower,
    }  # fmt: skip


def complete(model: Path) -> None:
    """Give a checkpoint of nested names the configuration of a tower, a processor and, where it has none, a tokenizer."""
    for file in (*PROCESSOR, *TOKENIZER):
        if not (model / file).exists():
            shutil.copyfile(SEEING / file, model / file)
    write_json(model / "config.json", nested_config(read_json(model / "config.json")))


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


def begin(model: Path, out: Path, heads: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`text_model` reads, with ``heads`` key heads where a number is given; its tokenizer is put into the new
    directory ``out``."""
    config, tensors = text_model(model)
    if out.exists():
        raise UserError(f"{out}: exists; choose another --out")
    if heads:
        tensors = repeated_key_heads(tensors, config, heads)
        config["linear_num_key_heads"] = heads
    out.mkdir(parents=True)
    for file in TOKENIZER:
        shutil.copyfile(model / file, out / file)
    return config, tensors


def nested_name(name: str) -> str:
    return name if name.startswith("lm_head.") else "model.language_model." + name.removeprefix("model.")


def convert(model: Path, out: Path, heads: int | None = None) -> None:
    """Write a text model in the published form to the new directory ``out``."""
    config, tensors = begin(model, out, heads)
    write_json(out / "config.json", config)
    complete(out)
    save_file({nested_name(name): tensor for name, tensor in tensors.items()}, out / SINGLE, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a text model of qwen3_5_moe: in one file, or nested")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, help="directory to make")
    where.add_argument("--in-place", action="store_true", help="only add what a checkpoint of nested names lacks")
    parser.add_argument("--key-heads", type=int, help="give it so many, by repeating its own: vLLM divides them among GPUs")
    args = parser.parse_args()
    if args.in_place:
        if not any(name.startswith("model.language_model.") for name in Checkpoint(args.model).tensors):
            raise UserError(f"{args.model}: its names are not nested under model.language_model; give --out")
        complete(args.model)
    else:
        convert(args.model, args.out, args.key_heads)
    print(f"wrote {args.out or args.model}", flush=True)


if __name__ == "__main__":
    run_cli(main)
