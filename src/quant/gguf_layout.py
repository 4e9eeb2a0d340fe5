"""What a checkpoint's parameters become in a GGUF, and back: names, shapes, order of heads, the values that llama.cpp stores.

Not a command. `pieces_of(checkpoint)` lists the tensors of the file layer by layer; `to_gguf(piece, parameter)` gives the
values of one, `into_parameter` puts (rounded) values back. The rules are those of llama.cpp's converter for the Qwen3.5
families (conversion/qwen.py); tests/test_gguf.py compares every tensor with what it writes:

- norms are stored plus one, except the one inside linear attention; A_log as -exp(A_log); conv1d without its middle axis
- ggml repeats key heads as a whole (k0 k1 k0 k1), transformers one by one (k0 k0 k1 k1): all that belongs to value heads is
  reordered, which for out_proj are its inputs
- an expert's gate and up are two tensors [E, I, H]
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import gguf
import torch
from torch import Tensor

from calibration import place_of
from checkpoint import Checkpoint
from console import UserError
from families import LAYER_PREFIX, Role, family_of, roles_of, text_config
from imatrix import ARCHITECTURES

FAMILIES = ("qwen3_5_moe", "qwen3_5")


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


def after(first: int, order: Tensor | None) -> Tensor | None:
    """``order`` for what lies behind ``first`` rows that keep their places."""
    return None if order is None else torch.cat([torch.arange(first), order + first])


def changes(parameter: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields rows, columns and function of a parameter's piece."""
    if parameter.endswith("norm.weight"):
        return {} if parameter.endswith("linear_attn.norm.weight") else {"function": "plus_one"}
    if ".linear_attn." not in parameter:
        return {}
    heads, width = head_order(config, 1), head_order(config, config["linear_value_head_dim"])
    keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return {
        "A_log": {"rows": heads, "function": "negative_exp"},
        "dt_bias": {"rows": heads},
        "in_proj_a.weight": {"rows": heads},
        "in_proj_b.weight": {"rows": heads},
        "in_proj_z.weight": {"rows": width},
        "in_proj_qkv.weight": {"rows": after(keys, width)},
        "conv1d.weight": {"rows": after(keys, width)},
        "out_proj.weight": {"columns": width},
    }[parameter.rpartition(".linear_attn.")[2]]


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


def pieces_of(checkpoint: Checkpoint) -> list[Piece]:
    """Every tensor of the GGUF, in the order of the decoder. Vision and multi-token prediction are not among them."""
    family = family_of(str(checkpoint.config.get("model_type")))
    if family not in FAMILIES:
        raise UserError(f"{checkpoint.path}: a GGUF is written directly for {', '.join(FAMILIES)}, not {family}")
    config = text_config(checkpoint.config)
    layers = config["num_hidden_layers"]
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    sources: dict[str, list[str]] = {}
    for name, role in roles.items():
        if role not in (Role.VISION, Role.MTP):
            sources.setdefault(place_of(name).parameter, []).append(name)
    names = gguf.get_tensor_name_map(ARCHITECTURES[family], layers)
    pieces = []
    for parameter, found in sources.items():
        pieces += _pieces(parameter, tuple(found), roles[found[0]], checkpoint, config, names)
    missing = {f"model.layers.{i}.input_layernorm.weight" for i in range(layers)} - sources.keys()
    if missing:
        raise UserError(f"{checkpoint.path}: no tensor for {min(missing)}; the checkpoint is incomplete")
    return sorted(pieces, key=lambda piece: piece.layer)  # stable: the checkpoint's order within a layer


def _pieces(
    parameter: str, sources: tuple[str, ...], role: Role, checkpoint: Checkpoint, config: Mapping[str, Any], names: Any
) -> list[Piece]:
    match = LAYER_PREFIX.match(parameter)
    layer = int(match[1]) if match else -1 if role is Role.EMBEDDING else config["num_hidden_layers"]
    shape = parameter_shape(checkpoint, sources)
    shape = tuple(size for i, size in enumerate(shape) if not (parameter.endswith("conv1d.weight") and i == 1))
    more = changes(parameter, config)

    def piece(looked_up: str, shape: tuple[int, ...], half: str | None = None) -> Piece:
        name = names.get_name(looked_up, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{checkpoint.path}: llama.cpp has no name for {parameter}")
        return Piece(name, shape, parameter, sources, role, layer, half, **more)

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
