"""What pipelines/pack_gguf.sh runs: a configs/*.env file with overrides from the environment -> moe_alloc, gguf_pack.

    METHOD=nearest OUT=work/near python src/quant/pack_run.py --config configs/gguf_iq3.env

Each step is the command that a user would type; the full command line is printed before it runs.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from console import UserError, run_cli
from quantize_run import calibration_flags, flag, step
from settings import from_environment, load_config


@dataclass(frozen=True)
class PackConfig:
    """The keys of configs/gguf_iq3.env."""

    model: str
    out: str
    base_type: str
    tensor_types: str
    method: str
    calib: str
    calib_sequences: int
    calib_length: int
    token_power: float
    token_weights: str
    damping: float
    target_gib: float
    protected: str
    dequant_out: str
    reference: bool


def rounding_flags(config: PackConfig) -> list[object]:
    weights = ["--token-weights", config.token_weights] if config.token_weights else []
    return ["--method", config.method, "--token-power", config.token_power, *weights, "--damping", config.damping]


def allocated(config: PackConfig) -> str:
    """The file of types for the budget, made beside the output; one that is there is for another run and is refused."""
    types = f"{config.out.rstrip('/')}.types.txt"
    protected = ["--tensor-types", config.protected] if config.protected else []
    flags = ["--model", config.model, *calibration_flags(config.calib, config.calib_length, config.calib_sequences)]
    flags += [*protected, *rounding_flags(config)]
    flags += ["--target-gib", config.target_gib, "--out", types]
    step("src/quant/moe_alloc.py", *flags, *(["--force"] if flag("FORCE") else []))
    return types


def plan(config: PackConfig) -> str:
    """What --dry-run prints. A budget's types are known only when they have been measured; the recipe's are shown."""
    from run_plan import pack_plan

    method = "llama-quantize" if config.reference else config.method
    types = Path(config.tensor_types) if config.tensor_types else None
    text = (config.calib_sequences, config.calib_length)
    made = pack_plan(Path(config.model), Path(config.out), config.base_type, types, method, text)
    budget = f"TARGET_GIB={config.target_gib:g}: the types below are the recipe's, the run measures and chooses its own\n"
    return (budget if config.target_gib else "") + made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="settings, as configs/gguf_iq3.env")
    parser.add_argument("--dry-run", action="store_true", help="print the plan with sizes and times, and write nothing")
    args = parser.parse_args()
    config = load_config(PackConfig, args.config, from_environment(PackConfig))
    if config.target_gib < 0:
        raise UserError(f"TARGET_GIB={config.target_gib}: must be above 0 (or 0 for the types of the recipe)")
    if config.reference and config.dequant_out:
        raise UserError("DEQUANT_OUT with REFERENCE=1: run src/quant/gguf_dequant.py on the reference's file")
    if args.dry_run:
        print(plan(config), flush=True)
        return
    types = allocated(config) if config.target_gib else config.tensor_types
    record: list[object] = []
    if tag := os.environ.get("TAG"):
        record = ["--tag", tag, "--result", f"results/pack/{tag}.json"]
    calibration = calibration_flags(config.calib, config.calib_length, config.calib_sequences)
    flags = ["--model", config.model, *calibration, "--out", config.out, "--base-type", config.base_type]
    flags += ["--tensor-types", types] if types else []
    flags += [*record, *(["--force"] if flag("FORCE") else [])]
    if config.reference:
        step("src/quant/gguf_reference.py", *flags)
    else:
        dequant = ["--dequant-out", config.dequant_out] if config.dequant_out else []
        step("src/quant/gguf_pack.py", *flags, *rounding_flags(config), *dequant)


if __name__ == "__main__":
    run_cli(main)
