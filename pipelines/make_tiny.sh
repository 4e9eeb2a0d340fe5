#!/usr/bin/env bash
# Trains models/razor-tiny on one GPU (H100: about 8 minutes):  bash pipelines/make_tiny.sh
# models/razor-tiny-vl, at most 8 minutes in all:  bash pipelines/make_tiny.sh vl
# Resumes from $SCRATCH/make_tiny or make_tiny_vl after an interruption. Extra arguments go to src/distill/tiny_train.py.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
if [ "${1:-}" = vl ]; then
    shift
    exec python src/distill/tiny_train.py --config configs/make_tiny_vl.env --out models/razor-tiny-vl --workers 12 \
        --work "$SCRATCH/make_tiny_vl" --result results/train/razor_tiny_vl.json --save-every 500 --probe-items 200 "$@"
fi
exec python src/distill/tiny_train.py --config configs/make_tiny.env --out models/razor-tiny \
    --work "$SCRATCH/make_tiny" --result results/train/razor_tiny.json "$@"
