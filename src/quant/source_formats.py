"""Checkpoints published in FP8, MXFP4, INT4 or INT8, shown as the BF16 tensors that their weights stand for.

Not a command. `source_tensors(directory, config, stored)` gives them by name; each is decoded where it is read, row by row, so
memory stays that of the piece. What the owner of each format says, and what the tests compare with bit for bit:

    fp8                 transformers' finegrained FP8: `weight` F8_E4M3 x `weight_scale_inv`, one for 128 x 128 weights
    mxfp4               transformers' MXFP4 (gpt-oss): `X_blocks` U8 [E, O, I/32, 16] two codes a byte, `X_scales` U8 exponents
                        [E, O, I/32]; the parameter X is [E, I, O]
    compressed-tensors  pack-quantized: `weight_packed` int32 (INT2 to INT8), `weight_scale`, `weight_shape`, with
                        `weight_zero_point` and `weight_g_idx` where the scheme has them; int-quantized and float-quantized:
                        `weight` I8 or F8_E4M3 and `weight_scale`

The codes of pack-quantized lie in a row of bits without gaps, the first in the lowest bits of the first word, each as code +
2**(bits - 1): what compressed-tensors 0.18 and later and vLLM 0.32 and later read. Up to 0.17 that package put whole codes into
each word, which is the same for 2, 4 and 8 bits and refused here for the others.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from console import UserError
from safetensors_file import DTYPE_NAMES, TensorInfo

PIECE = 1 << 22  # weights decoded at once
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # E2M1 by code
# Tensors beside the weights that say how activations or the cache are rounded; the weights do not need them.
ACTIVATIONS = re.compile(r".*\.((input|output)_(scale|zero_point|global_scale)|activation_scale|[qkv]_scale)")
KNOWN = {  # fields of quantization_config, by quant_method
    "fp8": "activation_scheme fmt weight_block_size modules_to_not_convert ignored_layers scale_fmt dequantize",
    "mxfp4": "modules_to_not_convert dequantize",
    "compressed-tensors": """config_groups format quantization_status global_compression_ratio ignore kv_cache_scheme
        sparsity_config transform_config version""",
}
SCHEME = "num_bits type symmetric strategy group_size block_structure dynamic observer observer_kwargs actorder scale_dtype"
SCHEME += " zp_dtype"
PACKED_FORMATS, PLAIN_FORMATS = ("pack-quantized",), ("int-quantized", "float-quantized", "naive-quantized")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledInfo(TensorInfo):
    """A BF16 tensor stored as codes and scales: value = (code - zero point) * scale. ``begin`` and ``end`` only say its size.

    ``codes``: [..., O, I] one a weight, or with ``bits`` int32 [O, words] (:func:`unpack_words`). ``scale``: any shape
    [..., O / block[0], I / block[1]] (rounded up). ``zero``: like ``scale``, packed along its rows where ``bits`` is given.
    ``index``: the group of each input, where that is not its place. ``exact``: multiply in float32 and round once, not in the
    dtype of the scale.
    """

    codes: TensorInfo
    scale: TensorInfo
    block: tuple[int, int]
    bits: int | None = None
    zero: TensorInfo | None = None
    index: TensorInfo | None = None
    exact: bool = False

    def stored(self) -> tuple[TensorInfo, ...]:
        return tuple(info for info in (self.codes, self.scale, self.zero, self.index) if info is not None)

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        count = self.shape[0] if count is None else count
        out = torch.empty(count, *self.shape[1:], dtype=self.dtype)
        if len(self.shape) == 3:
            scale = self._scales(start, count)
            for piece in _pieces(count, math.prod(self.shape[1:])):
                codes = self.codes.read(start + piece.start, piece.stop - piece.start)
                out[piece] = self._values(codes, scale[piece], 0, None)
            return out
        scale, zero = self._scales(), self._zeros()
        for piece in _pieces(count, self.shape[1]):
            codes = self.codes.read(start + piece.start, piece.stop - piece.start)
            if self.bits:
                codes = unpack_words(codes, self.bits, self.shape[1])
            out[piece] = self._values(codes, scale, start + piece.start, zero)
        return out

    def _scales(self, start: int = 0, count: int | None = None) -> Tensor:
        scale = self.scale.read() if count is None else self.scale.read(start, count)
        if scale.dtype == torch.uint8:  # an exponent (MXFP8)
            return (scale.float() - 127).exp2()
        return scale.float() if self.exact or scale.dtype == torch.float8_e8m0fnu else scale

    def _zeros(self) -> Tensor | None:
        if self.zero is None:
            return None
        zero = self.zero.read()
        if not self.bits:
            return zero
        rows = math.ceil(self.shape[0] / self.block[0])  # packed along the rows
        return unpack_words(zero.mT.contiguous(), self.bits, rows).mT

    def _values(self, codes: Tensor, scale: Tensor, first: int, zero: Tensor | None) -> Tensor:
        """The values of rows ``first`` and on, [..., rows, I]."""
        if self.block[0] == 1 and zero is None and self.index is None and codes.shape[-1] % self.block[1] == 0:
            own = scale.narrow(-2, first, codes.shape[-2])[..., None] if scale.numel() > 1 else scale
            return (codes.to(scale.dtype).unflatten(-1, (-1, self.block[1])) * own).flatten(-2).to(self.dtype)
        rows = torch.arange(first, first + codes.shape[-2]) // self.block[0]
        columns = torch.arange(codes.shape[-1]) // self.block[1]
        if self.index is not None and bool(((index := self.index.read().long()) >= 0).all()):  # -1: never set
            columns = index

        def spread(value: Tensor) -> Tensor:
            if value.numel() == 1:
                return value.view(())
            return value.index_select(-2, rows).index_select(-1, columns)

        values = codes.to(scale.dtype)
        if zero is not None:
            values = values - spread(zero).to(scale.dtype)
        return (values * spread(scale)).to(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mxfp4Info(TensorInfo):
    """A BF16 parameter [E, I, O] stored as E2M1 codes, two a byte, and an exponent for 32 of them."""

    blocks: TensorInfo
    scales: TensorInfo

    def stored(self) -> tuple[TensorInfo, ...]:
        return self.blocks, self.scales

    def read(self, start: int = 0, count: int | None = None) -> Tensor:
        count = self.shape[0] if count is None else count
        out = torch.empty(count, *self.shape[1:], dtype=self.dtype)
        for place in range(count):
            out[place] = mxfp4_values(self.blocks.read(start + place, 1), self.scales.read(start + place, 1))[0].mT
        return out


def mxfp4_values(blocks: Tensor, scales: Tensor) -> Tensor:
    """BF16 [..., G * 32] of ``blocks`` uint8 [..., G, 16], the lower half byte first, and ``scales`` uint8 [..., G]: the E2M1
    value times 2**(scale - 127), exact but for what bfloat16 cannot hold."""
    table = torch.tensor(FP4_VALUES, dtype=torch.bfloat16)
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    return torch.ldexp(table[codes.int()], scales.int()[..., None] - 127).bfloat16().flatten(-2)


def word_count(inputs: int, bits: int) -> int:
    """int32 words that ``inputs`` codes of ``bits`` bits take."""
    return math.ceil(inputs * bits / 32)


def unpack_words(words: Tensor, bits: int, inputs: int) -> Tensor:
    """int8 [O, inputs] in -2**(bits - 1) .. of int32 [O, word_count(inputs, bits)], as the module's docstring has them."""
    stored = words.contiguous().view(torch.uint8)
    stored = torch.nn.functional.pad(stored, (0, -stored.shape[-1] % bits)).unflatten(-1, (-1, bits))  # eight codes each
    codes = torch.empty(*stored.shape[:-1], 8, dtype=torch.uint8, device=words.device)
    for place in range(8):
        byte, shift = divmod(place * bits, 8)
        code = stored[..., byte] >> shift
        if shift + bits > 8:
            code |= stored[..., byte + 1] << 8 - shift
        codes[..., place] = code
    codes &= 2**bits - 1
    return codes.flatten(-2)[..., :inputs].view(torch.int8) - 2 ** (bits - 1)


def _pieces(count: int, row: int) -> Iterator[slice]:
    step = max(1, PIECE // max(1, row))
    return (slice(first, min(first + step, count)) for first in range(0, count, step))


# ---------------------------------------------------------------- which tensors


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """quantization_config of a config.json, which a multimodal one may keep in text_config; None where there is none."""
    inner = config.get("text_config")
    found = config.get("quantization_config") or (isinstance(inner, dict) and inner.get("quantization_config"))
    return found or None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the same model in BF16."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if isinstance(inner := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in inner.items() if key != "quantization_config"}
    return plain


def _refuse(where: Path, what: str) -> UserError:
    return UserError(f"{where}: quantization_config: {what}; use the original in BF16")


def _known(where: Path, found: Mapping[str, Any], names: str, of: str) -> None:
    if unknown := sorted(found.keys() - set(names.split()) - {"quant_method"}):
        raise _refuse(where, f"{of} has a field that is not known here: {', '.join(unknown)}")


class Decoder:
    """Takes stored tensors out of ``rest`` and adds what they stand for to ``found``; what is left over is the caller's."""

    def __init__(self, where: Path, found: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> None:
        self.where, self.settings, self.rest = where, found, dict(stored)
        method = str(found.get("quant_method"))
        if method not in KNOWN:
            raise _refuse(where, f"quant_method {method!r} is not read here; known: {', '.join(KNOWN)}")
        _known(where, found, KNOWN[method], method)
        self.decoded = {"fp8": self._fp8, "mxfp4": self._mxfp4, "compressed-tensors": self._compressed}[method]()

    def tensors(self, stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """In the order of ``stored``: a decoded tensor stands where its codes lie."""
        tensors: dict[str, TensorInfo] = {}
        for name, info in stored.items():
            if name in self.decoded:
                plain, value = self.decoded[name]
                tensors[plain] = value
            elif name in self.rest and not ACTIVATIONS.fullmatch(name):
                if info.dtype.itemsize == 1 and info.dtype not in (torch.uint8, torch.bool) or name.endswith("_scale_inv"):
                    kind = DTYPE_NAMES[info.dtype]
                    raise UserError(f"{self.where}: {name} is {kind} without the tensor that goes with it; download it again")
                tensors[name] = info
        return tensors

    def _take(self, name: str, of: str) -> TensorInfo:
        if name not in self.rest:
            raise UserError(f"{self.where}: {of} has no {name}; download it again")
        return self.rest.pop(name)

    def _scaled(self, name: str, codes: str, scale: str, block: tuple[int, int], **more: Any) -> tuple[str, ScaledInfo]:
        kept, scales = self._take(codes, name), self._take(scale, codes)
        shape = more.pop("shape", kept.shape)
        grid = tuple(math.ceil(size / of) for size, of in zip(shape[-2:], block))
        if len(shape) < 2 or scales.numel != 1 and scales.shape != (*shape[:-2], *grid):
            raise UserError(
                f"{self.where}: {scale} is {list(scales.shape)}, which does not fit {codes} {list(shape)} in blocks of {block}"
            )
        if scales.numel == 1 and len(shape) == 3:
            raise UserError(f"{self.where}: {scale} holds one scale for all experts of {codes}, which is not read here")
        size = math.prod(shape) * 2
        info = ScaledInfo(torch.bfloat16, shape, kept.file, 0, size, codes=kept, scale=scales, block=block, **more)
        return name, info

    def _fp8(self) -> dict[str, tuple[str, TensorInfo]]:
        if self.settings.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
            raise _refuse(self.where, f"fmt {self.settings['fmt']!r} is not read here")
        sizes = self.settings.get("weight_block_size")
        decoded: dict[str, tuple[str, TensorInfo]] = {}
        for codes in [name for name, info in self.rest.items() if info.dtype == torch.float8_e4m3fn]:
            scale = f"{codes}_scale_inv"
            shape = self.rest[codes].shape
            block = tuple(sizes) if sizes else tuple(shape[-2:])
            decoded[codes] = self._scaled(codes, codes, scale, block, exact=True)  # type: ignore[arg-type]
        return decoded

    def _mxfp4(self) -> dict[str, tuple[str, TensorInfo]]:
        decoded: dict[str, tuple[str, TensorInfo]] = {}
        for codes in [name for name in self.rest if name.endswith("_blocks")]:
            name = codes.removesuffix("_blocks")
            blocks, scales = self._take(codes, name), self._take(f"{name}_scales", codes)
            if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
                raise UserError(f"{self.where}: {codes} {list(blocks.shape)} does not fit {name}_scales {list(scales.shape)}")
            shape = (blocks.shape[0], blocks.shape[2] * 32, blocks.shape[1])
            info = Mxfp4Info(torch.bfloat16, shape, blocks.file, 0, math.prod(shape) * 2, blocks=blocks, scales=scales)
            decoded[codes] = (name, info)
        return decoded

    def _compressed(self) -> dict[str, tuple[str, TensorInfo]]:
        for part in ("sparsity_config", "transform_config"):
            if self.settings.get(part) not in (None, {}) and self.settings[part] != {"format": "dense"}:
                raise _refuse(self.where, f"{part} is not read here")
        decoded: dict[str, tuple[str, TensorInfo]] = {}
        for scale in [name for name in self.rest if name.endswith(".weight_scale")]:
            module = scale.removesuffix("_scale").removesuffix(".weight")
            weights, form = self._scheme(module)
            packed = f"{module}.weight_packed" in self.rest
            if form not in (PACKED_FORMATS if packed else PLAIN_FORMATS):
                raise _refuse(self.where, f"format {form!r} of {module} is not read here")
            codes = f"{module}.weight_packed" if packed else f"{module}.weight"
            decoded[codes] = self._module(module, codes, scale, weights, packed)
        return decoded

    def _module(self, module: str, codes: str, scale: str, weights: Mapping[str, Any], packed: bool) -> tuple[str, TensorInfo]:
        bits, more = int(weights["num_bits"]), {}
        if codes not in self.rest:
            raise UserError(f"{self.where}: {scale} has no {codes}; download it again")
        shape = self.rest[codes].shape
        if packed:
            if weights["type"] != "int" or not 2 <= bits <= 8:
                raise _refuse(self.where, f"{weights['type']} of {bits} bits ({module}) is not read here; int of 2 to 8 is")
            told = self._take(f"{module}.weight_shape", codes).read().tolist()
            if len(shape) != 2 or len(told) != 2 or told[0] != shape[0] or word_count(told[1], bits) != shape[1]:
                old = len(told) == 2 and math.ceil(told[1] / (32 // bits)) == shape[-1]
                why = " without gaps (compressed-tensors before 0.18 left some); pack it again" if old else ""
                raise UserError(f"{self.where}: {codes} {list(shape)} does not hold a {bits}-bit matrix of {told}{why}")
            shape, more = (told[0], told[1]), {"bits": bits, "shape": (told[0], told[1])}
        elif (weights["type"], self.rest[codes].dtype) not in (
            ("int", torch.int8),
            ("float", torch.float8_e4m3fn),
        ) or bits != 8:
            kind = DTYPE_NAMES[self.rest[codes].dtype]
            raise _refuse(self.where, f"{module}: {weights['type']} of {bits} bits stored as {kind} is not read here")
        rows, inputs = shape[-2:]
        strategy = weights.get("strategy")
        if strategy == "block":
            block = tuple(weights["block_structure"])
        else:
            block = {"tensor": (rows, inputs), "channel": (1, inputs), "group": (1, weights.get("group_size") or 0)}.get(
                str(strategy), (0, 0)
            )
        if min(block) < 1:
            raise _refuse(self.where, f"strategy {strategy!r} of {module} is not read here")
        if not weights.get("symmetric", True):
            more["zero"] = self._take(f"{module}.weight_zero_point", codes)
        else:
            self.rest.pop(f"{module}.weight_zero_point", None)  # all zero, in files that keep it
        more["index"] = self.rest.pop(f"{module}.weight_g_idx", None)
        return self._scaled(f"{module}.weight", codes, scale, block, **more)  # type: ignore[arg-type]

    def _scheme(self, module: str) -> tuple[Mapping[str, Any], str]:
        """(the arguments of the weights, the format) of the config group that a module belongs to: one that names it, else
        the one for its class."""
        groups = self.settings.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise _refuse(self.where, "has no config_groups")
        named, by_class = [], []
        for group in groups.values():
            for target in group.get("targets") or ():
                if target.startswith("re:") and re.match(target[3:], module) or module == target:
                    named.append(group)
                elif target in ("Linear", "Embedding"):
                    by_class.append(group)
        own = {json.dumps(group, sort_keys=True): group for group in (named or by_class)}
        if len(own) != 1:
            raise _refuse(self.where, f"{len(own)} of its config_groups are for {module}; one is needed")
        group = next(iter(own.values()))
        weights = group.get("weights")
        if not isinstance(weights, dict):
            raise _refuse(self.where, f"the config group of {module} says nothing of weights")
        _known(self.where, weights, SCHEME, f"the config group of {module}")
        return weights, str(group.get("format") or self.settings.get("format"))


def source_tensors(directory: Path, config: Mapping[str, Any], stored: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors that a checkpoint with this config.json stands for, in the order of ``stored``; raises :class:`UserError`
    on a format, a field or a pair of tensors that is not known."""
    found = quantization_of(config)
    if found is None:
        for name in stored:
            if name.endswith(("_scale_inv", ".weight_packed", "_blocks")):
                raise UserError(f"{directory}: {name} without a quantization_config in config.json; download that again")
        return dict(stored)
    return Decoder(directory, found, stored).tensors(stored)


def describe(config: Mapping[str, Any]) -> str | None:
    """What a plan says of a source that is decoded: its quant_method and format; None for plain weights."""
    found = quantization_of(config)
    return None if found is None else " ".join(str(found[key]) for key in ("quant_method", "format", "fmt") if found.get(key))
