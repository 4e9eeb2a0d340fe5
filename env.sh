# Source this first: finds or makes the Python environment and puts the sources on the import path.
#
#     source env.sh        # from any directory; every pipeline does it
#
# MOE_LOWBIT_VENV    virtual environment to use (default: .venv in the repository; made when it is missing)
# MOE_LOWBIT_PYTHON  interpreter that makes it (default: the first of python3.11, python3.12, python3)
# MOE_LOWBIT_DEVICE  cpu or gpu: which requirements to install (default: gpu when nvidia-smi lists one)
# SCRATCH            where large outputs go (default: work/ in the repository)
#
# A failure returns non-zero and never ends the shell that sourced this.

_moe_lowbit_say() { printf '%s\n' "env.sh: $*" >&2; }

_moe_lowbit_find_python() {
    local candidate
    for candidate in ${MOE_LOWBIT_PYTHON:-python3.11 python3.12 python3 "$HOME"/.pyenv/versions/3.1[12].*/bin/python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; then
            printf '%s' "$candidate"
            return 0
        fi
    done
    _moe_lowbit_say "needs Python 3.11 or 3.12 with venv (Debian: apt-get install python3-venv); or set MOE_LOWBIT_PYTHON"
    return 1
}

_moe_lowbit_device() {
    if [ -n "${MOE_LOWBIT_DEVICE:-}" ]; then
        printf '%s' "$MOE_LOWBIT_DEVICE"
    elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then
        printf gpu
    else
        printf cpu
    fi
}

# Make the environment under its final name last, so that one that was interrupted is never taken for whole.
_moe_lowbit_make_venv() {
    local root=$1 venv=$2 python device requirements
    python=$(_moe_lowbit_find_python) || return 1
    device=$(_moe_lowbit_device)
    case $device in
    cpu) requirements=$root/configs/requirements-cpu.txt ;;
    gpu) requirements=$root/requirements.txt ;;
    *) _moe_lowbit_say "MOE_LOWBIT_DEVICE=$device: expected cpu or gpu"; return 1 ;;
    esac
    _moe_lowbit_say "making $venv with $python for $device (once; about 2 minutes on CPU)"
    "$python" -m venv --clear "$venv" || { _moe_lowbit_say "cannot make $venv"; return 1; }
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off -r "$requirements" ||
        { _moe_lowbit_say "installing $requirements failed; run the same command again"; return 1; }
    printf '%s\n' "$device" >"$venv/.moe-lowbit-ready"
}

_moe_lowbit_env() {
    local root venv
    root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd) || return 1
    venv=${MOE_LOWBIT_VENV:-$root/.venv}
    if [ ! -e "$venv/.moe-lowbit-ready" ]; then
        if [ -n "${MOE_LOWBIT_VENV:-}" ] && [ -x "$venv/bin/python" ]; then
            "$venv/bin/python" -c 'import torch, transformers, safetensors' ||
                { _moe_lowbit_say "$venv lacks packages: pip install -r requirements.txt there, or unset MOE_LOWBIT_VENV"; return 1; }
        else
            _moe_lowbit_make_venv "$root" "$venv" || return 1
        fi
    fi
    export MOE_LOWBIT_ROOT=$root MOE_LOWBIT_VENV=$venv
    export PATH=$venv/bin:$PATH
    export PYTHONPATH=$root/src/quant:$root/src/eval:$root/src/distill
    export SCRATCH=${SCRATCH:-$root/work}
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
}

_moe_lowbit_env
