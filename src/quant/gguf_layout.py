"""What a checkpoint's parameters become in a GGUF, and back: names, shapes, types, order of heads, stored values.

Not a command. `pieces_of(checkpoint)` lists the tensors of the file layer by layer; `to_gguf(piece, parameter)` gives the
values of one, `into_parameter` puts (rounded) values back; `types_of(shapes, "IQ3_XXS", read_patterns(path))` gives the types.
Which parameter is stored how stands in families.py, by the rules of llama.cpp's converter (conversion/qwen.py);
tests/test_gguf.py compares every tensor with what it writes:

- norms are stored plus one, except the one inside linear attention; A_log as -exp(A_log); conv1d without its middle axis
- ggml repeats key heads as a whole (k0 k1 k0 k1), transformers one by one (k0 k0 k1 k1): all that belongs to value heads is
  reordered, which for out_proj are its inputs
- an expert's gate and up are two tensors [E, I, H]

Types are those of `llama-quantize --pure --tensor-type-file`: the first pattern that is found in the name, else the base type;
norms, routers, convolutions and vectors stay float32; a row that is no multiple of the type's block gets a smaller one.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, explained
from families import FAMILIES, LAYER_PREFIX, Role, family_of, layer_count, roles_of, text_config
from ggml_types import TYPES, fallback
from hf_model import check_complete, meta_model, model_config

Patterns = Sequence[tuple[str, str]]
BY_LOWER = {name.lower(): name for name in TYPES}
# The types that llama.cpp refuses without an importance matrix: tensor_requires_imatrix in llama-quant.cpp.
NEED_IMPORTANCE = ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s")
# What llama-quantize and general.file_type call a file with this base type, where not the type's name.
FILE_NAMES = {"q3_K": "Q3_K_M", "q4_K": "Q4_K_M", "q5_K": "Q5_K_M"}
ARCHITECTURES = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of the file. ``shape`` is torch's order, ``sources`` the checkpoint tensors that hold ``parameter``;
    ``half``: "gate" or "up" where it is a part of a fused parameter; ``rows``, ``columns``: where each of its rows or
    inputs lies in the parameter (None: in the same place); ``layer``: of the decoder, -1 before and its length after it."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    sources: tuple[str, ...]
    role: Role
    layer: int
    half: str | None = None
    rows: Tensor | None = dataclasses.field(default=None, compare=False)
    columns: Tensor | None = dataclasses.field(default=None, compare=False)
    function: str = "same"

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def head_order(config: Mapping[str, Any], size: int) -> Tensor | None:
    """For value heads of ``size`` numbers each: where each number of ggml's order lies in transformers'."""
    keys, values = config.get("linear_num_key_heads", 0), config.get("linear_num_value_heads", 0)
    if not keys or keys == values:
        return None
    return torch.arange(values * size).view(keys, values // keys, size).transpose(0, 1).reshape(-1)


def stored(parameter: str, family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields rows, columns and function of a parameter's piece."""
    how = next((how for end, how in FAMILIES[family].stored or () if parameter.endswith(end)), None)
    if how is None and ".linear_attn." in parameter:
        raise UserError(f"{parameter}: families.py does not say how llama.cpp stores it")
    return {key: value if key == "function" else order_of(value, config) for key, value in (how or {}).items()}


def order_of(what: str, config: Mapping[str, Any]) -> Tensor | None:
    """Where each number of ggml's order lies: one a value head, the values of them all, or these behind the keys."""
    order = head_order(config, 1 if what == "heads" else config["linear_value_head_dim"])
    if order is None or what != "keys and values":
        return order
    first = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]  # queries and keys stay where they are
    return torch.cat([torch.arange(first), order + first])


def name_map(model_type: str, layers: int) -> Any:
    """llama.cpp's names of the weights of a family, by transformers'."""
    return gguf.get_tensor_name_map(ARCHITECTURES[FAMILIES[family_of(model_type)].ggml], layers)


def ggml_names(parameter: str, model_type: str, layers: int) -> list[str]:
    """llama.cpp's names of the weights that a parameter of transformers' module tree becomes."""
    names, base = name_map(model_type, layers), parameter.removesuffix(".weight")
    parts = [base]
    if base.endswith("experts.gate_up_proj"):  # stored as two weights with the same inputs
        parts = [base.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
    return [f"{name}.weight" for part in parts if (name := names.get_name(part))]


def pieces_of(checkpoint: Checkpoint) -> list[Piece]:
    """Every tensor of the GGUF, in the order of the decoder. Vision and multi-token prediction are not among them."""
    with explained(str(checkpoint.path / "config.json")):
        family = family_of(str(checkpoint.config.get("model_type")))
    if FAMILIES[family].stored is None:
        known = ", ".join(name for name, own in FAMILIES.items() if own.stored is not None)
        raise UserError(f"{checkpoint.path}: a GGUF is written directly for {known}, not {family}")
    try:
        check_config(checkpoint.config)
    except UserError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None
    check_complete(checkpoint)
    config = text_config(checkpoint.config)
    layers = layer_count(config) or 0
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    sources: dict[str, list[str]] = {}
    for name, role in roles.items():
        if role not in (Role.VISION, Role.MTP):
            sources.setdefault(checkpoint.places[name].parameter, []).append(name)
    names = name_map(family, layers)
    pieces = []
    for parameter, found in sources.items():
        how = stored(parameter, family, config)
        pieces += _pieces(parameter, tuple(found), roles[found[0]], checkpoint, layers, names, how)
    return sorted(pieces, key=lambda piece: piece.layer)  # stable: the checkpoint's order within a layer


def _pieces(
    parameter: str, sources: tuple[str, ...], role: Role, checkpoint: Checkpoint, layers: int, names: Any, how: dict[str, Any]
) -> list[Piece]:
    match = LAYER_PREFIX.match(parameter)
    layer = int(match[1]) if match else -1 if role is Role.EMBEDDING else layers
    shape = checkpoint.parameter_shape(parameter)
    shape = tuple(size for i, size in enumerate(shape) if not (parameter.endswith("conv1d.weight") and i == 1))

    def piece(looked_up: str, shape: tuple[int, ...], half: str | None = None) -> Piece:
        name = names.get_name(looked_up, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{checkpoint.path}: llama.cpp has no name for {parameter}")
        return Piece(name, shape, parameter, sources, role, layer, half, **how)

    if parameter.endswith(".experts.gate_up_proj"):
        size = (shape[0], shape[1] // 2, shape[2])
        base = parameter.removesuffix("gate_up_proj")
        return [piece(f"{base}{half}_proj.weight", size, half) for half in ("gate", "up")]
    if parameter.endswith(".experts.down_proj"):
        return [piece(f"{parameter}.weight", shape)]
    return [piece(parameter.replace(".dt_bias", ".dt_proj.bias"), shape)]


def read_for(checkpoint: Checkpoint, piece: Piece) -> list[str]:
    """The tensors that :func:`read_parameter` reads."""
    places = {source: checkpoint.places[source] for source in piece.sources}
    if places[piece.sources[0]].expert is None:
        return [piece.sources[0]]
    return [source for source, place in places.items() if place.part is None or place.part == piece.half]


def read_parameter(checkpoint: Checkpoint, piece: Piece) -> Tensor:
    """The piece's parameter from the checkpoint, or for a half of a fused one a tensor with that half filled."""
    first = checkpoint.info(piece.sources[0])
    if checkpoint.places[piece.sources[0]].expert is None:
        return checkpoint.read(piece.sources[0])
    full = torch.empty(checkpoint.parameter_shape(piece.parameter), dtype=first.dtype)
    for source in read_for(checkpoint, piece):
        checkpoint.places[source].view(full).copy_(checkpoint.read(source))
    return full


def part(piece: Piece, parameter: Tensor) -> Tensor:
    """The view of the parameter that this piece is made of."""
    if piece.half is not None:
        gate, up = parameter.chunk(2, -2)
        return gate if piece.half == "gate" else up
    return parameter.view(piece.shape)


def to_gguf(piece: Piece, parameter: Tensor) -> Tensor:
    """The piece's values from its parameter, in ggml's order: float32 where a function is applied, else of its dtype."""
    value = part(piece, parameter)
    if piece.rows is not None:
        value = value[piece.rows.to(value.device)]
    if piece.columns is not None:
        value = value[:, piece.columns.to(value.device)]
    if piece.function == "plus_one":
        return value.float() + 1
    if piece.function == "negative_exp":
        return -torch.exp(value.float())
    return value


def into_parameter(piece: Piece, value: Tensor, parameter: Tensor) -> None:
    """Put values in ggml's order into the parameter, in place; only for a piece whose function is "same"."""
    target = part(piece, parameter)
    if piece.rows is not None:
        target[piece.rows.to(target.device)] = value.to(target)
    elif piece.columns is not None:
        target[:, piece.columns.to(target.device)] = value.to(target)
    else:
        target.copy_(value)


def ordered_hessian(piece: Piece, hessian: Tensor) -> Tensor:
    """Second moments [E, I, I] of the parameter's inputs, in ggml's order."""
    if piece.columns is None:
        return hessian
    order = piece.columns.to(hessian.device)
    return hessian[:, order][:, :, order]


# Fields of config.json that change nothing of what the model computes from token ids, or that other steps check.
FREE = frozenset(
    """architectures model_type dtype torch_dtype transformers_version tie_word_embeddings vocab_size layer_types
    full_attention_interval linear_value_head_dim rope_parameters rope_scaling rope_theta partial_rotary_factor use_cache
    initializer_range attention_dropout output_router_logits router_aux_loss_coef output_attentions output_hidden_states
    return_dict mtp_num_hidden_layers mtp_use_dedicated_embeddings num_nextn_predict_layers mamba_ssm_dtype max_window_layers
    id2label label2id problem_type chunk_size_feed_forward name_or_path bos_token_id eos_token_id pad_token_id text_config
    vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id language_model_only""".split()
)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` unless every field of config.json is one that the header carries, that llama.cpp's graph has
    built in, or that changes nothing: an unknown one may be part of the function, and would vanish."""
    family = FAMILIES[family_of(str(config.get("model_type")))]
    carried = {name for own in FAMILIES.values() for name in own.carried.values()}  # a dense config may keep a mixture's
    for name, value in {**config, **text_config(config)}.items():
        if name in family.fixed:
            if value is not None and value != family.fixed[name]:
                raise UserError(
                    f"config.json: {name} is {value!r}, and llama.cpp's {family.ggml} computes with {family.fixed[name]!r} only"
                )
        elif value is not None and name not in FREE | carried and not name.startswith("_"):
            raise UserError(
                f"config.json: {name} = {str(value)[:60]!r} is no field that a GGUF of {family.ggml} is known to carry; "
                "remove it if the model computes the same without it"
            )


def rope_of(module: Any) -> tuple[Tensor, float]:
    """(inverse frequencies [D/2], factor of sines and cosines) that transformers' class computes for its config."""
    text = module.get_decoder()  # a vision tower has a rotation of its own
    rotary = next((m for m in text.modules() if hasattr(m, "attention_scaling") and hasattr(m, "rope_type")), None)
    if rotary is None:
        raise UserError(f"{type(module).__name__}: transformers has no rotary embedding that is known here")
    made = type(rotary)(rotary.config)
    return made.inv_freq.double(), float(made.attention_scaling)


def ggml_rope(value: Callable[..., Any], size: int) -> tuple[Tensor, float]:
    """What llama.cpp computes (ggml_rope_cache_init and llama_context) from a header, whose keys ``value(key, default)`` gives,
    for ``size`` rotated inputs of a head."""
    base, factor, kind = value("rope.freq_base", 10000.0), value("rope.scaling.factor", 1.0), value("rope.scaling.type", "none")
    plain = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    if kind != "yarn":
        return plain / (factor if kind == "linear" else 1.0), value("rope.scaling.attn_factor", 1.0)
    turns = [value(f"rope.scaling.yarn_beta_{end}", default) for end, default in (("fast", 32.0), ("slow", 1.0))]
    length = value("rope.scaling.original_context_length")
    low, high = (size * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(base)) for beta in turns)
    low, high = max(0, math.floor(low)), min(size - 1, math.ceil(high))
    ramp = ((torch.arange(size // 2, dtype=torch.float64) - low) / max(0.001, high - low)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp), (1 + 0.1 * math.log(factor)) * value("rope.scaling.attn_factor", 1.0)


def check_header(fields: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise :class:`UserError` unless the key-values of a GGUF make llama.cpp compute what transformers computes with the
    config.json of ``checkpoint``, its defaults filled in: sizes, norms, kinds of layers, rotations."""
    family, model = FAMILIES[family_of(str(checkpoint.config.get("model_type")))], meta_model(model_config(checkpoint.path))
    config = model.config.get_text_config()

    def value(key: str, default: Any = None) -> Any:
        return fields.get(f"{family.ggml}.{key}", default)

    wanted = {key: getattr(config, name) for key, name in family.carried.items()}
    wanted["ssm.inner_size"] = config.linear_value_head_dim * config.linear_num_value_heads
    found = {key: value(key) for key in wanted}
    recurrent = [kind == "linear_attention" for kind in config.layer_types]
    interval = value("full_attention_interval", 4)
    wanted["layer_types"] = recurrent
    found["layer_types"] = value("attention.recurrent_layers", [bool((i + 1) % interval) for i in range(len(recurrent))])
    sections = (config.rope_parameters or {}).get("mrope_section", [11, 11, 10])
    wanted["rope.dimension_sections"] = [*sections, 0, 0, 0, 0][:4]
    found["rope.dimension_sections"] = value("rope.dimension_sections")
    frequencies, scale = rope_of(model)
    wanted["rope.dimension_count"] = 2 * len(frequencies)
    found["rope.dimension_count"] = value("rope.dimension_count")
    for key, expected in wanted.items():
        own = found[key]
        if not (
            math.isclose(own, expected, rel_tol=1e-6) if isinstance(expected, float) and own is not None else own == expected
        ):
            raise UserError(f"the header of the GGUF says {key} {own}, but transformers computes with {expected}")
    theirs, factor = ggml_rope(value, 2 * len(frequencies))
    if not torch.allclose(theirs, frequencies, rtol=1e-4, atol=0) or not math.isclose(factor, scale, rel_tol=1e-4):
        raise UserError(
            f"config.json: llama.cpp's {family.ggml} cannot rotate as rope_parameters {dict(config.rope_parameters)} ask for: "
            f"frequencies differ by a factor of up to {(theirs / frequencies).log().abs().max().exp().item():.4g}, "
            f"sizes by {factor / scale:.4g}"
        )


def extra_keys(checkpoint: Checkpoint) -> dict[str, float]:
    """Keys that llama.cpp's converter does not write and its graph reads: the factor by which yarn's sines and cosines differ
    from those of the paper."""
    model = meta_model(model_config(checkpoint.path))
    rope = model.config.get_text_config().rope_parameters or {}
    if rope.get("rope_type") != "yarn" or not rope.get("factor", 0) > 0:
        return {}
    factor = rope_of(model)[1] / (1 + 0.1 * math.log(rope["factor"]))
    return {} if math.isclose(factor, 1, rel_tol=1e-6) else {"rope.scaling.attn_factor": factor}


def type_named(text: str, where: str) -> str:
    """The name of a type as llama.cpp spells it, from any case; :class:`UserError` on another word."""
    if text.lower() not in BY_LOWER:
        raise UserError(f"{where}: type {text!r} is unknown; known: {', '.join(TYPES)}")
    return BY_LOWER[text.lower()]


def file_name(base: str) -> str:
    return FILE_NAMES.get(base, base.upper())


def file_type(base: str) -> int:
    return int(gguf.LlamaFileType["ALL_F32" if base == "f32" else f"MOSTLY_{file_name(base)}"])


def read_patterns(path: str | Path) -> list[tuple[str, str]]:
    """(pattern, type) of every PATTERN=TYPE line of a file; `#` starts a comment at the line's start or after a space."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    patterns = []
    for number, line in enumerate(lines, 1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        if not text:
            continue
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern or " " in text:
            raise UserError(f"{path}:{number}: expected PATTERN=TYPE, found {text!r}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{path}:{number}: {pattern!r} is not a regular expression ({error})") from None
        patterns.append((pattern.lower(), type_named(kind, f"{path}:{number}")))
    return patterns


def keeps_float32(name: str, shape: Sequence[int]) -> bool:
    """Whether llama-quantize leaves this tensor as the converter wrote it, which is float32 (tensor_allows_quantization)."""
    rows = [size for size in shape[:-1] if size != 1]
    fixed = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d")
    return not rows or not name.endswith("weight") or any(part in name for part in fixed)


def chosen_type(name: str, base: str, patterns: Patterns) -> str:
    return next((kind for pattern, kind in patterns if re.search(pattern, name)), base)


def types_of(shapes: Mapping[str, Sequence[int]], base: str, patterns: Patterns) -> tuple[dict[str, str], list[str]]:
    """(type of every tensor, what had to be substituted, as lines to print)."""
    types, notes = {}, []
    for name, shape in shapes.items():
        wanted = "f32" if keeps_float32(name, shape) else chosen_type(name, base, patterns)
        types[name] = fallback(wanted, shape[-1])
        if types[name] != wanted:
            notes.append(f"{name}: rows of {shape[-1]} do not fit {wanted}, written as {types[name]}")
    return types, notes


def exact_patterns(types: Mapping[str, str]) -> str:
    """The text of a --tensor-type-file that gives llama-quantize exactly these types."""
    return "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in types.items() if kind != "f32")
