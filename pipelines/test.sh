#!/usr/bin/env bash
# Runs the tests in the project's environment: bash pipelines/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
ruff check src tests
python src/eval/check_results.py
python src/eval/check_results.py docs/EVAL_PROTOCOL.md
exec python -m pytest -q "$@"
