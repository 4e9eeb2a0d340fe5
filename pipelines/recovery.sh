#!/usr/bin/env bash
# What recovery wins back on razor-tiny, measured:  bash pipelines/recovery.sh            (configs/recovery_study.env)
# Parts run JOBS at a time (default: 1; on a GPU, which razor-tiny leaves mostly idle, all at once) for at most PART_SECONDS.
# PARTS="policy teacher" runs some of them. What exists is kept, so that the same command goes on. Logs: WORK/logs.
# GATHER=DIR also packs records, samples, blocks and recovered models into DIR, most important first, in pieces of 15 MiB.
#
# The model recovered through IQ2_XS, as a GGUF in llama-server and decoded in transformers:  bash pipelines/recovery.sh gguf
# First, best on a GPU: PARTS="students cache before iq2_xs" bash pipelines/recovery.sh. Then twenty minutes on a CPU core; a
# killed run goes on where it stopped. WORK is that of the study; LIMIT=N takes other numbers of items.
# shellcheck disable=SC2086,SC2012 # lists of words that are meant to be split; names of our own
set -uo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh" || exit
cd "$MOE_LOWBIT_ROOT" || exit
study=src/distill/study_recovery.py
work=${WORK:-$(sed -n 's/^WORK=\([^ ]*\).*/\1/p' configs/recovery_study.env)}

gguf() {
    set -e
    local teacher=models/razor-tiny name=recovery_gguf_iq2_xs made=$work/recovery_iq2_xs out=$SCRATCH/recovery_gguf state file decoded
    evaluate() { # tag options...: accuracy
        [ -e "results/eval/$1.json" ] || python src/eval/vllm_eval8.py --tag "$1" "${@:2}"
    }
    judge() { # tag file reference: KL
        [ -e "results/kl/$1.json" ] || python src/eval/gguf_kl.py --model "$2" --reference "$3" --tag "$1" --items 64
    }
    for state in before recovered; do
        file=$out/$state/$state-BF16.gguf decoded=$out/decoded_$state
        [ -e "$file" ] || python src/quant/gguf_pack.py --model "$made/$state" --blocks "$made/$state/ggml.safetensors" \
            --base-type BF16 --method nearest --out "$out/$state"
        [ -d "$decoded" ] || python src/quant/gguf_dequant.py --gguf "$file" --model "$made/$state" --out "$decoded"
        evaluate "${name}_$state" --model "$file" --tokenizer "$teacher" --limit "${LIMIT:-1000}"
        evaluate "recovery_iq2_xs_$state" --model "$decoded" --backend hf --batch 250 --limit "${LIMIT:-500}"
        judge "${name}_$state" "$file" "$teacher"
    done
    judge "${name}_recovered_dequantized" "$file" "$decoded"
    python src/eval/compare_tags.py "${name}_before" "${name}_recovered" --teacher recovery_bf16
    python src/eval/compare_tags.py recovery_iq2_xs_before recovery_iq2_xs_recovered
    python src/eval/compare_tags.py recovery_iq2_xs_recovered "${name}_recovered"
}
case ${1:-} in
gguf) gguf; exit ;;
?*) echo "error: $1: expected nothing, or gguf; --help explains it" >&2; exit 2 ;;
esac

results=${RESULTS:-results}
mkdir -p "$work/logs"
parts=${PARTS:-$(python $study --list) default} || exit # default: bash pipelines/distill.sh as it is; compare: the last of all
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
jobs=${JOBS:-$([ "$gpus" -gt 0 ] && echo 16 || echo 1)}
export study work PART_SECONDS=${PART_SECONDS:-1800}
[ "$jobs" -gt 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
run() {
    local began=$SECONDS status=0 command="python $study --part $1"
    [ "$1" = default ] && command="env -u STEPS -u ROWS -u LIMIT -u MAX_TOKENS -u CHUNK -u RANK -u MODE -u LR -u WARMUP -u KL_ITEMS \
        -u EVAL_LIMIT -u RESULTS WORK=$work/default TAG=recovery_default bash pipelines/distill.sh"
    timeout --kill-after=5 "$PART_SECONDS" $command >>"$work/logs/$1.log" 2>&1 || status=$?
    echo "$1: $([ $status = 0 ] && echo "done" || echo "FAILED with $status, see $work/logs/$1.log") after $((SECONDS - began)) s"
    return $status
}
export -f run
case " ${parts//$'\n'/ } " in *" students "*) CUDA_VISIBLE_DEVICES="" run students || exit ;; esac
{ printf '%s\n' $parts | grep -vx -e students -e compare || true; } | xargs -P "$jobs" -I{} bash -c 'run {}'
failed=$?
case " ${parts//$'\n'/ } " in *" compare "*) run compare || failed=1 ;; esac
if [ -n "${GATHER:-}" ]; then
    mkdir -p "$GATHER"
    records=$(ls -d "$results"/distill/recovery_* "$results"/eval/recovery_* "$work"/logs "$work"/*/kl "$work"/*/*/phase.json \
        "$work"/*/adapter/adapter.json "$work"/*/recovered/recipe.json "$work"/*/rollouts/rollouts.json 2>/dev/null)
    tar cf - $records | gzip -9 >"$GATHER/records.tar.gz"
    blocks=$(ls "$work"/*/before/ggml.safetensors "$work"/*/recovered/ggml.safetensors 2>/dev/null)
    [ -n "$blocks" ] && tar cf - $blocks | split -b 15M - "$GATHER/blocks.tar."
    models=$(ls -d "$work"/recovery_int*_{policy,teacher}/recovered "$work"/recovery_int3/recovered 2>/dev/null)
    [ -n "$models" ] && tar cf - $models | xz -T4 -3 | split -b 15M - "$GATHER/models.tar.xz."
    ls -l "$GATHER"
fi
exit "$failed"
