# shellcheck shell=bash
# Source this first: finds or makes the Python environment and puts the sources on the import path.
#
#     source env.sh        # from any directory; every pipeline does it
#
# MOE_LOWBIT_VENV    virtual environment to use (default: .venv in the repository; made when it is missing)
# MOE_LOWBIT_PYTHON  interpreter that makes it (default: the first of python3.11, python3.12, python3)
# MOE_LOWBIT_DEVICE  cpu, gpu or train (gpu without vLLM): which requirements to install (default: gpu when nvidia-smi lists one)
# SCRATCH            where large outputs go (default: work/ in the repository)
#
# A failure returns non-zero and never ends the shell that sourced this. `bash pipelines/X.sh --help` prints the comment at the
# top of X.sh; one whose command prints its options too sets OPTIONS_FOLLOW=1 and goes on, one that takes none OPTIONS_FOLLOW=none.

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

# The requirements of a device; configs/lock-DEVICE.txt is made of them (bash pipelines/test.sh --lock).
_moe_lowbit_requirements() {
    case $1 in
    cpu) printf configs/requirements-cpu.txt ;;
    gpu) printf requirements.txt ;;
    train) printf requirements-train.txt ;;
    *) _moe_lowbit_say "MOE_LOWBIT_DEVICE=$1: expected cpu, gpu or train"; return 1 ;;
    esac
}

# Install what a device needs: on Linux x86_64 exactly the packages of its lock, each against its SHA-256, nothing resolved.
_moe_lowbit_install() {
    local root=$1 venv=$2 device=$3
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar off)
    if [ "$(uname -s) $(uname -m)" != "Linux x86_64" ]; then
        "${pip[@]}" -r "$root/$(_moe_lowbit_requirements "$device")"
        return
    fi
    pip+=(--no-deps --require-hashes)
    "${pip[@]}" -r "$root/configs/lock-$device.txt" || return 1
    [ "$device" = cpu ] || return 0
    # A CPU build of torch where one is at hand; the package index has the CUDA build only, which needs its libraries. Two locks,
    # since pip prefers a file whose link carries a hash (the index's) to a local one, even of a higher local version.
    "${pip[@]}" -r "$root/configs/lock-torch-cpu.txt" 2>/dev/null || "${pip[@]}" -r "$root/configs/lock-torch-cuda.txt"
}

# Make the environment under its final name last, so that one that was interrupted is never taken for whole.
_moe_lowbit_make_venv() {
    local root=$1 venv=$2 python device
    python=$(_moe_lowbit_find_python) || return 1
    device=$(_moe_lowbit_device)
    _moe_lowbit_requirements "$device" >/dev/null || return 1
    _moe_lowbit_say "making $venv with $python for $device (once; about 2 minutes on CPU)"
    "$python" -m venv --clear "$venv" || { _moe_lowbit_say "cannot make $venv"; return 1; }
    _moe_lowbit_install "$root" "$venv" "$device" ||
        { _moe_lowbit_say "installing the packages failed; run the same command again"; return 1; }
    printf '%s\n' "$device" >"$venv/.moe-lowbit-ready"
}

# The help of the pipeline ($1) that sourced this, whose first argument ($2) is seen here.
_moe_lowbit_help() {
    case ${2:-} in
    -h | --help) ;;
    *)
        [ -z "${2:-}" ] || [ "${OPTIONS_FOLLOW:-}" != none ] ||
            { _moe_lowbit_say "$(basename -- "$1") takes no arguments, but found $2; --help explains it"; exit 2; }
        return 0
        ;;
    esac
    [ "$(basename -- "$(cd -- "$(dirname -- "$1")" && pwd)")" = pipelines ] || return 0
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
    [ "${OPTIONS_FOLLOW:-}" = 1 ] || exit 0
    printf '\n'
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
    # OpenMP's waiting threads spin; where the cores are shared, each of the small steps of a run then costs a turn of the scheduler.
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}
}

if [ -n "${BASH_SOURCE[1]:-}" ]; then _moe_lowbit_help "${BASH_SOURCE[1]}" "$@"; fi
_moe_lowbit_env
