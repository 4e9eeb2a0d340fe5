"""Settings, each declared once as a field of a typed dataclass: options, the environment and a KEY=VALUE file set it.

    @dataclass(frozen=True)
    class Settings:
        model: Path = setting(help="checkpoint directory")      # no default: it must be set
        recipe: Recipe = part(Recipe)                           # the fields of another declaration, among these
        packed: bool = setting(False, "4 bits a weight")

    settings = parse_settings(Settings, __doc__)

An option (--expert-bits 3) wins over the environment (EXPERT_BITS=3), which wins over the file of --config, which wins over
the default. The environment counts only where --config is given, so that a command typed in full means what it says. Files are
read without shell evaluation; an unknown key is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from console import UserError

T = TypeVar("T")
NOTHING = dataclasses.MISSING


def setting(default: Any = NOTHING, help: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A field of a settings dataclass; without a ``default`` it must be set."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def part(cls: type, **defaults: Any) -> Any:
    """A field that holds another dataclass, whose fields are settings too; ``defaults`` differ from its own here."""
    return dataclasses.field(default=NOTHING, metadata={"part": cls, "defaults": defaults})


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting: ``name`` of the field, ``kind`` of its values, ``optional`` where nothing (an empty text) is a value."""

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]

    @property
    def variable(self) -> str:
        """Its name in files and in the environment."""
        return self.name.upper()

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def value(self, text: str, where: str) -> Any:
        """The value that ``text`` says; :class:`UserError` that begins with ``where`` if it says none."""
        if self.optional and not text:
            return None
        found = convert(text, self.kind, where)
        if self.choices and found not in self.choices:
            raise UserError(f"{where}={text}: expected one of {', '.join(self.choices)}")
        return found


def keys_of(cls: type, **defaults: Any) -> Iterator[Key]:
    """The settings that a dataclass declares, those of its parts among them. A field without help or part is no setting, if it
    has a default."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if inner := field.metadata.get("part"):
            yield from keys_of(inner, **field.metadata["defaults"])
        elif "help" in field.metadata or field.default is NOTHING and field.default_factory is NOTHING:
            kind, optional = kinds[field.name], False
            if isinstance(kind, types.UnionType):
                kind, optional = typing.get_args(kind)[0], True
            default = defaults.get(field.name, field.default)
            yield Key(field.name, kind, optional, default, field.metadata.get("help", ""), field.metadata.get("choices", ()))


def made(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass with ``values`` by field name, its parts made of the same values; what has no value keeps its default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if inner := field.metadata.get("part"):
            found[field.name] = made(inner, {**field.metadata["defaults"], **values})
        elif field.name in values:
            found[field.name] = values[field.name]
    return cls(**found)


def parse_settings(
    cls: type[T], doc: str, add: Callable[[argparse.ArgumentParser], None] | None = None, argv: list[str] | None = None
) -> tuple[T, argparse.Namespace]:
    """(the settings, the parsed command line). ``doc``: the module's docstring; ``add`` declares options that are no settings
    (--tag, --dry-run)."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--config", type=Path, help="KEY=VALUE file of the settings below; the environment may change them")
    keys = list(keys_of(cls))
    for key in keys:
        shown = key.help if key.default in (NOTHING, None, "", False) else f"{key.help} (default {key.default})"
        more: dict[str, Any] = {"action": "store_const", "const": "1"} if key.kind is bool else {"metavar": key.variable}
        parser.add_argument(key.option, help=shown.replace("%", "%%"), **more)
    if add:
        add(parser)
    args = parser.parse_args(argv)
    texts: dict[str, tuple[str, str]] = {}  # by variable: what says it, and what it says
    if args.config:
        texts = {name: (f"{args.config}: {name}", text) for name, text in read_env_file(args.config).items()}
        if unknown := sorted(set(texts) - {key.variable for key in keys}):
            known = ", ".join(sorted(key.variable for key in keys))
            raise UserError(f"{args.config}: unknown key {', '.join(unknown)}; known: {known}")
        texts |= {k.variable: (k.variable, os.environ[k.variable]) for k in keys if k.variable in os.environ}
    for key in keys:
        if (given := getattr(args, key.name)) is not None:
            texts[key.variable] = (key.option, given)
    if missing := [key for key in keys if key.default is NOTHING and key.variable not in texts]:
        where = f"{args.config}: " if args.config else ""
        raise UserError(where + ", ".join(k.variable if args.config else k.option for k in missing) + " not set")
    values = {k.name: k.value(texts[k.variable][1], texts[k.variable][0]) if k.variable in texts else k.default for k in keys}
    return made(cls, values), args


def table_of_keys(cls: type) -> list[str]:
    """The settings of a dataclass as a Markdown table, for configs/README.md."""
    lines = ["| key | meaning | default |", "| --- | --- | --- |"]
    for key in keys_of(cls):
        default = "" if key.default in (NOTHING, None, "") else int(key.default) if key.kind is bool else key.default
        lines.append(f"| `{key.variable}` | {key.help} | {default} |")
    return lines


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
    """A string as bool, int, float, path or str; a value that does not fit is a :class:`UserError` that says where."""
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
    fields = {field.name.upper(): field for field in dataclasses.fields(typing.cast(Any, cls))}
    unknown = sorted(set(pairs) - set(fields))
    if unknown:
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    missing = [
        key
        for key, field in fields.items()
        if key not in pairs and field.default is NOTHING and field.default_factory is NOTHING
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
