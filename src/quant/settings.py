"""Settings, each declared once as a field of a typed dataclass: options, the environment and a KEY=VALUE file set it.

Not a command.

    @dataclass(frozen=True)
    class Settings:
        model: Path = setting(help="checkpoint directory")      # no default: it must be set
        recipe: Recipe = part(Recipe)                           # the fields of another declaration, among these
        packed: bool = setting(False, "4 bits a weight")

    settings = parse_settings(Settings, __doc__)

Not a command. An option (--expert-bits 3) wins over the environment (EXPERT_BITS=3), which wins over the file of --config, and
that over the default. The environment counts only where --config is given, so that a command typed in full means what it says;
such a command is printed, and is what a record says, where --config was given. Files are read without shell evaluation; an
unknown key is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from console import UserError

T = TypeVar("T")
NOTHING = dataclasses.MISSING


def setting(default: Any = NOTHING, help: str = "", choices: tuple[str, ...] = (), file: bool = False) -> Any:
    """A field of a settings dataclass; without a ``default`` it must be set. ``file``: a text that may name a file."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "file": file})


def part(cls: type, **defaults: Any) -> Any:
    """A field that holds another dataclass, whose fields are settings too; ``defaults`` differ from its own here."""
    return dataclasses.field(default=NOTHING, metadata={"part": cls, "defaults": defaults})


def same(cls: type, name: str, default: Any = NOTHING) -> Any:
    """A field that another dataclass declares, here without its other fields; with a default of its own where one is given."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    return dataclasses.field(default=field.default if default is NOTHING else default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting: ``name`` of the field, ``kind`` of its values, ``optional`` where nothing (an empty text) is a value."""

    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...]
    file: bool = False

    @property
    def variable(self) -> str:
        """Its name in files and in the environment."""
        return self.name.upper()

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    def value(self, text: str, where: str) -> Any:
        """The value that ``text`` says; :class:`UserError` that begins with ``where`` if it says none."""
        if not text and (self.optional or self.kind is bool):
            return None if self.optional else False
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
            said = (field.metadata.get(about, none) for about, none in (("help", ""), ("choices", ()), ("file", False)))
            yield Key(field.name, kind, optional, default, *said)


def made(cls: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass with ``values`` by field name, its parts made of the same values; what has no value keeps its default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if inner := field.metadata.get("part"):
            found[field.name] = made(inner, {**field.metadata["defaults"], **values})
        elif field.name in values:
            found[field.name] = values[field.name]
    return cls(**found)


def add_settings(parser: argparse.ArgumentParser | argparse._ArgumentGroup, cls: type) -> None:
    """An option for every setting of a dataclass."""
    for key in keys_of(cls):
        shown = key.help if key.default in (NOTHING, None, "", False) else f"{key.help} (default {key.default})"
        more: dict[str, Any] = {"action": "store_const", "const": "1"} if key.kind is bool else {"metavar": key.variable}
        parser.add_argument(key.option, help=shown.replace("%", "%%"), **more)
        if key.kind is bool and key.default is True:
            off = key.option.replace("--", "--no-", 1)
            parser.add_argument(off, dest=key.name, action="store_const", const="0", help=f"not {key.option}")


def settings_of(cls: type[T], args: argparse.Namespace, config: Path | None = None) -> T:
    """The settings that the options of :func:`add_settings` say, with ``config`` also the environment and that file."""
    keys = list(keys_of(cls))
    texts = texts_of(config) if config else {}
    if config:
        check_environment([key.variable for key in keys], os.environ)
        texts |= {k.variable: (k.variable, typed_path(k, os.environ[k.variable])) for k in keys if k.variable in os.environ}
    for key in keys:
        if (given := getattr(args, key.name)) is not None:
            texts[key.variable] = (key.option, typed_path(key, given) if config else given)
    return from_texts(cls, keys, texts, config)


def edits(a: str, b: str) -> int:
    """Letters to change, add, drop or swap with their neighbour that make ``b`` of ``a`` (optimal string alignment)."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y)))
            if i > 1 and j > 1 and (x, y) == (b[j - 2], a[i - 2]):
                row[j] = min(row[j], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def check_environment(known: Sequence[str], names: Iterable[str]) -> None:
    """:class:`UserError` for a variable that is no key and a slip away from one: it would change nothing, without a word. A
    name that only goes on, or ends before (RESULTS for RESULT), is another program's."""
    for name in sorted(set(names) - set(known)):
        for key in known:
            longer = "_" not in key and (name.startswith(key) or key.startswith(name))
            if len(key) >= 5 and not longer and edits(name, key) <= (2 if len(key) >= 12 else 1):
                raise UserError(f"the environment sets {name}, which is no key; {key} is: correct it, or unset {name}")


def from_caller(text: str) -> str:
    """A path that a user typed, seen from the repository, where a pipeline has gone: MOE_LOWBIT_CALLER is where it was called.
    One inside the repository stays relative to it."""
    caller, here = os.environ.get("MOE_LOWBIT_CALLER"), os.getcwd()
    if not caller or not text or os.path.isabs(text) or caller == here or text.startswith("hf:"):
        return text
    found = os.path.normpath(os.path.join(caller, text))
    return os.path.relpath(found, here) if f"{found}{os.sep}".startswith(f"{here}{os.sep}") else found


def typed_path(key: Key, text: str) -> str:
    """What was typed for a setting: a path, or a text that is the name of a file, as :func:`from_caller` has it."""
    if key.file and text.startswith("@"):  # a list in a file, which may come to be there later
        return f"@{from_caller(text[1:])}"
    found = from_caller(text) if key.kind is Path or key.file else text
    return found if key.kind is Path or os.path.isfile(found) else text


def texts_of(path: str | Path) -> dict[str, tuple[str, str]]:
    """By variable of a file: what says it, and what it says."""
    return {name: (f"{path}: {name}", text) for name, text in read_env_file(path).items()}


def from_texts(
    cls: type[T], keys: Sequence[Key], texts: Mapping[str, tuple[str, str]], where: str | Path | None, part: bool = False
) -> T:
    """The dataclass that ``texts`` say; what they set beside its keys is an error, unless it is a ``part`` of theirs.
    ``where``: the file that should have set what is missing; None: the command line."""
    if unknown := sorted(set(texts) - {key.variable for key in keys}) if not part else []:
        known = ", ".join(sorted(key.variable for key in keys))
        raise UserError(f"{where}: unknown key {', '.join(unknown)}; known: {known}")
    if missing := [key for key in keys if key.default is NOTHING and key.variable not in texts]:
        names = ", ".join(key.variable if where else key.option for key in missing)
        raise UserError(f"{where}: {names} not set" if where else f"{names} not set")
    said = {key.name: key.value(*reversed(texts[key.variable])) for key in keys if key.variable in texts}
    return made(cls, {key.name: key.default for key in keys} | said)


class ShowKeys(argparse.Action):
    """An option that ends like --help: the table of the settings."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print("\n".join(table_of_keys(self.const)), flush=True)
        parser.exit()


def parse_settings(
    cls: type[T], doc: str, add: Callable[[argparse.ArgumentParser], Any] | None = None, argv: list[str] | None = None
) -> tuple[T, argparse.Namespace]:
    """(the settings, the parsed command line). ``doc``: the module's docstring; ``add`` declares options that are no settings
    (--tag, --dry-run)."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("--config", type=Path, help="KEY=VALUE file of the settings below; the environment may change them")
    parser.add_argument("--keys", action=ShowKeys, nargs=0, const=cls, help="print the keys of such a file as a table, and end")
    add_settings(parser, cls)
    if add:
        add(parser)
    args = parser.parse_args(argv)
    if args.config and os.environ.get("CONFIG") == str(args.config):  # else it is the pipeline's own, of the repository
        args.config = Path(from_caller(str(args.config)))
    settings = settings_of(cls, args, args.config)
    if args.config and argv is None:  # the record names the command in full
        sys.argv[1:] = typed(settings)
        print("+ " + shlex.join(["python", *sys.argv]), flush=True)
    return settings, args


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the plan with sizes and times, and write nothing")


def values_of(settings: Any) -> dict[str, Any]:
    """What a dataclass of settings holds, by name, its parts among it."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        found |= values_of(value) if field.metadata.get("part") else {field.name: value}
    return found


def typed(settings: Any, cls: type | None = None) -> list[str]:
    """The options that say ``settings``, or only those that the declaration ``cls`` has too; what is at its default is left
    out."""
    options, held = [], values_of(settings)
    for key in keys_of(cls or type(settings)):
        value = held[key.name]
        if value == key.default or value is None:
            continue
        if key.kind is bool:
            options.append(key.option if value else key.option.replace("--", "--no-", 1))
        else:
            options += [key.option, exact(value) if key.kind is float else str(value)]
    return options


def exact(value: float) -> str:
    """The shortest text of a number that reads as the same number."""
    short = f"{value:.12g}"
    return short if float(short) == value else repr(value)


def read_part(cls: type[T], path: str | Path) -> T:
    """The settings of one declaration from a file that sets those of others too."""
    return from_texts(cls, list(keys_of(cls)), texts_of(path), path, part=True)


def table_of_keys(cls: type) -> list[str]:
    """The settings of a dataclass as a Markdown table, for configs/README.md."""
    lines = ["| key | meaning | default |", "| --- | --- | --- |"]
    for key in keys_of(cls):
        default = "" if key.default in (NOTHING, None, "") else key.default
        shown = f" {default:g}" if isinstance(default, int | float) else f" {default}" if default else ""
        lines.append(f"| `{key.variable}` | {key.help} |{shown} |")
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
