#!/usr/bin/env bash
# Models of real text against their original: KL, perplexity and three likelihood tasks, with intervals:
#   bash pipelines/judge_text.sh --text work/text --reference MODEL --model M [--model M2 ...] --result F --tag T
# On a plain text file as llama-perplexity reads it: --text FILE. A GGUF may stand for a checkpoint. On a GPU where there is one.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
exec python "$MOE_LOWBIT_ROOT/src/eval/text_judge.py" "$@"
