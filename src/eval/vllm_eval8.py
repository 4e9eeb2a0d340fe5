"""Measure a model's accuracy on benchmarks: bash pipelines/eval.sh --model models/razor-tiny --tag razor_tiny_bf16

    python src/eval/vllm_eval8.py --model DIR|FILE.gguf --tag TAG [--benchmarks tiny_know,tiny_math]
        [--backend auto|vllm|hf|llamacpp|openai]
        [--budget 32k|64k|80k] [--samples N] [--limit N] [--data-dir DIR] [--family NAME] [--out results/eval]
        [--temperature T --top-p P --top-k K --seed S] [--tensor-parallel N | --devices all [--spread]] [--force]
        [--dry-run]

Samples are appended to results/eval/TAG.samples.jsonl as they finish: a killed run goes on where it stopped, to the same
result. A truncated answer counts as wrong; acc_finished and trunc stand beside acc. Tokens are drawn as the vendor of the model
recommends (configs/eval.env) unless an option says otherwise. docs/EVAL_PROTOCOL.md has the rules.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

from backend import PROMPT_ROOM, Backend, HfBackend, Replicas, choose_backend
from backend_openai import OpenAIServers, ServerSettings
from checkpoint import Checkpoint
from console import UserError, read_json, run_cli
from devices import parse_devices
from gguf_format import config_of_gguf, describe_gguf, is_first, is_gguf
from llamacpp_eval8 import LlamaCppBackend
from records import public_path
from runner import (
    add_run_arguments,
    check_args,
    describe_checkpoint,
    get_benchmarks,
    make_plan,
    run_evaluation,
)
from settings import add_settings, settings_of
from vllm_eval import VllmBackend


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="checkpoint directory, GGUF file, or a server's name for it")
    add_run_arguments(parser, "tiny_know,tiny_math,tiny_reason,tiny_code", "auto, vllm, hf, llamacpp or openai", 64)
    devices = "GPUs for --backend hf, each with a copy of the model and its share of the prompts: cuda:0,cuda:1 or all"
    parser.add_argument("--devices", default="", help=devices)
    parser.add_argument("--spread", action="store_true", help="one copy, its layers in equal runs on --devices")
    group = parser.add_argument_group("a GGUF file, or a server (--backend openai)")
    add_settings(group, ServerSettings)
    group.add_argument("--server-args", default="", help='further options of llama-server, as "-ngl 99 --cpu-moe"')
    group.add_argument("--prompt-text", action="store_true", help="send text, not token ids (openai)")
    group.add_argument("--plain-fields", action="store_true", help="send only the fields of OpenAI's own API (openai)")
    args = parser.parse_args()
    check_args(args)
    args.servers = settings_of(ServerSettings, args)
    if args.backend == "openai" and not (args.servers.base_url and args.servers.tokenizer):
        raise UserError("--backend openai needs --base-url and --tokenizer DIR")
    if args.backend in ("hf", "vllm", "llamacpp") and is_gguf(args.model) != (args.backend == "llamacpp"):
        raise UserError(f"{args.model}: not for --backend {args.backend}; llamacpp takes .gguf files, hf and vllm directories")
    return args


def check_model(model: Path) -> None:
    """Raise on a directory that holds a GGUF and no checkpoint, naming the file."""
    files = sorted(file for file in model.glob("*.gguf") if is_first(file.name)) if model.is_dir() else []
    if files and not (model / "config.json").exists():
        also = f" ({len(files)} such files are there)" if len(files) > 1 else ""
        raise UserError(f"{model}: a directory that holds a GGUF; give the file, --model {files[0]}{also}")


def config_of(name: str, args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """(how a record names the model, its config.json or what stands for it); a server tells no more than the name."""
    if name == "openai":
        config = args.servers.tokenizer / "config.json"
        return str(args.model), read_json(config) if config.is_file() else {}
    check_model(args.model)
    config = config_of_gguf(args.model) if name == "llamacpp" else Checkpoint(args.model).config
    return public_path(str(args.model.resolve())), config


def described(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The model's entry in the record."""
    if name == "llamacpp":
        return describe_gguf(args.model)
    if name == "openai":
        one = None if args.servers.several else args.servers.base_url
        return {"path": str(args.model), "base_url": one, "weights_sha256": None}
    return describe_checkpoint(args.model)


def make_backend(name: str, args: argparse.Namespace, budget: int) -> Backend:
    context, servers = budget + PROMPT_ROOM, args.servers
    if name == "llamacpp":
        arguments = shlex.split(args.server_args)
        return LlamaCppBackend(args.model, context, servers.tokenizer, servers.parallel, arguments, servers.timeout)
    if name == "openai":
        one = servers.one(str(args.model), servers.tokenizer, context, send_text=args.prompt_text, plain=args.plain_fields)
        return OpenAIServers(servers.base_url, one) if servers.several else one
    if name == "vllm":
        return VllmBackend(args.model, context, tensor_parallel=args.tensor_parallel)
    devices = parse_devices(args.devices)
    copies = len(devices) > 1 and not args.spread
    return Replicas(args.model, devices, args.batch) if copies else HfBackend(args.model, args.batch, devices)


def main() -> None:
    args = parse_args()
    benchmarks = get_benchmarks(args.benchmarks.split(","), args.data_dir)
    name = choose_backend(args.backend, args.model)
    if name in ("hf", "vllm") and (asking := next((each.name for each in benchmarks if each.converses), "")):
        raise UserError(
            f"--benchmarks {asking}: a dialogue with tools, which a server holds: give a GGUF, or --backend openai with the "
            "address of vllm serve MODEL --enable-auto-tool-choice --tool-call-parser NAME"
        )
    plan = make_plan(args, name, *config_of(name, args))
    if name == "openai" and args.plain_fields:  # a record must not list what was not sent
        source = f"{plan.source}; top_k {plan.sampling.top_k} is not sent (--plain-fields), the server's own holds"
        print(source, flush=True)
        plan = dataclasses.replace(plan, sampling=dataclasses.replace(plan.sampling, top_k=None), source=source)
    extra, budget = {"devices": args.devices or None, "spread": args.spread}, plan.sampling.max_tokens

    def more(backend: Backend) -> dict[str, Any]:
        return extra | ({"servers": backend.tally()} if isinstance(backend, OpenAIServers) else {})

    run_evaluation(plan, benchmarks, lambda: described(name, args), lambda _: make_backend(name, args, budget), more)


if __name__ == "__main__":
    run_cli(main)
