#!/usr/bin/env bash
# The command that serves a model on this machine, with the numbers behind it:  bash pipelines/deploy.sh --model FILE.gguf|DIR
# Run it, ask it one question, serve until Ctrl-C:  bash pipelines/deploy.sh --model FILE.gguf --serve [--port 8080]
# Run it, ask it, stop:  bash pipelines/deploy.sh --model FILE.gguf --check
# --context N tokens for each of --parallel N sequences; without it as many as fit. Paths are relative to where you call it from.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
exec python "$MOE_LOWBIT_ROOT/src/eval/deploy.py" "$@"
