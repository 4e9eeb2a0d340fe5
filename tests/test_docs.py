"""The documents against the code: every command names a script and options that exist, every link leads somewhere, and what is
shown with its output is run and compared."""

import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import REPO

from settings import read_env_file

DOCUMENTS = sorted([REPO / "README.md", *REPO.glob("docs/*.md"), REPO / "configs/README.md", REPO / "archive/README.md",
                    *REPO.glob("models/*/README.md")])  # fmt: skip
COMMAND = re.compile(r"(?:[A-Z_]+=\S* )*(?:bash pipelines/|python src/).*")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
ASSIGNMENT = re.compile(r"[A-Z_][A-Z0-9_]*=")
ids = [str(document.relative_to(REPO)) for document in DOCUMENTS]


def commands(text):
    """The commands of a document: lines of fenced or indented blocks, and code spans, that begin with one."""
    text = text.replace("\\\n", " ")  # a command over several lines
    prose = FENCE.sub("", text)
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    lines += [line[4:] for line in prose.splitlines() if line.startswith("    ")]
    lines += re.findall(r"`([^`\n]+)`", prose)
    lines = [line.removeprefix("$ ") for line in lines]
    return [line for line in lines if COMMAND.fullmatch(line)]


def words(command):
    """(environment keys, script, its arguments) of a command; comments and placeholders of a synopsis are left out."""
    text = re.split(r"\s#\s|\s\|\s", command)[0]
    parts = shlex.split(re.sub(r"[\[\]]|\.\.\.", " ", text))
    keys = [part.partition("=")[0] for part in parts if ASSIGNMENT.match(part)]
    rest = [part for part in parts if not ASSIGNMENT.match(part)]
    return keys, rest[1], rest[2:]


@functools.cache
def options_of(module):
    """The long options that a module's --help shows, by its own parser."""
    shown, argv = io.StringIO(), sys.argv
    sys.argv = [str(module), "--help"]
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            runpy.run_path(str(REPO / module), run_name="__main__")
    finally:
        sys.argv = argv
    return frozenset(re.findall(r"--[a-z][\w-]*", shown.getvalue())) | {"--help"}


@functools.cache
def known_options(script):
    """Options of a module, or of all modules that a pipeline runs and those that it reads itself."""
    if script.startswith("src/"):
        return options_of(script)
    text = (REPO / script).read_text()
    own = set(re.findall(r"--[a-z][\w-]*", text))
    return frozenset(own.union(*(options_of(module) for module in re.findall(r"src/\w+/\w+\.py", text))))


@functools.cache
def read_by(script):
    """All text in which a pipeline or module may read an environment key."""
    files = [REPO / script, REPO / "env.sh", *REPO.glob("configs/*.env")]
    files += [REPO / name for name in re.findall(r"src/\w+/\w+\.py", (REPO / script).read_text())]
    return "\n".join(file.read_text() for file in files)


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_commands_exist(document):
    for command in commands(document.read_text()):
        keys, script, arguments = words(command)
        assert (REPO / script).is_file(), f"{command}: no {script}"
        options = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        if script != "pipelines/test.sh":  # its arguments are pytest's
            assert options <= known_options(script), f"{command}: {sorted(options - known_options(script))} unknown"
        for key in keys:
            is_setting = "--" + key.lower().replace("_", "-") in known_options(script)
            assert is_setting or re.search(rf"\b{key}\b", read_by(script)), f"{command}: nothing reads {key}"
        for word in [*arguments, *(part.partition("=")[2] for part in command.split() if ASSIGNMENT.match(part))]:
            if re.match(r"(configs|docs|results|models/razor)[\w./-]*\.\w+$", word) and not re.search(r"[A-Z]{2,}\.|TAG", word):
                assert (REPO / word).exists(), f"{command}: no {word}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", document.read_text())):
        if not target.startswith(("http://", "https://", "#")):
            assert (document.parent / target.partition("#")[0]).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_lines_are_short(document):
    """At most 120 characters, but for tables and for what a command printed."""
    text = FENCE.sub(lambda block: "" if block[1].startswith("$ ") else block[0], document.read_text())
    long = [line for line in text.splitlines() if len(line) > 120 and not line.lstrip().startswith("|")]
    assert not long, f"{document.name}: {long}"


def shown_runs():
    """(document, command, its output) of the blocks that begin with "$ command"."""
    for document in DOCUMENTS:
        for block in FENCE.findall(document.read_text()):
            if block.startswith("$ "):
                command, _, output = block[2:].partition("\n")
                yield pytest.param(command, output, id=f"{document.name}: {command[:40]}")


def run(command, **environment):
    environment = os.environ | {"MOE_LOWBIT_VENV": sys.prefix, **environment}
    start = f"source env.sh && {command}" if "python src/" in command else command
    return subprocess.run(["bash", "-c", start], capture_output=True, text=True, cwd=REPO, env=environment, timeout=120)


@pytest.mark.parametrize(("command", "output"), list(shown_runs()))
def test_shown_output_is_real(command, output):
    done = run(command)
    assert done.stdout == output, done.stderr


CHEAP = (
    "python src/distill/opd_budget.py",
    "python src/eval/check_results.py docs/EVAL_PROTOCOL.md",
    "bash pipelines/distill.sh --dry-run",
)


def test_cheap_commands_run():
    everything = [command for document in DOCUMENTS for command in commands(document.read_text())]
    for command in CHEAP:
        assert any(command in line for line in everything), f"{command} is in no document any more"
        done = run(command)
        assert done.returncode == 0, done.stderr


def test_the_skeleton_of_the_pipeline_document(tmp_path):
    text = (REPO / "docs/MOE_PIPELINE.md").read_text()
    make, plan = (line for line in commands(text) if "skeleton-122b" in line)
    done = run(f"{make} && {plan}".replace("work/skeleton-122b", str(tmp_path / "skeleton")), SCRATCH=str(tmp_path))
    assert done.returncode == 0 and "49,430.17 MB if packed" in done.stdout, done.stderr


def test_every_key_of_every_config_is_explained():
    """Keys stand in the tables of configs/README.md, which page_house writes; eval.env has families of keys."""
    explained = set(re.findall(r"`([A-Z_0-9]+)`", (REPO / "configs/README.md").read_text()))
    for config in REPO.glob("configs/*.env"):
        for key in read_env_file(config):
            kind, *names = key.split("__")
            key = f"{kind}__NAME" + "__BENCHMARK" * (len(names) == 2) if config.name == "eval.env" and names else key
            assert key in explained, f"{config.name}: configs/README.md does not explain {key}"
    for file in REPO.glob("configs/*.*"):
        assert file.name == "README.md" or f"`{file.name}`" in (REPO / "configs/README.md").read_text(), file.name


def test_pages_of_modules_and_keys_are_current(command):
    done = command("src/eval/page_house.py", "--check")
    assert done.returncode == 0, done.stdout


def test_the_index_has_every_document():
    index = (REPO / "docs/README.md").read_text()
    for document in REPO.glob("docs/*.md"):
        assert document.name == "README.md" or f"({document.name})" in index, f"{document.name} is not in docs/README.md"
