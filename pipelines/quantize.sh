#!/usr/bin/env bash
# Quantize a checkpoint:  bash pipelines/quantize.sh            (configs/clip_122b.env)
# Another:  MODEL=models/razor-tiny OUT=work/w3 METHOD=gptq_refit EXPERT_BITS=2.5 bash pipelines/quantize.sh
# DEVICES=cuda:0,cuda:1 (or all) works on several GPUs, to the same bytes.
# CONFIG=FILE takes other settings; PROBE=1 looks at routing and salience first; TAG=NAME also records results/quantize/NAME.json.
# --dry-run prints the plan with sizes and times, and writes nothing.
# PACKED=1 writes 4 bits a weight for vLLM instead of BF16 (docs/PACKED.md).
# A killed run goes on with the same command; FORCE=1 replaces an output.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
export MOE_LOWBIT_CALLER=$PWD  # paths that a user types are relative to it, those of a config to the repository
cd "$MOE_LOWBIT_ROOT"
exec python src/quant/quant_save.py --config "${CONFIG:-configs/clip_122b.env}" "$@"
