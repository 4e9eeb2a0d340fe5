#!/usr/bin/env bash
# razor-tiny-vl and its quantized copies: size, accuracy on drawn pictures, KL, a GGUF:  bash pipelines/vl_results.sh
# About five minutes on one core (LIMIT=10: fewer pictures); a killed run goes on where it stopped.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
model=models/razor-tiny-vl name=razor_tiny_vl work=$SCRATCH/vl

evaluate() { # tag directory
    [ -e "results/eval/$1.json" ] ||
        python src/eval/mm_eval.py --model "$2" --tag "$1" --backend hf ${LIMIT:+--limit "$LIMIT"}
}

mkdir -p "$work"
evaluate "${name}_bf16" "$model"
for bits in "3 4" "2 4" "2 2"; do
    read -r experts others <<<"$bits"
    tag=${name}_int${experts}_int$others
    if [ ! -e "results/quantize/$tag.json" ] || [ ! -e "$work/$tag/recipe.json" ]; then
        python src/quant/quant_save.py --model "$model" --expert-bits "$experts" --linear-bits "$others" --out "$work/$tag" \
            --result "results/quantize/$tag.json" --tag "$tag" --force
    fi
    evaluate "$tag" "$work/$tag"
    [ -e "results/kl/$tag.json" ] ||
        python src/eval/mm_kl.py --model "$work/$tag" --reference "$model" --tag "$tag" --items "${LIMIT:-250}"
    [ -e "results/compare/${name}_bf16__$tag.json" ] || python src/eval/compare_tags.py "${name}_bf16" "$tag"
done
if [ ! -e "results/pack/${name}_gguf_iq3_xxs_ldlq.json" ]; then # text of the tasks' training split calibrates the text model
    python -c 'from tiny_data import vl_texts; t = vl_texts(); print(*map("\n".join, zip(t[1::4], t[3::4])), sep="\n\n")' \
        >"$work/text.txt"
    env MODEL="$model" OUT="$work/gguf" CALIB="$work/text.txt" TAG="${name}_gguf_iq3_xxs_ldlq" FORCE=1 bash pipelines/pack_gguf.sh
fi
