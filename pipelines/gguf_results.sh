#!/usr/bin/env bash
# Every record of GGUF files on razor-tiny, then the page:  bash pipelines/gguf_results.sh       (an hour on two CPU cores)
# For four types of the experts: llama-quantize, ours by nearest rounding and with error feedback, at the same types and the same
# calibration text, judged by KL. Then a file of the same size with types by measured sensitivity, one that is evaluated in
# llama-server, and its speed. A killed run goes on where it stopped. TYPES="IQ3_XXS Q3_K" takes some of the types only. The original's
# accuracy, which files are compared with, is that of bash pipelines/tiny_results.sh.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
export MODEL=${MODEL:-models/razor-tiny}
name=${NAME:-razor_tiny} work=$SCRATCH/gguf file=$(basename "$MODEL") types=${TYPES:-IQ3_XXS IQ2_XS Q3_K Q4_K}

judge() { # tag file: KL to the original
    [ -e "results/kl/$1.json" ] || python src/eval/gguf_kl.py --model "$2" --reference "$MODEL" --tag "$1" --items "${KL_ITEMS:-128}"
}

export TOKEN_WEIGHTS=$work/token-weights.st

pack() { # tag directory settings...: a file, recorded
    if [ ! -e "results/pack/$1.json" ] || [ ! -d "$work/$2" ]; then
        rm -f "results/pack/$1.json"
        env TAG="$1" OUT="$work/$2" FORCE=1 "${@:3}" bash pipelines/pack_gguf.sh
    fi
}

evaluate() { # tag file: accuracy in llama-server
    [ -e "results/eval/$1.json" ] ||
        bash pipelines/eval.sh --model "$2" --tokenizer "$MODEL" --tag "$1" --limit "${LIMIT:-250}"
}

against() { # base other: the same items in pairs
    [ -e "results/compare/$1__$2.json" ] || python src/eval/compare_tags.py "$1" "$2"
}

mkdir -p "$work"
pack "${name}_gguf_bf16" bf16 BASE_TYPE=BF16 TENSOR_TYPES= METHOD=nearest
judge "${name}_gguf_bf16" "$work/bf16/$file-BF16.gguf"
for type in $types; do
    tag=${name}_gguf_${type,,}
    pack "${tag}_llama" reference BASE_TYPE="$type" REFERENCE=1
    judge "${tag}_llama" "$work/reference/$file-$type.gguf"
    for method in nearest ldlq; do
        pack "${tag}_$method" "$type-$method" BASE_TYPE="$type" METHOD="$method"
        judge "${tag}_$method" "$work/$type-$method/$file-$type.gguf"
    done
done

for type in IQ3_XXS IQ2_XS; do
    case " $types " in *" $type "*) ;; *) continue ;; esac
    tag=${name}_gguf_${type,,}
    evaluate "${tag}_llama" "$work/reference/$file-$type.gguf"
    evaluate "${tag}_ldlq" "$work/$type-ldlq/$file-$type.gguf"
    against "${tag}_llama" "${tag}_ldlq"
    against "${name}_bf16" "${tag}_ldlq"
done
case " $types " in *" IQ3_XXS "*) ;; *) exit ;; esac

# The published recipe's size, spent by measured sensitivity.
recipe=$work/IQ3_XXS-ldlq/$file-IQ3_XXS.gguf
size=$(python -c 'import sys, os; print(os.path.getsize(sys.argv[1]) / 2**30)' "$recipe")
pack "${name}_gguf_budget" budget BASE_TYPE=IQ3_XXS METHOD=ldlq TARGET_GIB="$size"
judge "${name}_gguf_budget" "$work/budget/$file-IQ3_XXS.gguf"
# The same, among the experts only.
pack "${name}_gguf_budget_experts" budget_experts BASE_TYPE=IQ3_XXS METHOD=ldlq TARGET_GIB="$size" \
    PROTECTED=configs/gguf_tensor_types_iq3.txt
judge "${name}_gguf_budget_experts" "$work/budget_experts/$file-IQ3_XXS.gguf"

# What is evaluated is what is deployed: the dequantized checkpoint against its file.
same=${name}_gguf_iq3_xxs_ldlq_dequantized
[ -d "$work/dequantized" ] || python src/quant/gguf_dequant.py --gguf "$recipe" --model "$MODEL" --out "$work/dequantized"
[ -e "results/kl/$same.json" ] ||
    python src/eval/gguf_kl.py --model "$recipe" --reference "$work/dequantized" --tag "$same" --items "${KL_ITEMS:-128}"
[ -e "results/bench/${name}_gguf_iq3_xxs.json" ] || bash pipelines/bench.sh --gguf "$recipe" \
    --result "results/bench/${name}_gguf_iq3_xxs.json" --tag "${name}_gguf_iq3_xxs"
python src/eval/make_results.py
python src/eval/make_ladder.py
python src/eval/check_results.py
