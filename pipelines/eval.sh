#!/usr/bin/env bash
# Accuracy of a model:  bash pipelines/eval.sh --model DIR --tag TAG [--benchmarks a,b] [--budget 32k|64k] [...]
# Two evaluated models in pairs:  bash pipelines/eval.sh --compare BASE OTHER
# All options: bash pipelines/eval.sh --help. Paths are relative to the directory that you call it from.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
if [ "${1:-}" = --compare ]; then
    exec python "$MOE_LOWBIT_ROOT/src/eval/compare_tags.py" --results "$MOE_LOWBIT_ROOT/results" "${@:2}"
fi
exec python "$MOE_LOWBIT_ROOT/src/eval/vllm_eval8.py" --out "$MOE_LOWBIT_ROOT/results/eval" "$@"
