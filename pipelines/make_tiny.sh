#!/usr/bin/env bash
# Trains models/razor-tiny on one GPU (H100: about 8 minutes):  bash pipelines/make_tiny.sh
# Resumes from $SCRATCH/make_tiny after an interruption. Extra arguments go to src/distill/tiny_train.py.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
exec python src/distill/tiny_train.py --config configs/make_tiny.env --out models/razor-tiny \
    --work "$SCRATCH/make_tiny" --result results/train/razor_tiny.json "$@"
