"""Settings: what wins, what is said of a slip, the command in full; and what a log shows of progress."""

import dataclasses
import io
import os
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

import llama_cpp
from console import Lines, UserError, progress
from settings import add_dry_run, parse_settings, part, read_part, setting


@dataclasses.dataclass(frozen=True)
class Inner:
    power: float = setting(0.0, "a number")
    text: str | None = setting(None, "a text")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    model: str = setting(help="a name")
    inner: Inner = part(Inner, power=0.5)
    packed: bool = setting(False, "a flag")
    kind: str = setting("a", "one of two", ("a", "b"))


@pytest.fixture
def parse(tmp_path, monkeypatch):
    for name in ("MODEL", "POWER", "TEXT", "PACKED", "KIND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    file = tmp_path / "x.env"

    def parsed(*argv, text=None):
        if text is not None:
            file.write_text(text)
            argv = ("--config", str(file), *argv)
        monkeypatch.setattr(sys, "argv", ["x.py", *argv])
        return parse_settings(Outer, "Doc.", add_dry_run)[0]

    return parsed


def test_an_option_wins_over_the_environment_and_that_over_the_file(parse, monkeypatch):
    monkeypatch.setenv("POWER", "0.1")
    assert parse("--model", "m") == Outer(model="m", inner=Inner(0.5))  # without --config the environment says nothing
    file = "MODEL=m\nPOWER=0.2\nTEXT=\nPACKED=1\n"
    assert parse(text=file) == Outer(model="m", inner=Inner(0.1), packed=True)
    assert parse("--power", "0", text=file).inner.power == 0
    assert sys.argv == ["x.py", "--model", "m", "--power", "0", "--packed"]  # the same, typed in full


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("MODEL=m\nPOWER=much\n", (), "x.env: POWER=much: expected float"),
        ("MODEL=m\nPOWR=1\n", (), "x.env: unknown key POWR; known: KIND, MODEL, PACKED, POWER, TEXT"),
        ("POWER=1\n", (), "x.env: MODEL not set"),
        ("MODEL=m\n", ("--kind", "c"), "--kind=c: expected one of a, b"),
        (None, (), "--model not set"),
    ],
)
def test_a_slip_is_one_line(parse, text, argv, message):
    with pytest.raises(UserError) as error:
        parse(*argv, text=text)
    assert str(error.value).endswith(message)


@pytest.mark.parametrize(
    "name,key",
    [("MODLE", "MODEL"), ("PAKCED", "PACKED"), ("PICKED", "PACKED"), ("PWER", "POWER")]
    + [(name, None) for name in ("POWERR", "MODELS", "MODE", "HOME", "TEST")],
)
def test_a_variable_that_is_nearly_a_key_is_named(parse, monkeypatch, name, key):
    monkeypatch.setenv(name, "1")
    if key is None:
        assert parse(text="MODEL=m\n").model == "m"
        return
    with pytest.raises(UserError, match=f"sets {name}, which is no key; {key} is"):
        parse(text="MODEL=m\n")


@dataclasses.dataclass(frozen=True)
class Places:
    out: Path | None = setting(None, "a path")
    text: str | None = setting(None, "a text that may be a file", file=True)
    kind: str = setting("a", "a word")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({"OUT": "m"}, {"out": Path("CALLER/m")}),  # relative to the directory that the user calls from
        ({"OUT": "../m", "TEXT": "t.txt"}, {"out": Path("CALLER/../m"), "text": "CALLER/t.txt"}),
        ({"OUT": "/m", "TEXT": "hf:a@b:c", "KIND": "t.txt"}, {"out": Path("/m"), "text": "hf:a@b:c", "kind": "t.txt"}),
        ({"TEXT": "@later"}, {"text": "@CALLER/later"}),  # a list in a file that need not be there yet
        ({"OUT": ""}, {"out": None}),
        ({"CONFIG": "mine.env"}, {"out": Path("in/repository")}),  # what a file says is relative to the repository
    ],
)
def test_what_is_typed_is_relative_to_where_it_is_typed(tmp_path, monkeypatch, typed, expected):
    caller, repository = tmp_path / "caller", tmp_path / "repository"
    for folder in (caller, repository):
        folder.mkdir()
        (folder / "own.env").write_text("\n")
    (caller / "t.txt").touch()
    (caller / "mine.env").write_text("OUT=in/repository\n")
    monkeypatch.chdir(repository)
    for name in ("OUT", "TEXT", "KIND", "CONFIG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"MOE_LOWBIT_CALLER": str(caller), **typed}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["x.py", "--config", typed.get("CONFIG", "own.env")])
    real = lambda value: type(value)(os.path.normpath(str(value).replace("CALLER", str(caller)))) if value else value  # noqa: E731
    assert parse_settings(Places, "Doc.")[0] == Places(**{key: real(value) for key, value in expected.items()})
    inside = repository / "deeper"
    inside.mkdir()
    monkeypatch.setenv("MOE_LOWBIT_CALLER", str(inside))
    monkeypatch.setenv("OUT", "m")
    monkeypatch.delenv("CONFIG", raising=False)
    monkeypatch.setattr(sys, "argv", ["x.py", "--config", "own.env"])
    assert parse_settings(Places, "Doc.")[0].out == Path("deeper/m")


def test_a_part_of_a_file(parse, tmp_path):
    parse(text="MODEL=m\nPOWER=0.3\n")
    assert read_part(Inner, tmp_path / "x.env") == Inner(0.3)


def test_progress_in_a_log_is_lines():
    log = io.StringIO()
    with tqdm(total=3, mininterval=0, miniters=0, file=Lines(log)) as bar, tqdm(total=1, file=Lines(log), position=1):
        for _ in range(3):
            bar.update()
    shown = log.getvalue()
    assert "\r" not in shown and "\x1b" not in shown and shown.endswith("\n") and shown.count("\n") >= 3


def test_a_bar_is_drawn_by_the_clock(monkeypatch):
    """Not at the first update of a batch, which would give a batch's time to one item; what a resumed run found has no rate."""
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with progress(12, "work", done=4) as bar:
        bar._steps, before = 0.05, len(log.getvalue())  # from the second line on
        for _ in range(8):
            bar.update()
        assert len(log.getvalue()) == before and bar.format_dict["initial"] == 4
    assert "12/12" in log.getvalue() and log.getvalue().count("\n") == 2
    with progress(3, "quick", delay=60) as bar:
        bar.update(3)
    assert "quick" not in log.getvalue()


@pytest.mark.parametrize(
    "said,unit,last",
    [
        ("[1/3] a\n[ 3/ 3] b - [ 256, 8, 1]\n", "file", "3/3"),
        ("calculating perplexity over 9 chunks, n_ctx\n[1]4.1,[2]5,[7]3.1,", "chunk", "7/9"),
        ("computing over 9 chunks, n_ctx\n   1   13.4 ± 4 \n   8   10.7 ± 2 \n", "chunk", "8/9"),
        ("Writing:  12%|#  | 1/8\rWriting:  50%|## | 4/8", "%", "50/100"),
        ("[1] a footnote\n", "file", ""),
    ],
)
def test_steps_of_a_tool_move_a_bar(monkeypatch, said, unit, last):
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr(llama_cpp, "progress", lambda *given, **_: progress(*given))
    code, output = llama_cpp.watched([sys.executable, "-c", f"import sys; print({said!r}, end='', file=sys.stderr)"], "t", unit)
    assert (code, output) == (0, said) and (last in log.getvalue() if last else not log.getvalue())
