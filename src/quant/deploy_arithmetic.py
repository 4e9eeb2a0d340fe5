"""What a mixture of experts weighs in each format and where it fits, by arithmetic from a config's shape.

    python src/quant/deploy_arithmetic.py                                     # Qwen3.5-122B-A10B, as Markdown tables
    python src/quant/deploy_arithmetic.py --config DIR/config.json            # another model of the family
    python src/quant/deploy_arithmetic.py --skeleton work/skeleton-122b       # a checkpoint of the shape that takes no disk

Sizes are those of the plans that quantize.sh and pack_gguf.sh make of a checkpoint, so they change with the recipes in
configs/. --write puts the tables into docs/MOE_PIPELINE.md, --check fails where the document has others. --skeleton writes a
checkpoint of zeros in sparse files: `MODEL=DIR bash pipelines/quantize.sh --dry-run` plans on it as on the real one.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from console import UserError, atomic_path, read_json, run_cli, write_json
from families import Role, roles_of, text_config
from gguf_layout import read_patterns
from pack_plan import TypeSettings, plan_pack, report
from plans import plan_jobs, summarize
from recipe import Recipe
from safetensors_file import INDEX
from settings import read_part

REPO = Path(__file__).resolve().parents[2]
DOCUMENT = REPO / "docs" / "MOE_PIPELINE.md"
BEGIN, END = "<!-- written by src/quant/deploy_arithmetic.py -->", "<!-- end of what is written -->"
SHARD_BYTES = 5 << 30
# Bytes a second that each place reads weights at: what the vendors print, not what was measured.
BANDWIDTHS = {"H100 SXM, HBM3": 3.35e12, "RTX 4090, GDDR6X": 1.008e12, "12 channels of DDR5-4800": 0.4608e12}
CONTEXTS = (8_192, 65_536, 262_144)


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Qwen3.5 mixture of experts, from transformers' own model without its weights."""
    import torch
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForCausalLM, Qwen3_5MoeForConditionalGeneration

    if config.get("model_type") not in ("qwen3_5_moe", "qwen3_5_moe_text"):
        raise UserError(f"model_type {config.get('model_type')!r}: the arithmetic knows qwen3_5_moe only")
    with torch.device("meta"):
        if "vision_config" in config:
            parts = {key: config[key] for key in ("text_config", "vision_config")}
            model = Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(**parts))
        else:
            model = Qwen3_5MoeForCausalLM(Qwen3_5MoeConfig(text_config=dict(config)).text_config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def write_skeleton(config: Mapping[str, Any], directory: Path) -> None:
    """A BF16 checkpoint of zeros: true headers, and data that sparse files hold without taking disk."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", config)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in tensor_shapes(config).items():
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = directory / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for name, shape in shard:
            end = offset + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
            offset, weight_map[name] = end, file.name
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    write_json(directory / INDEX, {"metadata": {}, "weight_map": weight_map})


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows), ""]


def shape_table(checkpoint: Checkpoint) -> list[str]:
    """Parameters by role, their share and their bytes in BF16."""
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    counts: dict[Role, int] = {}
    for name, role in roles.items():
        counts[role] = counts.get(role, 0) + checkpoint.tensors[name].numel
    total = sum(counts.values())
    rows = [(f"{role}", f"{n:,}", f"{100 * n / total:.2f} %", f"{2 * n / 1e9:.2f}") for role, n in counts.items()]
    text = total - counts.get(Role.VISION, 0)
    lines = table(("role", "parameters", "share", "BF16, GB"), [*rows, ("**all**", f"{total:,}", "", f"{2 * total / 1e9:.2f}")])
    return [*lines, f"Without the vision tower {text:,} parameters, {2 * text / 1e9:.1f} GB.", ""]


def size_table(checkpoint: Checkpoint) -> tuple[list[str], dict[str, Any]]:
    """Sizes of the two published recipes, from the plans of the builders; also the report of the GGUF's plan."""
    recipe = read_part(Recipe, REPO / "configs/clip_122b.env")
    packed = summarize(plan_jobs(checkpoint, recipe), recipe)
    experts = packed.roles[str(Role.ROUTED_EXPERT)]
    codes = experts.parameters * (experts.bits or 16) / 8
    pack = read_part(TypeSettings, REPO / "configs/gguf_iq3.env")
    plan, _ = plan_pack(checkpoint, pack.base, read_patterns(REPO / str(pack.tensor_types)), "ldlq")
    file = report(plan, plan.data_bytes)
    gguf_experts = file["roles"][str(Role.ROUTED_EXPERT)]["bytes"]
    integer, base = f"int{recipe.expert_bits:g} experts, int{recipe.linear_bits} rest, group {recipe.group}", pack.base_type
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
    return [*table(("what", "GB", "GiB", "bits a weight"), rows), note, ""], file


def sizes(size: float, parameters: int) -> tuple[str, str, str]:
    return f"{size / 1e9:.2f}", f"{size / 2**30:.2f}", f"{8 * size / parameters:.2f}"


def state_bytes(text: Mapping[str, Any]) -> tuple[int, int]:
    """(bytes of keys and values that a token adds, in 16 bits; bytes of the recurrent state of a sequence, in float32)."""
    layers = text["num_hidden_layers"]
    full = text["layer_types"].count("full_attention") if "layer_types" in text else layers // text["full_attention_interval"]
    a_token = full * 2 * text["num_key_value_heads"] * text["head_dim"] * 2
    keys, values = text["linear_num_key_heads"], text["linear_num_value_heads"]
    width, depth = text["linear_value_head_dim"], text["linear_key_head_dim"]
    window = (2 * keys * depth + values * width) * (text["linear_conv_kernel_dim"] - 1)
    return a_token, (layers - full) * 4 * (values * width * depth + window)


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
    return [*table(head, rows), note, ""]


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
    return [note, "", *table(("weights in", "GB/s", "tokens/s at most, one sequence"), rows)]


def tables(config: Mapping[str, Any]) -> str:
    """All of the arithmetic as Markdown."""
    text = text_config(config)
    with tempfile.TemporaryDirectory() as directory:
        skeleton = Path(directory) / "skeleton"
        write_skeleton(config, skeleton)
        checkpoint = Checkpoint(skeleton)
        sized, file = size_table(checkpoint)
        lines = ["### Parameters", "", *shape_table(checkpoint), "### Sizes", "", *sized]
    lines += ["### Memory", "", *memory_table(text, file), "### Speed that the memory allows", "", *speed_table(text, file)]
    return "\n".join(lines).rstrip() + "\n"


def put_into(document: str, made: str) -> str:
    """The document with ``made`` between its two marks."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{DOCUMENT.name}: the marks {BEGIN} and {END} are not there")
    return f"{before}{BEGIN}\n\n{made}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=REPO / "configs/shape_122b.json", help="config.json of a model")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="put the tables into docs/MOE_PIPELINE.md")
    action.add_argument("--check", action="store_true", help="fail where docs/MOE_PIPELINE.md has other tables")
    action.add_argument("--skeleton", type=Path, metavar="DIR", help="make a checkpoint of this shape, of zeros, and end")
    args = parser.parse_args()
    config = read_json(args.config)
    if args.skeleton:
        if args.skeleton.exists():
            raise UserError(f"{args.skeleton}: exists; remove it or name another directory")
        write_skeleton(config, args.skeleton)
        print(f"wrote {args.skeleton}: the shape of {args.config.name}, of zeros", flush=True)
        return 0
    made = tables(config)
    if not (args.write or args.check):
        print(made, end="", flush=True)
        return 0
    document = DOCUMENT.read_text(encoding="utf-8")
    wanted = put_into(document, made)
    if args.write:
        with atomic_path(DOCUMENT) as temporary:
            temporary.write_text(wanted, encoding="utf-8")
        print(f"wrote {DOCUMENT.relative_to(REPO)}", flush=True)
        return 0
    same = wanted == document
    print(
        f"{DOCUMENT.relative_to(REPO)}: {'the tables are current' if same else 'the tables are old; run with --write'}",
        flush=True,
    )
    return int(not same)


if __name__ == "__main__":
    run_cli(main)
