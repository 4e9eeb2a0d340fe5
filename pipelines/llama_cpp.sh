#!/usr/bin/env bash
# llama.cpp's tools; the last line on stdout is their directory:  bash pipelines/llama_cpp.sh
# $LLAMA_CPP names a build of your own; otherwise the version of configs/llama_cpp.env is built once (5 minutes on 2 cores) into
# ${MOE_LOWBIT_CACHE:-~/.cache/moe-lowbit}, with CUDA where nvidia-smi and nvcc are there. A killed build goes on.
#
# To take along:  bash pipelines/llama_cpp.sh --pack SOURCE.tar.xz OUT_DIR     builds from a tarball, without a network, with CUDA
# It builds in $BUILD_ROOT (/tmp/llama-cuda) under `nice`, with JOBS compilers (all cores but two), for ARCHITECTURE (90), for at most
# LIMIT seconds (420), and leaves in OUT_DIR: build.log, build.json (seconds, sizes, whether it ended) and the tools as
# llama-cuda.tar.xz.00, .01 ... of at most 15 MiB each, if they need at most 45 MiB. Put together:
# cat llama-cuda.tar.xz.* | tar xJ -C DIR  , then LLAMA_CPP=DIR/llama-cuda-bin. A build that did not end leaves its objects in
# $BUILD_ROOT: the same command goes on there. TRY=F.gguf is run once by the new llama-bench. CUDA=OFF builds for the CPU.
# shellcheck disable=SC2012,SC2015 # names of our own; record ends what went wrong
set -euo pipefail
if [ "${1:-}" != --pack ]; then
    OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
    exec python -c 'import llama_cpp; from console import run_cli; run_cli(llama_cpp.main)'
fi

set +e # record says how each step ended
tarball=$(realpath -- "$2") out=$(realpath -m -- "$3")
root=${BUILD_ROOT:-/tmp/llama-cuda} limit=${LIMIT:-420} cuda=${CUDA:-ON} architecture=${ARCHITECTURE:-90}
jobs=${JOBS:-$(($(nproc) > 3 ? $(nproc) - 2 : $(nproc)))}
tools=(llama-bench llama-server llama-batched-bench llama-perplexity llama-quantize llama-imatrix llama-cli llama-mtmd-cli)
mkdir -p "$out" "$root"
log=$out/build.log
started=$(date +%s)
say() { echo "llama.cpp: $1 ($(($(date +%s) - started)) s)" | tee -a "$log"; }
record() { # $1: the state it ended in
    printf '{"state": "%s", "seconds": %d, "jobs": %d, "cuda": "%s", "architecture": "%s", "packed_bytes": %d, "tools_bytes": %d}\n' \
        "$1" "$(($(date +%s) - started))" "$jobs" "$cuda" "$architecture" "${packed:-0}" "${size:-0}" >"$out/build.json"
    say "$1"
}
flag() { grep -qw "$1" /proc/cpuinfo && echo ON || echo OFF; }

if [ ! -d "$root/source" ]; then
    mkdir -p "$root/source" && tar xJf "$tarball" -C "$root/source" --strip-components 1 || { record "the source cannot be unpacked"; exit 2; }
fi
# One tree that cmake takes for the toolkit: a machine may have nvcc in one place, cuBLAS among Python's packages and the driver in a third.
toolkit() {
    local nvcc real cublas name
    nvcc=$(command -v nvcc || ls /usr/local/cuda*/bin/nvcc 2>/dev/null | head -1)
    real=$(dirname -- "$(dirname -- "$("$nvcc" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p' | head -1)/x")")
    rm -rf "$root/cuda" && mkdir "$root/cuda" && cp -as "$real"/. "$root/cuda/" || return 1
    mkdir -p "$root/cuda/lib64/stubs"
    if [ ! -e "$root/cuda/lib64/libcublas.so" ] || [ ! -e "$root/cuda/include/cublas_v2.h" ]; then
        cublas=$(python3 -c 'import nvidia, pathlib; print(*(p for d in nvidia.__path__ for p in pathlib.Path(d).glob("*/include/cublas_v2.h")))')
        cublas=$(dirname -- "$(dirname -- "${cublas%% *}")")
        [ -e "$cublas/include/cublas_v2.h" ] || { say "no cuBLAS here: looked in $real and in Python's nvidia packages"; return 1; }
        ln -sf "$cublas"/include/cublas*.h "$root/cuda/include/"
        for name in "$cublas"/lib/libcublas*.so.*; do
            ln -sf "$name" "$root/cuda/lib64/" && ln -sf "$name" "$root/cuda/lib64/$(basename -- "${name%.so.*}").so"
        done
        say "cuBLAS of $cublas"
    fi
    [ -e "$root/cuda/lib64/libcudart.so" ] || ln -s "$(ls "$root"/cuda/lib64/libcudart.so.* | head -1)" "$root/cuda/lib64/libcudart.so"
    # The driver's own library is only named at link time: an empty one with its name serves where the real one is not found.
    echo | cc -shared -x c - -Wl,-soname,libcuda.so.1 -o "$root/cuda/lib64/stubs/libcuda.so"
    options+=(
        -DCMAKE_CUDA_COMPILER="$nvcc" -DCUDAToolkit_ROOT="$root/cuda" -DCUDA_cuda_driver_LIBRARY="$root/cuda/lib64/stubs/libcuda.so"
        -DCUDA_CUDART="$(readlink -f "$root/cuda/lib64/libcudart.so")" -DCUDA_cublas_LIBRARY="$root/cuda/lib64/libcublas.so"
        -DCUDA_cublasLt_LIBRARY="$root/cuda/lib64/libcublasLt.so" -DCMAKE_CUDA_FLAGS="-I$root/cuda/include"
    )
}
# Named instruction sets rather than GGML_NATIVE: the tools may run on another machine of the same kind. Uncompressed kernels: xz packs them smaller.
# shellcheck disable=SC2054
options=(
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_BUILD_RPATH_USE_ORIGIN=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF -DGGML_NATIVE=OFF -DGGML_AVX512="$(flag avx512f)"
    -DGGML_AVX512_VBMI="$(flag avx512_vbmi)" -DGGML_AVX512_VNNI="$(flag avx512_vnni)" -DGGML_AVX512_BF16="$(flag avx512_bf16)"
    -DGGML_CUDA="$cuda" -DCMAKE_CUDA_ARCHITECTURES="$architecture-real" -DGGML_CUDA_FA_QUANTS="f16-f16;q8_0-q8_0" -DGGML_CUDA_NCCL=OFF
    -DGGML_CUDA_COMPRESSION_MODE=none "-DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined"
    -DCMAKE_SHARED_LINKER_FLAGS=-Wl,--no-as-needed # the empty driver is named as needed, so that the real one is loaded
)
[ "$cuda" = ON ] && { toolkit || { record "no CUDA toolkit"; exit 2; }; }
say "configuring with $jobs compilers on $(nproc) cores, $(grep -m1 'model name' /proc/cpuinfo)"
nice -n 10 cmake -G Ninja -S "$root/source" -B "$root/build" "${options[@]}" >>"$log" 2>&1 || { record "configure failed"; tail -5 "$log"; exit 1; }
say "building"
NINJA_STATUS='[%f/%t %es] ' nice -n 10 timeout "$limit" ninja -C "$root/build" -j "$jobs" "${tools[@]}" >>"$log" 2>&1
code=$?
say "ninja ended with $code: $(grep '^\[' "$log" | tail -1 | cut -c1-120)"
if [ "$code" -ne 0 ]; then
    [ "$code" -eq 124 ] && record "stopped at its limit of $limit s" || record "build failed"
    grep -m5 -i -A3 'error' "$log"
    exit "$code"
fi
bin=$root/llama-cuda-bin
rm -rf "$bin" && mkdir "$bin"
cp -a "$root"/build/bin/*.so* "$bin"
for name in "${tools[@]}"; do cp "$root/build/bin/$name" "$bin"; done
find "$bin" -type f -exec strip {} +
size=$(du -sb "$bin" | cut -f1)
"$bin/llama-bench" --list-devices >>"$log" 2>&1 || say "llama-bench does not start here"
tail -3 "$log"
if [ -n "${TRY:-}" ]; then # a small GGUF: whether the kernels run on this machine's card
    timeout 60 "$bin/llama-bench" -m "$TRY" -ngl 99 -p 512 -n 64 -r 2 2>&1 | tee -a "$log" | tail -8
fi
say "packing $size bytes"
nice -n 10 tar c -C "$root" llama-cuda-bin | nice -n 10 xz -T"$jobs" --lzma2=preset=6,dict=32MiB --block-size=67108864 >"$root/llama-cuda.tar.xz"
packed=$(stat -c %s "$root/llama-cuda.tar.xz")
if [ "$packed" -le $((45 << 20)) ]; then
    split -b 15M -d "$root/llama-cuda.tar.xz" "$out/llama-cuda.tar.xz."
    record built
else
    record "built, too large to keep"
fi
