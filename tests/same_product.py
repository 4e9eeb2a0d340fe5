"""Whether two commits of this repository make the same product, byte for byte, on this machine with the same packages.

    python tests/same_product.py 794a396            # against HEAD; about ten minutes on two cores
    python tests/same_product.py 794a396 --only gguf_ldlq,evaluation

Each commit is checked out beside the other and runs the same pipelines on the embedded models, with one thread. Compared are
the SHA-256 of every file of razor-tiny by clip and by gptq_refit, of the packed container, of the GGUF by error feedback, by
nearest rounding and by a budget, of razor-tiny-vl, and of the text of an evaluation. Ends with 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
TEXT = {"CALIB_SEQUENCES": "32", "CALIB_LENGTH": "128"}
TINY = {"MODEL": "models/razor-tiny"}
GRID = {"EXPERT_BITS": "3", "LINEAR_BITS": "4"}
RECORDED = ("recipe.json",)  # compared without what says how it was made: see `settled`
EVALUATION = "--model models/razor-tiny --tag same_product --benchmarks tiny_know,tiny_math --limit 6 --backend hf".split()

# name: (pipeline, its keys, its arguments)
PRODUCTS = {
    "clip": ("quantize.sh", TINY | GRID, []),
    "gptq_refit": ("quantize.sh", TINY | GRID | TEXT | {"METHOD": "gptq_refit", "TOKEN_POWER": "0.4", "DAMPING": "0.1"}, []),
    "packed": ("quantize.sh", TINY | GRID | {"PACKED": "1"}, []),
    "gguf_ldlq": ("pack_gguf.sh", TINY | TEXT | {"METHOD": "ldlq"}, []),
    "gguf_nearest": ("pack_gguf.sh", TINY | TEXT | {"METHOD": "nearest"}, []),
    "gguf_budget": ("pack_gguf.sh", TINY | TEXT | {"METHOD": "nearest", "TARGET_GIB": "0.0075"}, []),
    "vision": ("quantize.sh", GRID | {"MODEL": "models/razor-tiny-vl"}, []),
    "evaluation": ("eval.sh", {}, EVALUATION),
}  # fmt: skip


def settled(file: Path) -> bytes:
    """The bytes of a file that must be the same: of recipe.json its recipe and its report."""
    if file.name not in RECORDED:
        return file.read_bytes()
    value = json.loads(file.read_text(encoding="utf-8"))
    return json.dumps({key: value[key] for key in ("recipe", "report")}, sort_keys=True).encode()


def answers(log: Path) -> bytes:
    """What an evaluation said: the rows of its log, in the order of their items."""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()[1:]]
    kept = [[row["benchmark"], row["id"], row["text"], row["correct"]] for row in rows]
    return json.dumps(sorted(kept)).encode()


def run(tree: Path, name: str, work: Path) -> dict[str, str]:
    """Make one product in a checkout; the digests of its files."""
    pipeline, keys, arguments = PRODUCTS[name]
    out = work / name
    environment = os.environ | keys | {"OUT": str(out), "OMP_NUM_THREADS": "1", "SCRATCH": str(work)}
    environment |= {"MOE_LOWBIT_VENV": str(Path(sys.executable).parents[1])}
    done = subprocess.run(
        ["bash", f"pipelines/{pipeline}", *arguments], cwd=tree, env=environment, capture_output=True, text=True
    )  # fmt: skip
    if done.returncode:
        sys.exit(
            f"{name} in {tree.name}: {pipeline} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    if pipeline == "eval.sh":
        return {"answers": hashlib.sha256(answers(tree / "results/eval/same_product.samples.jsonl")).hexdigest()}
    # the model card of the embedded model is copied too, and is a document
    files = sorted(file for file in out.rglob("*") if file.is_file() and file.name != "README.md")
    return {str(file.relative_to(out)): hashlib.sha256(settled(file)).hexdigest() for file in files}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("before", help="commit to compare with")
    parser.add_argument("after", nargs="?", default="HEAD", help="the other commit (default HEAD)")
    parser.add_argument("--only", default=",".join(PRODUCTS), help=f"some of {', '.join(PRODUCTS)}")
    args = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory(prefix="same-product-") as folder:
        trees = {"before": args.before, "after": args.after}
        for side, commit in trees.items():
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", f"{folder}/{side}", commit], cwd=REPO, check=True)
        try:
            for name in args.only.split(","):
                made = {side: run(Path(folder, side), name, Path(folder, f"work-{side}")) for side in trees}
                files = sorted(made["before"].keys() | made["after"].keys())
                wrong = [file for file in files if made["before"].get(file) != made["after"].get(file)]
                different += bool(wrong)
                print(
                    f"{name:<14}{len(files):>3} files  {'DIFFERENT: ' + ', '.join(wrong) if wrong else 'the same bytes'}",
                    flush=True,
                )
        finally:
            for side in trees:
                subprocess.run(["git", "worktree", "remove", "--force", f"{folder}/{side}"], cwd=REPO, check=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
