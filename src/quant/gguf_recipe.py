"""Which ggml type each tensor of a GGUF gets: a base type and patterns, with llama.cpp's substitutions.

Not a command. `types_of({"blk.0.ffn_up_exps.weight": (8, 256, 256)}, "IQ3_XXS", read_patterns(path))`. The rule is that of
`llama-quantize --pure --tensor-type-file`: the first pattern that is found in the name, else the base type; norms, routers,
convolutions and vectors stay float32; a row that is no multiple of the type's block gets a type with a smaller one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from console import UserError
from ggml_types import TYPES, fallback

Patterns = Sequence[tuple[str, str]]
BY_LOWER = {name.lower(): name for name in TYPES}
# The types that llama.cpp refuses without an importance matrix: tensor_requires_imatrix in llama-quant.cpp.
NEED_IMPORTANCE = ("iq3_xxs", "iq2_xxs", "iq2_xs", "iq2_s")
# general.file_type of a file with this base type (gguf.LlamaFileType); others are MOSTLY_NAME.
FILE_TYPES = {"f32": "ALL_F32", "q3_K": "MOSTLY_Q3_K_M", "q4_K": "MOSTLY_Q4_K_M", "q5_K": "MOSTLY_Q5_K_M"}


def type_named(text: str, where: str) -> str:
    """The name of a type as llama.cpp spells it, from any case; :class:`UserError` on another word."""
    if text.lower() not in BY_LOWER:
        raise UserError(f"{where}: type {text!r} is unknown; known: {', '.join(TYPES)}")
    return BY_LOWER[text.lower()]


def file_type(base: str) -> int:
    import gguf

    return int(gguf.LlamaFileType[FILE_TYPES.get(base, f"MOSTLY_{base.upper()}")])


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
