#!/usr/bin/env bash
# Makes the records behind docs/PACKED.md:  bash pipelines/packed_results.sh      (about four minutes on one core)
# razor-tiny packed and compared bit for bit; then what vLLM on a CPU (pipelines/vllm_cpu_env.sh) makes of packed weights, beside
# the same weights in BF16. FORCE=1 replaces records that are there.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
vllm=${MOE_LOWBIT_VLLM_VENV:-$MOE_LOWBIT_ROOT/.venv-vllm}/bin/python
work=$SCRATCH/packed
force=${FORCE:+--force}
rm -rf "$work"
quantize() { python src/quant/quant_save.py --model "$1" --expert-bits 3 --linear-bits 4 --out "$2" >/dev/null; }

quantize models/razor-tiny "$work/razor-tiny-w3"
tag=razor_tiny_int3_int4_clip16_packed
python src/quant/packed_export.py --model "$work/razor-tiny-w3" --out "$work/razor-tiny-w3-packed" \
    --result results/quantize/$tag.json --tag $tag ${force:+"$force"}

# vLLM on a CPU runs Qwen3-Next, not Qwen3.5, and offers its kernel of 4-bit experts only where AMX is (docs/PACKED.md)
python src/eval/qwen3_next_form.py --model models/razor-tiny --out "$work/next"
quantize "$work/next" "$work/next-w3"
python src/quant/packed_export.py --model "$work/next-w3" --out "$work/next-w3-packed"
python src/quant/packed_export.py --model "$work/next-w3" --out "$work/next-w3-linears" --keep-experts
export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
compare() { "$vllm" src/eval/vllm_tokens.py --reference "$work/next-w3" --model "$work/$1" --tag "$2" ${force:+"$force"} "${@:3}"; }
compare next-w3-linears razor_tiny_vllm_packed_linears
compare next-w3-packed razor_tiny_vllm_packed_experts --unlock-cpu-experts
compare next razor_tiny_vllm_unquantized # how far apart two different models are on the same texts
