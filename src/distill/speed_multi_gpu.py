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

Each part leaves a record, RECORDS/multi_gpu_PART.json, and is skipped where it exists. Without a GPU, processes on the CPU take
their place. --tiny: the same with sizes for a test. The commands are those of the pipelines; their output is in WORK/PART/log.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from backend import HfBackend, Replicas, Sampling
from checkpoint import Checkpoint
from console import UserError, read_json, run_cli, write_json
from devices import parse_devices
from families import text_config
from fsdp_setup import shared_cores
from hf_model import load_tokenizer
from opd_budget import budget
from opd_data import ADAPTER, ADAPTER_JSON, Scoring, write_rollouts
from opd_score import score_rollouts
from recipe import RECIPE_FILE, Recipe
from records import REPO, read_result, write_result
from runner import get_benchmarks
from sample_log import read_samples
from settings import parse_settings, setting
from size_model import SHAPES, plan_of
from size_model import Shape as ModelShape
from synthetic_moe import prepare

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
KV_GIB, ENGINE_ROOM = 3, 9e9  # cache of an engine on each GPU; bytes that it needs beside weights
VLLM_SIZE = ["--batches", "1,16,32", "--prompt", 256, "--generate", 128]
# no NVLink multicast; on a CPU, cores that others use too
VLLM_ENVIRONMENT = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "NCCL_NVLS_ENABLE": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
NOISE_WIDTH = 16  # of the random hidden states whose products with a random head are the scores
NOISE_TOKENS = 4096  # of the vocabulary that can be likely
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
    layers: int = setting(40, "of the 35B in part vllm: with 20 all its engines fit at once")
    tiny: bool = setting(False, "sizes for a test")
    gpus: int = 0  # 0 where processes on the CPU stand in
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

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

    def start(self, script: str, *arguments: object, processes: int = 1, **environment: str) -> subprocess.Popen[bytes]:
        """Start one of the project's commands in WORK; its output goes to the log."""
        run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
        python = self.vllm_python if "vllm" in arguments else sys.executable
        command = [str(part) for part in (python, *run, REPO / script, *arguments)]
        shown = [time.strftime("%T"), *(f"{key}={value}" for key, value in environment.items()), *command[1:]]
        variables = os.environ | (shared_cores(processes) if processes > 1 else {}) | environment
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n+ {' '.join(shown)}\n")
            log.flush()
            process = subprocess.Popen(command, cwd=self.work, env=variables, stdout=log, stderr=log)
        self.started.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        if code := process.wait():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            said = [line for line in lines if ERROR.match(line)] or [line for line in lines if line.strip()]
            raise UserError(f"part {self.part}: exit code {code}: {' | '.join(said[-3:])}; the log is {self.log}")

    def stop(self) -> None:
        """End what was started and still runs: another part begins after a failure."""
        for process in self.started:
            if process.poll() is None:
                process.terminate()
                process.wait()

    def run(self, script: str, *arguments: object, processes: int = 1, **environment: str) -> float:
        """Run a command to its end; returns its seconds, Python's start included."""
        started = time.monotonic()
        self.finish(self.start(script, *arguments, processes=processes, **environment))
        return round(time.monotonic() - started, 2)


def same_files(a: Path, *others: Path) -> bool:
    """Whether checkpoints have the same shards with the same bytes."""
    found = [([file.name for file in made.files], made.sha256()) for made in map(Checkpoint, (a, *others))]
    return all(other == found[0] for other in found)


def random_rollouts(bench: Bench, teacher: Path, out: Path) -> float:
    """Rollouts of random tokens and random scores of them, in the formats of phases A and B: to try phase C at a size, whose
    losses then mean nothing. They belong to the teacher as its own would, with razor-tiny's tokenizer where it has none: fewer
    tokens than its vocabulary has, which changes no size that matters. Returns the seconds; works on the CPU alone."""
    started = time.monotonic()
    give_tokenizer(teacher)
    tokenizer, draw, tokens = load_tokenizer(teacher), random.Random(0), 40 if bench.tiny else TOKENS
    words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    rows = []
    for number in range(2 * bench.rows):
        asked, said = (tokenizer.decode(draw.choices(words, k=length)) for length in (PROMPT, tokens))
        made = len(tokenizer(said, add_special_tokens=False)["input_ids"])
        rows.append({"benchmark": "random", "id": f"{number:06d}", "prompt": asked, "text": said, "tokens": made})
        rows[-1] |= {"finish_reason": "length", "correct": None}  # it ran out of tokens
    settings = {"model": "random tokens", "seed": 0, "tokens": tokens, "prompt": PROMPT}
    choice, total = {"finished_only": False, "correct_only": False}, sum(row["tokens"] for row in rows)
    write_rollouts(out / "rollouts", rows, rows, settings, choice, time.monotonic() - started, total)
    scoring = Scoring(score_batch=4)
    score_rollouts(scoring, teacher, out / "rollouts", out / "scores", lambda _: RandomTeacher(len(tokenizer), 0))
    return round(time.monotonic() - started, 2)


class RandomTeacher(nn.Module):
    """What opd_score asks of a model: a decoder and a head, here noise of a small width."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.head = nn.Linear(NOISE_WIDTH, min(vocabulary, NOISE_TOKENS), bias=False)
        self.head.weight.data.normal_(generator=self.generator)

    def get_input_embeddings(self) -> nn.Module:
        return self.head

    get_output_embeddings = get_input_embeddings

    def get_decoder(self) -> Any:
        return self.hidden

    def hidden(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.randn(*input_ids.shape, NOISE_WIDTH, generator=self.generator),)


def give_tokenizer(teacher: Path) -> None:
    """razor-tiny's tokenizer for a checkpoint that has none."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if not (teacher / name).exists() and (RAZOR / name).exists():
            shutil.copyfile(RAZOR / name, teacher / name)


# ---------------------------------------------------------------- quantize


def quantize_part(bench: Bench) -> dict[str, Any]:
    """Two layers of the 35B; the calibrated method rounds their experts in several pieces."""
    source = bench.work / "slice"
    for name in ("slice", "first", "one", "all", "all_twice", "gptq-one", "gptq-all"):  # of a run that was killed
        shutil.rmtree(bench.work / name, ignore_errors=True)
        (bench.work / f"{name}.json").unlink(missing_ok=True)
    made = synthetic(bench, source, *((4, "tiny") if bench.tiny else (2, "35b", "--vocab", VOCABULARY)))
    found: dict[str, Any] = {"bytes": Checkpoint(source).bytes, "synthetic_seconds": made, "data_free": {}, "calibrated": {}}
    shard = 0.004 if bench.tiny else 0.5
    runs = {"one": bench.one, "all": bench.devices(), "all_twice": bench.devices(2)}
    if bench.gpus:  # the first run on a machine compiles the kernels
        quantized(bench, source, "first", bench.devices(), shard, "clip")
        shutil.rmtree(bench.work / "first")
    for name, devices in runs.items():
        found["data_free"][name] = quantized(bench, source, name, devices, shard, "clip")
    calibration = ["--calib-sequences", 8 if bench.tiny else 32, "--calib-length", 64 if bench.tiny else 256]
    for name in ("one", "all"):
        found["calibrated"][name] = quantized(bench, source, f"gptq-{name}", runs[name], 4, "gptq", *calibration)
    outputs = [bench.work / name for name in runs]
    found["data_free"]["same_bytes"] = same_files(*outputs)
    found["calibrated"]["same_bytes"] = same_files(bench.work / "gptq-one", bench.work / "gptq-all")
    if not found["calibrated"]["same_bytes"]:  # does one GPU repeat itself?
        quantized(bench, source, "gptq-again", bench.one, 4, "gptq", *calibration)
        found["calibrated"]["one_repeats_itself"] = same_files(bench.work / "gptq-one", bench.work / "gptq-again")
    for path in bench.work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    return found


def quantized(bench: Bench, source: Path, name: str, devices: str, shard: float, method: str, *more: object) -> dict[str, Any]:
    """Seconds, rate and memory of quant_save on ``devices``."""
    record = bench.work / f"{name}.json"
    paths = ["--model", source, "--out", bench.work / name, "--result", record, "--tag", name, "--shard-gib", shard]
    total = bench.run("src/quant/quant_save.py", *paths, *RECIPE, "--method", method, "--devices", devices, *more)
    made = read_result(record, "quantize")
    facts = {"devices": devices, "seconds": made["seconds"], "seconds_with_start": total}
    facts |= {"gb_per_second": round(Checkpoint(source).bytes / 1e9 / made["seconds"], 3)}
    return facts | {"peak_rss_mib": made["peak_rss_mib"], "device_peak_mib": made["device_peak_mib"]}


def synthetic(bench: Bench, out: Path, layers: int, shape: str, *more: object) -> float:
    """A synthetic checkpoint with a tokenizer; seconds."""
    size = ["--shape", shape, "--layers", layers, "--devices", bench.devices(1 if bench.tiny else 4)]
    seconds = bench.run("src/quant/synthetic_moe.py", "--out", out, *size, *more)
    give_tokenizer(out)
    return seconds


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
    pairs = list(zip(*(read_json(path / ADAPTER_JSON)["curve"] for path in (one, two)), strict=True))
    adapters = [load_file(path / ADAPTER) for path in (one, two)]
    near = [abs(a[1] - b[1]) <= NEAR * abs(a[1]) and relative((a, b)) <= NEAR for a, b in pairs]
    return {
        "equal_steps": near.index(False) if False in near else len(near), "tolerance": NEAR,
        "first_gradient_relative_difference": relative(pairs[0]),
        "gradient_relative_difference": max(relative(pair) for pair in pairs),
        "loss_difference": max(abs(a[1] - b[1]) for a, b in pairs),
        "adapter_largest_value": max(value.abs().max().item() for value in adapters[0].values()),
        "adapter_largest_difference": max((adapters[0][n] - adapters[1][n]).abs().max().item() for n in adapters[0]),
    }  # fmt: skip


def relative(pair: Sequence[Sequence[float]]) -> float:
    """Of the norms of two gradients."""
    return abs(pair[0][2] - pair[1][2]) / max(pair[0][2], 1e-12)


# ---------------------------------------------------------------- phase C at a size


def train35b_part(bench: Bench) -> dict[str, Any]:
    layers = 4 if bench.tiny else fitting_layers(bench.work, SHAPES["35b"])
    return trained(bench, "tiny" if bench.tiny else "35b", layers, keep=True)


def train122b_part(bench: Bench) -> dict[str, Any]:
    """Two slices; a layer's share of a GPU's memory is their difference."""
    slices = {}
    for layers in (4, 8) if bench.tiny else SLICES:
        slices[str(layers)] = trained(bench, "tiny" if bench.tiny else "122b", layers)
    kind = "peak_reserved_mib" if bench.gpus else "peak_rss_mib"
    peaks = [max(rank[kind] for rank in found["train"]["ranks"]) for found in slices.values()]
    few, many = map(int, slices)
    slope = (peaks[1] - peaks[0]) / (many - few)
    found: dict[str, Any] = {"slices": slices, "mib_a_layer": slope}
    if bench.gpus:
        room = torch.cuda.get_device_properties(0).total_memory / 2**20 - FREE_GB * 1e9 / 2**20
        found |= {"room_mib": room, "layers_that_fit": int(min(48, many + (room - peaks[1]) // slope))}
    return found


def trained(bench: Bench, shape: str, layers: int, keep: bool = False) -> dict[str, Any]:
    """Make the model, quantize it while the rollouts are made, train a few steps; what each took."""
    base = bench.work / f"{shape}-{layers}"
    teacher, student, data, out = (base / name for name in ("teacher", "student", "data", "adapter"))
    base.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"shape": shape, "layers": layers}
    if not (student / RECIPE_FILE).exists() or not (data / "scores").exists():
        for path in (teacher, student, data):  # of a run that was killed
            shutil.rmtree(path, ignore_errors=True)
        found["synthetic_seconds"] = synthetic(bench, teacher, layers, shape)
        paths = ["--model", teacher, "--out", student, "--devices", bench.devices(1 if bench.tiny else 4), "--shard-gib", 2]
        with ThreadPoolExecutor(1) as pool:
            making = pool.submit(random_rollouts, bench, teacher, data)
            found["quantize_seconds"] = bench.run("src/quant/quant_save.py", *paths, *RECIPE)
            making.result()
    found["parameters"] = sum(info.numel for info in Checkpoint(student).tensors.values())
    found |= fitted(bench, student, teacher, data, out)
    needs = budget(student, gpus=bench.processes, rank=RANK, rows=bench.rows, micro_rows=1, tokens=TOKENS)["gpu"]
    parts = {name: round(size / 1e9, 2) for name, size in needs.items()}
    found["predicted_gpu_gb"] = parts | {"total": round(sum(parts.values()), 2)}
    shutil.rmtree(teacher)
    shutil.rmtree(out)
    if not keep:
        shutil.rmtree(base)
    return found


def fitted(
    bench: Bench, student: Path, teacher: Path, data: Path, out: Path, base: str = "teacher", steps: int = STEPS
) -> dict[str, Any]:
    """Phase C by all processes: seconds in all, its own account, the losses."""
    paths = ["--student", student, "--teacher", teacher, "--rollouts", data / "rollouts", "--scores", data / "scores"]
    size = ["--steps", steps, "--rows", bench.rows, "--micro-rows", 1, "--rank", RANK, "--save-every", steps, "--warmup", 0]
    arguments = [*paths, "--out", out, *size, "--base", base]
    total = bench.run("src/distill/opd_train_fsdp.py", *arguments, processes=bench.processes)
    train, curve = read_json(out / "phase.json"), read_json(out / ADAPTER_JSON)["curve"]
    return {"seconds": total, "train": train, "curve": curve, "steps": steps, "rows": bench.rows, "rank": RANK}


def fitting_layers(work: Path, shape: ModelShape) -> int:
    """As many of a shape's layers as two copies of leave a tenth of the disk of ``work`` free."""
    free = 0.9 * shutil.disk_usage(work).free / 2
    sizes = [
        2 * sum(torch.Size(s).numel() for _, _, s in plan_of(dataclasses.replace(shape, layers=layers))) for layers in (1, 2)
    ]
    return max(1, min(shape.layers, 1 + int((free - sizes[0]) / (sizes[1] - sizes[0]))))


def fit122b_part(bench: Bench) -> dict[str, Any]:
    """Phase C on the largest slice by train122b's account: headers before holes, so that its weights are zeros and take no
    disk. Memory and collectives are those of real weights."""
    record = bench.records / "multi_gpu_train122b.json"
    layers = 4 if bench.tiny else read_result(record, "bench")["metrics"]["layers_that_fit"]
    base = bench.work / "fit"
    shutil.rmtree(base, ignore_errors=True)
    student, data = base / "student", base / "data"
    prepare(student, dataclasses.replace(SHAPES["tiny" if bench.tiny else "122b"], layers=layers), 0)
    give_tokenizer(student)
    write_json(student / RECIPE_FILE, {"recipe": Recipe(3, 4, 128, 16).to_json()})
    made = random_rollouts(bench, student, data)
    found = fitted(bench, student, student, data, base / "adapter", "codes", FIT_STEPS)
    parameters = sum(info.numel for info in Checkpoint(student).tensors.values())
    shutil.rmtree(base)
    return {"layers": layers, "parameters": parameters, "rollouts_seconds": made, **found}


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
    found, texts = {}, {}
    for name, make in ways.items():
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
        texts[name] = [done[index].text for index in range(len(prompts))]
        count = sum(completion.tokens for completion in done.values())
        found[name] = {"load_seconds": round(loaded - started, 2), "seconds": round(seconds, 2), "tokens": count}
        found[name] |= {"tokens_per_second": round(count / seconds, 1)}
        if name != "one":
            equal = [a == b for a, b in zip(texts["one"], texts[name], strict=True)]
            found[name] |= {"equal_answers": sum(equal), "answers": len(equal)}
        getattr(backend, "close", lambda: None)()
        del backend
        if bench.gpus:
            if name != "copies":  # they live in processes of their own
                found[name]["device_peak_mib"] = [torch.cuda.max_memory_allocated(i) >> 20 for i in range(bench.gpus)]
            gc.collect()
            torch.cuda.empty_cache()
            for index in range(bench.gpus):
                torch.cuda.reset_peak_memory_stats(index)
    return found


def vllm_part(bench: Bench) -> dict[str, Any]:
    """Both through the commands that a user has: eval.sh's on razor-tiny, and forced lengths on the 35B's shape. Engines need
    minutes to start and seconds to be measured: those that fit beside each other start together, and are measured in turn.
    What a run that was killed has left is not asked for again."""
    small, large = bench.work / "razor-tiny", bench.work / "35b"
    shutil.rmtree(small, ignore_errors=True)
    sizes = [n for n in PARALLEL if n <= bench.processes]
    form = "src/eval/vllm_form.py"
    named = "qwen3_5" if bench.gpus else "qwen3_next"
    bench.run(form, "--form", named, "--model", RAZOR, "--out", small, "--key-heads", sizes[-1])
    if bench.tiny:
        large = small
    elif not (large / "preprocessor_config.json").exists():
        shutil.rmtree(large, ignore_errors=True)
        synthetic(bench, large, bench.layers, "35b")
        bench.run(form, "--model", large, "--in-place")
    forced = {n: bench.work / f"forced-{n}.json" for n in sizes}
    for round_ in placed([n for n in sizes if not forced[n].exists()], Checkpoint(large).bytes, bench.gpus):
        measured_in_turn(bench, [(*forced_command(bench, large, n, forced[n]), gpus) for n, gpus in round_])
    for n in sizes:
        if not (bench.work / f"questions-{n}.json").exists():
            bench.run(*questions_command(bench, small, n), **VLLM_ENVIRONMENT)
    found = {
        "layers": text_config(Checkpoint(large).config)["num_hidden_layers"], "forced": compared_forced(forced),
        "questions": compared_questions({n: bench.work / f"questions-{n}.samples.jsonl" for n in sizes}),
    }  # fmt: skip
    shutil.rmtree(bench.work / "35b", ignore_errors=True)
    return found


def placed(sizes: Sequence[int], size: int, gpus: int) -> list[list[tuple[int, list[int]]]]:
    """Rounds of (over how many GPUs, which) for engines of a model of ``size`` bytes: each where most room is left, in the
    next round if that is not enough."""
    if not gpus:
        return [[(n, [])] for n in sizes]
    total = torch.cuda.get_device_properties(0).total_memory
    rounds, free = [], []
    for n in sizes:
        need = size / n + ENGINE_ROOM
        chosen = sorted(range(gpus), key=lambda gpu: -free[gpu])[:n] if free else []
        if not chosen or free[chosen[-1]] < need:
            rounds.append([])
            free, chosen = [float(total)] * gpus, list(range(n))
        for gpu in chosen:
            free[gpu] -= need
        rounds[-1].append((n, sorted(chosen)))
    return rounds


def measured_in_turn(bench: Bench, engines: Sequence[tuple[str, list[object], Path, list[int]]]) -> None:
    """Start all engines on their GPUs, then let one after another measure; none ends before all have."""
    running = []
    for script, arguments, record, gpus in engines:
        turn = record.with_suffix(".turn")
        for suffix in (".ready", ".go", ".end"):
            turn.with_suffix(suffix).unlink(missing_ok=True)
        own = ",".join(map(str, gpus))
        process = bench.start(script, *arguments, "--in-turn", turn, **VLLM_ENVIRONMENT, CUDA_VISIBLE_DEVICES=own)
        running.append((process, turn, record))

    def wait(process: subprocess.Popen[bytes], path: Path) -> None:
        while not path.exists():
            if process.poll() is not None:
                bench.finish(process)
                raise UserError(f"part {bench.part}: an engine ended before {path.name}; the log is {bench.log}")
            time.sleep(0.2)

    for process, turn, _ in running:
        wait(process, turn.with_suffix(".ready"))
    for process, turn, record in running:
        turn.with_suffix(".go").touch()
        wait(process, record)
    for _, turn, _ in running:
        turn.with_suffix(".end").touch()
    for process, _, _ in running:
        bench.finish(process)


def questions_command(bench: Bench, model: Path, parallel: int) -> list[object]:
    """Greedy answers of an evaluation."""
    run = ["--model", model, "--tag", f"questions-{parallel}", "--backend", "vllm", "--tensor-parallel", parallel]
    run += ["--benchmarks", "tiny_know,tiny_math", "--limit", 4 if bench.tiny else 32, "--temperature", 0]
    return ["src/eval/vllm_eval8.py", *run, "--out", bench.work]


def forced_command(bench: Bench, model: Path, parallel: int, record: Path) -> tuple[str, list[object], Path]:
    """Rates at forced lengths, and the ids of every batch."""
    size = VLLM_TINY if bench.tiny else VLLM_SIZE
    run = ["--model", model, "--backend", "vllm", "--tensor-parallel", parallel, *size]
    run += ["--kv-gib", KV_GIB] if bench.gpus else []
    run += ["--answers", record.with_suffix(".ids"), "--result", record, "--tag", record.stem]
    return "src/eval/speed_eval.py", run, record


def compared_questions(logs: Mapping[int, Path]) -> dict[str, Any]:
    """Of every number of GPUs: answers, how many are right, and how many are those of the first."""
    found, texts = {}, {}
    for parallel, log in logs.items():
        rows = sorted(read_samples(log)[1], key=lambda row: (row["benchmark"], row["id"]))
        texts[parallel] = [row["text"] for row in rows]
        equal = sum(a == b for a, b in zip(next(iter(texts.values())), texts[parallel], strict=True))
        found[str(parallel)] = {
            "answers": len(rows), "correct": sum(row["correct"] for row in rows), "tokens": sum(row["tokens"] for row in rows),
            "equal_answers": equal,
        }  # fmt: skip
    return found


def compared_forced(records: Mapping[int, Path]) -> dict[str, Any]:
    """Of every number of GPUs: its rates, and how many greedy tokens are those of the first. ``among_more``: how many of a
    small batch's tokens are those of the same prompts in the largest one; what that changes, several GPUs may change."""
    found, ids = {}, {}
    for parallel, record in records.items():
        ids[parallel] = read_json(record.with_suffix(".ids"))
        one, own = (list(itertools.chain(*rows.values())) for rows in (next(iter(ids.values())), ids[parallel]))
        found[str(parallel)] = read_result(record, "bench")["metrics"] | same_tokens(one, own)
        *small, largest = sorted(ids[parallel].values(), key=len)
        few, many = ([row for part in rows for row in part] for rows in (small, [largest[: len(part)] for part in small]))
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
    "fit122b": fit122b_part, "eval": eval_part, "eval35b": eval35b_part, "vllm": vllm_part,
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
    try:
        metrics = PARTS[bench.part](bench)
    finally:
        bench.stop()
    extra = {"gpus": bench.gpus, "processes": processes}
    write_result(path, kind="bench", tag=path.stem, started=started, metrics=metrics, extra=extra)
    print(f"{bench.part}: {time.time() - started:.0f} s; {path}", flush=True)


if __name__ == "__main__":
    run_cli(main)
