#!/usr/bin/env bash
# Speed of the quantizers on this machine, beside the limit:  bash pipelines/bench.sh [--layer small|122b] [--result F --tag T]
# Speed and memory of a GGUF file in llama.cpp:               bash pipelines/bench.sh --gguf F.gguf [--result F --tag T]
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
case " $* " in
*" --gguf"[\ =]*) exec python "$MOE_LOWBIT_ROOT/src/eval/gguf_bench.py" "$@" ;;
esac
cd "$MOE_LOWBIT_ROOT"
exec python src/quant/quant_bench.py "$@"
