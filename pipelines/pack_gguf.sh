#!/usr/bin/env bash
# A GGUF for stock llama.cpp, straight from safetensors:  bash pipelines/pack_gguf.sh            (configs/gguf_iq3.env)
# Another:  MODEL=models/razor-tiny OUT=work/iq3 BASE_TYPE=Q3_K METHOD=nearest bash pipelines/pack_gguf.sh
# REFERENCE=1: by llama.cpp's own tools. TAG=NAME also records results/pack/NAME.json. TARGET_GIB=X: types that fit a size.
# --dry-run prints the plan with sizes and times, and writes nothing.
# llama.cpp is found in $LLAMA_CPP or built once. A killed run goes on with the same command; FORCE=1 replaces an output.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
export MOE_LOWBIT_CALLER=$PWD  # paths that a user types are relative to it, those of a config to the repository
cd "$MOE_LOWBIT_ROOT"
exec python src/quant/gguf_pack.py --config "${CONFIG:-configs/gguf_iq3.env}" "$@"
