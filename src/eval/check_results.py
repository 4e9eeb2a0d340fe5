"""Check that every figure in results/RESULTS.md is the one in the JSON that it cites: python src/eval/check_results.py

A figure is cited as [94.2 %](eval/tag.json#metrics.tiny_math.acc): the checker reads the value at that path, renders it
with the decimals and unit of the text, and compares. It fails on a difference, a missing file or path, and on any number
outside a citation or code quotes; other documents may have such numbers:
python src/eval/check_results.py --citations-only README.md. --refresh puts the records' figures of today into such a document
(the words around them are its author's to read again).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from console import UserError, atomic_path, run_cli
from records import lookup, read_result, render

CITATION = re.compile(r"\[([^\]]+)\]\(([^)#\s]+\.json)#([\w.:-]+)\)")
FIGURE = re.compile(r"(-?[\d,]+(?:\.(\d+))?)( %| MB| GB| us|)")
LOOSE = " is not cited"
LOOSE_NUMBER = re.compile(r"(?<![\w.])\d[\d,.]*(?!\w)")


def cited(shown: str, file: Path, path: str) -> str:
    """What a citation should show, in the form in which it is shown; ValueError says why there is nothing to show."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    try:
        value = lookup(read_result(file), path)
    except KeyError as error:
        raise ValueError(f"{file} has no {path} (at {error})") from None
    if isinstance(value, str):
        return value
    figure = FIGURE.fullmatch(shown)
    if not figure or isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"is not a figure like 94.2 %, or {file}#{path} is not a number")
    return render(value, len(figure[2] or ""), figure[3])


def refreshed(text: str, directory: Path) -> str:
    """The text with every citation's figure as its record has it; one without a figure there stays, for the check to name."""

    def again(match: re.Match[str]) -> str:
        shown, file, path = match.groups()
        try:
            return f"[{cited(shown, directory / file, path)}]({file}#{path})"
        except ValueError:
            return match[0]

    return CITATION.sub(again, text)


def check_text(text: str, directory: Path) -> tuple[int, list[str]]:
    """(number of citations, faults) of a RESULTS.md whose citations are relative to ``directory``."""
    faults, count, fenced = [], 0, False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced:
            continue
        for shown, file, path in CITATION.findall(line):
            count += 1
            try:
                if (expected := cited(shown, directory / file, path)) != shown:
                    faults.append(f"line {number}: [{shown}]: {directory / file}#{path} is {expected}")
            except ValueError as error:
                faults.append(f"line {number}: [{shown}]: {error}")
        rest = re.sub(r"`[^`]*`|!?\[[^\]]*\]\([^)]*\)", "", CITATION.sub("", line))
        faults += [f"line {number}: {loose}{LOOSE}" for loose in LOOSE_NUMBER.findall(rest)]
    return count, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "files", type=Path, nargs="*", default=[Path("results/RESULTS.md")], help="pages to check (default results/RESULTS.md)"
    )
    parser.add_argument("--citations-only", action="store_true", help="let numbers outside citations stand")
    parser.add_argument("--refresh", action="store_true", help="put the records' figures into the document first")
    args = parser.parse_args()
    failed = 0
    for file in args.files:
        if not file.is_file():
            raise UserError(f"{file}: no such file; python src/eval/page_results.py writes results/RESULTS.md")
        if args.refresh:
            with atomic_path(file) as temporary:
                temporary.write_text(refreshed(file.read_text(encoding="utf-8"), file.parent), encoding="utf-8")
        count, faults = check_text(file.read_text(encoding="utf-8"), file.parent)
        if args.citations_only:
            faults = [fault for fault in faults if not fault.endswith(LOOSE)]
        print("\n".join([*faults, f"{file}: {count} figures checked, {len(faults)} faults"]), flush=True)
        failed |= bool(faults)
    return int(failed)


if __name__ == "__main__":
    run_cli(main)
