"""What a pipeline would do, before it does it: --dry-run of quantize.sh and pack_gguf.sh, and the rates that all plans use.

Not a command: `bash pipelines/quantize.sh --dry-run`. Sizes come from the headers of the checkpoint alone. Times are
extrapolated by the number of parameters from the records in results/; the machine and the record stand beside each. Nothing is
written, and nothing but headers is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calibration import Calibration, layer_bytes
from checkpoint import Checkpoint
from console import UserError
from families import Role, roles_of
from gguf_layout import read_patterns, type_named
from gguf_pack import plan_pack, report
from gguf_pack import table as pack_table
from moe_ptq import CALIBRATED
from quant_save import BASE_BYTES, CHUNK_BYTES, plan_jobs, preflight, sidecars, summarize
from quant_save import table as quantize_table
from recipe import LINEAR_ROLES, Job, Recipe
from run_dir import check_output, partial_of
from size_model import RESULTS, Rates, machine, recorded_rates, records_of, times


def bench_rates(results: Path, recipe: Recipe) -> Rates:
    """Parameters a second that bench.sh measured for a method: the grid alone, or one layer of a mixture of experts."""
    found: Rates = {}
    for file, record in records_of(results, "bench"):
        grids, layer = record["metrics"].get("grids", {}), record["metrics"].get("layer", {})
        grid = f"clip16_int{recipe.expert_bits:g}" if recipe.method == "clip" else f"{recipe.method}_int{recipe.expert_bits:g}"
        if recipe.method in layer:
            weights = layer["experts"] * sum(math.prod(shape) for shape in layer["shapes"])
            found[machine(record)] = (weights / (layer["statistics_s"] + layer[recipe.method]["seconds"]), file)
        elif grid in grids:
            found[machine(record)] = (1e9 * grids[grid], file)
    return found


def refused(model: Path, out: Path, force: bool, needed: float) -> list[str]:
    """What stands in the way of the output, as a note."""
    notes = [f"note: {partial_of(out)} holds an unfinished run, which goes on"] if partial_of(out).exists() else []
    try:
        check_output(model, out, force, int(needed))
    except UserError as error:
        notes.append(f"note: the run would stop: {error}")
    return notes


def text_of(sequences: int, length: int) -> Calibration:
    """A calibration of that many tokens, for its size alone."""
    return Calibration(torch.zeros(sequences, length, dtype=torch.long), {})


def quantize_plan(model: Path, out: Path, recipe: Recipe, force: bool, text: tuple[int, int]) -> str:
    """The plan of quantize.sh. ``text``: sequences of calibration and their length."""
    checkpoint, out = Checkpoint(model), out.resolve()
    jobs = plan_jobs(checkpoint, recipe)
    made = summarize(jobs, recipe)
    needed = made.output_bytes + sum(file.stat().st_size for file in sidecars(checkpoint.path))
    calibration = text_of(*text) if recipe.method in CALIBRATED else None
    rounded = sum(job.info.numel for job in jobs if job.bits)
    rates = bench_rates(RESULTS, recipe)
    for name, rate in recorded_rates(RESULTS, "quantize", lambda r: quantized_parameters(r, recipe.method)).items():
        rates.setdefault(name, rate)
    lines = [f"{checkpoint.path} -> {out}", str(recipe), quantize_table(made)]
    if calibration:
        lines.append(f"calibration: {text[0]:,} sequences of {text[1]:,} tokens, layer by layer")
    lines.append(preflight(jobs, out, needed, CHUNK_BYTES, calibration))
    lines += ["time of the rounding, extrapolated from recorded rates (reading and writing at the disk's speed on top):"]
    lines += times(rates, rounded, recipe.method)
    lines += refused(checkpoint.path, out, force, needed)
    return "\n".join([*lines, "dry run: nothing was written"])


def quantized_parameters(record: Mapping[str, Any], method: str) -> float:
    """Parameters that a recorded run of ``method`` has rounded."""
    roles = record["metrics"].get("roles", {})
    same = record["recipe"].get("method") == method
    return sum(role["parameters"] for role in roles.values() if role["bits"]) if same else 0


def pack_plan(model: Path, out: Path, base_type: str, types_file: Path | None, method: str, text: tuple[int, int]) -> str:
    """The plan of pack_gguf.sh. ``method``: one of gguf_pack, or llama-quantize (whose file has the same sizes)."""
    checkpoint, out = Checkpoint(model), out.resolve()
    base = type_named(base_type, "BASE_TYPE")
    ours = "nearest" if method == "llama-quantize" else method
    pack, notes = plan_pack(checkpoint, base, read_patterns(types_file) if types_file else [], ours)
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    encoded = (*LINEAR_ROLES, Role.ROUTED_EXPERT)
    jobs = [Job(name, info, roles[name], 4 if roles[name] in encoded else None) for name, info in checkpoint.tensors.items()]
    memory = (BASE_BYTES + layer_bytes(jobs, text_of(*text))) / 2**30

    def units(record: dict[str, Any]) -> float:
        recipe = record["recipe"]
        return record["metrics"]["parameters"] if (recipe["method"], recipe["base_type"]) == (method, base) else 0

    made = report(pack, pack.data_bytes)
    lines = [f"{checkpoint.path} -> {out / pack.file_name}", f"method {method}, base type {base}", *notes, pack_table(made)]
    lines.append(f"calibration: {text[0]:,} sequences of {text[1]:,} tokens; memory at most about {memory:.1f} GiB")
    lines.append("time, extrapolated by parameters from recorded runs:")
    lines += times(recorded_rates(RESULTS, "pack", units), made["parameters"], f"{method} at {base}")
    lines += refused(checkpoint.path, out, False, pack.data_bytes)
    return "\n".join([*lines, "dry run: nothing was written"])
