"""Every pipeline and every command explains itself with an example, and --dry-run plans without writing anything."""

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys

import pytest
from conftest import REPO

PIPELINES = sorted((REPO / "pipelines").glob("*.sh"))
MODULES = sorted((REPO / "src").glob("*/*.py"))
EXAMPLE = re.compile(r"(bash pipelines/[\w.]+\.sh|python src/\w+/\w+\.py)")


def is_command(module):
    """Whether a module is one: it has a last line that runs it, and does not say that another program starts it."""
    text = module.read_text()
    return '__name__ == "__main__"' in text and "Not a command" not in (ast.get_docstring(ast.parse(text)) or "")


COMMANDS = [module for module in MODULES if is_command(module)]


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.stem)
def test_a_command_explains_itself(module, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(module), "--help"])
    shown = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(shown):
        try:
            runpy.run_path(str(module), run_name="__main__")
        except SystemExit as end:
            code = end.code
    assert not code, shown.getvalue()
    lines = [line for line in shown.getvalue().splitlines() if EXAMPLE.search(line)]
    assert lines, f"{module.name} --help has no example line"
    own = [line for line in lines if module.name in line or "pipelines/" in line]
    assert own, f"the example of {module.name} is not its own: {lines}"


def test_modules_say_what_they_are():
    for module in MODULES:
        doc = ast.get_docstring(ast.parse(module.read_text())) or ""
        first = doc.split("\n\n")[0]
        assert first and len(first) < 200, f"{module.name}: its docstring begins with one short sentence"
        assert EXAMPLE.search(doc) or "Not a command" in doc, f"{module.name}: neither an example nor 'Not a command'"


def test_pipelines_explain_themselves_without_an_environment(tmp_path):
    """The comment on top is printed before any environment is made: without one, and without a Python to make it."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MOE_LOWBIT_VENV": str(tmp_path / "venv")}
    environment["MOE_LOWBIT_PYTHON"] = "/bin/false"
    for pipeline in PIPELINES:
        for where, name in ((REPO, f"pipelines/{pipeline.name}"), (pipeline.parent, pipeline.name)):
            command = ["bash", name, "--help"]
            done = subprocess.run(command, capture_output=True, text=True, cwd=where, env=environment, timeout=30)
            assert f"bash pipelines/{pipeline.name}" in done.stdout, (pipeline.name, done.stdout, done.stderr)
            goes_on = "OPTIONS_FOLLOW=1" in pipeline.read_text()
            assert done.returncode == (1 if goes_on else 0), (pipeline.name, done.stderr)
    assert not (tmp_path / "venv").exists()


def test_a_pipeline_that_takes_no_arguments_refuses_them(tmp_path):
    """Instead of running for an hour on `--dry-run`, before any environment is made."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MOE_LOWBIT_VENV": str(tmp_path / "venv")}
    alone = [pipeline for pipeline in PIPELINES if "OPTIONS_FOLLOW=none" in pipeline.read_text()]
    assert {"pages.sh", "smoke.sh"} <= {pipeline.name for pipeline in alone}
    for pipeline in alone:
        done = subprocess.run(["bash", pipeline, "--dry-run"], capture_output=True, text=True, env=environment, timeout=30)
        assert done.returncode == 2 and f"{pipeline.name} takes no arguments, but found --dry-run" in done.stderr, done.stderr
    assert not (tmp_path / "venv").exists()


def test_options_follow_the_comment():
    done = subprocess.run(["bash", REPO / "pipelines/eval.sh", "--help"], capture_output=True, text=True, env=own_environment())
    assert done.returncode == 0 and done.stdout.startswith("Accuracy of a model:"), done.stderr
    assert "--benchmarks BENCHMARKS" in done.stdout and "--dry-run" in done.stdout


def own_environment(**more):
    return os.environ | {"MOE_LOWBIT_VENV": sys.prefix} | more


def everything(directory):
    """Name, size and time of every file of a directory that git does not ignore."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=directory)
    found = [directory / name for name in listed.stdout.splitlines()]
    return {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in found if file.exists()}


@pytest.mark.slow
def test_dry_runs_plan_and_write_nothing(tmp_path):
    before = everything(REPO)
    tiny = {"MODEL": "models/razor-tiny", "OUT": str(tmp_path / "out"), "TAG": "dry", "SCRATCH": str(tmp_path)}
    cases = {
        ("quantize.sh",): (tiny | {"METHOD": "gptq_refit"}, ["6.70 MB if packed", "results/quantize/", "memory at most about"]),
        ("pack_gguf.sh",): (tiny, ["4.3075 bits a weight", "results/pack/", "out/razor-tiny-IQ3_XXS.gguf"]),
        ("distill.sh",): ({"WORK": str(tmp_path / "opd")}, ["at most 65,536 tokens", "adapter 5.2 MB"]),
        ("eval.sh", "--model", REPO / "models/razor-tiny", "--tag", "dry"): ({}, ["tiny_know          1,000", "results/eval/"]),
    }
    pipe = subprocess.PIPE
    started = {}
    for (name, *arguments), (environment, wanted) in cases.items():
        flag = ["--dry-run", *arguments] if name != "eval.sh" else [*arguments, "--dry-run"]
        command = ["bash", REPO / "pipelines" / name, *map(str, flag)]
        started[subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=own_environment(**environment))] = wanted
    for process, wanted in started.items():
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0 and "dry run: nothing was written" in stdout, stderr
        assert all(text in stdout for text in wanted), (wanted, stdout)
    assert everything(REPO) == before and not list(tmp_path.iterdir())


def test_rates_are_those_of_the_records(tmp_path):
    from records import write_result
    from size_model import duration, recorded_rates, times

    for tag, amount, seconds in (("slow", 100, 10.0), ("fast", 100, 2.0), ("none", 0, 1.0)):
        made = {"kind": "pack", "tag": tag, "started": 0.0, "seconds": seconds, "metrics": {"parameters": amount}}
        write_result(tmp_path / f"pack/{tag}.json", **made)
    rates = recorded_rates(tmp_path, "pack", lambda record: record["metrics"]["parameters"])
    assert [(rate, file.split("/")[-1]) for rate, file in rates.values()] == [(50.0, "fast.json")]
    assert times(rates, 360_000, "x")[0].split()[:2] == ["2.0", "h"]
    assert "no recorded rate" in times({}, 1, "x")[0]
    assert [duration(s) for s in (0.5, 12, 300, 7200)] == ["0.5 s", "12 s", "5 min", "2.0 h"]
