"""What is installed: every package is pinned with its hash, no host is named, and the locks are those of the requirements."""

import hashlib
import re

from conftest import REPO

LOCKS = sorted(REPO.glob("configs/lock-*.txt"))


def pinned(lock):
    """{package: its pins} of a lock; fails where an entry lacks its version or its hash."""
    found = {}
    for entry in re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", lock.read_text(), flags=re.M).strip()):
        match = re.match(r"([a-z0-9][\w.-]*)==([\w.+]+)(?: ; [^\\]+)? (?:\\\n +)?--hash=sha256:[0-9a-f]{64}", entry)
        assert match, f"{lock.name}: {entry[:80]}"
        found.setdefault(match[1], []).append(match[2])
    return found


def test_every_package_is_pinned_and_no_host_is_named():
    for file in [*LOCKS, *REPO.glob("configs/requirements*.txt"), *REPO.glob("requirements*.txt")]:
        text = re.sub(r"#.*", "", file.read_text())
        assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host", text), file.name
    assert len(LOCKS) == 5 and all(pinned(lock) for lock in LOCKS)


def test_the_locks_are_those_of_the_requirements():
    made = [re.findall(r"^# ([0-9a-f]{64})  (\S+)$", lock.read_text(), re.M) for lock in LOCKS]
    assert sorted(name for (_, name), in filter(None, made)) == [
        "configs/requirements-cpu.txt", "configs/requirements-cpu.txt", "requirements-train.txt", "requirements.txt"
    ]  # fmt: skip
    for ((digest, name),) in filter(None, made):
        assert digest == hashlib.sha256((REPO / name).read_bytes()).hexdigest(), f"{name}: bash pipelines/test.sh --lock"


def test_the_two_torch_locks_are_of_one_version_and_cuda_python_brings_no_files():
    cpu, cuda, gpu = (pinned(REPO / f"configs/lock-{name}.txt") for name in ("torch-cpu", "torch-cuda", "gpu"))
    assert cpu["torch"] == [f"{cuda['torch'][0]}+cpu"]
    assert gpu["cuda-python"] == gpu["cuda-bindings"]  # from 13 on it only names the packages that hold the files
