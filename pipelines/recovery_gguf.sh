#!/usr/bin/env bash
# The model recovered through IQ2_XS, as a GGUF in llama-server and decoded in transformers:  bash pipelines/recovery_gguf.sh
# First, best on a GPU: PARTS="students cache before iq2_xs" bash pipelines/recovery_study.sh. Then twenty minutes on a CPU core; a
# killed run goes on where it stopped. WORK is that of the study; LIMIT=N takes other numbers of items.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
teacher=models/razor-tiny name=recovery_gguf_iq2_xs
made=${WORK:-work/recovery}/recovery_iq2_xs work=$SCRATCH/recovery_gguf

evaluate() { # tag options...: accuracy
    [ -e "results/eval/$1.json" ] || python src/eval/vllm_eval8.py --tag "$1" "${@:2}"
}

judge() { # tag file reference: KL
    [ -e "results/kl/$1.json" ] || python src/eval/gguf_kl.py --model "$2" --reference "$3" --tag "$1" --items 64
}

for state in before recovered; do
    file=$work/$state/$state-BF16.gguf decoded=$work/decoded_$state
    [ -e "$file" ] || python src/quant/gguf_pack.py --model "$made/$state" --blocks "$made/$state/ggml.safetensors" --base-type BF16 \
        --method nearest --out "$work/$state"
    [ -d "$decoded" ] || python src/quant/gguf_dequant.py --gguf "$file" --model "$made/$state" --out "$decoded"
    evaluate "${name}_$state" --model "$file" --tokenizer "$teacher" --limit "${LIMIT:-1000}"
    evaluate "recovery_iq2_xs_$state" --model "$decoded" --backend hf --batch 250 --limit "${LIMIT:-500}"
    judge "${name}_$state" "$file" "$teacher"
done
judge "${name}_recovered_dequantized" "$file" "$decoded"
python src/eval/compare_tags.py "${name}_before" "${name}_recovered" --teacher recovery_bf16
python src/eval/compare_tags.py recovery_iq2_xs_before recovery_iq2_xs_recovered
python src/eval/compare_tags.py recovery_iq2_xs_recovered "${name}_recovered"
