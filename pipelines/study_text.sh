#!/usr/bin/env bash
# The table at equal bytes for a model of real text: every rounding method and GGUF type, judged, the most important rows first:
#   bash pipelines/study_text.sh --model models/text-35m --text work/text --work work/study-35m [--rows 'int3_*'] [--until 1500]
# The same of SmolLM2 (make_tiny.sh smollm2), on WikiText-2 too:
#   bash pipelines/study_text.sh --model work/smollm2 --text work/text --work work/study-smollm2 --group 64 --file wiki.test.raw
# Records: results/text/NAME_ROW_cTEXT.json; then bash pipelines/pages.sh. llama.cpp as in pack_gguf.sh. A killed run goes on with
# the same command; --list names the rows that are missing.
set -euo pipefail
OPTIONS_FOLLOW=1 source "$(dirname -- "${BASH_SOURCE[0]}")/../env.sh"
cd "$MOE_LOWBIT_ROOT"
exec python src/eval/study_text.py "$@"
