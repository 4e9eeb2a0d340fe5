"""How many greedy tokens of two checkpoints are the same in vLLM: what shows that a packed one runs as its plain one does.

    PYTHONPATH=src/quant:src/eval .venv-vllm/bin/python src/eval/vllm_tokens.py --model work/w3-packed --reference work/w3 \
        --tag razor_tiny_packed_vllm [--items 24] [--max-tokens 300] [--text FILE] [--unlock-cpu-experts] [--out results/probe]

`likeliest`: at every place of held-out transcripts (prompt and reference turn of the tiny tasks, or paragraphs of --text), is
the likeliest next token the same? `generated`: greedy continuations of the prompts, tokens up to the first that differs.
Each checkpoint runs in a process of its own. --unlock-cpu-experts lets vLLM use its CPU kernel of 4-bit experts on a CPU
without AMX: the kernel runs there, vLLM only does not offer it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from console import UserError, read_json, run_cli, write_json
from hf_model import end_token_ids, load_tokenizer, prompt_ids
from kl import file_texts, tiny_texts
from recipe import recipe_record
from records import add_tag_arguments, describe_model, tagged_record, write_result
from vllm_eval import set_engine_environment, vllm_engine

Ids = list[list[int]]


def texts(args: argparse.Namespace) -> tuple[Ids, Ids, dict[str, Any]]:
    """(ids of the prompts, ids of the turns that follow them, record of the data)."""
    tokenizer = load_tokenizer(args.reference)
    pairs, entry = file_texts(args.text, args.items) if args.text else tiny_texts(tokenizer, args.items)
    prompts, turns = (prompt_ids(tokenizer, [pair[part] for pair in pairs]) for part in (0, 1))
    return prompts, turns, entry


def run_engine(args: argparse.Namespace) -> dict[str, Any]:
    """{"likeliest": token at every place, "generated": ids of each greedy continuation, "seconds"} of one checkpoint."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else the line below would not reach the engine
    set_engine_environment()
    from vllm import SamplingParams

    if args.unlock_cpu_experts:
        from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

        CPUExpertsInt4._supports_current_device = staticmethod(lambda: True)
    prompts, turns, _ = texts(args)
    length = max(len(a) + max(len(b), args.max_tokens) for a, b in zip(prompts, turns)) + 1
    engine, _ = vllm_engine(args.dump_of, length, 1, max_num_seqs=16, enforce_eager=True, dtype="bfloat16")
    started, greedy = time.time(), {"temperature": 0, "detokenize": False}
    whole = [{"prompt_token_ids": a + b} for a, b in zip(prompts, turns)]
    places = engine.generate(whole, SamplingParams(**greedy, max_tokens=1, prompt_logprobs=1))
    likeliest = [min(place, key=lambda token: place[token].rank) for out in places for place in out.prompt_logprobs[1:]]
    ends = end_token_ids(args.reference, load_tokenizer(args.reference))
    params = SamplingParams(**greedy, max_tokens=args.max_tokens, stop_token_ids=ends)
    free = engine.generate([{"prompt_token_ids": ids} for ids in prompts if ids], params)
    generated = [list(out.outputs[0].token_ids) for out in free]
    return {"likeliest": likeliest, "generated": generated, "seconds": round(time.time() - started, 2)}


def compare(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Counts and shares of equal tokens of two results of :func:`run_engine` on the same texts."""
    places = list(zip(one["likeliest"], other["likeliest"], strict=True))
    answers = list(zip(one["generated"], other["generated"], strict=True))
    same, total = sum(a == b for a, b in places), sum(max(map(len, pair)) for pair in answers)
    prefix = sum(len(os.path.commonprefix(pair)) for pair in answers)
    return {
        "likeliest": {"places": len(places), "same": same, "share": same / len(places)},
        "generated": {"tokens": total, "same": prefix, "share": prefix / total if total else 1.0},
        "answers": {"n": len(answers), "same": sum(a == b for a, b in answers)},
    }


def in_process(model: Path) -> dict[str, Any]:
    """:func:`run_engine` on ``model`` in a process of its own, which gives its memory back."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "tokens.json"
        run = [sys.executable, __file__, *sys.argv[1:], "--dump-of", str(model), "--dump", str(out)]
        done = subprocess.run(run, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            sys.stderr.write(done.stdout[-6000:])
            raise UserError(f"{model}: vLLM did not run it (its own words are above)")
        kernels = {line.partition("] ")[2] for line in done.stdout.splitlines() if "Using" in line and "WNA16" in line}
        return read_json(out) | {"kernels": sorted(kernels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the packed checkpoint")
    parser.add_argument("--reference", type=Path, required=True, help="the checkpoint that it is compared with")
    add_tag_arguments(parser, "probe")
    parser.add_argument("--items", type=int, default=24, help="transcripts of each tiny task, or paragraphs")
    parser.add_argument("--text", type=Path, help="measure on this text file instead")
    parser.add_argument("--max-tokens", type=int, default=300, help="generated for each text (default 300)")
    parser.add_argument("--unlock-cpu-experts", action="store_true", help="see above")
    parser.add_argument("--dump-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.items, args.max_tokens) < 1:
        raise UserError("--items and --max-tokens must be at least 1")
    if args.dump:
        write_json(args.dump, run_engine(args))
        return
    result, started = tagged_record(args), time.time()
    one, other = in_process(args.model), in_process(args.reference)
    metrics = compare(one, other) | {"kernels": one["kernels"], "kernel_unlocked": args.unlock_cpu_experts}
    write_result(
        result, kind="probe", tag=args.tag, started=started, model=describe_model(args.model), data=[texts(args)[2]],
        recipe=recipe_record(args.model), metrics=metrics, extra={"reference": describe_model(args.reference)},
    )  # fmt: skip
    shown = [f"{100 * metrics[key]['share']:.2f} % of {metrics[key][of]:,} {of} ({key})"
             for key, of in (("likeliest", "places"), ("generated", "tokens"))]  # fmt: skip
    print(f"same: {', '.join(shown)}; {metrics['answers']['same']} of {metrics['answers']['n']} answers", flush=True)


if __name__ == "__main__":
    run_cli(main)
