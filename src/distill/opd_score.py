"""Phase B: the teacher's top-k log-probabilities for every completion token of the rollouts, as it was generated.

    python src/distill/opd_score.py --teacher models/razor-tiny --rollouts work/rollouts --out work/scores
        [--k 32] [--score-temperature 1.0] [--score-batch 16] [--shard-rollouts 512] [--score-prompts]

The head's product is taken over pieces of the vocabulary, so that no logits of the whole vocabulary are held. The mass of all
other tokens is kept as one number. The temperature divides the logits and is part of the scores. The output takes its name only
when it is complete; a killed run goes on with the same command. Where several processes run it, on any machines that see OUT,
each scores shards that are missing. Format: docs/OPD_INTEGRATION.md.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, file_sha256, progress, run_cli, write_json
from families import text_config
from hf_model import all_finite, first_nonfinite, load_model, load_tokenizer, load_weights, text_ids
from opd_data import (
    DATA_FORMAT,
    INDEX,
    ScoredRollouts,
    Scoring,
    batch_option,
    model_identity,
    read_rollouts,
    rollout_ids,
    tokenizer_sha256,
    write_phase,
)
from opd_losses import TopK, top_k_of
from run_dir import partial_of, share
from safetensors_file import save_tensors
from settings import parse_settings


def load_teacher(path: Path) -> torch.nn.Module:
    """The teacher for inference; spread over all GPUs where one cannot hold it."""
    count = torch.cuda.device_count()
    if count > 1 and Checkpoint(path).bytes > 0.8 * torch.cuda.get_device_properties(0).total_memory:
        from transformers import AutoModelForCausalLM

        return load_weights(AutoModelForCausalLM, path, torch.bfloat16, "auto").eval()
    return load_model(path)


@torch.inference_mode()
def score_batch(model: torch.nn.Module, rows: Sequence[tuple[list[int], int]], k: int, temperature: float) -> list[TopK]:
    """The teacher's view of each completion token of (ids, prompt length) rows, one :class:`TopK` a row on the CPU."""
    device = model.get_input_embeddings().weight.device
    width = max(len(ids) for ids, _ in rows)
    padded, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, (ids, _) in enumerate(rows):
        padded[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
    hidden = model.get_decoder()(input_ids=padded.to(device), attention_mask=mask.to(device), use_cache=False)[0]
    head = model.get_output_embeddings().weight
    flat = torch.cat([hidden[i, prompt - 1 : len(ids) - 1] for i, (ids, prompt) in enumerate(rows)]).to(head.device)
    pieces = [top_k_of(piece, head, k, temperature) for piece in flat.split(4096)]
    whole = TopK(*(torch.cat(parts).cpu() for parts in zip(*pieces, strict=True)))
    sizes = [len(ids) - prompt for ids, prompt in rows]
    return [TopK(*parts) for parts in zip(*(part.split(sizes) for part in whole), strict=True)]


def shard_tensors(rows: Sequence[tuple[list[int], int]], scores: Sequence[TopK]) -> dict[str, Tensor]:
    """The tensors of one shard, rollouts one after the other."""
    starts = torch.tensor([0] + [len(ids) for ids, _ in rows]).cumsum(0)
    top, logp, tail = (torch.cat(parts) for parts in zip(*scores, strict=True))
    return {
        "ids": torch.tensor([token for ids, _ in rows for token in ids], dtype=torch.int32),
        "starts": starts,
        "prompts": torch.tensor([prompt for _, prompt in rows], dtype=torch.int32),
        "top": top.int(),
        "logp": logp.contiguous(),
        "tail": tail.contiguous(),
    }


def score_rollouts(
    settings: Scoring, teacher: Path, rollouts: Path, out: Path, load: Callable[[Path], torch.nn.Module] = load_teacher
) -> None:
    """Score the kept rollouts into ``out`` by what ``load`` gives, alone or with others that do the same (run_dir.share)."""
    rows, manifest = read_rollouts(rollouts)
    identity, tokenizer = model_identity(teacher), load_tokenizer(teacher)
    started = time.monotonic()
    encoded, names = [rollout_ids(row) for row in rows], [f"{row['benchmark']} {row['id']}" for row in rows]
    check_tokens(rows, manifest["settings"].get("tokenizer_sha256"), tokenizer, rollouts)
    text = text_config(Checkpoint(teacher).config)
    vocabulary, context = text["vocab_size"], text.get("max_position_embeddings") or math.inf
    if settings.k > vocabulary:
        raise UserError(f"--k {settings.k} is outside 1..{vocabulary}, the teacher's vocabulary")
    for name, (ids, _) in zip(names, encoded, strict=True):
        if max(ids) >= vocabulary or len(ids) > context:
            limits = f"a vocabulary of {vocabulary} and a context of {context}"
            raise UserError(f"{rollouts}: {name}: {len(ids)} tokens up to id {max(ids)}; {teacher} has {limits}")
    if settings.score_prompts:  # their tokens count too, from the second on
        encoded = [(ids, 1) for ids, _ in encoded]
    order = sorted(range(len(rows)), key=lambda i: (len(encoded[i][0]), i))
    size = settings.shard_rollouts
    shards = [order[start : start + size] for start in range(0, len(order), size)]
    own = {"format": DATA_FORMAT, "rollouts_sha256": manifest["sha256"], "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    own |= {"teacher": identity} | settings.scores()
    if out.exists():
        index = ScoredRollouts(out).index
        if changed := sorted(key for key in own if index.get(key) != own[key]):
            raise UserError(f"{out}: scores of something else ({', '.join(changed)} differ); remove it to score again")
        print(f"{out}: complete, nothing is left to score", flush=True)
        return
    names_of = {f"scores-{number:05d}.safetensors": members for number, members in enumerate(shards)}
    model, scored = None, 0

    def make(path: Path) -> None:
        nonlocal model, scored
        model, members = model or load(teacher), names_of[path.name]
        write_shard(path, model, [encoded[i] for i in members], [names[i] for i in members], settings)
        done = sum(len(encoded[i][0]) for i in members)
        scored += done
        bar.update(done)

    def finish(partial: Path) -> None:
        tokens = sum(len(ids) for ids, _ in encoded)
        listed = [
            {"file": name, "sha256": file_sha256(partial / name), "rollouts": [rows[i]["id"] for i in members]}
            for name, members in names_of.items()
        ]
        index = own | {"tokens": tokens, "positions": tokens - sum(prompt for _, prompt in encoded)}
        index["retokenized"] = sum(read_otherwise(tokenizer, row) for row in rows) / len(rows)
        write_json(partial / INDEX, index | {"shards": listed})
        write_phase(partial, "opd_score", time.monotonic() - started, scored)

    out = out.resolve()
    there = sum(len(encoded[i][0]) for name, part in names_of.items() if (partial_of(out) / name).exists() for i in part)
    with progress(sum(len(ids) for ids, _ in encoded), "score", "token", True, there) as bar:
        share(out, own | {"shard_rollouts": size, "batch": settings.score_batch}, list(names_of), make, finish)
    index = ScoredRollouts(out).index
    size = sum((out / name).stat().st_size for name in names_of)
    print(f"{len(rows)} rollouts, {index['positions']:,} positions, {size / 1e6:.2f} MB in {out}; scored as generated "
          f"(the texts of {100 * index['retokenized']:.1f} % of them would be tokenized otherwise)", flush=True)  # fmt: skip


def write_shard(
    path: Path, model: torch.nn.Module, rows: Sequence[tuple[list[int], int]], names: Sequence[str], settings: Scoring
) -> None:
    """One file of scores; a score that is not finite is a :class:`UserError` that names its rollout and where it came from."""
    scores: list[TopK] = []
    for start in range(0, len(rows), settings.score_batch):
        part = rows[start : start + settings.score_batch]
        found = score_batch(model, part, settings.k, settings.score_temperature)
        for (ids, _), name, own in zip(part, names[start:], found, strict=False):
            if not all_finite(own):
                device = model.get_input_embeddings().weight.device
                where = first_nonfinite(model, input_ids=torch.tensor([ids], device=device), use_cache=False)
                raise UserError(f"{name}: the teacher's scores are not finite; {model.name_or_path}: {where}")
        scores += found
    save_tensors(path, shard_tensors(rows, scores))


def read_otherwise(tokenizer: Any, row: dict[str, Any]) -> bool:
    """Whether the tokenizer has other ids for the texts of a rollout than those that were read and generated."""
    ids = row["ids"][:-1] if row["finish_reason"] == "stop" else row["ids"]
    return text_ids(tokenizer, row["prompt"]) != row["prompt_ids"] or text_ids(tokenizer, row["text"]) != ids


def check_tokens(rows: Sequence[dict[str, Any]], vocabulary: str | None, tokenizer: Any, rollouts: Path) -> None:
    """Raise :class:`UserError` unless the teacher's tokenizer gives the ids of the rollouts the meaning that they had. Where
    what generated them told no ``vocabulary`` (a GGUF's server), they must decode to the rollouts' texts."""
    mend = "student and teacher need the same tokenizer"
    if vocabulary not in (None, tokenizer_sha256(tokenizer)):
        raise UserError(f"{rollouts}: generated with another tokenizer than the teacher's; {mend}")
    for row in rows if vocabulary is None else ():
        ids = row["ids"][:-1] if row["finish_reason"] == "stop" else row["ids"]
        decoded = [tokenizer.decode(part, skip_special_tokens=False) for part in (row["prompt_ids"], ids)]
        # a server may drop a leading space, and write bytes that are no character otherwise
        if [re.sub("\ufffd+", "\ufffd", text.lstrip()) for text in decoded] != [
            re.sub("\ufffd+", "\ufffd", row[key].lstrip()) for key in ("prompt", "text")
        ]:
            raise UserError(
                f"{rollouts}: {row['benchmark']} {row['id']}: its ids are other text in the teacher's tokenizer; {mend}"
            )


@dataclass(frozen=True, kw_only=True)
class Settings(Scoring):
    teacher: Path
    rollouts: Path  # the output of opd_gen
    out: Path


def main() -> None:
    settings, _ = parse_settings(Settings, __doc__, batch_option)
    score_rollouts(settings, settings.teacher, settings.rollouts, settings.out)


if __name__ == "__main__":
    run_cli(main)
