"""llama.cpp's own converter, run from its source tree with the pre-tokenizers named that it does not know.

    python src/quant/gguf_convert.py SOURCE convert MODEL --outfile FILE --outtype bf16 [...]     (convert_hf_to_gguf's options)
    python src/quant/gguf_convert.py SOURCE trace MODEL MTP TRACE.json
    python src/quant/gguf_convert.py SOURCE values MODEL MTP FILE < names
    python src/quant/gguf_convert.py SOURCE header MODEL PLAN.json HEADER

`header` writes what stands in a GGUF file before its first tensor, for the tensors of PLAN.json: {"ftype": 23, "mtp": "none",
"keys": {key: float}, "ends": [token ids], "tensors": [[name, shape, ggml type, bytes], ...]}. The key-values, the tokenizer
among them, are the converter's, and "keys" (of the architecture) and "ends" beside them.

`trace` tells what the converter would write, of whatever architecture, and reads no weight: its class is built with lazy
tensors, and each graph that it makes of them is evaluated with the numbers of rows and columns in place of the weights:

    {"architecture": "qwen35moe", "sources": [names], "orders": [[[first, count, step], ...], ...], "tensors": [
        {"name", "shape", "sources": [numbers], "width", "rows", "columns": number of an order or null (all, in their places),
         "transposed", "function": "same", "plus_one", "negative_exp" or "converter", "type": what --outtype bf16 gives it}]}

The rows are those of the sources one after the other, of `width` numbers each; gguf_layout.Piece says in which order all this
applies. `values` writes, for every name that it reads, the tensor as float32 into FILE and then a line; "converter" is what
nothing else computes. Both see the checkpoint as checkpoint.Checkpoint shows it, decoded from whatever format it is stored in.
MTP: "file" (with the block of multi-token prediction) or "none" (without).

Only the process of this script imports from SOURCE; its gguf-py stands before an installed one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Qwen2's split pattern, published in its tokenizer.json: every digit is a token of its own. razor-tiny's tokenizer has it too.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The converter knows a tokenizer by the digest of what it makes of one text, which depends on the vocabulary. A tokenizer of
# unknown digest is known here by the expression that splits its text: llama.cpp's name for it.
PRE_TOKENIZERS = {QWEN2_PATTERN: "qwen2"}
# Tokens at which llama.cpp stops by their text alone (llama-vocab.cpp), among those that models name as their ends.
STOPS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<eos>")


def split_pattern(model: Path) -> str | None:
    """The regular expression that the byte-level tokenizer of a checkpoint splits text by; None where it does otherwise."""
    try:
        pre = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
        split, levels = pre["pretokenizers"]
        plain = split["behavior"] == "Isolated" and not split["invert"] and levels["type"] == "ByteLevel"
        return split["pattern"]["Regex"] if plain and not levels["use_regex"] and not levels["add_prefix_space"] else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def name_pre_tokenizers(base: Any) -> None:
    """Let the converter's class for text models also know :data:`PRE_TOKENIZERS`."""
    known = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        warn = base.logger.warning
        base.logger.warning = lambda *_: None  # a page of advice to edit the converter
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            pattern = split_pattern(Path(self.dir_model))
            if pattern not in PRE_TOKENIZERS:
                raise SystemExit(
                    f"the pre-tokenizer of {self.dir_model} (it splits by {pattern!r}) is not known to llama.cpp; "
                    "name it in PRE_TOKENIZERS of src/quant/gguf_convert.py"
                ) from None
            return PRE_TOKENIZERS[pattern]
        finally:
            base.logger.warning = warn

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre


def look_before_import(base: Any) -> None:
    """Without tokenizer.model let the converter's class for text models go on to other tokenizers; it imports sentencepiece,
    which may not be installed, before it looks for the file."""
    create = base.TextModel._create_vocab_sentencepiece

    def create_vocab(self: Any) -> Any:
        if not (self.dir_model / "tokenizer.model").is_file():
            raise FileNotFoundError(self.dir_model / "tokenizer.model")
        return create(self)

    base.TextModel._create_vocab_sentencepiece = create_vocab


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A tensor of the checkpoint that is not read."""

    name: str
    shape: tuple[int, ...]


class Opened:
    """The converter's class for a model, over the tensors that ``checkpoint`` shows. ``graphs``: (name, lazy tensor, type) of
    each tensor that it would write as ``ftype``."""

    def __init__(self, base: Any, gguf: Any, model: Path, mtp: str, ftype: int, out: Path = Path("unused.gguf")) -> None:
        from conversion import get_model_architecture, get_model_class

        from checkpoint import Checkpoint

        self.checkpoint, self.lazy = Checkpoint(model), base.LazyTorchTensor
        load = base.ModelBase.load_hparams

        def load_decoded(*given: Any, **how: Any) -> dict[str, Any]:
            hparams = load(*given, **how)
            for own in (hparams, hparams.get("text_config")):
                if isinstance(own, dict):
                    own.pop("quantization_config", None)  # what it says is decoded
            return hparams

        base.ModelBase.load_hparams = staticmethod(load_decoded)  # given as an argument, some classes read it otherwise
        name = get_model_architecture(load_decoded(model, False), base.ModelType.TEXT)
        kind = get_model_class(name, mmproj=False)
        kind.no_mtp = kind.no_mtp or mtp == "none"
        base.ModelBase.index_tensors = lambda converter, remote_hf_model_id=None: self._index(converter)
        self.graphs: list[tuple[str, Any, str]] = []
        self.converter = kind(model, gguf.LlamaFileType(ftype), out)
        writer = self.converter.gguf_writer
        quantize, add = gguf.quants.quantize, writer.add_tensor
        gguf.quants.quantize = lambda data, _: data
        writer.add_tensor = lambda name, data, raw_shape=None, raw_dtype=None, **_: self.graphs.append(
            (name, data, raw_dtype.name if raw_dtype is not None else "F32")
        )
        self.converter.prepare_tensors()
        gguf.quants.quantize, writer.add_tensor = quantize, add

    def _index(self, converter: Any) -> dict[str, Any]:
        found = {}
        for name, info in self.checkpoint.tensors.items():
            meta = self.lazy.meta_with_dtype_and_shape(info.dtype, info.shape)
            leaf = self.lazy(meta=meta, args=(Leaf(name, info.shape),), func=lambda own: self.checkpoint.read(own.name))
            if item := converter.filter_tensors((name, lambda leaf=leaf: leaf)):
                found[item[0]] = item[1]
        return found


def write_header(base: Any, gguf: Any, model: Path, plan: dict[str, Any], out: Path) -> None:
    """The magic, key-values, tensor table and padding of a GGUF file with the planned tensors."""
    converter = Opened(base, gguf, model, plan["mtp"], gguf.LlamaFileType.MOSTLY_BF16, out).converter
    converter.ftype = gguf.LlamaFileType(plan["ftype"])
    writer = converter.gguf_writer
    for name, shape, type_name, size in plan["tensors"]:
        writer.add_tensor_info(name, shape, None, size, raw_dtype=gguf.GGMLQuantizationType[type_name])
    converter.prepare_metadata(vocab_only=False)
    for key, value in plan["keys"].items():
        writer.add_float32(f"{writer.arch}.{key}", value)
    add_ends(writer, gguf.Keys.Tokenizer, plan["ends"])
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.close()


def add_ends(writer: Any, keys: Any, ends: list[int]) -> None:
    """Name the tokens at which generation ends (llama.cpp also stops at some that it knows by their text) in keys that the
    tokenizer has left free: end of text, of turn, of message."""
    values = writer.kv_data[0]
    known = {values[key].value for key in (keys.EOS_ID, keys.EOT_ID, keys.EOM_ID) if key in values}
    free = [key for key in (keys.EOS_ID, keys.EOT_ID, keys.EOM_ID) if key not in values]
    tokens = [token.decode("utf-8", "replace") if isinstance(token, bytes) else token for token in values[keys.LIST].value]
    if odd := [end for end in ends if not 0 <= end < len(tokens)]:
        raise SystemExit(f"generation_config.json: eos_token_id {odd[0]} is not one of {len(tokens)} tokens")
    rest = [end for end in ends if end not in known and tokens[end] not in STOPS]
    if len(rest) > len(free):
        raise SystemExit(f"generation_config.json: a GGUF has no place for the ends {rest[len(free) :]} beside {sorted(known)}")
    for key, end in zip(free, rest):
        writer.add_uint32(key, end)


# ---------------------------------------------------------------- what the graphs do

FULL = 1 << 24  # numbers that a probe may have before axes that only pass through are cut
EXACT = (1 << 24) // 3 - 7  # below which float32 counts, also threefold
FAILURES = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)  # of a graph that does not fit a cut probe


def leaves_of(node: Any, found: dict[str, Leaf], seen: set[int]) -> dict[str, Leaf]:
    """The tensors of the checkpoint that a lazy tensor is made of, in the order of its arguments."""
    if isinstance(node, Leaf):
        found[node.name] = node
    elif isinstance(node, (list, tuple)):
        for own in node:
            leaves_of(own, found, seen)
    elif hasattr(type(node), "_wrap_fn") and id(node) not in seen:
        seen.add(id(node))
        leaves_of(node._args, found, seen)
        leaves_of(list(node._kwargs.values()), found, seen)
    return found


def key_of(node: Any, seen: dict[Any, Any]) -> Any:
    """Equal for graphs that do the same with leaves of the same shapes, numbered as they are met."""
    if isinstance(node, Leaf):
        return "leaf", node.shape, seen.setdefault(("leaf", node.name), sum(1 for key in seen if isinstance(key, tuple)))
    if isinstance(node, (list, tuple)):
        return tuple(key_of(own, seen) for own in node)
    if isinstance(node, dict):
        return tuple((name, key_of(own, seen)) for name, own in node.items())
    if isinstance(node, slice):
        return "slice", key_of((node.start, node.stop, node.step), seen)
    if isinstance(node, torch.Tensor):
        return (
            "tensor",
            tuple(node.shape),
            node.detach().float().cpu().numpy().tobytes() if node.numel() < 1 << 20 else id(node),
        )
    if hasattr(type(node), "_wrap_fn"):
        if id(node) not in seen:
            data = () if node._args else node._data
            seen[id(node)] = "node", key_of((node._func, node._args, node._kwargs, data, tuple(node._meta.shape)), seen)
        return seen[id(node)]
    if isinstance(node, types.FunctionType):
        held = [cell.cell_contents for cell in node.__closure__ or ()]
        return "function", id(node.__code__), key_of(held, seen), key_of(node.__defaults__ or (), seen)
    return (type(node), node) if isinstance(node, (str, int, float, bool, torch.dtype, type(None))) else id(node)


def evaluated(node: Any, value: Callable[[Leaf], Any], memo: dict[int, Any], first: bool = False) -> Any:
    """A graph with ``value(leaf)`` for its leaves. ``first``: of equal graphs that are stacked only the first."""
    if isinstance(node, list):
        return [evaluated(own, value, memo, first) for own in node]
    if isinstance(node, tuple):
        return tuple(evaluated(own, value, memo, first) for own in node)
    if not hasattr(type(node), "_wrap_fn"):
        return node
    if id(node) not in memo:
        args = node._args
        if len(args) == 1 and isinstance(args[0], Leaf):
            memo[id(node)] = value(args[0])
        elif node._func is None or node._data is not None:
            memo[id(node)] = node._data
        else:
            if first and node._func is torch.stack and len({key_of(own, {}) for own in args[0]}) == 1:
                args = (args[0][:1], *args[1:])
            memo[id(node)] = node._func(*evaluated(args, value, memo, first), **node._kwargs)
    return memo[id(node)]


def constant(value: torch.Tensor, axis: int) -> bool:
    return value.stride(axis) == 0 or bool((value == value.narrow(axis, 0, 1)).all())


def runs(index: Any) -> list[list[int]]:
    """[[first, count, step], ...] of whole numbers."""
    steps, found, at = np.diff(index), [], 0
    ends = np.append(np.flatnonzero(np.diff(steps)) + 1, len(steps))
    while at < len(index):
        if at == len(index) - 1:
            found.append([int(index[at]), 1, 0])
            break
        end = int(ends[np.searchsorted(ends, at, side="right")]) if len(steps) else at
        found.append([int(index[at]), end - at + 1, int(steps[at])])
        at = end + 1
    return found


class Probe:
    """What one lazy tensor does with the checkpoint's: ``rows``, ``columns``, ``width``, ``transposed``, ``function``."""

    def __init__(self, data: Any, leaves: Sequence[Leaf]) -> None:
        self.data, self.shape, self.leaves = data, tuple(data.shape), leaves
        self.rows: Any = None
        self.columns: Any = None
        self.width, self.transposed, self.function = 1, False, "converter"
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        if not leaves or not hasattr(type(data), "_wrap_fn"):
            return
        widths = {leaf.shape[-1] if len(leaf.shape) > 1 else 1 for leaf in leaves}
        if len(self.shape) > 1 and len(widths) == 1 and (width := widths.pop()) > 1:
            large = sum(sizes) > FULL and (len(leaves) > 1 or len(leaves[0].shape) > 2)
            if large and self._matrices(width, cut=True) or sum(sizes) < 1 << 30 and self._matrices(width, cut=False):
                return
        if sum(sizes) < EXACT:
            self._numbers(sizes)

    def _run(self, value: Callable[[Leaf], torch.Tensor], free: tuple[int, ...] = (), first: bool = False) -> Any:
        """The graph evaluated; None where it does not fit. ``free``: the axes whose size may differ."""
        try:
            made = evaluated(self.data, value, {}, first)
        except FAILURES:
            return None
        made = torch.as_tensor(made)
        differs = [axis for axis in range(len(self.shape)) if made.ndim > axis and made.shape[axis] != self.shape[axis]]
        fits = (
            made.ndim == len(self.shape) and made.numel() and len(differs) <= 1 and {a - made.ndim for a in differs} <= {*free}
        )
        return made if fits else None

    def _moved(self, numbers: Mapping[str, torch.Tensor], shape: Callable[[Leaf], Any], **how: Any) -> Any:
        """The graph of ``numbers`` [by leaf], as shape(leaf) lays them out; None unless it only moves them."""

        def run(factor: float, more: float) -> Any:
            return self._run(lambda leaf: shape(leaf)(numbers[leaf.name] * factor + more), **how)

        made, other = run(1.0, 0.0), run(3.0, 7.0)
        return made if made is not None and other is not None and _threefold(made, other) else None

    def _matrices(self, width: int, cut: bool) -> bool:
        """Whole rows and columns that move; whether that is all."""
        counts = [math.prod(leaf.shape[:-1]) for leaf in self.leaves]
        starts = dict(zip((leaf.name for leaf in self.leaves), np.cumsum([0, *counts]).tolist()))
        if sum(counts) > EXACT or width > EXACT:
            return False
        across = min(2, width) if cut else width
        numbers = {leaf.name: starts[leaf.name] + torch.arange(n).float() for leaf, n in zip(self.leaves, counts)}

        def tall(leaf: Leaf) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda value: value.view(*leaf.shape[:-1], 1).expand(*leaf.shape[:-1], across)

        def wide(leaf: Leaf) -> Callable[[torch.Tensor], torch.Tensor]:
            lead = (1, *leaf.shape[1:]) if cut and len(leaf.shape) > 2 else leaf.shape
            return lambda value: value.expand(lead)

        rows = self._moved(numbers, tall, free=(-1, -2) if cut else ())
        if rows is None:
            return False
        places = {leaf.name: torch.arange(width).float() for leaf in self.leaves}
        columns = self._moved(places, wide, free=(-len(self.shape),) if cut else (), first=cut)
        if columns is None:
            return False
        for turned, across_axis, along in ((False, -1, -2), (True, -2, -1)):
            if not constant(rows, across_axis) or rows.shape[along] != self.shape[along]:
                continue
            if columns.shape[across_axis] != self.shape[across_axis]:
                continue
            own = columns
            for axis in range(-own.ndim, 0):
                if axis != across_axis and own is not None:
                    own = own.narrow(axis, 0, 1) if constant(own, axis) else None
            if own is None:
                continue
            self.rows = _unless_all(rows.select(across_axis, 0).flatten().long().numpy(), sum(counts))
            self.columns = _unless_all(own.flatten().long().numpy(), width)
            self.width, self.transposed, self.function = width, turned, "same"
            return True
        return False

    def _numbers(self, sizes: Sequence[int]) -> None:
        """Single numbers that move, or a function of them."""
        starts = dict(zip((leaf.name for leaf in self.leaves), np.cumsum([0, *sizes]).tolist()))
        numbers = {leaf.name: starts[leaf.name] + torch.arange(n).float() for leaf, n in zip(self.leaves, sizes)}
        total = sum(sizes)

        def plain(leaf: Leaf) -> Callable[[torch.Tensor], torch.Tensor]:
            return lambda value: value.view(leaf.shape)

        made = self._moved(numbers, plain)
        if made is not None:
            self.rows, self.function = _unless_all(made.flatten().long().numpy(), total), "same"
            return
        unit = 16 / 2 ** max(4, total.bit_length())  # a power of two: exact, and exp tells neighbours apart
        made = self._run(lambda leaf: (numbers[leaf.name] * unit).view(leaf.shape))
        if made is None or total > 1 << 20:
            return
        for name, apply, back in (
            ("plus_one", lambda x: x + 1, lambda y: y - 1),
            ("negative_exp", lambda x: -torch.exp(x), lambda y: torch.log(-y)),
        ):
            index = (back(made.flatten()) / unit).nan_to_num(-1, -1, -1).round().long()
            if bool((index >= 0).all()) and bool((index < total).all()):
                if torch.equal(apply(index.float() * unit), made.flatten()):
                    self.rows, self.function = _unless_all(index.numpy(), total), name
                    return


def _threefold(made: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether other = 3 made + 7 everywhere; axes along which nothing changes are looked at once."""
    for axis in range(made.ndim):
        if made.stride(axis) == 0 and other.stride(axis) == 0:
            made, other = made.narrow(axis, 0, 1), other.narrow(axis, 0, 1)
    return torch.equal(made * 3 + 7, other) and torch.equal(made, made.round())


def _unless_all(index: Any, count: int) -> Any:
    """None for 0, 1, ... count - 1."""
    return None if len(index) == count and bool((index == np.arange(count)).all()) else index


def trace(opened: Opened, architecture: str) -> dict[str, Any]:
    names = {name: number for number, name in enumerate(opened.checkpoint.tensors)}
    probes: dict[Any, Probe] = {}
    orders: dict[bytes, tuple[int, list[list[int]]]] = {}
    tensors = []

    def order(index: Any) -> int | None:
        if index is None:
            return None
        kept = orders.get(index.tobytes())
        if kept is None:
            kept = orders[index.tobytes()] = (len(orders), runs(index))
        return kept[0]

    for name, data, kind in opened.graphs:
        leaves = list(leaves_of(data, {}, set()).values())
        key = key_of(data, {}), tuple(data.shape)
        probe = probes.get(key) or probes.setdefault(key, Probe(data, leaves))
        own: dict[str, Any] = {"name": name, "shape": list(data.shape), "sources": [names[leaf.name] for leaf in leaves]}
        own |= {"width": probe.width, "rows": order(probe.rows), "columns": order(probe.columns)}
        tensors.append(own | {"transposed": probe.transposed, "function": probe.function, "type": kind})
    found = [index for _, index in orders.values()]
    return {"architecture": architecture, "sources": list(names), "orders": found, "tensors": tensors}


def serve_values(opened: Opened, out: Path) -> None:
    """For each name of a line of stdin the tensor's values into ``out``; one is in memory at a time."""
    graphs = {name: data for name, data, _ in opened.graphs}
    for line in sys.stdin:
        data = graphs[line.rstrip("\n")]
        with out.open("wb") as stream:
            for chunk in getattr(data, "_chunks", None) or [lambda data=data: evaluated(data, _read(opened), {})]:
                np.ascontiguousarray(chunk(), np.float32).tofile(stream)
        print("done", flush=True)


def _read(opened: Opened) -> Callable[[Leaf], torch.Tensor]:
    return lambda leaf: opened.checkpoint.read(leaf.name)


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    source, mode, *rest = sys.argv[1:]
    sys.path[:0] = [str(Path(source) / "gguf-py"), source]
    import gguf
    from conversion import base

    name_pre_tokenizers(base)
    look_before_import(base)
    if mode == "header":
        model, plan, out = map(Path, rest)
        write_header(base, gguf, model, json.loads(plan.read_text(encoding="utf-8")), out)
    elif mode in ("trace", "values"):
        model, mtp, out = Path(rest[0]), rest[1], Path(rest[2])
        logging.disable(logging.CRITICAL)
        with torch.inference_mode():
            opened = Opened(base, gguf, model, mtp, gguf.LlamaFileType.MOSTLY_BF16)
            if mode == "trace":
                made = trace(opened, gguf.MODEL_ARCH_NAMES[opened.converter.model_arch])
                out.write_text(json.dumps(made), encoding="utf-8")
            else:
                print("ready", flush=True)
                serve_values(opened, out)
    elif mode == "convert":
        import conversion
        import convert_hf_to_gguf

        if "--no-mtp" in rest:  # refused where the converter writes no multi-token prediction anyway
            hparams = base.ModelBase.load_hparams(Path(rest[0]), False)
            name = conversion.get_model_architecture(hparams, base.ModelType.TEXT)
            if not conversion.get_model_class(name, mmproj=False).supports_mtp_export:
                rest.remove("--no-mtp")
        sys.argv = [str(Path(source) / "convert_hf_to_gguf.py"), *rest]
        convert_hf_to_gguf.main()
    else:
        raise SystemExit(f"unknown mode {mode!r}: convert, trace, values or header")


if __name__ == "__main__":
    main()
