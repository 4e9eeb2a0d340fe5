#!/usr/bin/env bash
# Every rounding method on one model at the same grid, judged by KL:  bash pipelines/study.sh     (razor-tiny; an hour on 2 cores)
# First: bash pipelines/tiny_results.sh, whose evaluation of the original the accuracies are compared with. MODEL=DIR and NAME=prefix
# take another model, LIMIT=N other numbers of items. A killed run goes on where it stopped.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
model=${MODEL:-models/razor-tiny} name=${NAME:-razor_tiny}

quantized() { # tag method expert-bits [more options of quant_save]: the checkpoint, recorded once
    local record=()
    [ -e "results/quantize/$1.json" ] || record=(--result "results/quantize/$1.json" --tag "$1")
    [ -e "$SCRATCH/$1/recipe.json" ] && [ ${#record[@]} = 0 ] ||
        python src/quant/quant_save.py --model "$model" --expert-bits "$3" --linear-bits 4 --method "$2" \
            --out "$SCRATCH/$1" "${record[@]}" --force "${@:4}"
}

judge() { # the same arguments: KL
    [ -e "results/kl/$1.json" ] && return
    quantized "$@"
    python src/eval/moe_eval.py --model "$SCRATCH/$1" --reference "$model" --tag "$1"
}

axes() { # the same arguments: accuracy, compared in pairs with the original
    local items=250
    [ "$2" = gptq_refit ] && items=1000 # what it loses in facts, 250 items hardly show
    if [ ! -e "results/eval/$1.json" ]; then
        quantized "$@"
        python src/eval/vllm_eval8.py --model "$SCRATCH/$1" --tag "$1" --limit "${LIMIT:-$items}"
    fi
    paired "${name}_bf16" "$1"
}

paired() { # tag tag: both on the same items
    [ -e "results/compare/$1__$2.json" ] || python src/eval/compare_tags.py "$1" "$2"
}

for method in rtn_asym hqq wclip awq gptq gptq_refit; do
    judge "${name}_int3_int4_$method" "$method" 3
    axes "${name}_int3_int4_$method" "$method" 3
done
paired "${name}_int3_int4_clip16" "${name}_int3_int4_gptq_refit"
# Tokens counted by their gradient, second moments damped: what keeps facts.
weighted="${name}_int3_int4_gptq_refit_tokens"
judge "$weighted" gptq_refit 3 --token-power 0.4 --damping 0.1
axes "$weighted" gptq_refit 3 --token-power 0.4 --damping 0.1
for method in clip16 gptq_refit; do
    paired "${name}_int3_int4_$method" "$weighted"
done
for bits in 2 2.5 4; do
    judge "${name}_int${bits}_int4_gptq_refit" gptq_refit "$bits"
done
# Bits by measured KL: the sensitivities are measured once, for the first budget.
measured=results/probe/${name}_allocation3.json
[ -e "$measured" ] || python src/quant/moe_alloc.py --model "$model" --expert-bits 3 --out "$SCRATCH/${name}_allocation3.json" \
    --result "$measured" --tag "${name}_allocation3"
for bits in 3 2.5; do
    allocation=$SCRATCH/${name}_allocation$bits.json
    [ -e "$allocation" ] || python src/quant/moe_alloc.py --model "$model" --expert-bits "$bits" --measured "$measured" \
        --out "$allocation"
    judge "${name}_int${bits}mix_int4_gptq_refit" gptq_refit 3 --allocation "$allocation"
done
judge "${name}_int3mix_int4_clip" clip 3 --allocation "$SCRATCH/${name}_allocation3.json"
# Bits by the signals of the published study: a quarter of each layer's experts at 4 bits, a quarter at 2.
for strategy in random inverse frequency wmass asal wfro composite; do
    allocation=$SCRATCH/${name}_$strategy.json
    [ -e "$allocation" ] || python src/quant/moe_alloc.py --model "$model" --expert-bits 3 --strategy "$strategy" \
        --out "$allocation"
    for method in clip gptq_refit; do
        judge "${name}_int3${strategy}_int4_$method" "$method" 3 --allocation "$allocation"
    done
done
python src/eval/make_results.py
python src/eval/make_ladder.py
python src/eval/check_results.py
python src/eval/plot_results.py
