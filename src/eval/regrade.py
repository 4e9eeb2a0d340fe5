"""Grade stored samples again, with no model: bash pipelines/eval.sh --regrade TAG [TAG ...] [--data-dir DIR] [--tokenizer DIR]

    bash pipelines/eval.sh --pack [TAG ...]

For a grader that was mended. Reads results/eval/TAG.json and TAG.samples.jsonl, extracts and grades every answer anew, and
rewrites both; what the generation was (model, machine, sampling, seconds, its command) stays, and "regraded" says by what and
from which version. A sample whose prompt or gold is not the benchmark's of today is an error: it answers another question.

--pack grades nothing: TAG.samples.jsonl becomes TAG.samples.jsonl.gz, about a tenth of the size, for those tags (all when none
is named) that have a record and whose log reads without fault; others stay and are named. The packed bytes depend on the log
alone. Everything that reads logs (compare, regrade, report, a run that goes on) takes both forms.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from console import UserError, run_cli
from graders import GRADER_VERSION
from hf_model import load_tokenizer, render_chat
from records import REPO, code_state, public_command, sha256_json, sha256_text, write_result
from runner import asked_fields, benchmark_data, benchmark_metrics, extract_answer, recorded_benchmarks, table
from sample_log import (
    ASKED,
    SEAL,
    Key,
    changed_fields,
    find_log,
    held_log,
    log_line,
    pack_log,
    read_evaluation,
    sample_key,
    sealed,
    write_log,
)
from task import Benchmark, HubBenchmark
from task_text import Item

GENERATION = ("command", "started", "seconds", "hardware", "packages", "peak_rss_mib", "peak_vram_mib", "code")
END = ".samples.jsonl"
REST = ("samples", "settings_sha256", "parts", "pixels")


def check_row(benchmark: Benchmark, item: Item, row: dict[str, Any], render: Callable[[list], str], where: str) -> None:
    """Raise unless the sample answers today's prompt and is judged by today's gold answer. Logs from before messages_sha256
    need the model's chat template."""
    asked = asked_fields(benchmark, item)
    if "messages_sha256" not in row:
        asked["prompt_sha256"] = sha256_text(render(benchmark.messages(item)))
    if changed := changed_fields(row, asked):
        raise UserError(f"{where}: {item.id} of {benchmark.name} had another {ASKED[changed[0]]}; evaluate the model again")


def regraded_rows(
    benchmark: Benchmark,
    items: Sequence[Item],
    lines: Mapping[int, dict[str, Any]],
    render: Callable[[list], str],
    log: Path,
) -> list[dict[str, Any]]:
    """The rows with answer and verdict of today's grader. ``lines``: rows by their number in the log."""
    known = {item.id: item for item in items}
    for number, row in lines.items():
        where = f"{log}: line {number}"
        if row["id"] not in known:
            raise UserError(f"{where}: {benchmark.name} has no item {row['id']} today; evaluate the model again")
        check_row(benchmark, known[row["id"]], row, render, where)
    rows = list(lines.values())
    own = [known[row["id"]] for row in rows]
    pairs = list(zip(own, rows, strict=True))
    extracted = [
        extract_answer(benchmark, item, row["text"], row["finish_reason"], row.get("prompt_opens_thinking", True))
        for item, row in pairs
    ]
    verdicts = benchmark.grade_all(own, extracted)
    made = [
        {**row, "extracted": answer, "correct": bool(verdict), "grader": GRADER_VERSION}
        for (_, row), answer, verdict in zip(pairs, extracted, verdicts, strict=True)
    ]
    return [sealed(row) if SEAL in row else row for row in made]


def lazy_render(model: str, given: Path | None) -> Callable[[list], str]:
    """Renders chat turns with the template of the evaluated model, loaded only when an old log asks for it."""
    found: list[Any] = []

    def render(messages: list) -> str:
        if not found:
            path = given or REPO / model
            if not path.is_dir():
                raise UserError(f"{model} is not here, whose chat template this log's prompts need; give --tokenizer DIR")
            found.append(load_tokenizer(path))
        return render_chat(found[0], messages)

    return render


def write_rows(log: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """A log with other rows, packed if it was."""
    write_log(log, "".join(map(log_line, ({"settings": settings}, *rows))).encode())


def regrade(directory: Path, tag: str, data_dir: Path | None, tokenizer: Path | None) -> tuple[dict[str, Any], int]:
    """(the new record, number of verdicts that changed) of one evaluation; both files are rewritten."""
    started, result = time.time(), directory / f"{tag}.json"
    old, settings, rows = read_evaluation(result)
    log = find_log(directory / old["samples"])
    render = lazy_render(str(settings.get("model")), tokenizer)
    metrics, data, before = {}, [], {entry["name"]: entry for entry in old["data"]}
    new: dict[Key, dict[str, Any]] = {}
    for benchmark in recorded_benchmarks(list(old["metrics"]), data_dir):
        lines = {number: row for number, row in enumerate(rows, 2) if row["benchmark"] == benchmark.name}
        asked = {row["id"] for row in lines.values()}
        whole = None if isinstance(benchmark, HubBenchmark) else settings.get("limit")  # --limit once took other rows
        items = [item for item in benchmark.load(whole) if item.id in asked]
        own = regraded_rows(benchmark, items, lines, render, log)
        metrics[benchmark.name] = benchmark_metrics(benchmark, items, own)
        chosen = {key: value for key, value in before.get(benchmark.name, {}).items() if key == "chosen"}
        data.append(benchmark_data(benchmark, items) | chosen)
        new |= {sample_key(row): row for row in own}
    changed = sum(row["correct"] != new.get(sample_key(row), row)["correct"] for row in rows)
    settings = settings | {"grader": GRADER_VERSION}
    write_rows(log, settings, [new.get(sample_key(row), row) for row in rows])
    note = {"from": rows[0]["grader"], "to": GRADER_VERSION, "changed": changed, "seconds": round(time.time() - started, 2)}
    record = write_result(
        result, kind="eval", tag=tag, started=started, model=old["model"], recipe=old["recipe"], data=data,
        sampling=old["sampling"], metrics=metrics,
        extra={key: old[key] for key in (*GENERATION, *REST) if key in old}
        | {"settings_sha256": sha256_json(settings), "regraded": note | {"command": public_command(), "code": code_state()}},
    )  # fmt: skip
    return record, changed


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
        with held_log(log):
            read_evaluation(record)  # a log that is damaged is not hidden in an archive
            before += log.stat().st_size
            after += pack_log(log).stat().st_size
    return before, after, unfinished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("tags", nargs="*", help="evaluations of results/eval")
    parser.add_argument("--pack", action="store_true", help="pack their logs instead")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    parser.add_argument("--data-dir", type=Path, help="the files that the evaluation read")
    parser.add_argument("--tokenizer", type=Path, help="directory with the model's tokenizer, for logs of older versions")
    args = parser.parse_args()
    if args.pack:
        before, after, unfinished = pack(args.results / "eval", args.tags)
        if unfinished:
            print(f"not finished, left as they are: {', '.join(unfinished)}", flush=True)
        print(f"{before / 1e6:.2f} MB of logs packed into {after / 1e6:.2f} MB", flush=True)
        return
    if not args.tags:
        raise UserError("name the evaluations to grade again; bash pipelines/eval.sh --regrade TAG [TAG ...]")
    for tag in args.tags:
        with held_log(args.results / "eval" / f"{tag}{END}"):
            record, changed = regrade(args.results / "eval", tag, args.data_dir, args.tokenizer)
        print(f"{tag}: grader {GRADER_VERSION}, {changed} verdicts changed\n{table(record['metrics'], {})}", flush=True)


if __name__ == "__main__":
    run_cli(main)
