#!/usr/bin/env bash
# Everything that claims to work on several GPUs, beside the same on one:  bash pipelines/multi_gpu.sh [PART...]   (docs/MULTI_GPU.md)
# Parts (default: the first five): quantize distill train35b train122b eval fit122b eval35b vllm servers. Each has a time limit, says what
# failed and leaves RECORDS/multi_gpu_PART.json (results/bench); one that is there is skipped, so the same command goes on after a kill.
# WORK: large files, in memory best (default: /dev/shm/multi where it has 100 GB, else work/multi). PROCESSES=N: that many GPUs.
# TINY=1: sizes for a test. LIMIT=S: seconds for each part. PYTHON=python3: an interpreter that has the packages, instead of env.sh's.
# BUDGET=S: seconds for all of them. Part vllm: VLLM_PYTHON=.venv-vllm/bin/python, an interpreter that has it, where it stands apart;
# LAYERS=20 of the 35B instead of 40. Part servers: SERVE, the command of a server, by default vllm serve with options.
set -uo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;; esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ -n "${PYTHON:-}" ]; then
    export PYTHONPATH=$root/src/quant:$root/src/eval:$root/src/distill${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
else
    source "$root/env.sh" || exit 1
    PYTHON=python
fi
records=${RECORDS:-$root/results/bench}
if [ -z "${WORK:-}" ]; then
    room=$(df --output=avail -BG /dev/shm 2>/dev/null | tail -1 | tr -dc 0-9)
    if [ "${room:-0}" -ge 100 ]; then WORK=/dev/shm/multi; else WORK=$root/work/multi; fi
fi
declare -A limits=([quantize]=240 [eval]=200 [distill]=420 [train35b]=400 [train122b]=300 [fit122b]=420 [eval35b]=150 [vllm]=1200 [servers]=1500)
parts=("$@")
[ $# -gt 0 ] || parts=(quantize distill train35b train122b eval)
options=(--work "$WORK" --records "$records" ${PROCESSES:+--processes "$PROCESSES"} ${VLLM_PYTHON:+--vllm-python "$VLLM_PYTHON"} ${SERVE:+--serve "$SERVE"} ${LAYERS:+--layers "$LAYERS"})
[ "${TINY:-0}" = 0 ] || options+=(--tiny)
mkdir -p "$records" "$WORK" || exit 1
failed=()

part() {
    local name=$1 started=$SECONDS code=0 limit
    limit=${LIMIT:-${limits[$name]}}
    if [ -n "${BUDGET:-}" ] && [ "$limit" -gt $((BUDGET - SECONDS)) ]; then limit=$((BUDGET - SECONDS)); fi
    if [ "$limit" -lt 1 ]; then
        echo "$name: FAILED, no time was left of BUDGET=$BUDGET" >&2
        return 1
    fi
    timeout --kill-after=40 "$limit" "$PYTHON" "$root/src/distill/speed_multi_gpu.py" --part "$name" "${options[@]}" || code=$?
    [ $code = 0 ] || echo "$name: FAILED with exit code $code after $((SECONDS - started)) s (124: its time was up); $WORK/$name/log" >&2
    return $code
}

for name in "${parts[@]}"; do
    [ -n "${limits[$name]:-}" ] || { echo "error: no part $name; known: ${!limits[*]}" >&2; exit 2; }
    part "$name" || failed+=("$name")
done
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}; the other parts' records are in $records" >&2; exit 1; }
echo "MULTI GPU OK: ${parts[*]}; records in $records"
