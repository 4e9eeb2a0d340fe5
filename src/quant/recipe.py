"""What to do to a checkpoint, as one frozen value: written once, saved beside what it made, read back by later steps.

Not a command. `Recipe(expert_bits=3, linear_bits=4, group=128, clip_steps=16)`; `read_recipe(quantized_checkpoint_dir)`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from console import UserError, read_json
from families import Role
from moe_ptq import CALIBRATED, DATA_FREE, METHODS, zero_point_bits
from moe_quant import CLIP_LOW
from safetensors_file import TensorInfo
from settings import setting

RECIPE_FILE = "recipe.json"
KEEP = 16  # bits that mean "leave as it is"
MTP_BITS = 4  # of the block of multi-token prediction: what it guesses is accepted as often as in BF16 (bench.sh mtp)
NOT_GIVEN = 0  # bits of the experts, of which a dense model has none
LINEAR_ROLES = (
    Role.SHARED_EXPERT,
    Role.ATTENTION,
    Role.LINEAR_ATTENTION,
    Role.MLP,
    Role.EMBEDDING,
    Role.LM_HEAD,
)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """expert_bits and linear_bits: 2..8, or 16 to leave those tensors as they are; a fraction of expert_bits gives that
    share of each layer's experts one bit more. group: inputs that share a scale. method: see moe_ptq.py. overrides:
    (pattern, bits) pairs, a pattern as of fnmatch for names of transformers' parameters; the last that matches wins.
    experts: (module, bits of each of its experts) pairs, such as ("model.layers.0.mlp.experts", (2, 3, 4, 3))."""

    expert_bits: float = setting(
        help="bits of the routed experts, 2 to 8, or 16 to leave them; a fraction (2.5) gives that share of each layer's "
        "experts one bit more, with a calibrated method; a model with routed experts must have it"
    )
    linear_bits: int = setting(help="bits of every other matrix, embedding and head: 2 to 8, or 16")
    group: int = setting(128, "inputs that share a scale; must divide every matrix's inputs")
    clip_steps: int = setting(16, f"ratios of the clip search, from 1.0 down to {CLIP_LOW}; 1 is absmax")
    clip_low: float = CLIP_LOW
    method: str = setting("clip", f"{_listed(DATA_FREE)}; with text {_listed(CALIBRATED)}")
    mtp_bits: int = setting(
        MTP_BITS, "bits of the matrices of multi-token prediction (mtp), where a model has it: 2 to 8, or 16 to leave them"
    )
    scale_dtype: str = "bfloat16"
    overrides: tuple[tuple[str, float], ...] = ()
    experts: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        for field in ("linear_bits", "group", "clip_steps", "mtp_bits"):
            if type(getattr(self, field)) is not int:
                raise UserError(f"{field} {getattr(self, field)!r} is not a whole number")
        if type(self.expert_bits) not in (int, float) or not math.isfinite(self.expert_bits):
            raise UserError(f"expert_bits {self.expert_bits!r} is not a number")
        if self.expert_bits == int(self.expert_bits):
            object.__setattr__(self, "expert_bits", int(self.expert_bits))
        for field in ("expert_bits", "linear_bits", "mtp_bits"):
            bits = getattr(self, field)
            if field == "expert_bits" and bits == NOT_GIVEN:
                continue
            if not 2 <= bits <= 8 and bits != KEEP:
                raise UserError(f"{field} {bits} is outside 2..8 (or {KEEP} to leave the tensors as they are)")
        object.__setattr__(self, "overrides", tuple((str(name), bits) for name, bits in self.overrides))
        for name, bits in self.overrides:
            if type(bits) not in (int, float) or not (2 <= bits <= 8 or bits == KEEP):
                raise UserError(f"overrides: {name}: bits {bits!r} is outside 2..8 (or {KEEP} to leave it)")
        object.__setattr__(self, "experts", tuple((str(name), tuple(bits)) for name, bits in self.experts))
        for name, each in self.experts:
            if any(type(bits) is not int or not 2 <= bits <= 8 for bits in each):
                raise UserError(f"experts: {name}: {list(each)}: expected whole numbers in 2..8")
        if self.group < 1:
            raise UserError(f"group {self.group} must be at least 1")
        if self.clip_steps < 1:
            raise UserError(f"clip_steps {self.clip_steps} must be at least 1 (1 is absmax)")
        if not (math.isfinite(self.clip_low) and 0 < self.clip_low <= 1):
            raise UserError(f"clip_low {self.clip_low} is outside (0, 1]")
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r} is unknown; known: {', '.join(METHODS)}")
        if self.scale_dtype != "bfloat16":
            raise UserError(f"scale_dtype {self.scale_dtype!r}: only bfloat16 is supported")

    def bits_for(self, role: Role) -> float | None:
        """Bits of the grid for a tensor of this role; None leaves it as it is (protected, or bits 16)."""
        if role is Role.ROUTED_EXPERT and self.expert_bits == NOT_GIVEN:
            raise UserError(f"the model has routed experts: give --expert-bits, 2 to 8, or {KEEP} to leave them as they are")
        bits = self.expert_bits if role is Role.ROUTED_EXPERT else self.linear_bits if role in LINEAR_ROLES else KEEP
        return None if bits == KEEP else bits

    def bits_of(self, parameter: str, role: Role, inner: Role | None = None) -> float | None:
        """Bits of a parameter by its name, overrides included; None leaves it as it is. ``inner``: its role within the block
        of multi-token prediction (families.role_in_block), where it is of one."""
        bits = self.bits_for(role)
        if role is Role.MTP and inner in (Role.ROUTED_EXPERT, *LINEAR_ROLES):
            bits, role = None if self.mtp_bits == KEEP else self.mtp_bits, inner
        for pattern, own in self.overrides:
            if fnmatch.fnmatchcase(parameter, pattern):
                if role not in (Role.ROUTED_EXPERT, *LINEAR_ROLES):
                    raise UserError(f"overrides: {pattern}: {parameter} is a {role}, which is never quantized")
                bits = None if own == KEEP else own
        return bits

    def to_json(self) -> dict[str, Any]:
        """A JSON object with every field, mtp_bits unless KEEP; equal to itself after a round trip through a file."""
        experts = [[name, list(bits)] for name, bits in self.experts]
        made = dataclasses.asdict(self) | {"overrides": [list(pair) for pair in self.overrides], "experts": experts}
        if self.mtp_bits == KEEP:
            del made["mtp_bits"]
        return made

    def fitting(self, roles: Iterable[str]) -> Recipe:
        """Itself for a checkpoint of these roles, without what it says of others."""
        given = set(roles)
        routed = self.expert_bits != NOT_GIVEN or Role.ROUTED_EXPERT in given
        expert_bits, mtp_bits = self.expert_bits if routed else KEEP, self.mtp_bits if Role.MTP in given else KEEP
        return dataclasses.replace(self, expert_bits=expert_bits, mtp_bits=mtp_bits)


def from_json(value: Any, where: str = "recipe") -> Recipe:
    """The recipe of a JSON object; a field that is missing, unknown or invalid is a :class:`UserError`."""
    fields = {field.name for field in dataclasses.fields(Recipe)}
    if not isinstance(value, dict) or set(value) | {"mtp_bits"} != fields:
        raise UserError(f"{where}: expected an object with exactly the keys {', '.join(sorted(fields))}")
    return Recipe(**{"mtp_bits": KEEP, **value})


def read_allocation(path: str | Path) -> dict[str, tuple[tuple[str, Any], ...]]:
    """The fields ``overrides`` ({pattern: bits}) and ``experts`` ({module: bits of each expert}) of a JSON file, as
    TARGET_GIB writes it; one of the two may be missing."""
    value = read_json(path)
    found = {key: value[key] for key in ("overrides", "experts") if key in value} if isinstance(value, dict) else {}
    if not found or not all(isinstance(part, dict) and part for part in found.values()):
        raise UserError(f'{path}: has no object "overrides" or "experts"; TARGET_GIB of quantize.sh writes one')
    return {key: tuple(part.items()) for key, part in found.items()}


def recipe_record(checkpoint: str | Path) -> dict[str, Any] | None:
    """The recipe of a checkpoint as JSON for a result's record; None for one that was not quantized here."""
    return read_recipe(checkpoint).to_json() if (Path(checkpoint) / RECIPE_FILE).exists() else None


def quantized_note(checkpoint: str | Path) -> str:
    """A line that says that a source is no original, for a plan; empty for one that is."""
    for name in (RECIPE_FILE, "gguf.json"):
        if (Path(checkpoint) / name).exists():
            return f"note: {checkpoint} is quantized already ({name} in it): its rounding errors stay and others come on top\n"
    return ""


def read_recipe(checkpoint: str | Path) -> Recipe:
    """The recipe that made a quantized checkpoint."""
    path = Path(checkpoint) / RECIPE_FILE
    value = read_json(path)
    return from_json(value.get("recipe") if isinstance(value, dict) else None, str(path))


@dataclasses.dataclass(frozen=True)
class Job:
    """One tensor: quantized to ``bits``, or copied when ``bits`` is None."""

    name: str
    info: TensorInfo
    role: Role
    bits: float | None  # a fraction mixes two grids among the experts of a layer
    by_expert: tuple[int, ...] = ()  # bits of each expert of a fused tensor, whose mean ``bits`` is
    transposed: bool = False  # experts as [E, I, O]: groups lie along the second axis
    inner: Role | None = None  # within the block of multi-token prediction (families.role_in_block)

    @property
    def kind(self) -> Role:
        """Its role, that of multi-token prediction by what it is there."""
        return self.inner or self.role

    @property
    def inputs(self) -> int:
        """Inputs of the matrix, or of each of the matrices."""
        return self.info.shape[-2 if self.transposed else -1]

    def packed_bytes(self, recipe: Recipe) -> int:
        """Bytes of bit-packed codes and 16-bit scales (and zero points), or of the tensor itself when it is copied."""
        if self.bits is None:
            return self.info.bytes
        bits_a_group = 16 + zero_point_bits(recipe.method, int(self.bits))
        return math.ceil(self.info.numel * self.bits / 8) + math.ceil(self.info.numel * bits_a_group / recipe.group / 8)
