#!/usr/bin/env bash
# What was lost, where, and whether it is more than noise, on frozen tokens in strata:
#   bash pipelines/panel.sh --reference MODEL                                      the panel: work/panel/NAME
#   bash pipelines/panel.sh --reference MODEL --judge CHECKPOINT_OR_GGUF --tag TAG     results/panel/TAG.json
# MODEL may be hf:ORG/NAME@COMMIT. Paths are relative to the directory that you call it from. docs/EVAL_PROTOCOL.md
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
exec python "$MOE_LOWBIT_ROOT/src/eval/panel.py" --out "$MOE_LOWBIT_ROOT/results/panel" "$@"
