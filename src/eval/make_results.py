"""Write results/RESULTS.md from the records in results/: python src/eval/make_results.py

Every figure is a citation that check_results verifies. Tables: accuracy (eval), differences (compare), fidelity (kl,
spread), sizes (quantize), GGUF files (pack), speed (bench), training, recovery (distill). Below each stand the commands of
its rows, and the pipeline that makes a row from nothing (:data:`PIPELINES`).
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from check_results import lookup, render
from console import atomic_path, run_cli
from records import read_result

HEADER = """# Results

Written by `python src/eval/make_results.py`; each figure links to the record that holds it, and
`python src/eval/check_results.py` compares them. Never edited by hand.

Below each table stand the commands that wrote its records, in the order of the rows. They read files under `work/` that are not
in the repository: to reproduce a row from nothing, run the pipeline that is named above its command. A pipeline keeps records
that are there: remove the one to make again. In minutes, for the KL of a row:

    rm results/kl/razor_tiny_int4.json; bash pipelines/tiny_results.sh; git diff results/RESULTS.md
"""
# What makes a record from nothing, by its kind and tag; the first pattern that fits.
PIPELINES = (
    ("train/razor_tiny", "make_tiny.sh"),
    ("train/razor_tiny_vl", "make_tiny.sh vl"),
    ("distill/opd_tiny", "distill.sh"),
    ("bench/h100_122b_*", "bench_h100.sh"),
    ("bench/multi_gpu_fit122b", "multi_gpu.sh fit122b"),
    ("bench/multi_gpu_eval35b", "multi_gpu.sh eval35b"),
    ("bench/multi_gpu_vllm", "multi_gpu.sh vllm"),
    ("bench/multi_gpu_*", "multi_gpu.sh"),
    ("bench/h100", "bench.sh --result results/bench/h100.json --tag h100"),
    ("bench/h200", "bench.sh --result results/bench/h200.json --tag h200"),
    ("*/razor_tiny_vl_*", "vl_results.sh"),
    ("*/razor_tiny_vllm_*", "packed_results.sh"),
    ("quantize/razor_tiny_*_packed", "packed_results.sh"),
    ("spread/razor_tiny_gguf_*", "gguf_spread.sh"),
    ("*/*razor_tiny_gguf_*", "gguf_results.sh"),
    ("*/*recovery_gguf_iq2_xs_*", "recovery.sh gguf"),
    ("eval/recovery_iq2_xs_*", "recovery.sh gguf"),
    ("compare/recovery_iq2_xs_*", "recovery.sh gguf"),
    ("*/recovery_*", "recovery.sh"),
    ("*/razor_tiny_bf16", "tiny_results.sh"),
    ("*/*razor_tiny_int4", "tiny_results.sh"),
    ("*/*razor_tiny_int3_int4_clip16", "tiny_results.sh"),
    ("*/*razor_tiny_int[23]_int4_absmax", "tiny_results.sh"),
    ("*/*razor_tiny_int*", "study.sh"),
    ("probe/razor_tiny_allocation*", "study.sh"),
)


def cite(record: dict[str, Any], file: str, path: str, decimals: int, unit: str = "") -> str:
    return f"[{render(lookup(record, path), decimals, unit)}]({file}#{path})"


def cite_if(record: dict[str, Any], file: str, path: str, decimals: int, unit: str = "") -> str:
    """A figure that some machines do not have, as VRAM."""
    return "" if lookup(record, path) is None else cite(record, file, path, decimals, unit)


def method_of(record: Mapping[str, Any]) -> str:
    """The rounding of a quantize record as tables and pictures name it."""
    recipe, calibration = record["recipe"], record["metrics"].get("calibration") or {}
    name = "absmax" if recipe["clip_steps"] == 1 and recipe["method"] == "clip" else recipe["method"]
    if calibration.get("token_power"):
        name += ", tokens by gradient"
    if recipe.get("experts"):
        return f"{name}, by signals"
    return f"{name}, by measured KL" if recipe.get("overrides") else name


def records(directory: Path, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """(file relative to ``directory``, record) of a kind, by start time: the order in which they were made."""
    found = []
    for file in sorted(directory.glob("*/*.json")):
        record = read_result(file)
        if record["kind"] == kind:
            found.append((str(file.relative_to(directory)), record))
    return sorted(found, key=lambda item: item[1]["started"])


def row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [row(head), row(["---"] * len(head)), *(row(cells) for cells in rows), ""]


def pipeline_of(record: dict[str, Any]) -> str | None:
    """The pipeline that makes a record from nothing, with its arguments; None for one that was made by hand."""
    name = f"{record['kind']}/{record['tag']}"
    return next((pipeline for pattern, pipeline in PIPELINES if fnmatch.fnmatchcase(name, pattern)), None)


def commands(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The commands of the rows, in their order, each group under the pipeline that makes it."""
    lines = ["How to reproduce:", "```"]
    for pipeline, group in itertools.groupby((record for _, record in found), pipeline_of):
        lines.append(f"# bash pipelines/{pipeline}" if pipeline else "# by hand")
        lines += [shlex.join(record["command"]) for record in group]
    return [*lines, "```", ""]


def benchmark_table(found: list[tuple[str, dict[str, Any]]], label: str, cell: Callable[..., str]) -> list[str]:
    """One row a record, named by its fields in ``label``, one column a benchmark;
    ``cell(record, file, path of the metrics)``."""
    names = list(dict.fromkeys(name for _, record in found for name in record["metrics"]))
    rows = []
    for file, record in found:
        cells = [cell(record, file, f"metrics.{name}") if name in record["metrics"] else "" for name in names]
        rows.append([f"`{label.format_map(record)}`", *cells])
    return table(["model", *(f"`{name}`" for name in names)], rows)


def accuracy_cell(record: dict[str, Any], file: str, at: str) -> str:
    return (
        f"{cite(record, file, at + '.acc', 1, ' %')} ({cite(record, file, at + '.acc_low', 1, ' %')} to "
        f"{cite(record, file, at + '.acc_high', 1, ' %')}; n {cite(record, file, at + '.n', 0)}, "
        f"truncated {cite(record, file, at + '.trunc', 1, ' %')})"
    )


def accuracy(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    note = "Share of right answers, its Wilson interval, items, and truncated answers (counted wrong)."
    return ["## Accuracy", "", note, "", *benchmark_table(found, "{tag}", accuracy_cell), *commands(found)]


def difference_cell(record: dict[str, Any], file: str, at: str) -> str:
    return (
        f"{cite(record, file, at + '.difference', 1, ' %')} ({cite(record, file, at + '.difference_low', 1, ' %')} to "
        f"{cite(record, file, at + '.difference_high', 1, ' %')}), {lookup(record, at + '.verdict')}"
    )


def differences(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    note = "Change in accuracy from the first model to the second on the same items, with its paired bootstrap interval."
    return ["## Differences", "", note, "", *benchmark_table(found, "{base} -> {other}", difference_cell), *commands(found)]


KL_COLUMNS = (("mean", 5, ""), ("standard_error", 5, ""), ("p99", 4, ""), ("p99_9", 4, ""), ("top1", 2, " %"))


def fidelity(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rows, files = [], [item for item in found if "tool" in item[1]["metrics"]]
    found = [item for item in found if item not in files]
    for file, record in found:
        cells = [f"`{record['tag']}`", cite(record, file, "metrics.ppl", 4)]
        for path, decimals, unit in KL_COLUMNS:
            cells.append(cite(record, file, f"metrics.kl.{path}", decimals, unit) if "kl" in record["metrics"] else "")
        rows.append(cells)
    note = "KL divergence to the unquantized model over the whole vocabulary, in nats, on held-out transcripts."
    head = ["model", "perplexity", "mean KL", "standard error", "percentile `99`", "percentile `99.9`", "same top token"]
    lines = ["## Fidelity", "", note, "", *table(head, rows), *commands(found)] if found else []
    return lines + (gguf_fidelity(files) if files else [])


def gguf_fidelity(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """KL of GGUF files, by llama.cpp's tool and by ours on the same chunks."""
    paths = (
        ("tool.mean", 5, ""), ("tool.mean_error", 5, ""), ("tool.p99", 4, ""), ("tool.p99_9", 4, ""), ("tool.top1", 2, " %"),
        ("kl.mean", 5, ""), ("kl.p99_9", 4, ""),
    )  # fmt: skip
    rows = [
        [f"`{r['tag']}`", *(cite(r, file, f"metrics.{path}", decimals, unit) for path, decimals, unit in paths)]
        for file, r in found
    ]
    note = "KL of GGUF files to the unquantized model: by `llama-perplexity`, and by our own reading of the same logits."
    head = ["file", "mean KL", "error", "percentile `99`", "percentile `99.9`", "same top token", "ours: mean", "ours: `99.9`"]
    return ["## Fidelity of GGUF files", "", note, "", *table(head, rows), *commands(found)]


def packs(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What was packed into GGUF files."""
    paths = (("metrics.file_bytes", 3, " MB"), ("metrics.bits_per_weight", 3, ""), ("seconds", 0, ""))
    rows = []
    for file, r in found:
        made_by = f"`{r['recipe']['method']}`, `{r['recipe']['base_type']}`"
        rows.append([f"`{r['tag']}`", made_by, *(cite(r, file, path, decimals, unit) for path, decimals, unit in paths)])
    head = ["file", "method, base type", "size", "bits a weight", "seconds"]
    return ["## GGUF files", "", *table(head, rows), *commands(found)]


def spreads(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """KL of GGUF files over several calibration texts, llama-quantize's beside ours."""
    rows = []
    for file, r in found:
        cells = [f"`{r['base_type']}`", cite(r, file, "texts", 0)]
        for name, decimals in (("mean", 5), ("p99", 4), ("p99_9", 3)):
            at = f"metrics.{name}"
            for side in ("llama", "ours"):
                mean, deviation = (cite(r, file, f"{at}.{side}.{figure}", decimals) for figure in ("mean", "deviation"))
                cells.append(f"{mean} (deviation {deviation})")
            low, high = (cite(r, file, f"{at}.{end}", 2) for end in ("ratio_low", "ratio_high"))
            cells.append(f"{cite(r, file, f'{at}.ratio', 2)} ({low} to {high})")
        rows.append(cells)
    note = (
        "The same over several calibration texts, each seen by both: mean and standard deviation of the KL over the texts, and "
        "our share of llama-quantize's (geometric mean, `95` % interval of Student)."
    )
    figures = ("mean KL", "percentile `99`", "percentile `99.9`")
    head = [cell for figure in figures for cell in (f"{figure}: llama-quantize", "ours", "share")]
    return ["## Fidelity over calibration texts", "", note, "", *table(["type", "texts", *head], rows), *commands(found)]


def packed_path(record: dict[str, Any]) -> str:
    """Where the packed size stands: that of the file for vLLM where one was made, else the bits of the recipe."""
    return "metrics.container.bytes" if "container" in record["metrics"] else "metrics.packed_bytes"


def sizes(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rows = [
        [
            f"`{record['tag']}`",
            cite(record, file, packed_path(record), 2, " MB"),
            cite(record, file, "metrics.weight_bits", 2),
            cite(record, file, "metrics.stored_bits", 2),
            cite(record, file, "metrics.overall_bits", 2),
        ]
        for file, record in found
    ]
    note = "Bytes if packed; bits of the quantized tensors without and with their scales, and of the whole model."
    head = ["model", "packed", "weight bits", "stored bits", "overall"]
    return ["## Sizes", "", note, "", *table(head, rows), *commands(found)]


def training(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rows = []
    for file, r in found:
        seen = "tokens" if "tokens" in r["metrics"] else "pictures"
        paths = (("metrics.parameters", 0), (f"metrics.{seen}", 0), ("seconds", 0), ("metrics.final_loss", 3))
        rows.append([f"`{r['tag']}`", *(cite(r, file, path, decimals) for path, decimals in paths)])
    head = ["model", "parameters", "tokens or pictures", "seconds", "final loss"]
    return ["## Training", "", *table(head, rows), *commands(found)]


def recovery(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What distillation won back, and what its phases took."""
    paths = (
        ("settings.steps", 0, ""), ("metrics.rollouts.kept.samples", 0, ""), ("metrics.kl_before.mean", 5, ""),
        ("metrics.kl_after.mean", 5, ""), ("metrics.kl_removed", 1, " %"), ("metrics.kl_answer_before", 5, ""),
        ("metrics.kl_answer_after", 5, ""), ("metrics.phases.opd_train.seconds", 0, ""),
    )  # fmt: skip
    rows = []
    for file, r in found:
        how = ", ".join(f"`{r['settings'][key]}`" for key in ("loss", "trajectories"))
        where = "peak_rss_mib" if r["metrics"]["phases"]["opd_train"]["peak_vram_mib"] is None else "peak_vram_mib"
        figures = (*paths, (f"metrics.phases.opd_train.{where}", 0, ""))
        rows.append([machine(r), how, *(cite(r, file, *figure) for figure in figures)])
    note = "KL to the unquantized model in nats before and after, at the same bytes; memory of the training's GPU or process."
    head = ["run", "loss, texts", "steps", "rollouts", "KL before", "KL after", "removed", "in answers before", "after"]
    return ["## Recovery", "", note, "", *table([*head, "seconds of training", "MiB"], rows), *commands(found)]


def speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """One table for each kind of measurement, told apart by a key of its metrics."""
    lines: list[str] = []
    for key, section in SPEEDS:
        if chosen := [item for item in found if key in item[1]["metrics"]]:
            lines += section(chosen)
    several = [item for item in found if item[1]["tag"].removeprefix(MULTI_GPU) in SEVERAL]
    return lines + (several_gpus(several) if several else [])


def machine(r: dict[str, Any]) -> str:
    return f"`{r['tag']}` (`{hardware(r)}`)"


def hardware(r: dict[str, Any]) -> str:
    """The GPUs of a record, equal ones counted, or its processor."""
    if not r["hardware"]["gpu"]:
        return r["hardware"]["cpu"]
    counts = Counter(r["hardware"]["gpu"].split(", "))
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def disk_speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The data-free pass at a real model's sizes, beside the disk."""
    at = "metrics.size_disk"
    paths = (
        ("quantize.bytes", 1, " GB"), ("bytes_in_per_s", 2, " GB"), ("disk.copy", 2, " GB"), ("share_of_copy", 0, " %"),
        ("disk.read", 2, " GB"), ("share_of_read", 0, " %"), ("quantize.peak_rss_mib", 0, ""),
        ("quantize.peak_vram_mib", 0, ""), ("whole.layers", 0, ""), ("whole.seconds", 0, ""),
    )  # fmt: skip
    rows = []
    for file, r in found:
        devices = r["metrics"]["size_disk"]["quantize"].get("devices", "")
        named = f" `{devices}`" if "," in devices else ""  # each with a shard at work
        rows.append([machine(r) + named, *(cite_if(r, file, f"{at}.{path}", n, unit) for path, n, unit in paths)])
    note = (
        "Quantized from disk to disk, bytes a second in (and as many out), beside a plain copy and reading alone on that disk. "
        "A device is named once for each shard at work. Peaks in MiB; the last columns are the whole model at that rate."
    )
    head = ["run", "size", "a second", "copy", "share", "read", "share", "memory", "VRAM", "layers", "seconds for all"]
    return ["## Data-free quantization at full size", "", note, "", *table(head, rows), *commands(found)]


def layer_speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The calibrated pass at a real model's sizes."""
    paths = (
        ("tokens", 0), ("worst_layer_seconds", 1), ("worst_rounding_seconds", 1), ("peak_rss_mib", 0), ("peak_vram_mib", 0),
        ("whole.layers", 0), ("whole.seconds", 0),
    )  # fmt: skip
    rows = []
    for file, r in found:
        made = r["metrics"]["size_layers"]
        cells = [
            cite_if(r, file, f"metrics.size_layers.{path}", decimals) if path.partition(".")[0] in made else ""
            for path, decimals in paths
        ]
        rows.append([machine(r), f"`{made['method']}`", *cells])
    note = "Calibrated passes on layers of full size: seconds of the slowest layer, and of its rounding alone; peaks in MiB."
    head = ["run", "method", "tokens", "seconds a layer", "rounding", "memory", "VRAM", "layers", "seconds for all"]
    return ["## Calibrated quantization at full size", "", note, "", *table(head, rows), *commands(found)]


def eval_speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Tokens a second of evaluations, one row a batch size."""
    paths = ("tokens_per_s", "decode_tokens_per_s", "limit_decode_tokens_per_s")
    rows = []
    for file, r in found:
        at, made = "metrics.eval_speed", r["metrics"]["eval_speed"]
        for engine in (name for name in ENGINES if name in made):
            spread = f" on {cite(r, file, f'{at}.tensor_parallel', 0)}" if engine == "vllm" else ""
            for batch in made[engine]:
                cells = [cite(r, file, f"{at}.{engine}.{batch}.{path}", 0) for path in paths]
                rows.append([machine(r), f"`{engine}`{spread}", cite(r, file, f"{at}.parameters", 0), f"`{batch}`", *cells])
    note = (
        "Tokens a second at forced lengths, through transformers (`hf`) or vLLM on so many GPUs: with the prompt, decoding, "
        "and what the memory's bandwidth allows."
    )
    head = ["run", "engine", "parameters", "batch", "with the prompt", "decoding", "limit"]
    return ["## Speed of evaluation", "", note, "", *table(head, rows), *commands(found)]


def gguf_speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """Tokens a second of llama.cpp, one row a placement of the weights."""
    rows = []
    for file, r in found:
        for place, made in r["metrics"]["placements"].items():
            at = f"metrics.placements.{place}"
            prefill, decode = (max(made[kind], key=lambda n: made[kind][n]["tokens_per_s"]) for kind in ("prefill", "decode"))
            rows.append([
                machine(r), f"`{place}`",
                cite(r, file, f"{at}.prefill.{prefill}.tokens_per_s", 0),
                cite(r, file, f"{at}.decode.1.tokens_per_s", 0),
                cite(r, file, f"{at}.decode.{decode}.tokens_per_s", 0),
                cite(r, file, "metrics.limit_tokens_per_s", 0),
                cite(r, file, f"{at}.peak_rss_mib", 0),
            ])  # fmt: skip
    note = "Tokens a second in llama.cpp; the limit is the bandwidth of a memory copy over the bytes that a token reads."
    head = ["file", "weights", "prefill, best", "decode, one sequence", "decode, best", "limit, one sequence", "memory, MiB"]
    return ["## Speed of GGUF files", "", note, "", *table(head, rows), *commands(found)]


def quantizer_speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    rates = ("limit_copy", "absmax_int4", "clip16_int3", "clip16_int4", "plain_clip16_int3")
    methods = ("wclip", "gptq", "gptq_refit")
    rows = [
        [
            machine(r),
            *(cite(r, file, f"metrics.grids.{name}", 2) for name in rates),
            cite(r, file, "metrics.layer.experts", 0),
            *(cite(r, file, f"metrics.layer.{name}.seconds", 1) for name in methods),
        ]
        for file, r in found
    ]
    note = "Data-free grids in billions of parameters a second, beside a copy; one MoE layer of calibrated rounding in seconds."
    head = ["machine", "copy", *(f"`{name}`" for name in rates[1:]), "experts of the layer", *(f"`{name}`" for name in methods)]
    return ["## Speed", "", note, "", *table(head, rows), *commands(found)]


def block_type_speed(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """The same layer encoded into block types of llama.cpp, one row a type."""
    rows = []
    for file, r in found:
        for kind in r["metrics"]["ggml"]:
            at = f"metrics.ggml.{kind}"
            cells = [cite(r, file, f"{at}.{method}.{path}", n) for method in ("nearest", "ldlq")
                     for path, n in (("mega_parameters_per_s", 0), ("seconds", 1))]  # fmt: skip
            rows.append([machine(r), f"`{kind}`", cite(r, file, "metrics.layer.experts", 0), *cells])
    note = "One MoE layer encoded: millions of parameters a second and seconds, to the nearest block and with error feedback."
    head = ["machine", "type", "experts", "nearest, M/s", "seconds", "feedback, M/s", "seconds"]
    return ["## Speed of block types", "", note, "", *table(head, rows), *commands(found)]


def memory_of(file: str, r: dict[str, Any], at: str) -> str:
    """What every process of a training run held of its GPU (of the host, without one)."""
    ranks = lookup(r, f"{at}.ranks")
    kinds = ["peak_rss_mib" if rank["peak_reserved_mib"] is None else "peak_reserved_mib" for rank in ranks]
    return ", ".join(cite(r, file, f"{at}.ranks.{i}.{kind}", 0) for i, kind in enumerate(kinds))


def quantize_rows(file: str, r: dict[str, Any]) -> list[list[str]]:
    rows = []
    for kind in ("data_free", "calibrated"):
        made = r["metrics"][kind]
        for name in (name for name in made if isinstance(made[name], dict)):
            at = f"metrics.{kind}.{name}"
            memory = ", ".join(cite(r, file, f"{at}.device_peak_mib.{gpu}", 0) for gpu in made[name]["device_peak_mib"] or ())
            equal = "" if name == "one" else "same bytes" if made["same_bytes"] else "other bytes"
            if not made.get("one_repeats_itself", True):
                equal += " (one GPU does not repeat itself)"
            rows.append([f"`{kind}` `{name}`", cite(r, file, f"{at}.gb_per_second", 2) + " GB/s", memory, equal])
    return rows


def distill_rows(file: str, r: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name in r["metrics"]["kl_after"]:
        rate = cite(r, file, f"metrics.{name}.tokens_per_second", 0) + " tokens/s"
        equal = f"KL {cite(r, file, f'metrics.kl_after.{name}', 4)}"
        if name != "one":
            steps = [cite(r, file, f"metrics.{path}", 0) for path in (f"apart.{name}.equal_steps", f"{name}.steps")]
            equal += f", {' of '.join(steps)} steps"
        rows.append([f"`{name}`", rate, memory_of(file, r, f"metrics.{name}"), equal])
    return rows


def train_rows(file: str, r: dict[str, Any]) -> list[list[str]]:
    slices = [f"metrics.slices.{layers}" for layers in r["metrics"].get("slices", {})] or ["metrics"]
    return [
        [f"{cite(r, file, f'{at}.layers', 0)} layers", cite(r, file, f"{at}.train.median_step_seconds", 2) + " s a step",
         memory_of(file, r, f"{at}.train"), ""] for at in slices
    ]  # fmt: skip


def answers_rows(file: str, r: dict[str, Any]) -> list[list[str]]:
    rows = []
    for way, made in r["metrics"].items():
        at = f"metrics.{way}"
        memory = ", ".join(cite(r, file, f"{at}.device_peak_mib.{i}", 0) for i in range(len(made.get("device_peak_mib", []))))
        equal = (
            f"{cite(r, file, f'{at}.equal_answers', 0)} of {cite(r, file, f'{at}.answers', 0)} answers"
            if "answers" in made
            else ""
        )
        rows.append([f"`{way}`", cite(r, file, f"{at}.tokens_per_second", 1) + " tokens/s", memory, equal])
    return rows


def vllm_rows(file: str, r: dict[str, Any]) -> list[list[str]]:
    """Answers of a trained model, then forced lengths: tokens a second with the prompt, for every batch size."""
    rows = []
    for n in r["metrics"]["questions"]:
        at = f"metrics.questions.{n}"
        counts = [cite(r, file, f"{at}.{path}", 0) for path in ("equal_answers", "answers")]
        rows.append([f"`razor-tiny` on `{n}`", "", "", f"{' of '.join(counts)} answers"])
    for n, made in r["metrics"]["forced"].items():
        at = f"metrics.forced.{n}"
        rates = [
            f"{cite(r, file, f'{at}.eval_speed.vllm.{batch}.tokens_per_s', 0)} at `{batch}`"
            for batch in made["eval_speed"]["vllm"]
        ]
        counts = [cite(r, file, f"{at}.{path}", 0) for path in ("same_tokens", "tokens")]
        rows.append([f"random weights on `{n}`", ", ".join(rates) + " tokens/s", "", f"{' of '.join(counts)} tokens"])
    return rows


SEVERAL = {
    "quantize": quantize_rows, "distill": distill_rows, "train35b": train_rows, "train122b": train_rows, "fit122b": train_rows,
    "eval": answers_rows, "eval35b": answers_rows, "vllm": vllm_rows,
}  # fmt: skip


def several_gpus(found: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """What runs on several GPUs beside the same on one."""
    rows = []
    for file, r in found:
        rows += [[machine(r), *row] for row in SEVERAL[r["tag"].removeprefix(MULTI_GPU)](file, r)]
    note = "Rates, the peak of every GPU's memory in MiB, and what equals the run on one GPU."
    return ["## Several GPUs", "", note, "", *table(["run", "of it", "rate", "memory", "equal"], rows), *commands(found)]


MULTI_GPU = "multi_gpu_"
ENGINES = ("hf", "vllm")
SPEEDS = (
    ("grids", quantizer_speed),
    ("ggml", block_type_speed),
    ("placements", gguf_speed),
    ("size_disk", disk_speed),
    ("size_layers", layer_speed),
    ("eval_speed", eval_speed),
)
SECTIONS = (
    ("eval", accuracy),
    ("compare", differences),
    ("kl", fidelity),
    ("spread", spreads),
    ("quantize", sizes),
    ("pack", packs),
    ("bench", speed),
    ("train", training),
    ("distill", recovery),
)


def page(directory: Path) -> str:
    lines = [HEADER]
    for kind, section in SECTIONS:
        if found := records(directory, kind):
            lines += section(found)
    if len(lines) == 1:
        lines.append("No run has been recorded yet.")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    args = parser.parse_args()
    with atomic_path(args.results / "RESULTS.md") as temporary:
        temporary.write_text(page(args.results), encoding="utf-8")
    print(f"wrote {args.results / 'RESULTS.md'}", flush=True)


if __name__ == "__main__":
    run_cli(main)
