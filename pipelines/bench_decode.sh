#!/usr/bin/env bash
# Where the time of a decoded token goes in llama.cpp, and which settings help:  bash pipelines/bench_decode.sh [RECORD.json]
# Files of the 122B's shape with 48, 6, 24 and 12 layers and a narrow one, each made in memory ($SHM, default /dev/shm/bench_decode; 52 GB
# for the largest), tried with llama-bench and removed; everything found so far stands in $FOUND (default work/decoding.json).
# LIMIT seconds in all (default 390): what is left when it is near is not tried, and said. HEADERS=DIR holds 6.bin, 12.bin, 24.bin,
# 48.bin and narrow.bin of `bash pipelines/bench_decode.sh headers DIR`, made where llama.cpp's converter is. TINY=1: seconds on a CPU.
# LENGTHS="narrow 12": these files alone. PYTHON=python3 uses that interpreter as it is, without env.sh.
set -uo pipefail
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
started=$(date +%s)
if [ -n "${PYTHON:-}" ]; then
    export PYTHONPATH=$here/src/quant:$here/src/eval:$here/src/distill${PYTHONPATH:+:$PYTHONPATH} SCRATCH=${SCRATCH:-$here/work}
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
else
    OPTIONS_FOLLOW=1 source "$here/env.sh" || exit
    PYTHON=python
fi
cd "$here" || exit 2
end=$((started + ${LIMIT:-390})) cores=$(nproc)
shm=${SHM:-/dev/shm/bench_decode} found=${FOUND:-$SCRATCH/decoding.json}
lengths=${LENGTHS:-48 6 24 narrow 12} experts=8 tokens=64
narrow=(--layers 12 --hidden 512 --inner 256 --shared-inner 256 --vocab 8192 --heads 8 --key-heads 4 --value-heads 8)
if [ -n "${TINY:-}" ]; then lengths=${LENGTHS:-4 narrow 8} experts=1 tokens=4 narrow=(--layers 4 --vocab 896); fi

shape() { # name: options of synthetic_moe
    local kind=122b
    [ -z "${TINY:-}" ] || kind=tiny
    echo "--shape $kind"
    if [ "$1" = narrow ]; then printf '%s\n' "${narrow[@]}"; else echo "--layers $1"; fi
}

make() { # name: its file, where there is time; one that is there is taken
    [ ! -e "$shm/122b-$1.gguf" ] || return 0
    local more=()
    [ -z "${HEADERS:-}" ] || more=(--header "$HEADERS/$1.bin")
    # shellcheck disable=SC2046
    timeout -k 5 100 "$PYTHON" src/quant/synthetic_moe.py $(shape "$1") --out "$shm/122b-$1.gguf" --encode-experts "$experts" \
        --keep "$shm/encoded.pt" "${more[@]}" 2>&1 | tr '\r' '\n' | tail -n 3
}

tries() { # name NAME:SETTINGS...
    local file=$shm/122b-$1.gguf arguments=() text
    shift
    [ -e "$file" ] || return
    for text in "$@"; do arguments+=(--try "$text"); done
    timeout -k 5 $((end - $(date +%s) > 5 ? end - $(date +%s) : 5)) "$PYTHON" src/eval/speed_gguf.py --gguf "$file" \
        --into "$found" --until $((end - 25)) "${arguments[@]}" 2>&1
    echo "bench_decode: $(($(date +%s) - started)) s"
}

if [ "${1:-}" = headers ]; then
    for name in $lengths; do
        # shellcheck disable=SC2046
        "$PYTHON" src/quant/synthetic_moe.py $(shape "$name") --out "${2:?a directory}/$name.bin" --header-only || exit
    done
    exit
fi

mkdir -p "$shm" "$(dirname "$found")"
trap 'rm -rf "$shm"' EXIT
one="-ngl 99 -p 0 -n $tokens -r 3 -fa on"
host="-ngl 99 -p 0 -n $((tokens / 2)) -r 2 -fa on -ncmoe 99"
most="$((cores / 4 + (cores < 4))),$(((cores + 1) / 2)),$((cores * 3 / 4 + (cores < 4))),$cores"
mask=0x$(printf '%x' $(((1 << ((cores + 1) / 2)) - 1)))
half=$(((cores + 1) / 2))
for name in $lengths; do
    [ "$(date +%s)" -lt $((end - 40)) ] || break
    make "$name"
    case $name in
    48 | 4) # first what the issue asks, then what may help
        tries "$name" "plain: $one" "verify: -ngl 99 -p 1,2,3,4,5 -n 32 -d 0,2048 -r 5 -fa on" \
            "concurrent streams: GGML_CUDA_GRAPH_OPT=1 $one" \
            "experts in host memory: -ngl 99 -p 0 -n $((tokens / 2)) -r 1 -fa on -ncmoe 99 -t $half,$cores" \
            "sequences: -ngl 99 -c 16384 -fa on -npp 2048 -ntg 32 -npl 1,2,3,4,5 -pps"
        ;;
    12 | 8)
        tries "$name" "plain: $one" "loaded into pinned memory: $host -lm none -t $half,$cores" \
            "mapped and registered: GGML_CUDA_REGISTER_HOST=1 $host -t $half,$cores" \
            "threads pinned to half of the cores: $host -t $half --cpu-strict 1 -C $mask --poll 0,100" \
            "up and gate in host memory: -ngl 99 -p 0 -n $((tokens / 2)) -r 2 -fa on -t $half,$cores -ot ffn_(gate|up)_exps=CPU" \
            "settings: -ngl 99 -p 512 -n $tokens -r 2 -fa on,off -ub 128,512,2048" "depth: $one -d 0,2048 -fa on,off" \
            "verify without graphs: GGML_CUDA_DISABLE_GRAPHS=1 -ngl 99 -p 1,2,3,4,5 -n 0 -r 5 -fa on" \
            "verify: -ngl 99 -p 1,2,3,4,5 -n 0 -r 5 -fa on" "verify without fusion: GGML_CUDA_DISABLE_FUSION=1 -ngl 99 -p 1,2,3,4,5 -n 0 -r 5 -fa on" \
            "read directly: $one -lm dio" "read: $one -lm none" "8-bit cache: $one -ctk q8_0 -ctv q8_0 -d 2048" \
            "experts of half the layers: -ngl 99 -p 0 -n $((tokens / 2)) -r 2 -fa on -ncmoe 6 -t $half,$cores" "interleaved: $host -t $cores --numa distribute" \
            "sequences: -ngl 99 -c 16384 -fa on -npp 2048 -ntg 32 -npl 1,2,3,4,5 -pps" \
            "threads in host memory: $host -t $most" "no graphs: GGML_CUDA_DISABLE_GRAPHS=1 $one" \
            "no fusion: GGML_CUDA_DISABLE_FUSION=1 $one" "no PDL: GGML_CUDA_PDL=0 $one" \
            "concurrent streams: GGML_CUDA_GRAPH_OPT=1 $one"
        ;;
    *) tries "$name" "plain: $one" ;;
    esac
    rm -f "$shm/122b-$name.gguf"
done
rm -rf "$shm"
more=()
[ -z "${1:-}" ] || more=(--result "$1" --tag "$(basename "$1" .json)")
"$PYTHON" src/eval/speed_gguf.py --decoding "$found" "${more[@]}"
