"""Speed and memory of a GGUF file in llama.cpp, beside the limit: bash pipelines/bench.sh --gguf F.gguf

    python src/eval/speed_gguf.py --gguf F.gguf [--prompt 512] [--generate 128] [--result results/bench/T.json --tag T]
    python src/eval/speed_gguf.py --gguf F.gguf --on-gpu --experts-on-cpu 999,24 [--threads 8,16] [--flash-attention on,off]

A file is loaded twice for a placement of its weights: llama-bench tries all settings (batch sizes of prefill, flash attention,
threads) after one load, llama-server decodes several sequences at once.
Placements: all weights on the GPU, and the experts of the first N layers in the CPU's memory (--n-cpu-moe N); without either
option both on a machine with a GPU, and `cpu` on another. The limit of one sequence is the memory's: bytes of the weights that
a token needs, at the rate at which this machine copies memory. A file that fits the caches can beat it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from backend_openai import in_parallel
from console import UserError, numbers, progress, run_cli
from gguf_format import architecture_value, describe_gguf, gguf_files, open_parts
from llama_cpp import tool
from llamacpp_eval8 import LlamaServer, die_with_parent, thread_arguments
from records import add_record_arguments, check_record_arguments, peak_rss_mib, write_result
from size_model import copy_rate

ALL_ON_GPU = ("-ngl", "99")
LARGE = 40 << 30  # the digest of such a file takes longer than the measurement
SETTINGS = ("n_prompt", "n_gen", "n_ubatch", "n_threads", "flash_attn", "n_gpu_layers", "n_cpu_moe")  # that rows may differ in


def active_bytes(path: Path) -> dict[str, int]:
    """Bytes of the weights that decoding one token reads: {total, experts, other}; of each stack of experts the share that
    a token is routed to, of the embedding one row unless it is also the output matrix."""
    readers = list(open_parts(path).values())
    count, used = (int(architecture_value(readers[0], key, 0)) for key in ("expert_count", "expert_used_count"))
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    experts = other = 0
    for name, tensor in tensors.items():
        size = int(tensor.n_bytes)
        if "_exps." in name and count:
            experts += size * used // count
        else:
            one_row = name == "token_embd.weight" and "output.weight" in tensors
            other += size // int(tensor.shape[1]) if one_row else size
    return {"total": experts + other, "experts": experts, "other": other}


def has_gpu() -> bool:
    """Whether llama.cpp, as it was built, sees a GPU."""
    listed = subprocess.run([tool("llama-bench"), "--list-devices"], capture_output=True, text=True, check=True)
    return "(none)" not in listed.stdout and ":" in listed.stdout.split("devices:", 1)[-1]


def vram_mib() -> int:
    """Memory in use on all GPUs that this process may use together."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if re.fullmatch(r"\d+(,\d+)*", chosen := os.environ.get("CUDA_VISIBLE_DEVICES", "")):
        query += ["-i", chosen]
    return sum(int(line) for line in subprocess.run(query, capture_output=True, text=True, check=True).stdout.split())


@contextmanager
def vram_watch() -> Iterator[list[int]]:
    """Yields a list that ends with the highest use of GPU memory while the block ran, above what was in use before; it stays
    empty without a GPU."""
    peak: list[int] = []
    done = threading.Event()

    def watch(before: int) -> None:
        while not done.wait(0.2):
            peak.append(max(0, vram_mib() - before, *peak[-1:]))

    if not shutil.which("nvidia-smi"):
        yield peak
        return
    thread = threading.Thread(target=watch, args=[vram_mib()], daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def llama_bench(*arguments: object) -> tuple[list[dict[str, Any]], int]:
    """(its rows, its peak resident memory in MiB)."""
    command = [str(tool("llama-bench")), *map(str, arguments), "--output", "json"]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, preexec_fn=die_with_parent(os.getpid())
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), errors.seek(0)
        if child.returncode:
            last = " | ".join(errors.read().decode("utf-8", "replace").strip().splitlines()[-3:])
            raise UserError(f"llama-bench ended with {child.returncode}: {last}")
        return json.loads(out.read()), usage.ru_maxrss // 1024


def together(args: argparse.Namespace, options: Sequence[str]) -> tuple[dict[str, dict[str, float]], int]:
    """(tokens a second of all sequences that llama-server decodes at once, by their number; its peak resident memory)."""
    fields = {"prompt": [1], "n_predict": args.generate, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
    found = {}
    with LlamaServer(args.gguf, args.generate + 64, max(args.sequences), options) as server:
        work = lambda _: server.client.call("/completion", fields)["tokens_predicted"]  # noqa: E731
        for count in args.sequences:
            list(in_parallel(work, count, count))  # warms up
            started = time.perf_counter()
            tokens = sum(n for _, n in in_parallel(work, count, count))
            found[str(count)] = {"tokens_per_s": tokens / (time.perf_counter() - started)}
        return found, peak_rss_mib(server.process.pid)


def measure(args: argparse.Namespace, options: Sequence[str], threads: Sequence[int], several: bool) -> dict[str, Any]:
    """All settings of one placement. ``several``: also decode several sequences at once, which loads the file again."""
    command = ["--model", args.gguf, *options, "--repetitions", args.repetitions, "-p", ",".join(map(str, args.prompt))]
    command += ["-n", args.generate, "-b", max(args.batches), "-ub", ",".join(map(str, args.batches))]
    command += ["-fa", args.flash_attention] if args.flash_attention else []
    command += ["-t", ",".join(map(str, threads))] if threads else thread_arguments()
    with vram_watch() as vram:
        started = time.time()
        rows, peak = llama_bench(*command)
        seconds = time.time() - started
        more, other = together(args, options) if several else ({}, 0)
    settings = [
        {key: row[key] for key in SETTINGS if key in row} | {"tokens_per_s": row["avg_ts"], "deviation": row["stddev_ts"]}
        for row in sorted(rows, key=lambda row: row["avg_ts"])
    ]  # the fastest last, so that it is the one that stays
    alone = [row for row in settings if row["n_gen"]][-1]
    return {
        "prefill": {str(row["n_ubatch"]): row for row in settings if row["n_prompt"]}, "decode": more | {"1": alone},
        "peak_rss_mib": max(peak, other), "peak_vram_mib": vram[-1] if vram else None, "settings": settings, "batched": more,
        "llama_bench_s": seconds, "options": list(options),
    }  # fmt: skip


def placements(args: argparse.Namespace, gpu: bool) -> dict[str, tuple[Sequence[str], Sequence[int], bool]]:
    """Name -> options, threads to try, whether several sequences are decoded."""
    if not gpu:
        return {"cpu": ((), args.threads, True)}
    named = args.on_gpu or args.experts_on_cpu
    found: dict[str, tuple[Sequence[str], Sequence[int], bool]] = {}
    if args.on_gpu or not named:
        found["all_on_gpu"] = (ALL_ON_GPU, (), True)
    for count in args.experts_on_cpu if named else [999]:
        name = "experts_on_cpu" if count >= 999 else f"experts_of_{count}_layers_on_cpu"
        found[name] = ((*ALL_ON_GPU, "--n-cpu-moe", str(count)), args.threads, not named)
    return found


def table(metrics: dict[str, Any]) -> str:
    active, limit = metrics["active_bytes"], metrics["limit_tokens_per_s"]
    lines = [
        f"a token reads {active['total'] / 1e6:.2f} MB of weights, of them {active['experts'] / 1e6:.2f} MB experts; memory is "
        f"copied at {metrics['copy_bytes_per_s'] / 1e9:.1f} GB/s: at most {limit:.0f} tokens/s for one sequence"
    ]
    for name, found in metrics["placements"].items():
        vram = "" if found["peak_vram_mib"] is None else f", VRAM {found['peak_vram_mib']} MiB"
        lines.append(f"{name}: peak memory {found['peak_rss_mib']} MiB{vram}")
        for row in found["settings"]:
            what = f"prefill {row['n_prompt']}" if row["n_prompt"] else f"decode {row['n_gen']}"
            with_ = f"ubatch {row['n_ubatch']}, threads {row['n_threads']}, fa {row['flash_attn']}"
            lines.append(f"  {what:<14}{row['tokens_per_s']:>12.1f} tokens/s   {with_}")
        for count, row in found["decode"].items():
            share = f"{100 * row['tokens_per_s'] / limit:>7.1f} % of the limit" if count == "1" else ""
            lines.append(f"  {count + ' sequences':<14}{row['tokens_per_s']:>12.1f} tokens/s{share}")
    if not metrics["gpu"]:
        lines.append("no GPU in this llama.cpp: experts offloaded and not are the same here, measured once")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gguf", type=Path, required=True, help="the file to measure")
    parser.add_argument("--on-gpu", action="store_true", help="measure with all weights on the GPU")
    parser.add_argument("--experts-on-cpu", type=numbers, default=[], help="layers with experts on the CPU; 999: all of them")
    parser.add_argument("--threads", type=numbers, default=[], help="of the CPU, where experts are; default: all it may use")
    parser.add_argument("--prompt", type=numbers, default=[512], help="tokens of the prompt (default 512)")
    parser.add_argument("--generate", type=int, default=128, help="tokens to decode (default 128)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (default 3)")
    parser.add_argument("--batches", type=numbers, default=[32, 128, 512], help="batch sizes of prefill (default 32,128,512)")
    parser.add_argument("--sequences", type=numbers, default=[4, 16], help="sequences decoded at once (default 4,16)")
    parser.add_argument("--flash-attention", default="", help="on, off or on,off (default: llama.cpp's choice)")
    add_record_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_record_arguments(args)
    if min(args.generate, args.repetitions) < 1:
        raise UserError("--generate and --repetitions must be at least 1")
    started, gpu = time.time(), has_gpu()
    size = sum(file.stat().st_size for file in gguf_files(args.gguf))
    described, active = describe_gguf(args.gguf, digest=size < LARGE), active_bytes(args.gguf)
    rate = copy_rate(torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu"), 1 << (31 if gpu else 28))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    chosen, found = placements(args, gpu), {}
    with progress(len(chosen), "llama.cpp", "placement") as bar:
        for name, (options, threads, several) in chosen.items():
            found[name] = measure(args, options, threads, several)
            bar.update()
    metrics = {
        "prompt": args.prompt, "generate": args.generate, "threads": len(os.sched_getaffinity(0)), "gpu": gpu,
        "active_bytes": active, "copy_bytes_per_s": rate, "limit_tokens_per_s": rate / active["total"], "placements": found,
    }  # fmt: skip
    if args.result:
        write_result(args.result, kind="bench", tag=args.tag, started=started, model=described, metrics=metrics)
    print(table(metrics), flush=True)


if __name__ == "__main__":
    run_cli(main)
