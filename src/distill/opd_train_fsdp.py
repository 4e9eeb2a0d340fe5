"""Phase C: train the adapters so that the student predicts like the teacher on the rollouts.

    python src/distill/opd_train_fsdp.py --student work/student --teacher models/razor-tiny --rollouts work/rollouts \
        --scores work/scores --out work/adapter --steps 100 [--rank 16 --mode lora --trajectories student --lr 0.01]
    torchrun --nproc_per_node 4 src/distill/opd_train_fsdp.py ...          (FSDP2; the same result within rounding)

Every step takes --rows rollouts; a process works on --micro-rows of them at once. The state is saved in OUT/state every
--save-every steps; the same command goes on from there, with any number of processes, on a CPU to the same bytes. A loss
that is not finite stops the run with the last good state kept. Ends with OUT/adapter.safetensors and adapter.json, which
merge_adapter bakes.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint, source_identity
from console import UserError, read_json, run_cli
from fsdp_setup import end_world, from_each, losing_peers, start_world
from hf_model import load_tokenizer
from moe_lora import adapters_of, trainable
from opd_data import (
    ADAPTER_JSON,
    ScoredRollouts,
    Texts,
    TrainSettings,
    check_belongs,
    members,
    model_identity,
    named,
    read_rollouts,
    same_model,
    tokenizer_sha256,
)
from opd_student import build_student, check_adapters
from opd_trainer import Trainer, start_from, write_adapter
from recipe import read_recipe
from settings import parse_settings, setting


@dataclass(frozen=True, kw_only=True)
class Settings(TrainSettings):
    student: Path  # a checkpoint of quant_save
    teacher: Path
    rollouts: Path  # the outputs of opd_gen and opd_score; in a mixture of the teacher's texts
    scores: Path
    own_rollouts: Path | None = setting(None, "of a mixture: the student's texts")
    own_scores: Path | None = setting(None, "their scores")
    out: Path


def check_start(directory: Path, student: dict[str, str], teacher: dict[str, str]) -> None:
    """Raise :class:`UserError` unless an adapter to start from is of these two models: its steps are those of their grid."""
    described = members(read_json(directory / ADAPTER_JSON), ("student", "teacher"), directory / ADAPTER_JSON, "train it again")
    for role, own in (("student", student), ("teacher", teacher)):
        if not same_model(described[role], own):
            raise UserError(f"{directory}: an adapter for another {role} ({named(described[role])})")


def load_data(settings: Settings) -> tuple[dict[str, ScoredRollouts], dict[str, Any]]:
    """The scores by whose text they are of, checked against rollouts, tokenizer and their own digests; and what the adapter's
    JSON says of them, of the student's texts in a mixture under `own`."""
    tokenizer, teacher = load_tokenizer(settings.student), source_identity(settings.teacher)
    if {bool(settings.own_rollouts), bool(settings.own_scores)} != {settings.trajectories == "mixture"}:
        raise UserError("--own-rollouts and --own-scores are the student's texts of --trajectories mixture: give all or none")
    found, facts = {}, []
    places = [(settings.rollouts, settings.scores), (settings.own_rollouts, settings.own_scores)]
    for whose, (rollouts, directory) in zip(settings.losses, places, strict=False):
        _, manifest = read_rollouts(rollouts)
        scores = ScoredRollouts(directory)
        check_belongs(scores, manifest, tokenizer)
        if whose == "student" and manifest["settings"].get("identity") == teacher:
            raise UserError(f"{rollouts}: are the teacher's own texts; give --trajectories (TRAJECTORIES) teacher")
        if len(scores) < settings.rows:
            raise UserError(f"--rows {settings.rows}: there are only {len(scores)} rollouts in {directory}")
        own = {key: scores.index[key] for key in ("rollouts_sha256", "k", "temperature")}
        facts.append(own | {"scores_sha256": scores.check_bytes(), "tokenizer_sha256": tokenizer_sha256(tokenizer)})
        found[whose] = scores
    for key in ("k", "temperature"):
        if facts[0][key] != facts[-1][key]:
            raise UserError(f"{settings.own_scores}: {key} {facts[-1][key]}, in {settings.scores} {facts[0][key]}; score again")
    return found, facts[0] | ({"own": facts[1]} if len(facts) > 1 else {})


def train(settings: Settings) -> None:
    """The whole phase, on one process of the world."""
    world = start_world()
    if settings.rows % (settings.micro_rows * world.size):
        parts = f"--micro-rows {settings.micro_rows} x {world.size} processes"
        raise UserError(f"--rows {settings.rows} is no multiple of {parts}")
    check_adapters(Checkpoint(settings.student), Checkpoint(settings.teacher), read_recipe(settings.student), settings)
    scores, data = load_data(settings)
    kinds = list(settings.losses.values())
    settings.out.mkdir(parents=True, exist_ok=True)
    models = {"student": settings.student, "teacher": settings.teacher}
    with ThreadPoolExecutor(2, "digest") as pool:  # of large checkpoints digests take as long as building the student
        digests = {path: pool.submit(model_identity, path) for path in set(models.values()) if world.first}

        def identities_() -> dict[str, dict[str, str]]:
            """What the models are, on every process; only the first has digests to wait for."""
            return from_each({role: digests[path].result() for role, path in models.items() if world.first}, world)[0]

        if settings.init is not None:
            check_start(settings.init, *identities_().values())
        student = build_student(
            settings.student, settings.teacher, settings, world, (kinds[0], kinds[-1]), data["temperature"], settings.recompute
        )
        identities = identities_()
    for part in scores.values():
        if not same_model(part.index["teacher"], identities["teacher"]):
            own, other = (named(identity) for identity in (identities["teacher"], part.index["teacher"]))
            raise UserError(f"{part.directory}: scored by another teacher ({other}) than {settings.teacher} ({own})")
    if settings.init is not None:
        data["init_sha256"] = start_from(trainable(student), settings.init)
    facts = {**identities, "adapter": settings.adapter(), "training": settings.training(), "data": data}
    trainer = Trainer(student, settings, world, settings.out, facts)
    if world.first:
        count = sum(parameter.numel() for parameter in trainer.parameters.values())  # of the whole, where sharded
        print(f"{len(adapters_of(student))} adapters, {count:,} trained parameters on {world.size} x {world.device.type}; "
              f"from step {trainer.step} of {settings.steps}", flush=True)  # fmt: skip
    trainer.run(Texts(scores.get("teacher"), scores.get("student")))
    write_adapter(trainer, identities, data)
    end_world(world)


def main() -> None:
    settings, _ = parse_settings(Settings, __doc__)
    with losing_peers():
        train(settings)


if __name__ == "__main__":
    run_cli(main)
