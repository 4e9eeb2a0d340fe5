#!/usr/bin/env bash
# razor-tiny and its data-free recipes: size, KL, accuracy; then the pages:  bash pipelines/tiny_results.sh
# About an hour on two CPU cores (LIMIT=100: fewer items, minutes); a killed run goes on where it stopped. results/RESULTS.md names
# the pipeline that makes each of its rows. A record that is there is kept: remove those that you want to make again.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
model=models/razor-tiny

evaluate() { # tag directory: KL and accuracy
    [ -e "results/kl/$1.json" ] || python src/eval/moe_eval.py --model "$2" --reference "$model" --tag "$1"
    [ -e "results/eval/$1.json" ] || python src/eval/vllm_eval8.py --model "$2" --tag "$1" --limit "${LIMIT:-1000}"
}

quantized() { # tag expert-bits linear-bits clip-steps
    local record=() kind
    [ -e "results/quantize/$1.json" ] || record=(--result "results/quantize/$1.json" --tag "$1")
    for kind in quantize kl eval; do
        [ -e "results/$kind/$1.json" ] && continue
        [ -e "$SCRATCH/$1/recipe.json" ] && [ ${#record[@]} = 0 ] ||
            python src/quant/quant_save.py --model "$model" --expert-bits "$2" --linear-bits "$3" --group 128 --clip-steps "$4" \
                --out "$SCRATCH/$1" "${record[@]}" --force
        break
    done
    evaluate "$1" "$SCRATCH/$1"
    [ -e "results/compare/razor_tiny_bf16__$1.json" ] || python src/eval/compare_tags.py razor_tiny_bf16 "$1"
}

evaluate razor_tiny_bf16 "$model"
quantized razor_tiny_int4 4 4 16
quantized razor_tiny_int3_int4_clip16 3 4 16
quantized razor_tiny_int3_int4_absmax 3 4 1
quantized razor_tiny_int2_int4_absmax 2 4 1
python src/eval/make_results.py
python src/eval/make_ladder.py
python src/eval/check_results.py
python src/eval/plot_results.py
python src/eval/make_report.py
