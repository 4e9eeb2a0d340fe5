"""configs/eval.env: which family a model belongs to, how its vendor samples, what its vendor published, and the gate by it.

Not a command. `bash pipelines/eval.sh` reads it on every run; EVAL_CONFIG=FILE takes another file. The gate judges an accuracy
beside the published one; a quantized model has the status that its unquantized original reached with the same sampling.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from backend import Sampling
from checkpoint import model_name
from console import UserError, read_json
from families import text_config
from intervals import effective_answers, wilson
from recipe import RECIPE_FILE
from records import REPO, is_original, read_result
from settings import convert, read_env_file

DRAW = {"temperature": float, "top_p": float, "top_k": int}
GATE = {"GATE_POINTS": "points", "GATE_SHOWN": "shown", "GATE_WIDTH": "width"}
GROUPS = {"mmmu_pro": ("mmmu_pro_standard", "mmmu_pro_vision")}  # the published score is the mean of the two
GATED, NOT_GATED, NO_TARGET = "gated", "not gated", "no target"
POWER, MOST_ITEMS = 0.8, 1_000_000  # the usual power of a test; a search for the items that it needs ends here
# Words that say how weights are stored; any other makes it another model.
FORMAT_WORD = re.compile(
    r"gguf|bf16|f16|fp16|fp8|mxfp4|nvfp4|awq|gptq|w\d+a\d+|int\d+|int\d\w*|i?q\d\w*|ud|[kxsml]|xxs|xs|nl|packed|clip\d*|absmax|refit|"
    r"wclip|tokens|mixed|wfro|dequant|quantized|mtp|\d{5}|of"
)
SAME_SAMPLING = ("temperature", "top_p", "top_k", "max_tokens")


@dataclass(frozen=True)
class GateRules:
    """Percentage points: nearness of the accuracy to the target, slack of the interval, greatest width of the interval."""

    points: float = 2.0
    shown: float = 1.0
    width: float = 20.0


@dataclass(frozen=True)
class EvalSettings:
    """``families``: {name: {key of the text config: value}}; ``names``: {family: what its vendor calls the model}, of those
    whose shape others share; ``sampling``: {family or model_type: {temperature, ...}};
    ``targets``: {family: {benchmark: percent}}. Names of families and model types are upper case, of benchmarks lower."""

    families: Mapping[str, Mapping[str, str]]
    names: Mapping[str, str]
    sampling: Mapping[str, Mapping[str, float]]
    targets: Mapping[str, Mapping[str, float]]
    gate: GateRules
    source: str

    def shaped_as(self, config: Mapping[str, Any]) -> str | None:
        """The family whose every key the text part of config.json has; None when there is none."""
        text = text_config(config)
        for name, shape in self.families.items():
            if all(str(text.get(key)) == value for key, value in shape.items()):
                return name
        return None

    def family_of(self, config: Mapping[str, Any], called: Sequence[str]) -> str | None:
        """The family of a model of this config.json that is ``called`` so: of the same shape, and where others share that
        (another generation, a base model, a fine-tune) of the vendor's name, of which only the format may differ."""
        family = self.shaped_as(config)
        vendor = self.names.get(family or "")
        return family if vendor is None or any(is_named(name, vendor) for name in called) else None

    def sampling_for(self, family: str | None, config: Mapping[str, Any]) -> tuple[dict[str, float], str]:
        """(keys of Sampling that the vendor recommends, where that stands) for a model; greedy when nothing is known."""
        model_type = str(text_config(config).get("model_type", "")).upper()
        for name in (family or "", model_type):
            if name in self.sampling:
                return dict(self.sampling[name]), f"{self.source}: SAMPLING__{name}"
        return {}, f"greedy: {self.source} has no SAMPLING__{model_type}"

    def check_family(self, name: str) -> str | None:
        """A family named on the command line; "none" is no family."""
        if name.lower() == "none":
            return None
        if name.upper() not in self.families:
            raise UserError(f"--family {name}: known are {', '.join(self.families)} and none ({self.source})")
        return name.upper()


def is_named(name: str, vendor: str) -> bool:
    """Whether a model's name is the vendor's, or that with words for the format of its weights (-FP8, -int3_int4_clip)."""
    found = re.fullmatch(rf"{re.escape(vendor)}((?:[-_.][a-z0-9]+)*)", name, re.IGNORECASE)
    return bool(found) and all(FORMAT_WORD.fullmatch(word.lower()) for word in re.split("[-_.]", found[1])[1:])


def names_of(model: str | Path) -> list[str]:
    """What a model is called: by its directory or file, and what it was made of by the recipe.json beside it."""
    path = Path(model)
    path = path if path.is_absolute() else REPO / path
    recipe = (path if path.is_dir() else path.parent) / RECIPE_FILE
    made = read_json(recipe) if recipe.is_file() else {}
    source = made.get("source") if isinstance(made, dict) else None
    own = model_name(path) if path.is_dir() else path.stem
    return [own, *([str(source["name"])] if isinstance(source, dict) and source.get("name") else [])]


def pairs(value: str, where: str) -> dict[str, str]:
    """`a=1 b=2` as a dictionary."""
    found = [part.partition("=") for part in value.split()]
    if not found or any(not equals or not key or not given for key, equals, given in found):
        raise UserError(f"{where}: expected key=value pairs, found {value!r}")
    return {key: given for key, _, given in found}


def drawing(value: str, where: str) -> dict[str, float]:
    """Sampling keys of one line, converted and checked."""
    given = pairs(value, where)
    if unknown := sorted(set(given) - set(DRAW)):
        raise UserError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(DRAW)}")
    made = {key: convert(text, DRAW[key], f"{where}: {key}") for key, text in given.items()}
    check_sampling(Sampling(**made), where)
    return made


def check_sampling(sampling: Sampling, where: str) -> None:
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0:
        raise UserError(f"{where}: temperature >= 0, 0 < top_p <= 1, top_k >= 0")


def load_settings(path: Path | None = None) -> EvalSettings:
    """Read the file; a key that it should not have is an error, so that a slip in writing never goes unnoticed."""
    path = path or Path(os.environ.get("EVAL_CONFIG") or REPO / "configs" / "eval.env")
    families: dict[str, dict[str, str]] = {}
    called: dict[str, str] = {}
    sampling: dict[str, dict[str, float]] = {}
    targets: dict[str, dict[str, float]] = {}
    gate: dict[str, float] = {}
    for key, value in read_env_file(path).items():
        where, (kind, *names) = f"{path}: {key}", key.split("__")
        if kind == "FAMILY" and len(names) == 1:
            families[names[0]] = pairs(value, where)
        elif kind == "NAME" and len(names) == 1:
            called[names[0]] = value
        elif kind == "SAMPLING" and len(names) == 1:
            sampling[names[0]] = drawing(value, where)
        elif kind == "TARGET" and len(names) == 2:
            targets.setdefault(names[0], {})[names[1].lower()] = convert(value, float, where)
        elif key in GATE:
            gate[GATE[key]] = convert(value, float, where)
        else:
            raise UserError(f"{where}: expected FAMILY__X, NAME__X, SAMPLING__X, TARGET__X__BENCHMARK or {', '.join(GATE)}")
    if unknown := sorted(set(targets) - set(families)):
        raise UserError(f"{path}: TARGET__{unknown[0]}__...: no FAMILY__{unknown[0]} says which model that is")
    source = str(path.relative_to(REPO)) if path.is_relative_to(REPO) else path.name
    return EvalSettings(families, called, sampling, targets, GateRules(**gate), source)


# ---- the gate ----


@dataclass(frozen=True)
class Gate:
    """``reason`` says what the status rests on; ``target`` in percent; ``reference``: the tag whose accuracy was judged;
    ``power``: how much the status can be trusted, in words."""

    status: str
    reason: str
    target: float | None = None
    reference: str | None = None
    power: str = ""


def gate_status(metrics: Mapping[str, Any], target: float, rules: GateRules) -> tuple[str, str]:
    """(status, reason) of one accuracy beside a published one in percent. Gated needs all three: the accuracy within
    ``points`` of the target; an interval that does not exclude it by more than ``shown``; one at most ``width`` wide."""
    off = 100 * metrics["acc"] - target
    low, high = 100 * metrics["acc_low"] - target, 100 * metrics["acc_high"] - target
    excluded = max(low, -high, 0.0)
    reason = f"{off:+.1f} from {target:g}, interval {low:+.1f} to {high:+.1f}"
    if high - low > rules.width:
        return NOT_GATED, f"{reason}: wider than {rules.width:g}, more items or samples are needed"
    if abs(off) > rules.points:
        return NOT_GATED, f"{reason}: more than {rules.points:g} away"
    if excluded > rules.shown:
        return NOT_GATED, f"{reason}: excludes it by more than {rules.shown:g}"
    return GATED, reason


def gate_power(n: int, truth: float, target: float, rules: GateRules) -> float:
    """The chance that ``n`` independent answers of a harness whose true accuracy is ``truth`` are gated (both in percent)."""
    near = range(
        max(0, math.floor(n * (target - rules.points) / 100)), min(n, math.ceil(n * (target + rules.points) / 100)) + 1
    )
    passed = []
    for right in near:
        low, high = wilson(right, n)
        if gate_status({"acc": right / n, "acc_low": low, "acc_high": high}, target, rules)[0] == GATED:
            passed.append(right)
    return float(stats.binom.pmf(passed, n, min(max(truth / 100, 0.0), 1.0)).sum()) if passed else 0.0


@functools.cache
def items_for_power(target: float, rules: GateRules, power: float = POWER) -> int | None:
    """About the fewest answers of which an exact harness is gated with this ``power``; None beyond MOST_ITEMS."""
    low, high = 1, 2
    while gate_power(high, target, target, rules) < power:
        low, high = high, 2 * high
        if high > MOST_ITEMS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if gate_power(middle, target, target, rules) >= power else (middle, high)
    return high


@functools.cache
def power_text(n: int, answers: float, target: float, rules: GateRules) -> str:
    """What the gate of ``n`` items can tell, which count as ``answers`` independent ones."""
    count, off = max(1, round(answers)), rules.points + 1
    exact, low = (gate_power(count, truth, target, rules) for truth in (target, target - off))
    needed = items_for_power(target, rules)
    items = f"over {MOST_ITEMS:,}" if needed is None else f"{math.ceil(needed * n / answers):,}"
    return f"n {n:,} passes {100 * exact:.0f} % if exact, {100 * low:.0f} % if {off:g} low; {100 * POWER:.0f} % take n {items}"


def family_of_record(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], settings: EvalSettings) -> str | None:
    """The family that the record names, else that of a model in the repository with the same config.json."""
    if "family" in record["model"]:
        return record["model"]["family"]
    digest = record["model"].get("config_sha256")
    for other in (record, *records):
        if other["model"].get("config_sha256") == digest:
            if "family" in other["model"]:
                return other["model"]["family"]
            path = REPO / other["model"]["path"] / "config.json"
            if path.is_file():
                return settings.family_of(read_json(path), names_of(path.parent))
    return None


def reference_of(
    record: Mapping[str, Any], axis: str, records: Sequence[Mapping[str, Any]], settings: EvalSettings
) -> Mapping[str, Any] | None:
    """The evaluation that the gate judges: the record itself, or that of an unquantized model of its family with the most
    answers (the latest of several): a trial of a few items does not take the place of a whole evaluation."""
    if is_original(record):
        return record
    family = family_of_record(record, records, settings)
    same = [
        other
        for other in records
        if is_original(other)
        and axis in other["metrics"]
        and family_of_record(other, records, settings) == family
        and all(other["sampling"].get(key) == record["sampling"].get(key) for key in SAME_SAMPLING)
    ]

    def weight(other: Mapping[str, Any]) -> tuple[int, str]:
        metrics = other["metrics"][axis]
        return metrics["n"] * metrics.get("samples", 1), other["started"]

    return max(same, key=weight, default=None)


def published_for(axis: str, targets: Mapping[str, float]) -> tuple[float | None, tuple[str, ...]]:
    """(target, the benchmarks whose mean it is): an axis's own number, else that of the group which it belongs to."""
    groups = [name for name, members in GROUPS.items() if axis in members and name in targets]
    if axis in targets or not groups:
        return targets.get(axis), (axis,)
    return targets[groups[0]], GROUPS[groups[0]]


def mean_metrics(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracy of several settings of the same questions. Answers to one question go together, so the interval is taken as
    wide as if they always did: the mean of the bounds."""
    return {key: sum(m[key] for m in metrics) / len(metrics) for key in ("acc", "acc_low", "acc_high")}


def gate_axis(record: Mapping[str, Any], axis: str, settings: EvalSettings, records: Sequence[Mapping[str, Any]] = ()) -> Gate:
    """The gate of one benchmark of one evaluation; ``records``: the other evaluations, among them its original's."""
    targets = settings.targets.get(family_of_record(record, records, settings) or "", {})
    target, members = published_for(axis, targets)
    if target is None:
        return Gate(NO_TARGET, "no published number in " + settings.source)
    reference = reference_of(record, axis, records, settings)
    if reference is None:
        return Gate(NOT_GATED, "its unquantized original was not evaluated with the same sampling", target)
    if missing := [name for name in members if name not in reference["metrics"]]:
        return Gate(NOT_GATED, f"the target is a mean, and {', '.join(missing)} was not evaluated", target, reference["tag"])
    judged = [reference["metrics"][name] for name in members]
    mean = mean_metrics(judged)
    status, reason = gate_status(mean, target, settings.gate)
    together = f"mean of {', '.join(members)}: " if len(members) > 1 else ""
    if "harmonic_mean" in judged[0]:
        own = " to ".join(
            f"{100 * judged[0][key]:.1f}" for key in ("harmonic_mean_low", "harmonic_mean_high") if key in judged[0]
        )
        together = f"micro mean, as the target; harmonic {100 * judged[0]['harmonic_mean']:.1f}{f' ({own})' if own else ''}: "
    answers = effective_answers(mean["acc"], mean["acc_high"] - mean["acc_low"])
    power = "" if math.isnan(answers) else power_text(judged[0]["n"], round(answers, 3), target, settings.gate)
    return Gate(status, together + reason, target, reference["tag"], power)


def gate_text(gate: Gate) -> str:
    return gate.status if gate.status == NO_TARGET else f"{gate.status} ({'; '.join(filter(None, (gate.reason, gate.power)))})"


def eval_records(directory: Path) -> list[dict[str, Any]]:
    """All evaluations of a model in results/eval, by start."""
    found = [read_result(path) for path in sorted(directory.glob("*.json"))]
    return sorted((r for r in found if r["kind"] == "eval" and r["model"]), key=lambda record: record["started"])
