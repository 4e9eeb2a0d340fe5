"""A model, its tokenizer and its prompts by transformers: loaded whole or spread over devices, rendered by its own template.

Not a command. `load_model(directory)`, `load_tokenizer(directory)`, `render_chat(tokenizer, turns)`.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from checkpoint import Checkpoint
from console import Bar, UserError, explained, file_sha256, read_object
from devices import default_device
from families import (
    FAMILIES,
    LAYER_PREFIX,
    MTP_PREFIX,
    VISION_PREFIX,
    Role,
    check_routing,
    place_of,
    roles_of,
    text_config,
    text_name,
)
from hub import AHEAD_BYTES
from source_formats import without_quantization

NOT_TEXT = re.compile(f"{VISION_PREFIX.pattern}|{MTP_PREFIX.pattern}")
# The files of a model directory that are JSON objects, with what they must hold.
JSON_FILES = {"config.json": ("model_type",), "generation_config.json": (), "tokenizer_config.json": ()}
JSON_FILES |= {"special_tokens_map.json": (), "tokenizer.json": ("model", "added_tokens")}

TODAY = datetime.date(2026, 1, 1)  # of every prompt: a template that asks for the date would ask another question each day
# Variables of chat templates that every backend sets alike. Where a template leaves the choice (Gemma 4: off unless asked for;
# DeepSeek V3.1 and Granite name it "thinking"), thinking is on, as in the vendors' published numbers.
CHAT = {"enable_thinking": True, "thinking": True, "strftime_now": TODAY.strftime}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text of any length, with nothing put before or behind it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def prefix_ids(tokenizer: Any) -> list[int]:
    """Token ids that the tokenizer itself puts before a text: the beginning that the model saw in training (Gemma's <bos>,
    GLM's [gMASK]<sop>). Empty where it puts nothing there (Qwen)."""
    whole, text = tokenizer("a")["input_ids"], text_ids(tokenizer, "a")
    places = [i for i in range(len(whole) - len(text) + 1) if whole[i : i + len(text)] == text]
    return list(whole[: places[-1]]) if places and text else []


LAYER = re.compile(r"\.layers\.\d+\.")
SMALL_TENSOR, SMALL_CHECKPOINT = 1 << 20, 1 << 30  # bytes


def prompt_ids(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts. Nothing is put before them: a template writes its own beginning-of-text token."""
    return tokenizer(list(prompts), add_special_tokens=False)["input_ids"] if prompts else []


def ids_sha256(ids: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()


def end_token_ids(model: str | Path, tokenizer: Any) -> list[int]:
    """Tokens that end a turn: the tokenizer's, and those of generation_config.json (Gemma's end of turn stands only there)."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    path = Path(model) / "generation_config.json"
    found += _listed(read_object(path).get("eos_token_id")) if path.is_file() else []
    if wrong := [end for end in found if type(end) is not int or end < 0]:
        raise UserError(f"{path}: eos_token_id {wrong[0]!r} is not the id of a token")
    if not found:
        raise UserError(f"{model}: neither the tokenizer nor generation_config.json names an end-of-turn token")
    return sorted(set(found))


def generation_ends(model: str | Path) -> list[int]:
    """Tokens at which transformers ends a generation: those of generation_config.json, or without one of config.json."""
    for name in ("generation_config.json", "config.json"):
        if (path := Path(model) / name).is_file():
            value = read_object(path)
            return _listed(value.get("eos_token_id", text_config(value).get("eos_token_id")))
    return []


def _listed(ends: Any) -> list[Any]:
    """eos_token_id, which may be one, several or none."""
    return list(ends) if isinstance(ends, list) else [] if ends is None else [ends]


def tokenizer_files_sha256(directory: str | Path) -> str:
    """A digest of what makes prompts and ends of ``directory``: its tokenizer, template and generation_config.json."""
    files = [path for name in TOKENIZER_FILES if (path := Path(directory) / name).is_file()]
    return hashlib.sha256("".join(f"{path.name} {file_sha256(path)}\n" for path in files).encode()).hexdigest()


def load_tokenizer(model: str | Path, chat: bool = True) -> Any:
    """The tokenizer of a checkpoint; ``chat``: it must have a chat template."""
    from transformers import AutoTokenizer

    for name, keys in JSON_FILES.items():  # what transformers says of a broken one names no file
        if (file := Path(model) / name).is_file():
            read_object(file, *keys)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{model}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:200]})") from None
    if not text_ids(tokenizer, "a text"):  # transformers makes an empty one where the files are missing
        raise UserError(f"{model}: its tokenizer knows no words; copy tokenizer.json there from the original model")
    if chat and not tokenizer.chat_template:
        raise UserError(f"{model}: the tokenizer has no chat template")
    return tokenizer


def has_class(model_type: str) -> bool:
    """Whether transformers has a class for this model_type, or for the one that it is an alias of."""
    from transformers import CONFIG_MAPPING

    own = FAMILIES.get(model_type)
    return model_type in CONFIG_MAPPING or bool(own and own.alias)


def model_config(path: str | Path) -> Any:
    """transformers' configuration of a checkpoint: of the class that it knows by another model_type where it has none of its
    own (kimi_k2), and without a quantization_config, since :class:`Checkpoint` decodes."""
    from transformers import AutoConfig

    given = read_object(Path(path) / "config.json")
    own = FAMILIES.get(str(given.get("model_type")))
    if own and own.alias:
        return AutoConfig.for_model(**without_quantization(given) | {"model_type": own.alias})
    if not has_class(str(given.get("model_type"))):
        raise UserError(
            f"{path}: this transformers has no class of model_type {given.get('model_type')!r}, so its layers cannot be run; "
            "methods without text (clip, absmax, hqq) need none"
        )
    config = AutoConfig.from_pretrained(str(path), local_files_only=True)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return config


def meta_model(config: Any) -> torch.nn.Module:
    """The model of a transformers config without its weights; the one with a vision tower where the config has one."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with init_empty_weights():
        return auto.from_config(config, dtype=torch.bfloat16)


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _without_nesting(name: str) -> str:
    """A parameter's name, however the parts of a multimodal model are nested."""
    return text_name(name).removeprefix("model." if VISION_PREFIX.match(name) else "")


def check_complete(checkpoint: Checkpoint, text_only: bool = False) -> None:
    """Raise :class:`UserError` unless the checkpoint has exactly the tensors, in their shapes, that transformers' class for its
    config.json holds: parameters and persistent buffers, fused or one matrix per expert. What is tied to another may be
    absent, what the class leaves unread (multi-token prediction) may be there. Headers alone are read. ``text_only``: a vision
    tower does not matter."""
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    with explained(str(checkpoint.path)):
        check_routing(checkpoint.config)
    if not has_class(checkpoint.model_type):
        return
    try:
        model = meta_model(model_config(checkpoint.path))
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, AssertionError) as error:
        reason = " ".join(str(error).split())[:300]
        reason = f"it lacks or does not know {reason}" if isinstance(error, KeyError) else reason
        raise UserError(f"{checkpoint.path / 'config.json'}: transformers makes no model of it ({reason})") from None
    # A tower that neither the config nor the tensors speak of is a default of the class alone.
    seeing = not text_only and ("vision_config" in checkpoint.config or Role.VISION in roles.values())
    shapes = {
        _without_nesting(name): tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if seeing or not VISION_PREFIX.match(name)
    }
    tied = {_without_nesting(name) for name in model.all_tied_weights_keys}
    unread = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    found: dict[str, dict[tuple[int | None, str | None], str]] = {}
    extra, odd = [], []
    for name, role in roles.items():
        place = place_of(name, checkpoint.model_type)
        parameter = _without_nesting(place.parameter)
        if role is Role.MTP or role is Role.VISION and text_only or any(pattern.search(name) for pattern in unread):
            continue
        shape = shapes.get(parameter)
        if shape is None or place.expert is not None and place.expert >= shape[0]:
            extra.append(name)
            continue
        found.setdefault(parameter, {})[place.expert, place.part] = name
        wanted = shape if place.expert is None else (shape[1] // (2 if place.part else 1), shape[2])
        if checkpoint.tensors[name].shape != wanted:
            odd.append(f"{name} {list(checkpoint.tensors[name].shape)} instead of {list(wanted)}")
    alike = {LAYER.sub(".layers.N.", parameter): list(names.values()) for parameter, names in found.items()}
    missing = []
    for parameter, shape in shapes.items():
        if parameter in found:
            missing += _absent(parameter, shape, found[parameter])
        elif parameter not in tied:  # by the names of another layer, where there is one
            number = LAYER.search(parameter)
            others = alike.get(LAYER.sub(".layers.N.", parameter), [])
            missing += [LAYER.sub(number[0], name) for name in others] if number and others else [parameter]
    where = f"{checkpoint.path}: not the checkpoint of its config.json: "
    if missing:
        strangers = f"; it has {listed(extra, 1)}, which the model has not" if extra else ""
        raise UserError(f"{where}{len(missing)} tensors are missing: {listed(missing)}{strangers}; download it again")
    if odd:
        raise UserError(f"{where}{len(odd)} tensors have another shape: {listed(odd)}")
    if extra:
        raise UserError(f"{where}{len(extra)} tensors are none of the model's and would be lost: {listed(extra)}")
    check_vocabulary(checkpoint.path)


def check_vocabulary(model: str | Path) -> None:
    """Raise :class:`UserError` where the tokenizer has a token beyond the rows of the embedding."""
    rows = text_config(read_object(Path(model) / "config.json")).get("vocab_size")
    texts: dict[int, str] = {}
    if (path := Path(model) / "tokenizer.json").is_file():
        value = read_object(path)
        vocabulary = (value.get("model") or {}).get("vocab") or {}
        texts = {len(vocabulary) - 1: "its last"} if isinstance(vocabulary, list) else {i: t for t, i in vocabulary.items()}
        texts |= {token["id"]: token["content"] for token in value.get("added_tokens") or ()}
    if (path := Path(model) / "tokenizer_config.json").is_file():
        texts |= {int(i): token.get("content") for i, token in (read_object(path).get("added_tokens_decoder") or {}).items()}
    if rows and texts and (largest := max(texts)) >= rows:
        raise UserError(
            f"{model}: the tokenizer's token {texts[largest]!r} has id {largest}, but config.json says vocab_size {rows}; "
            "enlarge the embedding, or remove the token"
        )


def _absent(parameter: str, shape: Sequence[int], found: Mapping[tuple[int | None, str | None], str]) -> list[str]:
    """What a parameter lacks, by the names that its other tensors have in the checkpoint."""
    if (None, None) in found:
        return []
    parts = ("gate", "up") if parameter.endswith("gate_up_proj") else (None,)
    named = {part: name for (_, part), name in found.items()}
    absent = []
    for expert in range(shape[0]):
        for part in parts:
            if (expert, part) not in found:
                module, _, leaf = parameter.rpartition(".")
                stem = f"{module}.{expert}.{f'{part}_proj' if part else leaf}.weight"
                absent.append(re.sub(r"(.*\.experts)\.\d+\.", rf"\1.{expert}.", named[part]) if part in named else stem)
    return absent


def load_weights(
    auto: Any, path: str | Path, dtype: torch.dtype, places: Mapping[str, str | int] | str | None = None
) -> torch.nn.Module:
    """The model of a checkpoint by one of transformers' Auto classes, its modules at ``places``. What is packed
    (docs/PACKED.md) or published in another format than BF16 is decoded here, in memory.

    Raises :class:`UserError` where the checkpoint lacks a tensor, which transformers would fill with random numbers, or holds
    NaN or infinity; a tensor that the class does not read is named on stderr."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_tqdm_hook(lambda _, given, more: Bar(*given, **more, delay=2))  # its bars like ours
    checkpoint = Checkpoint(path)
    family = checkpoint.known_family
    if family:
        check_complete(checkpoint, text_only=auto is AutoModelForCausalLM)
    how = {"dtype": dtype, "device_map": places, "output_loading_info": True}
    if not (checkpoint.is_packed or checkpoint.source_format or checkpoint.remote or family and family.alias):
        try:
            model, info = auto.from_pretrained(str(path), local_files_only=True, **how)
        except RuntimeError as error:  # of shapes
            raise UserError(f"{path}: transformers cannot load it ({' '.join(str(error).split())[:300]})") from None
    else:
        with init_empty_weights():
            empty = auto.from_config(model_config(path))
        unread = MTP_PREFIX if hasattr(empty.config, "vision_config") else NOT_TEXT  # a text model has its part of the config
        names = [name for name in checkpoint.tensors if not unread.match(name)]
        checkpoint.expect([names], AHEAD_BYTES)
        values = {name: checkpoint.read(name) for name in names}
        # No path: transformers 5 refuses one beside a state_dict.
        model, info = type(empty).from_pretrained(None, config=empty.config, state_dict=values, **how)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{path}: {len(missing)} tensors of the model are missing: {listed(missing)}; download it again")
    if strange := sorted(name for name in info["unexpected_keys"] if not MTP_PREFIX.match(name)):
        print(f"{path}: {type(model).__name__} does not read {len(strange)} of its tensors: {listed(strange)}", file=sys.stderr)
    for name, tensor in model.state_dict().items():
        check_finite(tensor, name, path)
    return model


def check_finite(tensor: torch.Tensor, name: str, path: str | Path) -> None:
    """Raise :class:`UserError` that names the tensor where it holds NaN or infinity."""
    if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
        least, largest = torch.aminmax(tensor)  # both are NaN where one value is
        if not (math.isfinite(least) and math.isfinite(largest)):
            raise UserError(f"{path}: tensor {name}: the weight contains NaN or infinity; download it again")


def check_first(checkpoint: Checkpoint) -> None:
    """:func:`check_finite` of what can be read at once: all of a small checkpoint, else what stands outside of the decoder
    layers and their small tensors (routers, norms). The others, and all of a model of the hub, are checked when they are
    read."""
    for name, info in checkpoint.tensors.items() if not checkpoint.remote else ():
        inside = LAYER_PREFIX.match(text_name(name))
        if not inside or info.bytes <= SMALL_TENSOR or checkpoint.bytes <= SMALL_CHECKPOINT:
            for _, chunk in checkpoint.read_chunks(name, 8 << 20):
                check_finite(chunk, name, checkpoint.path)


def load_model(
    path: str | Path, devices: Sequence[torch.device] = (), dtype: torch.dtype | None = None
) -> torch.nn.Module:  # fmt: skip
    """A causal language model for inference (default: bfloat16 on a GPU, float32 on a CPU); its layers in equal runs on
    ``devices`` where there are several (default: the first GPU, or the CPU)."""
    from transformers import AutoModelForCausalLM

    devices = tuple(devices) or (default_device(),)
    dtype = dtype or (torch.bfloat16 if devices[0].type == "cuda" else torch.float32)
    places = {name: place(own) for name, own in spread_map(path, devices).items()} if len(devices) > 1 else None
    model = load_weights(AutoModelForCausalLM, path, dtype, places)
    return (model if places else model.to(devices[0])).eval()


def context_of(path: str | Path) -> int:
    """How many positions the text model of a checkpoint reads (max_position_embeddings; without one no limit is known)."""
    return int(text_config(Checkpoint(path).config).get("max_position_embeddings") or 1 << 30)


def place(device: torch.device) -> str | int:
    """As accelerate wants it: a GPU by its number, else it takes the first of a set of names for the main one."""
    return device.index if device.type == "cuda" else str(device)


def spread_map(path: str | Path, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Which device holds which module: decoder layers in runs of equal length, the embedding before the first, norm and head
    after the last (a head that is the embedding with it)."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = model_config(path)
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


def scaled_logits(logits: torch.Tensor, config: Any) -> torch.Tensor:
    """What a model makes of its head's output: scaled (granite divides, cohere multiplies) and capped (gemma)."""
    logits = logits / getattr(config, "logits_scaling", 1) * getattr(config, "logit_scale", 1)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def templated(renderer: Any, messages: Sequence[Mapping[str, Any]], **how: Any) -> str:
    """Chat turns as text, by the template of ``renderer``: a tokenizer, a processor, or
    whatever has ``chat_template``, ``name_or_path`` and ``apply_chat_template``. All backends render here, with :data:`CHAT`.

    Raises :class:`UserError` when the template refuses the turns, or loses the text of one: such a template takes content
    as a list of parts, which is tried before.
    """
    name = getattr(renderer, "name_or_path", type(renderer).__name__)  # a processor has none
    if not renderer.chat_template:
        raise UserError(f"{name}: the tokenizer has no chat template, which chat turns need")
    template = str(renderer.chat_template)  # several by name (a dictionary) too
    known = {name: value for name, value in CHAT.items() if re.search(rf"\b{name}\b", template)}
    parts = [part for turn in messages if turn.get("role") != "assistant" for part in _parts(turn.get("content"))]
    texts = [part["text"] for part in parts if "text" in part]
    problem = ""
    for turns in (messages, [{**turn, "content": _parts(turn.get("content"))} for turn in messages]):
        try:
            text = renderer.apply_chat_template(turns, tokenize=False, **known, **how)
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            problem = problem or " ".join(str(error).split())[:300] or type(error).__name__
            continue
        lost = [each for each in texts if each.strip() not in text]
        if not lost and not any(repr(part) in text for part in parts):  # a list printed as Python writes it
            return text
        problem = problem or (f"it leaves out {lost[0][:60]!r}" if lost else "it prints content as Python writes a list")
    raise UserError(f"{name}: its chat template cannot render these turns: {problem}")


def render_chat(renderer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt text of chat turns with the generation prompt: :func:`templated`."""
    return templated(renderer, messages, add_generation_prompt=True)


def _parts(content: str | Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """What a turn says, as a list of parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())


class _Seen(Exception):
    """The first output that is not finite; its text says where."""


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The floating-point tensors of what a module takes or returns."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def all_finite(value: Any) -> bool:
    """Whether no tensor within ``value`` holds a NaN or an infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


@torch.no_grad()
def first_nonfinite(model: torch.nn.Module, *args: Any, prefix: str = "", **inputs: Any) -> str:
    """Where NaN or infinity begins in ``model(*args, **inputs)``, in words: the module, and its parameter that holds one, or
    that finite weights overflowed. One more run, for an error's text: call it only after such an output was seen. ``prefix``
    stands before the modules' names (of one layer: "model.layers.3.")."""

    def looked(name: str, module: torch.nn.Module, given: Any, out: Any) -> None:
        if all_finite(out):
            return
        where = f"NaN or infinity begins at {(prefix + name).rstrip('.') or 'the model'} ({type(module).__name__})"
        outer = name.split(".")[:-1]  # a block's own parameters (A_log) may act between its modules
        used = [f"{name}.{key}" if name else key for key, _ in module.named_parameters()]
        for end in range(len(outer), 0, -1):
            block = ".".join(outer[:end])
            used += [f"{block}.{key}" for key, _ in model.get_submodule(block).named_parameters(recurse=False)]
        for key in used:
            held = model.get_parameter(key)
            if not all_finite(held):
                kind, count = "NaN" if held.isnan().any() else "infinity", held.numel() - int(torch.isfinite(held).sum())
                raise _Seen(f"{where}: {prefix}{key} holds {kind}, {count:,} of {held.numel():,}")
        if not all_finite(given):
            raise _Seen(f"{where}: what reaches it is not finite, though every weight up to there is: an overflow")
        largest = max((float(tensor.abs().max()) for tensor in _tensors(given) if tensor.numel()), default=0.0)
        dtype = next(_tensors(out)).dtype
        raise _Seen(f"{where}: its weights are finite and overflow in {dtype} (inputs up to {largest:.3g})")

    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, out, name=name: looked(name, module, (args, kwargs), out), with_kwargs=True
        )
        for name, module in model.named_modules()
    ]
    try:
        model(*args, **inputs)
    except _Seen as seen:
        return str(seen)
    finally:
        for handle in handles:
            handle.remove()
    return "NaN or infinity was seen once and not again on the same input: check the device"


def finite_logits(model: torch.nn.Module, **inputs: Any) -> torch.Tensor:
    """The logits of ``model(**inputs)`` without a cache; one that is NaN or infinite is a :class:`UserError` that says where it
    began."""
    logits = model(**inputs, use_cache=False).logits
    if not all_finite(logits):
        raise UserError(f"{model.name_or_path}: {first_nonfinite(model, **inputs, use_cache=False)}")
    return logits
