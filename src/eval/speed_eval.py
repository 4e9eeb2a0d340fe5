"""Tokens a second of an evaluation at forced lengths, through transformers or vLLM: bash pipelines/bench.sh h100, or

    python src/eval/speed_eval.py --model models/razor-tiny [--batches 1,32,128 --prompt 256] [--result F --tag T]
    python src/eval/speed_eval.py --shape 35b [--layers 40] ...     # random weights of a published shape, made on the GPU
    python src/eval/speed_eval.py --model DIR --backend vllm [--tensor-parallel 4] [--answers FILE] ...
    python src/eval/speed_eval.py --programs humaneval,mbpp [--data-dir DIR] [--workers 2]    # programs a second of the sandbox

The prompts go the way of an evaluation (its backends: tokenizer, batches, KV cache) and no end token stops them. The limit of
one step is that of memory: bytes of all weights that a batch of this size touches (under a uniform router) at the rate of a
copy, on as many GPUs as share them. --answers keeps the greedy tokens of every prompt, to compare two engines.
--programs runs the reference programs of a benchmark with their tests, in turn in the sandbox and in bare interpreters.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from backend import Backend, Completion, HfBackend, Sampling, choose_backend
from checkpoint import Checkpoint
from code_sandbox import Job, run_many
from console import UserError, numbers, progress, read_json, run_cli, write_json
from devices import default_device
from families import text_config
from hf_model import load_model, load_tokenizer
from records import REPO, add_record_arguments, check_record_arguments, describe_model, write_result
from size_model import SHAPES, config_of, copy_rate, shape_arguments, shape_from
from tasks_code import CODE_BENCHMARKS, SANDBOX_SECONDS
from vllm_eval import VllmBackend

Weights = dict[str, tuple[Sequence[int], int]]  # shape and bytes, by name
# the engine for a batch of any size, its weights, the config of the text model, the model's entry in the record
Engine = tuple[Callable[[int], Any], Weights, Mapping[str, Any], dict[str, Any]]
PROMPT_ROOM = 64  # a prompt's text may have some tokens more when it is read again


class ForcedBackend(HfBackend):
    """An HfBackend with a model at hand, which nothing but the length ends."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any, batch: int) -> None:
        self.model, self.tokenizer, self.batch = model, tokenizer, batch
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        text = model.config.get_text_config()
        model.config.output_router_logits = False
        self.ends = [int(text.vocab_size)]  # a token that does not exist
        self.context = int(text.max_position_embeddings)


class ForcedVllm(VllmBackend):
    """vLLM's engine, which nothing but the length ends. No prompt is remembered: the same ones are measured again."""

    ignore_ends = True

    def __init__(self, model: Path, context: int, sequences: int, tensor_parallel: int) -> None:
        super().__init__(model, context, sequences, tensor_parallel, enable_prefix_caching=False)
        self.ends = []


def random_model(config: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """The text model of a config.json with normal weights, made in place."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    text = AutoConfig.for_model(**config["text_config"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device, no_init_weights():
        model = AutoModelForCausalLM.from_config(text, dtype=dtype).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                for piece in parameter.view(-1).split(1 << 28):
                    piece.normal_(0, 0.02)
            else:
                parameter.zero_()  # norms are stored minus one
    return model


def prompts_of(tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Texts of about ``tokens`` tokens each, all different."""
    rng, text = random.Random(0), []
    for _ in range(count):
        words = " ".join(str(rng.randrange(10000)) for _ in range(tokens))
        ids = tokenizer(words, add_special_tokens=False)["input_ids"][:tokens]
        text.append(tokenizer.decode(ids))
    return text


def weights_of_model(model: torch.nn.Module) -> Weights:
    return {name: (parameter.shape, parameter.nbytes) for name, parameter in model.named_parameters()}


def weights_of_checkpoint(path: Path) -> Weights:
    """Without those that an answer to text does not use: a tower of pictures, the prediction of several tokens."""
    unused = ("mtp.", "model.visual.")
    return {name: (t.shape, t.bytes) for name, t in Checkpoint(path).tensors.items() if not name.startswith(unused)}


def touched_bytes(weights: Weights, config: Mapping[str, Any], sequences: int) -> int:
    """Bytes of weights that a step of ``sequences`` tokens reads, experts counted as a uniform router would touch them."""
    experts, top = config.get("num_experts") or 1, config.get("num_experts_per_tok") or 1
    total = 0.0
    for name, (shape, size) in weights.items():
        share = 1.0
        if ".experts." in name:
            share = 1 - (1 - top / experts) ** sequences
        elif name.endswith("embed_tokens.weight"):
            share = min(1.0, sequences / shape[0])
        total += share * size
    return int(total)


def timed(backend: Backend, prompts: Sequence[str], tokens: int) -> tuple[float, list[Completion]]:
    """Seconds, and the completions in the order of the prompts: the faster one of two runs."""
    runs = []
    for _ in range(2):
        started = time.perf_counter()
        found = dict(backend.generate(prompts, Sampling(max_tokens=tokens)))
        runs.append(time.perf_counter() - started)
    return min(runs), [found[index] for index in range(len(prompts))]


def measure(backend: Backend, prompts: Sequence[str], generate: int) -> tuple[dict[str, Any], list[str]]:
    """(rates of one batch of prompts; the texts). A run of full length, which is not counted, comes before: kernels are
    compiled and chosen for every length that they meet."""
    list(backend.generate(prompts, Sampling(max_tokens=generate)))
    first, _ = timed(backend, prompts, 2)
    seconds, found = timed(backend, prompts, generate)
    if {completion.tokens for completion in found} != {generate}:
        raise UserError(f"asked for {generate} tokens each, got {sorted({c.tokens for c in found})}")
    if seconds <= first:
        busy = "the machine is busy, or --generate small"
        raise UserError(f"{generate} tokens took {seconds:.3f} s and 2 took {first:.3f}: {busy}")
    batch, steps = len(prompts), (seconds - first) / (generate - 2)  # seconds of a step, without the prompt
    rates = {"tokens_per_s": batch * generate / seconds, "decode_tokens_per_s": batch / steps, "seconds": seconds}
    return rates, [completion.text for completion in found]


def table(engine: str, metrics: dict[str, Any]) -> str:
    lines = [f"{metrics['parameters']:,} parameters, prompts of {metrics['prompt']} tokens, {metrics['generate']} generated"]
    for batch, row in metrics[engine].items():
        share = 100 * row["decode_tokens_per_s"] / row["limit_decode_tokens_per_s"]
        lines.append(
            f"  batch {batch:>4}: {row['tokens_per_s']:>9.1f} tokens/s with the prompt, "
            f"{row['decode_tokens_per_s']:>9.1f} decoding ({share:.1f} % of the limit)"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace, engine: Engine, rate: float) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(metrics, greedy token ids of every batch as text). ``rate``: bytes a second that the engine's memory gives."""
    backends, weights, config, _ = engine
    found, answers = {}, {}
    with progress(len(args.batches), args.backend, "batch") as bar:
        for batch in args.batches:
            backend, name = backends(batch), str(batch)
            prompts = prompts_of(backend.tokenizer, batch, args.prompt)
            # a synthetic model says tokens that its tokenizer does not know
            backend.tokenizer.decode = lambda ids, **_: " ".join(map(str, ids))
            found[name], answers[name] = measure(backend, prompts, args.generate)
            found[name]["limit_decode_tokens_per_s"] = batch * rate / touched_bytes(weights, config, batch)
            del backend.tokenizer.decode
            if args.backend == "hf" and torch.cuda.is_available():
                found[name]["peak_vram_mib"] = torch.cuda.max_memory_allocated() >> 20
            bar.update()
    return {
        "parameters": sum(math.prod(shape) for shape, _ in weights.values()), "prompt": args.prompt,
        "generate": args.generate, "copy_bytes_per_s": rate, args.backend: found, "tensor_parallel": args.tensor_parallel,
    }, answers  # fmt: skip


def bare_run(job: Job) -> bool:
    """Whether a program and its tests end well in an interpreter of their own, with no protection at all."""
    whole = "\n".join([job[0], *job[1]])
    return subprocess.run([sys.executable, "-c", whole], stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


def program_rates(jobs: Sequence[Job], workers: int) -> dict[str, float]:
    """Programs a second of the sandbox and of as many bare interpreters side by side, the faster of two rounds each."""
    seconds: dict[str, list[float]] = {"": [], "bare_": []}
    passed = {}
    for _ in range(2):
        started = time.perf_counter()
        passed[""] = sum(verdict.passed for verdict in run_many(jobs, workers, SANDBOX_SECONDS, 1024))
        seconds[""].append(time.perf_counter() - started)
        started = time.perf_counter()
        with ThreadPoolExecutor(workers) as pool:
            passed["bare_"] = sum(pool.map(bare_run, jobs))
        seconds["bare_"].append(time.perf_counter() - started)
    found: dict[str, float] = {"programs": len(jobs), "workers": workers}
    for way, times in seconds.items():
        found |= {f"{way}passed": passed[way], f"{way}per_s": len(jobs) / min(times)}
    return found


def sandbox_speed(args: argparse.Namespace) -> None:
    started, speed, data = time.time(), {}, []
    known = {benchmark.name: benchmark for benchmark in CODE_BENCHMARKS if benchmark.name != "lcb"}  # has no solutions
    if unknown := [name for name in args.programs.split(",") if name not in known]:
        raise UserError(f"--programs {','.join(unknown)}: not known; known: {', '.join(known)}")
    for name in args.programs.split(","):
        benchmark = known[name](args.data_dir)
        jobs = [benchmark.job(item, item.meta.get("prompt", "") + item.gold) for item in benchmark.load()]
        speed[name] = found = program_rates(jobs, args.workers)
        data.append({"name": name, "revision": benchmark.revision})
        print(
            f"{name}, {args.workers} workers: sandbox {found['per_s']:.1f} programs/s ({found['passed']} of {len(jobs)} pass), "
            f"bare {found['bare_per_s']:.1f} ({found['bare_passed']}); ratio {found['per_s'] / found['bare_per_s']:.2f}"
        )
    if args.result:
        write_result(args.result, kind="bench", tag=args.tag, started=started, data=data, metrics={"sandbox_speed": speed})


def hf_engine(args: argparse.Namespace, device: torch.device) -> Engine:
    if args.model:
        described, tokenizer, model = describe_model(args.model), load_tokenizer(args.model), load_model(args.model)
    else:
        shape = shape_from(args)
        whole = SHAPES[args.shape].layers
        described = {"path": f"random weights, shape {args.shape}", "layers": shape.layers, "layers_of_the_shape": whole}
        tokenizer, model = load_tokenizer(REPO / "models/razor-tiny"), random_model(config_of(shape), device)
    config = model.config.get_text_config().to_dict()
    return lambda batch: ForcedBackend(model, tokenizer, batch), weights_of_model(model), config, described


def vllm_engine(args: argparse.Namespace) -> Engine:
    """One engine for all batches."""
    config = text_config(read_json(args.model / "config.json"))
    context = args.prompt + args.generate + PROMPT_ROOM
    engine = ForcedVllm(args.model, context, max(args.batches), args.tensor_parallel)
    return lambda _: engine, weights_of_checkpoint(args.model), config, describe_model(args.model)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; without it random weights of --shape")
    shape_arguments(parser)
    parser.add_argument("--batches", type=numbers, default=[1, 32, 128], help="sequences at once (default 1,32,128)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--generate", type=int, default=128, help="tokens generated for each (default 128)")
    parser.add_argument("--backend", choices=("hf", "vllm"), default="hf", help="transformers (hf) or vllm")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads the model over")
    parser.add_argument("--answers", type=Path, help="write the greedy token ids of every prompt to this JSON file")
    parser.add_argument("--programs", help="benchmarks whose reference programs run instead: humaneval,mbpp")
    parser.add_argument("--data-dir", type=Path, help="of --programs: local files NAME.jsonl(.gz) instead of the hub's")
    parser.add_argument("--workers", type=int, default=2, help="of --programs: programs at once (default 2)")
    add_record_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_record_arguments(args)
    if args.programs:
        return sandbox_speed(args)
    if args.prompt < 1 or args.generate < 3:
        raise UserError("--prompt must be at least 1 and --generate at least 3")
    if args.backend == "vllm" and not args.model:
        raise UserError("--backend vllm reads a checkpoint: give --model (src/quant/synthetic_moe.py makes one of a shape)")
    if args.tensor_parallel != 1 and args.backend != "vllm":
        raise UserError("--tensor-parallel is vLLM's: add --backend vllm")
    choose_backend(args.backend)
    started, device = time.time(), default_device()
    rate = copy_rate(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine takes what is free
    engine = vllm_engine(args) if args.backend == "vllm" else hf_engine(args, device)
    made = time.time() - started
    speed, answers = run(args, engine, rate * args.tensor_parallel)
    if args.answers:
        write_json(args.answers, answers)
    if args.result:
        metrics = {"made_seconds": made, "eval_speed": speed}
        write_result(args.result, kind="bench", tag=args.tag, started=started, model=engine[3], metrics=metrics)
    print(table(args.backend, speed), flush=True)


if __name__ == "__main__":
    run_cli(main)
