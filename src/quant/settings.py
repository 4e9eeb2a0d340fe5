"""Read a configs/*.env file into a frozen dataclass: KEY=VALUE lines, no shell evaluation, unknown keys refused.

Not a command. `load_config(Recipe, "configs/smoke_tiny.env")` fills the field `expert_bits` from `EXPERT_BITS=3`.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from console import UserError

T = TypeVar("T")


def read_env_file(path: str | Path) -> dict[str, str]:
    """KEY=VALUE pairs of a file. `#` starts a comment at the line's start or after a space; quotes are stripped."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    pairs: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"{path}:{number}: expected KEY=VALUE, found {text!r}")
        if key in pairs:
            raise UserError(f"{path}:{number}: {key} is set twice")
        pairs[key] = value.split(" #")[0].strip().strip("\"'")
    return pairs


def convert(value: str, kind: type, where: str) -> Any:
    """A string as bool, int, float or str; a value that does not fit is a :class:`UserError` that says where."""
    if kind is bool:
        if value not in ("0", "1"):
            raise UserError(f"{where}={value}: expected 0 or 1")
        return value == "1"
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{where}={value}: expected {kind.__name__}") from None


def build_config(cls: type[T], pairs: Mapping[str, str], where: str) -> T:
    """An instance of the dataclass ``cls`` from upper-case keys; fields without a key keep their defaults."""
    kinds = typing.get_type_hints(cls)
    fields = {field.name.upper(): field for field in dataclasses.fields(cls)}
    unknown = sorted(set(pairs) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    missing = [
        key
        for key, field in fields.items()
        if key not in pairs and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: {', '.join(missing)} not set")
    values = {fields[key].name: convert(value, kinds[fields[key].name], f"{where}: {key}") for key, value in pairs.items()}
    return cls(**values)


def from_environment(cls: type) -> dict[str, str]:
    """The upper-case keys of the dataclass ``cls`` that the environment sets."""
    keys = [field.name.upper() for field in dataclasses.fields(cls)]
    return {key: os.environ[key] for key in keys if key in os.environ}


def load_config(cls: type[T], path: str | Path, overrides: Mapping[str, str] | None = None) -> T:
    """Read ``path`` and build ``cls``; ``overrides`` (same upper-case keys) win over the file."""
    return build_config(cls, {**read_env_file(path), **(overrides or {})}, str(path))
