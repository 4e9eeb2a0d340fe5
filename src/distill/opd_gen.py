"""Phase A: the student answers training prompts; the harness's graders judge; finished ones are kept.

    python src/distill/opd_gen.py --model work/student --out work/rollouts [--tasks tiny_know,tiny_math] [--limit N]
        [--prompts FILE.jsonl] [--backend auto|hf|vllm|llamacpp] [--finished-only] [--correct-only]
        [--backend openai --base-url URL,URL|@FILE --served-model NAME --parallel N]
        [--max-tokens N] [--temperature T --top-p P --top-k K --seed S] [--repeats R]

Prompts are the training split of the tiny tasks, never a test split, and lines of FILE: {"prompt": "..."},
{"messages": [...]}, which ends with the user, or {"text": "..."}, which goes on as it is, with an optional "id" of its own;
those are not graded. Every line is checked before the model is loaded. Samples are appended to OUT/samples.jsonl as they
finish, chunk by chunk, with the token ids of prompt and answer; a killed run goes on with the same command, to the same
samples on a CPU. OUT/rollouts.jsonl: the kept ones. With servers (docs/CLUSTER.md) each sample is asked for by itself.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backend import PROMPT_ROOM, Backend, Completion, HfBackend, Sampling, choose_backend
from backend_openai import OpenAIServers
from checkpoint import source_identity
from console import UserError, file_sha256, progress, run_cli
from graders import GRADER_VERSION
from hf_model import ids_sha256
from opd_data import DATA_FORMAT, Generation, check_row, read_prompts, shown, tokenizer_sha256, write_rollouts
from records import sha256_text
from runner import FLUSH_ROWS, FLUSH_SECONDS, graded_rows, training_benchmarks
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
    ids: Sequence[int] = ()


def task_prompts(benchmarks: Sequence[Any], limit: int, backend: Backend) -> list[Prompt]:
    """``limit`` training items of each benchmark."""
    return [
        Prompt(benchmark.name, item.id, backend.render(benchmark.messages(item)), benchmark, item)
        for benchmark in benchmarks
        for item, _ in benchmark.load_with_solutions(limit, "train")
    ]


def file_prompts(source: str, rows: Sequence[dict[str, Any]], backend: Backend) -> list[Prompt]:
    """The prompts of the rows of :func:`read_prompts`."""
    found = []
    for row in rows:
        messages = row.get("messages") or [{"role": "user", "content": row.get("prompt")}]
        text = row["text"] if "text" in row else backend.render(messages)
        found.append(Prompt(source, row["id"], text, open="text" in row))
    return found


def with_ids(prompts: Sequence[Prompt], backend: Any, max_tokens: int) -> list[Prompt]:
    """The prompts with their token ids, before anything is generated: one without a token, or that leaves an answer no room in
    the engine's context, is a :class:`UserError`; that there is less room than was asked for is said."""
    found = [
        dataclasses.replace(prompt, ids=backend.tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
        for prompt in prompts
    ]
    for prompt in found:
        if not 0 < len(prompt.ids) < backend.context:
            limit = f"the engine's context is {backend.context} (of vllm and llamacpp at most --max-tokens + {PROMPT_ROOM})"
            raise UserError(f"{prompt.source} {prompt.id}: {len(prompt.ids)} tokens; {limit}")
    if short := sum(len(prompt.ids) + max_tokens > backend.context for prompt in found):
        print(f"{short} of {len(found)} prompts leave less than --max-tokens {max_tokens:,} in the engine's context of "
              f"{backend.context:,}; their answers end there", flush=True)  # fmt: skip
    return found


def repeated(prompts: Sequence[Prompt], repeats: int) -> list[Prompt]:
    """Every prompt ``repeats`` times under ids of its own."""
    if repeats == 1:
        return list(prompts)
    turns = range(repeats)
    return [dataclasses.replace(prompt, id=f"{prompt.id}-{turn}", turn=turn) for turn in turns for prompt in prompts]


def log_rows(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Rows of the sample log, graded benchmark by benchmark, with the prompt's text and the token ids of both."""
    rows: list[dict[str, Any] | None] = [None] * len(prompts)
    for source in dict.fromkeys(prompt.source for prompt in prompts):
        places = [i for i, prompt in enumerate(prompts) if prompt.source == source]
        own, answers = [prompts[i] for i in places], [completions[i] for i in places]
        if own[0].benchmark is not None:
            items = [dataclasses.replace(prompt.item, id=prompt.id) for prompt in own]
            made = graded_rows(own[0].benchmark, items, [prompt.text for prompt in own], answers)
        else:
            made = [ungraded_row(*pair) for pair in zip(own, answers, strict=True)]
        for place, row, prompt, done in zip(places, made, own, answers, strict=True):
            if not len(done.ids) == done.tokens > 0 or done.prompt_ids_sha256 != ids_sha256(prompt.ids):
                raise UserError(f"{prompt.source} {prompt.id}: the engine does not tell the token ids that it read and wrote")
            rows[place] = row | {"prompt": prompt.text, "prompt_ids": list(prompt.ids), "ids": list(done.ids)}
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
    """Fill the log with what it lacks; returns the generated tokens of this run. An engine gets its chunks whole, as what is
    drawn depends on the batch; servers get what is missing, each prompt with a seed of its own."""
    servers = isinstance(backend, OpenAIServers)
    pending: dict[int, Completion] = {}
    tokens, flushed = 0, time.monotonic()

    def flush(asked: Sequence[Prompt]) -> None:
        rows = log_rows([asked[index] for index in sorted(pending)], [pending[index] for index in sorted(pending)])
        log.append([row for row in rows if sample_key(row) not in log.done])
        pending.clear()

    with progress(len(prompts), "rollouts", "sample") as bar:
        for part in chunks_of(prompts, len(prompts) if servers else chunk):
            missing = [prompt for prompt in part if (prompt.source, prompt.id, 0) not in log.done]
            asked = missing if servers or not missing else part
            bar.update(len(part) - len(asked))
            if not asked:
                continue
            own = dataclasses.replace(sampling, seed=sampling.seed + 7919 * part[0].turn)  # vLLM seeds prompt by prompt
            try:
                for index, done in backend.generate([prompt.text for prompt in asked], own):
                    pending[index] = done
                    tokens += done.tokens
                    bar.update()
                    if servers and (len(pending) >= FLUSH_ROWS or time.monotonic() - flushed > FLUSH_SECONDS):
                        flush(asked)
                        flushed = time.monotonic()
            finally:  # what servers have answered stays answered when the last of them dies
                if servers or len(pending) == len(asked):
                    flush(asked)
    return tokens


def kept(rows: Sequence[dict[str, Any]], finished_only: bool, correct_only: bool) -> list[dict[str, Any]]:
    """The rollouts to learn from: with text, and finished or right where that is asked for and can be said of them."""

    def good(row: dict[str, Any]) -> bool:
        finished = row["finish_reason"] == "stop" or not finished_only or row.get("open", False)
        return bool(row["text"]) and finished and (bool(row["correct"]) or not correct_only)

    return [row for row in rows if good(row)]


def make_backend(settings: Generation, model: Path) -> Any:
    """The engine for a checkpoint or a GGUF; one that cannot run it is a :class:`UserError`."""
    name, context = choose_backend(settings.backend, model), settings.max_tokens + PROMPT_ROOM
    gguf = model.suffix == ".gguf"
    if name == "openai":
        if gguf and not settings.tokenizer:
            raise UserError(f"{model}: servers tell no tokenizer; give --tokenizer DIR, the checkpoint that it was made of")
        called = settings.served_model or model.absolute().name
        servers = OpenAIServers(settings.base_url, settings.one(called, settings.tokenizer or model, context))
        if (listed := servers.describe()["listed_model"].get("id", called)) != called:
            raise UserError(f"the servers call their model {listed!r}, not {called!r}: start them with that name "
                            "(--served-model-name, --alias), or give --served-model (SERVED_MODEL)")  # fmt: skip
        if servers.first and not servers.first[2].ids:
            raise UserError(f"{servers.first[0]}: tells no ids of the tokens that it generates, which are trained on; vLLM and "
                            "llama-server do")  # fmt: skip
        return servers
    if (name == "llamacpp") is not gguf:
        runs = "for a GGUF file" if name == "llamacpp" else "for a checkpoint"
        raise UserError(f"--backend {name}: is {runs}, --model is {model}; leave it out, and the right one is taken")
    if gguf:
        from llamacpp_eval8 import LlamaCppBackend  # needs gguf, which a checkpoint's student does not

        return LlamaCppBackend(model, context, settings.tokenizer, settings.parallel, timeout=settings.timeout)
    return HfBackend(model, settings.chunk) if name == "hf" else VllmBackend(model, context)


def check_log(log: SampleLog, prompts: Sequence[Prompt]) -> None:
    """Raise :class:`UserError` unless what an earlier run has left are answers to these prompts."""
    asked = {(prompt.source, prompt.id, 0): prompt for prompt in prompts}
    for key, row in log.done.items():
        check_row(row, f"{log.path}: {row['benchmark']} {row['id']}")
        if key not in asked or row["prompt_ids"] != list(asked[key].ids):
            why = "is of another prompt or chat template" if key in asked else "answers no prompt of this run"
            raise UserError(f"{log.path}: {row['benchmark']} {row['id']} {why}; give another --out or remove it")


def none_kept(rows: Sequence[dict[str, Any]], settings: Generation) -> str:
    """Why no rollout is kept, with counts, and what can change it."""
    empty = [row for row in rows if not row["text"]]
    cut = [row for row in rows if row["text"] and settings.finished_only and row["finish_reason"] != "stop"]
    wrong = len(rows) - len(empty) - len(cut)
    found = [
        (len(empty), "empty (the model ends its turn at once: look at --model, its chat template and the prompts)"),
        (len(cut), "unfinished (raise --max-tokens or drop --finished-only)"),
        (wrong, "wrong (drop --correct-only)"),
    ]
    return f"none of {len(rows)} rollouts is kept: " + ", ".join(f"{count} {what}" for count, what in found if count)


def make_rollouts(settings: Generation, model: Path, out: Path) -> None:
    """Generate, grade, keep, into ``out``. What an earlier run of the same settings has finished is not made again."""
    if not settings.tasks and not settings.prompts:
        raise UserError("give --tasks, --prompts or both")
    if settings.prompts and settings.correct_only:
        raise UserError("--correct-only with --prompts: nobody grades the answers to the prompts of a file")
    benchmarks = training_benchmarks(settings.tasks.split(",")) if settings.tasks else []
    rows = read_prompts(settings.prompts) if settings.prompts else []
    if len(rows) > settings.limit and not benchmarks:
        print(f"{settings.prompts}: the first {settings.limit} of {len(rows)} prompts (--limit)", flush=True)
        rows = rows[: settings.limit]
    sampling = Sampling(settings.temperature, settings.top_p, settings.top_k, settings.seed, settings.max_tokens)
    facts: dict[str, Any] = {"model": shown(model), "identity": source_identity(model), "backend": settings.backend}
    facts |= {"sampling": sampling.to_json(), "tasks": settings.tasks, "limit": settings.limit, "repeats": settings.repeats}
    facts |= {"prompts": file_sha256(settings.prompts) if settings.prompts else None, "grader": GRADER_VERSION}
    facts |= {"chunk": settings.chunk, "format": DATA_FORMAT}
    log = SampleLog(out / "samples.jsonl", facts, settled=False)
    started = time.monotonic()
    backend = make_backend(settings, model)
    facts |= getattr(backend, "describe", dict)()  # what only a started engine can tell
    log.settle(facts)
    prompts = task_prompts(benchmarks, settings.limit, backend)
    prompts += file_prompts(settings.prompts.name, rows, backend) if settings.prompts else []
    prompts = repeated(with_ids(prompts, backend, settings.max_tokens), settings.repeats)
    check_log(log, prompts)
    tokens = generate(backend, prompts, sampling, log, settings.chunk)
    samples = [log.done[prompt.source, prompt.id, 0] for prompt in prompts]
    chosen = kept(samples, settings.finished_only, settings.correct_only)
    if not chosen:
        raise UserError(f"{out}: {none_kept(samples, settings)}")
    # a GGUF's own tokenizer is its server's, which tells no vocabulary
    vocabulary = tokenizer_sha256(backend.tokenizer) if hasattr(backend.tokenizer, "get_vocab") else None
    choice = {"finished_only": settings.finished_only, "correct_only": settings.correct_only}
    facts |= {"tokenizer_sha256": vocabulary}
    cost = {"servers": backend.tally()} if isinstance(backend, OpenAIServers) else {}
    manifest = write_rollouts(out, samples, chosen, facts, choice, time.monotonic() - started, tokens, **cost)
    made, left = manifest["all"], manifest["kept"]
    empty = sum(not row["text"] for row in samples)
    print(f"{made['samples']} rollouts, {made['finished']} finished, {empty} empty, {made['correct']} of {made['graded']} "
          f"right; kept {left['samples']} with {left['tokens']:,} tokens in {out}", flush=True)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Generation):
    model: Path = setting(help="the quantized student: a checkpoint, or a GGUF file")
    out: Path = setting(help="directory of the rollouts")


def main() -> None:
    settings, _ = parse_settings(Settings, __doc__)
    make_rollouts(settings, settings.model, settings.out)


if __name__ == "__main__":
    run_cli(main)
