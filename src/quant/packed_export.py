"""A quantized checkpoint as codes of its own bits for vLLM and transformers, and back, bit for bit (docs/PACKED.md).

    python src/quant/packed_export.py --model work/w3 --out work/w3-packed [--result results/quantize/T.json --tag T]
    python src/quant/packed_export.py --unpack work/w3-packed --out work/w3-again
    python src/quant/packed_export.py --check work/w3-packed --model work/w3
    python src/quant/packed_export.py --sizes models/Qwen3.5-122B-A10B/config.json [--expert-bits 3 --linear-bits 4]

The first packs what quant_save wrote (`quant_save --packed` does without the BF16 in between, and rounds nothing that stays in
it), checks every tensor and prints the size. --sizes counts bytes from a config alone. Everything streams; a killed run goes
on.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import PACKED, Checkpoint, read_manifest
from console import UserError, progress, read_object, run_cli, write_json
from devices import OneBehind, one_ahead
from families import BOTH_ENDS, FAMILIES, Role, family_of, role_in_block, roles_of, text_config
from packed_format import PackedWriter, PackingSettings, describe, plan_container, summary
from plans import CHUNK_BYTES, RecordSettings, ShardSettings, plan_jobs, sidecars
from recipe import RECIPE_FILE, Job, Recipe, read_recipe
from records import describe_model, write_result
from run_dir import check_output, staged_directory
from safetensors_file import CheckpointWriter, TensorInfo
from settings import parse_settings, part, same, setting
from size_model import Shape, mtp_plan


def copy_tensors(checkpoint: Checkpoint, writer: CheckpointWriter | PackedWriter, label: str) -> None:
    """Read, encode and write every tensor in chunks; the next is read and the last one written meanwhile."""
    total = sum(info.bytes for info in checkpoint.tensors.values())

    def chunks() -> Iterator[tuple[str, Tensor]]:
        for name, info in checkpoint.tensors.items():
            if writer.is_done(name):
                bar.update(info.bytes)
                continue
            for _, chunk in checkpoint.read_chunks(name, CHUNK_BYTES):
                yield name, chunk

    with progress(total, label, "B", True) as bar, one_ahead(chunks()) as ahead, OneBehind() as later:
        for name, chunk in ahead:
            later(writer.append, name, writer.encode(name, chunk))
            bar.update(chunk.nbytes)


def settings_of(checkpoint: Checkpoint, shard_bytes: int) -> dict[str, Any]:
    """What must be the same for an unfinished run to go on."""
    return {"source": checkpoint.identity, "shard_bytes": shard_bytes}


def pack(
    model: Path, out: Path, force: bool = False, shard_bytes: int = 4 << 30, experts: bool = True, least: int = 2
) -> dict[str, Any]:
    """Write the packed form of the checkpoint that quant_save wrote to ``model``; returns recipe.json's report with the
    container's summary. Raises :class:`UserError` on a tensor whose values are not on the recipe's grid."""
    checkpoint, out = Checkpoint(model), out.resolve()
    jobs, made = plan_jobs(checkpoint, read_recipe(model)), read_object(model / RECIPE_FILE, "report")
    container = plan_container(jobs, read_recipe(model), experts, least, checkpoint.family.packed_ends)
    extras = sidecars(model)
    facts = summary(jobs, container)
    check_output(model, out, force, facts["bytes"] + sum(file.stat().st_size for file in extras))
    print(f"{model} -> {out}\n{describe(facts)}", flush=True)
    plan = [(job.name, job.info.dtype, job.info.shape) for job in jobs]
    shards = [sum(info.file == file for info in checkpoint.tensors.values()) for file in checkpoint.files]
    settings = settings_of(checkpoint, shard_bytes) | {"experts": experts, "least": least}
    with staged_directory(out, force, settings) as partial:
        for file in extras:
            shutil.copyfile(file, partial / file.name)
        with PackedWriter(partial, plan, container, shard_bytes, shards=shards) as writer:
            copy_tensors(checkpoint, writer, "pack")
        report = made["report"] | {"container": facts}
        write_json(partial / RECIPE_FILE, made | {"report": report})
    return report


def unpack(packed: Path, out: Path, force: bool = False) -> None:
    """Write the dequantized checkpoint that ``packed`` holds: the files that it was packed from, byte for byte."""
    checkpoint, out = Checkpoint(packed), out.resolve()
    if not checkpoint.is_packed:
        raise UserError(f"{packed}: is not packed (no {PACKED}); there is nothing to unpack")
    manifest, made = read_manifest(packed), read_object(packed / RECIPE_FILE, "report")
    extras = [file for file in sidecars(packed, unpacking=True) if file.name not in (PACKED, "config.json")]
    needed = sum(info.bytes for info in checkpoint.tensors.values()) + sum(file.stat().st_size for file in extras)
    check_output(packed, out, force, needed)
    plan = [(name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()]
    starts = [sum(manifest["shards"][:place]) for place in range(len(manifest["shards"]))]
    with staged_directory(out, force, settings_of(checkpoint, 0)) as partial:
        for file in extras:
            shutil.copyfile(file, partial / file.name)
        (partial / "config.json").write_text(manifest["config"], encoding="utf-8")
        with CheckpointWriter(partial, plan, needed, {plan[start][0] for start in starts}) as writer:
            copy_tensors(checkpoint, writer, "unpack")
        made["report"].pop("container", None)
        write_json(partial / RECIPE_FILE, made)


def check(packed: Path, model: Path) -> dict[str, int]:
    """Compare two checkpoints tensor by tensor, bit for bit: counts of tensors, of those that are equal, and of values that
    differ, those apart that are zeros of other sign."""
    one, other = Checkpoint(packed), Checkpoint(model)
    if list(one.tensors) != list(other.tensors):
        lost = one.tensors.keys() ^ other.tensors.keys()
        what = f"only one of the two has {min(lost)}" if lost else "their tensors lie in another order"
        raise UserError(f"{packed} and {model}: {what}")
    found = {"tensors": len(one.tensors), "bit_equal": 0, "different_values": 0, "zeros_of_other_sign": 0}
    with progress(sum(info.bytes for info in one.tensors.values()), "check", "B", True) as bar:
        for name, info in one.tensors.items():
            different = signs = 0
            if (info.dtype, info.shape) != (other.info(name).dtype, other.info(name).shape):
                found["different_values"] += info.numel
                continue
            for (_, a), (_, b) in zip(one.read_chunks(name, CHUNK_BYTES), other.read_chunks(name, CHUNK_BYTES), strict=True):
                same = a == b
                different += int((~same).sum())
                if a.is_floating_point():
                    signs += int(((torch.signbit(a) != torch.signbit(b)) & same).sum())
                bar.update(a.nbytes)
            found["different_values"] += different
            found["zeros_of_other_sign"] += signs
            found["bit_equal"] += not different and not signs
    return found


def mtp_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of multi-token prediction that a Qwen3.5 of this config.json has on disk, which transformers does not load;
    none of another model."""
    if not str(config.get("model_type")).startswith("qwen3_5_moe"):
        return {}
    text = text_config(config)
    shape = Shape(
        hidden=text["hidden_size"], experts=text["num_experts"], inner=text["moe_intermediate_size"],
        shared_inner=text["shared_expert_intermediate_size"], heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"], head_dim=text["head_dim"],
    )  # fmt: skip
    return {name: size for name, _, size in mtp_plan(shape, fused=False)}


ENDS = {"as vLLM reads them": None, "in BF16": (), "packed": BOTH_ENDS}


def sizes(config_file: Path, recipe: Recipe) -> dict[str, Any]:
    """The container's summary for a model of this config.json, from the shapes that transformers gives its parameters; no
    weights are read or made. A fraction of expert_bits is a share of the layers: packed codes have one width in a layer.
    ``code_bytes``: of the quantized weights without their scales. ``bytes_of``: the container's bytes by what embedding and
    head are, each [without multi-token prediction, with it packed, with it in BF16]."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(str(config_file), local_files_only=True)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with init_empty_weights():
        model = auto.from_config(config, dtype=torch.bfloat16)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}  # tied ones once
    text = config.get_text_config()
    if recipe.expert_bits != (low := int(recipe.expert_bits)):
        count = round((low + 1 - recipe.expert_bits) * text.num_hidden_layers)
        overrides = tuple((f"model.*layers.{layer}.*.experts.*", low) for layer in range(count))
        recipe = dataclasses.replace(recipe, expert_bits=low + 1, overrides=overrides)
    kinds = {"model_type": config.model_type, **text.to_dict()}

    def jobs_of(shapes: Mapping[str, tuple[int, ...]], packed: bool) -> list[Job]:
        roles, jobs = roles_of(shapes, kinds), []
        for name, shape in shapes.items():
            info = TensorInfo(torch.bfloat16, shape, Path(), 0, 2 * math.prod(shape))
            inner = role_in_block(name, config.model_type) if roles[name] is Role.MTP else None
            jobs.append(Job(name, info, roles[name], recipe.bits_of(name, roles[name], inner) if packed else None))
        return jobs

    jobs, predictor = jobs_of(shapes, True), mtp_shapes(read_object(config_file))
    takes = FAMILIES[family_of(config.model_type)].packed_ends
    heads: list[list[Job]] = [[], jobs_of(predictor, True), jobs_of(predictor, False)] if predictor else [[]]

    def container(more: list[Job], ends: Collection[Role]) -> dict[str, Any]:
        return summary(jobs + more, plan_container(jobs + more, recipe, ends=ends))

    table = {
        label: [container(more, takes if ends is None else ends)["bytes"] for more in heads] for label, ends in ENDS.items()
    }
    return container([], takes) | {
        "parameters": sum(job.info.numel for job in jobs), "dequantized_bytes": sum(j.info.bytes for j in jobs),
        "code_bytes": math.ceil(sum(job.info.numel * job.bits for job in jobs if job.bits) / 8), "bytes_of": table,
    }  # fmt: skip


def show_sizes(facts: dict[str, Any]) -> str:
    lines = [
        f"{facts['parameters']:,} parameters, {facts['dequantized_bytes'] / 1e9:,.2f} GB in BF16; codes without scales "
        f"{facts['code_bytes'] / 1e9:,.2f} GB",
        describe(facts),
        f"{'GB with embedding, head':<26}{'without mtp':>13}" + f"{'mtp packed':>13}{'mtp in BF16':>13}" * (
            len(facts["bytes_of"]["packed"]) > 1),
    ]  # fmt: skip
    for label, row in facts["bytes_of"].items():
        lines.append(f"{label:<26}" + "".join(f"{size / 1e9:>13,.2f}" for size in row))
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """--model and --out pack, --unpack and --out unpack, --check and --model compare, --sizes counts."""

    model: Path | None = setting(None, "a checkpoint that quant_save wrote")
    out: Path | None = setting(None, "directory to make")
    unpack: Path | None = setting(None, "a packed checkpoint to write as BF16 again")
    check: Path | None = setting(None, "a packed checkpoint to compare with --model, bit for bit")
    sizes: Path | None = setting(None, "config.json of a model whose packed size to count, by the recipe of the next three")
    expert_bits: float = same(Recipe, "expert_bits", 3)
    linear_bits: int = same(Recipe, "linear_bits", 4)
    group: int = same(Recipe, "group")
    keep_experts: bool = setting(
        False, "leave the routed experts in BF16: vLLM on a CPU without AMX has no kernel for packed ones"
    )
    packing: PackingSettings = part(PackingSettings)
    shards: ShardSettings = part(ShardSettings)
    record: RecordSettings = part(RecordSettings)

    def __post_init__(self) -> None:
        given = sorted(name for name in ("model", "out", "unpack", "check", "sizes") if getattr(self, name))
        if given not in (["model", "out"], ["out", "unpack"], ["check", "model"], ["sizes"]):
            raise UserError("give --model and --out, --unpack and --out, --check and --model, or --sizes (see --help)")
        if self.record.tag and given != ["model", "out"]:
            raise UserError("--result goes with --model and --out")


def show_check(found: dict[str, int]) -> str:
    text = f"{found['bit_equal']:,} of {found['tensors']:,} tensors equal bit for bit"
    if found["different_values"] or found["zeros_of_other_sign"]:
        text += f"; {found['different_values']:,} values differ, {found['zeros_of_other_sign']:,} zeros have another sign"
    return text


def pack_and_check(model: Path, out: Path, settings: ExportSettings) -> int:
    """Pack, compare with what was packed, record; 1 if a value differs."""
    result, started = settings.record.file("quantize"), time.time()
    report = pack(
        model, out, settings.record.force, settings.shards.bytes, not settings.keep_experts, settings.packing.packed_bits
    )
    found = check(out, model)
    output = describe_model(out)
    print(f"{show_check(found)}\nwrote {out}: {output['bytes'] / 1e6:,.2f} MB of weights, "
          f"{report['output_bytes'] / 1e6:,.2f} MB dequantized, in {time.time() - started:.1f} s", flush=True)  # fmt: skip
    if found["different_values"]:
        return 1
    if result:
        write_result(
            result, kind="quantize", tag=settings.record.tag, started=started, model=describe_model(model),
            recipe=read_recipe(out).to_json(), metrics=report | {"check": found}, extra={"output": output},
        )  # fmt: skip
    return 0


def main() -> int:
    settings, _ = parse_settings(ExportSettings, __doc__)
    if settings.sizes:
        facts = sizes(settings.sizes, Recipe(settings.expert_bits, settings.linear_bits, settings.group, 16))
        print(show_sizes(facts))
    elif settings.unpack and settings.out:
        unpack(settings.unpack, settings.out, settings.record.force)
        print(f"wrote {settings.out}", flush=True)
    elif settings.check and settings.model:
        found = check(settings.check, settings.model)
        print(show_check(found), flush=True)
        return int(found["different_values"] > 0)
    elif settings.model and settings.out:
        return pack_and_check(settings.model, settings.out, settings)
    return 0


if __name__ == "__main__":
    run_cli(main)
