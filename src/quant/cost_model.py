"""Time, memory and disk of a run as functions of a model's shape, from the recorded measurements: docs/COST_MODEL.md.

    python src/quant/cost_model.py [--records results/bench --name h100_122b] [--write docs/COST_MODEL.md] [--tokens 65536]

Sizes are counted from the tensors of each shape. Seconds and memory are the measured ones of the 122B's shape (bench_h100.sh),
carried over by what they grow with:

    data-free   bytes of the checkpoint / measured bytes a second                          (the disk decides)
    calibrated  layers * (a * parameters of a layer + b * tokens * parameters that a token uses in it)
                a from the seconds in which a layer is rounded, b from the others
    VRAM        c * (weights of a layer in BF16 + second moments of its experts' inputs in float32), c from the peak
    RAM         d + e * weights of a layer in BF16, d a process with torch (quant_save.BASE_BYTES), e from the peak
    decode      share of the limit that was reached * copied bytes a second / bytes that a token reads

A figure whose record is not there yet is a dash. Nothing here is typed in but shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from console import UserError, atomic_path, run_cli
from families import Role, role_of
from recipe import Recipe
from records import read_result
from synthetic_gguf import TYPES, empty_model, plan
from synthetic_moe import SHAPES, Shape, layer_plan, plan_of

MODELS = {
    "35B": SHAPES["35b"],
    "122B": SHAPES["122b"],
    # Qwen3.5-397B-A17B by its configuration; the sizes of Kimi K2 (61 layers, 384 experts) with Qwen3.5's attention.
    "400B": dataclasses.replace(SHAPES["122b"], layers=60, hidden=4096, experts=512, top_k=10),
    "1T": dataclasses.replace(SHAPES["122b"], layers=61, hidden=7168, experts=384, inner=2048, shared_inner=2048, heads=64),
}
BEGIN, END = "<!-- table: python src/quant/cost_model.py --write docs/COST_MODEL.md -->", "<!-- end of table -->"
SEED = Recipe(expert_bits=3, linear_bits=4, group=128, clip_steps=16)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is counted: parameters, those of the largest layer and those that a token uses in it, elements of the second moments
    of a layer, bytes if packed at int3 / int4, bytes of the GGUF and of those that a token reads."""

    parameters: int
    layer: int
    layer_active: int
    moments: int
    packed_bytes: int
    gguf_bytes: int
    active_bytes: int


def count(size: tuple[int, ...]) -> int:
    return math.prod(size)


def sizes_of(shape: Shape) -> Sizes:
    entries = [(name, count(size), role_of(name, size, "qwen3_5_moe")) for name, _, size in plan_of(shape)]
    bits = {role: SEED.bits_for(role) for _, _, role in entries}
    packed = sum(n * 2 if bits[role] is None else n * (bits[role] + 16 / SEED.group) / 8 for _, n, role in entries)
    layers = [
        [(role_of(name, size, "qwen3_5_moe"), count(size)) for name, _, size in layer_plan(shape, index)]
        for index in range(shape.layers)
    ]
    share = shape.top_k / shape.experts
    active = max(sum(n * share if role is Role.ROUTED_EXPERT else n for role, n in layer) for layer in layers)
    moments = shape.experts * (shape.hidden**2 + shape.inner**2)
    gguf, used = gguf_bytes(shape)
    return Sizes(
        parameters=sum(n for _, n, _ in entries), layer=max(sum(n for _, n in layer) for layer in layers),
        layer_active=int(active), moments=moments, packed_bytes=int(packed), gguf_bytes=gguf, active_bytes=used,
    )  # fmt: skip


def gguf_bytes(shape: Shape) -> tuple[int, int]:
    """Bytes of the tensors of the published type mix, and of those that decoding a token reads."""
    with tempfile.TemporaryDirectory() as work:
        pack = plan(empty_model(Path(work) / "model", shape, 0), "iq3_xxs", TYPES)
        total = used = 0
        for piece in pack.pieces:
            size = pack.bytes_of(piece)
            total += size
            if piece.role is Role.ROUTED_EXPERT:
                size = size * shape.top_k // shape.experts
            elif piece.role is Role.EMBEDDING:
                size //= piece.shape[0]
            used += size
    return total, used


# ---------------------------------------------------------------- fit


def read_records(directory: Path, name: str) -> dict[str, dict[str, Any]]:
    """The metrics of the records that are there, by the part of bench_h100.sh that made them."""
    parts = ("disk", "gptq", "ldlq", "gguf", "gguf_offload")
    found = {part: directory / f"{name}_{part}.json" for part in parts}
    return {part: read_result(file, "bench")["metrics"] for part, file in found.items() if file.is_file()}


def calibrated_fit(records: Mapping[str, Any], method: str, at: Sizes) -> tuple[float, float] | None:
    """(a, b) of the module's head."""
    if method not in records:
        return None
    made = records[method]["size_layers"]
    rounding = made["worst_rounding_seconds"]
    return rounding / at.layer, (made["worst_layer_seconds"] - rounding) / (made["tokens"] * at.layer_active)


def fit(records: Mapping[str, Any], at: Sizes) -> dict[str, Any]:
    """The constants, from the records of the shape ``at``; those without a record are left out."""
    found: dict[str, Any] = {}
    if "disk" in records:
        found["bytes_per_s"] = records["disk"]["size_disk"]["bytes_in_per_s"]
    for method in ("gptq", "ldlq"):
        if (pair := calibrated_fit(records, method, at)) is not None:
            found[method] = pair
    made = [records[method]["size_layers"] for method in ("gptq", "ldlq") if method in records]
    if peaks := [entry["peak_vram_mib"] for entry in made if entry["peak_vram_mib"]]:
        found["vram"] = max(peaks) * 2**20 / layer_bytes(at)
    if made:
        from plans import BASE_BYTES

        found["base"] = BASE_BYTES
        found["ram"] = max(0.0, max(entry["peak_rss_mib"] for entry in made) * 2**20 - BASE_BYTES) / (2 * at.layer)
    if placed := records.get("gguf", {}).get("placements", {}).get("all_on_gpu"):
        metrics = records["gguf"]
        found["copy"] = metrics["copy_bytes_per_s"]
        found["decode_share"] = placed["decode"]["1"]["tokens_per_s"] / metrics["limit_tokens_per_s"]
    return found


def layer_bytes(sizes: Sizes) -> int:
    return 2 * sizes.layer + 4 * sizes.moments


def predict(shape: Shape, sizes: Sizes, constants: Mapping[str, Any], tokens: int) -> dict[str, float | None]:
    """Seconds, bytes and rates of a model of this shape; None where no record says it."""

    def calibrated(method: str) -> float | None:
        if method not in constants:
            return None
        a, b = constants[method]
        return shape.layers * (a * sizes.layer + b * tokens * sizes.layer_active)

    known = constants.get
    return {
        "data_free_s": 2 * sizes.parameters / constants["bytes_per_s"] if known("bytes_per_s") else None,
        "gptq_s": calibrated("gptq"), "ldlq_s": calibrated("ldlq"),
        "vram": constants["vram"] * layer_bytes(sizes) if known("vram") else None,
        "ram": constants["base"] + constants["ram"] * 2 * sizes.layer if known("base") else None,
        "limit": constants["copy"] / sizes.active_bytes if known("copy") else None,
        "decode": constants["copy"] / sizes.active_bytes * constants["decode_share"] if known("copy") else None,
    }  # fmt: skip


# ---------------------------------------------------------------- page


def cell(value: float | None, scale: float, decimals: int) -> str:
    return "-" if value is None else f"{value / scale:,.{decimals}f}"


def table(records: Mapping[str, Any], tokens: int) -> str:
    """The page's table as markdown."""
    at = sizes_of(MODELS["122B"])
    constants = fit(records, at)
    rows: list[tuple[str, list[str]]] = []
    columns = {name: (shape, sizes_of(shape)) for name, shape in MODELS.items()}
    found = {name: predict(shape, sizes, constants, tokens) for name, (shape, sizes) in columns.items()}

    def counted(label: str, scale: float, decimals: int, field: str) -> None:
        rows.append((label, [cell(getattr(sizes, field), scale, decimals) for _, sizes in columns.values()]))

    def predicted(label: str, scale: float, decimals: int, field: str) -> None:
        rows.append((label, [cell(each[field], scale, decimals) for each in found.values()]))

    rows.append(("layers, experts", [f"{shape.layers}, {shape.experts}" for shape, _ in columns.values()]))
    counted("parameters, billions", 1e9, 1, "parameters")
    counted("parameters of a layer, billions", 1e9, 2, "layer")
    rows.append(("disk: BF16 in, and dequantized out, GB", [cell(2 * s.parameters, 1e9, 0) for _, s in columns.values()]))
    counted("disk: int3 / int4 packed, GB", 1e9, 1, "packed_bytes")
    counted("disk: GGUF of the published types, GiB", 2**30, 1, "gguf_bytes")
    counted("bytes that a token reads of it, GB", 1e9, 2, "active_bytes")
    predicted("data-free quantization, minutes", 60, 1, "data_free_s")
    predicted("GPTQ, minutes", 60, 0, "gptq_s")
    predicted("LDLQ into the GGUF, minutes", 60, 0, "ldlq_s")
    predicted("VRAM of the calibrated pass, GiB", 2**30, 0, "vram")
    predicted("RAM of the calibrated pass, GiB", 2**30, 1, "ram")
    predicted("decode, limit, tokens/s", 1, 0, "limit")
    predicted("decode, expected, tokens/s", 1, 0, "decode")
    lines = ["| one GPU | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    return "\n".join([*lines, *(f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows)])


def page_with(text: str, made: str) -> str:
    """The page with its table replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"the page has no lines {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{made}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--records", type=Path, default=Path("results/bench"), help="directory of the records (default results/bench)"
    )
    parser.add_argument("--name", default="h100_122b", help="what the records' names begin with (default h100_122b)")
    parser.add_argument("--tokens", type=int, default=65536, help="of calibration (default 65536: 128 sequences of 512)")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    args = parser.parse_args()
    made = table(read_records(args.records, args.name), args.tokens)
    if args.write:
        with atomic_path(args.write) as temporary:
            temporary.write_text(page_with(args.write.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(made, flush=True)


if __name__ == "__main__":
    run_cli(main)
