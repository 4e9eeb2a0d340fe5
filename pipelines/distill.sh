#!/usr/bin/env bash
# Recover a quantized model by on-policy distillation, at the same bytes:  bash pipelines/distill.sh   (configs/opd_tiny.env)
# Two steps end to end first:  bash pipelines/distill.sh --smoke      Another model:  CONFIG=configs/opd_r1.env bash pipelines/distill.sh
# What it would do, with sizes and times:  bash pipelines/distill.sh --dry-run [--smoke]
# Any key of the config from the environment: STEPS=50 WORK=work/mine TAG=mine. A killed run goes on with the same command.
# Several nodes train together: NNODES=2 NODE_RANK=0 RDZV=HOST:PORT on each, with its own NODE_RANK (docs/CLUSTER.md)
# Rollouts by servers: BACKEND=openai BASE_URL=URL,URL or @FILE SERVED_MODEL=NAME
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
export MOE_LOWBIT_CALLER=$PWD  # paths that a user types are relative to it, those of a config to the repository
cd "$MOE_LOWBIT_ROOT"
exec python src/distill/distill_run.py --config "${CONFIG:-configs/opd_tiny.env}" "$@"
