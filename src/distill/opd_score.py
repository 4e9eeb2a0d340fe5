"""Phase B: the teacher's top-k log-probabilities for every completion token of the rollouts.

    python src/distill/opd_score.py --teacher models/razor-tiny --rollouts work/rollouts --out work/scores
        [--k 32] [--score-temperature 1.0] [--score-batch 16] [--shard-rollouts 512] [--score-prompts]

The head's product is taken over pieces of the vocabulary, so that no logits of the whole vocabulary are held. The mass of all
other tokens is kept as one number. The temperature divides the logits and is part of the scores. The output takes its name only
when it is complete; a killed run goes on with the same command. Format: docs/OPD_INTEGRATION.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint import Checkpoint
from console import UserError, atomic_path, file_sha256, progress, run_cli, write_json
from hf_model import load_model, load_tokenizer
from opd_data import (
    FORMAT,
    INDEX,
    Scoring,
    batch_option,
    encode_rollout,
    model_identity,
    read_rollouts,
    tokenizer_sha256,
    write_phase,
)
from opd_losses import TopK, top_k_of
from run_dir import staged_directory
from settings import parse_settings


def load_teacher(path: Path) -> torch.nn.Module:
    """The teacher for inference; spread over all GPUs where one cannot hold it."""
    count = torch.cuda.device_count()
    if count > 1 and Checkpoint(path).bytes > 0.8 * torch.cuda.get_device_properties(0).total_memory:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            str(path), dtype=torch.bfloat16, device_map="auto", local_files_only=True
        ).eval()
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
    """Score the kept rollouts into ``out`` by what ``load`` gives. A killed run resumes to the same bytes."""
    if out.exists():
        raise UserError(f"{out}: exists; remove it to score again")
    rows, manifest = read_rollouts(rollouts)
    identity, tokenizer = model_identity(teacher), load_tokenizer(teacher)
    started = time.monotonic()
    encoded = [encode_rollout(tokenizer, row) for row in rows]
    lengths = [len(ids) - prompt for ids, prompt in encoded]
    if settings.score_prompts:  # their tokens count too, from the second on
        encoded = [(ids, 1) for ids, _ in encoded]
    vocabulary = Checkpoint(teacher).config.get("vocab_size") or Checkpoint(teacher).config["text_config"]["vocab_size"]
    if settings.k > vocabulary:
        raise UserError(f"--k {settings.k} is outside 1..{vocabulary}, the teacher's vocabulary")
    order = sorted(range(len(rows)), key=lambda i: (len(encoded[i][0]), i))
    size = settings.shard_rollouts
    shards = [order[start : start + size] for start in range(0, len(order), size)]
    own = {"format": FORMAT, "rollouts_sha256": manifest["sha256"], "tokenizer_sha256": tokenizer_sha256(tokenizer)}
    own |= {"teacher": identity, "k": settings.k, "temperature": settings.score_temperature}
    model, listed = None, []
    job = own | {"shard_rollouts": size, "batch": settings.score_batch}
    with staged_directory(out.resolve(), False, job) as partial:
        with progress(sum(len(ids) for ids, _ in encoded), "score", "token", True) as bar:
            for number, members in enumerate(shards):
                path = partial / f"scores-{number:05d}.safetensors"
                if not path.exists():
                    model = model or load(teacher)
                    write_shard(path, model, [encoded[i] for i in members], settings)
                listed.append({"file": path.name, "sha256": file_sha256(path), "rollouts": [rows[i]["id"] for i in members]})
                bar.update(sum(len(encoded[i][0]) for i in members))
        tokens = sum(len(ids) for ids, _ in encoded)
        index = own | {"tokens": tokens, "positions": tokens - sum(prompt for _, prompt in encoded)}
        # the share of rollouts that the tokenizer does not read as they were generated
        index["retokenized"] = sum(length != row["tokens"] for length, row in zip(lengths, rows, strict=True)) / len(rows)
        write_json(partial / INDEX, index | {"shards": listed})
        write_phase(partial, "opd_score", time.monotonic() - started, tokens)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{len(rows)} rollouts, {index['positions']:,} positions, {size / 1e6:.2f} MB in {out}", flush=True)


def write_shard(path: Path, model: torch.nn.Module, rows: Sequence[tuple[list[int], int]], settings: Scoring) -> None:
    scores: list[TopK] = []
    for start in range(0, len(rows), settings.score_batch):
        scores += score_batch(model, rows[start : start + settings.score_batch], settings.k, settings.score_temperature)
    with atomic_path(path) as temporary:
        save_file(shard_tensors(rows, scores), temporary)


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
