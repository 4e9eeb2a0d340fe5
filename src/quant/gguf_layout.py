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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError
from families import FAMILIES, LAYER_PREFIX, Role, family_of, place_of, roles_of, text_config
from ggml_types import TYPES, fallback

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


def parameter_shape(checkpoint: Checkpoint, sources: tuple[str, ...]) -> tuple[int, ...]:
    """The shape of a parameter that is one tensor on disk, or the stack of its experts' matrices."""
    shape, place = checkpoint.tensors[sources[0]].shape, place_of(sources[0])
    if place.expert is None:
        return shape
    experts = 1 + max(place_of(source).expert or 0 for source in sources)
    fused = place.part != "down"
    if len(sources) != experts * (1 + fused):
        raise UserError(
            f"{checkpoint.path}: {place.parameter}: {len(sources)} matrices for {experts} experts; some are missing"
        )
    return experts, shape[0] * (1 + fused), shape[1]


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
    family = family_of(str(checkpoint.config.get("model_type")))
    if FAMILIES[family].stored is None:
        known = ", ".join(name for name, own in FAMILIES.items() if own.stored is not None)
        raise UserError(f"{checkpoint.path}: a GGUF is written directly for {known}, not {family}")
    config = text_config(checkpoint.config)
    layers = config["num_hidden_layers"]
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    sources: dict[str, list[str]] = {}
    for name, role in roles.items():
        if role not in (Role.VISION, Role.MTP):
            sources.setdefault(place_of(name).parameter, []).append(name)
    names = name_map(family, layers)
    pieces = []
    for parameter, found in sources.items():
        how = stored(parameter, family, config)
        pieces += _pieces(parameter, tuple(found), roles[found[0]], checkpoint, layers, names, how)
    missing = {f"model.layers.{i}.input_layernorm.weight" for i in range(layers)} - sources.keys()
    if missing:
        raise UserError(f"{checkpoint.path}: no tensor for {min(missing)}; the checkpoint is incomplete")
    return sorted(pieces, key=lambda piece: piece.layer)  # stable: the checkpoint's order within a layer


def _pieces(
    parameter: str, sources: tuple[str, ...], role: Role, checkpoint: Checkpoint, layers: int, names: Any, how: dict[str, Any]
) -> list[Piece]:
    match = LAYER_PREFIX.match(parameter)
    layer = int(match[1]) if match else -1 if role is Role.EMBEDDING else layers
    shape = parameter_shape(checkpoint, sources)
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


def read_parameter(checkpoint: Checkpoint, piece: Piece) -> Tensor:
    """The piece's parameter from the checkpoint, or for a half of a fused one a tensor with that half filled."""
    first = checkpoint.info(piece.sources[0])
    if place_of(piece.sources[0]).expert is None:
        return checkpoint.read(piece.sources[0])
    full = torch.empty(parameter_shape(checkpoint, piece.sources), dtype=first.dtype)
    for source in piece.sources:
        place = place_of(source)
        if place.part == "down" or place.part == piece.half:
            place.view(full).copy_(checkpoint.read(source))
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
