#!/usr/bin/env bash
# Trains models/razor-tiny-vl on one GPU, at most 8 minutes in all:  bash pipelines/make_tiny_vl.sh
# Resumes from $SCRATCH/make_tiny_vl after an interruption. Extra arguments go to src/distill/tiny_vl_train.py.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
exec python src/distill/tiny_vl_train.py --config configs/make_tiny_vl.env --out models/razor-tiny-vl \
    --work "$SCRATCH/make_tiny_vl" --result results/train/razor_tiny_vl.json "$@"
