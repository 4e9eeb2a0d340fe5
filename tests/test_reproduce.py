"""The pipeline that results/RESULTS.md names above a row makes that row's record: each pipeline runs with an interpreter that
only notes what it is asked, and every committed record must be among what it would write."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPO

import study_recovery
import study_text
from page_results import RENAMED, commands
from page_tables import BEFORE, PIPELINES, pipeline_of
from records import read_result
from settings import parse_settings, read_env_file

KINDS = {
    "vllm_eval8": "eval", "mm_eval": "eval", "compare_tags": "compare", "moe_eval": "kl", "gguf_kl": "kl",
    "study_spread": "spread", "panel": "panel",
    "quant_save": "quantize", "packed_export": "quantize", "gguf_pack": "pack", "vllm_tokens": "probe",
    "speed_families": "bench", "speed_gguf": "bench", "speed_eval": "bench", "speed_quant": "bench",
    "speed_multi_gpu": "bench", "tiny_train": "train", "tiny_corpus": "train", "distill_run": "distill",
}  # fmt: skip
STUB = """#!/bin/sh
printf '%s\\t%s\\n' "${TAG:-}" "$*" >>"$ASKED"
[ "$1" != -c ] || echo 0
"""


def records_of(tag: str, arguments: list[str]) -> set[str]:
    """kind/tag of the records that a command would write; ``tag``: what its environment says."""
    if KINDS.get(next((Path(word).stem for word in arguments if word.endswith(".py")), "")) == "kl":
        return {f"kl/{word}" for option, word in itertools.pairwise(arguments) if option in ("--tag", "--pairs")}
    found = record_of(tag, arguments)
    return {found} if found else set()


def record_of(tag: str, arguments: list[str]) -> str | None:
    """The same of a command that writes one."""
    kind = KINDS.get(next((Path(word).stem for word in arguments if word.endswith(".py")), ""))
    given = dict(zip(arguments, arguments[1:]))
    if kind == "compare":
        tags = [word for place, word in enumerate(arguments[1:], 1) if not word.startswith("--")
                and arguments[place - 1] not in ("--teacher", "--results")]  # fmt: skip
        tag = "__".join(filter(None, [given.get("--teacher"), *tags]))
    elif kind == "train":
        tag = Path(given["--result"]).stem if "--result" in given else None
    elif kind == "distill":
        tag = tag or read_env_file(REPO / given["--config"])["TAG"]
    elif "--part" in given:
        tag = f"multi_gpu_{given['--part']}"
    else:
        tag = given.get("--tag", tag)
    return f"{kind}/{tag}" if kind and tag else None


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """The pipelines without records, models or packages: nothing that exists is skipped, nothing is computed."""
    root = tmp_path_factory.mktemp("repo")
    for name in ("pipelines", "configs"):
        shutil.copytree(REPO / name, root / name)
    shutil.copy(REPO / "env.sh", root)
    stub = root / "venv/bin/python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    (root / "venv/.moe-lowbit-ready").touch()
    return root


def asked(root: Path, pipeline: str) -> set[str]:
    """The records that a pipeline would write."""
    log = root / "asked.txt"
    log.write_text("")
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG") if key in os.environ}
    own = {"ASKED": log, "MOE_LOWBIT_VENV": root / "venv", "MOE_LOWBIT_VLLM_VENV": root / "venv", "SHM": root / "shm"}
    own |= {"WORK": root / "work"}
    if pipeline == "bench.sh h100":
        own |= {"PYTHON": root / "venv/bin/python", "LLAMA_CPP": root / "no-llama"}
        own |= {"PARTS": "disk gptq ldlq gguf eval_tiny eval_35b packed"}  # the last only where it is named
    command = ["bash", *shlex.split(f"pipelines/{pipeline}")]
    environment = kept | {key: str(value) for key, value in own.items()}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=60)
    assert done.returncode == 0, f"{pipeline}: {done.stderr}"
    lines = [line.split("\t") for line in log.read_text().splitlines()]
    return set().union(*(records_of(tag, arguments.split()) for tag, arguments in lines if arguments))


def asked_by_the_study(tmp_path, monkeypatch) -> set[str]:
    """The same of recovery.sh, whose parts are in Python; part default is the shell's."""
    argv = ["--config", str(REPO / study_recovery.STUDY), "--results", str(tmp_path)]
    study, _ = parse_settings(study_recovery.StudySettings, "", argv=argv)
    found = set()

    def note(script: str, *arguments: object) -> None:
        name = record_of("", [script, *map(str, arguments)])
        if name:
            found.add(name)
            (tmp_path / f"{name}.json").parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}.json").touch()

    monkeypatch.setattr(study_recovery, "run_inside", note)
    study_recovery.run_part(study, "before")
    for stage in (stage for part in study_recovery.stages(study).values() for stage in part):
        found.add(f"distill/{stage.tag}")
        if stage.evaluate:
            study_recovery.evaluate(study, study.work / stage.tag / "recovered", stage.tag)
    study_recovery.run_part(study, "compare")
    shell = (REPO / "pipelines/recovery.sh").read_text()
    return found | {f"distill/{tag}" for tag in re.findall(r"TAG=(\w+) bash pipelines/distill.sh", shell)}


def test_every_row_is_made_by_the_pipeline_that_the_page_names(elsewhere, tmp_path, monkeypatch):
    wanted: dict[str, set[str]] = {}
    for file in sorted(REPO.glob("results/*/*.json")):
        record = read_result(file)
        pipeline = pipeline_of(record)
        assert pipeline, f"{file.name}: page_tables.PIPELINES has no pipeline for it"
        wanted.setdefault(pipeline, set()).add(f"{record['kind']}/{record['tag']}")
    for pipeline in dict.fromkeys(pipeline for _, pipeline in PIPELINES if pipeline != BEFORE):
        study, names = pipeline == "recovery.sh", wanted.get(pipeline, set())
        made = asked_by_the_study(tmp_path, monkeypatch) if study else asked(elsewhere, pipeline)
        if pipeline.startswith("study_text.sh"):  # its rows are in Python
            rows = ["original", "pairs", *(row.name for row in study_text.all_rows(3))]
            made = {name for name in names if re.search(rf"_({'|'.join(rows)})(_[a-z]+)?$", name)} or set(rows)
        assert made and names <= made, f"{pipeline} does not make {sorted(names - made)}"


def test_a_command_of_a_record_exists_or_is_said_to_be_renamed():
    gone = set()
    for file in REPO.glob("results/*/*.json"):
        script = next(word for word in read_result(file)["command"] if word.endswith(".py"))
        if not (REPO / script).is_file():
            gone.add(Path(script).stem)
    modules = {file.stem for file in REPO.glob("src/*/*.py")}
    assert gone == set(RENAMED) and {name.split()[0] for name in RENAMED.values()} <= modules


def test_commands_stand_under_their_pipelines():
    rows = [{"kind": "kl", "tag": tag, "command": ["python", tag]} for tag in ("razor_tiny_bf16", "razor_tiny_int4", "mine")]
    shown = commands([("", row) for row in rows])
    assert shown[2:-2] == [
        "# bash pipelines/results.sh tiny",
        "python razor_tiny_bf16",
        "python razor_tiny_int4",
        "# by hand",
        "python mine",
    ]
