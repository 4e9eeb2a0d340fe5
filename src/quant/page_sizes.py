"""The tables of what models weigh and cost, from their shapes: docs/MOE_PIPELINE.md and docs/COST_MODEL.md.

    python src/quant/page_sizes.py --write                             # without: prints the tables
    python src/quant/page_sizes.py --skeleton work/skeleton-122b       # a checkpoint of the shape that takes no disk

Sizes are those of the plans that quantize.sh and pack_gguf.sh make of a checkpoint, so they change with the recipes in
configs/. Seconds and memory are those measured at the 122B's shape (bench.sh h100), carried over by size_model; a figure whose
record is not there is a dash. --skeleton writes a checkpoint of zeros in sparse files: `MODEL=DIR bash pipelines/quantize.sh
--dry-run` plans on it as on the real one.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint import Checkpoint
from console import UserError, atomic_path, read_json, run_cli
from families import Role, roles_of, text_config
from gguf_layout import read_patterns
from pack_plan import Pack, TypeSettings, plan_pack, report
from plans import plan_jobs, summarize
from recipe import Recipe
from records import REPO
from settings import read_part
from size_model import (
    SHAPES,
    Shape,
    config_of,
    fit,
    plan_of,
    predict,
    read_records,
    sizes_of,
    state_bytes,
    tensor_shapes,
    write_skeleton,
)

BEGIN, END = "<!-- written by src/quant/page_sizes.py -->", "<!-- end of what is written -->"
# Bytes a second that each place reads weights at: what the vendors print, not what was measured.
BANDWIDTHS = {"H100 SXM, HBM3": 3.35e12, "RTX 4090, GDDR6X": 1.008e12, "12 channels of DDR5-4800": 0.4608e12}
CONTEXTS = (8_192, 65_536, 262_144)
CALIBRATION_TOKENS = 128 * 512
MODELS = {
    "35B": SHAPES["35b"],
    "122B": SHAPES["122b"],
    # Qwen3.5-397B-A17B by its configuration; the sizes of Kimi K2 (61 layers, 384 experts) with Qwen3.5's attention.
    "400B": dataclasses.replace(SHAPES["122b"], layers=60, hidden=4096, experts=512, top_k=10),
    "1T": dataclasses.replace(SHAPES["122b"], layers=61, hidden=7168, experts=384, inner=2048, shared_inner=2048, heads=64),
}


def paragraph(text: str) -> str:
    """A text in lines as the documents have them."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], right: bool = False) -> list[str]:
    """``right``: all columns but the first are aligned to the right."""
    marks = ["---", *["---:" if right else "---"] * (len(head) - 1)]
    return ["| " + " | ".join(map(str, row)) + " |" for row in (head, marks, *rows)]


def published_recipe() -> Recipe:
    """configs/clip_122b.env: experts int3, the rest int4."""
    return read_part(Recipe, REPO / "configs/clip_122b.env")


def published_pack(checkpoint: Checkpoint) -> tuple[Pack, str]:
    """(the plan of configs/gguf_iq3.env for a checkpoint, its base type)."""
    types = read_part(TypeSettings, REPO / "configs/gguf_iq3.env")
    return plan_pack(checkpoint, types.base, read_patterns(REPO / str(types.tensor_types)), "ldlq")[0], types.base_type


# ---------------------------------------------------------------- MOE_PIPELINE.md: one model in each format


def shape_table(checkpoint: Checkpoint) -> list[str]:
    """Parameters by role, their share and their bytes in BF16."""
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    counts: Counter[Role] = Counter()
    for name, role in roles.items():
        counts[role] += checkpoint.tensors[name].numel
    total = counts.total()
    rows = [(f"{role}", f"{n:,}", f"{100 * n / total:.2f} %", f"{2 * n / 1e9:.2f}") for role, n in counts.items()]
    text = total - counts[Role.VISION]
    lines = table(("role", "parameters", "share", "BF16, GB"), [*rows, ("**all**", f"{total:,}", "", f"{2 * total / 1e9:.2f}")])
    return [*lines, "", f"Without the vision tower {text:,} parameters, {2 * text / 1e9:.1f} GB."]


def size_table(checkpoint: Checkpoint) -> tuple[list[str], dict[str, Any]]:
    """Sizes of the two published recipes, from the plans of the builders; also the report of the GGUF's plan."""
    recipe = published_recipe()
    packed = summarize(plan_jobs(checkpoint, recipe), recipe)
    experts = packed.roles[str(Role.ROUTED_EXPERT)]
    codes = experts.parameters * (experts.bits or 16) / 8
    plan, base = published_pack(checkpoint)
    file = report(plan, plan.data_bytes)
    gguf_experts = file["roles"][str(Role.ROUTED_EXPERT)]["bytes"]
    integer = f"int{recipe.expert_bits:g} experts, int{recipe.linear_bits} rest, group {recipe.group}"
    rows = [
        (f"{integer}: codes of the experts alone", f"{codes / 1e9:.1f}", f"{codes / 2**30:.2f}", f"{recipe.expert_bits:.2f}"),
        (f"{integer}: experts with their scales", *sizes(experts.packed_bytes, experts.parameters)),
        (f"{integer}: everything", *sizes(packed.packed_bytes, packed.parameters)),
        (f"GGUF, {base} experts: experts", *sizes(gguf_experts, experts.parameters)),
        (f"GGUF, {base} experts: all but the experts", *sizes(plan.data_bytes - gguf_experts,
                                                              file["parameters"] - experts.parameters)),
        (f"GGUF, {base} experts: the file", *sizes(plan.data_bytes, file["parameters"])),
    ]  # fmt: skip
    note = (
        f"Of the integer recipe's quantized tensors: {packed.weight_bits:.2f} weight bits, {packed.stored_bits:.2f} stored "
        "bits with their 16-bit scales. The GGUF is the text model without its header and without multi-token prediction; the "
        "vision tower is a file of its own."
    )
    return [*table(("what", "GB", "GiB", "bits a weight"), rows), "", paragraph(note)], file


def sizes(size: float, parameters: int) -> tuple[str, str, str]:
    return f"{size / 1e9:.2f}", f"{size / 2**30:.2f}", f"{8 * size / parameters:.2f}"


def memory_table(text: Mapping[str, Any], file: Mapping[str, Any]) -> list[str]:
    """Where the GGUF and its state lie: everything on one card, or the experts in the machine's memory."""
    experts = file["roles"][str(Role.ROUTED_EXPERT)]["bytes"]
    rest = sum(entry["bytes"] for entry in file["roles"].values()) - experts
    a_token, state = state_bytes(text)
    rows = []
    for context in CONTEXTS:
        cache = (context * a_token + state) / 2**30
        rows.append((f"{context:,}", f"{cache:.2f}", f"{(experts + rest) / 2**30 + cache:.1f}", f"{rest / 2**30 + cache:.1f}"))
    head = ("tokens of context", "its state, GiB", "all on the card, GiB", "card with the experts elsewhere, GiB")
    note = (
        f"A token adds {a_token:,} bytes of keys and values; the linear-attention layers hold {state / 1e6:.0f} MB a sequence "
        f"whatever its length. The experts take {experts / 2**30:.1f} GiB of the machine's memory when they are not on the "
        "card. Buffers of the program come on top."
    )
    return [*table(head, rows), "", paragraph(note)]


def speed_table(text: Mapping[str, Any], file: Mapping[str, Any]) -> list[str]:
    """The bound that memory sets on decoding one sequence."""
    roles = file["roles"]
    share = text["num_experts_per_tok"] / text["num_experts"]
    experts = roles[str(Role.ROUTED_EXPERT)]["bytes"] * share
    others = sum(entry["bytes"] for role, entry in roles.items() if role not in (Role.ROUTED_EXPERT, Role.EMBEDDING))
    a_token = experts + others
    rows = [(name, f"{rate / 1e9:,.0f}", f"{rate / a_token:.0f}") for name, rate in BANDWIDTHS.items()]
    note = (
        f"A token reads {a_token / 1e9:.2f} GB: {experts / 1e9:.2f} of its {text['num_experts_per_tok']} experts a layer and "
        f"{others / 1e9:.2f} of everything else but the embedding. The rates are those that the vendors print; a real decoder "
        "reaches a part of this bound."
    )
    return [paragraph(note), "", *table(("weights in", "GB/s", "tokens/s at most, one sequence"), rows)]


def model_tables(config: Mapping[str, Any]) -> str:
    """All of a model's arithmetic as Markdown."""
    text = text_config(config)
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = skeleton_of(config, Path(directory) / "skeleton")
        sized, file = size_table(checkpoint)
        lines = ["### Parameters", "", *shape_table(checkpoint), "", "### Sizes", "", *sized, ""]
    lines += ["### Memory", "", *memory_table(text, file), "", "### Speed that the memory allows", "", *speed_table(text, file)]
    return "\n".join(lines)


def skeleton_of(config: Mapping[str, Any], directory: Path) -> Checkpoint:
    plan = [(name, torch.bfloat16, shape) for name, shape in tensor_shapes(config).items()]
    write_skeleton(directory, config, plan)
    return Checkpoint(directory)


# ---------------------------------------------------------------- COST_MODEL.md: time and memory of several shapes


def bytes_of(shape: Shape) -> tuple[int, int, int]:
    """Bytes if packed at int3 / int4, of the published GGUF's tensors, and of those that decoding a token reads."""
    recipe = published_recipe()
    with tempfile.TemporaryDirectory() as work:
        write_skeleton(Path(work) / "model", config_of(shape), plan_of(shape))
        checkpoint = Checkpoint(Path(work) / "model")
        packed = summarize(plan_jobs(checkpoint, recipe), recipe).packed_bytes
        pack = published_pack(checkpoint)[0]
        used = 0
        for piece in pack.pieces:
            size = pack.bytes_of(piece)
            if piece.role is Role.ROUTED_EXPERT:
                size = size * shape.top_k // shape.experts
            elif piece.role is Role.EMBEDDING:
                size //= piece.shape[0]
            used += size
    return packed, pack.data_bytes, used


def cost_table(records: Mapping[str, Any], tokens: int) -> str:
    constants = fit(records, sizes_of(MODELS["122B"]))
    facts: list[dict[str, Any]] = []
    for shape in MODELS.values():
        sizes, (packed, gguf, used) = sizes_of(shape), bytes_of(shape)
        counted = {"bf16": 2 * sizes.parameters, "packed": packed, "gguf": gguf, "used": used}
        facts.append(dataclasses.asdict(sizes) | counted | predict(shape, sizes, used, constants, tokens))
    rows = [["layers, experts", *(f"{shape.layers}, {shape.experts}" for shape in MODELS.values())]]
    for label, key, scale, decimals in (
        ("parameters, billions", "parameters", 1e9, 1), ("parameters of a layer, billions", "layer", 1e9, 2),
        ("disk: BF16 in, and dequantized out, GB", "bf16", 1e9, 0), ("disk: int3 / int4 packed, GB", "packed", 1e9, 1),
        ("disk: GGUF of the published types, GiB", "gguf", 2**30, 1), ("bytes that a token reads of it, GB", "used", 1e9, 2),
        ("data-free quantization, minutes", "data_free_s", 60, 1), ("GPTQ, minutes", "gptq_s", 60, 0),
        ("LDLQ into the GGUF, minutes", "ldlq_s", 60, 0), ("VRAM of the calibrated pass, GiB", "vram", 2**30, 0),
        ("RAM of the calibrated pass, GiB", "ram", 2**30, 1), ("decode, limit, tokens/s", "limit", 1, 0),
        ("decode, expected, tokens/s", "decode", 1, 0),
    ):  # fmt: skip
        rows.append([label, *("-" if each[key] is None else f"{each[key] / scale:,.{decimals}f}" for each in facts)])
    return "\n".join(table(["one GPU", *MODELS], rows, right=True))


# ---------------------------------------------------------------- the documents


def put_into(document: str, made: str, name: str = "the page") -> str:
    """The document with ``made`` between its two marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{name}: the marks {BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="put the tables into the documents instead of printing them")
    action.add_argument("--skeleton", type=Path, metavar="DIR", help="make a checkpoint of the 122B's shape, of zeros, and end")
    args = parser.parse_args()
    config = read_json(REPO / "configs/shape_122b.json")
    if args.skeleton:
        skeleton_of(config, args.skeleton)
        print(f"wrote {args.skeleton}: the shape of the 122B, of zeros", flush=True)
        return
    cost = cost_table(read_records(REPO / "results/bench", "h100_122b"), CALIBRATION_TOKENS)
    for name, made in (("docs/MOE_PIPELINE.md", model_tables(config)), ("docs/COST_MODEL.md", cost)):
        if not args.write:
            print(made, end="\n\n", flush=True)
            continue
        document = put_into((REPO / name).read_text(encoding="utf-8"), made, name)
        with atomic_path(REPO / name) as temporary:
            temporary.write_text(document, encoding="utf-8")
        print(f"wrote {name}", flush=True)


if __name__ == "__main__":
    run_cli(main)
