"""A run that is killed at any point ends with the bytes of a run that was left alone."""

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import REPO
from safetensors.torch import load_file, save_file

import gguf_dequant
import gguf_pack
import quant_save
from calibration import Calibration
from calibration_text import calibration_ids
from checkpoint import Checkpoint
from console import UserError
from pack_plan import plan_pack
from quant_save import quantize_checkpoint
from recipe import Recipe
from run_dir import share

KILLED = textwrap.dedent("""
    import json, shutil, sys
    from pathlib import Path
    from console import UserError
    from killer import attempt, digests
    import calibrated_pass, transformers.models.qwen3_5_moe.modeling_qwen3_5_moe
    from calibration import Calibration
    from calibration_text import calibration_ids
    from quant_save import quantize_checkpoint
    from recipe import Recipe
    from moe_ptq import CALIBRATED

    model, out, (method, _, packed) = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].partition(" ")
    recipe, shard = Recipe(3, 4, 128, 4, method=method), 1 << (18 if packed else 20)

    def calibrated():
        return Calibration(*calibration_ids(None, model, 4, 128)) if method in CALIBRATED else None

    def run(name, kills=None):
        def act():
            quantize_checkpoint(model, out / name, recipe, shard_bytes=shard, calibration=calibrated(), packed=bool(packed))
        return attempt(act, out, kills)

    ended, whole = run("alone")
    expected, resumed, finished = digests(out / "alone"), 0, 0
    for part in range(1, 9):  # killed at eighths of its operations, the last of which publishes, and once more when it resumes
        name = f"killed{part}"
        ended = any(run(name, lambda number: number == at)[0] for at in (part * whole // 8, 3 + part))
        resumed += any((out / f".{name}.partial").glob("model-*.safetensors"))
        if not ended:
            run(name)
        finished += ended
        assert digests(out / name) == expected, "bytes differ"
    assert sorted(p.name for p in out.iterdir()) == ["alone", *(f"killed{part}" for part in range(1, 9))]

    from safetensors.torch import load_file, save_file  # killed, and then the model of that path is another
    copy, tensors = shutil.copytree(model, out.parent / f"copy of {out.name}"), load_file(model / "model.safetensors")
    original, model = model, copy
    assert not run("mixed", lambda number: number == whole // 2)[0]
    tensors["model.norm.weight"] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    def refused():
        try:
            quantize_checkpoint(copy, out / "mixed", recipe, shard_bytes=shard, calibration=calibrated(), packed=bool(packed))
        except UserError as error:
            assert "source: model.safetensors differs (same size" in str(error), error
            return
        raise AssertionError("two models were mixed")
    attempt(refused, out)
    model = original  # the same model elsewhere goes on
    assert run("mixed")[0] and digests(out / "mixed") == expected
    print(json.dumps({"operations": whole, "resumed": resumed, "finished": finished}))
""")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["clip", "gptq", "clip packed", "wclip packed"])
def test_killed_anywhere_ends_with_the_same_bytes(random_tiny, tmp_path, method):
    run = [sys.executable, "-c", KILLED, random_tiny, tmp_path, method]
    done = subprocess.run(list(map(str, run)), capture_output=True, text=True, timeout=400, cwd=REPO / "tests")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["operations"] > 30 and counts["resumed"] >= 4 and counts["finished"] <= 2, counts


def test_killed_when_all_is_written_but_nothing_published(random_tiny, tmp_path, monkeypatch):
    recipe, shard = Recipe(3, 4, 128, 4), 1 << 20
    expected = quantize_checkpoint(random_tiny, tmp_path / "alone", recipe, shard_bytes=shard)
    with monkeypatch.context() as patch:
        patch.setattr(quant_save, "write_json", lambda *_: (_ for _ in ()).throw(OSError("stands for a kill")))
        with pytest.raises(OSError, match="stands for a kill"):
            quantize_checkpoint(random_tiny, tmp_path / "killed", recipe, shard_bytes=shard)
    assert quantize_checkpoint(random_tiny, tmp_path / "killed", recipe, shard_bytes=shard) == expected
    assert sorted(p.name for p in tmp_path.iterdir()) == ["alone", "killed"]
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()


def stopped(*_, **__):
    raise OSError("stands for a kill")


def start_clip(model, out):
    quantize_checkpoint(model, out, Recipe(3, 4, 128, 1), shard_bytes=1 << 20)


def start_pack(model, out):
    pack, _ = plan_pack(Checkpoint(model), "q8_0", [], "nearest", Calibration(*calibration_ids(None, model, 2, 32)))
    gguf_pack.write_pack(pack, out)


def start_dequant(model, out):
    pack, _ = plan_pack(Checkpoint(model), "bf16", [], "nearest")
    if not (out.parent / "packed").exists():
        gguf_pack.write_pack(pack, out.parent / "packed")
    gguf_dequant.dequantize(out.parent / "packed" / pack.file_name, model, out)


@pytest.mark.parametrize(
    "start,module,last",
    [
        (start_clip, quant_save, "write_json"),
        (start_pack, gguf_pack, "write_mmproj"),
        (start_dequant, gguf_dequant, "write_json"),
    ],
)
def test_an_unfinished_run_of_a_replaced_model_is_refused_and_of_a_copy_goes_on(
    random_tiny, tmp_path, monkeypatch, start, module, last
):
    model, copy, out = (tmp_path / name for name in ("model", "elsewhere/model", "out"))
    shutil.copytree(random_tiny, model)
    shutil.copytree(random_tiny, copy)
    with monkeypatch.context() as patch:
        patch.setattr(module, last, stopped)
        with pytest.raises(OSError, match="stands for a kill"):
            start(model, out)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="source: model.safetensors differs .same size, other content"):
        start(model, out)
    assert not out.exists()
    start(copy, out)
    assert out.is_dir()


def test_processes_share_the_files_of_an_output(tmp_path):
    """Each file is made once; the file of a process that is killed is made by another; one of them finishes."""
    out, log, names = tmp_path / "o", tmp_path / "log", [f"{number}.bin" for number in range(9)]
    log.touch()

    def told():
        return log.read_text().split()

    def work(hangs):
        def make(path):
            if hangs:
                log.open("a").write("hangs\n")
                signal.pause()
            time.sleep(0.01)
            path.write_text(path.stem)
            log.open("a").write(f"{path.name}\n")

        share(out, {"job": 1}, names, make, lambda partial: log.open("a").write("finished\n"))

    def started(hangs):
        process = multiprocessing.get_context("fork").Process(target=work, args=(hangs,))
        process.start()
        return process

    def wait(until):
        deadline = time.monotonic() + 20
        while not until() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert until()

    killed = started(True)
    wait(told)
    others = [started(False) for _ in range(3)]
    wait(lambda: len(told()) == len(names))
    with pytest.raises(UserError, match="an unfinished run with other settings .job."):
        share(out, {"job": 2}, names, print, print)
    time.sleep(0.1)
    assert not out.exists() and all(process.is_alive() for process in others)
    killed.kill()
    for process in others:
        process.join(20)
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert sorted(told()) == sorted([*names, "finished", "hangs"])
    assert sorted(path.name for path in out.iterdir()) == names and [path.name for path in tmp_path.glob(".*")] == []
    share(out, {"job": 1}, names, print, print)  # one that comes late
    assert sorted(told()) == sorted([*names, "finished", "hangs"]) and [path.name for path in tmp_path.glob(".*")] == []
