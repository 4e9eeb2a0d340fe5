"""What a checkpoint's parameters become in a GGUF, and back: names, shapes, types, order, stored values.

Not a command. `pieces_of(checkpoint)` lists the tensors of the file layer by layer; `to_gguf(piece, parameter)` gives the
values of one, `into_parameter` puts (rounded) values back; `types_of(shapes, "IQ3_XXS", read_patterns(path))` gives the types.

Which tensors there are, and which rows and columns of which weights they are, is a trace of llama.cpp's own converter
(gguf_convert.py), so a GGUF can be made of whatever architecture it converts; nothing of it is written down here.

Types are those of `llama-quantize --pure --tensor-type-file`: the first pattern that is found in the name, else the base type;
norms, routers, convolutions and vectors stay as the converter writes them, mostly float32; a row that is no multiple of the
type's block gets a smaller one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

import llama_cpp
from checkpoint import Checkpoint
from console import UserError, WriteError, file_sha256, read_json, write_json
from families import FAMILIES, LAYER_PREFIX, MTP_PREFIX, Role, family_of, layer_count, roles_of, text_config, text_name
from ggml_types import TYPES, fallback
from gguf_format import DRIVER, run_converter
from hf_model import check_complete, meta_model, model_config
from records import sha256_json

Patterns = Sequence[tuple[str, str]]
BY_LOWER = {name.lower(): name for name in TYPES}
# The types that llama.cpp refuses without an importance matrix: tensor_requires_imatrix in llama-quant.cpp.
NEED_IMPORTANCE = ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s")
# What llama-quantize and general.file_type call a file with this base type, where not the type's name.
FILE_NAMES = {"q3_K": "Q3_K_M", "q4_K": "Q4_K_M", "q5_K": "Q5_K_M"}
SMALL_FILE = 64 << 20  # beside the weights: what is larger is no file that a converter reads for its tensors


@dataclasses.dataclass(frozen=True)
class Piece:
    """One tensor of the file: which numbers of which parameter it is made of, whatever llama.cpp's converter does to them.

    ``shape`` is torch's order. ``parameter`` is one of transformers' module tree, ``sources`` the checkpoint tensors that hold
    it (of a mixture stored one matrix an expert, those that this piece needs). Where the family is unknown, or a piece is made
    of several parameters, ``parameter`` is no name of the tree and stands for the rows of the sources one after the other.
    ``layer``: of the decoder, -1 before and its length after it (a block of multi-token prediction counts as after).

    The values, in this order: of the parameter as rows of ``width`` numbers (its last axis; 1: single numbers) those that
    ``rows`` names, or of each of its matrices the rows ``span`` = (first, last + 1), or all; of each row the ``columns``, or
    all; where ``transposed``, each matrix turned; ``function`` of each: "same", "plus_one", "negative_exp", or "converter":
    whatever the converter computes, whose values only its own process gives (gguf_format.ConverterValues). ``kept``: the type
    that llama-quantize leaves it in, whatever is asked for; "" where it may have any."""

    name: str
    shape: tuple[int, ...]
    parameter: str
    sources: tuple[str, ...]
    role: Role
    layer: int
    span: tuple[int, int] | None = None
    rows: Tensor | None = dataclasses.field(default=None, compare=False)
    columns: Tensor | None = dataclasses.field(default=None, compare=False)
    width: int = 0
    transposed: bool = False
    function: str = "same"
    kept: str = ""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


# Tensors that llama-quantize leaves as they are: tensor_allows_quantization in llama-quant.cpp.
KEPT = re.compile(
    r"^(?!.*weight$)|_norm\.weight|ffn_gate_(inp|tid2eid)\.weight|altup|laurel|per_layer_model_proj|^(position_embd|token_types)\."
    r"|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight|attn_rel_b\.weight|\.(position_embd|rel_pos|patch_embd)"
    r"|\.patch_merger|time_mix_(first|[wva][012]|g[12]|decay_w[12]|lerp_fused)\.weight"
)
# The role of a tensor by llama.cpp's name for it; matrices of another name are roles of an MLP.
GGML_ROLES = (
    (r"(per_layer_)?token_embd\.weight", Role.EMBEDDING),
    (r"output\.weight", Role.LM_HEAD),
    (r".*\.nextn\..*", Role.MTP),
    (r".*norm.*", Role.NORM),
    (r".*\.(ffn_gate_inp.*|exp_probs_b.*)", Role.ROUTER),
    (r".*_exps\.weight", Role.ROUTED_EXPERT),
    (r".*_shexp\.weight", Role.SHARED_EXPERT),
    (r".*\.ssm_(in|out|alpha|beta|ba)\.weight", Role.LINEAR_ATTENTION),
    (r".*\.(ssm|time_mix|shortconv).*", Role.SSM_STATE),
    (r".*\.(attn|indexer)[_.].*\.weight|.*\.attn_.*\.weight", Role.ATTENTION),
)
MTP_CHOICES = ("file", "none")
MTP_PATTERN = r"^mtp\."
MTP_TYPE = "iq4_nl"  # of the block of multi-token prediction, where a file of types has to say one and says none


def known_roles(checkpoint: Checkpoint) -> dict[str, Role]:
    """The role of every tensor where families.py knows the family; else empty."""
    if checkpoint.known_family is None:
        return {}
    return roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)


def ggml_role(name: str, shape: Sequence[int]) -> Role:
    """The role that llama.cpp's name of a tensor says."""
    found = next((role for pattern, role in GGML_ROLES if re.fullmatch(pattern, name)), None)
    return found or (Role.MLP if len(shape) > 1 and name.endswith("weight") else Role.BIAS)


def is_mtp(name: str, layers: int) -> bool:
    """Whether a tensor of the checkpoint is one of multi-token prediction, by its name."""
    match = LAYER_PREFIX.match(text_name(name))
    return bool(MTP_PREFIX.match(name)) or match is not None and int(match[1]) >= layers > 0


def traced(checkpoint: Checkpoint, mtp: str = "file") -> dict[str, Any]:
    """What llama.cpp's converter would write for the checkpoint (gguf_convert.py says how it is told), with the block of
    multi-token prediction where there is one ("file") or without it ("none"). It depends on names, shapes and small files
    only; a trace is kept beside the builds of llama.cpp."""
    if mtp not in MTP_CHOICES:
        raise UserError(f"mtp {mtp!r} is unknown; known: {', '.join(MTP_CHOICES)}")
    layers = layer_count(checkpoint.config) or 0
    if not any(is_mtp(name, layers) for name in checkpoint.tensors):
        mtp = "none"
    small = [
        f for f in sorted(checkpoint.path.iterdir()) if f.suffix not in (".safetensors", ".gguf", ".bin", ".pt") and f.is_file()
    ]
    tensors = [[name, str(info.dtype), info.shape] for name, info in checkpoint.tensors.items()]
    key = sha256_json(
        {"files": {f.name: file_sha256(f) for f in small if f.stat().st_size < SMALL_FILE}, "tensors": tensors, "mtp": mtp}
        | {"source": llama_cpp.source_identity(), "driver": file_sha256(DRIVER)}
        | {"transformers": importlib.metadata.version("transformers")}  # by which the converter reads config.json
    )
    kept = llama_cpp.cache_directory() / "traces" / f"{key}.json"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as work:
            made = Path(work, "trace.json")
            run_converter("trace", checkpoint.path, mtp, made)
            found = read_json(made)
        with contextlib.suppress(WriteError, OSError):  # a cache; the next run makes it again
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, found)
        return found
    return read_json(kept)


def pieces_of(checkpoint: Checkpoint, mtp: str = "none") -> list[Piece]:
    """Every tensor of the GGUF, in the order of the decoder, an embedding that is the head behind it, without the vision tower;
    ``mtp``: of :func:`traced`."""
    roles = known_roles(checkpoint)
    if roles:
        try:
            check_config(checkpoint.config)
        except UserError as error:
            raise UserError(f"{checkpoint.path}: {error}") from None
        check_complete(checkpoint)
    made = traced(checkpoint, mtp)
    orders = [torch.from_numpy(np.concatenate([a + step * np.arange(n) for a, n, step in order])) for order in made["orders"]]
    layers = layer_count(checkpoint.config) or 1 + max(map(_block, (tensor["name"] for tensor in made["tensors"])))
    place = {name: number for number, name in enumerate(checkpoint.tensors)}
    found: list[tuple[tuple[int, int], Piece]] = []
    first = -1 if any(tensor["name"] == "output.weight" for tensor in made["tensors"]) else layers  # the head is the embedding
    for tensor in made["tensors"]:
        name, sources = tensor["name"], tuple(made["sources"][number] for number in tensor["sources"])
        shape, kind = tuple(tensor["shape"]), tensor["type"].lower()
        if kind not in BY_LOWER:
            raise UserError(f"{checkpoint.path}: llama.cpp's converter writes {name} as {kind}, a type that is not known here")
        role = roles[sources[0]] if sources and roles else ggml_role(name, shape)
        role = Role.MTP if _block(name) >= layers else role
        block = first if name == "token_embd.weight" else min(layers, _block(name)) if _block(name) >= 0 else layers
        kept = BY_LOWER[kind] if keeps_float32(name, shape) else ""
        rows, columns = (None if tensor[axis] is None else orders[tensor[axis]] for axis in ("rows", "columns"))
        parameter, span, rows = _rows_of(checkpoint, sources, rows, tensor["width"]) if sources else (name, None, rows)
        more = {"transposed": tensor["transposed"], "function": tensor["function"], "kept": kept}
        piece = Piece(name, shape, parameter, sources, role, block, span, rows, columns, tensor["width"], **more)
        of = checkpoint.sources[parameter] if roles and parameter in checkpoint.sources else sources
        found.append(((block, min((place[source] for source in of), default=len(place))), piece))
    return [piece for _, piece in sorted(found, key=lambda item: item[0])]  # stable: the converter's order within a parameter


def _block(name: str) -> int:
    """The layer in the name of a tensor of a GGUF, else -1."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _rows_of(
    checkpoint: Checkpoint, sources: Sequence[str], rows: Tensor | None, width: int
) -> tuple[str, tuple[int, int] | None, Tensor | None]:
    """(parameter, span, rows) of a piece from the ``rows`` that it takes of its sources, one after the other."""
    known = checkpoint.known_family is not None
    parameters = list(dict.fromkeys(checkpoint.places[source].parameter for source in sources)) if known else list(sources)
    if len(parameters) > 1:
        return " + ".join(parameters), None, rows
    shape = checkpoint.parameter_shape(parameters[0]) if known else checkpoint.info(sources[0]).shape
    if width == 1 and len(shape) != 1:
        if len(sources) > 1:
            return " + ".join(sources), None, rows
        return parameters[0], None, rows
    if known and checkpoint.places[sources[0]].expert is not None:
        own = []
        for source in sources:
            at, count = checkpoint.places[source], checkpoint.info(source).shape[0]
            own.append(at.expert * shape[1] + (count if at.part == "up" else 0) + torch.arange(count))
        rows = torch.cat(own) if rows is None else torch.cat(own)[rows]
    if rows is None or len(shape) < 2:
        return parameters[0], None, rows
    matrices, high = math.prod(shape[:-2]), shape[-2]
    count, first = len(rows) // matrices, int(rows[0])
    spanned = torch.arange(matrices)[:, None] * high + first + torch.arange(count)
    if len(rows) == matrices * count and first + count <= high and torch.equal(spanned.flatten(), rows):
        return parameters[0], None if count == high else (first, first + count), None
    return parameters[0], None, rows


def read_for(checkpoint: Checkpoint, piece: Piece) -> list[str]:
    """The tensors that are read for a piece."""
    known = checkpoint.known_family is not None and piece.parameter in checkpoint.sources
    alone = known and piece.sources and checkpoint.places[piece.sources[0]].expert is None
    return list(piece.sources[:1] if alone and piece.function != "converter" else piece.sources)


def read_parameter(checkpoint: Checkpoint, piece: Piece) -> Tensor:
    """The piece's parameter from the checkpoint, or where it is stored one matrix an expert, a tensor of its shape with what
    the piece needs filled; without a family that says where tensors lie, the rows of the sources."""
    first = checkpoint.info(piece.sources[0])
    known = checkpoint.known_family is not None and piece.parameter in checkpoint.sources
    place = checkpoint.places[piece.sources[0]] if known else None
    if place is None and len(piece.sources) > 1:
        return torch.cat([checkpoint.read(source).reshape(-1, piece.width) for source in piece.sources])
    if place is None or place.expert is None:
        return checkpoint.read(piece.sources[0])
    full = torch.empty(checkpoint.parameter_shape(piece.parameter), dtype=first.dtype)
    for source in read_for(checkpoint, piece):
        checkpoint.places[source].view(full).copy_(checkpoint.read(source))
    return full


def _matrices(piece: Piece) -> tuple[int, ...]:
    """The shape of a piece before its matrices are turned."""
    return (*piece.shape[:-2], piece.shape[-1], piece.shape[-2]) if piece.transposed else piece.shape


def to_gguf(piece: Piece, parameter: Tensor) -> Tensor:
    """The piece's values from its parameter, in ggml's order: float32 where a function is applied, else of its dtype."""
    if piece.function == "converter":
        raise ValueError(f"{piece.name}: only llama.cpp's converter computes its values")
    value = parameter
    if piece.span is not None:
        value = value[..., slice(*piece.span), :]
    elif piece.rows is not None:
        value = value.reshape(-1, piece.width)[piece.rows.to(value.device)]
    if piece.columns is not None:
        value = value[..., piece.columns.to(value.device)]
    value = value.reshape(_matrices(piece))
    if piece.transposed:
        value = value.mT
    if piece.function == "plus_one":
        return value.float() + 1
    if piece.function == "negative_exp":
        return -torch.exp(value.float())
    return value


def into_parameter(piece: Piece, value: Tensor, parameter: Tensor) -> None:
    """Put values in ggml's order into the parameter, in place; only for a piece whose function is "same"."""
    if piece.function != "same":
        raise ValueError(f"{piece.name}: a function of the weights cannot be put back")
    value = value.to(parameter).reshape(piece.shape)
    value = value.mT if piece.transposed else value
    if piece.span is not None:
        target = parameter[..., slice(*piece.span), :]
    elif piece.rows is not None:
        target = parameter.view(-1, piece.width)  # memory of the parameter, or an error
        value = value.reshape(len(piece.rows), -1)
        columns = slice(None) if piece.columns is None else piece.columns.to(target.device)
        rows = piece.rows.to(target.device)
        target[rows if piece.columns is None else rows[:, None], columns] = value
        return
    else:
        target = parameter
    if piece.columns is not None:
        target[..., piece.columns.to(target.device)] = value.reshape(*target.shape[:-1], -1)
    else:
        target.copy_(value.reshape(target.shape))


def ordered_hessian(piece: Piece, hessian: Tensor) -> Tensor:
    """Second moments [E, I, I] of the parameter's inputs, in ggml's order."""
    if piece.columns is None or piece.transposed:
        return hessian
    made = hessian[:]
    order = piece.columns.to(made.device)
    return made[:, order][:, :, order]


# Fields of config.json that change nothing of what the model computes from token ids, or that other steps check.
FREE = frozenset(
    """architectures model_type dtype torch_dtype transformers_version tie_word_embeddings vocab_size layer_types
    full_attention_interval linear_value_head_dim rope_parameters rope_scaling rope_theta partial_rotary_factor use_cache
    initializer_range attention_dropout output_router_logits router_aux_loss_coef output_attentions output_hidden_states
    return_dict mtp_num_hidden_layers mtp_use_dedicated_embeddings num_nextn_predict_layers mamba_ssm_dtype max_window_layers
    id2label label2id problem_type chunk_size_feed_forward name_or_path bos_token_id eos_token_id pad_token_id text_config
    vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id language_model_only""".split()
)


# What any header may carry and any config.json may say, by the key of the header.
COMMON = {
    "embedding_length": "hidden_size", "attention.head_count": "num_attention_heads", "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "expert_used_count": "num_experts_per_tok",
}  # fmt: skip


def check_config(config: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` unless every field of config.json is one that the header carries, that llama.cpp's graph has
    built in, or that changes nothing: an unknown one may be part of the function, and would vanish. Only for families whose
    fields are listed; :func:`unchecked` says so of the others."""
    family = FAMILIES[family_of(str(config.get("model_type")))]
    if not family.carried:
        return
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
    config.json of ``checkpoint``, its defaults filled in: sizes, norms, kinds of layers, rotations; of a family whose fields
    are not listed, that what stands in both is the same."""
    architecture, family = fields.get("general.architecture"), checkpoint.known_family

    def value(key: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{key}", default)

    if family is None or not family.carried:
        own = dict(text_config(checkpoint.config))
        own["rope_theta"] = (own.get("rope_parameters") or {}).get("rope_theta", own.get("rope_theta"))
        for key, name in COMMON.items():
            found, expected = value(key), own.get(name)
            if (
                isinstance(found, (int, float))
                and isinstance(expected, (int, float))
                and not math.isclose(found, expected, rel_tol=1e-6)
            ):
                raise UserError(f"the header of the GGUF says {key} {found}, but {name} of config.json is {expected}")
        return
    model = meta_model(model_config(checkpoint.path))
    config = model.config.get_text_config()

    wanted = {key: getattr(config, name) for key, name in family.carried.items()}
    wanted["ssm.inner_size"] = config.linear_value_head_dim * config.linear_num_value_heads
    found = {key: value(key) for key in wanted}
    behind = value("nextn_predict_layers", 0)  # layers of multi-token prediction, which are counted with the decoder's
    found["block_count"] = (found["block_count"] or 0) - behind
    recurrent = [kind == "linear_attention" for kind in config.layer_types]
    interval = value("full_attention_interval", 4)
    wanted["layer_types"] = recurrent
    regular = [bool((i + 1) % interval) for i in range(len(recurrent))]
    kinds = value("attention.recurrent_layers", regular + [False] * behind)
    found["layer_types"] = kinds[: len(kinds) - behind]
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


def unchecked(checkpoint: Checkpoint) -> list[str]:
    """What :func:`check_config` and :func:`check_header` do not compare, as lines to print."""
    family = checkpoint.known_family
    if family is not None and family.carried:
        return []
    return [
        f"of {checkpoint.model_type} the header carries what llama.cpp's converter takes from config.json; compared here are "
        f"only {', '.join(COMMON.values())}, not scalings of the rotation, activations, soft caps and the like"
    ]


def extra_keys(checkpoint: Checkpoint) -> dict[str, float]:
    """Keys that llama.cpp's converter does not write and its graph reads: the factor by which yarn's sines and cosines differ
    from those of the paper; for families whose fields are listed."""
    family = checkpoint.known_family
    if family is None or not family.carried:
        return {}
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
    """Whether llama-quantize leaves this tensor as the converter wrote it, which for all but a few is float32."""
    return not any(size != 1 for size in shape[:-1]) or KEPT.search(name) is not None


def patterns_of(patterns: Patterns, pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """The patterns as they are for a file of these pieces: `^mtp\\.` at the start of one means the block of multi-token
    prediction, which is the layer behind the decoder's; where there is none it falls away."""
    blocks = "|".join(sorted({str(_block(piece.name)) for piece in pieces if piece.role is Role.MTP}))
    named = [(p.removeprefix(MTP_PATTERN), p.startswith(MTP_PATTERN), kind) for p, kind in patterns]
    return [(rf"^blk\.({blocks})\.{p}" if own else p, kind) for p, own, kind in named if blocks or not own]


def chosen_type(name: str, base: str, patterns: Patterns) -> str:
    return next((kind for pattern, kind in patterns if re.search(pattern, name)), base)


class Fallback(NamedTuple):
    """A tensor whose rows do not fit the ``asked`` type, and the one that it gets."""

    name: str
    shape: tuple[int, ...]
    asked: str
    used: str

    @property
    def more_bytes(self) -> int:
        """Bytes beside those that the asked type's bits would take."""
        return round(math.prod(self.shape) * (TYPES[self.used].bits - TYPES[self.asked].bits) / 8)


def types_of(shapes: Mapping[str, Sequence[int]], base: str, patterns: Patterns) -> tuple[dict[str, str], list[Fallback]]:
    """(type of every tensor, those that do not get the type that is asked for)."""
    types, fallbacks = {}, []
    for name, shape in shapes.items():
        wanted = "f32" if keeps_float32(name, shape) else chosen_type(name, base, patterns)
        types[name] = fallback(wanted, shape[-1])
        if types[name] != wanted:
            fallbacks.append(Fallback(name, tuple(shape), wanted, types[name]))
    return types, fallbacks


def fallback_notes(fallbacks: Sequence[Fallback]) -> list[str]:
    """A line for each kind of tensor that gets another type than is asked for."""
    groups: dict[tuple[str, int, str, str], list[Fallback]] = {}
    for one in fallbacks:
        kind = re.sub(r"\.\d+\.", ".*.", one.name)
        groups.setdefault((kind, one.shape[-1], one.asked, one.used), []).append(one)
    return [
        f"{kind}: {len(group)} of rows of {inputs}, no multiple of the {TYPES[asked].block} of {asked}: {used}, "
        f"{sum(one.more_bytes for one in group) / 1e6:+,.2f} MB"
        for (kind, inputs, asked, used), group in groups.items()
    ]


def check_strict(fallbacks: Sequence[Fallback]) -> None:
    """Raise :class:`UserError` if there is one."""
    for name, shape, asked, used in fallbacks[:1]:
        rest = f" ({len(fallbacks)} tensors in all)" if len(fallbacks) > 1 else ""
        pattern = re.escape(re.sub(r"^blk\.\d+\.", "", name))
        raise UserError(
            f"STRICT: {name} has rows of {shape[-1]}, no multiple of the {TYPES[asked].block} of {asked}{rest}; name its type "
            f"in TENSOR_TYPES ({pattern}={used}), or leave STRICT out"
        )


def exact_patterns(types: Mapping[str, str]) -> str:
    """The text of a --tensor-type-file that gives llama-quantize exactly these types."""
    return "".join(f"^{re.escape(name)}$={kind}\n" for name, kind in types.items() if kind != "f32")
