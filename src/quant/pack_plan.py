"""What a GGUF is made of, its tensors and their types, and the file as it is written.

Not a command; gguf_pack and the plans of sizes use it. `plan_pack(checkpoint, "iq3_xxs", patterns, "ldlq")`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from calibration import Calibration, MemoryPlan, plan_memory
from checkpoint import Checkpoint, model_name
from console import UserError, explained, file_sha256
from families import VISION_PREFIX, Role, layer_count, role_in_block
from ggml_codecs import CastCodec, decode_rows, encode
from ggml_types import TYPES, row_bytes
from gguf_format import (
    HEADER,
    ConverterValues,
    Entry,
    GgufFile,
    GgufWriter,
    Part,
    make_header,
    padded,
    run_converter,
    split_groups,
    split_header,
    tensor_bytes,
)
from gguf_layout import (
    MTP_PATTERN,
    MTP_TYPE,
    NEED_IMPORTANCE,
    Patterns,
    Piece,
    check_header,
    check_strict,
    extra_keys,
    fallback_notes,
    file_type,
    into_parameter,
    is_mtp,
    known_roles,
    patterns_of,
    pieces_of,
    read_for,
    read_parameter,
    read_patterns,
    to_gguf,
    type_named,
    types_of,
    unchecked,
)
from hf_model import generation_ends, listed
from hub import AHEAD_BYTES
from recipe import LINEAR_ROLES, Job
from rounders import DAMPING, METHODS, Encoded, fed_pieces, is_quantized
from settings import setting
from size_model import RESULTS, recorded_rates, times

PROTECTED_BITS = 5  # below which embedding, head and the gates of linear attention lose more than they save


@dataclasses.dataclass(frozen=True)
class TypeSettings:
    """Which type each tensor of a GGUF gets."""

    base_type: str = setting(help="type of what `TENSOR_TYPES` does not name: the routed experts")
    tensor_types: Path | None = setting(
        None, "file of `PATTERN=TYPE` lines; empty: all matrices get `BASE_TYPE`, with a warning where that harms"
    )

    @property
    def base(self) -> str:
        return type_named(self.base_type, "--base-type")

    def patterns(self) -> list[tuple[str, str]]:
        return read_patterns(self.tensor_types) if self.tensor_types else []


@dataclasses.dataclass(frozen=True)
class SizeSettings:
    """How large what is made may be."""

    target_gib: float | None = setting(
        None, "above 0: types, or bits, chosen by measured KL; the file (a checkpoint's codes and scales) at most this large"
    )


class Blocks:
    """Parameters that are packed already, in the file that merge_adapter writes: uint8 [E, O, row bytes] by parameter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, "pt") as file:
                kind = (file.metadata() or {}).get("type", "")
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise UserError(f"--blocks {path}: not the ggml.safetensors of merge_adapter ({error})") from None
        self.kind, self.sha256 = type_named(kind, f"--blocks {path}"), file_sha256(path)

    def check(self, pieces: Sequence[Piece], checkpoint: Checkpoint) -> None:
        """Raise :class:`UserError` unless every packed parameter is one of ``pieces`` in its shape."""
        known: dict[str, tuple[int, ...]] = {}
        for piece in pieces:
            if piece.parameter in checkpoint.sources:
                known[piece.parameter] = checkpoint.parameter_shape(piece.parameter)
        for name, shape in self.shapes.items():
            own = known.get(name)
            if not own or (*own[:-1], row_bytes(self.kind, own[-1])) != shape:
                raise UserError(f"--blocks {self.path}: {name} {list(shape)} does not fit the checkpoint; pack its own one")

    def data(self, piece: Piece) -> Tensor:
        """The bytes of a piece."""
        with safe_open(self.path, "pt") as file:
            whole = file.get_tensor(piece.parameter)
        return (whole if piece.span is None else whole[..., slice(*piece.span), :]).contiguous()


@dataclasses.dataclass(frozen=True)
class Pack:
    """What is made of a checkpoint: the pieces of the file in order, their types, and how they are rounded."""

    checkpoint: Checkpoint
    base: str
    method: str
    pieces: Sequence[Piece]
    types: Mapping[str, str]
    calibration: Calibration | None = None
    importance: Mapping[str, Entry] | None = None
    blocks: Blocks | None = None
    damping: float = DAMPING
    weights_file: Path | None = None
    fed: frozenset[str] = frozenset()  # the pieces that can be rounded on what multiplies them
    mtp: str = "none"
    values: ConverterValues | None = None
    split: int = 0  # bytes of tensors that a file holds at most; 0: all in one

    @property
    def file_name(self) -> str:
        return f"{model_name(self.checkpoint.path)}-{self.named_type.upper()}.gguf"

    @property
    def named_type(self) -> str:
        """The type that the file is called after: the base type, or, where none of the experts (without experts: of the
        matrices) has it, the one that most of their weights have."""
        shares: dict[str, int] = {}
        experts = [piece for piece in self.pieces if piece.role is Role.ROUTED_EXPERT]
        for piece in experts or [piece for piece in self.pieces if piece.role in LINEAR_ROLES]:
            shares[self.types[piece.name]] = shares.get(self.types[piece.name], 0) + piece.numel
        return self.base if self.base in shares or not shares else max(shares, key=lambda kind: shares[kind])

    def bytes_of(self, piece: Piece) -> int:
        return tensor_bytes(piece.shape, self.types[piece.name])

    @property
    def data_bytes(self) -> int:
        return sum(padded(self.bytes_of(piece)) for piece in self.pieces)

    def recipe(self) -> dict[str, Any]:
        more: dict[str, Any] = {"damping": self.damping} if self.method == "ldlq" else {}
        if self.unfed:
            more["uncalibrated"] = [piece.name for piece in self.unfed]
        return {"format": "gguf", "base_type": self.base, "method": self.method, **more, "types": dict(self.types)}

    def settings(self) -> dict[str, Any]:
        """What must be the same for an unfinished run to go on."""
        calibration = self.calibration.settings() if self.calibration else None
        digest = hashlib.sha256()
        for name, entry in sorted((self.importance or {}).items()):
            digest.update(name.encode() + entry.sums.tobytes() + entry.counts.tobytes())
        source = self.checkpoint.identity
        made: dict[str, Any] = {"name": model_name(self.checkpoint.path), "recipe": self.recipe(), "source": source}
        made |= {"calibration": calibration, "importance": digest.hexdigest()}
        for piece in self.pieces:  # what a trace of llama.cpp's converter says, which another version may say otherwise
            digest.update(repr((piece.name, piece.shape, piece.sources, piece.function, piece.span, piece.transposed)).encode())
            for order in (piece.rows, piece.columns):
                digest.update(b"" if order is None else order.numpy().tobytes())
        made |= {"mtp": self.mtp, "pieces": digest.hexdigest()}
        if self.split:
            made["split"] = self.split
        return made | ({"blocks": self.blocks.sha256} if self.blocks else {})

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], str]]:
        return [(piece.name, piece.shape, self.types[piece.name]) for piece in self.pieces]

    def parts(self, header: bytes) -> bytes | list[Part]:
        """What :class:`GgufWriter` writes behind: the header of the one file, or those of all parts."""
        return split_header(header, self.tensors, self.split) if self.split else header

    def split_text(self) -> str:
        """How many files there will be; :class:`UserError` where they cannot be so small."""
        sizes = [padded(self.bytes_of(piece)) for piece in self.pieces]
        groups = [sum(sizes[index] for index in group) for group in split_groups(self.tensors, self.split)]
        return f"{len(groups)} files, the largest of {max(groups) / 2**30:.3f} GiB"

    def data(self, piece: Piece, device: torch.device) -> Tensor:
        """The bytes of a piece without calibration: those that are packed already, or its values encoded on the device."""
        if self.blocks is not None and piece.parameter in self.blocks.shapes:
            return self.blocks.data(piece)
        kind = self.types[piece.name]
        if piece.function == "converter":
            with self.checkpoint.on_disk(piece.sources):
                value = self.values(piece.name, piece.shape).to(device)
        else:
            value = to_gguf(piece, read_parameter(self.checkpoint, piece)).to(device)
        importance = mean_square((self.importance or {}).get(piece.name), piece)
        with explained(f"tensor {piece.name}"):
            if not is_quantized(kind):
                return cast(value, kind)
            return encode(value, kind, None if importance is None else importance.to(device))

    def header(self, run: Path) -> bytes:
        """The file's header; a resumed run takes the one it began with."""
        kept = run / "header.kept"
        if not kept.exists():
            keys, ends = extra_keys(self.checkpoint), generation_ends(self.checkpoint.path)
            header, empty = (
                make_header(self.checkpoint.path, self.tensors, file_type(self.named_type), run, self.mtp, keys, ends),
                run / "empty",
            )
            empty.write_bytes(header)
            os.truncate(empty, len(header) + self.data_bytes)  # takes no disk
            check_header(GgufFile(empty).fields, self.checkpoint)
            empty.unlink()
            (run / HEADER).rename(kept)
        return kept.read_bytes()

    @property
    def is_calibrated(self) -> bool:
        """Whether its method reads text: anything but the embedding gets a block type, and nothing else says how."""
        given = self.importance is not None or self.blocks is not None
        return not given and any(is_quantized(self.types[p.name]) and p.name in self.fed for p in self.pieces)

    def seen_whole(self) -> Pack:
        """The pack for llama-imatrix, which sees the inputs of all."""
        return dataclasses.replace(self, fed=frozenset(piece.name for piece in self.pieces))

    @property
    def unfed(self) -> list[Piece]:
        """The quantized pieces that go to nearest without calibration though the rest is calibrated, but for the embedding,
        which has no inputs."""
        if self.importance is not None or self.blocks is not None:
            return []
        return [
            piece for piece in self.pieces
            if is_quantized(self.types[piece.name]) and piece.name not in self.fed and piece.role is not Role.EMBEDDING
        ]  # fmt: skip


def plan_pack(
    checkpoint: Checkpoint, base: str, patterns: Sequence[tuple[str, str]], method: str,
    calibration: Calibration | None = None, importance: Mapping[str, Entry] | None = None, blocks: Blocks | None = None,
    mtp: str = "none", strict: bool = False,
) -> tuple[Pack, list[str]]:  # fmt: skip
    """(the pack, notes on substituted types, which ``strict`` refuses, and on what is not checked); :class:`UserError` on
    whatever cannot be done. ``mtp``: of gguf_layout.traced."""
    if method not in METHODS:
        raise UserError(f"method {method!r} is unknown; known: {', '.join(METHODS)}")
    if importance is not None and method != "nearest":
        raise UserError(f"--imatrix holds no second moments; use --method nearest, or {method} without it")
    if checkpoint.config.get("quantization_config"):
        raise UserError(f"{checkpoint.path}: already quantized (quantization_config in config.json); use the original")
    pieces = pieces_of(checkpoint, mtp)
    predicts = any(piece.role is Role.MTP for piece in pieces)
    unwanted = ["note: llama.cpp's converter writes this family's multi-token prediction in any case (MTP=0)"]
    unwanted = unwanted if predicts and mtp == "none" else []
    mtp = mtp if predicts else "none"
    patterns = patterns_of([*patterns, (MTP_PATTERN, MTP_TYPE)], pieces)
    types, fallbacks = types_of({piece.name: piece.shape for piece in pieces if not piece.kept}, base, patterns)
    if strict:
        check_strict(fallbacks)
    types |= {piece.name: piece.kept for piece in pieces if piece.kept}
    notes = fallback_notes(fallbacks) + unchecked(checkpoint) + unwanted
    if blocks is not None:
        if method != "nearest" or importance is not None:
            raise UserError("--blocks holds rounded weights; the rest goes to nearest: --method nearest and no --imatrix")
        blocks.check(pieces, checkpoint)
        types |= {piece.name: blocks.kind for piece in pieces if piece.parameter in blocks.shapes}
    notes += unprotected(pieces, types, patterns)
    more: dict[str, Any] = {"fed": fed_pieces(checkpoint, pieces), "mtp": mtp, "values": ConverterValues(checkpoint.path, mtp)}
    pack = Pack(checkpoint, base, method, pieces, types, calibration, importance, blocks, **more)
    if importance is not None:
        _check_importance(pack, importance)
    return pack, notes


def unprotected(pieces: Sequence[Piece], types: Mapping[str, str], patterns: Patterns) -> list[str]:
    """A warning where tensors that a low-bit type harms most have one only because no pattern names them."""
    lost = {
        re.sub(r"^blk\.\d+\.|\.weight$", "", piece.name): types[piece.name]
        for piece in pieces
        if piece.role in (Role.EMBEDDING, Role.LM_HEAD) or re.search(r"\.ssm_(alpha|beta)\.", piece.name)
        if 8 * TYPES[types[piece.name]].bytes / TYPES[types[piece.name]].block < PROTECTED_BITS
        and not any(re.search(pattern, piece.name) for pattern, _ in patterns)
    }
    if not lost:
        return []
    return [
        f"warning: TENSOR_TYPES names no type for {', '.join(lost)}; they get {', '.join(sorted(set(lost.values())))}. "
        "On razor-tiny that is KL 0.0105 instead of 0.0039 for 5 % of the bytes; "
        "configs/gguf_tensor_types_iq3.txt protects them"
    ]


def _check_importance(pack: Pack, importance: Mapping[str, Entry]) -> None:
    for name, entry in importance.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all() and entry.sums.min(initial=0) >= 0):
            raise UserError(f"the imatrix has a sum for {name} that is negative, NaN or infinite; compute it again")
    for piece in pack.pieces:
        entry, kind = importance.get(piece.name), pack.types[piece.name]
        if entry is None and kind in NEED_IMPORTANCE and piece.role not in (Role.EMBEDDING, Role.LM_HEAD):
            raise UserError(
                f"the imatrix has no entry for {piece.name}, and {kind} needs one; compute it again from this model"
            )
        shape = (piece.shape[0] if len(piece.shape) == 3 else 1, piece.shape[-1])
        if entry is not None and entry.sums.shape != shape:
            raise UserError(
                f"the imatrix has {list(entry.sums.shape)} for {piece.name}, not {list(shape)}; it is another model's"
            )


def mean_square(entry: Entry | None, piece: Piece) -> Tensor | None:
    """Importance of a piece's inputs, [I] or [E, 1, I]; an expert without a token counts all inputs alike, as llama.cpp."""
    if entry is None:
        return None
    counts = torch.from_numpy(entry.counts)[:, None]
    mean = torch.where(counts > 0, torch.from_numpy(entry.sums) / counts.clamp_min(1e-30), 1.0)
    return mean[:, None] if len(piece.shape) == 3 else mean[0]


def cast(value: Tensor, kind: str) -> Tensor:
    """The bytes of a value in f32, f16 or bf16 (encode gives the same ones in small pieces, slower)."""
    stored = value.to(CastCodec.DTYPES[kind][0])
    if not bool(torch.isfinite(stored).all()):
        if bool(torch.isfinite(value).all()):
            raise UserError(
                f"a weight of {value.abs().max().item():.4g} is beyond what {kind} holds; "
                "give the tensor bf16 or f32 by TENSOR_TYPES"
            )
        raise UserError(f"a weight to be written as {kind} is NaN or infinite")
    return stored.contiguous().view(torch.uint8)


class GgufSink:
    """The writer of the calibrated pass (calibrated_pass.Writer): the pieces of a plan in order, those that the pass has
    encoded and the others as the checkpoint has them. ``errors``: by piece, what the pass has found."""

    def __init__(self, pack: Pack, writer: GgufWriter, bar: Any) -> None:
        self.pack, self.writer, self.bar, self.stop = pack, writer, bar, threading.Event()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.before, *self.parts = in_parts(pack.pieces)
        self.errors: dict[str, list[float]] = dict(writer.facts.get("errors", {}))
        self.embedded: dict[str, Tensor] = {}  # what stands before the decoder, as encoded
        self.ready = writer.done
        bar.initial = bar.n = sum(map(pack.bytes_of, pack.pieces[: writer.done]))

    def begin(self) -> int:
        after, whole = len(self.before), 0
        for part in self.parts[:-1]:
            after += len(part)
            whole += after <= self.ready
        if not whole:  # killed before the first layer: encoding again gives the same bytes
            self.embedded = self._encoded_before()
            if self.ready < len(self.before):
                self._append(self.before, self.embedded)
        return whole

    def _encoded_before(self) -> dict[str, Tensor]:
        return {piece.name: self.pack.data(piece, self.device) for piece in self.before}

    def embedding(self) -> dict[str, Tensor]:
        encoded, self.embedded = self.embedded or self._encoded_before(), {}
        found: dict[str, Tensor] = {}
        for piece in self.before:
            if piece.function == "same":
                full = read_parameter(self.pack.checkpoint, piece).float()
                value = decode_rows(encoded[piece.name], self.pack.types[piece.name]).view(piece.shape)
                into_parameter(piece, value.cpu(), full)
                found[piece.sources[0]] = full
        return found

    def write(self, part: int, values: Mapping[str, Encoded]) -> None:
        self.errors |= {name: value.errors for name, value in values.items() if value.errors}
        self.writer.facts = {"errors": self.errors}
        self._append(self.parts[part], {name: value.data for name, value in values.items()})

    def write_data_free(self) -> None:
        """All pieces, without calibration."""
        end, checkpoint = 0, self.pack.checkpoint
        given = self.pack.blocks.shapes if self.pack.blocks else {}
        left = [piece for piece in self.pack.pieces[self.ready :] if piece.parameter not in given]
        checkpoint.expect((read_for(checkpoint, piece) for piece in left), AHEAD_BYTES)
        for part in (self.before, *self.parts):
            end += len(part)
            if end > self.ready:
                self._append(part, {})

    def _append(self, pieces: Sequence[Piece], values: Mapping[str, Tensor]) -> None:
        for piece in pieces:
            self.writer.append(piece.name, values[piece.name] if piece.name in values else self.pack.data(piece, self.device))
            self.bar.update(self.pack.bytes_of(piece))
        self.writer.sync()

    def complete(self) -> bool:
        return self.ready == len(self.pack.pieces)

    def relative_errors(self) -> dict[str, float]:
        """Squared error of the outputs as a share of the squared outputs, by role."""
        sums: dict[str, list[float]] = {}
        for piece in self.pack.pieces:
            if piece.name in self.errors:
                total = sums.setdefault(str(piece.role), [0.0, 0.0])
                for place, value in enumerate(self.errors[piece.name]):
                    total[place] += value
        return {role: float(f"{error / size:.4g}") if size else 0.0 for role, (error, size) in sums.items()}


def in_parts(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The pieces before the decoder, of each of its layers, and after it."""
    parts: list[list[Piece]] = [[] for _ in range(pieces[-1].layer + 2)]
    for piece in pieces:
        parts[piece.layer + 1].append(piece)
    return parts


def report(pack: Pack, file_bytes: int) -> dict[str, Any]:
    """Sizes, bits a weight and the types of each role."""
    roles: dict[str, dict[str, Any]] = {}
    for piece in pack.pieces:
        entry = roles.setdefault(str(piece.role), {"tensors": 0, "parameters": 0, "bytes": 0, "types": {}})
        entry["tensors"] += 1
        entry["parameters"] += piece.numel
        entry["bytes"] += pack.bytes_of(piece)
        kinds, kind = entry["types"], pack.types[piece.name]
        kinds[kind] = kinds.get(kind, 0) + 1
    parameters = sum(piece.numel for piece in pack.pieces)
    bits: dict[str, Any] = {"bits_per_weight": round(8 * file_bytes / parameters, 4)}
    if experts := roles.get(str(Role.ROUTED_EXPERT)):
        bits["expert_bits_per_weight"] = round(8 * experts["bytes"] / experts["parameters"], 4)
    if pack.unfed:
        bits["uncalibrated"] = dict(Counter(str(piece.role) for piece in pack.unfed))
    return {"file_bytes": file_bytes, "gib": round(file_bytes / 2**30, 6), "parameters": parameters, **bits, "roles": roles}


def table(made: Mapping[str, Any]) -> str:
    lines = [f"{'role':<17}{'tensors':>8}{'parameters':>17}{'bits':>8}{'MB':>11}  types"]
    for role, entry in made["roles"].items():
        bits = f"{8 * entry['bytes'] / entry['parameters']:.3f}"
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(entry["types"].items()))
        lines.append(
            f"{role:<17}{entry['tensors']:>8,}{entry['parameters']:>17,}{bits:>8}{entry['bytes'] / 1e6:>11.2f}  {kinds}"
        )
    size = f"{made['file_bytes'] / 1e6:,.2f} MB ({made['gib']:.3f} GiB)"
    if unfed := made.get("uncalibrated"):
        roles = ", ".join(f"{count} {role}" for role, count in unfed.items())
        lines.append(f"to nearest without calibration (what multiplies their columns is not known): {roles}")
    return "\n".join([*lines, f"{size}, {made['bits_per_weight']:.4f} bits a weight over all"])


def write_mmproj(checkpoint: Checkpoint, directory: Path) -> str | None:
    """The vision tower as NAME-mmproj-f16.gguf, by llama.cpp's converter; None for a model without one."""
    seeing = [name for name in checkpoint.tensors if VISION_PREFIX.match(name)]
    if not seeing:
        return None
    name = f"{model_name(checkpoint.path)}-mmproj-f16.gguf"
    if not (directory / name).exists():
        temporary = directory / f".{name}"
        with checkpoint.on_disk(seeing):
            run_converter("convert", checkpoint.path, "--outfile", temporary, "--outtype", "f16", "--mmproj")
        wanted = sum(checkpoint.tensors[tensor].numel for tensor in seeing)
        tensors = GgufFile(temporary).tensors
        held = sum(int(tensor.n_elements) for tensor in tensors.values())
        odd = next((t.name for t in tensors.values() if t.data.dtype.kind == "f" and not np.isfinite(t.data).all()), None)
        if held != wanted or odd:
            temporary.unlink()
            if odd:
                raise UserError(f"{checkpoint.path}: {odd} of the vision tower has a weight beyond what float16 holds")
            raise UserError(
                f"{checkpoint.path}: llama.cpp's converter put {held:,} of the vision tower's {wanted:,} weights into {name}"
            )
        temporary.rename(directory / name)
        size = (directory / name).stat().st_size
        print(f"{name}: {len(tensors)} tensors, {held:,} weights, {size / 1e6:,.2f} MB", flush=True)
    return name


def left_out(checkpoint: Checkpoint, pieces: Sequence[Piece] = ()) -> list[str]:
    """What of the checkpoint the file of these pieces does not hold, as lines of text."""
    layers, held = layer_count(checkpoint.config) or 0, {source for piece in pieces for source in piece.sources}
    rest: dict[str, list[str]] = {"mtp": [], "vision": [], "other": []}
    for name in checkpoint.tensors:
        if name not in held:
            rest["vision" if VISION_PREFIX.match(name) else "mtp" if is_mtp(name, layers) else "other"].append(name)
    others = f"left out by llama.cpp's converter: {{}} of {listed(rest['other'])}"
    lines = []
    for kind, where in (
        ("mtp", "left out: {} of multi-token prediction (MTP=0, or llama.cpp has no place for them)"),
        ("vision", "in a file of their own (mmproj): {} of the vision tower"),
        *([("other", others)] if pieces else []),
    ):
        own = [checkpoint.tensors[name] for name in rest[kind]]
        if own:
            lines.append(
                where.format(f"{len(own)} tensors, {sum(info.bytes for info in own) / 1e6:,.2f} MB in the checkpoint,")
            )
    return lines


def pack_memory(pack: Pack, dry_run: bool) -> MemoryPlan:
    """What the calibrated pass has in memory at most, about."""
    if pack.calibration is None:
        return MemoryPlan(None, 0, [])
    tensors, roles = pack.checkpoint.tensors, known_roles(pack.checkpoint)
    if not roles:  # a reference of a family that no calibrated pass runs
        return MemoryPlan(None, 0, [])
    encoded = (*LINEAR_ROLES, Role.ROUTED_EXPERT)
    inner = {name: role_in_block(name, pack.checkpoint.model_type) for name in tensors if roles[name] is Role.MTP}
    if pack.mtp == "none":
        roles = {name: role for name, role in roles.items() if role is not Role.MTP}
    jobs = [
        Job(name, tensors[name], role, 4 if inner.get(name, role) in encoded else None, inner=inner.get(name))
        for name, role in roles.items()
    ]
    return plan_memory(jobs, pack.calibration, dry_run=dry_run)


def reads(pack: Pack) -> tuple[list[str], list[str], bool]:
    """Of plans.fetched_bytes: what write_pack reads once (every piece that is not rounded where its layer runs, and the vision
    tower), the head, and whether that is the embedding."""
    rounded, once = dict[str, Role](), [name for name in pack.checkpoint.tensors if VISION_PREFIX.match(name)]
    tied = not any(piece.role is Role.LM_HEAD for piece in pack.pieces)
    head, plain = (Role.EMBEDDING, None) if tied else (Role.LM_HEAD, Role.EMBEDDING)
    if pack.calibration:
        rounded = {p.parameter: p.role for p in pack.pieces if p.role is not plain and is_quantized(pack.types[p.name])}
    for piece in pack.pieces:
        if piece.parameter not in rounded and not (pack.blocks and piece.parameter in pack.blocks.shapes):
            once += read_for(pack.checkpoint, piece)
    return once, [n for key, role in rounded.items() if role is head for n in pack.checkpoint.sources[key]], tied


def pack_times(pack: Pack, method: str) -> list[str]:
    """How long ``method`` (one of ours, or llama-quantize) would take where it was measured, as lines of text."""

    def units(record: dict[str, Any]) -> float:
        recipe = record["recipe"]
        return record["metrics"]["parameters"] if (recipe["method"], recipe["base_type"]) == (method, pack.base) else 0

    rates, amount = recorded_rates(RESULTS, "pack", units), sum(piece.numel for piece in pack.pieces)
    return ["time, extrapolated by parameters from recorded runs:", *times(rates, amount, f"{method} at {pack.base}")]
