"""env.sh as users source it: from any directory, under set -euo pipefail, twice, and when it has to refuse."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
VENV = Path(sys.prefix)


def bash(script, **environment):
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **environment}
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd="/", env=env, timeout=120)


def test_sourced_strictly_from_another_directory():
    script = f"set -euo pipefail; source {REPO}/env.sh; source {REPO}/env.sh; echo $MOE_LOWBIT_ROOT; command -v python; pwd"
    done = bash(script, MOE_LOWBIT_VENV=str(VENV))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(REPO), f"{VENV}/bin/python", "/"]


def test_a_failure_leaves_the_shell_alive(tmp_path):
    script = f"source {REPO}/env.sh; echo alive $?"
    done = bash(script, MOE_LOWBIT_VENV=str(tmp_path / "venv"), MOE_LOWBIT_PYTHON="/bin/false")
    assert done.stdout == "alive 1\n" and done.stderr.startswith("env.sh: needs Python 3.11 or 3.12")
    assert not (tmp_path / "venv").exists()


def test_a_pipeline_stops_at_a_failure(tmp_path):
    config = tmp_path / "bad.env"
    config.write_text("MODEL=models/absent\nEXPERT_BITS=3\n")
    done = bash(f"bash {REPO}/pipelines/smoke.sh", MOE_LOWBIT_VENV=str(VENV), SMOKE_CONFIG=str(config), SCRATCH=str(tmp_path))
    assert done.returncode == 2 and "LINEAR_BITS" in done.stderr and "SMOKE OK" not in done.stdout
