#!/usr/bin/env bash
# The records of razor-tiny behind results/RESULTS.md, which names the part of each row:  bash pipelines/results.sh PART...
# Parts, in this order; times are those of two CPU cores:
#   tiny    the original and its data-free recipes: size, KL, accuracy        an hour (LIMIT=100: fewer items, minutes)
#   study   every rounding method at the same grid, bits by measured KL     an hour; MODEL=DIR NAME=prefix: another model
#   gguf    for four types llama-quantize and ours, nearest and with error feedback, at the same types and calibration text; files
#           of the same size with types by measured sensitivity; accuracy in llama-server; speed     an hour; TYPES="IQ3_XXS Q3_K"
#   spread  how much of a GGUF's KL is luck: five calibration texts          half an hour a type; TYPES, TEXTS="tiny:0 tiny:1"
#   vl      razor-tiny-vl: accuracy on drawn pictures, KL, a GGUF             five minutes
#   size    what larger groups, which make a packed file smaller, cost in KL     five minutes
#   packed  razor-tiny packed bit for bit, and in vLLM on a CPU (pipelines/vllm_cpu_env.sh)     four minutes; FORCE=1 replaces records
#   panel   an int3 checkpoint and a GGUF on a panel of frozen tokens; WIKI=FILE: the test file of WikiText-2     ten minutes
# A killed run goes on where it stopped. A record that is there is kept: remove those that you want to make again. Then the pages:
# bash pipelines/pages.sh
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
source pipelines/records.sh

tiny() {
    local model=models/razor-tiny name=razor_tiny clip=razor_tiny_int3_int4_clip16 recipe tag experts others steps
    judge razor_tiny_bf16 "$model"
    evaluate razor_tiny_bf16 "$model" 1000
    for recipe in "int3_int4_clip16 3 4 16" "int4 4 4 16" "int3_int4_absmax 3 4 1" "int2_int4_absmax 2 4 1"; do
        read -r tag experts others steps <<<"$recipe"
        tag=razor_tiny_$tag
        if ! [[ -e results/quantize/$tag.json && -e results/kl/$tag.json && -e results/eval/$tag.json ]]; then
            quantized "$tag" --expert-bits "$experts" --linear-bits "$others" --group 128 --clip-steps "$steps"
        fi
        if [ "$tag" = "$clip" ]; then judge "$tag" "$SCRATCH/$tag"; else judge "$tag" "$SCRATCH/$tag" "$clip"; fi
        evaluate "$tag" "$SCRATCH/$tag" 1000
        against razor_tiny_bf16 "$tag"
    done
    judged
}

rounded() { # tag "base..." method expert-bits [options of quant_save]: KL of a checkpoint, beside that of its bases
    [ -e "results/kl/$1.json" ] && return
    quantized "$1" --expert-bits "$4" --linear-bits 4 --method "$3" "${@:5}"
    # shellcheck disable=SC2086 # a list of words
    judge "$1" "$SCRATCH/$1" $2
}

axes() { # the same arguments: accuracy too, in pairs with the original
    local items=250
    [ "$3" = gptq_refit ] && items=1000 # what it loses in facts, 250 items hardly show
    rounded "$@"
    if [ ! -e "results/eval/$1.json" ]; then
        quantized "$1" --expert-bits "$4" --linear-bits 4 --method "$3" "${@:5}"
        evaluate "$1" "$SCRATCH/$1" "$items"
    fi
    against "${name}_bf16" "$1"
}

packed_gib() { # tag: GiB of a checkpoint's codes and scales, rounded up
    python -c 'import json, math, sys; m = json.load(open(sys.argv[1]))["metrics"]; print(math.ceil(m["packed_bytes"] / 1024) / 2**20)' \
        "results/quantize/$1.json"
}

study() {
    local model=${MODEL:-models/razor-tiny} name=${NAME:-razor_tiny} method bits weighted clip refit base
    clip=${name}_int3_int4_clip16 refit=${name}_int3_int4_gptq_refit
    for method in rtn_asym hqq wclip awq gptq gptq_refit; do
        axes "${name}_int3_int4_$method" "$clip" "$method" 3
    done
    against "${name}_int3_int4_clip16" "${name}_int3_int4_gptq_refit"
    # Tokens counted by their gradient, second moments damped: what keeps facts.
    weighted="${name}_int3_int4_gptq_refit_tokens"
    axes "$weighted" "$refit $clip" gptq_refit 3 --token-power 0.4 --damping 0.1
    for method in clip16 gptq_refit; do
        against "${name}_int3_int4_$method" "$weighted"
    done
    for bits in 2 2.5 4; do
        base=$clip
        [ "$bits" = 4 ] && base=${name}_int4
        [ "$bits" = 2 ] && base=${name}_int2_int4_absmax
        rounded "${name}_int${bits}_int4_gptq_refit" "$base" gptq_refit "$bits"
    done
    # Bits of all matrices by measured KL, at the bytes of the recipe by hand.
    for bits in 2 3 4; do
        base=${name}_int${bits}_int4_gptq_refit
        rounded "${name}_budget${bits}_gptq_refit" "$base" gptq_refit "$bits" --target-gib "$(packed_gib "$base")"
    done
    judged
}

pack() { # tag directory settings...: a GGUF in $work, recorded
    if [ ! -e "results/pack/$1.json" ] || [ ! -d "$work/$2" ]; then
        rm -f "results/pack/$1.json"
        local weights=("TOKEN_WEIGHTS=$work/token-weights.st")
        case " ${*:3} " in *" METHOD=nearest "*) weights=() ;; esac # which counts all tokens alike
        env MODEL="$model" ${weights[@]+"${weights[@]}"} TAG="$1" OUT="$work/$2" FORCE=1 "${@:3}" bash pipelines/pack_gguf.sh
    fi
}

gguf() {
    local model=${MODEL:-models/razor-tiny} name=${NAME:-razor_tiny} work=$SCRATCH/gguf types=" ${TYPES:-IQ3_XXS IQ2_XS Q3_K Q4_K} "
    local file type tag method recipe size
    file=$(basename "$model")
    mkdir -p "$work"
    pack "${name}_gguf_bf16" bf16 BASE_TYPE=BF16 TENSOR_TYPES= METHOD=nearest
    served "${name}_gguf_bf16" "$work/bf16/$file-BF16.gguf" "$model"
    for type in $types; do
        tag=${name}_gguf_${type,,}
        pack "${tag}_llama" reference BASE_TYPE="$type" REFERENCE=1
        judge "${tag}_llama" "$work/reference/$file-$type.gguf"
        for method in nearest ldlq; do
            pack "${tag}_$method" "$type-$method" BASE_TYPE="$type" METHOD="$method"
            judge "${tag}_$method" "$work/$type-$method/$file-$type.gguf" "${tag}_llama"
        done
    done
    for type in IQ3_XXS IQ2_XS; do # the accuracy of the original is part tiny's
        [[ $types = *" $type "* ]] || continue
        tag=${name}_gguf_${type,,}
        evaluate "${tag}_llama" "$work/reference/$file-$type.gguf" 250 --tokenizer "$model"
        evaluate "${tag}_ldlq" "$work/$type-ldlq/$file-$type.gguf" 250 --tokenizer "$model"
        against "${tag}_llama" "${tag}_ldlq"
        against "${name}_bf16" "${tag}_ldlq"
    done
    [[ $types = *" IQ3_XXS "* ]] || { judged && return; }
    # The published recipe's size, spent by measured sensitivity; then among the experts only.
    recipe=$work/IQ3_XXS-ldlq/$file-IQ3_XXS.gguf
    size=$(python -c 'import sys, os; print(os.path.getsize(sys.argv[1]) / 2**30)' "$recipe")
    pack "${name}_gguf_budget" budget BASE_TYPE=IQ3_XXS METHOD=ldlq TARGET_GIB="$size"
    judge "${name}_gguf_budget" "$work/budget/$file-IQ3_XXS.gguf" "${name}_gguf_iq3_xxs_ldlq"
    pack "${name}_gguf_budget_experts" budget_experts BASE_TYPE=IQ3_XXS METHOD=ldlq TARGET_GIB="$size" \
        PROTECTED=configs/gguf_tensor_types_iq3.txt
    judge "${name}_gguf_budget_experts" "$work/budget_experts/$file-IQ3_XXS.gguf" "${name}_gguf_iq3_xxs_ldlq"
    judged
    # What is evaluated is what is deployed: the dequantized checkpoint against its file.
    [ -d "$work/dequantized" ] || python src/quant/gguf_dequant.py --gguf "$recipe" --model "$model" --out "$work/dequantized"
    served "${name}_gguf_iq3_xxs_ldlq_dequantized" "$recipe" "$work/dequantized"
    [ -e "results/bench/${name}_gguf_iq3_xxs.json" ] || bash pipelines/bench.sh --gguf "$recipe" \
        --result "results/bench/${name}_gguf_iq3_xxs.json" --tag "${name}_gguf_iq3_xxs"
}

spread() {
    local texts type tag
    read -ra texts <<<"${TEXTS:-tiny:0 tiny:1 tiny:2 tiny:3 tiny:4}"
    for type in ${TYPES:-IQ3_XXS IQ2_XS Q3_K Q4_K}; do
        tag=razor_tiny_gguf_${type,,}
        [ -e "results/spread/$tag.json" ] || python src/eval/study_spread.py --model models/razor-tiny --base-type "$type" \
            --texts "${texts[@]}" --work "$SCRATCH/gguf_spread" --tag "$tag"
    done
}

vl() {
    local model=models/razor-tiny-vl name=razor_tiny_vl work=$SCRATCH/vl bits experts others tag
    mkdir -p "$work"
    seen() { [ -e "results/eval/$1.json" ] || python src/eval/mm_eval.py --model "$2" --tag "$1" --backend hf ${LIMIT:+--limit "$LIMIT"}; }
    seen "${name}_bf16" "$model"
    for bits in "3 4" "2 4" "2 2"; do
        read -r experts others <<<"$bits"
        tag=${name}_int${experts}_int$others
        quantized "$tag" --expert-bits "$experts" --linear-bits "$others"
        seen "$tag" "$SCRATCH/$tag"
        [ -e "results/kl/$tag.json" ] ||
            python src/eval/moe_eval.py --pictures --model "$SCRATCH/$tag" --reference "$model" --tag "$tag" --items "${LIMIT:-250}"
        against "${name}_bf16" "$tag"
    done
    if [ ! -e "results/pack/${name}_gguf_iq3_xxs_ldlq.json" ]; then # text of the tasks' training split calibrates the text model
        python -c 'from tiny_data import vl_texts; t = vl_texts(); print(*map("\n".join, zip(t[1::4], t[3::4])), sep="\n\n")' \
            >"$work/text.txt"
        env MODEL="$model" OUT="$work/gguf" CALIB="$work/text.txt" TAG="${name}_gguf_iq3_xxs_ldlq" FORCE=1 bash pipelines/pack_gguf.sh
    fi
}

size() {
    local model=models/razor-tiny name=razor_tiny base=razor_tiny_int3_int4_gptq_refit group
    mkdir -p "$SCRATCH" # shared experts of 128 inputs have no group of 256: left alone in both
    echo '{"overrides": {"model.layers.*.mlp.shared_expert.down_proj.weight": 16}}' >"$SCRATCH/razor_tiny_shared.json"
    for group in 128 256; do
        rounded "razor_tiny_int3_int4_g${group}_gptq_refit" "$base" gptq_refit 3 --group "$group" --allocation "$SCRATCH/razor_tiny_shared.json"
    done
    judged
}

packed() {
    local vllm=${MOE_LOWBIT_VLLM_VENV:-$MOE_LOWBIT_ROOT/.venv-vllm}/bin/python work=$SCRATCH/packed force=${FORCE:+--force}
    local tag=razor_tiny_int3_int4_clip16_packed
    rm -rf "$work"
    halved() { python src/quant/quant_save.py --model "$1" --expert-bits 3 --linear-bits 4 --out "$2" >/dev/null; }
    halved models/razor-tiny "$work/razor-tiny-w3"
    python src/quant/packed_export.py --model "$work/razor-tiny-w3" --out "$work/razor-tiny-w3-packed" \
        --result results/quantize/$tag.json --tag $tag ${force:+"$force"}
    # vLLM on a CPU runs Qwen3-Next, not Qwen3.5, codes of 4 bits, and those of experts only where AMX is (docs/PACKED.md)
    python src/eval/vllm_form.py --model models/razor-tiny --out "$work/next" --form qwen3_next
    halved "$work/next" "$work/next-w3"
    python src/quant/packed_export.py --model "$work/next-w3" --out "$work/next-w3-packed" --packed-bits 4
    python src/quant/packed_export.py --model "$work/next-w3" --out "$work/next-w3-linears" --packed-bits 4 --keep-experts
    export VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
    same() { "$vllm" src/eval/vllm_tokens.py --reference "$work/next-w3" --model "$work/$1" --tag "$2" ${force:+"$force"} "${@:3}"; }
    same next-w3-linears razor_tiny_vllm_packed_linears
    same next-w3-packed razor_tiny_vllm_packed_experts --unlock-cpu-experts
    same next razor_tiny_vllm_unquantized # how far apart two different models are on the same texts
}

panel() {
    local model=models/razor-tiny name=razor_tiny work=$SCRATCH/gguf tag=razor_tiny_int3_int4_gptq_refit gguf=razor_tiny_gguf
    local text=()
    [ -z "${WIKI:-}" ] || text=(--text "wikitext-2=$WIKI")
    lost() {
        [ -e "results/panel/$1.json" ] ||
            python src/eval/panel.py --reference "$model" --judge "$2" --tag "$1" "${@:3}" ${text[@]+"${text[@]}"}
    }
    quantized "$tag" --expert-bits 3 --linear-bits 4 --method gptq_refit
    lost "$tag" "$SCRATCH/$tag"
    pack ${gguf}_bf16 bf16 BASE_TYPE=BF16 TENSOR_TYPES= METHOD=nearest
    lost ${gguf}_bf16 "$work/bf16/razor-tiny-BF16.gguf"
    pack ${gguf}_iq3_xxs_ldlq IQ3_XXS-ldlq BASE_TYPE=IQ3_XXS METHOD=ldlq
    lost ${gguf}_iq3_xxs_ldlq "$work/IQ3_XXS-ldlq/razor-tiny-IQ3_XXS.gguf" --floor ${gguf}_bf16
}

parts=" tiny study gguf spread vl size packed panel "
[ $# -gt 0 ] || { echo "error: no part named; known:$parts" >&2; exit 2; }
for part in "$@"; do
    [[ $parts = *" $part "* ]] || { echo "error: no part $part; known:$parts" >&2; exit 2; }
done
for part in "$@"; do "$part"; done
