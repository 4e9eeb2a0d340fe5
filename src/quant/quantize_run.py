"""What pipelines/quantize.sh runs: a configs/*.env file with overrides from the environment -> moe_probe, quant_save.

    METHOD=gptq_refit OUT=work/w3 python src/quant/quantize_run.py --config configs/clip_122b.env

Each step is the command that a user would type; the full command line is printed before it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from console import UserError, run_cli, run_script
from env_config import load_config


@dataclass(frozen=True)
class QuantizeConfig:
    """The keys of configs/clip_122b.env."""

    model: str
    out: str
    expert_bits: float
    linear_bits: int
    group: int
    clip_steps: int
    method: str
    calib: str
    calib_sequences: int
    calib_length: int
    shard_gib: float


def flag(name: str) -> bool:
    """Whether the environment sets NAME=1; any value but 0, 1 or nothing is an error."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise UserError(f"{name}={value}: expected 0 or 1")
    return value == "1"


def overrides() -> dict[str, str]:
    """The config's keys that the environment sets."""
    keys = [field.name.upper() for field in dataclasses.fields(QuantizeConfig)]
    return {key: os.environ[key] for key in keys if key in os.environ}


def step(script: str, *arguments: object) -> None:
    """Run one of the project's commands, printed first."""
    print("+ " + shlex.join(["python", script, *map(str, arguments)]), flush=True)
    run_script(script, *arguments)


def calibration_flags(config: QuantizeConfig) -> list[object]:
    text = ["--calib", config.calib] if config.calib else []
    return [*text, "--calib-sequences", config.calib_sequences, "--calib-length", config.calib_length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    config = load_config(QuantizeConfig, parser.parse_args().config, overrides())
    if flag("PROBE"):
        step("src/quant/moe_probe.py", "--model", config.model, *calibration_flags(config))
    bits = ["--expert-bits", f"{config.expert_bits:g}", "--linear-bits", config.linear_bits]
    grid = ["--group", config.group, "--clip-steps", config.clip_steps, "--method", config.method]
    record = []
    if tag := os.environ.get("TAG"):
        record = ["--tag", tag, "--result", f"results/quantize/{tag}.json"]
    more = [*calibration_flags(config), "--shard-gib", config.shard_gib, *record, *(["--force"] if flag("FORCE") else [])]
    step("src/quant/quant_save.py", "--model", config.model, "--out", config.out, *bits, *grid, *more)


if __name__ == "__main__":
    run_cli(main)
