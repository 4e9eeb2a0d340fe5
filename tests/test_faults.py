"""Every command against a full disk, an output that cannot be made and JSON of another kind: one line, exit 2, nothing left."""

import contextlib
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import REPO
from safetensors.torch import load_file, save_file

from quant_save import quantize_checkpoint
from recipe import Recipe

FOREIGN = {
    "a list": b"[1, 2]", "null": b"null", "a text": b'"text"', "an object": b'{"a": 1}', "an empty object": b"{}",
    "no JSON": b"{not json", "nothing": b"", "not UTF-8": b"\xff\xfe{}", "a record": b'{"schema": 1, "kind": "kl"}',
}  # fmt: skip
RECORD = "results/eval/razor_tiny_bf16"


@pytest.fixture(scope="module")
def things(random_tiny, tmp_path_factory):
    """What the commands work on: m (a model), q (quantized), p (packed), g/*.gguf, results, and files of small JSON."""
    from checkpoint import Checkpoint
    from gguf_pack import write_pack
    from pack_plan import plan_pack
    from packed_export import pack

    root = tmp_path_factory.mktemp("things")
    shutil.copytree(random_tiny, root / "m")
    quantize_checkpoint(root / "m", root / "q", Recipe(3, 4, 128, 1))
    pack(root / "q", root / "p")
    plan, _ = plan_pack(Checkpoint(root / "m"), "q8_0", [], "nearest", importance={})
    write_pack(plan, root / "g")
    (root / "results/eval").mkdir(parents=True)
    for tag in ("a", "b"):
        record = json.loads((REPO / f"{RECORD}.json").read_text()) | {"samples": f"{tag}.samples.jsonl.gz"}
        (root / f"results/eval/{tag}.json").write_text(json.dumps(record))
        shutil.copy(REPO / f"{RECORD}.samples.jsonl.gz", root / f"results/eval/{tag}.samples.jsonl.gz")
    (root / "alloc.json").write_text('{"overrides": {"*": 3}}')
    for name in ("rollouts", "scores", "adapter", "o.ref", "work"):
        (root / name).mkdir()
    (root / "rollouts/rollouts.jsonl").write_text("")
    return root


@pytest.fixture
def place(things, tmp_path, monkeypatch):
    """A copy of them that a test may damage, and the current directory."""
    root = tmp_path / "t"
    shutil.copytree(things, root, copy_function=os.link)
    monkeypatch.chdir(root)
    return root


TEXT = "--calib-sequences 2 --calib-length 32"
QUANT = "src/quant/quant_save.py --model m --out o --expert-bits 3 --linear-bits 4 --clip-steps 1"
PACK = f"src/quant/gguf_pack.py --model m --out o --base-type Q8_0 --method nearest {TEXT}"
PROBE = f"src/quant/moe_probe.py --model m {TEXT}"
KL = "src/eval/moe_eval.py --model m --tag t --items 1 --out"
EVAL = "src/eval/vllm_eval8.py --model m --tag t --backend hf --benchmarks tiny_know --limit 1 --family none --out"
GEN = "src/distill/opd_gen.py --model m --tasks tiny_know --limit 1 --max-tokens 4 --backend hf --out"
SCORE = "src/distill/opd_score.py --teacher m --rollouts rollouts --out"
TRAIN = "src/distill/opd_train_fsdp.py --student q --teacher m --rollouts rollouts --scores scores --rows 8 --steps 1 --out"
MERGE = "src/distill/merge_adapter.py --student q --teacher m --adapter adapter --out"
TEXT_STUDY = "src/eval/study_text.py --model m --text text --work"
PANEL = "src/eval/panel.py --reference m --text prose=fixed.txt --positions 10"
DISTILL = "src/distill/distill_run.py --teacher m --tasks tiny_know --steps 1 --expert-bits 2 --linear-bits 4 --tag t --work"

OPEN = ("generation_config.json", "tokenizer_config.json")  # any object may be one
JSON = {  # the file that is of another kind: the commands that read it
    "m/config.json": [QUANT, PACK, PROBE, f"{KL} r", f"{EVAL} r", f"{GEN} r"],
    "m/generation_config.json": [f"{EVAL} r", f"{GEN} r"],
    "m/tokenizer_config.json": [f"{KL} r", f"{EVAL} r", PROBE],
    "m/tokenizer.json": [f"{KL} r", f"{EVAL} r", PROBE],
    "m/model.safetensors.index.json": [QUANT, PROBE],
    "q/recipe.json": ["src/quant/packed_export.py --model q --out o", f"{KL.replace('--model m', '--model q')} r"],
    "p/packed.json": ["src/quant/packed_export.py --unpack p --out o", "src/quant/packed_export.py --check p --model q"],
    "p/recipe.json": ["src/quant/packed_export.py --unpack p --out o"],
    "alloc.json": [f"{QUANT} --allocation alloc.json"],
    "o.ref/steps.json": [f"{PACK.replace('--out o', '--out o.ref')} --reference"],
    "results/eval/a.json": [
        "src/eval/compare_tags.py a b --results results", "src/eval/regrade.py a --results results",
        "src/eval/gate.py a --results results", "src/eval/gate.py --results results",
    ],
    "results/eval/a.samples.jsonl": [
        "src/eval/compare_tags.py a b --results results", "src/eval/regrade.py a --results results",
    ],
    "r/t.samples.jsonl": [f"{EVAL} r"],
    "m/gguf.json": [f"{KL} r"],
    "rollouts/rollouts.json": [f"{SCORE} s", f"{TRAIN} a"],
    "adapter/adapter.json": [f"{MERGE} o"],
    "work/settings.json": [f"{DISTILL} work"],
    "work/source.json": [f"{TEXT_STUDY} work"],
    ".o.partial/job.json": [QUANT, PACK],
    "m/consumed.json": [f"{QUANT} --consume-real-source"],
}  # fmt: skip


def one_line(done, *words):
    """What is wrong with how a command has ended, if anything."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if done.returncode != 2 or len(lines) != 1 or "Traceback" in done.stderr or not all(word in lines[0] for word in words):
        return f"exit {done.returncode}: {done.stderr.strip()[-300:].splitlines()[-1]}"
    return None


def files_of(root):
    """Every file with its size. What a run that goes on needs counts as nothing: a partial output, a log that holds settings
    alone, a lock."""
    files = [p for p in root.rglob("*") if p.is_file() and ".partial" not in str(p) and not p.name.endswith(".lock")]
    started = [p for p in files if p.name.endswith("samples.jsonl") and p.read_bytes().count(b"\n") == 1]
    return {str(p.relative_to(root)): p.stat().st_size for p in files if p not in started}


@pytest.mark.parametrize("file", JSON)
def test_json_of_another_kind_is_named(place, command, file):
    faults, path = [], place / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".index.json"):
        (place / "m/model.safetensors").rename(place / "m/model-00001-of-00001.safetensors")
    if file.endswith(".samples.jsonl"):
        path.with_name(path.name + ".gz").unlink(missing_ok=True)
    for line in JSON[file]:
        for kind, text in FOREIGN.items():
            if kind in ("an object", "an empty object", "a record") and path.name in OPEN:
                continue
            path.unlink(missing_ok=True)  # a link to the module's
            path.write_bytes(text + b"\n")
            before = files_of(place)
            named = ".o.partial" if path.name == "job.json" else path.name.split(".samples")[0]
            fault = one_line(command(*line.split(), cwd=place), named)
            if not fault and files_of(place) != before:
                fault = f"left {sorted(files_of(place).items() ^ before.items())}"
            faults += [f"{line.split()[0]} {kind}: {fault}"] if fault else []
    assert not faults, "\n".join(faults)


OUTPUTS = {  # commands without the end of their last option, which says where the output goes
    "quant_save": f"{QUANT} --out", "quant_save record": f"{QUANT} --tag t --result",
    "quant_save gptq": f"{QUANT} --method gptq {TEXT} --out",
    "gguf_pack": f"{PACK} --out", "gguf_pack record": f"{PACK} --tag t --result",
    "gguf_pack dequant": f"{PACK} --dequant-out", "gguf_pack reference": f"{PACK} --reference --out",
    "gguf_pack weights": f"{PACK} --token-power 0.4 --method ldlq --token-weights",
    "gguf_dequant": "src/quant/gguf_dequant.py --gguf g/m-Q8_0.gguf --model m --out",
    "packed_export": "src/quant/packed_export.py --model q --out", "unpack": "src/quant/packed_export.py --unpack p --out",
    "moe_probe": f"{PROBE} --tag t --result", "moe_probe imatrix": f"{PROBE} --imatrix",
    "quant_save budget": f"{QUANT} {TEXT} --target-gib 0.004 --out",
    "gguf_pack budget": f"{PACK} --target-gib 0.004 --protected fixed.txt --out",
    "moe_eval": KL, "gguf_kl": "src/eval/gguf_kl.py --model g/m-Q8_0.gguf --reference m --items 1 --context 64 --tag t --out",
    "vllm_eval8": EVAL, "mm_eval": EVAL.replace("vllm_eval8", "mm_eval").replace("tiny_know", "tiny_count"),
    "text_judge": "src/eval/text_judge.py --text fixed.txt --reference m --tag t --result",
    "panel": f"{PANEL} --work", "panel record": f"{PANEL} --judge m --tag t --out",
    "study_text": TEXT_STUDY, "study_text results": f"{TEXT_STUDY} w --results",
    "compare_tags": "src/eval/compare_tags.py a b --results", "regrade": "src/eval/regrade.py a --results",
    "opd_gen": GEN, "opd_score": SCORE, "opd_train_fsdp": TRAIN, "merge_adapter": MERGE, "distill_run": DISTILL,
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("where", ["file/x", "file/x/y"])
def test_an_output_that_cannot_be_made_is_said_before_the_work(place, command, name, where):
    (place / "file").touch()
    (place / "fixed.txt").write_text("token_embd|^output=q8_0\n")
    before = files_of(place)
    assert not (fault := one_line(command(*OUTPUTS[name].split(), where, cwd=place), "file")), fault
    assert files_of(place) == before


FULL = {  # commands that meet a full disk, and the output whose partial one is kept for them to go on with
    "quant_save": "made", "quant_save gptq": "made", "quant_save record": "o", "gguf_pack": "made", "gguf_pack weights": "o",
    "gguf_dequant": "made", "packed_export": "made", "unpack": "made", "moe_probe": None, "moe_probe imatrix": None,
    "moe_eval": None, "vllm_eval8": None, "opd_gen": None,
}  # fmt: skip


@contextlib.contextmanager
def full_disk(monkeypatch, room):
    """Files cannot grow beyond ``room`` bytes, and what is written atomically goes to a device that is full."""
    made = tempfile.mkstemp

    def full(prefix="", dir=None, **more):
        descriptor, name = made(prefix=prefix, dir=dir, **more)
        inside = Path(dir or "/").absolute().is_relative_to(Path.cwd())
        if inside and prefix.startswith(".") and not prefix.startswith(".job"):  # a run has begun before the disk was full
            os.unlink(name)
            os.symlink("/dev/full", name)
        return descriptor, name

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", full)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_and_keeps_what_is_done(place, command, monkeypatch, name):
    before = files_of(place)
    with full_disk(monkeypatch, 100_000):
        done = command(*OUTPUTS[name].split(), "made", cwd=place)
    assert not (fault := one_line(done, "cannot")), fault
    assert "No space left" in done.stderr or "File too large" in done.stderr, done.stderr
    assert bool(FULL[name]) == (place / f".{FULL[name]}.partial/job.json").exists() == ("what is done is kept" in done.stderr)
    again = command(*OUTPUTS[name].split(), "made", cwd=place)
    assert again.returncode == 0, again.stderr
    assert not list(place.glob(".*.partial")) and files_of(place).items() > before.items()


def test_the_way_to_replace_an_output_is_named_as_the_command_takes_it(place, command):
    (place / "x.env").write_text("MODEL=m\nOUT=q\nEXPERT_BITS=3\nLINEAR_BITS=4\n")
    for line, word in ((QUANT.replace("--out o", "--out q"), "--force"), ("src/quant/quant_save.py --config x.env", "FORCE=1")):
        done = command(*line.split(), cwd=place)
        assert done.returncode == 2 and f"q: exists; use {word} to replace it" in done.stderr, done.stderr


def test_token_weights_of_other_weights_are_refused(place, command):
    weights = f"{PACK} --method ldlq --token-power 0.4 --token-weights w.st".replace("--method nearest ", "")
    done = command(*weights.split(), cwd=place)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(place / "o")
    tensors = load_file(place / "m/model.safetensors")
    tensors["model.norm.weight"] += 1
    (place / "m/model.safetensors").unlink()
    save_file(tensors, place / "m/model.safetensors", {"format": "pt"})
    assert not (fault := one_line(command(*weights.split(), cwd=place), "w.st", "model.safetensors differs")), fault
