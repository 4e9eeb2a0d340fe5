"""Speed and memory of a GGUF file in llama.cpp, beside the limit: bash pipelines/bench.sh --gguf F.gguf

    python src/eval/speed_gguf.py --gguf F.gguf [--prompt 512] [--generate 128] [--result results/bench/T.json --tag T]
    python src/eval/speed_gguf.py --gguf F.gguf --on-gpu --experts-on-cpu 999,24 [--threads 8,16] [--flash-attention on,off]
    python src/eval/speed_gguf.py --gguf F.gguf --draft 1,3 [--questions 32] [--generate 256]      # pipelines/bench.sh mtp
    python src/eval/speed_gguf.py --gguf F.gguf --try "no graphs: GGML_CUDA_DISABLE_GRAPHS=1 -p 0" --into D.json
    python src/eval/speed_gguf.py --decoding D.json [--result results/bench/T.json --tag T]    where the time of a token goes

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
import math
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

import numpy as np
import torch

from backend_openai import NEUTRAL, in_parallel
from console import UserError, numbers, progress, read_object, run_cli, write_json
from devices import nvidia_smi
from gguf_format import architecture_value, describe_gguf, gguf_files, open_parts
from llama_cpp import sees_gpu, tool
from llamacpp_eval8 import GgufTokenizer, LlamaServer, die_with_parent, thread_arguments
from records import REPO, add_record_arguments, check_record_arguments, peak_rss_mib, read_result, write_result
from size_model import copy_rate
from task_text import TASK_TEXTS

ALL_ON_GPU = ("-ngl", "99")
QUESTION_ROOM = 512  # tokens of a question
ACCEPTANCE = REPO / "results/train/razor_tiny_mtp.json"
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


def count_operations(path: Path) -> int:
    """Operations of the graph of one token, views not counted, as ggml's scheduler lists them."""
    command = [tool("llama-bench"), "-m", path, *"-ngl 99 -p 0 -n 1 -r 1 --no-warmup -v".split(), *thread_arguments()]
    environment = os.environ | {"GGML_SCHED_DEBUG": "2"}
    told = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, errors="replace")
    if told.returncode:
        last = " | ".join(told.stderr.strip().splitlines()[-3:])
        raise UserError(f"{path}: llama-bench ended with {told.returncode}: {last}")
    return told.stderr.rpartition("## SPLIT #0")[2].count("node #")


def batched_bench(*arguments: object) -> list[dict[str, Any]]:
    command = [str(tool("llama-batched-bench")), *map(str, arguments), "--output-format", "jsonl"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in told.splitlines() if line.startswith("{")]


def try_settings(args: argparse.Namespace) -> None:
    """Each --try with --gguf, its rows added to --into; one that fails is noted with its message, and the others follow."""
    found = read_object(args.into, "files", "tries") if args.into.exists() else {"files": {}, "tries": []}
    if args.gguf.stem not in found["files"]:
        layers = int(architecture_value(next(iter(open_parts(args.gguf).values())), "block_count"))
        found["files"][args.gguf.stem] = describe_gguf(args.gguf, digest=False) | {
            "layers": layers, "active_bytes": active_bytes(args.gguf), "operations": count_operations(args.gguf),
        }  # fmt: skip
    for text in args.tries:
        if time.time() > args.until:
            print(f"no time for: {text}", flush=True)
            continue
        name, _, words = text.partition(":")
        environment = dict(word.split("=", 1) for word in words.split() if re.match(r"[A-Z_]+=", word))
        options = [word for word in words.split() if word.partition("=")[0] not in environment]
        before, started = {key: os.environ.get(key) for key in environment}, time.time()
        os.environ.update(environment)
        entry: dict[str, Any] = {"file": args.gguf.stem, "name": name.strip(), "environment": environment, "options": options}
        try:
            if "-npl" in options:
                entry["batched"] = batched_bench("-m", args.gguf, *options)
            else:
                rows, entry["peak_rss_mib"] = llama_bench("-m", args.gguf, *options)
                keys = (*SETTINGS, "n_depth", "load_mode", "no_host", "cpu_strict", "cpu_mask", "poll")
                for row in rows:
                    middle = sorted(row["samples_ns"])[len(row["samples_ns"]) // 2]
                    known = {key: row[key] for key in keys if key in row}
                    entry.setdefault("rows", []).append(known | {"seconds": middle / 1e9})
        except (UserError, subprocess.CalledProcessError) as error:
            entry["failed"] = " ".join(f"{error} {(getattr(error, 'stderr', None) or '')[-300:]}".split())
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
        found["tries"].append(entry | {"wall_s": round(time.time() - started, 1)})
        write_json(args.into, found)
        print("\n".join(tried(entry)), f"({found['tries'][-1]['wall_s']} s)", flush=True)


def tried(entry: dict[str, Any]) -> Iterator[str]:
    title = f"{entry['file']}, {entry['name']}"
    if "failed" in entry:
        yield f"{title}: FAILED, {entry['failed']}"
    for row in entry.get("rows", ()):
        what = f"prompt {row['n_prompt']}" if row["n_prompt"] else f"decode {row['n_gen']}"
        told = " ".join(
            f"{key[2:] if key.startswith('n_') else key} {row[key]}"
            for key in ("n_depth", "n_ubatch", "flash_attn", "n_threads", "n_cpu_moe")
        )
        yield f"{title}: {what} in {1e3 * row['seconds']:.2f} ms; {told}"
    for row in entry.get("batched", ()):
        yield f"{title}: {row['pl']} sequences, {1e3 * row['t_tg'] / row['tg']:.2f} ms a token of each"


def host_rates() -> dict[str, float]:
    """Bytes a second of the host's memory with all threads: a copy, read and written, and a sum, read only."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    data, best = torch.ones(1 << 28, dtype=torch.int64), 0.0
    for _ in range(7):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.nbytes / (time.perf_counter() - started))
    return {"copy": copy_rate(torch.device("cpu"), 1 << 30), "read": best}


def fit_decoding(files: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """Least squares of relative errors over the files: seconds of a token = a * operations + bytes / bandwidth, neither below
    zero; beside it seconds of a layer and of the rest, from the same files."""
    names = [name for name in files if name in seconds]
    y = np.array([seconds[name] for name in names])
    counts = np.array([[files[name]["operations"], files[name]["active_bytes"]["total"]] for name in names])
    scale, free = counts.max(0), [0, 1]
    while True:
        found, *_ = np.linalg.lstsq((counts / scale / y[:, None])[:, free], np.ones(len(names)), rcond=None)
        if len(free) == 1 or found.min() >= 0:
            break
        free.pop(int(found.argmin()))
    a, b = (float(found[free.index(i)] / scale[i]) if i in free else 0.0 for i in range(2))
    made = {"operation_s": a, "bandwidth": 1 / b if b else None}
    rows = {
        name: {"seconds": seconds[name], "fitted_s": a * float(ops) + b * float(size), "operations_s": a * float(ops),
               "bytes_s": b * float(size)}
        for name, (ops, size) in zip(names, counts)
    }  # fmt: skip
    whole = [i for i, name in enumerate(names) if "narrow" not in name]
    layers = np.array([files[names[i]]["layers"] for i in whole])
    slope, rest = np.polyfit(layers, y[whole], 1).tolist() if len(whole) > 1 else (None, None)
    return made | {"layer_s": slope, "rest_s": rest, "files": rows}


def drafting(costs: dict[str, float], draft: float, accepted: Sequence[float]) -> dict[str, float]:
    """ESTIMATE of tokens a second by the number of drafted tokens: one and those accepted, each given the ones before it, over
    the seconds of verifying and of drafting each."""
    found = {}
    for count in range(1, len(costs)):
        shares = np.cumprod([accepted[min(place, len(accepted) - 1)] for place in range(count)])
        found[str(count)] = float((1 + shares.sum()) / (costs[str(count + 1)] + count * draft))
    return found


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    """The metrics of a record from what --try found."""
    found = read_object(args.decoding, "files", "tries")
    rows = [(entry, row) for entry in found["tries"] for row in entry.get("rows", ())]
    token = [(entry, row, row["seconds"] / row["n_gen"]) for entry, row in rows if row["n_gen"]]
    plain = {e["file"]: s for e, row, s in token if e["name"] == "plain" and not row["n_depth"]}
    fitted = fit_decoding(found["files"], plain)
    host, files, verify = host_rates(), found["files"], {}
    shares = [
        {"file": e["file"], "name": e["name"], "threads": row["n_threads"], "n_cpu_moe": row["n_cpu_moe"],
         "tokens_per_s": 1 / s,
         "host_bytes": files[e["file"]]["active_bytes"]["experts"] * min(1, row["n_cpu_moe"] / files[e["file"]]["layers"])}
        for e, row, s in token if row["n_cpu_moe"]
    ]  # fmt: skip
    for share in shares:
        share["share_of_read"] = share["host_bytes"] * share["tokens_per_s"] / host["read"]
    for entry, row in rows:
        if entry["name"].startswith("verify") and row["n_prompt"]:
            key = f"{entry['file']}, {entry['name']}, after {row['n_depth']}"
            verify.setdefault(key, {})[str(row["n_prompt"])] = row["seconds"]
    accepted = read_result(args.acceptance)["metrics"]["accepted"]
    means = [float(np.mean(place)) for place in zip(*accepted.values())]
    draft = max(0.0, (fitted["layer_s"] or 0) + (fitted["rest_s"] or 0))  # a layer, and the head that stands in the rest
    estimate = {key: drafting(costs, draft, means) for key, costs in verify.items()}
    drafted = {"accepted": means, "accepted_of": args.acceptance.stem, "draft_s": draft, "tokens_per_s": estimate}
    return found | {
        "fit": fitted, "host_bytes_per_s": host, "host": shares, "verify_s": verify, "drafted_estimate": drafted,
    }  # fmt: skip


def decoding_table(metrics: dict[str, Any]) -> str:
    fit, host = metrics["fit"], metrics["host_bytes_per_s"]
    width = f"{fit['bandwidth'] / 1e9:.0f} GB/s" if fit["bandwidth"] else "no bytes"
    lines = [f"a token: {1e6 * fit['operation_s']:.2f} us an operation, {width}"]
    for name, row in fit["files"].items():
        parts = [1e3 * row[key] for key in ("seconds", "fitted_s", "operations_s", "bytes_s")]
        lines.append("  {:<24} {:.3f} ms, fitted {:.3f}: operations {:.3f}, bytes {:.3f}".format(name, *parts))
    lines.append(f"host memory: copied at {host['copy'] / 1e9:.1f} GB/s, read at {host['read'] / 1e9:.1f} GB/s")
    for row in metrics["host"]:
        lines.append(
            "  {file}, {name}, {threads} threads, {n_cpu_moe} layers: {tokens_per_s:.2f} tokens/s, {share_of_read:.1%}".format(
                **row
            )
        )
    for name, rates in metrics["drafted_estimate"]["tokens_per_s"].items():
        lines.append(f"estimate with drafts, {name}: " + ", ".join(f"{n}: {rate:.1f} tokens/s" for n, rate in rates.items()))
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gguf", type=Path, help="the file to measure")
    parser.add_argument("--try", action="append", dest="tries", default=[], help="NAME: [KEY=VALUE ...] options of llama-bench")
    parser.add_argument("--into", type=Path, help="JSON that what --try found is added to")
    parser.add_argument("--until", type=float, default=math.inf, help="seconds since 1970 after which no --try begins")
    parser.add_argument("--decoding", type=Path, help="that JSON: fit it")
    parser.add_argument(
        "--acceptance", type=Path, default=ACCEPTANCE, help="record of drafts accepted (default razor_tiny_mtp)"
    )
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
    if bool(args.gguf) == bool(args.decoding) or bool(args.tries) != bool(args.into):
        raise UserError("give --gguf FILE, with --try and --into or neither, or --decoding FILE")
    if args.tries:
        return try_settings(args)
    if args.decoding:
        started, metrics = time.time(), decoding(args)
        if args.result:
            largest = max(metrics["files"].values(), key=lambda file: file["bytes"])
            model = {key: value for key, value in largest.items() if key not in ("layers", "active_bytes", "operations")}
            write_result(args.result, kind="bench", tag=args.tag, started=started, model=model, metrics=metrics)
        print(decoding_table(metrics), flush=True)
        return None
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
