"""Phase A: the student answers training prompts; the harness's graders judge; finished ones are kept.

    python src/distill/opd_gen.py --model work/student --out work/rollouts [--tasks tiny_know,tiny_math] [--limit N]
        [--prompts FILE.jsonl] [--backend auto|hf|vllm|llamacpp] [--finished-only] [--correct-only]
        [--max-tokens N] [--temperature T --top-p P --top-k K --seed S] [--repeats R]

Prompts are the training split of the tiny tasks, never a test split, and lines of FILE: {"prompt": "..."},
{"messages": [...]} or {"text": "..."}, which goes on as it is, with an optional "id"; those are not graded. Samples are
appended to OUT/samples.jsonl as they finish, chunk by chunk; a killed run goes on with the same command, to the same samples
on a CPU. OUT/rollouts.jsonl: the kept ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backend import PROMPT_ROOM, Backend, Completion, Sampling, choose_backend
from backend_hf import HfBackend
from checkpoint import Checkpoint
from console import UserError, atomic_path, file_sha256, progress, read_json, run_cli, write_json
from graders import GRADER_VERSION
from opd_data import MANIFEST, ROLLOUTS, shown, write_phase
from records import sha256_json, sha256_text
from runner import graded_rows
from sample_log import SampleLog, sample_key
from task import Benchmark
from task_list import get_benchmarks
from task_text import Item
from vllm_eval import VllmBackend

CHUNK = 64  # prompts generated together, whole or not at all: a resumed run must make the same batches (--chunk)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt; ``benchmark`` and ``item`` are None for a prompt from a file, which nobody grades."""

    source: str
    id: str
    text: str
    benchmark: Benchmark | None = None
    item: Item | None = None
    turn: int = 0  # of a prompt that is answered more than once
    open: bool = False  # text that goes on as it is has no end to reach


def task_prompts(names: Sequence[str], limit: int, backend: Backend) -> list[Prompt]:
    """``limit`` training items of each benchmark class that has a training split."""
    found = []
    for benchmark in get_benchmarks(names):
        load = getattr(benchmark, "load_with_solutions", None)
        if load is None:
            raise UserError(f"--tasks {benchmark.name}: has no training split; give prompts as --prompts FILE.jsonl")
        for item, _ in load(limit, "train"):
            text = backend.render(benchmark.messages(item))
            found.append(Prompt(benchmark.name, item.id, text, benchmark, item))
    return found


def file_prompts(path: Path, limit: int | None, backend: Backend) -> list[Prompt]:
    """The prompts of a jsonl file."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not a jsonl file of prompts ({error})") from None
    found = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not row.keys() & {"prompt", "messages", "text"}:
            raise UserError(f'{path}:{number}: expected {{"prompt": "..."}}, {{"messages": [...]}} or {{"text": "..."}}')
        messages = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
        text = row["text"] if "text" in row else backend.render(messages)
        found.append(Prompt(path.name, str(row.get("id", f"{number:06d}")), text, open="text" in row))
    if not found:
        raise UserError(f"{path}: holds no prompts")
    return found


def repeated(prompts: Sequence[Prompt], repeats: int) -> list[Prompt]:
    """Every prompt ``repeats`` times under ids of its own."""
    if repeats == 1:
        return list(prompts)
    turns = range(repeats)
    return [dataclasses.replace(prompt, id=f"{prompt.id}-{turn}", turn=turn) for turn in turns for prompt in prompts]


def log_rows(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Rows of the sample log, graded benchmark by benchmark, with the prompt's text."""
    rows: list[dict[str, Any] | None] = [None] * len(prompts)
    for source in dict.fromkeys(prompt.source for prompt in prompts):
        places = [i for i, prompt in enumerate(prompts) if prompt.source == source]
        own, answers = [prompts[i] for i in places], [completions[i] for i in places]
        if own[0].benchmark is not None:
            items = [dataclasses.replace(prompt.item, id=prompt.id) for prompt in own]
            made = graded_rows(own[0].benchmark, items, [prompt.text for prompt in own], answers)
        else:
            made = [ungraded_row(*pair) for pair in zip(own, answers, strict=True)]
        for place, row, prompt in zip(places, made, own, strict=True):
            rows[place] = row | {"prompt": prompt.text}
    return rows


def ungraded_row(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    own = {"benchmark": prompt.source, "id": prompt.id, "prompt_sha256": sha256_text(prompt.text)}
    return own | dataclasses.asdict(completion) | {"correct": None, "open": prompt.open}


def chunks_of(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """The prompts of each turn in chunks of like length, always the same ones."""
    found = []
    for turn in sorted({prompt.turn for prompt in prompts}):
        own = sorted((prompt for prompt in prompts if prompt.turn == turn), key=lambda prompt: (len(prompt.text), prompt.id))
        found += [own[start : start + size] for start in range(0, len(own), size)]
    return found


def generate(backend: Backend, prompts: Sequence[Prompt], sampling: Sampling, log: SampleLog, chunk: int) -> int:
    """Fill the log with what it lacks, chunk by chunk; returns the generated tokens of this run."""
    tokens = 0
    with progress(len(prompts), "rollouts", "sample") as bar:
        for part in chunks_of(prompts, chunk):
            if all((prompt.source, prompt.id, 0) in log.done for prompt in part):
                bar.update(len(part))
                continue
            own = dataclasses.replace(sampling, seed=sampling.seed + 7919 * part[0].turn)  # vLLM seeds prompt by prompt
            made = dict(backend.generate([prompt.text for prompt in part], own))
            rows = log_rows(part, [made[i] for i in range(len(part))])
            log.append([row for row in rows if sample_key(row) not in log.done])
            tokens += sum(row["tokens"] for row in rows)
            bar.update(len(part))
    return tokens


def kept(rows: Sequence[dict[str, Any]], finished_only: bool, correct_only: bool) -> list[dict[str, Any]]:
    """The rollouts to learn from: with text, and finished or right where that is asked for and can be said of them."""

    def good(row: dict[str, Any]) -> bool:
        finished = row["finish_reason"] == "stop" or not finished_only or row.get("open", False)
        return bool(row["text"]) and finished and (bool(row["correct"]) or not correct_only)

    return [row for row in rows if good(row)]


def counts(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    graded = [row for row in rows if row["correct"] is not None]
    return {
        "samples": len(rows),
        "finished": sum(row["finish_reason"] == "stop" for row in rows),
        "graded": len(graded),
        "correct": sum(row["correct"] for row in graded),
        "tokens": sum(row["tokens"] for row in rows),
    }


def make_backend(name: str, model: Path, max_tokens: int, chunk: int) -> Backend:
    if name == "llamacpp" or name == "auto" and model.suffix == ".gguf":
        from llamacpp_eval8 import LlamaCppBackend  # needs gguf, which a checkpoint's student does not

        return LlamaCppBackend(model, max_tokens + PROMPT_ROOM)
    return HfBackend(model, chunk) if choose_backend(name) == "hf" else VllmBackend(model, max_tokens + PROMPT_ROOM)


def weights_sha256(model: Path) -> str:
    return file_sha256(model) if model.is_file() else Checkpoint(model).sha256()


def make_rollouts(args: argparse.Namespace) -> dict[str, Any]:
    """Generate, grade, keep; returns the manifest. A finished output of the same settings is left as it is."""
    sampling = Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.max_tokens)
    settings = {"model": shown(args.model), "weights_sha256": weights_sha256(args.model), "backend": args.backend}
    settings |= {"sampling": sampling.to_json(), "tasks": args.tasks, "limit": args.limit, "repeats": args.repeats}
    settings |= {"prompts": file_sha256(args.prompts) if args.prompts else None, "grader": GRADER_VERSION}
    settings |= {"chunk": args.chunk}
    log = SampleLog(args.out / "samples.jsonl", settings)
    started, tokens = time.monotonic(), 0
    backend = make_backend(args.backend, args.model, args.max_tokens, args.chunk)
    names = args.tasks.split(",") if args.tasks else []
    prompts = task_prompts(names, args.limit, backend) if names else []
    prompts += file_prompts(args.prompts, args.limit if not names else None, backend) if args.prompts else []
    prompts = repeated(prompts, args.repeats)
    tokens = generate(backend, prompts, sampling, log, args.chunk)
    rows = [log.done[prompt.source, prompt.id, 0] for prompt in prompts]
    chosen = kept(rows, args.finished_only, args.correct_only)
    if not chosen:
        raise UserError(f"{args.out}: none of {len(rows)} rollouts is kept (finished {counts(rows)['finished']}); "
                        "raise --max-tokens or drop --finished-only")  # fmt: skip
    choice = {"finished_only": args.finished_only, "correct_only": args.correct_only}
    return write_rollouts(args.out, rows, chosen, settings, choice, time.monotonic() - started, tokens)


def write_rollouts(
    out: Path, rows: Sequence[dict[str, Any]], chosen: Sequence[dict[str, Any]], settings: dict[str, Any],
    choice: dict[str, bool], seconds: float, tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """The kept rollouts, the cost of all, and the manifest, which is returned."""
    with atomic_path(out / ROLLOUTS) as temporary:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) for row in chosen]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {"format": 1, "settings": settings, "choice": choice, "all": counts(rows), "kept": counts(chosen)}
    manifest |= {"settings_sha256": sha256_json(settings), "sha256": file_sha256(out / ROLLOUTS)}
    write_phase(out, "opd_gen", seconds, tokens)
    write_json(out / MANIFEST, manifest)  # last: its presence says that the phase is complete
    return manifest


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that opd_gen and cache_teacher share."""
    parser.add_argument("--out", type=Path, required=True, help="directory of the rollouts")
    parser.add_argument("--tasks", default="", help="benchmarks with a training split, comma-separated")
    parser.add_argument("--prompts", type=Path, help="jsonl file of prompts beside or instead of --tasks")
    parser.add_argument("--limit", type=int, default=64, help="prompts of each task, or of the file without tasks")
    parser.add_argument("--repeats", type=int, default=1, help="samples of each prompt; above 1 needs a temperature")
    parser.add_argument("--backend", default="auto", help="auto, hf, vllm or llamacpp")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="prompts generated together; a GPU takes many")
    parser.add_argument("--finished-only", action="store_true", help="keep only rollouts that ended by themselves")
    parser.add_argument("--correct-only", action="store_true", help="keep only those that the grader accepts")
    parser.add_argument("--max-tokens", type=int, default=32768, help="of a rollout (default 32768)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the rollouts (default 1.0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1.0 is off (the default)")
    parser.add_argument("--top-k", type=int, default=0, help="0 is off (the default)")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")


def check_generation_arguments(args: argparse.Namespace) -> None:
    if not args.tasks and not args.prompts:
        raise UserError("give --tasks, --prompts or both")
    if min(args.limit, args.repeats, args.max_tokens, args.chunk) < 1:
        raise UserError("--limit, --repeats, --max-tokens and --chunk must be at least 1")
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.top_k < 0:
        raise UserError("sampling: temperature >= 0, 0 < top-p <= 1, top-k >= 0")
    if args.repeats > 1 and args.temperature == 0:
        raise UserError("--repeats above 1 at temperature 0 would repeat the same text")


def summary(out: Path) -> str:
    manifest = read_json(out / MANIFEST)
    made, left = manifest["all"], manifest["kept"]
    return (
        f"{made['samples']} rollouts, {made['finished']} finished, {made['correct']} of {made['graded']} right; "
        f"kept {left['samples']} with {left['tokens']:,} tokens in {out}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="the quantized student: a checkpoint, or a GGUF file")
    add_generation_arguments(parser)
    args = parser.parse_args()
    check_generation_arguments(args)
    make_rollouts(args)
    print(summary(args.out), flush=True)


if __name__ == "__main__":
    run_cli(main)
