"""Speed and memory of a GGUF file in llama.cpp, beside the limit: bash pipelines/bench.sh --gguf F.gguf

    python src/eval/speed_gguf.py --gguf F.gguf [--prompt 512] [--generate 128] [--result results/bench/T.json --tag T]
    python src/eval/speed_gguf.py --gguf F.gguf --on-gpu --experts-on-cpu 999,24 [--threads 8,16] [--flash-attention on,off]
    python src/eval/speed_gguf.py --gguf F.gguf --draft 1,3 [--questions 32] [--generate 256]      # pipelines/bench.sh mtp

A file is loaded twice for a placement of its weights: llama-bench tries all settings (batch sizes of prefill, flash attention,
threads) after one load, llama-server decodes several sequences at once.
Placements: all weights on the GPU, and the experts of the first N layers in the CPU's memory (--n-cpu-moe N); without either
option both on a machine with a GPU, and `cpu` on another. The limit of one sequence is the memory's: bytes of the weights that
a token needs, at the rate at which this machine copies memory. A file that fits the caches can beat it.

--draft asks llama-server the tiny tasks' test questions, one at a time and greedily: without drafting, and with as many tokens
drafted by the file's block of multi-token prediction (--spec-type draft-mtp). It counts what was drafted and accepted, and
whether every answer is token for token the same. Nothing drafted or nothing accepted is an error.
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

from backend_openai import NEUTRAL, in_parallel
from console import UserError, numbers, progress, run_cli
from devices import nvidia_smi
from gguf_format import architecture_value, describe_gguf, gguf_files, open_parts
from llama_cpp import sees_gpu, tool
from llamacpp_eval8 import GgufTokenizer, LlamaServer, die_with_parent, thread_arguments
from records import add_record_arguments, check_record_arguments, peak_rss_mib, write_result
from size_model import copy_rate
from task_text import TASK_TEXTS

ALL_ON_GPU = ("-ngl", "99")
QUESTION_ROOM = 512  # tokens of a question
LARGE = 40 << 30  # the digest of such a file takes longer than the measurement
SETTINGS = ("n_prompt", "n_gen", "n_ubatch", "n_threads", "flash_attn", "n_gpu_layers", "n_cpu_moe")  # that rows may differ in


def active_bytes(path: Path) -> dict[str, int]:
    """Bytes of the weights that decoding one token reads, not drafting: {total, experts, other}; of each stack of experts the
    share that a token is routed to, of the embedding one row unless it is also the output matrix."""
    readers = list(open_parts(path).values())
    count, used = (int(architecture_value(readers[0], key, 0)) for key in ("expert_count", "expert_used_count"))
    tensors = {t.name: t for reader in readers for t in reader.tensors if not is_mtp_tensor(readers[0], t.name)}
    experts = other = 0
    for name, tensor in tensors.items():
        size = int(tensor.n_bytes)
        if "_exps." in name and count:
            experts += size * used // count
        else:
            one_row = name == "token_embd.weight" and "output.weight" in tensors
            other += size // int(tensor.shape[1]) if one_row else size
    return {"total": experts + other, "experts": experts, "other": other}


def is_mtp_tensor(reader: Any, name: str) -> bool:
    """Whether a tensor is of the block of multi-token prediction, which stands behind the decoder's."""
    layers = int(architecture_value(reader, "block_count", 0)) - int(architecture_value(reader, "nextn_predict_layers", 0))
    return (found := re.match(r"blk\.(\d+)\.", name)) is not None and int(found[1]) >= layers


def mtp_types(path: Path) -> dict[str, int]:
    """Bytes of the file's block of multi-token prediction by type."""
    readers, found = list(open_parts(path).values()), dict[str, int]()
    for tensor in (tensor for reader in readers for tensor in reader.tensors if is_mtp_tensor(readers[0], tensor.name)):
        kind = tensor.tensor_type.name.lower()
        found[kind] = found.get(kind, 0) + int(tensor.n_bytes)
    return dict(sorted(found.items()))


def vram_mib() -> int:
    """Memory in use on all GPUs that this process may use together."""
    return sum(int(used) for (used,) in nvidia_smi("memory.used"))


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


def questions(count: int) -> list[list[dict[str, Any]]]:
    """Chats of the tiny tasks' test items, as many of each task as of the others."""
    tasks = [kind() for kind in TASK_TEXTS]
    found = [task.messages(item) for task in tasks for item in task.load(-(-count // len(tasks)))]
    return found[:count]


def answers(args: argparse.Namespace, options: Sequence[str]) -> tuple[list[list[int]], dict[str, float]]:
    """(greedy tokens of every question, sums of the server's timings); of --repetitions rounds the fastest."""
    fields = NEUTRAL | {"n_predict": args.generate, "temperature": 0.0, "cache_prompt": False, "return_tokens": True}
    rounds: list[tuple[list[list[int]], dict[str, float]]] = []
    with LlamaServer(args.gguf, args.generate + QUESTION_ROOM, 1, options) as server:
        tokenizer = GgufTokenizer(args.gguf, server.client)
        prompts = [tokenizer(tokenizer.render(chat))["input_ids"] for chat in questions(args.questions)]
        server.client.call("/completion", fields | {"prompt": prompts[0]})  # warms up
        for _ in range(args.repetitions):
            found = [server.client.call("/completion", fields | {"prompt": prompt}) for prompt in prompts]
            keys = ("predicted_n", "predicted_ms", "draft_n", "draft_n_accepted")
            sums = {key: sum(answer["timings"].get(key, 0) for answer in found) for key in keys}
            rounds.append(([answer["tokens"] for answer in found], sums))
    return min(rounds, key=lambda one: one[1]["predicted_ms"])


def draft(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy decoding with and without drafting; raises :class:`UserError` where the block guesses nothing right."""
    block = mtp_types(args.gguf)
    if not block:
        raise UserError(f"{args.gguf}: holds no block of multi-token prediction; pack_gguf.sh writes it unless MTP=0")
    plain, timings = answers(args, ())
    rate = 1000 * timings["predicted_n"] / timings["predicted_ms"]
    metrics = {"questions": len(plain), "tokens": int(timings["predicted_n"]), "tokens_per_s": rate, "mtp_types": block}
    drafts = {}
    for count in args.draft:
        found, timings = answers(args, ("--spec-type", "draft-mtp", "--spec-draft-n-max", str(count)))
        drafted, accepted = int(timings["draft_n"]), int(timings["draft_n_accepted"])
        if not accepted:
            raise UserError(f"{args.gguf}: of {drafted} drafted tokens none was accepted; its block of multi-token prediction "
                            "is of another model, untrained, or rounded too coarsely")  # fmt: skip
        drafts[str(count)] = {
            "drafted": drafted, "accepted": accepted, "acceptance": accepted / drafted,
            "same_answers": sum(own == other for own, other in zip(found, plain, strict=True)),
            "tokens_per_s": 1000 * timings["predicted_n"] / timings["predicted_ms"],
        }  # fmt: skip
    return metrics | {"drafts": drafts, "threads": len(os.sched_getaffinity(0)), "generate": args.generate}


def draft_table(metrics: dict[str, Any]) -> str:
    kinds = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in metrics["mtp_types"].items())
    lines = [
        f"{metrics['questions']} questions, {metrics['tokens']} tokens; the block of multi-token prediction: {kinds}",
        f"{'drafted at once':<17}{'drafted':>9}{'accepted':>10}{'share':>9}{'same answers':>14}{'tokens/s':>10}",
        f"{'none':<17}{'':>42}{metrics['tokens_per_s']:>10.1f}",
    ]
    for count, row in metrics["drafts"].items():
        same = f"{row['same_answers']} of {metrics['questions']}"
        share, rate = f"{100 * row['acceptance']:.2f} %", f"{row['tokens_per_s']:.1f}"
        lines.append(f"{count:<17}{row['drafted']:>9,}{row['accepted']:>10,}{share:>9}{same:>14}{rate:>10}")
    return "\n".join(lines)


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
    parser.add_argument("--draft", type=numbers, default=[], help="instead of all this: tokens that mtp drafts at once")
    parser.add_argument("--questions", type=int, default=32, help="of the tiny tasks, for --draft (default 32)")
    add_record_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_record_arguments(args)
    if min(args.generate, args.repetitions, args.questions) < 1:
        raise UserError("--generate, --repetitions and --questions must be at least 1")
    started, gpu = time.time(), sees_gpu()
    size = sum(file.stat().st_size for file in gguf_files(args.gguf))
    described = describe_gguf(args.gguf, digest=size < LARGE)
    if args.draft:
        metrics = draft(args)
        if args.result:
            write_result(args.result, kind="bench", tag=args.tag, started=started, model=described, metrics=metrics)
        return print(draft_table(metrics), flush=True)
    active = active_bytes(args.gguf)
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
