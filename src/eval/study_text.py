"""The table at equal bytes for a model of real text: every rounding method and GGUF type, judged: bash pipelines/study_text.sh

    python src/eval/study_text.py --model models/text-35m --text work/text --work work/study-35m [--rows 'int3_*,iq3_xxs_*']
        [--name text_35m] [--file ../shared/data/wiki.test.raw] [--until 1500] [--list]

A row is int3_clip, int4_gptq_refit, iq3_xxs_ldlq, iq3_xxs_llama, ...: made by quant_save or gguf_pack, judged by text_judge on
held-out text (and on --file, read in windows of 512), recorded in results/text/NAME_ROW_cTEXT.json with its bytes, and removed.
int3 is 3 bits for routed experts and 4 for the rest (of a dense model 3 throughout, and a type throughout); int3_kept leaves an
embedding that is the head too in BF16; `shrunk` drops a third of the second moments of two different inputs; `llama` is
llama-quantize with its imatrix, `budget` types by measured sensitivity in the bytes of `ldlq`. What reads text is made once for
each of --texts samples of calibration documents, which share none. The order is that of importance; what has its record is
skipped, a row that fails is named at the end, and none is begun that would end behind --until. NAME_pairs.json compares rows of
one grid or type.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import OutOfMemoryError

from calibration_text import in_turn
from checkpoint import Checkpoint, different_file
from console import UserError, check_writable, read_json, run_cli, run_inside, write_json
from families import text_config
from moe_ptq import CALIBRATED
from recipe import KEEP
from records import REPO, describe_model, read_result, write_result
from tasks_text import Row, by_stratum, pair, read_rows
from text_judge import open_judge

KEPT = "_kept"
GRIDS = {"int3": 3, "int4": 4, "int2": 2, f"int3{KEPT}": 3, f"int4{KEPT}": 4}
KINDS = ("int3", "IQ3_XXS", "IQ2_XS", "int4", "Q4_K", "int2", "IQ3_S", "Q3_K", f"int3{KEPT}", f"int4{KEPT}")
METHODS: dict[str, list[Any]] = {  # of grids
    "clip": ["--method", "clip"], "gptq_refit": ["--method", "gptq_refit"],
    "gptq_refit_shrunk": ["--method", "gptq_refit", "--shrinkage", 0.33],
    "gptq_refit_tokens": ["--method", "gptq_refit", "--token-power", 0.4, "--damping", 0.1],
    "absmax": ["--method", "clip", "--clip-steps", 1], "wclip": ["--method", "wclip"], "awq": ["--method", "awq"],
    "gptq": ["--method", "gptq"],
}  # fmt: skip
FILES = ("llama", "ldlq", "nearest", "budget")  # methods of GGUF types
FIRST = ("clip", "gptq_refit", "gptq_refit_shrunk", "llama", "ldlq")
BASES = ("clip", "llama")  # what the other rows of a grid or type are compared with
CUT = 8000  # characters of a calibration document
PER_TOKEN = 6  # characters that surely hold a token, on average


@dataclasses.dataclass(frozen=True)
class Made:
    """A row with one calibration text (None: it reads none)."""

    kind: str  # int3, IQ3_XXS
    method: str
    text: int | None

    @property
    def row(self) -> str:
        return f"{self.kind.lower()}_{self.method}"

    @property
    def name(self) -> str:
        return self.row if self.text is None else f"{self.row}_c{self.text}"


def all_rows(texts: int) -> list[Made]:
    """Every row, the most important first: those of :data:`FIRST` with each text before any other row."""
    found = []
    for first in (True, False):
        for text in range(texts):
            for kind in KINDS:
                for method in METHODS if kind in GRIDS else FILES:
                    reads = kind not in GRIDS or METHODS[method][1] in CALIBRATED
                    if (method in FIRST) == first and (reads or not text):
                        found.append(Made(kind, method, text if reads else None))
    return found


def calibration_texts(documents: Mapping[str, Sequence[Row]], count: int, characters: int) -> list[str]:
    """``count`` texts without a common document, each with documents of every stratum in turn."""
    made = []
    for number in range(count):
        parts, size = [], 0
        for part in in_turn([[row["text"][:CUT] for row in own[number::count]] for own in documents.values()]):
            parts.append(part)
            size += len(part)
            if size >= characters:
                break
        made.append("\n\n".join(parts))
    return made


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.model, self.work = args, args.model.resolve(), args.work.resolve()
        checkpoint, source = Checkpoint(self.model), self.work / "source.json"
        self.name = args.name or self.model.name.replace("-", "_")
        config = text_config(checkpoint.config)
        self.dense = not any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
        self.tied = any(level.get("tie_word_embeddings") for level in (checkpoint.config, config))
        if source.exists() and (other := different_file(read_json(source), checkpoint.identity)):
            raise UserError(f"{source}: the study was begun on another model ({other}); give another --work and --name")
        check_writable(self.record("pairs"))
        write_json(source, checkpoint.identity)
        self.judges: dict[str, Any] = {}

    def record(self, name: str, text: str = "") -> Path:
        """The record of a row on held-out text, or on --file, of which ``text`` is the name."""
        return self.args.results / "text" / f"{self.name}_{name}{text and '_'}{text}.json"

    @property
    def texts(self) -> list[str]:
        return ["", *([self.args.file.name.split(".")[0]] if self.args.file else [])]

    def judge(self, text: str) -> Any:
        if text not in self.judges:
            own = {"reference": self.model, "window": None, "text": self.args.file} if text else {"reference": self.model}
            self.judges[text] = open_judge(argparse.Namespace(**vars(self.args) | own))
        return self.judges[text]

    def calibration(self, text: int) -> list[Any]:
        """The options of a calibrated command."""
        files = [self.work / f"calibration-{number}.txt" for number in range(self.args.texts)]
        if not all(file.exists() for file in files):
            documents = by_stratum(read_rows(self.args.text / "calibration.jsonl.gz"), 0)
            size = self.args.calib_sequences * self.args.calib_length * PER_TOKEN
            for file, made in zip(files, calibration_texts(documents, self.args.texts, size), strict=True):
                file.write_text(made, encoding="utf-8")
        how = ["--calib-sequences", self.args.calib_sequences, "--calib-length", self.args.calib_length]
        return ["--calib", files[text], *how]

    def make(self, row: Made) -> tuple[Path, dict[str, Any]]:
        """(what a row makes, its own record)."""
        record, out = self.work / "made.json", self.work / row.name  # a killed run of another row is none of its business
        reference = self.work / f"llama-{row.text}"  # keeps the imatrix for other types
        self.clean(row)
        given = [] if row.text is None else self.calibration(row.text)
        given += ["--model", self.model, "--result", record, "--tag", row.name, "--force"]
        if row.kind in GRIDS:
            bits = GRIDS[row.kind]
            bits_of = ["--expert-bits", bits, "--linear-bits", bits if self.dense else 4, "--group", self.args.group]
            if row.kind.endswith(KEPT):
                write_json(kept := self.work / "kept.json", {"overrides": {"*embed_tokens.weight": KEEP}})
                bits_of += ["--allocation", kept]
            run_inside("src/quant/quant_save.py", "--out", out, *given, *bits_of, *METHODS[row.method])
            return out, read_result(record)
        given += ["--base-type", row.kind]
        given += [] if self.dense else ["--tensor-types", REPO / "configs/gguf_tensor_types_iq3.txt"]
        if row.method == "llama":
            run_inside("src/quant/gguf_pack.py", "--out", reference, *given, "--reference")
            return reference / read_result(record)["metrics"]["file"], read_result(record)
        given += ["--method", "nearest" if row.method == "nearest" else "ldlq"]
        if row.method != "nearest":
            given += ["--token-weights", self.work / f"token-weights-{row.text}.st"]
        if row.method == "budget":
            given += ["--protected", REPO / "configs/gguf_protected.txt"]
            size = read_result(self.record(dataclasses.replace(row, method="ldlq").name))["metrics"]["bytes"]
            given += ["--target-gib", size / 2**30]
        run_inside("src/quant/gguf_pack.py", "--out", out, *given)
        return out / read_result(record)["metrics"]["file"], read_result(record)

    def clean(self, row: Made) -> None:
        shutil.rmtree(self.work / row.name, ignore_errors=True)
        patterns = (f"{row.name}.types.*", "llama-*/*Q[0-9]_*.gguf")
        for file in (self.work / "made.json", *(file for pattern in patterns for file in self.work.glob(pattern))):
            file.unlink(missing_ok=True)

    def missing(self, name: str) -> list[str]:
        return [text for text in self.texts if not self.record(name, text).exists()]

    def run(self, row: Made) -> None:
        started = time.time()
        made, own = self.make(row)
        metrics = own["metrics"]
        size = metrics["packed_bytes"] if row.kind in GRIDS else metrics["file_bytes"]
        recipe = {key: value for key, value in own["recipe"].items() if key != "types"}
        facts = {"bytes": size, "calibration": metrics.get("calibration")}
        for text in self.missing(row.name):
            self.write(row.name, text, [self.judge(text).judged(made)], started, facts, recipe, own["data"], row)
        self.clean(row)

    def write(
        self, name: str, text: str, models: list[Any], started: float, facts: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None, data: Sequence[Any] = (), row: Made | None = None,
    ) -> None:  # fmt: skip
        judge = self.judge(text)
        reference = judge.made | {"tasks": {task: m | {"right": ""} for task, m in judge.made["tasks"].items()}}
        write_result(
            self.record(name, text), kind="text", tag=self.record(name, text).stem, started=started, recipe=recipe,
            model=judge.made["model"], data=[judge.text.entry, *data],
            metrics={"text": judge.facts, "reference": reference if not row else {}, "models": models, **(facts or {})},
            extra={"row": row.row if row else name, "calibration_text": row and row.text},
        )  # fmt: skip

    def pairs(self, text: str, rows: Sequence[Made]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row against the base of its grid or type: mean KL over the calibration texts that both have."""
        for kind in KINDS:
            for method in dict.fromkeys(row.method for row in rows if row.kind == kind and row.method not in BASES):
                both = []
                for number in range(self.args.texts):
                    names = [[Made(kind, each, n).name for n in (number, None)] for each in (method, BASES[kind not in GRIDS])]
                    found = [next((f for name in own if (f := self.record(name, text)).exists()), None) for own in names]
                    if all(found):
                        both.append([read_result(file, "text")["metrics"] for file in found if file])
                if both:
                    own, base = ([sides[i]["models"][0] for sides in both] for i in (0, 1))
                    means = [
                        models[0] | {"kl_sums": np.mean([model["kl_sums"] for model in models], 0)} for models in (base, own)
                    ]
                    single = [float(np.sum(a["kl_sums"]) / np.sum(b["kl_sums"])) for a, b in zip(own, base, strict=True)]
                    sizes = {"bytes": both[0][0]["bytes"], "base_bytes": both[0][1]["bytes"]}
                    made = pair(both[0][0]["text"], means[0], means[1]) | sizes | {"by_calibration_text": single}
                    yield Made(kind, method, None).row, made | {"base": Made(kind, BASES[kind not in GRIDS], None).row}

    def compare(self, rows: Sequence[Made]) -> None:
        for text in self.texts:
            started = time.time()
            if found := dict(self.pairs(text, rows)):
                file = self.record("pairs", text)
                write_result(
                    file,
                    kind="text",
                    tag=file.stem,
                    started=started,
                    model=describe_model(self.model),
                    metrics={"pairs": found},
                )
                for name, m in found.items():
                    if (kl := m["kl"])["ratio"]:
                        print(f"{name} / {m['base']}: KL {kl['ratio']:.3f} ({kl['ratio_low']:.3f} to {kl['ratio_high']:.3f})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="directory of the trained model")
    parser.add_argument("--text", type=Path, required=True, help="directory of make_text.sh")
    parser.add_argument("--work", type=Path, required=True, help="directory for what is made on the way")
    parser.add_argument("--name", help="what the tags begin with (default: the model's)")
    parser.add_argument("--file", type=Path, help="judge on this text file too")
    parser.add_argument("--rows", default="*", help="patterns of rows (int3_*, iq3_xxs_*_c0), joined by commas (default: all)")
    parser.add_argument("--texts", type=int, default=3, help="calibration texts (default 3)")
    parser.add_argument("--calib-sequences", type=int, default=128, help="sequences of each (default 128)")
    parser.add_argument("--calib-length", type=int, default=512, help="tokens of a sequence (default 512)")
    parser.add_argument("--group", type=int, default=128, help="inputs that share a scale of a grid (default 128)")
    parser.add_argument("--positions", type=int, default=100_000, help="as in text_judge (default 100,000)")
    parser.add_argument("--items", type=int, default=2000, help="as in text_judge (default 2,000)")
    parser.add_argument("--until", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records (default results)")
    parser.add_argument("--list", action="store_true", help="name the rows in their order, and those that are missing")
    parser.set_defaults(window=None, scored=None)
    args, started = parser.parse_args(), time.monotonic()
    patterns = args.rows.split(",")
    rows = [r for r in all_rows(args.texts) if any(fnmatch.fnmatchcase(n, p) for n in (r.row, r.name) for p in patterns)]
    if not rows:
        raise UserError(f"--rows {args.rows}: no row fits; known: {', '.join(dict.fromkeys(r.row for r in all_rows(1)))}")
    study, longest, failed = Study(args), 0.0, []
    rows = [row for row in rows if study.tied or not row.kind.endswith(KEPT)]
    for name, row in [("original", None), *((row.name, row) for row in rows)]:
        missing, begun = study.missing(name), time.monotonic()
        if args.list:
            print(f"{name}{' (missing)' if missing else ''}")
        if args.list or not missing:
            continue
        if begun - started + longest > args.until:
            print(f"{name} and what follows: not begun, {args.until:g} s would be over", flush=True)
            break
        try:
            if row:
                study.run(row)
            else:
                for text in missing:
                    study.write(name, text, [], time.time())
        except (UserError, SystemExit, OutOfMemoryError) as error:
            failed.append(name)
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
        longest = max(longest, (time.monotonic() - begun) * bool(row))
        print(f"{name}: {time.monotonic() - begun:.0f} s", flush=True)
    if not args.list:
        study.compare(all_rows(args.texts))
    if failed:
        print(f"error: {len(failed)} rows failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
