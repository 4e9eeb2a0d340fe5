#!/usr/bin/env bash
# Accuracy of a model:  bash pipelines/eval.sh --model DIR --tag TAG [--benchmarks a,b] [--budget 32k|64k|80k] [--samples N] [...]
# Of a vision-language model:  bash pipelines/eval.sh --pictures --model DIR --tag TAG [--benchmarks a,b] [...]
# Two evaluated models in pairs:  bash pipelines/eval.sh --compare BASE OTHER [--teacher TAG]
# Stored samples graded again, without a model:  bash pipelines/eval.sh --regrade TAG...
# Logs of finished evaluations packed:  bash pipelines/eval.sh --pack [TAG...]
# Does the harness reproduce what the vendors published?  bash pipelines/eval.sh --gate [TAG...] [--strict]
# What an evaluation would do, with tokens and times:  bash pipelines/eval.sh --model DIR --tag TAG --dry-run
# All options: bash pipelines/eval.sh --help. Paths are relative to the directory that you call it from. docs/EVAL_PROTOCOL.md
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
results=$MOE_LOWBIT_ROOT/results
case ${1:-} in
--compare) exec python "$MOE_LOWBIT_ROOT/src/eval/compare_tags.py" --results "$results" "${@:2}" ;;
--regrade) exec python "$MOE_LOWBIT_ROOT/src/eval/regrade.py" --results "$results" "${@:2}" ;;
--pictures) exec python "$MOE_LOWBIT_ROOT/src/eval/mm_eval.py" --out "$results/eval" "${@:2}" ;;
--pack) exec python "$MOE_LOWBIT_ROOT/src/eval/regrade.py" --pack --results "$results" "${@:2}" ;;
--gate) exec python "$MOE_LOWBIT_ROOT/src/eval/gate.py" --results "$results" "${@:2}" ;;
esac
exec python "$MOE_LOWBIT_ROOT/src/eval/vllm_eval8.py" --out "$results/eval" "$@"
