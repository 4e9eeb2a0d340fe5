"""Pin every package that the environments install, with SHA-256 where env.sh installs from the lock.

    python src/quant/lock_packages.py            # rewrites configs/lock-*.txt; needs the package index
    python src/quant/lock_packages.py --check    # do the locks still hold what the requirements files ask for? no network

On Linux x86_64 without a GPU env.sh installs configs/lock-cpu.txt, hashes checked and nothing resolved, then torch: its CPU
build by lock-torch-cpu.txt where one is at hand, else that of the package index with its CUDA libraries by
lock-torch-cuda.txt. lock-gpu.txt and lock-train.txt are versions that fit together, resolved and not run here. The resolver
(uv) is installed into a directory that is deleted again.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from console import UserError, atomic_path, run_cli

REPO = Path(__file__).resolve().parents[2]
RESOLVER = "uv==0.13.9"
PLATFORM = "x86_64-manylinux_2_28"
# torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl: the CPU build is not on the index, but some machines have it.
TORCH_CPU = "torch==2.13.0+cpu --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b\n"
TORCH = re.compile(r"torch$|(nvidia|cuda)-")
LOCKS = {  # lock: (requirements, Python, with hashes)
    "lock-cpu.txt": ("configs/requirements-cpu.txt", "3.11", True),
    "lock-gpu.txt": ("requirements.txt", "3.12", False),
    "lock-train.txt": ("requirements-train.txt", "3.12", False),
}
HEADER = (
    "# Written by python src/quant/lock_packages.py from {source} for Linux x86_64, Python {python}. Never edited by hand.\n"
)


def entries(text: str) -> dict[str, str]:
    """{package: its whole entry} of a requirements file, hashes and continued lines included."""
    found = {}
    for entry in re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.M)):
        if match := re.match(r"([A-Za-z0-9][\w.-]*)(?:\[[\w,-]+\])?\s*(?:[=<>~!;]|$)", entry):
            found[normal(match[1])] = entry.rstrip() + "\n"
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(uv: Path, source: str, python: str, hashes: bool) -> str:
    """The pinned packages that ``source`` needs, as a requirements file."""
    command = [uv, "pip", "compile", REPO / source, "--python-version", python, "--python-platform", PLATFORM]
    command += ["--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links", "--quiet"]
    done = subprocess.run([*command, *(["--generate-hashes"] if hashes else [])], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{source}: cannot be resolved: {' '.join(done.stderr.split())[:300]}")
    return done.stdout


def write(name: str, header: str, packages: Sequence[str]) -> None:
    with atomic_path(REPO / "configs" / name) as temporary:
        temporary.write_text(header + "".join(packages), encoding="utf-8")
    print(f"wrote configs/{name}: {len(packages)} packages", flush=True)


def make_locks() -> None:
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        pip = [Path(directory) / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*pip, RESOLVER]).returncode:
            raise UserError(f"{RESOLVER} cannot be installed; get the machine to its package index")
        for name, (source, python, hashes) in LOCKS.items():
            found = entries(resolve(Path(directory) / "bin/uv", source, python, hashes))
            header = HEADER.format(source=source, python=python)
            if hashes:
                cuda = {package: entry for package, entry in found.items() if TORCH.match(package)}
                found = {package: entry for package, entry in found.items() if package not in cuda}
                write("lock-torch-cuda.txt", header, list(cuda.values()))
                write("lock-torch-cpu.txt", header, [TORCH_CPU])
            write(name, header, list(found.values()))


def faults() -> list[str]:
    """What the locks lack of their requirements: a package, the very version, or a hash."""
    found = []
    for name, (source, _, hashes) in LOCKS.items():
        files = [name, "lock-torch-cuda.txt", "lock-torch-cpu.txt"] if hashes else [name]
        locked: dict[str, str] = {}
        for file in files:
            locked |= entries((REPO / "configs" / file).read_text(encoding="utf-8"))
        for package, asked in entries((REPO / source).read_text(encoding="utf-8")).items():
            pinned = re.search(r"==([\w.+]+)", asked)
            held = re.search(r"==([\w.+]+)", locked.get(package, ""))
            if not held or pinned and pinned[1] != held[1].partition("+")[0]:
                found.append(
                    f"configs/{name}: {package} is {held[1] if held else 'missing'}, {source} asks for {asked.strip()}"
                )
        found += [
            f"configs/{name}: {package} has no hash" for package, entry in locked.items() if hashes and "--hash" not in entry
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare the locks with the requirements files, without a network")
    args = parser.parse_args()
    if not args.check:
        make_locks()
    found = faults()
    print("\n".join([*found, f"{len(LOCKS)} locks, {len(found)} faults"]), flush=True)
    return int(bool(found))


if __name__ == "__main__":
    run_cli(main)
