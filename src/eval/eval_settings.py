"""configs/eval.env: which family a model belongs to, how its vendor samples, and what its vendor published.

Not a command. `bash pipelines/eval.sh` reads it on every run; EVAL_CONFIG=FILE takes another file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend import Sampling
from console import UserError
from families import text_config
from records import REPO
from settings import convert, read_env_file

DRAW = {"temperature": float, "top_p": float, "top_k": int}
GATE = {"GATE_POINTS": "points", "GATE_SHOWN": "shown", "GATE_WIDTH": "width"}


@dataclass(frozen=True)
class GateRules:
    """Percentage points: nearness of the accuracy to the target, slack of the interval, greatest width of the interval."""

    points: float = 2.0
    shown: float = 1.0
    width: float = 20.0


@dataclass(frozen=True)
class EvalSettings:
    """``families``: {name: {key of the text config: value}}; ``sampling``: {family or model_type: {temperature, ...}};
    ``targets``: {family: {benchmark: percent}}. Names of families and model types are upper case, of benchmarks lower."""

    families: Mapping[str, Mapping[str, str]]
    sampling: Mapping[str, Mapping[str, float]]
    targets: Mapping[str, Mapping[str, float]]
    gate: GateRules
    source: str

    def family_of(self, config: Mapping[str, Any]) -> str | None:
        """The family whose every key the text part of config.json has; None when there is none."""
        text = text_config(config)
        for name, shape in self.families.items():
            if all(str(text.get(key)) == value for key, value in shape.items()):
                return name
        return None

    def sampling_for(self, family: str | None, config: Mapping[str, Any]) -> tuple[dict[str, float], str]:
        """(keys of Sampling that the vendor recommends, where that stands) for a model; greedy when nothing is known."""
        model_type = str(text_config(config).get("model_type", "")).upper()
        for name in (family, model_type):
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


def settings_path() -> Path:
    return Path(os.environ.get("EVAL_CONFIG") or REPO / "configs" / "eval.env")


def load_settings(path: Path | None = None) -> EvalSettings:
    """Read the file; a key that it should not have is an error, so that a slip in writing never goes unnoticed."""
    path = path or settings_path()
    families: dict[str, dict[str, str]] = {}
    sampling: dict[str, dict[str, float]] = {}
    targets: dict[str, dict[str, float]] = {}
    gate: dict[str, float] = {}
    for key, value in read_env_file(path).items():
        where, (kind, *names) = f"{path}: {key}", key.split("__")
        if kind == "FAMILY" and len(names) == 1:
            families[names[0]] = pairs(value, where)
        elif kind == "SAMPLING" and len(names) == 1:
            sampling[names[0]] = drawing(value, where)
        elif kind == "TARGET" and len(names) == 2:
            targets.setdefault(names[0], {})[names[1].lower()] = convert(value, float, where)
        elif key in GATE:
            gate[GATE[key]] = convert(value, float, where)
        else:
            raise UserError(f"{where}: expected FAMILY__X, SAMPLING__X, TARGET__X__BENCHMARK or {', '.join(GATE)}")
    if unknown := sorted(set(targets) - set(families)):
        raise UserError(f"{path}: TARGET__{unknown[0]}__...: no FAMILY__{unknown[0]} says which model that is")
    source = str(path.relative_to(REPO)) if path.is_relative_to(REPO) else path.name
    return EvalSettings(families, sampling, targets, GateRules(**gate), source)
