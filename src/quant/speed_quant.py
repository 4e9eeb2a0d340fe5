"""How fast the quantizers are here, beside what the memory allows: bash pipelines/bench.sh [--result FILE --tag TAG]

    python src/quant/speed_quant.py [--layer small|122b] [--result results/bench/T.json --tag T]

Data-free grids on BF16 blocks [8, 2048, 3072] of experts (smaller on a CPU), in parameters a second, beside the rate of a
copy, which is the limit of anything that reads and writes BF16. On a GPU the fused kernel is compared bit by bit with the
plain search. Then one MoE layer of calibrated rounding: --layer 122b is that of Qwen3.5-122B-A10B (256 experts), on synthetic
weights and correlated activations; and the same layer encoded into --ggml block types, nearest and with error feedback.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calibration import Moments
from console import progress, run_cli
from ggml_codecs import decode_rows
from gguf_pass import encoded
from gguf_recipe import type_named
from moe_ptq import Grid, output_error, round_weight
from moe_quant import dequantize, fake_quant, quantize_group
from records import add_record_arguments, check_record_arguments, write_result

LAYERS = {  # experts, [O, I] of the two matrices, tokens an expert sees
    "small": (8, ((512, 256), (256, 256)), 1024),
    "122b": (256, ((2048, 3072), (3072, 1024)), 4096),
}
METHODS = ("wclip", "gptq", "gptq_refit")
GGML_METHODS = ("nearest", "ldlq")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], device: torch.device, repeats: int = 21) -> float:
    """Median time of a call, after two that are not counted (they compile, and raise the clock)."""
    function()
    function()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def grids(device: torch.device) -> dict[str, Any]:
    """Rates of the data-free grids in G parameters/s, and whether the GPU's bits are the plain search's."""
    shape = (8, 2048, 3072) if device.type == "cuda" else (1, 1024, 3072)
    weight = torch.randn(shape, device=device).bfloat16()
    out = torch.empty_like(weight)
    rate = weight.numel() / 1e9
    found: dict[str, Any] = {"shape": list(shape), "limit_copy": rate / seconds(lambda: out.copy_(weight), device)}
    for name, bits, steps in (("absmax_int4", 4, 1), ("clip16_int3", 3, 16), ("clip16_int4", 4, 16)):
        found[name] = rate / seconds(lambda b=bits, s=steps: fake_quant(weight, b, 128, s), device)
    plain = dequantize(quantize_group(weight, 3, 128, 16), 128)
    found["plain_clip16_int3"] = rate / seconds(lambda: dequantize(quantize_group(weight, 3, 128, 16), 128), device, 3)
    found["identical_to_plain"] = torch.equal(fake_quant(weight, 3, 128, 16).view(torch.int16), plain.view(torch.int16))
    sample = weight[:, :128]
    on_cpu = fake_quant(sample.cpu(), 3, 128, 16)
    found["identical_to_cpu"] = torch.equal(fake_quant(sample, 3, 128, 16).cpu().view(torch.int16), on_cpu.view(torch.int16))
    return found


def moments_of(experts: int, inputs: int, tokens: int, device: torch.device) -> Moments:
    """Second moments of synthetic activations: correlated, with a few loud channels, of other size for each expert."""
    moments = Moments(experts, inputs, device)
    mix = torch.randn(inputs, inputs, device=device) / inputs**0.5
    loud = torch.rand(inputs, device=device) ** 4 * 5
    for expert in range(experts):
        x = (torch.randn(tokens, inputs, device=device) @ mix + torch.randn(tokens, inputs, device=device)) * loud
        moments.add(expert, x, torch.rand(tokens, device=device))
    return moments


def layer(name: str, device: torch.device) -> dict[str, Any]:
    """Seconds of one MoE layer for every method, and its output error relative to the clip search."""
    experts, shapes, tokens = LAYERS[name]
    found: dict[str, Any] = {"experts": experts, "shapes": [list(s) for s in shapes], "tokens": tokens, "statistics_s": 0.0}
    for method in METHODS:
        found[method] = {"seconds": 0.0, "error_ratio": []}
    with progress(len(shapes) * len(METHODS), "layer", "matrix") as bar:
        for outputs, inputs in shapes:
            weight = (torch.randn(experts, outputs, inputs, device=device) * 0.02).bfloat16()
            started = time.perf_counter()
            statistics = moments_of(experts, inputs, tokens, device).statistics(inputs)
            synchronize(device)
            found["statistics_s"] += time.perf_counter() - started
            clip = error_of(weight, fake_quant(weight, 3, 128, 16), statistics.hessian)
            for method in METHODS:
                synchronize(device)
                started = time.perf_counter()
                value = round_weight(weight, Grid(3, 128), statistics, method)
                synchronize(device)
                found[method]["seconds"] += time.perf_counter() - started
                found[method]["error_ratio"].append(error_of(weight, value, statistics.hessian) / clip)
                bar.update()
    return found


def ggml_layer(name: str, types: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Seconds and rates of the same layer in ggml block types, and its output error relative to the int3 clip search."""
    experts, shapes, tokens = LAYERS[name]
    count = sum(experts * outputs * inputs for outputs, inputs in shapes)
    found = {kind: {m: {"seconds": 0.0, "error_ratio": []} for m in GGML_METHODS} for kind in types}
    with progress(len(shapes) * len(types) * len(GGML_METHODS), "ggml", "matrix") as bar:
        for outputs, inputs in shapes:
            weight = (torch.randn(experts, outputs, inputs, device=device) * 0.02).bfloat16()
            statistics = moments_of(experts, inputs, tokens, device).statistics(inputs)
            clip = error_of(weight, fake_quant(weight, 3, 128, 16), statistics.hessian)
            for kind in types:
                for method in GGML_METHODS:
                    encoded(weight[:1, :64].float(), kind, method, statistics.hessian[:1])  # tables are made once
                    synchronize(device)
                    started = time.perf_counter()
                    data = encoded(weight.float(), kind, method, statistics.hessian)
                    synchronize(device)
                    entry = found[kind][method]
                    entry["seconds"] += time.perf_counter() - started
                    entry["error_ratio"].append(error_of(weight, decode_rows(data, kind), statistics.hessian) / clip)
                    bar.update()
    for made in found.values():
        for entry in made.values():
            entry["mega_parameters_per_s"] = count / 1e6 / entry["seconds"]
    return found


def error_of(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    """Summed output error, a few experts at a time."""
    total = 0.0
    for w, v, h in zip(weight.split(8), value.split(8), hessian.split(8), strict=True):
        total += output_error(w.float().transpose(1, 2), v.float().transpose(1, 2), h).sum().item()
    return total


def table(found: dict[str, Any]) -> str:
    rates, work = found["grids"], found["layer"]
    limit = rates["limit_copy"]
    lines = [f"BF16 {rates['shape']}, G parameters/s (a copy: {limit:.2f})"]
    for name in ("absmax_int4", "clip16_int3", "clip16_int4", "plain_clip16_int3"):
        lines.append(f"  {name:<20}{rates[name]:>10.3f}{100 * rates[name] / limit:>8.1f} % of a copy")
    lines.append(f"  same bits as the plain search: {rates['identical_to_plain']}, as a CPU: {rates['identical_to_cpu']}")
    lines.append(f"one MoE layer: {work['experts']} experts, {work['shapes']}, {work['tokens']} tokens each, int3 g128")
    lines.append(f"  {'statistics':<14}{work['statistics_s']:>9.2f} s")
    for method in METHODS:
        ratios = ", ".join(f"{ratio:.3f}" for ratio in work[method]["error_ratio"])
        lines.append(f"  {method:<14}{work[method]['seconds']:>9.2f} s   output error / clip-16: {ratios}")
    for kind, made in found["ggml"].items():
        for method, entry in made.items():
            ratios = ", ".join(f"{ratio:.3f}" for ratio in entry["error_ratio"])
            rate = f"{entry['mega_parameters_per_s']:>8.1f} M/s"
            lines.append(f"  {kind + ' ' + method:<18}{entry['seconds']:>9.2f} s{rate}   output error / clip-16: {ratios}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layer", choices=sorted(LAYERS), help="default: 122b on a GPU, small on a CPU")
    parser.add_argument("--ggml", default="iq3_xxs,iq2_xs,q4_K", help="block types to encode the layer into; empty: none")
    add_record_arguments(parser)
    args = parser.parse_args()
    check_record_arguments(args)
    types = [type_named(kind, "--ggml") for kind in args.ggml.split(",") if kind]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    started = time.time()
    chosen = args.layer or ("122b" if device.type == "cuda" else "small")
    found = {"grids": grids(device), "layer": {"name": chosen} | layer(chosen, device)}
    found["ggml"] = ggml_layer(chosen, types, device)
    if args.result:
        write_result(args.result, kind="bench", tag=args.tag, started=started, metrics=found)
    print(table(found), flush=True)


if __name__ == "__main__":
    run_cli(main)
