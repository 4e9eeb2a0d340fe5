"""A text model of Qwen3.5 in the form that Qwen publishes and vLLM runs: names nested under model.language_model, and with them
the configuration of a vision tower and of its processor.

    python src/eval/qwen3_5_form.py --model models/razor-tiny --out work/razor-tiny-35

The tower itself has no weights here: with no picture allowed (backends.VllmBackend) vLLM does not build it. A model in one file
is converted; `complete` gives a synthetic checkpoint, whose names are nested already, what it lacks, in place.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from checkpoint import SINGLE
from console import UserError, read_json, run_cli, write_json
from results_store import REPO

SEEING = REPO / "models" / "razor-tiny-vl"  # its tower's sizes and its processor stand in
PROCESSOR = ("preprocessor_config.json", "video_preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def nested_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json of the published class around that of a text model (or around its own text_config)."""
    seeing = read_json(SEEING / "config.json")
    text = config.get("text_config", config)
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


def nested_name(name: str) -> str:
    return name if name.startswith("lm_head.") else "model.language_model." + name.removeprefix("model.")


def convert(model: Path, out: Path) -> None:
    """Write a text model in the published form to the new directory ``out``."""
    config = read_json(model / "config.json")
    if config.get("model_type") != "qwen3_5_moe_text" or not (model / SINGLE).is_file():
        raise UserError(f"{model}: not a qwen3_5_moe_text model in one file, {SINGLE}")
    if out.exists():
        raise UserError(f"{out}: exists; choose another --out")
    out.mkdir(parents=True)
    for file in TOKENIZER:
        shutil.copyfile(model / file, out / file)
    write_json(out / "config.json", config)
    complete(out)
    save_file({nested_name(name): tensor for name, tensor in load_file(model / SINGLE).items()}, out / SINGLE, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a text model of qwen3_5_moe in one file")
    parser.add_argument("--out", type=Path, required=True, help="directory to make")
    args = parser.parse_args()
    convert(args.model, args.out)
    print(f"wrote {args.out}", flush=True)


if __name__ == "__main__":
    run_cli(main)
