"""Settings: what wins, what is said of a slip, the command in full; and what a log shows of progress."""

import dataclasses
import io
import sys

import pytest
from tqdm import tqdm

from console import Lines, UserError
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


def test_a_part_of_a_file(parse, tmp_path):
    parse(text="MODEL=m\nPOWER=0.3\n")
    assert read_part(Inner, tmp_path / "x.env") == Inner(0.3)


def test_progress_in_a_log_is_lines():
    log = io.StringIO()
    with tqdm(total=3, mininterval=0, miniters=0, file=Lines(log)) as bar:
        for _ in range(3):
            bar.update()
    assert "\r" not in log.getvalue() and log.getvalue().endswith("\n") and log.getvalue().count("\n") >= 3
