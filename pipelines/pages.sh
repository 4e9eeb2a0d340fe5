#!/usr/bin/env bash
# Every page and picture from the records, then the check of every figure:  bash pipelines/pages.sh
# Figures that documents cite are put in as the records have them; the words around them are to be read again.
# results/report.html is built here and not committed.
set -euo pipefail
OPTIONS_FOLLOW=none source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
python src/eval/page_results.py
python src/eval/page_report.py
python src/quant/page_sizes.py --write
python src/eval/page_house.py
python src/eval/check_results.py results/RESULTS.md docs/LADDER_RESULTS.md
python src/eval/check_results.py --citations-only --refresh README.md docs/*.md
