"""The day that a model arrives: from the hub's headers to packed files, judgements and a model card, stage by stage.

    bash pipelines/day_one.sh --model hf:Qwen/Qwen3.5-122B-A10B@COMMIT --plan      # hours, GB, what is left out and why
    bash pipelines/day_one.sh --model hf:Qwen/Qwen3.5-122B-A10B@COMMIT --wiki wiki.test.raw [--baseline DIR] [--data-dir DIR]

Every stage is a command that a user could type, printed before it runs; nothing is quantized or judged here. WORK/stages holds
of each its command and what it read: one whose products stand and belong to the same is kept, one that was killed goes on, one
of other inputs is refused. A stage that fails is named, what needs its products is left out, the rest goes on; the exit code is
the first failure's. WORK/README.md, the card, cites every figure from its record beside what docs/PREREGISTERED.md expected.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from backend import choose_backend
from backend_openai import Client
from calibration_text import HUB, CalibrationSettings, default_source, sources_of
from checkpoint import Checkpoint, different_file, model_name, source_identity
from console import UserError, atomic_path, file_sha256, read_object, read_text, run_cli, write_json
from eval_settings import eval_records, gate_axis, load_settings
from families import Role, layer_count, roles_of, text_config
from gguf_layout import read_patterns
from hf_model import load_tokenizer, text_ids
from hub import make_directory, spelled
from llama_cpp import at_hand
from llamacpp_eval8 import die_with_parent
from moe_ptq import CALIBRATED
from pack_plan import Pack, TypeSettings, plan_pack
from packed_format import PackingSettings, plan_container, summary
from plans import plan_jobs
from recipe import Recipe
from records import REPO, lookup, read_result, render, sha256_json
from run_dir import alone
from runner import BUDGETS, OF_TEXT, counted, get_benchmarks, token_rates, usual_tokens
from settings import parse_settings, read_part, setting
from size_model import RESULTS, SHAPES, Sizes, duration, fit, predict, read_records, sizes_of
from task import Benchmark, HubBenchmark, Source, reachable
from tau2_runner import data_folder

PREREGISTERED, CARD = REPO / "docs/PREREGISTERED.md", Path(__file__).with_name("day_card.md")
PORT = 8391  # of the server that tau2 talks to
CONTESTS = {"aime": 8, "aime2026": 8, "hmmt": 8, "hmmt_nov": 8, "lcb": 1}  # with 80k tokens; answers to each of few questions
# Figures of a record as the card shows them: the place, decimals, unit.
FIGURES = {  # each row of docs/PREREGISTERED.md: kind of the record, stage, ...
    "size_gib": ("pack", "gguf", "metrics.gib", 2),
    "kl_q8": ("kl", "wiki", "metrics.tool.mean", 4),
    "kl_bf16": ("panel", "panel_gguf", "metrics.strata.wikitext-2.mean", 4),
    "ppl": ("kl", "wiki", "metrics.tool.ppl", 3),
}
SPREAD = (("mean", 5), ("low", 5), ("high", 5), ("median", 6), ("p99", 4), ("p99_9", 3), ("top1", 2, " %"), ("floor", 6))
PANEL = (("positions", 0), *SPREAD)
ACCURACY = (("n", 0), ("acc", 1, " %"), ("acc_low", 1, " %"), ("acc_high", 1, " %"), ("trunc", 1, " %"), ("mean_tokens", 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DaySettings:
    """What the day is about."""

    model: str = setting(help="hf:ORG/NAME@COMMIT, or a checkpoint directory")
    baseline: str = setting("", "an unquantized model for the same benchmarks: hf:ORG/NAME@COMMIT, downloaded, or a directory")
    tag: str = setting("", "what the tags of its records begin with (default: the model's name)")
    work: Path | None = setting(None, "directory for what is made (default SCRATCH/TAG)")
    results: Path = setting(REPO / "results", "directory for the records")
    quantize_config: Path = setting(REPO / "configs/day_one.env", "settings of quantize.sh")
    pack_config: Path = setting(REPO / "configs/gguf_iq3.env", "settings of pack_gguf.sh")
    wiki: Path | None = setting(None, "WikiText-2's raw test file (docs/PREREGISTERED.md)")
    chunks: int = setting(0, "at most so many windows of it; 0: all")
    panel: str = setting("", "further options of panel.sh --reference, in one text")
    benchmarks: str = setting("mmlu_pro,gpqa,mmmlu,aime2026,lcb,hle,mathvision,mmmu_pro,tau2", "comma-separated names")
    limit: int | None = setting(None, "N items of each benchmark")
    data_dir: Path | None = setting(None, "the benchmarks' rows, instead of the hub's")
    user_endpoint: str = setting("", "tau2: URL of the simulated user's model (default: OpenAI's, with OPENAI_API_KEY)")
    user_model: str = setting("", "tau2: the simulated user (default: tau2_runner's)")
    tau2_python: str = setting(sys.executable, "the interpreter of tau2's own environment")


# ---------------------------------------------------------------- what was expected


def expectations(text: str) -> tuple[dict[str, tuple[float, float, float, str]], dict[str, str]]:
    """By figure (expected at most, published, refuted above, what it is), and the model and the text that this is of, as the
    document has them; :class:`UserError` where it has other rows than :data:`FIGURES`."""
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (.+) \|$", text, re.MULTILINE)
    found = {name: (float(most), float(other), float(above), said) for name, most, other, above, said in rows}
    if wrong := sorted(found.keys() ^ FIGURES.keys()):
        raise UserError(f"{PREREGISTERED}: its expectations and FIGURES of day_one.py differ in {', '.join(wrong)}")
    return found, dict(re.findall(r"^\| (model|text|ruler) \| `([^`]+)`", text, re.MULTILINE))


def verdict(value: float, most: float, refuted: float) -> str:
    return "as expected" if value <= most else "missed" if value <= refuted else "refuted"


# ---------------------------------------------------------------- stages


@dataclasses.dataclass
class Stage:
    """``command`` makes ``products``, the last one last, of ``inputs``. ``log``: a product that is what it prints. ``force``:
    it takes --force. ``served``: a model that a server holds meanwhile, whose {url} and {name} the command gets. ``skipped``:
    why it is left out."""

    name: str
    command: list[str]
    inputs: tuple[Path, ...] = ()
    products: tuple[Path, ...] = ()
    _: dataclasses.KW_ONLY
    log: Path | None = None
    served: Path | None = None
    force: bool = False
    gb: float = 0.0
    seconds: float | None = None
    note: str = ""
    skipped: str = ""

    @property
    def outputs(self) -> list[Path]:
        return [*self.products, *([self.log] if self.log else [])]

    def read(self) -> dict[str, Any]:
        return {"command": shlex.join(self.command), "inputs": {str(path): source_identity(path) for path in self.inputs}}

    def state(self, marks: Path) -> str:
        """ "kept", "goes on" or "to do"; raises :class:`UserError` on products of something else."""
        mark, there = marks / f"{self.name}.json", [path for path in self.outputs if path.exists()]
        held = read_object(mark, "command", "inputs") if mark.exists() else {}
        mend = f"remove {' '.join(map(str, [*there, *([mark] if held else [])]))}, or give another --work and --tag"
        if not held and there:
            raise UserError(f"{there[0]}: exists, and was not made by stage {self.name} of this run; {mend}")
        if held and held["command"] != shlex.join(self.command):
            raise UserError(f"stage {self.name} was made by another command, {held['command']}; {mend}")
        inputs, made = (value if isinstance(value, dict) else {} for value in (held.get("inputs"), held.get("made", {})))
        for path in self.inputs if held else ():
            if path.exists() and (why := different_file(inputs.get(str(path)), source_identity(path))):
                raise UserError(f"stage {self.name} was made of another {path}: {why}; {mend}")
        for path in there if made else ():
            if why := different_file(made.get(str(path)), source_identity(path)):
                raise UserError(f"{path}: is not what stage {self.name} made: {why}; {mend}")
        if made and len(there) == len(self.outputs):
            return "kept"
        return "goes on" if held else "to do"

    def run(self, marks: Path) -> int:
        """Run it unless it is kept; the exit code."""
        if self.state(marks) == "kept":
            print(f"== {self.name}: kept", flush=True)
            return 0
        now, mark = self.read(), marks / f"{self.name}.json"
        write_json(mark, now)
        forced = self.force and any(path.exists() for path in self.products)  # killed between the product and its record
        print(f"== {self.name}", flush=True)
        with serving(self.served) as place:
            line = [part.format_map(place) for part in self.command] if self.served else [*self.command, *["--force"] * forced]
            done = shown(line, bool(self.log))
        if done.returncode:
            return done.returncode
        if self.log:
            with atomic_path(self.log) as temporary:
                temporary.write_text(done.stdout, encoding="utf-8")
        if missing := [path for path in self.outputs if not path.exists()]:
            raise UserError(f"stage {self.name} ended without {missing[0]}")
        write_json(mark, now | {"made": {str(path): source_identity(path) for path in self.outputs}})
        return 0


def shown(line: Sequence[str], keep: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command, printed first; with ``keep`` its output comes when it has ended."""
    print(f"+ {shlex.join(line)}", flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE if keep else None, text=True)
    print(done.stdout or "", end="", flush=True)
    return done


@contextlib.contextmanager
def serving(model: Path | None) -> Iterator[dict[str, str]]:
    """A server of the model by deploy.sh until the block ends: its {url}, and the {name} that it gives the model."""
    if not model:
        yield {}
        return
    line = pipeline("deploy", "--model", model, "--serve", "--port", PORT)

    def heard() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # in a shell's background it is ignored, and children inherit that
        die_with_parent(parent)()

    parent = os.getpid()
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        try:
            for text in process.stdout or ():
                print(text, end="", flush=True)
                if found := re.match(r"serving (\S+) until", text):
                    name = Client(found[1]).call("/models")["data"][0]["id"]
                    yield {"url": found[1], "name": name, "weights": sha256_json(source_identity(model))[:16]}
                    return
            raise UserError(f"{model}: is not served; its message stands above")
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def pipeline(name: object, *arguments: object) -> list[str]:
    return ["bash", str(REPO / f"pipelines/{name}.sh"), *map(str, arguments)]


def python(script: str, *arguments: object) -> list[str]:
    return [sys.executable, str(REPO / script), *map(str, arguments)]


# ---------------------------------------------------------------- the plan


def counted_sizes(checkpoint: Checkpoint) -> Sizes:
    """Parameters of a checkpoint, of its largest layer, and what a token uses of one, from the headers."""
    text, layers, active = text_config(checkpoint.config), dict[str, int](), dict[str, float]()
    share = (text.get("num_experts_per_tok") or 1) / (text.get("num_experts") or text.get("num_local_experts") or 1)
    for name, role in roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config).items():
        if (found := re.search(r"\blayers\.(\d+)\.", name)) and role is not Role.MTP:
            size, layer = checkpoint.tensors[name].numel, found[1]
            layers[layer] = layers.get(layer, 0) + size
            active[layer] = active.get(layer, 0) + size * (share if role is Role.ROUTED_EXPERT else 1)
    total = sum(info.numel for info in checkpoint.tensors.values())
    return Sizes(total, max(layers.values()), int(max(active.values())), 0)


def refused(ask: Callable[[], object]) -> str:
    """Why something is not possible here, in one line; nothing if it is."""
    try:
        ask()
    except UserError as error:
        return str(error)
    return ""


def reach(source: Source) -> None:
    """Raise :class:`UserError` on a data set of the hub that cannot be read here, without reading it."""
    from huggingface_hub import HfApi

    with reachable(source):
        HfApi().dataset_info(source.repository, revision=source.revision, timeout=20)
        if source.gated:
            HfApi().auth_check(source.repository, repo_type="dataset")


def missing_text(text: CalibrationSettings, model: Path) -> str:
    """Why the calibration text cannot be read."""
    text.check(model)
    for part in sources_of(text.calib or default_source(load_tokenizer(model, chat=False))):
        if (found := HUB.fullmatch(part)) and not Path(found["name"]).exists():
            if why := refused(functools.partial(reach, Source(found["name"], found["revision"] or "main"))):
                return f"CALIB: {why}"
    return ""


def missing_llama() -> str:
    return refused(lambda: at_hand("llama-perplexity"))  # where there is none yet it is built


def missing_items(benchmark: Benchmark) -> str:
    if isinstance(benchmark, HubBenchmark) and benchmark.data_dir is None:
        return refused(lambda: reach(benchmark.source))
    return refused(lambda: benchmark.load(1))


class Day:
    """A model, where everything of it goes, and the stages in their order."""

    def __init__(self, settings: DaySettings) -> None:
        self.settings = settings
        self.model = make_directory(settings.model) if spelled(settings.model) else Path(settings.model).resolve()
        self.checkpoint = Checkpoint(self.model)
        self.name, remote = model_name(self.model), self.checkpoint.remote
        self.uri = remote.uri if remote else str(self.model)
        self.tag = settings.tag or re.sub(r"\W+", "_", self.name.lower())
        self.work = (settings.work or Path(os.environ.get("SCRATCH", REPO / "work")) / self.tag).resolve()
        self.results, self.packed = settings.results.resolve(), self.work / f"{self.name}-packed"
        self.marks = self.work / "stages"
        if settings.limit is not None and settings.limit < 1:
            raise UserError(f"--limit {settings.limit}: must be at least 1")
        if settings.wiki and not settings.wiki.is_file():
            raise UserError(f"--wiki {settings.wiki}: no such file")
        self.wiki = settings.wiki.resolve() if settings.wiki else None
        self.speeds = read_records(RESULTS / "bench", "h100_122b")

    def record(self, kind: str, stage: str) -> Path:
        return self.results / kind / f"{self.tag}_{stage}.json"

    def recorded(self, kind: str, stage: str) -> list[object]:
        return ["--out", self.results / kind, "--tag", f"{self.tag}_{stage}"]

    def seconds(self, key: str, tokens: int) -> float | None:
        """Of a pass over the model on one H100, by docs/COST_MODEL.md."""
        shape = dataclasses.replace(SHAPES["122b"], layers=layer_count(self.checkpoint.config) or 0)
        return predict(shape, counted_sizes(self.checkpoint), 1, fit(self.speeds, sizes_of(SHAPES["122b"])), tokens)[key]

    def pack(self, types: TypeSettings) -> Pack:
        patterns = read_patterns(REPO / types.tensor_types) if types.tensor_types else []
        return plan_pack(self.checkpoint, types.base, patterns, "nearest", mtp="file")[0]

    def stages(self) -> list[Stage]:
        """All of them; ``skipped`` says what tool or data one lacks, or which other that does."""
        found = [*self.files(), *self.panels(), *self.evaluations(), *self.servers()]
        missing: dict[Path, str] = {}
        for stage in found:
            stage.skipped = stage.skipped or next((f"needs {missing[path]}" for path in stage.inputs if path in missing), "")
            missing |= dict.fromkeys(stage.outputs, stage.name) if stage.skipped else {}
        return found

    def given(self, config: Path) -> list[Path]:
        """A file of settings, and the files of types that it names."""
        types = read_part(TypeSettings, config).tensor_types if config == self.settings.pack_config else None
        return [config.resolve(), *([(REPO / types).resolve()] if types else [])]

    def files(self) -> Iterator[Stage]:
        """The packed checkpoint, the GGUF, that of Q8_0, and the text that everybody quotes."""
        plan, types, wiki = self.settings.quantize_config, self.settings.pack_config, self.wiki
        checkpoint = self.checkpoint
        recipe = read_part(Recipe, plan)
        jobs, least = plan_jobs(checkpoint, recipe), read_part(PackingSettings, plan).packed_bits
        container = plan_container(jobs, recipe, least=least, ends=checkpoint.family.packed_ends)
        pack, q8 = self.pack(read_part(TypeSettings, types)), self.pack(TypeSettings("Q8_0"))
        self.gguf, reference = self.work / "gguf" / pack.file_name, self.work / "q8" / q8.file_name
        calibrated = "gptq_s" if recipe.method in CALIBRATED else "data_free_s"
        plain = ("--base-type", "Q8_0", "--tensor-types", "", "--method", "nearest")
        no_text = "" if wiki else "the text (--wiki FILE) is not here"
        for kind, name, config, product, size, key, options, why in (
            ("quantize", "packed", plan, self.packed, summary(jobs, container)["bytes"], calibrated, ("--packed",), ""),
            ("pack", "gguf", types, self.gguf, pack.data_bytes, "ldlq_s", (), missing_llama()),
            ("pack", "q8", types, reference, q8.data_bytes, "ldlq_s", plain, no_text or missing_llama()),
        ):
            text, record = read_part(CalibrationSettings, config), self.record(kind, name)
            out = product if kind == "quantize" else product.parent
            where = ("--config", config.resolve(), "--model", self.uri, "--out", out, *options)
            command = pipeline("pack_gguf" if kind == "pack" else kind, *where, "--result", record, "--tag", record.stem)
            seconds = self.seconds(key, text.calib_sequences * text.calib_length)
            yield Stage(
                name, command, (self.model, *self.given(config)), (product, record), force=True, gb=size / 1e9, seconds=seconds,
                skipped=why or missing_text(text, self.model), note=f"{size / 2**30:.2f} GiB",
            )  # fmt: skip
        tokens = 0 if not wiki else len(text_ids(load_tokenizer(self.model, chat=False), read_text(wiki)))
        tokens = min(tokens, 512 * self.settings.chunks or tokens)
        # The reference's experts do not fit on the card; the GGUF, which does, is read twice.
        places = (("gguf_offload", "experts_on_cpu"), ("gguf", "all_on_gpu"), ("gguf", "all_on_gpu"))
        rates = [self.speeds[part]["placements"][place]["prefill"]["2048"]["tokens_per_s"] for part, place in places]
        size = pack.data_bytes + 2 * q8.data_bytes + 2 * tokens * text_config(checkpoint.config)["vocab_size"]  # second halves
        given = ("--model", self.gguf, "--reference", reference, "--text", wiki, "--chunks", self.settings.chunks)
        command, inputs = python("src/eval/gguf_kl.py", *given, *self.recorded("kl", "wiki")), (self.gguf, reference)
        yield Stage(
            "wiki", command, (*inputs, *filter(None, [wiki])), (self.record("kl", "wiki"),), gb=size / 1e9, skipped=no_text,
            seconds=sum(tokens / rate for rate in rates), note=f"{tokens:,} tokens; its GB lie in TMPDIR and are given back",
        )  # fmt: skip

    def panels(self) -> Iterator[Stage]:
        """The panel, and the two products on it; each reads the weights once at least."""
        work, texts = self.work / "panel", ["--text", f"wikitext-2={self.wiki}"] if self.wiki else []
        of = ["panel", "--reference", self.uri, "--work", work, *texts, *shlex.split(self.settings.panel)]
        why = "" if texts or "--text" in self.settings.panel else "no text: --wiki FILE"
        panel = work / self.name / "panel.safetensors"
        more: dict[str, Any] = {"seconds": self.seconds("data_free_s", 0), "note": "at least", "skipped": why}
        wiki = [self.wiki] if self.wiki else []
        yield Stage("panel_reference", pipeline(*of), (self.model, *wiki), (panel,), **more)
        for name, product in (("panel_packed", self.packed), ("panel_gguf", self.gguf)):
            command, record = pipeline(*of, "--judge", product, *self.recorded("panel", name)), self.record("panel", name)
            yield Stage(name, command, (self.model, panel, product), (record,), **more)

    def evaluations(self) -> Iterator[Stage]:
        """Every benchmark of the packed checkpoint, then of the baseline."""
        baseline, data = self.settings.baseline, self.settings.data_dir
        benchmarks = [name for name in self.settings.benchmarks.split(",") if name != "tau2"]
        loaded = {name: get_benchmarks([name], data, name not in OF_TEXT) for name in benchmarks}
        missing = {name: next(filter(None, map(missing_items, own)), "") for name, own in loaded.items()}
        models: list[tuple[str, Path, tuple[Path, ...]]] = [("eval", self.packed, ())]
        if spelled(baseline):
            repository, _, commit = baseline.removeprefix("hf:").partition("@")
            done, path = self.marks / "baseline_weights.txt", self.work / repository.split("/")[-1]
            command = ["hf", "download", repository, "--revision", commit or "main", "--local-dir", str(path)]
            yield Stage(
                "baseline_weights", command, log=done, skipped="" if any(not why for why in missing.values()) else "no data"
            )
            models.append(("baseline", path, (done,)))
        elif baseline:
            models.append(("baseline", Checkpoint(baseline).path.resolve(), ()))
        for kind, model, more in models:
            for name, own in loaded.items():
                stage = self.evaluation(f"{kind}_{name}", model, name, own if not missing[name] else ())
                yield dataclasses.replace(stage, inputs=(model, *more), skipped=missing[name])

    def evaluation(self, stage: str, model: Path, name: str, benchmarks: Sequence[Benchmark]) -> Stage:
        settings, samples, budget = self.settings, CONTESTS.get(name, 1), "80k" if name in CONTESTS else "32k"
        more: list[object] = ["--limit", settings.limit] if settings.limit else []
        more += ["--data-dir", settings.data_dir.resolve()] if settings.data_dir else []
        how = ("--benchmarks", name, "--budget", budget, "--samples", samples, *more)
        script = ("eval", "--pictures") if name not in OF_TEXT else ("eval",)
        command = pipeline(*script, "--model", model, *self.recorded("eval", stage), *how)
        if rates := token_rates(RESULTS, choose_backend("auto", model), self.checkpoint.bytes):
            rate, at = max(rates.values())
        else:  # vLLM has no record of an evaluation; the nearest is llama.cpp with 32 sequences at once
            rate, at = self.speeds["gguf"]["placements"]["all_on_gpu"]["decode"]["32"]["tokens_per_s"], "llama.cpp's rate"
        seconds, bound = 0.0, ""
        for benchmark in benchmarks:
            count, tokens = counted(benchmark, settings.limit), usual_tokens(RESULTS, benchmark.name)
            bound = bound if tokens else f"at most: every answer of {BUDGETS[budget]:,} tokens; "
            seconds += math.nan if count is None else samples * count * (tokens or BUDGETS[budget]) / rate
        note = f"{bound}at {rate:,.0f} tokens/s, {at}"
        known = None if math.isnan(seconds) or not benchmarks else seconds
        return Stage(stage, command, (model,), (self.record("eval", stage),), seconds=known, note=note)

    def servers(self) -> Iterator[Stage]:
        """What needs a server: whether both products answer, and tau2."""
        settings = self.settings
        vllm = "" if importlib.util.find_spec("vllm") else "vLLM is not installed"
        for name, model, why in (("gguf", self.gguf, missing_llama()), ("packed", self.packed, vllm)):
            log = self.marks / f"deploy_{name}.txt"
            yield Stage(f"deploy_{name}", pipeline("deploy", "--model", model, "--check"), (model,), log=log, skipped=why)
        if "tau2" in settings.benchmarks.split(","):
            why = refused(lambda: data_folder(settings.tau2_python))
            if not (why or settings.user_endpoint or os.environ.get("OPENAI_API_KEY")):
                why = "nobody plays the user: --user-endpoint, or OPENAI_API_KEY"
            more: list[object] = ["--python", settings.tau2_python, *(["--tasks", settings.limit] if settings.limit else [])]
            more += ["--user-model", settings.user_model] if settings.user_model else []
            more += ["--user-endpoint", settings.user_endpoint] if settings.user_endpoint else []
            who = ("--endpoint", "{url}", "--model", "{name}", "--weights", "{weights}", *self.recorded("eval", "tau2"))
            command, record = python("src/eval/tau2_runner.py", *who, *more), self.record("eval", "tau2")
            yield Stage("tau2", command, (self.gguf,), (record,), served=self.gguf, skipped=why)

    def plan(self, stages: Sequence[Stage]) -> str:
        """A line a stage, and what all of it takes."""
        lines = [f"{self.uri}: {len(self.checkpoint.tensors):,} tensors, {self.checkpoint.bytes / 1e9:.2f} GB -> {self.work}"]
        lines.append(f"{'stage':<22}{'state':<10}{'time':>9}{'GB':>9}  note")
        for stage in stages:
            state = "left out" if stage.skipped else stage.state(self.marks)
            known = "?" if stage.seconds is None else duration(stage.seconds)
            lines.append(f"{stage.name:<22}{state:<10}{known:>9}{stage.gb:>9,.1f}  {stage.skipped or stage.note}")
        done = [stage for stage in stages if not stage.skipped]
        there = next(path for path in (self.work, *self.work.parents) if path.exists())
        unknown = ", ".join(stage.name for stage in done if stage.seconds is None) or "nothing"
        total, disk = duration(sum(stage.seconds or 0 for stage in done)), sum(stage.gb for stage in done)
        lines.append(
            f"in all {total} on one H100, without what is fetched; no record for: {unknown}; then the gate and the card"
        )
        lines.append(f"disk {disk:,.1f} GB of {shutil.disk_usage(there).free / 1e9:,.1f} GB free")
        return "\n".join(lines)

    # ------------------------------------------------------------ what was found

    def figure(self, kind: str, stage: str, path: str) -> float | None:
        """A figure of a stage's record; None where there is none."""
        try:
            return float(lookup(read_result(self.record(kind, stage)), path))
        except (UserError, KeyError):
            return None

    def cite(self, kind: str, stage: str, path: str, decimals: int, unit: str = "") -> str:
        """The same with its link, as check_results reads it."""
        value, file = self.figure(kind, stage, path), os.path.relpath(self.record(kind, stage), self.work)
        return "" if value is None else f"[{render(value, decimals, unit)}]({file}#{path})"

    def expected(self) -> Iterator[list[object]]:
        """The rows of docs/PREREGISTERED.md with what was found."""
        rows, of = expectations(read_text(PREREGISTERED))
        whole = self.wiki and not self.settings.chunks and file_sha256(self.wiki) == of["text"]
        other = "another model" if of["model"] != self.name else "" if whole else "not the whole text"
        base = self.figure("kl", "wiki", "metrics.tool.ppl_reference")
        if not other and base and abs(base / float(of["ruler"]) - 1) > 0.01:
            other = f"another ruler, its base has perplexity {base:.3f}"
        for name, (most, published, refuted, text) in rows.items():
            kind, stage, path, decimals = FIGURES[name]
            value = self.figure(kind, stage, path)
            said = "not measured" if value is None else f"not judged: {other}" if other else verdict(value, most, refuted)
            yield [text, most, published, self.cite(kind, stage, path, decimals), said]

    def accuracies(self) -> Iterator[dict[str, Any]]:
        """A row for each benchmark that was evaluated."""
        rules, records = load_settings(), eval_records(self.results / "eval")
        for record in records:
            stage = record["tag"].removeprefix(f"{self.tag}_")
            if stage == record["tag"] or not re.match("eval_|baseline_|tau2$", stage):
                continue
            model = self.settings.baseline if stage.startswith("baseline") else self.packed.name
            model = self.gguf.name if stage == "tau2" else model
            for axis in record["metrics"]:
                cells = [self.cite("eval", stage, f"metrics.{axis}.{key}", *how) for key, *how in ACCURACY]
                yield {"axis": axis, "model": model, "cells": cells, "gate": gate_axis(record, axis, rules, records)}

    def finish(self, stages: Sequence[Stage]) -> int:
        """The gate of what was evaluated, and the card, checked; made anew each time."""
        card = jinja2.Template(CARD.read_text(encoding="utf-8"), trim_blocks=True, lstrip_blocks=True).render(
            day=self, stages=stages, document=os.path.relpath(PREREGISTERED, self.work), panel=PANEL, read=read_text
        )
        with atomic_path(self.work / "README.md") as temporary:
            temporary.write_text(card, encoding="utf-8")
        tags = [file.stem for stage in stages for file in stage.products if file.parent.name == "eval" and file.exists()]
        checks = [pipeline("eval", "--gate", *tags, "--results", self.results)] if tags else []
        checks.append(python("src/eval/check_results.py", "--citations-only", self.work / "README.md"))
        return max(shown(line).returncode for line in checks)


def run_stages(stages: Sequence[Stage], marks: Path) -> int:
    """All that can be run; the exit code of the first that fails."""
    first = 0
    for stage in stages:
        lacking = next((f"needs {path}, which is not there" for path in stage.inputs if not path.exists()), "")
        stage.skipped = stage.skipped or lacking
        code, why = 0, "its message stands above"
        if stage.skipped:
            print(f"== {stage.name}: left out: {stage.skipped}", flush=True)
            continue
        try:
            code = stage.run(marks)
        except UserError as error:
            code, why = 2, str(error)
        if code in (130, -signal.SIGINT):
            raise KeyboardInterrupt
        if code:
            stage.skipped = f"failed with exit code {code}; {why}"
            print(f"== {stage.name}: {stage.skipped}", file=sys.stderr, flush=True)
        first = first or code
    return first


def main() -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--plan", "--dry-run", action="store_true", dest="dry_run", help="print the plan, and write nothing"
        )

    settings, args = parse_settings(DaySettings, __doc__, add)
    day, started = Day(settings), time.time()
    stages = day.stages()
    print(day.plan(stages), flush=True)
    if args.dry_run:
        return 0
    with alone(day.work):
        code = run_stages(stages, day.marks)
        checked = day.finish(stages)
    print(f"{day.work / 'README.md'}: the card, after {duration(time.time() - started)}", flush=True)
    return code or checked


if __name__ == "__main__":
    run_cli(main)
