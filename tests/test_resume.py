"""A run that is killed at random moments, again and again, ends with the bytes of a run that was left alone."""

import json
import subprocess
import sys
import textwrap

import pytest

import quant_save
from quant_save import quantize_checkpoint
from recipe import Recipe

KILLER = textwrap.dedent("""
    # Imports once, then forks a child for each attempt and kills it after a random time.
    import hashlib, json, os, random, shutil, signal, sys, time, traceback
    from pathlib import Path
    import torch, transformers
    from calibration import Calibration
    from calibration_text import calibration_ids
    from quant_save import quantize_checkpoint
    from recipe import Recipe
    from moe_ptq import CALIBRATED
    import calibrated_pass, transformers.models.qwen3_5_moe.modeling_qwen3_5_moe

    model, out, method, kills = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    method, _, packed = method.partition(" ")

    def attempt(target):
        torch.set_num_threads(1)
        recipe = Recipe(3, 4, 128, 4, method=method)
        try:
            calibration = Calibration(*calibration_ids(None, model, 4, 128)) if method in CALIBRATED else None
            shard = 1 << (18 if packed else 20)
            quantize_checkpoint(model, target, recipe, shard_bytes=shard, calibration=calibration, packed=bool(packed))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def run(target, limit=None):
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            attempt(target)
        while limit is None or time.monotonic() - started < limit:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                assert status == 0, "an attempt failed"
                return True, time.monotonic() - started
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return False, limit

    def digest(directory):
        files = sorted(p for p in directory.iterdir() if p.is_file())
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    done, whole = run(out / "alone")
    expected = digest(out / "alone")
    rng, killed, resumed, finished = random.Random(0), 0, 0, 0
    target = out / "killed"
    while killed < kills:
        fresh = not (out / ".killed.partial").exists()
        resumed += len(list((out / ".killed.partial").glob("model-*.safetensors"))) > 0
        ended, seconds = run(target, rng.uniform(0.1, 0.7) * whole)
        killed += not ended
        if ended and fresh:  # the first run was slow, on a busy machine: most kills would come after the end
            whole = seconds
        if target.exists():  # also when the kill came after the last rename
            assert digest(target) == expected
            finished += 1
            shutil.rmtree(target)
    run(target, None)
    assert digest(target) == expected, "bytes differ"
    assert sorted(p.name for p in out.iterdir()) == ["alone", "killed"]
    print(json.dumps({"killed": killed, "resumed": resumed, "finished": finished}))
""")


@pytest.mark.parametrize("method", ["clip", "gptq", "clip packed", "wclip packed"])
def test_twenty_kills_end_with_the_same_bytes(random_tiny, tmp_path, method):
    run = [sys.executable, "-c", KILLER, random_tiny, tmp_path, method, "20"]
    done = subprocess.run(list(map(str, run)), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] == 20 and counts["resumed"] >= 10, counts  # else the kills came before any shard


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
