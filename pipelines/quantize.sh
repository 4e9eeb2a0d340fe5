#!/usr/bin/env bash
# Quantize a checkpoint:  bash pipelines/quantize.sh            (configs/clip_122b.env)
# Another:  MODEL=models/razor-tiny OUT=work/w3 METHOD=gptq_refit EXPERT_BITS=2.5 bash pipelines/quantize.sh
# CONFIG=FILE takes other settings; PROBE=1 looks at routing and salience first; TAG=NAME also records results/quantize/NAME.json.
# A killed run goes on with the same command; FORCE=1 replaces an output.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
exec python src/quant/quantize_run.py --config "${CONFIG:-configs/clip_122b.env}"
