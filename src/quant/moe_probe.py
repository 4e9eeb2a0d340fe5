"""What the router does with text, layer by layer: load, mass, salience and cold experts of a checkpoint.

    python src/quant/moe_probe.py --model models/razor-tiny [--calib TEXT] [--imatrix work/imatrix.gguf]
        [--result results/probe/T.json --tag T]

One decoder layer is in memory at a time. Per expert: frequency (share of assignments), router mass (share of the summed
routing weights), activation salience (share of the summed squared inputs of its down projection, weighted by the square of
the routing weight). Per layer: normalised entropy of the frequency (1 is even), the least and greatest load relative to the
mean, experts never routed to and experts with fewer effective tokens than inputs, and how alike the three rankings are.
--imatrix also writes llama.cpp's importance matrix, with experts' inputs weighted by the square of their routing weight.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from calibration import Calibration
from calibration_text import CalibrationSettings
from checkpoint import Checkpoint
from console import UserError, check_writable, run_cli
from gguf_format import write_imatrix
from hub import HubSettings, opened
from plans import RecordSettings
from records import describe_model, write_result
from sensitivity import probe
from settings import parse_settings, part, setting


def table(reports: dict[str, dict[str, Any]]) -> str:
    head = f"{'layer':>5}{'experts':>9}{'entropy':>9}{'min load':>10}{'max load':>10}{'cold':>6}{'never':>7}"
    lines = [head + f"{'r(f,mass)':>11}{'r(f,sal)':>10}"]
    for index, r in reports.items():
        lines.append(
            f"{index:>5}{r['experts']:>9}{r['entropy']:>9.4f}{r['min_load']:>10.3f}{r['max_load']:>10.3f}{r['cold']:>6}"
            f"{r['never_routed']:>7}{r['rank_frequency_mass']:>11.3f}{r['rank_frequency_salience']:>10.3f}"
        )
    return "\n".join(lines)


def probe_model(model: Path, calibration: Calibration, imatrix: Path | None = None) -> dict[str, Any]:
    """Print the report of every layer and return it as metrics; ``imatrix``: a file to write the importance matrix to."""
    reports, importance = probe(Checkpoint(model), calibration, every_linear=imatrix is not None)
    if not reports and not imatrix:
        raise UserError(f"{model}: has no routed experts to probe")
    print(table(reports), flush=True)
    if imatrix:
        write_imatrix(imatrix, importance, [calibration.record["name"]], *calibration.ids.shape)
        print(f"wrote {imatrix}: {len(importance)} weights", flush=True)
    return {"layers": reports, "tokens": calibration.ids.numel()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeSettings:
    """What is probed, and on which text."""

    model: Path = setting(help="checkpoint directory")
    text: CalibrationSettings = part(CalibrationSettings)
    hub: HubSettings = part(HubSettings)
    imatrix: Path | None = setting(None, "write llama.cpp's importance matrix here")
    record: RecordSettings = part(RecordSettings)


def main() -> None:
    settings = opened(parse_settings(ProbeSettings, __doc__)[0])
    result, started = settings.record.file("probe"), time.time()
    if settings.imatrix:
        check_writable(settings.imatrix)
    Checkpoint(settings.model)  # its errors first: they are clearer than a tokenizer's
    ids, entry = settings.text.ids(settings.model)
    metrics = probe_model(settings.model, Calibration(ids, entry), settings.imatrix)
    if result:
        model = describe_model(settings.model)
        write_result(result, kind="probe", tag=settings.record.tag, started=started, model=model, data=[entry], metrics=metrics)


if __name__ == "__main__":
    run_cli(main)
