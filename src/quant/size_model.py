"""What a run weighs and how long it takes, before it runs: rates of earlier runs from the records in results/.

Not a command; every --dry-run uses it. Times are extrapolated from recorded rates; machine and record stand beside each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from records import read_result

RESULTS = Path(__file__).resolve().parents[2] / "results"
Rates = dict[str, tuple[float, str]]  # machine: (units a second, the record's file)


def duration(seconds: float) -> str:
    """Seconds as a person says them: "2.3 h", "4 min", "12 s"."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def machine(record: Mapping[str, Any]) -> str:
    hardware = record["hardware"]
    cores = hardware["cores"]
    return hardware["gpu"] or f"{hardware['cpu']}, {cores} core{'s' * (cores > 1)}"


def records_of(results: Path, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file as a reader finds it, record) of a kind."""
    for file in sorted((results / kind).glob("*.json")):
        record = read_result(file)
        if record["kind"] == kind:
            yield f"{results.name}/{kind}/{file.name}", record


def recorded_rates(results: Path, kind: str, units: Callable[[dict[str, Any]], float]) -> Rates:
    """The best recorded rate of each machine. ``units``: what a record worked off; 0 for one that does not count."""
    found: Rates = {}
    for file, record in records_of(results, kind):
        amount = units(record)
        if amount and record["seconds"] > 0:
            entry = (amount / record["seconds"], file)
            found[machine(record)] = max(found.get(machine(record), entry), entry)
    return found


def times(rates: Rates, amount: float, what: str) -> list[str]:
    """A line for each machine that has a rate."""
    if not rates:
        return [f"  no recorded rate for {what}; the run shows its own after a few seconds"]
    return [f"  {duration(amount / rate):>8}  {name} ({file})" for name, (rate, file) in sorted(rates.items())]
