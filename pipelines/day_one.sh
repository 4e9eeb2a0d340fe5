#!/usr/bin/env bash
# The day that a model arrives, headers to card:  bash pipelines/day_one.sh --model hf:ORG/NAME@COMMIT [--wiki FILE] [--baseline M]
# What it would take, and what is left out for want of a tool or data:  bash pipelines/day_one.sh --model hf:ORG/NAME@COMMIT --plan
# Packed checkpoint, GGUF with mtp and mmproj, WikiText-2, panel, benchmarks, gate, a first answer, and a card whose every figure
# is linked, beside what docs/PREREGISTERED.md expected. The same command goes on after a kill. Paths are relative to where you
# call it from.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
exec python "$MOE_LOWBIT_ROOT/src/eval/day_one.py" "$@"
