"""Load, quantize, save, reload, evaluate, compare: python src/eval/smoke.py --config configs/smoke_tiny.env --work work/smoke

Keys of the file may be set in the environment. Each step is the command that a user would type, in a process of its own.
Prints one table and `SMOKE OK`; a step that fails stops the run with its exit code.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from console import UserError, run_cli, run_script
from records import read_result
from settings import parse_settings, setting


@dataclass(frozen=True)
class SmokeConfig:
    """The keys of configs/smoke_tiny.env."""

    model: str = setting(help="checkpoint directory, or a hub id, which is downloaded once")
    expert_bits: int = setting(help="bits of the experts' weights")
    linear_bits: int = setting(help="bits of the other linear weights")
    group: int = setting(help="weights that share a scale")
    clip_steps: int = setting(help="steps of the search for the clip")
    benchmarks: str = setting(help="comma-separated names of benchmarks")
    limit: int = setting(help="first N items of each")
    kl_items: int = setting(help="held-out transcripts of each tiny task for the KL")
    backend: str = setting(help="engine of the evaluation: auto, vllm or hf")
    budget: str = setting(help="tokens a sample may generate: 32k, 64k or 80k")


def find_model(name: str) -> Path:
    """A directory as it is, else a hub id, downloaded once into the hub's own cache."""
    path = Path(name)
    if path.is_dir():
        return path
    if name.startswith(("models/", ".", "/")):
        raise UserError(f"{name}: no such model directory; bash pipelines/make_tiny.sh trains models/razor-tiny on a GPU")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{name}: cannot be downloaded ({reason}); give MODEL a directory in the config") from None


def step(title: str, script: str, *arguments: object) -> None:
    print(f"== {title}", flush=True)
    run_script(script, *arguments)


def comparison(work: Path, names: list[str]) -> str:
    before, after = (read_result(work / "eval" / f"{tag}.json", "eval")["metrics"] for tag in ("original", "quantized"))
    lines = [f"{'benchmark':<14}{'items':>6}{'original':>11}{'quantized':>11}"]
    for name in names:
        lines.append(f"{name:<14}{before[name]['n']:>6}{100 * before[name]['acc']:>10.1f}%{100 * after[name]['acc']:>10.1f}%")
    sizes = read_result(work / "quantize" / "quantized.json", "quantize")["metrics"]
    original = read_result(work / "eval" / "original.json")["model"]["bytes"]
    kl = read_result(work / "kl" / "quantized.json", "kl")["metrics"]["kl"]
    lines.append(f"{'packed size':<14}{'':>6}{original / 1e6:>8.2f} MB{sizes['packed_bytes'] / 1e6:>8.2f} MB")
    lines.append(f"KL to the original {kl['mean']:.5f} nats, top-1 agreement {100 * kl['top1']:.2f} %")
    return "\n".join(lines)


def run(config: SmokeConfig, work: Path) -> None:
    model, quantized = find_model(config.model), work / "model"
    started = time.monotonic()
    bits = ["--expert-bits", str(config.expert_bits), "--linear-bits", str(config.linear_bits)]
    grid = ["--group", str(config.group), "--clip-steps", str(config.clip_steps), "--out", quantized]
    record = ["--result", work / "quantize/quantized.json", "--tag", "quantized", "--force"]
    step("quantize", "src/quant/quant_save.py", "--model", model, *bits, *grid, *record)
    items = ["--items", str(config.kl_items), "--out", work / "kl", "--tag", "quantized", "--force"]
    step("KL to the original", "src/eval/moe_eval.py", "--model", quantized, "--reference", model, *items)
    evaluate: list[object] = ["--benchmarks", config.benchmarks, "--limit", str(config.limit), "--backend", config.backend]
    evaluate += ["--budget", config.budget, "--out", work / "eval", "--force"]
    for tag, path in (("original", model), ("quantized", quantized)):
        step(f"evaluate the {tag} model", "src/eval/vllm_eval8.py", "--model", path, "--tag", tag, *evaluate)
    print(f"\n{comparison(work, config.benchmarks.split(','))}\n{time.monotonic() - started:.0f} s\nSMOKE OK", flush=True)


def add_work(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, required=True, help="directory for the quantized model and the records")


def main() -> None:
    config, args = parse_settings(SmokeConfig, __doc__, add_work)
    run(config, args.work)


if __name__ == "__main__":
    run_cli(main)
