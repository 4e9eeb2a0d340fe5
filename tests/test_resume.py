"""A run that is killed at any point ends with the bytes of a run that was left alone."""

import json
import subprocess
import sys
import textwrap

import pytest
from conftest import REPO

import quant_save
from quant_save import quantize_checkpoint
from recipe import Recipe

KILLED = textwrap.dedent("""
    import json, sys
    from pathlib import Path
    from killer import attempt, digests
    import calibrated_pass, transformers.models.qwen3_5_moe.modeling_qwen3_5_moe
    from calibration import Calibration
    from calibration_text import calibration_ids
    from quant_save import quantize_checkpoint
    from recipe import Recipe
    from moe_ptq import CALIBRATED

    model, out, (method, _, packed) = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].partition(" ")
    recipe, shard = Recipe(3, 4, 128, 4, method=method), 1 << (18 if packed else 20)

    def run(name, kills=None):
        def act():
            calibration = Calibration(*calibration_ids(None, model, 4, 128)) if method in CALIBRATED else None
            quantize_checkpoint(model, out / name, recipe, shard_bytes=shard, calibration=calibration, packed=bool(packed))
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
    print(json.dumps({"operations": whole, "resumed": resumed, "finished": finished}))
""")


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
