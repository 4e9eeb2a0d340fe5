"""Puts the three source folders on the import path, for the tests and for the processes that they start."""

import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
SOURCES = [str(REPO / "src" / folder) for folder in ("quant", "eval", "distill")]
sys.path[:0] = SOURCES
os.environ["PYTHONPATH"] = os.pathsep.join([*SOURCES, *filter(None, [os.environ.get("PYTHONPATH")])])
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
