"""Speed and memory of a GGUF file in llama.cpp, beside the limit: bash pipelines/bench.sh --gguf F.gguf

    python src/eval/gguf_bench.py --gguf F.gguf [--prompt 512] [--generate 128] [--result results/bench/T.json --tag T]

llama-bench measures prefill at several batch sizes and decoding of one sequence; llama-server decodes several sequences at
once. On a machine with a GPU all of it runs twice: everything on the GPU, and with the experts in the CPU's memory
(--n-cpu-moe). The limit of one sequence is the memory's: bytes of the weights that a token needs, at the rate at which this
machine copies memory. A file that fits the caches can beat it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from backend_openai import in_parallel
from console import UserError, progress, run_cli
from gguf_info import architecture_value, describe_gguf, gguf_files, open_gguf
from llama_cpp import tool
from llamacpp_eval8 import LlamaServer, die_with_parent, thread_arguments
from records import add_record_arguments, check_record_arguments, peak_rss_mib, write_result

GPU_ALL = ("-ngl", "99")
PLACEMENTS = {"all_on_gpu": GPU_ALL, "experts_on_cpu": (*GPU_ALL, "--n-cpu-moe", "999")}


def active_bytes(path: Path) -> dict[str, int]:
    """Bytes of the weights that decoding one token reads: {total, experts, other}; of each stack of experts the share that
    a token is routed to, of the embedding one row unless it is also the output matrix."""
    readers = [open_gguf(file) for file in gguf_files(path)]
    count, used = (int(architecture_value(readers[0], key, 0)) for key in ("expert_count", "expert_used_count"))
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    experts = other = 0
    for name, tensor in tensors.items():
        size = int(tensor.n_bytes)
        if "_exps." in name and count:
            experts += size * used // count
        elif name == "token_embd.weight" and "output.weight" in tensors:
            other += size // int(tensor.shape[1])
        else:
            other += size
    return {"total": experts + other, "experts": experts, "other": other}


def copy_rate(device: torch.device, size: int = 1 << 28) -> float:
    """Bytes read and written a second by a copy of ``size`` bytes, the best of seven."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(7):
        started = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * size / best


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


class VramWatch:
    """The highest use of GPU memory while the block runs, above what was in use before; ``peak`` is None without a GPU."""

    def __enter__(self) -> VramWatch:
        self.peak: int | None = None
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if shutil.which("nvidia-smi"):
            self.before, self.peak = vram_mib(), 0
            self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.2):
            self.peak = max(self.peak or 0, vram_mib() - self.before)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        if self.peak is not None:
            self.thread.join()


def run_bench(arguments: Sequence[object]) -> tuple[list[dict[str, Any]], int]:
    """(llama-bench's rows, its peak resident memory in MiB)."""
    threads = [] if "-t" in arguments else thread_arguments()
    command = [tool("llama-bench"), *map(str, arguments), "--output", "json", *threads]
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


def together(model: Path, sequences: int, generate: int, options: Sequence[str]) -> dict[str, Any]:
    """Tokens a second of all ``sequences`` that llama-server decodes at once, and its peak resident memory."""
    fields = {"prompt": [1], "n_predict": generate, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
    with LlamaServer(model, generate + 64, sequences, options) as server:
        work = lambda _: server.client.call("/completion", fields)["tokens_predicted"]  # noqa: E731
        list(in_parallel(work, sequences, sequences))  # warms up
        started = time.perf_counter()
        tokens = sum(count for _, count in in_parallel(work, sequences, sequences))
        return {"tokens_per_s": tokens / (time.perf_counter() - started), "peak_rss_mib": peak_rss_mib(server.process.pid)}


def measure(args: argparse.Namespace, options: Sequence[str], bar: Any) -> dict[str, Any]:
    """Prefill by batch size, decoding by number of sequences, peak memory, for one placement of the weights."""
    prefill, decode, memory = {}, {}, []
    with VramWatch() as watch:
        sizes = ",".join(map(str, args.batches))
        fixed = ["--model", args.gguf, *options, "--repetitions", args.repetitions]
        rows, peak = run_bench([*fixed, "-p", args.prompt, "-n", 0, "-b", max(args.batches), "-ub", sizes])
        prefill = {str(row["n_ubatch"]): {"tokens_per_s": row["avg_ts"], "deviation": row["stddev_ts"]} for row in rows}
        memory.append(peak)
        bar.update()
        rows, peak = run_bench([*fixed, "-p", 0, "-n", args.generate])
        decode = {"1": {"tokens_per_s": rows[0]["avg_ts"], "deviation": rows[0]["stddev_ts"]}}
        memory.append(peak)
        bar.update()
        for count in args.sequences:
            found = together(args.gguf, count, args.generate, options)
            memory.append(found.pop("peak_rss_mib"))
            decode[str(count)] = found
            bar.update()
    return {"prefill": prefill, "decode": decode, "peak_rss_mib": max(memory), "peak_vram_mib": watch.peak}


def table(metrics: dict[str, Any]) -> str:
    active, rate = metrics["active_bytes"], metrics["copy_bytes_per_s"]
    lines = [
        f"a token reads {active['total'] / 1e6:.2f} MB of weights, of them {active['experts'] / 1e6:.2f} MB experts; memory is "
        f"copied at {rate / 1e9:.1f} GB/s: at most {metrics['limit_tokens_per_s']:.0f} tokens/s for one sequence"
    ]
    for name, found in metrics["placements"].items():
        vram = "" if found["peak_vram_mib"] is None else f", VRAM {found['peak_vram_mib']} MiB"
        lines.append(f"{name}: peak memory {found['peak_rss_mib']} MiB{vram}")
        for size, row in found["prefill"].items():
            lines.append(f"  prefill, batch {size:<6}{row['tokens_per_s']:>12.1f} tokens/s")
        for count, row in found["decode"].items():
            share = f"{100 * row['tokens_per_s'] / metrics['limit_tokens_per_s']:>7.1f} % of the limit" if count == "1" else ""
            lines.append(f"  decode, {count:>2} at once   {row['tokens_per_s']:>12.1f} tokens/s{share}")
    if not metrics["gpu"]:
        lines.append("no GPU in this llama.cpp: experts offloaded and not are the same here, measured once")
    return "\n".join(lines)


def numbers(text: str) -> list[int]:
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that gguf_sweep has too."""
    parser.add_argument("--gguf", type=Path, required=True, help="the file to measure")
    parser.add_argument("--generate", type=int, default=128, help="tokens to decode (default 128)")
    parser.add_argument("--repetitions", type=int, default=3, help="of each measurement (default 3)")
    add_record_arguments(parser)


def bench_metrics(args: argparse.Namespace, gpu: bool, rate: float, placements: dict[str, Any]) -> dict[str, Any]:
    """What the record holds; ``rate``: of a copy of memory, ``placements``: what :func:`measure` found."""
    active = active_bytes(args.gguf)
    return {
        "prompt": args.prompt, "generate": args.generate, "threads": len(os.sched_getaffinity(0)), "gpu": gpu,
        "active_bytes": active, "copy_bytes_per_s": rate, "limit_tokens_per_s": rate / active["total"],
        "placements": placements,
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_bench_arguments(parser)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (default 512)")
    parser.add_argument("--batches", type=numbers, default=[32, 128, 512], help="batch sizes of prefill (default 32,128,512)")
    parser.add_argument("--sequences", type=numbers, default=[4, 16], help="sequences decoded at once (default 4,16)")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_record_arguments(args)
    if min(args.prompt, args.generate, args.repetitions) < 1:
        raise UserError("--prompt, --generate and --repetitions must be at least 1")
    started, described, gpu = time.time(), describe_gguf(args.gguf), has_gpu()
    rate = copy_rate(torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu"))
    placements = PLACEMENTS if gpu else {"cpu": ()}
    with progress(len(placements) * (2 + len(args.sequences)), "llama.cpp", "run") as bar:
        found = {name: measure(args, options, bar) for name, options in placements.items()}
    metrics = bench_metrics(args, gpu, rate, found)
    if args.result:
        write_result(args.result, kind="bench", tag=args.tag, started=started, model=described, metrics=metrics)
    print(table(metrics), flush=True)


if __name__ == "__main__":
    run_cli(main)
