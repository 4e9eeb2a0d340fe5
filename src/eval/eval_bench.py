"""Tokens a second of an evaluation through transformers, at forced lengths: bash pipelines/bench_h100.sh, or

    python src/eval/eval_bench.py --model models/razor-tiny [--batches 1,32,128 --prompt 256] [--result F --tag T]
    python src/eval/eval_bench.py --shape 35b [--layers 40] ...     # random weights of a published shape, made on the GPU

The prompts go the way of an evaluation (HfBackend: tokenizer, batches, KV cache) and no end token stops them. The limit of one
step is that of memory: bytes of all weights that a batch of this size touches (under a uniform router) at the rate of a copy.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from backends import HfBackend, Sampling, load_tokenizer
from console import UserError, progress, run_cli
from gguf_bench import copy_rate, numbers
from results_store import add_record_arguments, check_record_arguments, describe_model, write_result
from synthetic_moe import SHAPES, config_of, shape_arguments, shape_from

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


def touched_bytes(model: torch.nn.Module, sequences: int) -> int:
    """Bytes of weights that a step of ``sequences`` tokens reads, experts counted as a uniform router would touch them."""
    config = model.config.get_text_config()
    experts, top = getattr(config, "num_experts", 0), getattr(config, "num_experts_per_tok", 0)
    total = 0.0
    for name, parameter in model.named_parameters():
        share = 1.0
        if ".experts." in name and experts:
            share = 1 - (1 - top / experts) ** sequences
        elif name.endswith("embed_tokens.weight"):
            share = min(1.0, sequences / parameter.shape[0])
        total += share * parameter.numel() * parameter.element_size()
    return int(total)


def measure(model: torch.nn.Module, tokenizer: Any, batch: int, prompt: int, generate: int, rate: float) -> dict[str, Any]:
    """One batch of prompts, after a short one that is not counted."""
    backend = ForcedBackend(model, tokenizer, batch)
    prompts = prompts_of(tokenizer, batch, prompt)
    list(backend.generate(prompts, Sampling(max_tokens=2)))
    started = time.perf_counter()
    list(backend.generate(prompts, Sampling(max_tokens=2)))
    first = time.perf_counter() - started
    started = time.perf_counter()
    found = [completion for _, completion in backend.generate(prompts, Sampling(max_tokens=generate))]
    seconds = time.perf_counter() - started
    if {completion.tokens for completion in found} != {generate}:
        raise UserError(f"asked for {generate} tokens each, got {sorted({c.tokens for c in found})}")
    steps = (seconds - first) / (generate - 2)  # seconds of a step, without the prompt
    return {
        "tokens_per_s": batch * generate / seconds, "decode_tokens_per_s": batch / steps, "seconds": seconds,
        "limit_decode_tokens_per_s": batch * rate / touched_bytes(model, batch),
        "peak_vram_mib": torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None,
    }  # fmt: skip


def table(metrics: dict[str, Any]) -> str:
    lines = [f"{metrics['parameters']:,} parameters, prompts of {metrics['prompt']} tokens, {metrics['generate']} generated"]
    for batch, row in metrics["hf"].items():
        share = 100 * row["decode_tokens_per_s"] / row["limit_decode_tokens_per_s"]
        lines.append(
            f"  batch {batch:>4}: {row['tokens_per_s']:>9.1f} tokens/s with the prompt, "
            f"{row['decode_tokens_per_s']:>9.1f} decoding ({share:.1f} % of the limit)"
        )
    return "\n".join(lines)


def run(model: torch.nn.Module, tokenizer: Any, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    rate, found = copy_rate(device), {}
    with progress(len(args.batches), "hf", "batch") as bar:
        for batch in args.batches:
            found[str(batch)] = measure(model, tokenizer, batch, args.prompt, args.generate, rate)
            bar.update()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {
        "parameters": parameters, "prompt": args.prompt, "generate": args.generate, "copy_bytes_per_s": rate, "hf": found,
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a checkpoint; without it random weights of --shape")
    shape_arguments(parser)
    parser.add_argument("--batches", type=numbers, default=[1, 32, 128], help="sequences at once (default 1,32,128)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--generate", type=int, default=128, help="tokens generated for each (default 128)")
    add_record_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_record_arguments(args)
    if args.prompt < 1 or args.generate < 3:
        raise UserError("--prompt must be at least 1 and --generate at least 3")
    started, device = time.time(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.model:
        from backends import load_model

        described, tokenizer, model = describe_model(args.model), load_tokenizer(args.model), load_model(args.model)
    else:
        shape = shape_from(args)
        whole = SHAPES[args.shape].layers
        described = {"path": f"random weights, shape {args.shape}", "layers": shape.layers, "layers_of_the_shape": whole}
        tokenizer, model = load_tokenizer(TOKENIZER), random_model(config_of(shape), device)
    metrics = {"made_seconds": time.time() - started, "eval_speed": run(model, tokenizer, args, device)}
    if args.result:
        write_result(args.result, kind="bench", tag=args.tag, started=started, model=described, metrics=metrics)
    print(table(metrics["eval_speed"]), flush=True)


if __name__ == "__main__":
    run_cli(main)
