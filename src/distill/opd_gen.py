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

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backend import PROMPT_ROOM, Backend, Completion, HfBackend, Sampling, choose_backend
from checkpoint import Checkpoint
from console import UserError, file_sha256, progress, run_cli
from graders import GRADER_VERSION
from opd_data import Generation, shown, write_rollouts
from records import sha256_text
from runner import get_benchmarks, graded_rows
from sample_log import SampleLog, sample_key
from settings import parse_settings, setting
from task import Benchmark
from task_text import Item
from vllm_eval import VllmBackend


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
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()][:limit]
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


def make_backend(name: str, model: Path, max_tokens: int, chunk: int) -> Backend:
    if name == "llamacpp" or name == "auto" and model.suffix == ".gguf":
        from llamacpp_eval8 import LlamaCppBackend  # needs gguf, which a checkpoint's student does not

        return LlamaCppBackend(model, max_tokens + PROMPT_ROOM)
    return HfBackend(model, chunk) if choose_backend(name) == "hf" else VllmBackend(model, max_tokens + PROMPT_ROOM)


def weights_sha256(model: Path) -> str:
    return file_sha256(model) if model.is_file() else Checkpoint(model).sha256()


def make_rollouts(settings: Generation, model: Path, out: Path) -> None:
    """Generate, grade, keep, into ``out``. What an earlier run of the same settings has finished is not made again."""
    if not settings.tasks and not settings.prompts:
        raise UserError("give --tasks, --prompts or both")
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.seed, settings.max_tokens)
    facts: dict[str, Any] = {"model": shown(model), "weights_sha256": weights_sha256(model), "backend": settings.backend}
    facts |= {"sampling": sampling.to_json(), "tasks": settings.tasks, "limit": settings.limit, "repeats": settings.repeats}
    facts |= {"prompts": file_sha256(settings.prompts) if settings.prompts else None, "grader": GRADER_VERSION}
    facts |= {"chunk": settings.chunk}
    log = SampleLog(out / "samples.jsonl", facts)
    started = time.monotonic()
    backend = make_backend(settings.backend, model, settings.max_tokens, settings.chunk)
    names = settings.tasks.split(",") if settings.tasks else []
    prompts = task_prompts(names, settings.limit, backend) if names else []
    prompts += file_prompts(settings.prompts, None if names else settings.limit, backend) if settings.prompts else []
    prompts = repeated(prompts, settings.repeats)
    tokens = generate(backend, prompts, sampling, log, settings.chunk)
    rows = [log.done[prompt.source, prompt.id, 0] for prompt in prompts]
    chosen = kept(rows, settings.finished_only, settings.correct_only)
    if not chosen:
        finished = sum(row["finish_reason"] == "stop" for row in rows)
        raise UserError(f"{out}: none of {len(rows)} rollouts is kept (finished {finished}); "
                        "raise --max-tokens or drop --finished-only")  # fmt: skip
    choice = {"finished_only": settings.finished_only, "correct_only": settings.correct_only}
    manifest = write_rollouts(out, rows, chosen, facts, choice, time.monotonic() - started, tokens)
    made, left = manifest["all"], manifest["kept"]
    print(f"{made['samples']} rollouts, {made['finished']} finished, {made['correct']} of {made['graded']} right; "
          f"kept {left['samples']} with {left['tokens']:,} tokens in {out}", flush=True)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Generation):
    model: Path = setting(help="the quantized student: a checkpoint, or a GGUF file")
    out: Path = setting(help="directory of the rollouts")


def main() -> None:
    settings, _ = parse_settings(Settings, __doc__)
    make_rollouts(settings, settings.model, settings.out)


if __name__ == "__main__":
    run_cli(main)
