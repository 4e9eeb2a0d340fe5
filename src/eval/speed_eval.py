"""Tokens a second of an evaluation at forced lengths, through transformers or vLLM: bash pipelines/bench.sh h100, or

    python src/eval/speed_eval.py --model models/razor-tiny [--batches 1,32,128 --prompt 256] [--result F --tag T]
    python src/eval/speed_eval.py --shape 35b [--layers 40] ...     # random weights of a published shape, made on the GPU
    python src/eval/speed_eval.py --model DIR --backend vllm [--tensor-parallel 4] [--answers FILE] ...

The prompts go the way of an evaluation (its backends: tokenizer, batches, KV cache) and no end token stops them. The limit of
one step is that of memory: bytes of all weights that a batch of this size touches (under a uniform router) at the rate of a
copy, on as many GPUs as share them. --answers keeps the greedy tokens of every prompt, to compare two engines.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backend import Backend, Completion, HfBackend, Sampling, choose_backend
from checkpoint import Checkpoint
from console import UserError, numbers, progress, read_json, run_cli, write_json
from families import text_config
from hf_model import load_model, load_tokenizer
from records import add_record_arguments, check_record_arguments, describe_model, write_result
from size_model import SHAPES, config_of, copy_rate, shape_arguments, shape_from
from vllm_eval import VllmBackend

ENGINES = ("hf", "vllm")
PROMPT_ROOM = 64  # a prompt's text may have some tokens more when it is read again
TOKENIZER = Path(__file__).resolve().parents[2] / "models" / "razor-tiny"


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

    def __init__(
        self, model: Path, context: int, sequences: int, tensor_parallel: int, eager: bool, kv_gib: float | None
    ) -> None:
        options: dict[str, Any] = {"enforce_eager": True} if eager else {}
        if kv_gib:  # vLLM then neither measures what is free nor counts what others take meanwhile
            options |= {"kv_cache_memory_bytes": int(kv_gib * 2**30), "gpu_memory_utilization": 0.02}
        super().__init__(model, context, sequences, tensor_parallel, enable_prefix_caching=False, **options)
        self.ends = []


@contextmanager
def turn(path: Path | None) -> Iterator[None]:
    """Between others that share the machine: the block runs when it is this one's turn, and nothing is given back before all
    had theirs. The caller and we speak through files; when it is gone we end."""
    if path is None:
        yield
        return
    parent = os.getppid()

    def wait(name: str) -> None:
        while not path.with_suffix(name).exists():
            if os.getppid() != parent:
                raise UserError(f"{path}: who gives the turns is gone")
            time.sleep(0.1)

    path.with_suffix(".ready").touch()
    wait(".go")
    yield
    wait(".end")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def random_model(config: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """The text model of a config.json with normal weights, made in place."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    text = AutoConfig.for_model(**config["text_config"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with default_dtype(dtype), device, no_init_weights():
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


@dataclass(frozen=True)
class Weight:
    """What of a tensor decides how much of it a step reads."""

    name: str
    rows: int
    numel: int
    bytes: int


def weights_of_model(model: torch.nn.Module) -> list[Weight]:
    parameters = model.named_parameters()
    return [Weight(name, p.shape[0] if p.ndim else 1, p.numel(), p.numel() * p.element_size()) for name, p in parameters]


def weights_of_checkpoint(path: Path) -> list[Weight]:
    """Without those that an answer to text does not use: a tower of pictures, the prediction of several tokens."""
    found = Checkpoint(path).tensors.items()
    return [
        Weight(name, info.shape[0] if info.shape else 1, info.numel, info.bytes)
        for name, info in found
        if not name.startswith(("mtp.", "model.visual."))
    ]


def touched_bytes(weights: Sequence[Weight], config: Mapping[str, Any], sequences: int) -> int:
    """Bytes of weights that a step of ``sequences`` tokens reads, experts counted as a uniform router would touch them."""
    experts, top = config.get("num_experts") or 0, config.get("num_experts_per_tok") or 0
    total = 0.0
    for weight in weights:
        share = 1.0
        if ".experts." in weight.name and experts:
            share = 1 - (1 - top / experts) ** sequences
        elif weight.name.endswith("embed_tokens.weight"):
            share = min(1.0, sequences / weight.rows)
        total += share * weight.bytes
    return int(total)


def timed(backend: Backend, prompts: Sequence[str], tokens: int) -> tuple[float, list[Completion]]:
    """Seconds, and the completions in the order of the prompts: the faster one of two runs."""
    runs = []
    for _ in range(2):
        started = time.perf_counter()
        found = dict(backend.generate(prompts, Sampling(max_tokens=tokens)))
        runs.append(time.perf_counter() - started)
    return min(runs), [found[index] for index in range(len(prompts))]


def measure(
    backend: Backend, prompts: Sequence[str], generate: int, limit_bytes_per_s: float
) -> tuple[dict[str, Any], list[str]]:
    """(rates of one batch of prompts; the texts). A run of full length, which is not counted, comes before: kernels are
    compiled and chosen for every length that they meet."""
    list(backend.generate(prompts, Sampling(max_tokens=generate)))
    first, _ = timed(backend, prompts, 2)
    seconds, found = timed(backend, prompts, generate)
    if {completion.tokens for completion in found} != {generate}:
        raise UserError(f"asked for {generate} tokens each, got {sorted({c.tokens for c in found})}")
    if seconds <= first:
        raise UserError(
            f"{generate} tokens took {seconds:.3f} s and 2 took {first:.3f}: the machine is busy, or --generate small"
        )
    batch, steps = len(prompts), (seconds - first) / (generate - 2)  # seconds of a step, without the prompt
    return {
        "tokens_per_s": batch * generate / seconds, "decode_tokens_per_s": batch / steps, "seconds": seconds,
        "limit_decode_tokens_per_s": batch * limit_bytes_per_s,
    }, [completion.text for completion in found]  # fmt: skip


def table(metrics: dict[str, Any]) -> str:
    lines = [f"{metrics['parameters']:,} parameters, prompts of {metrics['prompt']} tokens, {metrics['generate']} generated"]
    for batch, row in next(metrics[name] for name in ENGINES if name in metrics).items():
        share = 100 * row["decode_tokens_per_s"] / row["limit_decode_tokens_per_s"]
        lines.append(
            f"  batch {batch:>4}: {row['tokens_per_s']:>9.1f} tokens/s with the prompt, "
            f"{row['decode_tokens_per_s']:>9.1f} decoding ({share:.1f} % of the limit)"
        )
    return "\n".join(lines)


def run(
    backends: Callable[[int], Any],
    weights: Sequence[Weight],
    config: Mapping[str, Any],
    rate: float,
    args: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """(metrics, greedy token ids of every batch as text). ``backends``: the engine for a batch of that size; ``rate``: bytes
    a second that its memory gives."""
    found, answers = {}, {}
    with progress(len(args.batches), args.backend, "batch") as bar:
        for batch in args.batches:
            backend = backends(batch)
            prompts = prompts_of(backend.tokenizer, batch, args.prompt)
            backend.tokenizer.decode = ids_as_text  # a synthetic model says tokens that its tokenizer does not know
            limit = rate / touched_bytes(weights, config, batch)
            found[str(batch)], answers[str(batch)] = measure(backend, prompts, args.generate, limit)
            del backend.tokenizer.decode
            if args.backend == "hf":
                found[str(batch)]["peak_vram_mib"] = peak_vram_mib()
            bar.update()
    return {
        "parameters": sum(weight.numel for weight in weights), "prompt": args.prompt, "generate": args.generate,
        "copy_bytes_per_s": rate, args.backend: found,
    }, answers  # fmt: skip


def ids_as_text(ids: Sequence[int], **_: Any) -> str:
    return " ".join(map(str, ids))


def peak_vram_mib() -> int | None:
    return torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None


Engine = tuple[Callable[[int], Backend], list[Weight], Mapping[str, Any], dict[str, Any]]


def hf_model(args: argparse.Namespace, device: torch.device) -> Engine:
    """(engine for a batch, weights, config of the text model, entry of the record) through transformers."""
    if args.model:
        described, tokenizer, model = describe_model(args.model), load_tokenizer(args.model), load_model(args.model)
    else:
        shape = shape_from(args)
        whole = SHAPES[args.shape].layers
        described = {"path": f"random weights, shape {args.shape}", "layers": shape.layers, "layers_of_the_shape": whole}
        tokenizer, model = load_tokenizer(TOKENIZER), random_model(config_of(shape), device)
    config = model.config.get_text_config().to_dict()
    return lambda batch: ForcedBackend(model, tokenizer, batch), weights_of_model(model), config, described


def vllm_model(args: argparse.Namespace, device: torch.device) -> Engine:
    """The same through vLLM: one engine for batches of any size."""
    config = read_json(args.model / "config.json")
    context = args.prompt + args.generate + PROMPT_ROOM
    engine = ForcedVllm(args.model, context, max(args.batches), args.tensor_parallel, args.eager, args.kv_gib)
    return (
        lambda batch: engine,
        weights_of_checkpoint(args.model),
        text_config(config),
        describe_model(args.model),
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; without it random weights of --shape")
    shape_arguments(parser)
    parser.add_argument("--batches", type=numbers, default=[1, 32, 128], help="sequences at once (default 1,32,128)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--generate", type=int, default=128, help="tokens generated for each (default 128)")
    parser.add_argument("--backend", choices=ENGINES, default="hf", help="transformers (hf) or vllm")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads the model over")
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation and graphs, which starts sooner")
    parser.add_argument(
        "--kv-gib", type=float, help="vLLM's cache on each GPU, instead of what is free: several engines share one"
    )
    parser.add_argument("--in-turn", type=Path, help="touch PATH.ready, measure when PATH.go is there, end when PATH.end is")
    parser.add_argument("--answers", type=Path, help="write the greedy token ids of every prompt to this JSON file")
    add_record_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_record_arguments(args)
    if args.prompt < 1 or args.generate < 3:
        raise UserError("--prompt must be at least 1 and --generate at least 3")
    if args.backend == "vllm" and not args.model:
        raise UserError("--backend vllm reads a checkpoint: give --model (src/quant/synthetic_moe.py makes one of a shape)")
    if args.tensor_parallel != 1 and args.backend != "vllm":
        raise UserError("--tensor-parallel is vLLM's: add --backend vllm")
    choose_backend(args.backend)
    started, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = copy_rate(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine takes what is free
    backends, weights, config, described = (vllm_model if args.backend == "vllm" else hf_model)(args, device)
    made = time.time() - started
    with turn(args.in_turn):
        speed, answers = run(backends, weights, config, rate * args.tensor_parallel, args)
        metrics: dict[str, Any] = {"made_seconds": made, "eval_speed": speed | {"tensor_parallel": args.tensor_parallel}}
        if args.answers:
            write_json(args.answers, answers)
        if args.result:
            write_result(args.result, kind="bench", tag=args.tag, started=started, model=described, metrics=metrics)
    print(table(metrics["eval_speed"]), flush=True)


if __name__ == "__main__":
    run_cli(main)
