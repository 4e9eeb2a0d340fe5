"""Licences of all packages that are installed in the environment, and which of them need a look.

    python src/quant/licences.py [--strict]

The licence is what a package's own metadata says: its expression, else its classifiers, else the first line of its text.
"needs a look": copyleft that asks something of who ships the program, or nothing said. --strict ends with 1 where one does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import Distribution

from console import run_cli

COPYLEFT = re.compile(r"\b(A|L)?GPL|General Public License|EUPL|SSPL|CC-BY-(NC|SA)", re.I)
FREE = re.compile(r"GPL with exception|Classpath", re.I)
# Packages whose metadata is silent or speaks of a part that is not used; where each was read.
KNOWN = {
    "antlr4-python3-runtime": "BSD-3-Clause",  # LICENSE.txt of antlr/antlr4
    "latex2sympy2-extended": "MIT",  # LICENSE of huggingface/latex2sympy2_extended
}


def licence_of(distribution: Distribution) -> str:
    """One line, or "" where the package says nothing."""
    meta = distribution.metadata
    if expression := meta.get("License-Expression"):
        return expression
    classifiers = [value.rpartition(" :: ")[2] for value in meta.get_all("Classifier") or () if value.startswith("License ::")]
    named = [value for value in classifiers if value != "OSI Approved"]
    if named:
        return ", ".join(named)
    text = (meta.get("License") or "").strip().splitlines()
    return text[0].strip()[:60] if text else KNOWN.get(distribution.metadata["Name"].lower().replace("_", "-"), "")


def installed() -> list[tuple[str, str, str]]:
    """(name, version, licence) of every package, by name."""
    found = {d.metadata["Name"]: (d.metadata["Name"], d.version, licence_of(d)) for d in importlib.metadata.distributions()}
    return sorted(found.values(), key=lambda entry: entry[0].lower())


def to_look_at(packages: Iterable[tuple[str, str, str]]) -> list[str]:
    """Names of packages with copyleft or without a word."""
    return [name for name, _, licence in packages if not licence or COPYLEFT.search(licence) and not FREE.search(licence)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--strict", action="store_true", help="end with 1 where a package needs a look")
    args = parser.parse_args()
    packages = installed()
    for name, version, licence in packages:
        print(f"{name:<28}{version:<18}{licence or 'NOT SAID'}")
    counts = Counter(licence or "NOT SAID" for _, _, licence in packages)
    print("\n" + ", ".join(f"{licence}: {count}" for licence, count in counts.most_common()))
    look = to_look_at(packages)
    print(f"{len(packages)} packages; needs a look: {', '.join(look) or 'none'}", flush=True)
    return int(bool(look) and args.strict)


if __name__ == "__main__":
    run_cli(main)
