"""What the pages show: each table is declared once here, and becomes Markdown (page_results) and HTML (page_report).

Not a command. A cell holds at most one figure and the place in a record that it is read from; check_results reads it again.
What does not fit into a row stays in the record.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from records import lookup, read_result, render

Record = dict[str, Any]
Found = Sequence[tuple[str, Record]]


def records(directory: Path, kind: str) -> list[tuple[str, Record]]:
    """(file relative to ``directory``, record) of a kind, by start time: the order in which they were made."""
    found = []
    for file in sorted(directory.glob("*/*.json")):
        record = read_result(file)
        if record["kind"] == kind:
            found.append((str(file.relative_to(directory)), record))
    return sorted(found, key=lambda item: item[1]["started"])


def method_of(record: Mapping[str, Any]) -> str:
    """The rounding of a quantize record as tables and pictures name it."""
    recipe, calibration = record["recipe"], record["metrics"].get("calibration") or {}
    name = "absmax" if recipe["clip_steps"] == 1 and recipe["method"] == "clip" else recipe["method"]
    if calibration.get("token_power"):
        name += ", tokens by gradient"
    if calibration.get("shrinkage"):
        name += ", shrunk moments"
    if recipe.get("experts"):
        return f"{name}, by signals"
    return f"{name}, by measured KL" if recipe.get("overrides") else name


def made_of(record: Mapping[str, Any], model: str = "razor-tiny") -> bool:
    """Whether a record is of this model, or of what was made of it; razor-tiny-vl has other tasks and texts."""
    return Path(record["model"]["path"]).name == model


def judge(r: Mapping[str, Any]) -> str:
    """Who judged a model, and what of a window it scored; records before 2026-11-29 do not say it themselves."""
    if r["kind"] == "spread" or "tool" in r["metrics"]:
        return str(r.get("judge", f"llama-perplexity, second halves of windows of {r.get('context', 512)}"))
    return str(r.get("judge", "transformers"))


def hardware(r: Record) -> str:
    """The GPUs of a record, equal ones counted, or its processor."""
    if not r["hardware"]["gpu"]:
        return r["hardware"]["cpu"]
    counts = Counter(r["hardware"]["gpu"].split(", "))
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def machine(r: Record) -> str:
    return f"{r['tag']} ({hardware(r)})"


# ---------------------------------------------------------------- cells and tables


@dataclass(frozen=True)
class Cell:
    """``source``: file#path of the figure that ``text`` is; without one it is a name. ``chip``: (word, kind, what it rests on)
    behind it. ``small``: lines under it, which HTML alone shows."""

    text: str
    source: str = ""
    small: tuple[str, ...] = ()
    chip: tuple[str, str, str] | None = None


BLANK = Cell("")


def cite(record: Record, file: str, path: str, decimals: int, unit: str = "", **more: Any) -> Cell:
    """The figure at ``path``; blank where the record has None there, as VRAM of a machine without a GPU."""
    value = lookup(record, path)
    return BLANK if value is None else Cell(render(value, decimals, unit), f"{file}#{path}", **more)


@dataclass(frozen=True)
class Section:
    """A table that is filled in, and the records of its rows."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    found: Found = ()


def markdown_cell(cell: Cell) -> str:
    shown = f"[{cell.text}]({cell.source})" if cell.source else f"`{cell.text}`" if cell.text else ""
    return f"{shown}, {cell.chip[0]}" if cell.chip else shown


def markdown(section: Section) -> list[str]:
    """Heading, note and table as lines."""
    cells = [section.head, ["---"] * len(section.head), *([markdown_cell(c) for c in row] for row in section.rows)]
    note = [section.note, ""] if section.note else []
    return [f"## {section.title}", "", *note, *("| " + " | ".join(row) + " |" for row in cells), ""]


Rows = Iterable[tuple[Sequence[str], Mapping[str, str]]]


def labelled(*texts: Callable[[Record], str]) -> Callable[[Record], Rows]:
    """One row a record."""
    return lambda r: [([text(r) for text in texts], {})]


def tag(r: Record) -> str:
    return r["tag"]


@dataclass(frozen=True)
class Table:
    """``rows``: (cells of text, places) of every row of a record, the cells under the heads ``labels``. ``columns``: (head,
    path in the record[, decimals or their place[, unit]]); {names} in a path are the row's places, {at} that of the table where
    it has none; of paths between "|" the first that has a value counts; "?" at the end: a row may lack it. ``wants``: which
    records of the kind have rows here."""

    kind: str
    title: str
    note: str
    labels: Sequence[str]
    columns: Sequence[tuple[Any, ...]]
    rows: Callable[[Record], Rows] = labelled(tag)
    wants: Callable[[Record], bool] = lambda record: True
    at: str = ""

    def section(self, found: Found) -> Section | None:
        chosen = [(file, record) for file, record in found if self.wants(record)]
        rows = [
            [
                *(Cell(text) for text in texts),
                *(figure(record, file, {"at": self.at} | dict(places), *column[1:]) for column in self.columns),
            ]
            for file, record in chosen
            for texts, places in self.rows(record)
        ]
        heads = [*self.labels, *(column[0] for column in self.columns)]
        return Section(self.title, self.note, heads, rows, chosen) if chosen else None


def figure(record: Record, file: str, places: Mapping[str, str], paths: str, decimals: int | str = 0, unit: str = "") -> Cell:
    path, _, others = paths.partition("|")
    try:
        digits = int(places[decimals]) if isinstance(decimals, str) else decimals
        cell = cite(record, file, path.removesuffix("?").format_map(places), digits, unit)
    except KeyError:
        if not others and not path.endswith("?"):
            raise
        cell = BLANK
    return figure(record, file, places, others, decimals, unit) if others and not cell.source else cell


def measures(key: str) -> Callable[[Record], bool]:
    return lambda record: key in record["metrics"]


def several(*parts: str) -> Callable[[Record], bool]:
    """Records of these parts of multi_gpu.sh."""
    return lambda record: record["tag"] in [f"multi_gpu_{part}" for part in parts]


# ---------------------------------------------------------------- benchmarks


def axes_of(found: Found) -> list[str]:
    return list(dict.fromkeys(name for _, record in found for name in record["metrics"]))


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f}"


def by_benchmark(
    title: str, note: str, found: Found, firsts: Mapping[str, Callable[[str, Record], Cell]],
    cell: Callable[[str, Record, str, Mapping[str, Any]], Cell],
) -> Section:  # fmt: skip
    """One row a record, one column a benchmark behind the ``firsts``; ``cell`` of what the record says of the benchmark."""
    axes, rows = axes_of(found), []
    for file, r in found:
        measured = [cell(file, r, axis, r["metrics"][axis]) if axis in r["metrics"] else BLANK for axis in axes]
        rows.append([*(first(file, r) for first in firsts.values()), *measured])
    return Section(title, note, [*firsts, *(f"`{axis}`" for axis in axes)], rows, found)


def accuracy(found: Found, gate: Callable[[Record, str], tuple[str, str, str] | None] = lambda r, axis: None) -> Section:
    """One row an evaluation. ``gate``: the chip of an axis."""

    def cell(file: str, r: Record, axis: str, m: Mapping[str, Any]) -> Cell:
        count = f"{m['n']} x {m['samples']}" if m.get("samples", 1) > 1 else f"{m['n']}"
        small = (f"{percent(m['acc_low'])} to {percent(m['acc_high'])}", f"n {count}, cut {percent(m['trunc'])} %")
        return cite(r, file, f"metrics.{axis}.acc", 1, " %", small=small, chip=gate(r, axis))

    note = (
        "Share of right answers; one that ran out of tokens is wrong. The record has the interval (Wilson; by item where an"
        " item was sampled several times), the items of each benchmark and the share that was cut."
    )
    items = {"items": lambda file, r: cite(r, file, f"metrics.{next(iter(r['metrics']))}.n", 0)}
    return by_benchmark("Accuracy", note, found, {"model": lambda file, r: Cell(r["tag"])} | items, cell)


def differences(found: Found) -> Section:
    """One row a comparison."""

    def models(file: str, r: Record) -> Cell:
        return Cell(f"{r['base']} -> {r['other']}", small=(f"teacher {r['teacher']}",) if r.get("teacher") else ())

    def cell(file: str, r: Record, axis: str, m: Mapping[str, Any]) -> Cell:
        kind = {"gain": "good", "loss": "bad"}.get(m["verdict"], "")
        detectable = "" if kind else f", detectable {percent(m['minimum_detectable'])}"
        interval = f"{100 * m['difference_low']:+.1f} to {100 * m['difference_high']:+.1f}{detectable}"
        small = (interval, f"lost {m['lost']}, won {m['won']}, p {m['p']:.2g}")
        return cite(r, file, f"metrics.{axis}.difference", 1, " %", small=small, chip=(m["verdict"], kind, ""))

    note = (
        "Change in accuracy from the first model to the second on the same items. A verdict is given only when the paired "
        "interval excludes zero and McNemar's exact p is below `0.05`."
    )
    return by_benchmark("Differences", note, found, {"models": models}, cell)


# ---------------------------------------------------------------- rows of more than one line or place


def pair_rows(r: Record) -> Rows:
    for name, made in r["metrics"]["pairs"].items():
        yield (made["other"], made["base"], made["judge"]), {"at": f"metrics.pairs.{name}"}


def spread_rows(r: Record) -> Rows:
    for key, name, digits in (("mean", "mean", "5"), ("p99", "percentile 99", "4"), ("p99_9", "percentile 99.9", "3")):
        yield (r["base_type"], judge(r), name), {"at": f"metrics.{key}", "digits": digits}


def family_rows(r: Record) -> Rows:
    for name in r["metrics"]["families"]:
        yield (name,), {"at": f"metrics.families.{name}", "digits": "6"}


def block_type_rows(r: Record) -> Rows:
    for kind in r["metrics"]["ggml"]:
        yield (machine(r), kind), {"at": f"metrics.ggml.{kind}"}


def placement_rows(r: Record) -> Rows:
    """The best batch of the prompt and the best number of sequences stand for the others."""
    for place, made in r["metrics"]["placements"].items():
        best = {kind: max(made[kind], key=lambda n: made[kind][n]["tokens_per_s"]) for kind in ("prefill", "decode")}
        yield (machine(r), place), {"at": f"metrics.placements.{place}"} | best


def shards(r: Record) -> str:
    """A machine, and its devices, each named once for each shard at work."""
    devices = r["metrics"]["size_disk"]["quantize"].get("devices", "")
    return f"{machine(r)} {devices}" if "," in devices else machine(r)


def capped_rows(r: Record) -> Rows:
    for place, run in enumerate(r["metrics"]["size_memory"]["runs"]):
        yield (machine(r), run["method"], f"{run['cap_gib']:g}"), {"at": f"metrics.size_memory.runs.{place}"}


def engine_rows(r: Record) -> Rows:
    at, made = "metrics.eval_speed", r["metrics"]["eval_speed"]
    for engine in (name for name in ("hf", "vllm") if name in made):
        places = {"at": at} | ({"gpus": f"{at}.tensor_parallel"} if engine == "vllm" else {})
        for batch in made[engine]:
            yield (machine(r), engine, batch), places | {"batch": f"{at}.{engine}.{batch}"}


def fullest(r: Record, at: str) -> dict[str, str]:
    """The place of the GPU that took the most memory, or of the process that held the most of its GPU or of the host."""
    made = lookup(r, at)
    peaks = made.get("device_peak_mib") or {}
    named = peaks.items() if isinstance(peaks, dict) else enumerate(peaks)
    sizes = {f"device_peak_mib.{name}": size for name, size in named}
    for number, rank in enumerate(made.get("ranks", ())):
        kind = "peak_rss_mib" if rank["peak_reserved_mib"] is None else "peak_reserved_mib"
        sizes[f"ranks.{number}.{kind}"] = rank[kind]
    return {"memory": f"{at}.{max(sizes, key=lambda place: (sizes[place], place))}"} if sizes else {}


def several_quantize_rows(r: Record) -> Rows:
    for kind in ("data_free", "calibrated"):
        made = r["metrics"][kind]
        for name in (name for name in made if isinstance(made[name], dict)):
            equal = "" if name == "one" else "same bytes" if made["same_bytes"] else "other bytes"
            if not made.get("one_repeats_itself", True):
                equal += " (one GPU does not repeat itself)"
            at = f"metrics.{kind}.{name}"
            yield (machine(r), f"{kind} {name}", equal), {"at": at} | fullest(r, at)


def several_distill_rows(r: Record) -> Rows:
    for name in r["metrics"]["kl_after"]:
        at = f"metrics.{name}"
        places = {"at": at, "kl": f"metrics.kl_after.{name}"} | fullest(r, at)
        yield (machine(r), name), places | ({} if name == "one" else {"equal": f"metrics.apart.{name}", "steps": at})


def several_train_rows(r: Record) -> Rows:
    for at in [f"metrics.slices.{layers}" for layers in r["metrics"].get("slices", {})] or ["metrics"]:
        yield (machine(r),), {"at": at} | fullest(r, f"{at}.train")


def stratum_rows(r: Record) -> Rows:
    for split, strata in r["metrics"]["strata"].items():
        for stratum in strata:
            yield (split, stratum.replace("_", " ")), {"at": f"metrics.strata.{split}.{stratum}"}


def panel_rows(r: Record) -> Rows:
    for stratum in r["metrics"]["strata"]:
        yield (tag(r), stratum.replace("_", " ")), {"at": f"metrics.strata.{stratum}"}


def heldout_rows(r: Record) -> Rows:
    for stratum in r["metrics"]["heldout"]:
        yield (tag(r), stratum.replace("_", " ")), {"at": f"metrics.heldout.{stratum}"}


def several_answer_rows(r: Record) -> Rows:
    for at in (f"metrics.{way}" for way in r["metrics"]):
        yield (machine(r), at.removeprefix("metrics.")), {"at": at} | fullest(r, at)


def several_vllm_rows(r: Record) -> Rows:
    """Answers of a trained model, then forced lengths: every batch size, and the tokens that are equal in all of them."""
    for n in r["metrics"]["questions"]:
        at = f"metrics.questions.{n}"
        yield (machine(r), "razor-tiny, answers", n, ""), {"equal": f"{at}.equal_answers", "of": f"{at}.answers"}
    for n, made in r["metrics"]["forced"].items():
        at = f"metrics.forced.{n}"
        for batch in made["eval_speed"]["vllm"]:
            rate = f"{at}.eval_speed.vllm.{batch}.tokens_per_s"
            yield (machine(r), "random weights, tokens", n, batch), {"rate": rate}
        yield (machine(r), "random weights, tokens", n, "all"), {"equal": f"{at}.same_tokens", "of": f"{at}.tokens"}


def text_rows(r: Record) -> Rows:
    """The models of a record; of one without any its reference."""
    places = [f"metrics.models.{number}" for number in range(len(r["metrics"]["models"]))] or ["metrics.reference"]
    for at in places:
        name = Path(lookup(r, at)["model"]["path"]).name
        label = r["tag"] if len(places) == 1 else f"{r['tag']}: {name}"
        half = f", second halves of windows of {r['data'][0]['window']}" if r["data"][0].get("scored") == "half" else ""
        yield (label, lookup(r, at).get("judge", f"transformers{half}")), {"at": at, "all": f"{at}.strata.all"}


def published(r: Record) -> bool:
    """Whether a text record is of the model that others trained (make_tiny.sh smollm2)."""
    return r["tag"].startswith("smollm2_")


CELL = "recovery_recipe_"


def learned(r: Record) -> str:
    """The loss and whose texts it is of, of a recovery; records before 2026-11-29 name one loss."""
    made = r["settings"]
    sources = [whose for whose in ("teacher", "student") if made["trajectories"] in (whose, "mixture")]
    return "; ".join(f"{made.get('loss') or made[f'{whose}_loss']}, {whose}" for whose in sources)


def recovery_cells(found: Found) -> Section | None:
    """One row what was trained and whose texts with which loss, columns by seed; what stood before by its warm start."""
    rows: dict[tuple[str, str], dict[int, tuple[str, Record]]] = {}
    chosen = [(file, r) for file, r in found if r["tag"].startswith(CELL)]
    for file, r in chosen:
        cell = "warm start: " * r["tag"].endswith("_warm") + learned(r)
        rows.setdefault((r["tag"].removeprefix(CELL).partition("_")[0], cell), {})[r["settings"]["seed"]] = file, r
    seeds = sorted({seed for own in rows.values() for seed in own})
    paths = {"in answers": "metrics.kl_answer_after", "all": "metrics.kl_after.mean"}
    cells = [
        [*map(Cell, key), *(cite(own[seed][1], own[seed][0], path, 5) if seed in own else BLANK
                            for path in paths.values() for seed in seeds)]
        for key, own in sorted(rows.items())
    ]  # fmt: skip
    note = "KL to the unquantized model after as many steps from one warm start, in answers and over all positions, by seed."
    heads = ["trained", "loss, texts", *(f"{name}, `{seed}`" for name in paths for seed in seeds)]
    return Section("Recovery: whose texts with which loss", note, heads, cells, chosen) if chosen else None


def text_pair_rows(r: Record) -> Rows:
    for name, made in r["metrics"]["pairs"].items():
        yield (r["tag"].removesuffix("_pairs"), f"{name} / {made['base']}"), {"at": f"metrics.pairs.{name}"}


# ---------------------------------------------------------------- the tables, by kind of record

TEXT_COLUMNS = (
    ("bytes", "metrics.bytes?"), ("positions", "{all}.positions"), ("mean KL", "{all}.mean?", 5),
    ("standard error", "{all}.standard_error?", 5), ("percentile `99.9`", "{all}.p99_9?", 4),
    ("perplexity", "{all}.ppl", 3), ("continuation", "{at}.tasks.continuation.accuracy?", 1, " %"),
    ("recall", "{at}.tasks.recall.accuracy?", 1, " %"), ("closing line", "{at}.tasks.closing.accuracy?", 1, " %"),
    ("items", "{at}.tasks.continuation.items?"),
)  # fmt: skip
MEMORY = ("memory of the fullest GPU, MiB", "{memory}?")
TABLES = (
    Table(
        "kl", "Fidelity",
        "KL divergence to the unquantized model over the whole vocabulary, in nats, on held-out transcripts. Where `95` % "
        "bounds stand, they and the standard errors are by bootstrap over transcripts; a GGUF is judged as what it decodes to.",
        ("model", "judge"), (
            ("positions", "metrics.tokens?"), ("perplexity", "metrics.ppl", 4), ("mean KL", "metrics.kl.mean?", 5),
            ("from", "metrics.kl.low?", 5), ("to", "metrics.kl.high?", 5),
            ("standard error", "metrics.kl.standard_error?", 5), ("median", "metrics.kl.median?", 8),
            ("percentile `99`", "metrics.kl.p99?", 4), ("percentile `99.9`", "metrics.kl.p99_9?", 4),
            ("its error", "metrics.kl.p99_9_error?", 4), ("same top token", "metrics.kl.top1?", 2, " %"),
        ), labelled(tag, judge), lambda record: not {"tool", "pairs"} & record["metrics"].keys(),
    ),
    Table(
        "kl", "Fidelity, in pairs",
        "Mean KL of one model over that of another on the same transcripts, and their difference; bounds of the `95` % "
        "intervals by bootstrap over transcripts, both in the same samples.",
        ("model", "beside", "judge"), (
            ("ratio of KL", "{at}.ratio?", 3), ("from", "{at}.ratio_low?", 3), ("to", "{at}.ratio_high?", 3),
            ("difference", "{at}.difference", 6), ("from", "{at}.difference_low", 6), ("to", "{at}.difference_high", 6),
            ("positions", "{at}.positions"), ("transcripts", "{at}.documents"),
        ), pair_rows, measures("pairs"),
    ),
    Table(
        "kl", "Fidelity where the original is certain, and where it is not",
        "Mean KL by the probability that the original gives its likeliest token, and the share of all KL that falls there.",
        ("model", "judge"), tuple(
            column
            for low, head in (("0", "below `0.5`"), ("0_5", "`0.5` to `0.9`"), ("0_9", "`0.9` to `0.99`"),
                              ("0_99", "`0.99` to `0.999`"), ("0_999", "above"))
            for column in ((head, f"metrics.confidence.from_{low}.mean?", 6),
                           ("share", f"metrics.confidence.from_{low}.share?", 1, " %"))
        ), labelled(tag, judge), measures("confidence"),
    ),
    Table(
        "kl", "Fidelity of GGUF files in llama.cpp",
        "KL of GGUF files to the unquantized model by `llama-perplexity`, and by our own reading of the same logits. Only the "
        "second half of each window is scored: text that begins in the middle, where files differ most, is hidden.",
        ("file", "judge"), (
            ("positions", "metrics.kl.positions"),
            ("mean KL", "metrics.tool.mean", 5), ("error", "metrics.tool.mean_error", 5),
            ("percentile `99`", "metrics.tool.p99", 4), ("percentile `99.9`", "metrics.tool.p99_9", 4),
            ("same top token", "metrics.tool.top1", 2, " %"), ("ours: mean", "metrics.kl.mean", 5),
            ("ours: `99.9`", "metrics.kl.p99_9", 4),
        ), labelled(tag, judge), measures("tool"),
    ),
    Table(
        "spread", "Fidelity over calibration texts",
        "The same over several calibration texts, each seen by both: mean and standard deviation of the KL over the texts, and "
        "our share of llama-quantize's (geometric mean, `95` % interval of Student).",
        ("type", "judge", "of the KL"), (
            ("texts", "texts"), ("llama-quantize", "{at}.llama.mean", "digits"),
            ("deviation", "{at}.llama.deviation", "digits"), ("ours", "{at}.ours.mean", "digits"),
            ("deviation", "{at}.ours.deviation", "digits"), ("share", "{at}.ratio", 2),
            ("from", "{at}.ratio_low", 2), ("to", "{at}.ratio_high", 2),
        ), spread_rows,
    ),
    Table(
        "quantize", "Sizes",
        "Bytes if packed; bits of the quantized tensors without and with their scales, and of the whole model.",
        ("model", "method"), (
            ("packed", "metrics.container.bytes|metrics.packed_bytes", 2, " MB"), ("weight bits", "metrics.weight_bits", 2),
            ("stored bits", "metrics.stored_bits", 2), ("overall", "metrics.overall_bits", 2),
        ), labelled(tag, method_of),
    ),
    Table(
        "pack", "GGUF files", "", ("file", "method", "base type"), (
            ("size", "metrics.file_bytes", 3, " MB"), ("bits a weight", "metrics.bits_per_weight", 3), ("seconds", "seconds"),
        ), labelled(tag, lambda r: r["recipe"]["method"], lambda r: r["recipe"]["base_type"]),
    ),
    Table(
        "bench", "Families of checkpoints",
        "Tiny untrained checkpoints at `8` bits: mean KL to the original on `2,000` positions; seconds of all that was tried.",
        ("family",), (
            ("KL, clip", "{at}.clip.kl_mean", "digits"), ("KL, gptq", "{at}.gptq.kl_mean", "digits"),
            ("tensors quantized", "{at}.clip.tensors"), ("layers with experts", "{at}.router.layers"),
            ("seconds", "{at}.seconds", 1),
        ), family_rows, measures("families"),
    ),
    Table(
        "bench", "Speed",
        "Data-free grids in billions of parameters a second, beside a copy; one MoE layer of calibrated rounding in seconds.",
        ("machine",), (
            ("copy", "metrics.grids.limit_copy", 2), ("`absmax_int4`", "metrics.grids.absmax_int4", 2),
            ("`clip16_int3`", "metrics.grids.clip16_int3", 2), ("`clip16_int4`", "metrics.grids.clip16_int4", 2),
            ("`plain_clip16_int3`", "metrics.grids.plain_clip16_int3", 2), ("experts of the layer", "metrics.layer.experts"),
            ("`wclip`", "metrics.layer.wclip.seconds", 1), ("`gptq`", "metrics.layer.gptq.seconds", 1),
            ("`gptq_refit`", "metrics.layer.gptq_refit.seconds", 1),
        ), labelled(machine), measures("grids"),
    ),
    Table(
        "bench", "Speed of block types",
        "One MoE layer encoded: millions of parameters a second and seconds, to the nearest block and with error feedback.",
        ("machine", "type"), (
            ("experts", "metrics.layer.experts"), ("nearest, M/s", "{at}.nearest.mega_parameters_per_s"),
            ("seconds", "{at}.nearest.seconds", 1), ("feedback, M/s", "{at}.ldlq.mega_parameters_per_s"),
            ("seconds", "{at}.ldlq.seconds", 1),
        ), block_type_rows, measures("ggml"),
    ),
    Table(
        "bench", "Speed of GGUF files",
        "Tokens a second in llama.cpp; the limit is the bandwidth of a memory copy over the bytes that a token reads.",
        ("file", "weights"), (
            ("prefill, best", "{at}.prefill.{prefill}.tokens_per_s"), ("decode, one sequence", "{at}.decode.1.tokens_per_s"),
            ("decode, best", "{at}.decode.{decode}.tokens_per_s"), ("limit, one sequence", "metrics.limit_tokens_per_s"),
            ("memory, MiB", "{at}.peak_rss_mib"),
        ), placement_rows, measures("placements"),
    ),
    Table(
        "bench", "Data-free quantization at full size",
        "Quantized from disk to disk, bytes a second in (and as many out), beside a plain copy and reading alone on that disk. "
        "A device is named once for each shard at work. Peaks in MiB; the last columns are the whole model at that rate.",
        ("run",), (
            ("size", "{at}.quantize.bytes", 1, " GB"), ("a second", "{at}.bytes_in_per_s", 2, " GB"),
            ("copy", "{at}.disk.copy", 2, " GB"), ("share", "{at}.share_of_copy", 0, " %"),
            ("read", "{at}.disk.read", 2, " GB"), ("share", "{at}.share_of_read", 0, " %"),
            ("memory", "{at}.quantize.peak_rss_mib"), ("VRAM", "{at}.quantize.peak_vram_mib"),
            ("layers", "{at}.whole.layers"), ("seconds for all", "{at}.whole.seconds"),
        ), labelled(shards), measures("size_disk"), "metrics.size_disk",
    ),
    Table(
        "bench", "Straight from the hub",
        "Data-free quantization from a server of the hub's interface whose rate is limited: how fast the shards came, and what "
        "lies on disk beside the output.",
        ("run",), (
            ("size", "{at}.bytes", 1, " MB"), ("limit", "{at}.limit", 1, " MB"), ("a second", "{at}.bytes_per_s", 1, " MB"),
            ("share", "{at}.share", 1, " %"), ("on disk", "{at}.kept_bytes", 2, " MB"),
        ), labelled(tag), measures("hub"), "metrics.hub",
    ),
    Table(
        "bench", "Calibrated quantization at full size",
        "Calibrated passes on layers of full size: seconds of the slowest layer, and of its rounding alone; peaks in MiB.",
        ("run", "method"), (
            ("tokens", "{at}.tokens"), ("seconds a layer", "{at}.worst_layer_seconds", 1),
            ("rounding", "{at}.worst_rounding_seconds?", 1), ("memory", "{at}.peak_rss_mib"), ("VRAM", "{at}.peak_vram_mib"),
            ("layers", "{at}.whole.layers?"), ("seconds for all", "{at}.whole.seconds?"),
        ), labelled(machine, lambda r: r["metrics"]["size_layers"]["method"]), measures("size_layers"), "metrics.size_layers",
    ),
    Table(
        "bench", "Calibrated quantization under a cap on the GPU's memory",
        "Calibrated passes on layers of full size in one process whose memory is capped, and one batch of the tokens' weighing "
        "(`weights`): seconds, peaks in MiB of tensors and as planned before the run.",
        ("run", "method", "cap, GiB"), (
            ("seconds", "{at}.seconds?", 1), ("VRAM", "{at}.peak_vram_mib?"), ("planned", "{at}.planned_mib?"),
            ("memory", "{at}.peak_rss_mib"),
        ), capped_rows, measures("size_memory"),
    ),
    Table(
        "bench", "Speed of evaluation",
        "Tokens a second at forced lengths, through transformers (`hf`) or vLLM on so many GPUs: with the prompt, decoding, "
        "and what the memory's bandwidth allows.",
        ("run", "engine", "batch"), (
            ("GPUs", "{gpus}?"), ("parameters", "{at}.parameters"), ("with the prompt", "{batch}.tokens_per_s"),
            ("decoding", "{batch}.decode_tokens_per_s"), ("limit", "{batch}.limit_decode_tokens_per_s"),
        ), engine_rows, measures("eval_speed"),
    ),
    Table(
        "bench", "Quantization on several GPUs", "What one, several threads and several GPUs make.",
        ("run", "pass", "beside one"), (("GB a second", "{at}.gb_per_second", 2), MEMORY),
        several_quantize_rows, several("quantize"),
    ),
    Table(
        "bench", "Distillation on several GPUs",
        "One recovery by one process, again, and by several from the same rollouts; the steps that are those of the first.",
        ("run", "processes"), (
            ("tokens a second", "{at}.tokens_per_second"), MEMORY, ("KL after", "{kl}", 4),
            ("equal steps", "{equal}.equal_steps?"), ("of", "{steps}.steps?"),
        ), several_distill_rows, several("distill"),
    ),
    Table(
        "bench", "Training of large shapes on several GPUs", "Phase C on synthetic weights.",
        ("run",), (("layers", "{at}.layers"), ("seconds a step", "{at}.train.median_step_seconds", 2), MEMORY),
        several_train_rows, several("train35b", "train122b", "fit122b"),
    ),
    Table(
        "bench", "Answers on several GPUs", "Greedy answers in transformers, and how many of them are those of one GPU.",
        ("run", "way"), (
            ("tokens a second", "{at}.tokens_per_second", 1), MEMORY, ("equal answers", "{at}.equal_answers?"),
            ("of", "{at}.answers?"),
        ), several_answer_rows, several("eval", "eval35b"),
    ),
    Table(
        "bench", "vLLM on several GPUs", "Tokens a second with the prompt, and what equals the run on one GPU.",
        ("run", "of it", "GPUs", "batch"), (("tokens a second", "{rate}?"), ("equal", "{equal}?"), ("of", "{of}?")),
        several_vllm_rows, several("vllm"),
    ),
    Table(
        "train", "Text", "Real text from pinned packages, by split; none is in two. Documents as they are after cleaning.",
        ("split", "stratum"), (
            ("documents", "{at}.documents"), ("size", "{at}.bytes", 1, " MB"), ("tokens", "{at}.tokens"),
        ), stratum_rows, measures("strata"),
    ),
    Table(
        "text", "Models of real text",
        "KL to the original over the whole vocabulary, in nats, and perplexity on held-out text, equal shares of five strata "
        "(the record has each of them); standard errors by bootstrap over documents. Tasks of four choices: the true "
        "continuation, recall of facts of the training text, the line that closes a block. `cN`: calibration text N.",
        ("model", "judge"), TEXT_COLUMNS, text_rows, lambda record: "models" in record["metrics"] and not published(record),
    ),
    Table(
        "text", "A published model of real text",
        "The same of SmolLM2-135M-Instruct (dense, its embedding is the head too; groups of `64`), on held-out text and "
        "(`_wiki`) the test file of `WikiText-2` in windows of `512`, second halves. Its weights lie on a `4`-bit grid already "
        "(Q4_1, the embedding Q8_0), which flatters int4 and types of `4` bits. `_kept`: the embedding in BF16. Of a GGUF only "
        "`ffn_down` has the type of the row's name; other rows are `576` long, no multiple of `256`, and get iq4_nl for "
        "IQ3_XXS and q5_0 for Q4_K, from llama-quantize and from us.",
        ("model", "judge"), TEXT_COLUMNS, text_rows, lambda record: "models" in record["metrics"] and published(record),
    ),
    Table(
        "text", "Models of real text, in pairs",
        "Mean KL of one row over that of another of the same grid or type, over the calibration texts that both have, on the "
        "same documents; bounds of the `95` % interval by bootstrap over them.",
        ("model", "rows"), (
            ("ratio of KL", "{at}.kl.ratio", 3), ("low", "{at}.kl.ratio_low", 3), ("high", "{at}.kl.ratio_high", 3),
            ("bytes", "{at}.bytes"), ("bytes of the other", "{at}.base_bytes"), ("documents", "{at}.kl.documents"),
        ), text_pair_rows, lambda record: "models" not in record["metrics"],
    ),
    Table(
        "panel", "On the panel",
        "KL to the original on frozen tokens, in nats: second halves of windows, with the `95` % interval by bootstrap over "
        "windows; flips: tokens that one has right and the other wrong. Floor: the KL of the original with noise of BF16's "
        "size behind every layer, or of its BF16 GGUF; what is not above it is no finding.",
        ("model", "stratum"), (
            ("positions", "{at}.positions"), ("KL", "{at}.mean", 6), ("low", "{at}.low", 6), ("high", "{at}.high", 6),
            ("median", "{at}.median", 7), ("`99` %", "{at}.p99", 4), ("`99.9` %", "{at}.p99_9", 4),
            ("top-`1`", "{at}.top1", 2, " %"), ("flips", "{at}.flips", 2, " %"), ("floor", "{at}.floor", 7),
        ), panel_rows,
    ),
    Table(
        "train", "Training", "", ("model",), (
            ("parameters", "metrics.parameters"), ("tokens or pictures", "metrics.tokens|metrics.pictures"),
            ("seconds", "seconds"), ("final loss", "metrics.final_loss", 3),
        ), wants=measures("parameters"),
    ),
    Table(
        "train", "Loss on held-out text", "Cross-entropy in nats a token, after training.", ("model", "stratum"),
        (("positions", "{at}.positions"), ("loss", "{at}.loss", 3)), heldout_rows, measures("heldout"),
    ),
    Table(
        "distill", "Recovery",
        "KL to the unquantized model in nats before and after, at the same bytes; memory of the training's GPU or process.",
        ("run", "loss, texts"), (
            ("steps", "settings.steps"), ("rollouts", "metrics.rollouts.kept.samples"),
            ("KL before", "metrics.kl_before.mean", 5), ("KL after", "metrics.kl_after.mean", 5),
            ("removed", "metrics.kl_removed", 1, " %"),
            ("in answers before", "metrics.kl_answer_before", 5), ("after", "metrics.kl_answer_after", 5),
            ("seconds of training", "{at}.seconds"), ("MiB", "{at}.peak_vram_mib|{at}.peak_rss_mib"),
        ), labelled(machine, learned), lambda r: not r["tag"].startswith(CELL), "metrics.phases.opd_train",
    ),
)  # fmt: skip


def sections(directory: Path, accuracy_of: Callable[[Found], Section] = accuracy) -> list[Section]:
    """All tables of the records of a directory; one without records is left out. ``accuracy_of``: the first of them."""
    found = {kind: records(directory, kind) for kind in ("eval", "compare", *dict.fromkeys(table.kind for table in TABLES))}
    made = [table(found[kind]) for kind, table in (("eval", accuracy_of), ("compare", differences)) if found[kind]]
    more = [recovery_cells(found["distill"])]
    return made + [section for section in [*(table.section(found[table.kind]) for table in TABLES), *more] if section]


# ---------------------------------------------------------------- what makes a record from nothing

# By kind and tag; the first pattern that fits. tests/test_reproduce.py runs each without its computations, but for those that
# only the tree of an earlier commit makes.
BEFORE = "results.sh study size, at commit 287b028"  # sensitivities by clip search of the experts alone, and signals
PIPELINES = (
    (
        "text/smollm2_*",
        "study_text.sh --model work/smollm2 --text work/text --work work/study-smollm2 --file ../shared/data/wiki.test.raw "
        "--group 64",
    ),
    ("text/*", "study_text.sh --model models/text-35m --text work/text --work work/study-35m"),
    ("train/razor_tiny", "make_tiny.sh"),
    ("train/razor_tiny_vl", "make_tiny.sh vl"),
    ("train/razor_tiny_mtp", "make_tiny.sh mtp"),
    ("train/text", "make_text.sh --result results/train/text.json --tag text"),
    *((f"train/text_{name}", f"make_tiny.sh text {name}") for name in ("35m", "e64", "e128", "e256", "dense")),
    ("distill/opd_tiny", "distill.sh"),
    ("bench/*_memory", "bench.sh memory"),
    ("bench/h200_*_memory_ldlq", "bench.sh memory ldlq h200"),
    ("bench/razor_tiny_mtp_*", "bench.sh mtp"),
    *(
        (f"bench/{name}", f"bench_decode.sh results/bench/{name}.json")
        for name in ("h100_122b_decoding", "h200_122b_decoding_settings")
    ),
    ("bench/h100_122b_*", "bench.sh h100"),
    ("bench/multi_gpu_fit122b", "multi_gpu.sh fit122b"),
    ("bench/multi_gpu_eval35b", "multi_gpu.sh eval35b"),
    ("bench/multi_gpu_vllm", "multi_gpu.sh vllm"),
    ("bench/multi_gpu_servers", "multi_gpu.sh servers"),
    ("bench/multi_gpu_*", "multi_gpu.sh"),
    ("bench/families", "bench.sh families --result results/bench/families.json --tag families"),
    ("bench/hub", "bench.sh hub --model models/razor-tiny --work work/hub --result results/bench/hub.json --tag hub"),
    ("bench/h100", "bench.sh --result results/bench/h100.json --tag h100"),
    ("bench/h200", "bench.sh --result results/bench/h200.json --tag h200"),
    ("*/razor_tiny_vl_*", "results.sh vl"),
    ("*/razor_tiny_vllm_*", "results.sh packed"),
    ("quantize/razor_tiny_*_packed", "results.sh packed"),
    ("spread/razor_tiny_gguf_*", "results.sh spread"),
    ("panel/razor_tiny_*", "results.sh panel"),
    ("*/*razor_tiny_gguf_*", "results.sh gguf"),
    ("*/*recovery_gguf_iq2_xs_*", "recovery.sh gguf"),
    ("eval/recovery_iq2_xs_*", "recovery.sh gguf"),
    ("compare/recovery_iq2_xs_*", "recovery.sh gguf"),
    ("*/recovery_*", "recovery.sh"),
    ("kl/razor_tiny_pairs", "results.sh tiny study gguf size"),
    ("*/razor_tiny_bf16", "results.sh tiny"),
    ("*/*razor_tiny_int4", "results.sh tiny"),
    ("*/*razor_tiny_int3_int4_clip16", "results.sh tiny"),
    ("*/*razor_tiny_int[23]_int4_absmax", "results.sh tiny"),
    ("*/razor_tiny_int3_int4_g[12]*_gptq_refit", "results.sh size"),
    ("*/razor_tiny_int2.75layers_*", BEFORE),
    ("*/razor_tiny_int*mix_*", BEFORE),
    ("*/razor_tiny_int3[acfirw]*", BEFORE),
    ("probe/razor_tiny_allocation*", BEFORE),
    ("*/*razor_tiny_int*", "results.sh study"),
    ("*/*razor_tiny_budget*", "results.sh study"),
)


def pipeline_of(record: Mapping[str, Any]) -> str | None:
    """The pipeline that makes a record from nothing, with its arguments; None for one that was made by hand."""
    name = f"{record['kind']}/{record['tag']}"
    return next((pipeline for pattern, pipeline in PIPELINES if fnmatch.fnmatchcase(name, pattern)), None)
