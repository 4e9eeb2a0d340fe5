"""A model, its tokenizer and its prompts by transformers: loaded whole or spread over devices, rendered by its own template.

Not a command. `load_model(directory)`, `load_tokenizer(directory)`, `render_chat(tokenizer, turns)`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint import PACKED, Checkpoint
from console import UserError, read_json
from devices import default_device


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts. Nothing is put before them: a template writes its own beginning-of-text token."""
    return tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []


def ids_sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def end_token_ids(model: str | Path, tokenizer: Any) -> list[int]:
    """Tokens that end a turn: the tokenizer's, and those of generation_config.json (Gemma's end of turn stands only there)."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    path = Path(model) / "generation_config.json"
    more = read_json(path).get("eos_token_id") if path.is_file() else None
    found += more if isinstance(more, list) else [] if more is None else [more]
    if not found:
        raise UserError(f"{model}: neither the tokenizer nor generation_config.json names an end-of-turn token")
    return sorted(set(found))


def load_tokenizer(model: str | Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(f"{model}: the tokenizer has no chat template")
    return tokenizer


def load_weights(
    auto: Any, path: str | Path, dtype: torch.dtype, places: Mapping[str, str | int] | None = None
) -> torch.nn.Module:
    """The model of a checkpoint by one of transformers' Auto classes, its modules at ``places``. A packed checkpoint
    (docs/PACKED.md) is unpacked here, in memory: transformers would need the package compressed-tensors for it."""
    if not (Path(path) / PACKED).is_file():
        return auto.from_pretrained(str(path), dtype=dtype, device_map=places, local_files_only=True)
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    checkpoint, config = Checkpoint(path), AutoConfig.from_pretrained(str(path), local_files_only=True)
    del config.quantization_config
    with init_empty_weights():
        kind = type(auto.from_config(config))
    values = {name: checkpoint.read(name) for name in checkpoint.tensors}
    # No path: transformers 5 refuses one beside a state_dict.
    return kind.from_pretrained(None, config=config, state_dict=values, dtype=dtype, device_map=places)


def load_model(path: str | Path, devices: Sequence[torch.device] = ()) -> torch.nn.Module:
    """A causal language model for inference: bfloat16 on a GPU, float32 on a CPU; its layers in equal runs on ``devices``
    where there are several (default: the first GPU, or the CPU)."""
    from transformers import AutoModelForCausalLM

    devices = tuple(devices) or (default_device(),)
    dtype = torch.bfloat16 if devices[0].type == "cuda" else torch.float32
    places = {name: place(own) for name, own in spread_map(path, devices).items()} if len(devices) > 1 else None
    model = load_weights(AutoModelForCausalLM, path, dtype, places)
    return (model if places else model.to(devices[0])).eval()


def place(device: torch.device) -> str | int:
    """As accelerate wants it: a GPU by its number, else it takes the first of a set of names for the main one."""
    return device.index if device.type == "cuda" else str(device)


def spread_map(path: str | Path, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Which device holds which module: decoder layers in runs of equal length, the embedding before the first, norm and head
    after the last (a head that is the embedding with it)."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    first, last, count = devices[0], devices[-1], len(decoder.layers)
    places = {}
    for name, module in decoder.named_children():
        if module is decoder.layers:
            places |= {f"{prefix}.{name}.{i}": devices[i * len(devices) // count] for i in range(count)}
        else:
            places[f"{prefix}.{name}"] = last if name == "norm" else first
    tied = config.get_text_config().tie_word_embeddings
    return places | {name: first if tied else last for name, module in model.named_children() if module is not decoder}


def render_chat(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """The prompt text of chat turns with the generation prompt, by the model's own template. Where the template leaves the
    choice (Gemma 4: off unless asked for), thinking is on, as in the vendors' published numbers."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
