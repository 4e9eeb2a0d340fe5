"""How fast the quantizers are here, beside what the machine allows: bash pipelines/bench.sh [--result FILE --tag TAG]

    python src/quant/speed_quant.py kernels [--layer small|122b] [--result results/bench/T.json --tag T]
    python src/quant/speed_quant.py disk --model work/synthetic-122b-6 --work work/disk [--probe-gib 8] [--result F --tag T]
    python src/quant/speed_quant.py hub --model models/razor-tiny --work work/hub [--rate 40e6] [--result F --tag T]
    python src/quant/speed_quant.py layers --model work/synthetic-122b-2 --work work/layers --method gptq [--result F --tag T]
    python src/quant/speed_quant.py memory --model work/synthetic-35b --work work/memory --caps 11,80 [--result F --tag T]
    python src/quant/speed_quant.py packed --model work/synthetic-122b-1 --work work/packed [--result F --tag T]

kernels: data-free grids on BF16 blocks [8, 2048, 3072] of experts (smaller on a CPU), in parameters a second, beside the rate
of a copy, which is the limit of anything that reads and writes BF16. On a GPU the fused kernel is compared bit by bit with the
plain search. Then one MoE layer of calibrated rounding: --layer 122b is that of Qwen3.5-122B-A10B (256 experts), on synthetic
weights and correlated activations; and the same layer encoded into --ggml block types, nearest and with error feedback.
hub: the data-free pass (absmax) from a server of the hub's interface on this machine (tests/hub_server.py) with a limited rate:
what share of it the shards came at, from the first request for one to the end of the last.
The others take a synthetic checkpoint of a real model's sizes (synthetic_moe.py):
disk: the seed recipe (experts int3, the rest int4, clip-16) by quant_save in a process of its own, from a disk whose page cache
was dropped to the same disk, and the rates of that disk, measured just before on the same files: reading, writing, and a plain
copy, which reads and writes as the pass does and is its limit. Consumes the model.
layers: the calibrated pass with gptq, gptq_refit, or ldlq into a GGUF of the published types; seconds from the start of one
layer to the start of the next, with everything in them. Of four layers or more the first, which nothing is read ahead for, and
the last, which is written after it, do not count. Both say what all layers of Qwen3.5-122B-A10B's size would take: disk by its
bytes, layers by their kinds.
memory: gptq_refit and ldlq with weighted tokens under caps on the process's memory of the GPU: peak, seconds and digest of what
is written, or the line that refuses. The tokens' weights are found once, under the first cap, and their seconds do not count.
packed: a checkpoint packed by quant_save, in 2, 3 and 4 bits, multiplied as it lies by the kernels that vLLM 0.33 calls:
humming-kernels. Single matrices and those of a layer's experts at once, compared with the product of the values that it stands
for, in seconds beside those values in BF16. Each call reads its weights from memory, not from a cache. Without a GPU the codes
are multiplied by torch, which shows that they are read aright and says nothing of the speed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import mmap
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ggml_lattice
import ggml_scalar
from calibrated_pass import CalibratedPass
from calibration import SLACK, Calibration, LayerStream, MemoryPlan, Moments, pass_memory, plan_memory
from checkpoint import SYNTHETIC, Checkpoint, is_synthetic
from console import UserError, files_sha256, progress, read_json, run_cli
from devices import default_device, lanes
from ggml_codecs import decode_rows
from ggml_round import ldlq
from gguf_layout import read_patterns, type_named
from gguf_pack import write_pack
from moe_ptq import Grid, output_error, round_weight
from moe_quant import dequantize, fake_quant, quantize_group
from pack_plan import plan_pack
from plans import plan_jobs
from quant_save import quantize_checkpoint
from recipe import Recipe
from records import REPO, add_record_arguments, check_record_arguments, describe_model, peak_rss_mib, write_result
from rounders import DAMPING, TOKEN_POWER, GgmlRounder, GridRounder, encoded, is_quantized
from safetensors_file import open_tensors, release
from size_model import SHAPES, Shape, plan_of
from source_formats import unpack_words
from token_weights import head_gradients, through

LAYERS = {  # experts, [O, I] of the two matrices, tokens an expert sees
    "small": (8, ((512, 256), (256, 256)), 1024),
    "122b": (256, ((2048, 3072), (3072, 1024)), 4096),
}
METHODS = ("wclip", "gptq", "gptq_refit")
GGML_METHODS = ("nearest", "ldlq")
PASSES = ("gptq", "gptq_refit", "ldlq")
BLOCK, SMALL_BLOCK = 16 << 20, 1 << 20  # of the disk's measurement; the second for files that the first does not divide well
THREADS = 4
HUB_RECIPE = ("--expert-bits", "3", "--linear-bits", "4", "--group", "128", "--method", "absmax")
SEED_RECIPE = ("--expert-bits", "3", "--linear-bits", "4", "--group", "128", "--clip-steps", "16", "--method", "clip")
TYPES = REPO / "configs" / "gguf_tensor_types_iq3.txt"
WHOLE = SHAPES["122b"]  # whose depth the times are said for

# ---------------------------------------------------------------- kernels


def now() -> float:
    """Seconds, when the GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], Any], repeats: int = 21) -> float:
    """Median time of a call, after two that are not counted (they compile, and raise the clock)."""
    times = []
    for _ in range(2 + repeats):
        started = now()
        function()
        times.append(now() - started)
    return statistics.median(times[2:])


def grids(device: torch.device) -> dict[str, Any]:
    """Rates of the data-free grids in G parameters/s, and whether the GPU's bits are the plain search's."""
    shape = (8, 2048, 3072) if device.type == "cuda" else (1, 1024, 3072)
    weight = torch.randn(shape, device=device).bfloat16()
    out = torch.empty_like(weight)
    rate = weight.numel() / 1e9
    found: dict[str, Any] = {"shape": list(shape), "limit_copy": rate / seconds(lambda: out.copy_(weight))}
    for name, bits, steps in (("absmax_int4", 4, 1), ("clip16_int3", 3, 16), ("clip16_int4", 4, 16)):
        found[name] = rate / seconds(functools.partial(fake_quant, weight, bits, 128, steps))
    plain, sample = lambda: dequantize(quantize_group(weight, 3, 128, 16), 128), weight[:, :128]
    found["plain_clip16_int3"] = rate / seconds(plain, 3)
    found["identical_to_plain"] = same_bits(fake_quant(weight, 3, 128, 16), plain())
    found["identical_to_cpu"] = same_bits(fake_quant(sample, 3, 128, 16).cpu(), fake_quant(sample.cpu(), 3, 128, 16))
    return found


def same_bits(one: Tensor, two: Tensor) -> bool:
    return torch.equal(one.view(torch.int16), two.view(torch.int16))


def moments_of(experts: int, inputs: int, tokens: int, device: torch.device) -> Moments:
    """Second moments of synthetic activations: correlated, with a few loud channels, of other size for each expert."""
    moments = Moments(experts, inputs, device)
    mix = torch.randn(inputs, inputs, device=device) / inputs**0.5
    loud = torch.rand(inputs, device=device) ** 4 * 5
    for expert in range(experts):
        x = (torch.randn(tokens, inputs, device=device) @ mix + torch.randn(tokens, inputs, device=device)) * loud
        moments.add(expert, x, torch.rand(tokens, device=device))
    return moments


def layers_of(name: str, types: Sequence[str], device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of one MoE layer for every method, and its output error relative to the clip search: on the grid, and in ggml
    block types, whose rates are given too."""
    experts, shapes, tokens = LAYERS[name]
    work: dict[str, Any] = {"experts": experts, "shapes": [list(s) for s in shapes], "tokens": tokens, "statistics_s": 0.0}
    ways = [("", method) for method in METHODS] + [(kind, method) for kind in types for method in GGML_METHODS]
    made: dict[tuple[str, str], dict[str, Any]] = {way: {"seconds": 0.0, "error_ratio": []} for way in ways}
    with progress(len(shapes) * len(ways), "layer", "matrix") as bar:
        for outputs, inputs in shapes:
            weight = (torch.randn(experts, outputs, inputs, device=device) * 0.02).bfloat16()
            started = now()
            moments = moments_of(experts, inputs, tokens, device).statistics(inputs)
            moments = moments._replace(hessian=moments.hessian[:])
            work["statistics_s"] += now() - started
            clip = error_of(weight, fake_quant(weight, 3, 128, 16), moments.hessian)
            for (kind, method), entry in made.items():
                if kind:  # tables are made once
                    encoded(weight[:1, :64].float(), kind, method, moments.hessian[:1])
                started = now()
                if kind:
                    value = encoded(weight.float(), kind, method, moments.hessian)
                else:
                    value = round_weight(weight, Grid(3, 128), moments, method)
                entry["seconds"] += now() - started
                value = decode_rows(value, kind) if kind else value
                entry["error_ratio"].append(error_of(weight, value, moments.hessian) / clip)
                bar.update()
    millions = sum(experts * outputs * inputs for outputs, inputs in shapes) / 1e6
    ggml: dict[str, Any] = {kind: {} for kind in types}
    for (kind, method), entry in made.items():
        if kind:
            ggml[kind][method] = entry | {"mega_parameters_per_s": millions / entry["seconds"]}
        else:
            work[method] = entry
    return work, ggml


def error_of(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    """Summed output error, a few experts at a time."""
    total = 0.0
    for w, v, h in zip(weight.split(8), value.split(8), hessian.split(8), strict=True):
        total += output_error(w.float().transpose(1, 2), v.float().transpose(1, 2), h).sum().item()
    return total


def kernels(args: argparse.Namespace) -> dict[str, Any]:
    types = [type_named(kind, "--ggml") for kind in args.ggml.split(",") if kind]
    device = default_device()
    torch.manual_seed(0)
    chosen = args.layer or ("122b" if device.type == "cuda" else "small")
    rates, (layer, ggml) = grids(device), layers_of(chosen, types, device)
    return {"grids": rates, "layer": {"name": chosen} | layer, "ggml": ggml}


def kernels_table(found: dict[str, Any]) -> str:
    rates, work = found["grids"], found["layer"]
    limit = rates["limit_copy"]
    lines = [f"BF16 {rates['shape']}, G parameters/s (a copy: {limit:.2f})"]
    for name in ("absmax_int4", "clip16_int3", "clip16_int4", "plain_clip16_int3"):
        lines.append(f"  {name:<20}{rates[name]:>10.3f}{100 * rates[name] / limit:>8.1f} % of a copy")
    lines.append(f"  same bits as the plain search: {rates['identical_to_plain']}, as a CPU: {rates['identical_to_cpu']}")
    lines.append(f"one MoE layer: {work['experts']} experts, {work['shapes']}, {work['tokens']} tokens each, int3 g128")
    lines.append(f"  {'statistics':<18}{work['statistics_s']:>9.2f} s")
    entries = {method: work[method] for method in METHODS}
    entries |= {f"{kind} {method}": entry for kind, made in found["ggml"].items() for method, entry in made.items()}
    for name, entry in entries.items():
        ratios = ", ".join(f"{ratio:.3f}" for ratio in entry["error_ratio"])
        lines.append(f"  {name:<18}{entry['seconds']:>9.2f} s   output error / clip-16: {ratios}")
    return "\n".join(lines)


# ---------------------------------------------------------------- the disk


def forget(files: Sequence[Path]) -> None:
    """Drop files that are on the disk from the page cache."""
    for file in files:
        with file.open("rb") as stream:
            release(stream.fileno(), 0, 0)


def disk_rate(files: Sequence[Path], target: Path, limit: int, direct: bool, reads: bool, writes: bool) -> float:
    """Bytes a second of the first ``limit`` bytes of ``files``, in whole blocks by a few threads: read, or written as random
    bytes to a new file that is synced, or both, a plain copy. ``direct``: past the page cache."""
    forget(files)
    flags = os.O_DIRECT if direct else 0
    sizes = {file: file.stat().st_size for file in files}
    size = BLOCK if max(sizes.values()) >= 4 * BLOCK else SMALL_BLOCK
    blocks = [(file, at) for file in files for at in range(0, sizes[file] - size + 1, size)][: max(1, limit // size)]
    with contextlib.ExitStack() as stack:
        handles = {file: os.open(file, os.O_RDONLY | flags) for file in files}
        out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | flags)
        stack.callback(target.unlink)
        for handle in (*handles.values(), out):
            stack.callback(os.close, handle)
        buffers = [mmap.mmap(-1, size) for _ in range(THREADS)]  # page-aligned, as O_DIRECT wants it
        for buffer in buffers:
            buffer[:] = os.urandom(size)

        def share(first: int) -> None:
            for number in range(first, len(blocks), THREADS):
                file, at = blocks[number]
                if reads:
                    os.preadv(handles[file], [buffers[first]], at)
                if writes:
                    os.pwritev(out, [buffers[first]], number * size)
                    if not direct:
                        release(out, number * size, size)

        started = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(share, range(THREADS)))
        if writes:
            os.fsync(out)
        return len(blocks) * size / (time.perf_counter() - started)


def disk_rates(files: Sequence[Path], work: Path, limit: int) -> dict[str, Any]:
    """Rates of this disk in bytes a second, each the better of past the page cache, where that can be, and through it."""
    found: dict[str, Any] = {}
    tests = {"read": (True, False), "write": (False, True), "copy": (True, True)}
    with progress(len(tests), "disk", "test") as bar:
        for name, (reads, writes) in tests.items():
            with contextlib.suppress(OSError):
                found[f"{name}_direct"] = disk_rate(files, work / "probe", limit, True, reads, writes)
            found[f"{name}_cached"] = disk_rate(files, work / "probe", limit, False, reads, writes)
            found[name] = max(found.get(f"{name}_direct", 0.0), found[f"{name}_cached"])
            bar.update()
    forget(files)
    return found


def quantize(model: Path, work: Path, shard_gib: float, devices: str) -> dict[str, Any]:
    """Run quant_save on ``model``; seconds, and the peaks that its record holds. The output is deleted."""
    out, record = work / "out", work / "quantize.json"
    command = [sys.executable, str(REPO / "src/quant/quant_save.py"), "--model", str(model), "--out", str(out), *SEED_RECIPE]
    command += ["--consume-source", "--shard-gib", str(shard_gib), "--result", str(record), "--tag", "disk"]
    command += ["--devices", devices]
    started = planned = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout or ():
            print(line, end="", flush=True)
            if line.startswith("about "):  # the last line of its plan: from here it streams
                planned = time.perf_counter()
    ended = time.perf_counter()
    if child.returncode:
        raise UserError(f"quant_save ended with {child.returncode}")
    made = read_json(record)
    shutil.rmtree(out)
    record.unlink()
    return {
        "devices": devices, "seconds": ended - started, "stream_seconds": ended - planned,
        "bytes": made["metrics"]["output_bytes"], "peak_rss_mib": made["peak_rss_mib"], "peak_vram_mib": made["peak_vram_mib"],
    }  # fmt: skip


def disk(args: argparse.Namespace) -> dict[str, Any]:
    """The data-free pass and its limits. A shard of ``args.shard_gib`` bounds how long its last sync waits."""
    args.work.mkdir(parents=True, exist_ok=True)
    shape = dataclasses.replace(shape_of(args.model), layers=WHOLE.layers)
    rates = disk_rates(Checkpoint(args.model).files, args.work, int(args.probe_gib * 2**30))
    made = quantize(args.model, args.work, args.shard_gib, args.devices)
    rate, size = made["bytes"] / made["stream_seconds"], sum(math.prod(s) * dtype.itemsize for _, dtype, s in plan_of(shape))
    return {
        "disk": rates, "quantize": made, "bytes_in_per_s": rate, "bytes_out_per_s": rate,
        "share_of_copy": rate / rates["copy"], "share_of_read": rate / rates["read"], "share_of_write": rate / rates["write"],
        "whole": {"layers": shape.layers, "bytes": size, "seconds": size / rate},
    }  # fmt: skip


def shape_of(model: Path) -> Shape:
    if not is_synthetic(model):
        raise UserError(f"{model}: not made by synthetic_moe.py")
    return Shape(**read_json(model / SYNTHETIC)["shape"])


def disk_table(metrics: dict[str, Any]) -> str:
    d, q, w = metrics["disk"], metrics["quantize"], metrics["whole"]
    return (
        f"disk, GB/s: read {d['read'] / 1e9:.2f}, write {d['write'] / 1e9:.2f}, copy {d['copy'] / 1e9:.2f}\n"
        f"quantized {q['bytes'] / 1e9:.1f} GB in {q['stream_seconds']:.1f} s ({q['seconds']:.1f} s with the start): "
        f"{metrics['bytes_in_per_s'] / 1e9:.2f} GB/s in and out, {100 * metrics['share_of_copy']:.0f} % of a copy, "
        f"{100 * metrics['share_of_read']:.0f} % of reading alone\n"
        f"peak RSS {q['peak_rss_mib']} MiB, VRAM {q['peak_vram_mib']} MiB\n"
        f"{w['layers']} layers ({w['bytes'] / 1e9:.0f} GB): {w['seconds']:.0f} s"
    )


# ---------------------------------------------------------------- from a hub


def hub(args: argparse.Namespace) -> dict[str, Any]:
    """``args.model`` quantized straight from a server that sends ``args.rate`` bytes a second at most."""
    root, port, log = args.work / "root", args.work / "port", args.work / "log"
    (root / "bench").mkdir(parents=True)
    (root / "bench/model").symlink_to(args.model.resolve())
    server = subprocess.Popen([sys.executable, REPO / "tests/hub_server.py", root, port, log, "--rate", str(args.rate)])
    try:
        while not port.exists() or not port.read_text():
            time.sleep(0.02)
        more = {"HF_ENDPOINT": f"http://127.0.0.1:{port.read_text()}", "MOE_LOWBIT_CACHE": str(args.work / "cache")}
        command = [sys.executable, str(REPO / "src/quant/quant_save.py"), "--model", "hf:bench/model", *HUB_RECIPE]
        started = time.perf_counter()
        if code := subprocess.run([*command, "--out", str(args.work / "out")], env=os.environ | more).returncode:
            raise UserError(f"quant_save ended with {code}")
        whole = time.perf_counter() - started
        rows = [line.split() for line in log.read_text().splitlines() if "/storage/" in line and ".safetensors" in line]
    finally:
        server.kill()
        server.wait()
    rows = [row for row in rows if not row[2].startswith("bytes=0-")]  # those are headers, of the plan
    size = sum(int(row[3]) for row in rows)
    seconds = max(float(row[5]) for row in rows) - min(float(row[4]) for row in rows)
    kept = sum(file.stat().st_blocks * 512 for file in (args.work / "cache").rglob("*"))
    shutil.rmtree(args.work)
    found = {"limit": args.rate, "bytes": size, "requests": len(rows), "seconds": seconds, "bytes_per_s": size / seconds}
    return found | {"share": size / seconds / args.rate, "whole_seconds": whole, "kept_bytes": kept}


def hub_table(metrics: dict[str, Any]) -> str:
    return (
        f"{metrics['bytes'] / 1e6:.1f} MB in {metrics['requests']} requests and {metrics['seconds']:.2f} s: "
        f"{metrics['bytes_per_s'] / 1e6:.1f} MB/s, {100 * metrics['share']:.1f} % of the limit; "
        f"{metrics['kept_bytes'] / 1e6:.2f} MB on disk beside the output"
    )


# ---------------------------------------------------------------- calibrated layers


@contextlib.contextmanager
def layer_clock(begun: list[float], rounding: list[float]) -> Iterator[None]:
    """Note when the calibrated pass begins each layer and the head, and the seconds in which each rounds."""

    def beginning(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begun.append(now())
            rounding.append(0.0)
            return function(*arguments)

        return call

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> None:
            started = now()
            function(*arguments)
            rounding[-1] += now() - started

        return call

    with contextlib.ExitStack() as stack:
        for cls, name, noting in (
            (CalibratedPass, "layer", beginning), (CalibratedPass, "head", beginning),
            (GridRounder, "round", timed), (GgmlRounder, "round", timed),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(cls, name, noting(getattr(cls, name))))
        yield


def random_calibration(vocabulary: int, sequences: int, length: int, batch: int) -> Calibration:
    """Token ids drawn uniformly from the whole vocabulary: many different inputs, as real text has."""
    ids = torch.randint(vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))
    return Calibration(ids, {"name": "uniform token ids", "revision": "seed 0", "sha256": None, "n": sequences}, batch=batch)


def run_method(method: str, model: Path, out: Path, calibration: Calibration, header: Path | None) -> dict[str, Any]:
    """The calibrated pass into ``out``; errors of the roles."""
    if method != "ldlq":
        report = quantize_checkpoint(model, out, Recipe(3, 4, 128, 16, method=method), calibration=calibration, force=True)
        return {role: entry.relative_error for role, entry in report.roles.items()}
    plan = plan_pack(Checkpoint(model), "iq3_xxs", read_patterns(TYPES), "nearest")[0]
    pack = dataclasses.replace(plan, method="ldlq", calibration=calibration)
    made = write_pack(pack, out, force=True, header=header.read_bytes() if header else None)
    return made["calibration"]["relative_output_error"]


def compile_kernels(device: torch.device) -> None:
    """Round a little in every type that the file has: kernels are compiled once a machine, not once a layer."""
    for name in sorted({"iq3_xxs", *(type_named(kind, str(TYPES)) for _, kind in read_patterns(TYPES))}):
        if is_quantized(name):
            ldlq(torch.randn(2, 64, 512, device=device), name, torch.eye(512, device=device).repeat(2, 1, 1))


def layers(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each layer through the real pass, and of the whole model by the kinds of its layers."""
    shape, cuda, out = shape_of(args.model), torch.cuda.is_available(), args.work / args.method
    calibration = random_calibration(shape.vocab, args.sequences, args.length, args.batch)
    begun: list[float] = []
    rounding: list[float] = []
    ggml_lattice.GROUPS = ggml_scalar.KERNEL = args.group_kernels
    if args.method == "ldlq" and cuda:
        compile_kernels(calibration.device)
    started = time.perf_counter()
    with layer_clock(begun, rounding):
        errors = run_method(args.method, args.model, out, calibration, args.header)
    ended = time.perf_counter()
    shutil.rmtree(out)
    seconds = [after - before for before, after in itertools.pairwise(begun)]
    rounding = rounding[:-1]  # the last is the head's
    steady = range(1, len(seconds) - 1) if len(seconds) >= 4 else range(len(seconds))
    kinds: dict[str, list[float]] = {}
    for index in steady:
        kinds.setdefault(shape.kind(index), []).append(seconds[index])
    means = {kind: statistics.mean(values) for kind, values in kinds.items()}
    rest = ended - started - sum(seconds)
    total = rest + sum(means.get(WHOLE.kind(index), max(means.values())) for index in range(WHOLE.layers))
    return {
        "method": args.method, "tokens": args.sequences * args.length, "batch": args.batch, "layer_seconds": seconds,
        "rounding_seconds": rounding, "kind_seconds": means, "worst_layer_seconds": max(seconds[index] for index in steady),
        "worst_rounding_seconds": max(rounding[index] for index in steady), "rest_seconds": rest, "relative_errors": errors,
        "group_kernels": cuda and args.group_kernels and args.method == "ldlq", "experts": shape.experts,
        "peak_rss_mib": peak_rss_mib(),
        "peak_vram_mib": torch.cuda.max_memory_allocated() >> 20 if cuda else None,
        "whole": {"layers": WHOLE.layers, "seconds": total},
    }  # fmt: skip


class TimeOver(Exception):
    """The seconds for all runs are over."""


def weigh(model: Path, calibration: Calibration) -> dict[str, Any]:
    """One batch back through a layer and its predictions' scores: the memory of token_weights. Bytes of the plan's stages."""
    jobs = plan_jobs(Checkpoint(model), Recipe(3, 4, 128, 16, method="gptq_refit"))
    plan_memory(jobs, calibration)
    batch = calibration.batches()[:1]
    stream, started = LayerStream(Checkpoint(model), calibration.device, calibration.dtype), now()
    kwargs, hidden, layer = stream.arguments(batch[0]), stream.embed(batch), stream.layers[0]
    stream.fill(layer, "model.layers.0.")
    found = through(layer, hidden[0], torch.randn_like(hidden[0]), kwargs[0], stream.device)
    stream.empty(layer)
    through_layer, _ = now() - started, head_gradients(stream, [found], 0)
    planned = pass_memory(jobs, calibration, calibration.dtype.itemsize).stages + SLACK
    return {"seconds": now() - started, "layer_seconds": [through_layer], "planned_mib": planned >> 20}


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Runs under caps on the GPU's memory: those of the first two caps by method, then the others. One that
    ``args.seconds`` may not allow, or during which they end, is named as left out."""
    shape, ends = shape_of(args.model), time.perf_counter() + args.seconds
    calibration = random_calibration(shape.vocab, args.sequences, args.length, 8)
    calibration = dataclasses.replace(calibration, damping=DAMPING)
    runs: list[dict[str, Any]] = []
    left_out: list[str] = []
    plans: list[MemoryPlan] = []
    cuda = torch.cuda.is_available()

    def noted(*arguments: Any, **more: Any) -> MemoryPlan:
        plans.append(plan_memory(*arguments, **more))
        return plans[-1]

    def one(method: str) -> dict[str, Any]:
        if method == "weights":
            return weigh(args.model, dataclasses.replace(calibration, token_power=TOKEN_POWER))
        out, begun, rounding, started = args.work / method, [], [], now()
        with layer_clock(begun, rounding):
            errors = run_method(method, args.model, out, calibration, args.header)
        run = {"relative_errors": errors, "seconds": now() - started, "rounding_seconds": rounding}
        files = sorted(file for file in out.iterdir() if file.suffix in (".safetensors", ".gguf"))
        planned = None if plans[-1].gpu is None else plans[-1].gpu >> 20
        run |= {"layer_seconds": [after - before for before, after in itertools.pairwise(begun)]}
        run |= {"sha256": files_sha256(files), "working_bytes": plans[-1].working_bytes, "planned_mib": planned}
        shutil.rmtree(out)
        return run

    def over(*_: Any) -> None:
        raise TimeOver

    def warm(method: str) -> None:
        """What is compiled or loaded once a process is no part of a run."""
        if method == "ldlq":
            return compile_kernels(calibration.device)
        moments = moments_of(4, 512, 1024, calibration.device).statistics(512)
        round_weight(torch.randn(4, 256, 512, device=calibration.device), Grid(3, 128), moments, "gptq_refit")

    args.work.mkdir(parents=True, exist_ok=True)
    caps, methods = args.caps.split(","), args.methods.split(",")
    order = [(cap, method) for some in (caps[:2], caps[2:]) for method in methods for cap in some]
    warmed: set[str] = set()
    before = signal.signal(signal.SIGALRM, over)
    for cap, method in order:
        alike = [made["wall_seconds"] for made in runs if made["method"] == method]
        run: dict[str, Any] = {"cap_gib": float(cap), "method": method}
        try:
            if (left := ends - time.perf_counter() - max(alike, default=0.0)) <= 0:
                raise TimeOver
            signal.setitimer(signal.ITIMER_REAL, left + max(alike, default=0.0), 1.0)  # again where a callback swallowed it
            if cuda and method not in warmed:
                warm(method)
                torch.cuda.empty_cache()
            warmed.add(method)
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            started = now()
            patches = [mock.patch(f"{name}.plan_memory", noted) for name in ("quant_save", "pack_plan")]
            with patches[0], patches[1], mock.patch.dict(os.environ, {"GPU_MEMORY_GIB": cap}):
                run |= one(method)
        except (UserError, torch.OutOfMemoryError) as error:
            run["refused"] = str(error)
        except TimeOver:
            left_out.append(f"{cap} GiB, {method}")
            continue
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if cuda:
            run["peak_vram_mib"] = torch.cuda.max_memory_allocated() >> 20
            run["peak_vram_reserved_mib"] = torch.cuda.max_memory_reserved() >> 20
        runs.append(run | {"wall_seconds": now() - started, "peak_rss_mib": peak_rss_mib()})
        print(json.dumps(runs[-1]), flush=True)
    signal.signal(signal.SIGALRM, before)
    if not runs:
        raise UserError(f"--seconds {args.seconds:g}: too few for one run")
    counts = {"tokens": calibration.ids.numel(), "layers": shape.layers, "experts": shape.experts}
    return counts | {"runs": runs, "left_out": left_out}


def memory_table(metrics: dict[str, Any]) -> str:
    lines = [f"{'GiB':>6} {'method':<11}{'seconds':>9}{'MiB':>9}{'planned':>9}  sha256, or the refusal"]
    for run in metrics["runs"]:
        figures = f"{run.get('seconds', 0):>9.1f}{run.get('peak_vram_mib', 0):>9,}{run.get('planned_mib') or 0:>9,}"
        lines.append(f"{run['cap_gib']:>6g} {run['method']:<11}{figures}  {run.get('refused') or run.get('sha256', '')[:16]}")
    lines += [f"left out: {each}" for each in metrics["left_out"]]
    return "\n".join(lines)


def layers_table(metrics: dict[str, Any]) -> str:
    each = ", ".join(f"{kind} {value:.1f} s" for kind, value in metrics["kind_seconds"].items())
    rounding = ", ".join(f"{value:.1f}" for value in metrics["rounding_seconds"])
    return (
        f"{metrics['method']}: {each} (rounding {rounding} s); the rest {metrics['rest_seconds']:.1f} s; "
        f"peak RSS {metrics['peak_rss_mib']} MiB, VRAM {metrics['peak_vram_mib']} MiB\n"
        f"{metrics['whole']['layers']} layers: {metrics['whole']['seconds'] / 60:.1f} minutes"
    )


# ---------------------------------------------------------------- packed matrices

WIDTHS = ((3, 128), (4, 128), (2, 128), (3, 256))  # bits, group
ROWS = (1, 16, 64)
BEYOND_CACHES = 150_000_000  # bytes of copies that a measurement goes round
DENSE, INDEXED = "dense", "indexed"  # humming's names of a product with one matrix, and with those of the experts that ids name


def aligned(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places [P] of ids [n] by expert, each expert's filled up with n to whole blocks; the expert of each block; P."""
    counts = torch.bincount(ids, minlength=experts)
    filled = (counts + block - 1) // block * block
    order = torch.argsort(ids, stable=True)
    first = (filled.cumsum(0) - filled) - (counts.cumsum(0) - counts)
    places = torch.full((int(filled.sum()),), len(ids), dtype=torch.int32, device=ids.device)
    places[first[ids[order]] + torch.arange(len(ids), device=ids.device)] = order.int()
    blocks = torch.arange(experts, dtype=torch.int32, device=ids.device).repeat_interleave(filled // block)
    return places, blocks, torch.tensor(len(places), dtype=torch.int32, device=ids.device)


class PackedProduct:
    """x @ W.T of matrices as a packed checkpoint stores them: ``words`` int32 [(E,) O, I * bits / 32], ``scale`` bfloat16
    [(E,) O, I / group]. With experts ``ids`` [m, k] says which multiply row m; the output has m * k rows, as the input has
    where ``spread``."""

    def __init__(self, words: Tensor, scale: Tensor, bits: int, group: int, top_k: int) -> None:
        self.words, self.scale, self.bits, self.experts = words, scale, bits, words.shape[0] if words.ndim == 3 else 0
        self.top_k, self.inputs, self.layer = top_k, words.shape[-1] * 32 // bits, None
        if words.is_cuda:
            from humming.layer import HummingLayer
            from humming.tune import get_heuristics_config

            scheme = {
                "quant_method": "compressed-tensors", "format": "pack-quantized", "type": "int", "num_bits": bits,
                "strategy": "group", "group_size": group, "symmetric": True,
            }  # fmt: skip
            self.layer = HummingLayer(
                shape_n=words.shape[-2], shape_k=self.inputs, num_experts=self.experts or None, weight_config=scheme,
                torch_dtype=torch.bfloat16,
            ).cuda()  # fmt: skip
            size = torch.tensor([words.shape[-2], self.inputs], device=words.device).expand(*words.shape[:-2], 2)
            self.layer.load_from_tensors({"weight_packed": words, "weight_scale": scale, "weight_shape": size})
            self.layer.transform()
            kind = INDEXED if self.experts else DENSE
            bounds = [0, *(rows * top_k for rows in ROWS)]  # from 0: the launcher looks up one row in any case
            self.tuning = [
                [low, high, get_heuristics_config(self.layer.humming_config, high, gemm_type=kind)]
                for low, high in itertools.pairwise(bounds)
            ]
            self.compute = json.dumps({"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": kind})

    def values(self) -> Tensor:
        """What they stand for, bfloat16 [(E,) O, I]."""
        each = self.words.view(-1, *self.words.shape[-2:]), self.scale.view(-1, *self.scale.shape[-2:])
        made = [
            (unpack_words(w, self.bits, self.inputs).unflatten(-1, (s.shape[-1], -1)) * s[..., None]) for w, s in zip(*each)
        ]
        return torch.stack(made).view(*self.words.shape[:-1], -1)

    def compile(self) -> None:
        from humming.kernel.humming import HummingKernel

        config = self.layer.humming_config.to_str()
        HummingKernel.prepare_kernels(config, self.compute, json.dumps(self.tuning), torch.cuda.current_device())

    def calls(self, x: Tensor, ids: Tensor | None, spread: bool, copies: int) -> list[Callable[[], Tensor]]:
        """The product with each of so many copies of the weights."""
        if self.layer is None:
            return [functools.partial(exact_product, x, self.values(), ids, spread)] * copies
        more: dict[str, Any] = {"compute_config": self.compute, "tuning_config": json.dumps(self.tuning)}
        if ids is not None:
            block = next(entry[2]["block_shape"][0] for entry in self.tuning if entry[0] < ids.numel() <= entry[1])
            names = ("sorted_ids", "expert_ids", "num_tokens_padded")
            more |= dict(zip(names, aligned(ids.flatten(), self.experts, block)))
            more |= {"top_k": 1 if spread else self.top_k, "valid_shape_m": ids.numel()}
        layers = [self.layer, *(copy.deepcopy(self.layer) for _ in range(copies - 1))]
        return [functools.partial(layer, x, **more) for layer in layers]


def exact_product(x: Tensor, weight: Tensor, ids: Tensor | None, spread: bool) -> Tensor:
    """x @ W.T in the dtype of ``x``, expert by expert where there are ids."""
    if ids is None:
        return x @ weight.to(x.dtype).T
    x = x if spread else x.repeat_interleave(ids.shape[1], 0)
    out, flat = x.new_empty(len(x), weight.shape[-2]), ids.flatten()
    for expert in flat.unique().tolist():
        own = flat == expert
        out[own] = x[own] @ weight[expert].to(x.dtype).T
    return out


def bfloat16_calls(x: Tensor, weight: Tensor, ids: Tensor | None, spread: bool, copies: int) -> list[Callable[[], Tensor]]:
    """The same product with the dequantized weights, by cuBLAS and torch's grouped product; rows in the order of experts."""
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    if ids is None or not x.is_cuda:
        return [functools.partial(exact_product, x, w, ids, spread) for w in weights]
    flat = ids.flatten()
    rows = (x if spread else x.repeat_interleave(ids.shape[1], 0))[torch.argsort(flat, stable=True)]
    ends = torch.bincount(flat, minlength=len(weight)).cumsum(0).int()
    return [functools.partial(torch._grouped_mm, rows, w.mT, offs=ends) for w in weights]


def call_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 20) -> float:
    """Seconds of one of ``calls``, made in turn; on a GPU in a graph, so that nobody waits for the launch."""
    for call in calls[:2]:
        call()
    many = [*calls] * max(1, 20 // len(calls))
    if not torch.cuda.is_available():
        return seconds(calls[0], 3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in many]
    run = seconds(graph.replay, repeats)
    del kept
    return run / len(many)


def packed_matrices(directory: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, words, scale) of what a layer multiplies at once, from a packed checkpoint."""
    stored = open_tensors(directory)[1]
    at = "model.language_model.layers.0"
    count = sum(name.startswith(f"{at}.mlp.experts.") and name.endswith("down_proj.weight_shape") for name in stored)

    def parts(*modules: str) -> list[Tensor]:
        return [torch.cat([stored[f"{m}.weight_{part}"].read() for m in modules]) for part in ("packed", "scale")]

    yield "in_proj_qkv", *parts(f"{at}.linear_attn.in_proj_qkv")
    for label, names in (("gate, up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
        yield f"shared {label}", *parts(*(f"{at}.mlp.shared_expert.{name}" for name in names))
        each = [parts(*(f"{at}.mlp.experts.{expert}.{name}" for name in names)) for expert in range(count)]
        yield f"experts' {label}", *(torch.stack(own) for own in zip(*each))


def packed(args: argparse.Namespace) -> dict[str, Any]:
    device, checkpoint = default_device(), Checkpoint(args.model)
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            import humming  # noqa: F401  (it asks the GPU when it is imported)
        if "humming" not in sys.modules:
            raise UserError("packed: the kernels are those of humming-kernels: pip install humming-kernels==0.1.19")
    top_k = checkpoint.config["text_config"]["num_experts_per_tok"]
    rows_of: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    work: list[tuple[int, int, str, PackedProduct]] = []
    for bits, group in WIDTHS:
        out = args.work / f"packed-{bits}-{group}"
        started = time.time()
        recipe = Recipe(bits, bits, group, 1, method="absmax")
        quantize_checkpoint(args.model, out, recipe, force=True, packed=True)
        written = time.time()
        for name, words, scale in packed_matrices(out):
            product = PackedProduct(words.to(device), scale.to(device), bits, group, top_k if words.ndim == 3 else 1)
            work.append((bits, group, name, product))
        shutil.rmtree(out)
        spent = f"packed in {written - started:.0f} s, read and laid out for the kernels in {time.time() - written:.0f} s"
        print(f"bench: {bits} bits in groups of {group}: {spent}", flush=True)
    for many in (False, True):  # single matrices first: what is printed stays, should the others fail
        own = [item for item in work if bool(item[3].experts) is many]
        started, compiled = time.time(), None
        if device.type == "cuda":
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                compiled = [pool.submit(item[3].compile) for item in own]
            print(f"bench: kernels compiled in {time.time() - started:.0f} s", flush=True)
        for place, (bits, group, name, product) in enumerate(own):
            try:
                if compiled:
                    compiled[place].result()
                rows_of += measure_product(bits, group, name, product, top_k)
                print(product_line(rows_of[-len(ROWS) :]), flush=True)
            except RuntimeError as error:  # of the package's compiler or launcher: the other products count all the same
                what = f"{bits} bits, groups of {group}, {name}"
                failed[what] = str(error).strip().splitlines()[-1]
                print(f"bench: {what}: not measured: {failed[what]}", flush=True)
    kernels = f"humming-kernels {importlib.metadata.version('humming-kernels')}" if device.type == "cuda" else "torch, no GPU"
    return {"kernels": kernels, "top_k": top_k, "products": rows_of, "failed": failed}


def measure_product(bits: int, group: int, name: str, product: PackedProduct, top_k: int) -> list[dict[str, Any]]:
    """Errors relative to the product in float64, and seconds, for each number of tokens."""
    found, values, spread = [], product.values(), "experts" in name and "down" in name
    size = product.words.nbytes + product.scale.nbytes
    for rows in ROWS:
        generator = torch.Generator().manual_seed(rows)
        ids = None
        if product.experts:
            scores = torch.rand(rows, product.experts, generator=generator)
            ids = scores.topk(min(top_k, product.experts), 1).indices.to(values.device)
        count = rows * top_k if spread else rows
        x = torch.randn(count, product.inputs, generator=generator).bfloat16().to(values.device)
        copies = [min(128, math.ceil(BEYOND_CACHES / each)) if x.is_cuda else 1 for each in (size, values.nbytes)]
        exact = exact_product(x.double(), values, ids, spread)
        calls = product.calls(x, ids, spread, copies[0])
        error, usual = (
            ((made.double() - exact).norm() / exact.norm()).item()
            for made in (calls[0](), exact_product(x, values, ids, spread))
        )
        mine = call_seconds(calls)
        del calls
        plain = call_seconds(bfloat16_calls(x, values, ids, spread, copies[1]))
        found.append({
            "bits": bits, "group": group, "matrix": name, "shape": list(values.shape), "bytes": size, "tokens": rows,
            "relative_error": error, "bf16_relative_error": usual, "within_bf16_rounding": error <= 2 * usual,
            "seconds": mine, "bf16_seconds": plain,
        })  # fmt: skip
    return found


def product_line(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    each = "; ".join(
        f"[{row['tokens']}] {row['seconds'] * 1e6:.1f} us (BF16 {row['bf16_seconds'] * 1e6:.1f}), error "
        f"{row['relative_error']:.5f} ({row['bf16_relative_error']:.5f})" for row in rows
    )  # fmt: skip
    return f"bench: {first['bits']} bits, groups of {first['group']}, {first['matrix']} {first['shape']}: {each}"


def packed_table(found: dict[str, Any]) -> str:
    rows = found["products"]
    right = sum(row["within_bf16_rounding"] for row in rows)
    lost = f"; {len(found['failed'])} of the matrices not measured" if found["failed"] else ""
    return f"{found['kernels']}: {right} of {len(rows)} products within twice the rounding of the same product in BF16{lost}"


PARTS = {
    "kernels": (kernels, kernels_table), "disk": (disk, disk_table), "hub": (hub, hub_table), "layers": (layers, layers_table),
    "memory": (memory, memory_table), "packed": (packed, packed_table),
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="what", required=True)
    part = commands.add_parser("kernels", help="the grids and one layer, without a checkpoint")
    part.add_argument("--layer", choices=sorted(LAYERS), help="default: 122b on a GPU, small on a CPU")
    part.add_argument("--ggml", default="iq3_xxs,iq2_xs,q4_K", help="block types to encode the layer into; empty: none")
    part.set_defaults(model=None)
    add_record_arguments(part)
    measured = {
        "disk": "the data-free pass beside the disk",
        "hub": "the data-free pass from a hub",
        "layers": "the calibrated pass, by layer",
        "memory": "the calibrated pass under caps on the GPU's memory",
        "packed": "products with packed matrices",
    }
    for name, help_ in measured.items():
        part = commands.add_parser(name, help=help_)
        part.add_argument("--model", type=Path, required=True, help="a checkpoint (of synthetic_moe.py, but for hub)")
        part.add_argument("--work", type=Path, required=True, help="directory for what is written")
        add_record_arguments(part)
        if name == "disk":
            part.add_argument("--probe-gib", type=float, default=8.0, help="bytes of each test of the disk (default 8 GiB)")
            part.add_argument("--shard-gib", type=float, default=4.0, help="largest file of the output (default 4)")
            part.add_argument("--devices", default=",".join(map(str, lanes(default_device()))), help="as quant_save's")
        elif name == "hub":
            part.add_argument("--rate", type=float, default=40e6, help="bytes a second of the server (default 40e6)")
        elif name in ("layers", "memory"):
            part.add_argument("--sequences", type=int, default=128, help="of calibration (default 128)")
            part.add_argument("--length", type=int, default=512, help="tokens of one (default 512)")
            part.add_argument("--header", type=Path, help="ldlq: file of synthetic_moe --header-only for this model")
        if name == "memory":
            part.add_argument("--caps", default="80,46,23,11", help="GiB (default 80,46,23,11)")
            part.add_argument("--methods", default="gptq_refit,weights,ldlq", help="default gptq_refit,weights,ldlq")
            part.add_argument("--seconds", type=float, default=3600.0, help="for all runs together (default 3600)")
        elif name == "layers":
            part.add_argument("--method", choices=PASSES, required=True, help="how the layers are rounded")
            part.add_argument("--batch", type=int, default=8, help="sequences at once (default 8)")
            part.add_argument("--no-group-kernels", dest="group_kernels", action="store_false",
                              help="ldlq on a GPU without the kernels of whole groups")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    check_record_arguments(args)
    started = time.time()
    measure, table = PARTS[args.what]
    source = describe_model(args.model) if args.model else None
    measured = measure(args)
    if args.result:
        metrics = {"hub" if args.what == "hub" else f"size_{args.what}": measured} if args.model else measured
        write_result(args.result, kind="bench", tag=args.tag, started=started, model=source, metrics=metrics)
    print(table(measured), flush=True)


if __name__ == "__main__":
    run_cli(main)
