# shellcheck shell=bash disable=SC2154 # $model and $name are the caller's
# What the pipelines that make records share. It is sourced; bash pipelines/records.sh --help prints this.
# Each function makes one record under results/ and does nothing where it is there. $model: the original; $name: what its
# tags begin with.

case ${1:-} in -h | --help) [ "${BASH_SOURCE[0]}" != "$0" ] || { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; exit 0; } ;; esac

quantized() { # tag options of quant_save...: the checkpoint in $SCRATCH, recorded once
    local record=()
    [ -e "results/quantize/$1.json" ] || record=(--result "results/quantize/$1.json" --tag "$1")
    [ -e "$SCRATCH/$1/recipe.json" ] && [ ${#record[@]} = 0 ] ||
        python src/quant/quant_save.py --model "$model" --out "$SCRATCH/$1" "${record[@]}" --force "${@:2}"
}

waiting=() pairs=()
judge() { # tag model [base...]: KL to the original once `judged` is called, beside that of other tags
    local base
    [ -e "results/kl/$1.json" ] || waiting+=(--model "$2" --tag "$1")
    for base in "${@:3}"; do pairs+=(--pair "$1/$base"); done
}

judged() { # what waits, in one call: results/kl/TAG.json of each model, and what is compared in NAME_pairs.json
    [ ${#waiting[@]} = 0 ] || python src/eval/moe_eval.py "${waiting[@]}" --reference "$model" --pairs "${name}_pairs" \
        ${KL_ITEMS:+--items "$KL_ITEMS"} ${pairs[@]+"${pairs[@]}"}
    waiting=() pairs=()
}

served() { # tag GGUF reference: the same of a file in llama-server, which is asked for every position
    [ -e "results/kl/$1.json" ] ||
        python src/eval/moe_eval.py --model "$2" --reference "$3" --tag "$1" --server= --items "${SERVED_ITEMS:-8}"
}

evaluate() { # tag model items [options]: accuracy; LIMIT=N takes other numbers of items
    [ -e "results/eval/$1.json" ] || python src/eval/vllm_eval8.py --model "$2" --tag "$1" --limit "${LIMIT:-$3}" "${@:4}"
}

against() { # base other: accuracy on the same items, in pairs
    [ -e "results/compare/$1__$2.json" ] || python src/eval/compare_tags.py "$1" "$2"
}
