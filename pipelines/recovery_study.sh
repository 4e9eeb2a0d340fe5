#!/usr/bin/env bash
# What recovery wins back on razor-tiny, measured:  bash pipelines/recovery_study.sh            (configs/recovery_study.env)
# Parts run JOBS at a time (default: 1; on a GPU, which razor-tiny leaves mostly idle, all at once) for at most PART_SECONDS.
# PARTS="policy teacher" runs some of them. What exists is kept, so that the same command goes on. Logs: WORK/logs.
# GATHER=DIR also packs records, samples, blocks and recovered models into DIR, most important first, in pieces of 15 MiB.
# shellcheck disable=SC2086,SC2012 # lists of words that are meant to be split; names of our own
set -uo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh" || exit
cd "$MOE_LOWBIT_ROOT" || exit
study=src/distill/recovery_study.py
work=${WORK:-$(sed -n 's/^WORK=\([^ ]*\).*/\1/p' configs/recovery_study.env)}
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
