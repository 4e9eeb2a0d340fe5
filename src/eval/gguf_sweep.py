"""A large GGUF under llama.cpp's settings, a few loads of the file: bash pipelines/bench_h100.sh, or

    python src/eval/gguf_sweep.py --gguf F.gguf [--on-gpu] [--experts-on-cpu 999,24] [--threads 8,16] [--result F --tag T]

gguf_bench loads the file eight times; at 48 GiB that is most of the time. Here llama-bench tries all settings of one placement
after one load (batch sizes of prefill, flash attention, threads); llama-batched-bench decodes several sequences. Placements:
all weights on the GPU, and the experts of the first N layers in the CPU's memory (--n-cpu-moe N). The record has the shape of
gguf_bench's, with every setting under `settings`, and the figures that were published for the 122B, as theirs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from console import UserError, progress, run_cli
from gguf_bench import GPU_ALL, VramWatch, add_bench_arguments, bench_metrics, copy_rate, has_gpu, numbers, run_bench, together
from gguf_info import gguf_files, metadata, open_gguf
from llama_cpp import Incomplete, asked, tools
from llamacpp_eval8 import thread_arguments
from records import check_record_arguments, public_path, write_result

# InstinctRazor, one H100, IQ3_XXS of 48.04 GiB (its README): theirs, not measured here.
PUBLISHED = {
    "all_on_gpu": {"decode": 115.9, "prefill": 2541.0},
    "experts_on_cpu": {"decode": 45.7, "vram_gib": 7.6},
}


def describe(path: Path) -> dict[str, Any]:
    """The model entry of the record, without a digest: reading 48 GiB again takes longer than the measurement."""
    reader = open_gguf(path)
    return {
        "path": public_path(str(path.resolve())), "format": "gguf", "architecture": metadata(reader, "general.architecture"),
        "bytes": sum(file.stat().st_size for file in gguf_files(path)), "tensors": len(reader.tensors),
    }  # fmt: skip


def batched_rows(command: Sequence[str], count: int) -> list[dict[str, Any]]:
    """The ``count`` rows that llama-batched-bench prints."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    last = " | ".join(done.stderr.splitlines()[-3:])
    if done.returncode:
        raise UserError(f"llama-batched-bench ended with {done.returncode}: {last}")
    lines = [line[line.index("{") :] for line in (done.stdout + done.stderr).splitlines() if '{"n_kv_max"' in line]
    if len(lines) != count:
        raise Incomplete(f"llama-batched-bench printed {len(lines)} of {count} rows: {last}")
    return [json.loads(line) for line in lines]


def batched(args: argparse.Namespace, options: Sequence[str]) -> dict[str, dict[str, float]]:
    """Tokens a second of all sequences that are decoded at once, by their number."""
    tool = tools() / "llama-batched-bench"
    if not tool.is_file():
        found = {str(n): together(args.gguf, n, args.generate, options) for n in args.sequences}
        return {n: {"tokens_per_s": made["tokens_per_s"]} for n, made in found.items()}
    context = max(args.sequences) * (args.sequence_prompt + args.generate)
    command = [
        str(tool), "-m", str(args.gguf), *options, "-c", str(context),
        "-npp", str(args.sequence_prompt), "-ntg", str(args.generate),
        "-npl", ",".join(map(str, args.sequences)), "-fa", "on", "--output-format", "jsonl", *thread_arguments(),
    ]  # fmt: skip
    rows = asked(lambda: batched_rows(command, len(args.sequences)))
    return {str(row["pl"]): {"tokens_per_s": row["speed_tg"], "prefill_tokens_per_s": row["speed_pp"]} for row in rows}


def setting(row: dict[str, Any]) -> dict[str, Any]:
    """What a row of llama-bench says, without what all rows share."""
    keys = ("n_prompt", "n_gen", "n_ubatch", "n_threads", "flash_attn", "n_gpu_layers", "n_cpu_moe")
    kept = {key: row[key] for key in keys if key in row}
    return kept | {"tokens_per_s": row["avg_ts"], "deviation": row["stddev_ts"]}


def measure(args: argparse.Namespace, options: Sequence[str], threads: Sequence[int], several: bool) -> dict[str, Any]:
    """All settings of one placement. ``several``: also decode several sequences at once, which loads the file again."""
    sizes = ",".join(map(str, args.batches))
    fixed = ["--model", args.gguf, *options, "--repetitions", args.repetitions, "-fa", args.flash_attention]
    fixed += ["-p", ",".join(map(str, args.prompt)), "-n", args.generate, "-b", max(args.batches), "-ub", sizes]
    fixed += ["-t", ",".join(map(str, threads))] if threads else []
    with VramWatch() as watch:
        started = time.time()
        rows, peak = run_bench(fixed)
        seconds = time.time() - started
        more = batched(args, options) if several else {}
    settings = [setting(row) for row in rows]
    prefill: dict[str, Any] = {}
    for row in settings:
        size = str(row["n_ubatch"])
        if row["n_prompt"] and row["tokens_per_s"] > prefill.get(size, {"tokens_per_s": 0.0})["tokens_per_s"]:
            prefill[size] = row
    alone = max((row for row in settings if row["n_gen"]), key=lambda row: row["tokens_per_s"])
    decode = {"1": alone} | {count: row for count, row in more.items() if count != "1"}
    found = {"prefill": prefill, "decode": decode, "peak_rss_mib": peak, "peak_vram_mib": watch.peak}
    return found | {"settings": settings, "batched": more, "llama_bench_s": seconds, "options": list(map(str, options))}


def table(metrics: dict[str, Any]) -> str:
    active, rate = metrics["active_bytes"], metrics["copy_bytes_per_s"]
    lines = [
        f"a token reads {active['total'] / 1e9:.3f} GB, of them {active['experts'] / 1e9:.3f} GB experts; memory is copied at "
        f"{rate / 1e9:.0f} GB/s: at most {metrics['limit_tokens_per_s']:.0f} tokens/s for one sequence"
    ]
    for name, found in metrics["placements"].items():
        theirs = metrics["published"].get(name, {})
        lines.append(f"{name}: VRAM {found['peak_vram_mib']} MiB, published {theirs or 'nothing'}")
        for row in found["settings"]:
            what = f"prefill {row['n_prompt']}" if row["n_prompt"] else f"decode {row['n_gen']}"
            with_ = f"ubatch {row['n_ubatch']}, threads {row['n_threads']}, fa {row['flash_attn']}"
            lines.append(f"  {what:<14}{row['tokens_per_s']:>10.1f} tokens/s   {with_}")
        for count, row in found["batched"].items():
            lines.append(f"  {count:>3} sequences {row['tokens_per_s']:>10.1f} tokens/s")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_bench_arguments(parser)
    parser.add_argument("--on-gpu", action="store_true", help="measure with all weights on the GPU")
    parser.add_argument("--experts-on-cpu", type=numbers, default=[], help="layers with experts on the CPU; 999: all of them")
    parser.add_argument("--threads", type=numbers, default=[], help="of the CPU, where experts are; default: all it may use")
    parser.add_argument("--prompt", type=numbers, default=[512, 2048], help="tokens of the prompt (default 512,2048)")
    parser.add_argument("--batches", type=numbers, default=[512, 2048], help="batch sizes of prefill (default 512,2048)")
    parser.add_argument(
        "--sequences", type=numbers, default=[1, 2, 4, 8, 16, 32], help="decoded at once (default 1,2,4,...,32)"
    )
    parser.add_argument("--sequence-prompt", type=int, default=64, help="tokens before those (default 64)")
    parser.add_argument("--flash-attention", default="on,off", help="on, off or both (default on,off)")
    return parser.parse_args()


def placements(args: argparse.Namespace, gpu: bool) -> dict[str, tuple[Sequence[str], Sequence[int], bool]]:
    """Name -> options, threads to try, whether several sequences are decoded. On a machine without a GPU one, `cpu`."""
    if not gpu:
        return {"cpu": ((), args.threads, True)}
    found: dict[str, tuple[Sequence[str], Sequence[int], bool]] = {}
    if args.on_gpu:
        found["all_on_gpu"] = (GPU_ALL, (), True)
    for count in args.experts_on_cpu:
        name = "experts_on_cpu" if count >= 999 else f"experts_of_{count}_layers_on_cpu"
        found[name] = ((*GPU_ALL, "--n-cpu-moe", str(count)), args.threads, False)
    if not found:
        raise UserError("nothing to measure; give --on-gpu, --experts-on-cpu or both")
    return found


def main() -> None:
    args = parse_args()
    check_record_arguments(args)
    started, gpu = time.time(), has_gpu()
    described = describe(args.gguf)
    rate = copy_rate(torch.device("cuda" if gpu and torch.cuda.is_available() else "cpu"), 1 << (31 if gpu else 28))
    torch.cuda.empty_cache()
    found = {}
    chosen = placements(args, gpu)
    with progress(len(chosen), "llama.cpp", "placement") as bar:
        for name, (options, threads, several) in chosen.items():
            found[name] = measure(args, options, threads, several)
            bar.update()
    metrics = bench_metrics(args, gpu, rate, found) | {"published": PUBLISHED}
    if args.result:
        write_result(args.result, kind="bench", tag=args.tag, started=started, model=described, metrics=metrics)
    print(table(metrics), flush=True)


if __name__ == "__main__":
    run_cli(main)
