"""Pack the sample logs of finished evaluations: bash pipelines/eval.sh --pack [TAG ...]

TAG.samples.jsonl in results/eval becomes TAG.samples.jsonl.gz, about a tenth of the size, for those tags that have a record and
whose log reads without fault; others stay and are named. The packed bytes depend on the log alone. Everything that reads logs
(compare, regrade, report, a run that goes on) takes both forms.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from console import UserError, run_cli
from records import read_result
from sample_log import pack_log, read_samples

END = ".samples.jsonl"


def pack(directory: Path, tags: list[str]) -> tuple[int, int, list[str]]:
    """(bytes before, bytes after, tags whose run is not finished) of the plain logs of ``tags``, all when none is named."""
    logs = sorted(directory.glob(f"*{END}"))
    chosen = [log for log in logs if not tags or log.name.removesuffix(END) in tags]
    if missing := sorted(set(tags) - {log.name.removesuffix(END) for log in chosen}):
        raise UserError(f"{directory}: holds no plain log of {', '.join(missing)}")
    before, after, unfinished = 0, 0, []
    for log in chosen:
        record = directory / f"{log.name.removesuffix(END)}.json"
        if not record.is_file():
            unfinished.append(record.stem)
            continue
        read_result(record, "eval")
        read_samples(log)  # a log that is damaged is not hidden in an archive
        before += log.stat().st_size
        after += pack_log(log).stat().st_size
    return before, after, unfinished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tags", nargs="*", help="evaluations whose logs to pack (default: all)")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    args = parser.parse_args()
    before, after, unfinished = pack(args.results / "eval", args.tags)
    if unfinished:
        print(f"not finished, left as they are: {', '.join(unfinished)}", flush=True)
    print(f"{before / 1e6:.2f} MB of logs packed into {after / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    run_cli(main)
