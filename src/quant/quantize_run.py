"""What pipelines/quantize.sh runs: a configs/*.env file with overrides from the environment -> moe_probe, quant_save.

    METHOD=gptq_refit OUT=work/w3 [DEVICES=all] python src/quant/quantize_run.py --config configs/clip_122b.env

Each step is the command that a user would type; the full command line is printed before it runs.
"""

from __future__ import annotations

import argparse
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from console import UserError, run_cli, run_script
from recipe import Recipe
from settings import from_environment, load_config


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
    token_power: float
    damping: float
    shard_gib: float
    packed: bool = False


def flag(name: str) -> bool:
    """Whether the environment sets NAME=1; any value but 0, 1 or nothing is an error."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise UserError(f"{name}={value}: expected 0 or 1")
    return value == "1"


def step(script: str, *arguments: object) -> None:
    """Run one of the project's commands, printed first."""
    print("+ " + shlex.join(["python", script, *map(str, arguments)]), flush=True)
    run_script(script, *arguments)


def calibration_flags(calib: str, length: int, sequences: int | None = None) -> list[object]:
    """The flags of calibration_text; an empty ``calib`` and no ``sequences`` leave a command's own defaults."""
    text = ["--calib", calib] if calib else []
    count = [] if sequences is None else ["--calib-sequences", sequences]
    return [*text, *count, "--calib-length", length]


def plan(config: QuantizeConfig) -> str:
    """What --dry-run prints."""
    from run_plan import quantize_plan

    recipe = Recipe(config.expert_bits, config.linear_bits, config.group, config.clip_steps, method=config.method)
    text = (config.calib_sequences, config.calib_length)
    return quantize_plan(Path(config.model), Path(config.out), recipe, flag("FORCE"), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="settings, as configs/clip_122b.env")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with sizes and times, and write nothing")
    args = parser.parse_args()
    config = load_config(QuantizeConfig, args.config, from_environment(QuantizeConfig))
    if args.dry_run:
        print(plan(config), flush=True)
        return
    calibration = calibration_flags(config.calib, config.calib_length, config.calib_sequences)
    if flag("PROBE"):
        step("src/quant/moe_probe.py", "--model", config.model, *calibration)
    bits = ["--expert-bits", f"{config.expert_bits:g}", "--linear-bits", config.linear_bits]
    grid = ["--group", config.group, "--clip-steps", config.clip_steps, "--method", config.method]
    if config.token_power or config.damping:
        grid += ["--token-power", f"{config.token_power:g}", "--damping", f"{config.damping:g}"]
    record = []
    if tag := os.environ.get("TAG"):
        record = ["--tag", tag, "--result", f"results/quantize/{tag}.json"]
    devices = ["--devices", os.environ["DEVICES"]] if os.environ.get("DEVICES") else []
    packed = ["--packed"] if config.packed else []
    more = [*calibration, *devices, *packed, "--shard-gib", config.shard_gib, *record, *(["--force"] if flag("FORCE") else [])]
    step("src/quant/quant_save.py", "--model", config.model, "--out", config.out, *bits, *grid, *more)


if __name__ == "__main__":
    run_cli(main)
