#!/usr/bin/env bash
# llama.cpp's tools; the last line on stdout is their directory:  bash pipelines/llama_cpp.sh
# $LLAMA_CPP names a build of your own; otherwise the version of configs/llama_cpp.env is built once (5 minutes on 2 cores) into
# ${MOE_LOWBIT_CACHE:-~/.cache/moe-lowbit}, with CUDA where nvidia-smi and nvcc are there. A killed build goes on.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
exec python "$MOE_LOWBIT_ROOT/src/quant/llama_cpp.py"
