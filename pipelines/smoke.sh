#!/usr/bin/env bash
# Load, quantize, save, reload and evaluate a model; ends with SMOKE OK:  bash pipelines/smoke.sh
# SMOKE_CONFIG=configs/smoke_2b.env takes another model. Makes the environment on first use.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
exec python src/eval/smoke.py --config "${SMOKE_CONFIG:-configs/smoke_tiny.env}" --work "$SCRATCH/smoke"
