#!/usr/bin/env bash
# A corpus of real text from the packages of configs/text_sources.txt (830 MB of archives, 10 minutes of one core):
#   bash pipelines/make_text.sh [--out DIR]
# Five strata (prose, code, manual pages, other languages, structured data), split by package into train, calibration and held-out.
# Extra arguments go to src/distill/tiny_corpus.py. A killed run goes on with the archives that it has.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
exec python src/distill/tiny_corpus.py --out "$SCRATCH/text" "$@"
