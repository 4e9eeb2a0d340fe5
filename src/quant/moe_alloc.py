"""Who gets how many bits: from measured KL under a budget, for checkpoints and for GGUFs, or by the signals of a probe.

    python src/quant/moe_alloc.py --model models/razor-tiny --expert-bits 3 --out work/alloc.json [--items 8]
        [--result results/probe/T.json --tag T]
    python src/quant/moe_alloc.py --model models/razor-tiny --expert-bits 3 --strategy frequency --out work/freq.json
    python src/quant/quant_save.py ... --expert-bits 3 --allocation work/alloc.json --method gptq_refit
    python src/quant/moe_alloc.py --model models/razor-tiny --target-gib 0.008 --out work/types.txt \
        [--tensor-types configs/gguf_protected.txt] [--candidates iq2_xs,iq3_xxs,...]
    python src/quant/gguf_pack.py ... --base-type IQ3_XXS --tensor-types work/types.txt

--expert-bits: bits of the routed experts, for quant_save. The KL of rounding each layer's gate_up or down matrices to each of
--options is measured on training transcripts or --text, with the model loaded whole; the bits are those of least summed KL
whose size is at most that of --expert-bits everywhere. With another --strategy than budget (sensitivity.py) every layer's
experts are ordered by a signal, and the best get more of the --options; one decoder layer is in memory at a time.
--target-gib: types of all matrices, for gguf_pack. OUT is a file of PATTERN=TYPE lines; what --tensor-types names is fixed.
What each of --candidates costs each tensor is measured (sensitivity.py), rounded by the method that the file will be rounded
by; the types are those of least summed KL whose file is at most so large. The checkpoint is streamed once.
Both choices are exact for the summed KL: dynamic programming over all of them.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration import Calibration
from calibration_text import CalibrationSettings
from checkpoint import Checkpoint, different_file
from console import UserError, check_writable, run_cli, write_json
from gguf_layout import (
    read_patterns,
    type_named,
)
from hf_model import context_of, load_model, load_tokenizer
from hub import HubSettings, opened
from kl import batches, file_texts, tiny_texts
from pack_plan import SizeSettings, TypeSettings
from plans import RecordSettings
from recipe import Recipe
from records import describe_model, read_result, write_result
from rounders import RoundingSettings
from sensitivity import (
    CANDIDATES,
    PROBE,
    PROBE_SEQUENCES,
    STRATEGIES,
    allocate_types,
    bits_by_signal,
    grid_losses,
    signals_of,
    solve,
)
from settings import parse_settings, part, same, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocSettings:
    """--expert-bits: bits of the experts, at most the size of this everywhere; or --target-gib: types of a GGUF."""

    model: Path = setting(help="checkpoint directory")
    out: Path = setting(help="JSON for quant_save --allocation, or types for gguf_pack")
    expert_bits: float | None = same(Recipe, "expert_bits", None)
    target_gib: float | None = same(SizeSettings, "target_gib")
    calibration: CalibrationSettings = part(CalibrationSettings)
    options: str = setting("2,3,4", "of the experts: bits to choose from")
    group: int = same(Recipe, "group")
    clip_steps: int = same(Recipe, "clip_steps")
    items: int = setting(8, "of the experts: training transcripts a task, or paragraphs of --text")
    text: Path | None = setting(None, "of the experts: measure on this text file instead")
    strategy: str = setting("budget", "of the experts: how", ("budget", *STRATEGIES))
    whole_layers: bool = setting(False, "of the experts, by budget: 1: one width for all of a layer, as packed codes have it")
    share: float = setting(0.25, "of three options: the experts raised, and lowered")
    seed: int = setting(0, "of --strategy random")
    hub: HubSettings = part(HubSettings)
    measured: Path | None = setting(None, "record of an earlier run: take its sensitivities, another budget")
    tensor_types: Path | None = same(TypeSettings, "tensor_types")
    candidates: str = setting(CANDIDATES, "of a GGUF: types to choose from")
    probe_type: str = setting(PROBE, "of a GGUF: type at which the KL of a parameter is measured")
    probe_sequences: int = setting(PROBE_SEQUENCES, "of the calibration sequences, on how many KL is taken")
    rounding: RoundingSettings = part(RoundingSettings)
    record: RecordSettings = part(RecordSettings)

    def __post_init__(self) -> None:
        if (self.expert_bits is None) == (self.target_gib is None):
            raise UserError("give --expert-bits or --target-gib, one of the two")
        if min(self.probe_sequences, self.items) < 1:
            raise UserError("--probe-sequences and --items must be at least 1")
        if self.out.exists() and not self.record.force:
            raise UserError(f"{self.out}: exists; give another --out, or --force to replace it")
        check_writable(self.out)

    @property
    def choices(self) -> list[int]:
        """The bits that an expert may have."""
        try:
            found = sorted({int(text) for text in self.options.split(",")})
        except ValueError:
            raise UserError(f"--options {self.options}: expected whole numbers separated by commas") from None
        if found[0] < 2 or found[-1] > 8:
            raise UserError(f"--options {self.options}: expected 2..8")
        return found


Found = tuple[dict[str, Any], dict[str, Any]]  # metrics, data entry


def types_for_size(settings: AllocSettings, target_gib: float) -> Found:
    """Types by measured KL whose file is at most so large."""
    rounding, checkpoint = settings.rounding, Checkpoint(settings.model)
    candidates = [type_named(text, "--candidates") for text in settings.candidates.split(",")]
    patterns = read_patterns(settings.tensor_types) if settings.tensor_types else []
    probe = type_named(settings.probe_type, "--probe-type")
    ids, entry = settings.calibration.ids(settings.model)
    power = 0.0 if rounding.method == "nearest" else rounding.moments.token_power
    calibration = Calibration(ids, entry, token_power=power, shrinkage=rounding.moments.shrinkage)
    _, metrics = allocate_types(
        checkpoint, calibration, target_gib, settings.out, patterns, method=rounding.method, damping=rounding.moments.damping,
        weights_file=rounding.token_weights, candidates=candidates, probe=probe, probe_sequences=settings.probe_sequences,
    )  # fmt: skip
    return metrics, entry


def bits_for_signal(settings: AllocSettings, expert_bits: float) -> Found:
    """Bits by a strategy that orders the experts."""
    ids, entry = settings.calibration.ids(settings.model)
    signals = signals_of(Checkpoint(settings.model), Calibration(ids, entry))
    experts = bits_by_signal(settings.strategy, signals, expert_bits, settings.choices, settings.share, settings.seed)
    each = [bits for row in experts.values() for bits in row]
    print("\n".join(f"{module}: {' '.join(map(str, bits))}" for module, bits in experts.items()))
    print(f"{sum(each) / len(each):.4f} bits an expert", flush=True)
    write_json(settings.out, {"experts": experts})
    return {"strategy": settings.strategy, "experts": experts, "mean_bits": sum(each) / len(each)}, entry


def measured(settings: AllocSettings) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """(KL by parameter and option, data entry), taken now or from an earlier record with the same options."""
    if settings.measured:
        metrics = (record := read_result(settings.measured, "probe"))["metrics"]
        if metrics.get("options") != settings.choices:
            raise UserError(f"{settings.measured}: measured for options {metrics.get('options')}, not {settings.choices}")
        check_measured(record, settings)
        return metrics["sensitivity"], record["data"][0]
    text = settings.text
    tokenizer = load_tokenizer(settings.model, chat=not text)
    pairs, entry = file_texts(text, settings.items) if text else tiny_texts(tokenizer, settings.items, "train")
    data = batches(tokenizer, pairs, 16, min(context_of(settings.model), 4096))
    return grid_losses(load_model(settings.model), data, settings.choices, settings.group, settings.clip_steps), entry


def check_measured(record: Mapping[str, Any], settings: AllocSettings) -> None:
    """Raise :class:`UserError` unless the sensitivities of a record are of this model."""
    own, model = describe_model(settings.model), record["model"] or {}
    changed = [key for key in ("config_sha256", "header_sha256") if own[key] != model.get(key)]
    other = ", ".join(changed) and f"{', '.join(changed)} differ"
    if "source" in record:
        other = different_file(record["source"], Checkpoint(settings.model).identity)
    elif not other:
        print(f"note: {settings.measured} does not say which weights it measured; config and tensors are the same", flush=True)
    if other:
        raise UserError(f"{settings.measured}: measured on another model than {settings.model} ({other}); measure this one")


def bits_for_budget(settings: AllocSettings, expert_bits: float) -> Found:
    """Bits by measured KL."""
    options = settings.choices
    counts: collections.Counter[str] = collections.Counter()
    checkpoint = Checkpoint(settings.model)
    for name, info in checkpoint.tensors.items():
        counts[checkpoint.places[name].parameter] += info.numel
    sensitivity, entry = measured(settings)
    if not sensitivity:
        raise UserError(f"{settings.model}: has no routed experts to allocate bits to")
    together: dict[str, list[str]] = {}  # the parameters of one choice
    for name in sensitivity:
        together.setdefault(name.rpartition(".")[0] if settings.whole_layers else name, []).append(name)
    costs = [[bits * sum(counts[name] for name in names) for bits in options] for names in together.values()]
    losses = [[sum(sensitivity[name][place] for name in names) for place in range(len(options))] for names in together.values()]
    total = sum(counts[name] for name in sensitivity)
    picked = solve(costs, losses, int(expert_bits * total))
    overrides = {name: options[index] for names, index in zip(together.values(), picked, strict=True) for name in names}
    spent = sum(row[index] for row, index in zip(costs, picked, strict=True)) / total
    predicted = sum(row[index] for row, index in zip(losses, picked, strict=True))
    print("\n".join(f"{bits} bits  {name}" for name, bits in overrides.items()))
    print(f"{spent:.4f} bits an expert weight, predicted KL {predicted:.5f}", flush=True)
    write_json(settings.out, {"overrides": overrides})
    found = {"options": options, "sensitivity": sensitivity, "overrides": overrides}
    return found | {"bits_spent": spent, "predicted_kl": predicted}, entry


def main() -> None:
    settings = opened(parse_settings(AllocSettings, __doc__)[0])
    result, started = settings.record.file("probe"), time.time()
    if settings.target_gib is not None:
        metrics, entry = types_for_size(settings, settings.target_gib)
    elif settings.expert_bits is not None and settings.strategy == "budget":
        metrics, entry = bits_for_budget(settings, settings.expert_bits)
    else:
        metrics, entry = bits_for_signal(settings, settings.expert_bits or 0)
    if result:
        model, source = describe_model(settings.model), {"source": Checkpoint(settings.model).identity}
        write_result(
            result, kind="probe", tag=settings.record.tag, started=started, model=model, data=[entry], metrics=metrics,
            extra=source,
        )  # fmt: skip


if __name__ == "__main__":
    run_cli(main)
