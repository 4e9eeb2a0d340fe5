#!/usr/bin/env bash
# Download a GGUF from the hub, resumable and checked (a split one in all its parts):
#     bash pipelines/fetch_gguf.sh General-Instinct/InstinctRazor-Qwen3.5-122B-A10B-GGUF [FILE.gguf] [--out models]
# A killed run goes on with the same command. Paths are relative to the directory that you call it from.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
exec python "$MOE_LOWBIT_ROOT/src/eval/fetch_gguf.py" "$@"
