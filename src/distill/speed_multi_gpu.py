"""What pipelines/multi_gpu.sh runs: everything that claims to work on several GPUs, beside the same on one.

    python src/distill/speed_multi_gpu.py --part quantize --work /dev/shm/multi --records results/bench [--processes 2] [--tiny]

    quantize   quant_save on one device and on all: the same bytes, data-free and calibrated; seconds
    distill    distill.sh --smoke, then a recovery of razor-tiny by one process, by one again and by N from the same rollouts:
               gradients, adapters, final KL, tokens/s; what one process differs by from itself is what N may differ by
    train35b   phase C on a synthetic model of the 35B's shape: memory of every process, seconds a step
    train122b  the same on two slices of the 122B, whose difference says how many layers would fit
    fit122b    that many layers, without weights (files of holes): whether they do fit
    eval       greedy answers of one GPU, of a copy on each and of layers spread over all: equal ones, tokens/s
    eval35b    the same, spread against one GPU, on the 35B's shape
    vllm       questions and forced lengths through vLLM with its tensor parallelism on 1, 2, 4 GPUs: equal answers, tokens/s
    servers    rollouts by a vLLM server on each GPU, of which 1, 2, 4 are asked: equal greedy answers of razor-tiny, tokens/s
               of the 35B's layers

Each part leaves a record, RECORDS/multi_gpu_PART.json, and is skipped where it exists. Without a GPU, processes on the CPU take
their place. --tiny: the same with sizes for a test. The commands are those of the pipelines; their output is in WORK/PART/log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from backend import HfBackend, Replicas, Sampling
from backend_openai import Client
from checkpoint import Checkpoint
from console import UserError, read_json, run_cli, write_json
from devices import parse_devices
from families import text_config
from fsdp_setup import shared_cores
from hf_model import load_tokenizer
from llamacpp_eval8 import die_with_parent, free_port
from opd_budget import budget
from opd_data import ADAPTER, ADAPTER_JSON, PHASE, Scoring, tokenizer_sha256, write_rollouts
from opd_score import score_rollouts
from recipe import RECIPE_FILE, Recipe
from records import REPO, read_result, write_result
from runner import get_benchmarks
from sample_log import read_samples
from settings import parse_settings, setting
from size_model import SHAPES, sizes_of
from size_model import Shape as ModelShape
from synthetic_moe import prepare
from vllm_eval import ENGINE_ENVIRONMENT

RECIPE = ["--expert-bits", 3, "--linear-bits", 4, "--group", 128, "--clip-steps", 16]
DISTILL = {"TASKS": "tiny_know,tiny_math,tiny_reason", "LIMIT": "32", "STEPS": "40", "ROWS": "16"}
DISTILL |= {"KL_ITEMS": "16", "SAVE_EVERY": "40"}
DISTILL_TINY = {"LIMIT": "4", "STEPS": "3", "ROWS": "4", "KL_ITEMS": "1", "SAVE_EVERY": "3", "WARMUP": "0"}
DISTILL_TINY |= {"FINISHED_ONLY": "0", "MAX_TOKENS": "12", "TASKS": "tiny_know,tiny_math"}
RUNS = ("one", "again", "many")
NEAR = 1e-3  # relative, of losses and norms of gradients that count as equal
SLICES = (2, 4)  # layers of the 122B
RANK, ROWS, PROMPT, TOKENS, STEPS = 8, 4, 32, 1024, 4
FIT_STEPS = 3  # of the largest slice
PARALLEL = (1, 2, 4)  # GPUs that vLLM divides a layer by
VLLM_TINY = ["--batches", "1,4", "--prompt", 16, "--generate", 16]
VLLM_SIZE = ["--batches", "1,16,32", "--prompt", 256, "--generate", 128]
# no NVLink multicast; on a CPU, cores that others use too
VLLM_ENVIRONMENT = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SERVE = 'vllm serve --max-model-len 2048 --generation-config vllm --limit-mm-per-prompt \'{"image": 0, "video": 0}\''
RAZOR = REPO / "models/razor-tiny"
VOCABULARY = 32768  # of the quantized layers: the experts are what is measured
# in a log that ends with torchrun's own summary
ERROR = re.compile(r"(\[rank\d+\]: )?(error: |[\w.]*(Error|Exception)\b: ).*")
FREE_GB = 3.0  # of a GPU, for the CUDA context and NCCL


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What is measured, where and on what."""

    part: str = setting(help="what to measure")
    work: Path = setting(help="large files; for the 35B 140 GB, in memory best (/dev/shm)")
    records: Path = setting(help="directory of multi_gpu_PART.json")
    processes: int = setting(0, "GPUs, or CPU processes; 0: all, at least 2")
    vllm_python: str = setting(sys.executable, "an interpreter that has vLLM, where it stands apart")
    serve: str = setting(SERVE, "in part servers: how one is started; a model, --served-model-name and --port follow")
    layers: int = setting(40, "of the 35B in parts vllm and servers")
    tiny: bool = setting(False, "sizes for a test")
    gpus: int = 0  # 0 where processes on the CPU stand in

    def devices(self, each: int = 1) -> str:
        """--devices of all GPUs, ``each`` threads on every one."""
        return ",".join([f"cuda:{i}" if self.gpus else "cpu" for i in range(self.processes) for _ in range(each)])

    @property
    def log(self) -> Path:
        return self.work / "log"

    @property
    def rows(self) -> int:
        """Rollouts of a step of phase C: about ROWS, equally many on each process."""
        return self.processes * max(1, ROWS // self.processes)

    @property
    def one(self) -> str:
        return "cuda:0" if self.gpus else "cpu"

    def run(self, script: str, *arguments: object, processes: int = 1, **environment: str) -> float:
        """Run one of the project's commands in WORK; its output goes to the log. Returns its seconds, with Python's start."""
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
        python = self.vllm_python if "vllm" in arguments else sys.executable
        command = [str(part) for part in (python, *run, REPO / script, *arguments)]
        shown = [time.strftime("%T"), *(f"{key}={value}" for key, value in environment.items()), *command[1:]]
        variables = os.environ | (shared_cores(processes) if processes > 1 else {}) | environment
        started = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n+ {' '.join(shown)}\n")
            log.flush()
            process = subprocess.Popen(command, cwd=self.work, env=variables, stdout=log, stderr=log)
        try:
            code = process.wait()
        finally:  # another part begins after this one was stopped
            process.terminate()
            process.wait()
        if code:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if ERROR.match(line)] or [line for line in lines if line.strip()]
            raise UserError(f"part {self.part}: exit code {code}: {' | '.join(said[-3:])}; the log is {self.log}")
        return round(time.monotonic() - started, 2)


def same_files(a: Path, *others: Path) -> bool:
    """Whether checkpoints have the same shards with the same bytes."""
    found = [([file.name for file in made.files], made.sha256()) for made in map(Checkpoint, (a, *others))]
    return all(other == found[0] for other in found)


def random_rollouts(bench: Bench, teacher: Path, out: Path) -> float:
    """Rollouts of random tokens and random scores of them, in the formats of phases A and B: to try phase C at a size, whose
    losses then mean nothing. They belong to the teacher as its own would; its tokenizer has fewer tokens than its vocabulary,
    which changes no size that matters. Returns the seconds; works on the CPU alone."""
    started = time.monotonic()
    tokenizer, draw, tokens = load_tokenizer(teacher), random.Random(0), 40 if bench.tiny else TOKENS
    words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    rows = []
    for number in range(2 * bench.rows):
        asked, said = (draw.choices(words, k=length) for length in (PROMPT, tokens))
        row = {"benchmark": "random", "id": f"{number:06d}", "prompt": tokenizer.decode(asked), "text": tokenizer.decode(said)}
        row |= {"prompt_ids": asked, "ids": said, "tokens": tokens}
        rows.append(row | {"finish_reason": "length", "correct": None})  # it ran out of tokens
    settings = {"model": "random tokens", "seed": 0, "tokens": tokens, "prompt": PROMPT}
    settings["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
    choice, total = {"finished_only": False, "correct_only": False}, sum(row["tokens"] for row in rows)
    write_rollouts(out / "rollouts", rows, rows, settings, choice, time.monotonic() - started, total)
    scoring = Scoring(score_batch=4)
    score_rollouts(scoring, teacher, out / "rollouts", out / "scores", lambda _: random_teacher(len(tokenizer)))
    return round(time.monotonic() - started, 2)


def random_teacher(vocabulary: int) -> LlamaForCausalLM:
    """A model of one narrow layer, whose scores are noise."""
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **size)).eval()


# ---------------------------------------------------------------- quantize


def quantize_part(bench: Bench) -> dict[str, Any]:
    """Two layers of the 35B; the calibrated method rounds their experts in several pieces."""
    for path in bench.work.glob("*/"):  # of a run that was killed
        shutil.rmtree(path)
    source, ways = bench.work / "slice", {"one": bench.one, "all": bench.devices(), "all_twice": bench.devices(2)}
    made = synthetic(bench, source, *((4, "tiny") if bench.tiny else (2, "35b", "--vocab", VOCABULARY)))
    found: dict[str, Any] = {"bytes": Checkpoint(source).bytes, "synthetic_seconds": made, "data_free": {}, "calibrated": {}}
    free = ["--method", "clip", "--shard-gib", 0.004 if bench.tiny else 0.5]
    calibrated = ["--method", "gptq", "--shard-gib", 4]
    calibrated += ["--calib-sequences", 8 if bench.tiny else 32, "--calib-length", 64 if bench.tiny else 256]
    if bench.gpus:  # the first run on a machine compiles the kernels
        quantized(bench, "first", ways["all"], *free)
    for name, devices in ways.items():
        found["data_free"][name] = quantized(bench, name, devices, *free)
    for name in ("one", "all"):
        found["calibrated"][name] = quantized(bench, f"gptq-{name}", ways[name], *calibrated)
    found["data_free"]["same_bytes"] = same_files(*(bench.work / name for name in ways))
    found["calibrated"]["same_bytes"] = same_files(bench.work / "gptq-one", bench.work / "gptq-all")
    if not found["calibrated"]["same_bytes"]:  # does one GPU repeat itself?
        quantized(bench, "gptq-again", bench.one, *calibrated)
        found["calibrated"]["one_repeats_itself"] = same_files(bench.work / "gptq-one", bench.work / "gptq-again")
    for path in bench.work.glob("*/"):
        shutil.rmtree(path)
    return found


def quantized(bench: Bench, name: str, devices: str, *options: object) -> dict[str, Any]:
    """Seconds, rate and memory of quant_save on ``devices``."""
    source, record = bench.work / "slice", bench.work / f"{name}.json"
    paths = ["--model", source, "--out", bench.work / name, "--result", record, "--tag", name, "--force"]
    total = bench.run("src/quant/quant_save.py", *paths, *RECIPE, "--devices", devices, *options)
    made = read_result(record, "quantize")
    return {
        "devices": devices, "seconds": made["seconds"], "seconds_with_start": total,
        "gb_per_second": round(Checkpoint(source).bytes / 1e9 / made["seconds"], 3),
        "peak_rss_mib": made["peak_rss_mib"], "device_peak_mib": made["device_peak_mib"],
    }  # fmt: skip


def synthetic(bench: Bench, out: Path, layers: int, shape: str, *more: object) -> float:
    """A synthetic checkpoint; seconds."""
    size = ["--shape", shape, "--layers", layers, "--devices", bench.devices(1 if bench.tiny else 4)]
    return bench.run("src/quant/synthetic_moe.py", "--out", out, *size, *more)


# ---------------------------------------------------------------- distill


def distill_part(bench: Bench) -> dict[str, Any]:
    """--smoke by all; then one recovery by one process, and from its rollouts again by one and by all."""
    base = {"TEACHER": str(RAZOR), "BACKEND": "hf"} | (DISTILL_TINY if bench.tiny else DISTILL)
    micro = max(1, int(base["ROWS"]) // bench.processes)  # the same for one process, so that it adds up the same pieces
    base |= {"ROWS": str(micro * bench.processes), "MICRO_ROWS": str(micro)}
    command = ("src/distill/distill_run.py", "--config", REPO / "configs/opd_tiny.env")
    started, many = time.monotonic(), str(bench.processes)
    bench.run(*command, "--smoke", **base, WORK=str(bench.work / "opd"), PROCESSES=many)
    one = bench.work / "one"
    bench.run(*command, **base, WORK=str(one), TAG="one", PROCESSES="1")
    same = {"STUDENT": str(one / "student"), "CACHE": str(one / "teacher")}
    for tag, processes in (("again", "1"), ("many", many)):
        (bench.work / tag / "kl").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(one / "kl/before.json", bench.work / tag / "kl/before.json")
        bench.run(*command, **base, **same, WORK=str(bench.work / tag), TAG=tag, PROCESSES=processes)
    metrics = read_result(bench.work / "opd-smoke/distill/smoke.json", "distill")["metrics"]
    kl = {f"kl_{state}": metrics[f"kl_{state}"]["mean"] for state in ("before", "after")}
    found: dict[str, Any] = {"smoke": kl | {"train": metrics["phases"]["opd_train"]}}
    base["TEACHER"] = Path(base["TEACHER"]).name
    return found | {"settings": base, "seconds": round(time.monotonic() - started, 1)} | compared(bench)


def compared(bench: Bench) -> dict[str, Any]:
    """What training cost each of the runs, and how far the others are from the first."""
    records = {tag: read_result(bench.work / f"results/distill/{tag}.json", "distill")["metrics"] for tag in RUNS}
    trained = {tag: record["phases"]["opd_train"] for tag, record in records.items()}
    return {
        **trained, "speedup": trained["one"]["median_step_seconds"] / trained["many"]["median_step_seconds"],
        "kl_before": records["one"]["kl_before"]["mean"],
        "kl_after": {tag: record["kl_after"]["mean"] for tag, record in records.items()},
        "apart": {tag: apart(bench.work / "one/adapter", bench.work / tag / "adapter") for tag in RUNS[1:]},
    }  # fmt: skip


def apart(one: Path, two: Path) -> dict[str, Any]:
    """Losses, gradients and adapters of two runs, as differences. Where rounding decides one code otherwise the runs go apart:
    ``equal_steps`` counts those before."""
    curves = [torch.tensor(read_json(path / ADAPTER_JSON)["curve"], dtype=torch.float64) for path in (one, two)]
    (loss, norm), (other_loss, other_norm) = (curve.T[1:3] for curve in curves)
    losses, norms = (loss - other_loss).abs(), (norm - other_norm).abs() / norm.clamp(min=1e-12)
    near = (losses <= NEAR * loss.abs()) & (norms <= NEAR)
    adapters = [load_file(path / ADAPTER) for path in (one, two)]
    return {
        "equal_steps": int(near.int().cumprod(0).sum()), "tolerance": NEAR,
        "first_gradient_relative_difference": norms[0].item(), "gradient_relative_difference": norms.max().item(),
        "loss_difference": losses.max().item(),
        "adapter_largest_value": max(value.abs().max().item() for value in adapters[0].values()),
        "adapter_largest_difference": max((adapters[0][n] - adapters[1][n]).abs().max().item() for n in adapters[0]),
    }  # fmt: skip


# ---------------------------------------------------------------- phase C at a size


def train35b_part(bench: Bench) -> dict[str, Any]:
    layers = 4 if bench.tiny else fitting_layers(bench.work, SHAPES["35b"])
    return trained(bench, "tiny" if bench.tiny else "35b", layers, keep=True)


def train122b_part(bench: Bench) -> dict[str, Any]:
    """Two slices; a layer's share of a GPU's memory is their difference."""
    few, many = (4, 8) if bench.tiny else SLICES
    slices = {str(layers): trained(bench, "tiny" if bench.tiny else "122b", layers) for layers in (few, many)}
    kind = "peak_reserved_mib" if bench.gpus else "peak_rss_mib"
    low, high = (max(rank[kind] for rank in found["train"]["ranks"]) for found in slices.values())
    found: dict[str, Any] = {"slices": slices, "mib_a_layer": (high - low) / (many - few)}
    if bench.gpus:
        room = (torch.cuda.get_device_properties(0).total_memory - FREE_GB * 1e9) / 2**20
        found |= {"room_mib": room, "layers_that_fit": int(min(48, many + (room - high) // found["mib_a_layer"]))}
    return found


def trained(bench: Bench, shape: str, layers: int, keep: bool = False) -> dict[str, Any]:
    """Make the model, quantize it while the rollouts are made, train a few steps; what each took."""
    base = bench.work / f"{shape}-{layers}"
    teacher, student, data = (base / name for name in ("teacher", "student", "data"))
    found: dict[str, Any] = {"shape": shape, "layers": layers}
    if not (student / RECIPE_FILE).exists() or not (data / "scores").exists():
        shutil.rmtree(base, ignore_errors=True)  # of a run that was killed
        found["synthetic_seconds"] = synthetic(bench, teacher, layers, shape)
        paths = ["--model", teacher, "--out", student, "--devices", bench.devices(1 if bench.tiny else 4), "--shard-gib", 2]
        with ThreadPoolExecutor(1) as pool:
            making = pool.submit(random_rollouts, bench, teacher, data)
            found["quantize_seconds"] = bench.run("src/quant/quant_save.py", *paths, *RECIPE)
            making.result()
    found |= fitted(bench, base, teacher)
    needs = budget(student, gpus=bench.processes, rank=RANK, rows=bench.rows, micro_rows=1, tokens=TOKENS)["gpu"]
    parts = {name: round(size / 1e9, 2) for name, size in needs.items()}
    found["predicted_gpu_gb"] = parts | {"total": round(sum(parts.values()), 2)}
    shutil.rmtree(teacher if keep else base)
    return found


def fitted(bench: Bench, base: Path, teacher: Path, *more: object, steps: int = STEPS) -> dict[str, Any]:
    """Phase C of ``base``/student by all processes: seconds in all, its own account, the losses."""
    student, data, out = (base / name for name in ("student", "data", "adapter"))
    paths = ["--student", student, "--teacher", teacher, "--rollouts", data / "rollouts", "--scores", data / "scores"]
    size = ["--steps", steps, "--rows", bench.rows, "--micro-rows", 1, "--rank", RANK, "--save-every", steps, "--warmup", 0]
    arguments = [*paths, "--out", out, *size, *more]
    total = bench.run("src/distill/opd_train_fsdp.py", *arguments, processes=bench.processes)
    found = {"parameters": sum(info.numel for info in Checkpoint(student).tensors.values()), "seconds": total}
    found |= {"train": read_json(out / "phase.json"), "curve": read_json(out / ADAPTER_JSON)["curve"]}
    shutil.rmtree(out)
    return found | {"steps": steps, "rows": bench.rows, "rank": RANK}


def fitting_layers(work: Path, shape: ModelShape) -> int:
    """As many of a shape's layers as two copies of leave a tenth of the disk of ``work`` free."""
    one, two = (2 * sizes_of(dataclasses.replace(shape, layers=layers)).parameters for layers in (1, 2))
    return max(1, min(shape.layers, 1 + int((0.45 * shutil.disk_usage(work).free - one) / (two - one))))


def fit122b_part(bench: Bench) -> dict[str, Any]:
    """Phase C on the largest slice by train122b's account: headers before holes, so that its weights are zeros and take no
    disk. Memory and collectives are those of real weights."""
    record = bench.records / "multi_gpu_train122b.json"
    layers = 4 if bench.tiny else read_result(record, "bench")["metrics"]["layers_that_fit"]
    base = bench.work / "fit"
    student = base / "student"
    shutil.rmtree(base, ignore_errors=True)
    prepare(student, dataclasses.replace(SHAPES["tiny" if bench.tiny else "122b"], layers=layers), 0)
    write_json(student / RECIPE_FILE, {"recipe": Recipe(3, 4, 128, 16).to_json()})
    made = random_rollouts(bench, student, base / "data")
    found = fitted(bench, base, student, "--base", "codes", steps=FIT_STEPS)
    shutil.rmtree(base)
    return {"layers": layers, "rollouts_seconds": made, **found}


# ---------------------------------------------------------------- evaluation


def eval_part(bench: Bench) -> dict[str, Any]:
    return answers(bench, RAZOR, 4 if bench.tiny else 16, 12 if bench.tiny else 256)


def eval35b_part(bench: Bench) -> dict[str, Any]:
    """The student that train35b left."""
    students = sorted(bench.work.parent.glob("train35b/*/student"))
    if not students:
        raise UserError(f"{bench.work.parent / 'train35b'}: no student; run --part train35b first")
    return answers(bench, students[-1], 1 if bench.tiny else 4, 6 if bench.tiny else 32, copies=False)


def answers(bench: Bench, model: Path, limit: int, tokens: int, copies: bool = True) -> dict[str, Any]:
    """The same prompts by each way of using the GPUs."""
    everything = parse_devices(bench.devices())
    ways: dict[str, Callable[[], Any]] = {"one": lambda: HfBackend(model, 16, parse_devices(bench.one))}
    if copies:
        ways["copies"] = lambda: Replicas(model, everything, 16)
    ways["spread"] = lambda: HfBackend(model, 16, everything)
    found: dict[str, Any] = {}
    first: list[str] = []
    for name, make in ways.items():
        for index in range(bench.gpus):
            torch.cuda.reset_peak_memory_stats(index)
        started = time.monotonic()
        backend = make()
        loaded = time.monotonic()
        if not copies:  # a synthetic model says tokens that its tokenizer does not know
            backend.tokenizer.decode = lambda ids, **_: " ".join(map(str, ids))
        tasks = get_benchmarks(["tiny_know", "tiny_math"])
        prompts = [backend.render(task.messages(item)) for task in tasks for item in task.load(limit)]
        list(backend.generate(prompts[:1] * 16 * len(everything), Sampling(max_tokens=4)))  # compiles, fills caches
        warm = time.monotonic()
        done = dict(backend.generate(prompts, Sampling(max_tokens=tokens)))
        seconds = time.monotonic() - warm
        texts = [done[index].text for index in range(len(prompts))]
        first = first or texts
        count = sum(completion.tokens for completion in done.values())
        found[name] = {"load_seconds": round(loaded - started, 2), "seconds": round(seconds, 2), "tokens": count}
        found[name]["tokens_per_second"] = round(count / seconds, 1)
        if name != "one":
            found[name] |= {"equal_answers": sum(a == b for a, b in zip(first, texts, strict=True)), "answers": len(texts)}
        if bench.gpus and name != "copies":  # they live in processes of their own
            found[name]["device_peak_mib"] = [torch.cuda.max_memory_allocated(i) >> 20 for i in range(bench.gpus)]
        if name == "copies":
            backend.close()
        del backend
        gc.collect()
        torch.cuda.empty_cache()
    return found


def vllm_part(bench: Bench) -> dict[str, Any]:
    """Both through the commands that a user has: eval.sh's on razor-tiny, and forced lengths on the 35B's shape. What a run
    that was killed has measured is not asked for again."""
    sizes = [n for n in PARALLEL if n <= bench.processes]
    small, large = vllm_models(bench, sizes[-1])
    forced = {n: bench.work / f"forced-{n}.json" for n in sizes}
    size = VLLM_TINY if bench.tiny else VLLM_SIZE
    asked = ["--benchmarks", "tiny_know,tiny_math", "--limit", 4 if bench.tiny else 32, "--temperature", 0, "--out", bench.work]
    for n, record in forced.items():
        engine = ["--backend", "vllm", "--tensor-parallel", n]
        if not record.exists():
            kept = ["--answers", record.with_suffix(".ids"), "--result", record, "--tag", record.stem]
            bench.run("src/eval/speed_eval.py", "--model", large, *engine, *size, *kept, **VLLM_ENVIRONMENT)
        if not (bench.work / f"questions-{n}.json").exists():
            tag = ["--tag", f"questions-{n}"]
            bench.run("src/eval/vllm_eval8.py", "--model", small, *tag, *engine, *asked, **VLLM_ENVIRONMENT)
    layers = text_config(Checkpoint(large).config)["num_hidden_layers"]
    questions = compared_questions({n: bench.work / f"questions-{n}.samples.jsonl" for n in sizes})
    shutil.rmtree(bench.work / "35b", ignore_errors=True)
    return {"layers": layers, "forced": compared_forced(forced), "questions": questions}


def vllm_models(bench: Bench, heads: int, *more: object) -> tuple[Path, Path]:
    """razor-tiny with ``heads`` key heads and the 35B's shape, changed by ``more``, as vLLM takes them."""
    small, large = bench.work / "razor-tiny", bench.work / "35b"
    shutil.rmtree(small, ignore_errors=True)
    form, named = "src/eval/vllm_form.py", "qwen3_5" if bench.gpus else "qwen3_next"
    bench.run(form, "--form", named, "--model", RAZOR, "--out", small, "--key-heads", heads)
    if bench.tiny:
        large = small
    elif not (large / "preprocessor_config.json").exists():
        shutil.rmtree(large, ignore_errors=True)
        synthetic(bench, large, bench.layers, "35b", *more)
        bench.run(form, "--model", large, "--in-place")
    return small, large


def servers_part(bench: Bench) -> dict[str, Any]:
    """Greedy answers of a trained model, and the rates of drawn ones of random weights with the trained one's vocabulary."""
    known = text_config(Checkpoint(RAZOR).config)["vocab_size"]
    small, large = (RAZOR, RAZOR) if bench.tiny else vllm_models(bench, 2, "--vocab", known)
    found: dict[str, Any] = {"layers": text_config(Checkpoint(large).config)["num_hidden_layers"], "serve": bench.serve}
    kinds = (("greedy", small, 0, 512, 64), ("drawn", large, 1, 1024, 512))
    for name, model, temperature, tokens, limit in kinds[: 1 if bench.tiny else None]:
        size = ["--max-tokens", 24 if bench.tiny else tokens, "--temperature", temperature, "--tasks", "tiny_know,tiny_math"]
        outs = {n: bench.work / f"{name}-{n}" for n in (0, *PARALLEL) if n <= bench.processes and (n or not bench.tiny)}
        with served(bench, model) as urls:
            for n, out in outs.items():  # all first, which compiles
                shutil.rmtree(out, ignore_errors=True)
                how = ["--backend", "openai", "--base-url", ",".join(urls[: n or len(urls)]), "--parallel", 64]
                how += ["--limit", 4 if bench.tiny or not n else limit]
                bench.run("src/distill/opd_gen.py", "--model", model, "--out", out, *size, *how)
        phases = {n: read_json(out / PHASE) for n, out in outs.items() if n}
        found[name] = {
            "phases": {str(n): phase for n, phase in phases.items()},
            "times_one": {str(n): phase["tokens_per_second"] / phases[1]["tokens_per_second"] for n, phase in phases.items()},
            "answers": compared_questions({n: outs[n] / "samples.jsonl" for n in phases}),
        }
    shutil.rmtree(bench.work / "35b", ignore_errors=True)
    return found


@contextlib.contextmanager
def served(bench: Bench, model: Path) -> Iterator[list[str]]:
    """Addresses of a server of ``model`` on each GPU, when all answer; they end with the block."""
    command = [*shlex.split(bench.serve), str(model), "--served-model-name", model.name, "--host", "127.0.0.1", "--port"]
    started: dict[str, subprocess.Popen[bytes]] = {}

    def check() -> None:
        if ended := [process.returncode for process in started.values() if process.poll() is not None]:
            raise UserError(f"part {bench.part}: a server ended with code {ended[0]}; the log is {bench.log}")

    try:
        with bench.log.open("a", encoding="utf-8") as log:
            for number in range(bench.processes):  # all at once: each takes minutes
                port, card = str(free_port()), {"CUDA_VISIBLE_DEVICES": str(number)} if bench.gpus else {}
                started[f"http://127.0.0.1:{port}/v1"] = subprocess.Popen(
                    [*command, port], stdout=log, stderr=log, preexec_fn=die_with_parent(os.getpid()),
                    env=os.environ | ENGINE_ENVIRONMENT | VLLM_ENVIRONMENT | card,
                )  # fmt: skip
        for url in started:
            Client(url, patience=1200.0, check=check).call("/models")
        yield list(started)
    finally:
        for process in started.values():
            process.terminate()
            process.wait()


def compared_questions(logs: Mapping[int, Path]) -> dict[str, Any]:
    """Of every number of GPUs: answers, how many are right, and how many are those of the first."""
    found: dict[str, Any] = {}
    first: list[str] = []
    for parallel, log in logs.items():
        rows = sorted(read_samples(log)[1], key=lambda row: (row["benchmark"], row["id"]))
        texts = [row["text"] for row in rows]
        first = first or texts
        found[str(parallel)] = {
            "answers": len(rows), "correct": sum(row["correct"] for row in rows), "tokens": sum(row["tokens"] for row in rows),
            "equal_answers": sum(a == b for a, b in zip(first, texts, strict=True)),
        }  # fmt: skip
    return found


def compared_forced(records: Mapping[int, Path]) -> dict[str, Any]:
    """Of every number of GPUs: its rates, and how many greedy tokens are those of the first. ``among_more``: how many of a
    small batch's tokens are those of the same prompts in the largest one; what that changes, several GPUs may change."""
    found: dict[str, Any] = {}
    first: list[str] = []
    for parallel, record in records.items():
        *small, largest = sorted(read_json(record.with_suffix(".ids")).values(), key=len)
        few, many = (sum(parts, []) for parts in (small, [largest[: len(part)] for part in small]))
        own = few + largest
        first = first or own
        found[str(parallel)] = read_result(record, "bench")["metrics"] | same_tokens(first, own)
        found[str(parallel)]["among_more"] = same_tokens(few, many)
    return found


def same_tokens(one: Sequence[str], two: Sequence[str]) -> dict[str, int]:
    """Of pairs of texts of token ids: how many tokens are equal up to the first that differs, of how many; first tokens and
    whole texts."""
    pairs = [(a.split(), b.split()) for a, b in zip(one, two, strict=True)]
    prefix = sum(len(os.path.commonprefix(pair)) for pair in pairs)
    return {
        "same_tokens": prefix, "tokens": sum(len(a) for a, _ in pairs), "answers": len(pairs),
        "equal_first_tokens": sum(a[:1] == b[:1] for a, b in pairs), "equal_answers": sum(a == b for a, b in pairs),
    }  # fmt: skip


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "quantize": quantize_part, "distill": distill_part, "train35b": train35b_part, "train122b": train122b_part,
    "fit122b": fit122b_part, "eval": eval_part, "eval35b": eval35b_part, "vllm": vllm_part, "servers": servers_part,
}  # fmt: skip


def main() -> None:
    bench, _ = parse_settings(Bench, __doc__)
    if bench.part not in PARTS:
        raise UserError(f"--part {bench.part}: expected one of {', '.join(PARTS)}")
    gpus, work = torch.cuda.device_count(), bench.work.resolve() / bench.part
    processes = bench.processes or max(2, gpus)
    if processes < 2 or gpus and processes > gpus:
        raise UserError(f"--processes {processes}: several, and not more than there are GPUs ({gpus})")
    bench = dataclasses.replace(bench, work=work, processes=processes, gpus=processes if gpus else 0)
    path, started = bench.records / f"multi_gpu_{bench.part}.json", time.time()
    if path.exists():
        print(f"{path}: done before", flush=True)
        return
    work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    metrics = PARTS[bench.part](bench)
    extra = {"gpus": bench.gpus, "processes": processes}
    write_result(path, kind="bench", tag=path.stem, started=started, metrics=metrics, extra=extra)
    print(f"{bench.part}: {time.time() - started:.0f} s; {path}", flush=True)


if __name__ == "__main__":
    run_cli(main)
