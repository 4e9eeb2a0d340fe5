#!/usr/bin/env bash
# How much of a GGUF's KL is luck: five calibration texts, each by llama-quantize and by us:  bash pipelines/gguf_spread.sh
# For razor-tiny's types of gguf_results.sh, about half an hour each on one core. TYPES="IQ3_XXS" takes some, TEXTS="tiny:0 tiny:1"
# other texts. A killed run goes on behind the last file.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
read -ra texts <<<"${TEXTS:-tiny:0 tiny:1 tiny:2 tiny:3 tiny:4}"
for type in ${TYPES:-IQ3_XXS IQ2_XS Q3_K Q4_K}; do
    tag=razor_tiny_gguf_${type,,}
    [ -e "results/spread/$tag.json" ] ||
        python src/eval/gguf_spread.py --model models/razor-tiny --base-type "$type" --texts "${texts[@]}" \
            --work "$SCRATCH/gguf_spread" --tag "$tag"
done
