"""The calibrated pass: embed, then layer by layer collect second moments, round, write, and pass the activations on.

Not a command; quant_save and gguf_pack run it. Behind the last layer goes the block of multi-token prediction. What a matrix
is rounded to is a :class:`Rounder`'s (rounders), where it is written a :class:`Writer`'s. One decoder layer's weights, the
inputs of its experts and the second moments of those that are rounded together are in memory (calibration.pass_memory); on the
host the activations, the layer that is being written and, with a GPU, the next one. The activations behind the last whole layer
lie beside the output, so a killed run goes on there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from calibration import Calibration, Collector, LayerStream, Moments
from console import UserError, read_json, write_json
from devices import OneBehind
from families import MTP_PREFIX
from moe_ptq import Statistics
from mtp import AROUND, MtpBlock, sources_of
from run_dir import RUN
from safetensors_file import save_tensors
from settings import setting
from token_weights import token_weights

LM_HEAD = "lm_head.weight"
V = TypeVar("V")  # what a rounder makes of a tensor, and its writer takes
V_contra = TypeVar("V_contra", contravariant=True)
Take = Callable[[str], tuple[Statistics, Tensor]]  # statistics of a parameter's inputs, and their mass [E]: once each


@dataclasses.dataclass(frozen=True)
class MomentSettings:
    """What the second moments of a calibrated method count."""

    token_power: float = setting(
        0.0, "with text: how much of its gradient a token counts in the second moments, 0 to 1; 0.4 keeps rare facts"
    )
    damping: float = setting(
        0.0, "with text: added to each second moment, as a share of their mean; 0.1 goes with a token power of 0.4"
    )
    shrinkage: float = setting(
        0.0, "with text: how much of the second moments of two different inputs is dropped, 0 to 1; 0.3 where text is scarce"
    )

    def __post_init__(self) -> None:
        if not (0 <= self.token_power <= 1 and 0 <= self.damping <= 10 and 0 <= self.shrinkage <= 1):
            raise UserError("--token-power and --shrinkage must be within 0 and 1, --damping within 0 and 10")


def is_later(name: str) -> bool:
    """Whether a parameter is rounded behind what experts multiply last, whose inputs are made by their other weights."""
    return not name.endswith("experts.down_proj")


class Rounder(Protocol[V]):
    """Parameters go by their names in the module tree, what is made of them by those of the output."""

    @property
    def targets(self) -> Collection[str]:
        """The parameters that it rounds, in the order in which it is given those of a layer."""

    def round(self, parameters: Mapping[str, Tensor], take: Take) -> None:
        """Round the targets of one layer in place."""

    def taken(self, parameters: Mapping[str, Tensor]) -> dict[str, V]:
        """What is written of the layer: of its targets, and of other ``parameters`` that the pass has changed."""


class Writer(Protocol[V_contra]):
    """``stop`` is set when the pass fails: a long write looks at it. The parts are the decoder layers and what follows them."""

    stop: threading.Event

    def begin(self) -> int:
        """Write what comes before the decoder, unless it is there; how many layers a killed run has left whole."""

    def embedding(self) -> dict[str, Tensor]:
        """The embedding as it was written, by checkpoint names; nothing where it is written last, since it is the head."""

    def write(self, part: int, values: Mapping[str, V_contra]) -> None:
        """Write a part: ``values``, and the rest of it as the checkpoint has it."""

    def complete(self) -> bool:
        """Whether everything is there."""


class CalibratedPass(Generic[V]):
    """Holds the activations between layers. ``cold``: experts with too few tokens, by parameter. ``weights_file`` keeps the
    weights of the tokens for other runs."""

    def __init__(
        self, stream: LayerStream, calibration: Calibration, rounder: Rounder[V], directory: Path,
        weights_file: Path | None = None,
    ) -> None:  # fmt: skip
        self.stream, self.calibration, self.rounder, self.run_dir = stream, calibration, rounder, directory / RUN
        self.weights = token_weights(stream, calibration, self.run_dir, weights_file)  # [layers, tokens]
        self.kwargs = stream.arguments(calibration.batches()[0])
        self.block: MtpBlock | None = None
        if any(MTP_PREFIX.match(name) for name in rounder.targets):
            self.block = MtpBlock(stream.model.config, stream.dtype)
            sources_of(stream.checkpoint, self.block)  # it is this one
        self.hidden: list[Tensor] = []
        self.tied: dict[str, Tensor] = {}  # the embedding as it was rounded with the head, by its name in the checkpoint
        self.moments: dict[str, Moments] = {}  # of what is to be rounded next
        self.cold: dict[str, int] = {}
        self.unrouted: dict[str, int] = {}

    def run(self, writer: Writer[V]) -> dict[str, Any]:
        """Write the whole checkpoint, a layer while the next is calibrated; returns the facts of the calibration."""
        first, last = writer.begin(), len(self.stream.layers)
        if first:
            self.load(first - 1)
        else:
            self.hidden = self.stream.embed(self.calibration.batches(), writer.embedding())

        def write(part: int, values: Mapping[str, V]) -> None:
            writer.write(part, values)
            for file in self.files_behind(part - 1) if part < last else ():  # a run that resumes needs them until then
                file.unlink(missing_ok=True)

        with contextlib.closing(self.stream), OneBehind(self.calibration.device, writer.stop) as later:
            for index in range(first, last):
                values = self.layer(index, later)
                self.save(index)
                later(write, index, values)
                del values
            if not writer.complete():
                later(write, last, self.head() | self.mtp(writer))
        return self.facts()

    @torch.no_grad()
    def layer(self, index: int, behind: OneBehind) -> dict[str, V]:
        """Collect, round and run decoder layer ``index``; returns what is to be written of it. ``behind`` writes the layer
        before, which is waited for at the end: the rounded tensors of one layer are in memory (the blocks of a GGUF, a fifth
        of their size, of two)."""
        stream, prefix = self.stream, f"model.layers.{index}."
        layer = stream.layers[index]
        stream.fill(layer, prefix)
        stream.read_ahead(index + 1)
        wanted = [name.removeprefix(prefix) for name in self.rounder.targets if name.startswith(prefix)]
        wanted.sort(key=is_later)
        collector = Collector(layer, set(wanted), None if self.weights is None else self.weights[index])
        after = [out.cpu() for out in stream.run(layer, self.hidden, self.kwargs[index])]
        collector.remove()
        behind.check()  # a full disk is known before the layer is rounded
        self.moments = {prefix + name: moments for name, moments in collector.moments.items()}
        collector.moments.clear()
        parameters = {prefix + name: layer.get_parameter(name) for name in wanted}
        self.rounder.round(parameters, self.take)
        self.moments.clear()
        if self.calibration.propagate == "quantized":
            after = [out.cpu() for out in stream.run(layer, self.hidden, self.kwargs[index])]
        self.hidden = after
        behind.wait()
        values = self.rounder.taken(parameters)
        parameters.clear()
        stream.empty(layer)
        return values

    @torch.no_grad()
    def head(self) -> dict[str, V]:
        """Round the head, where it is a target, on what it sees: the normed output of the last layer. An embedding that is tied
        to it is rounded here too: most of what its error costs is the error of the logits."""
        stream, values = self.stream, {}
        names = [name for name in dict.fromkeys((LM_HEAD, stream.tied)) if name in self.rounder.targets]
        if not names:
            return {}
        moments = Moments(1, stream.model.lm_head.in_features, stream.device)
        with stream.ending() as inputs_of:
            for hidden in self.hidden:
                moments.add(0, inputs_of(hidden.to(stream.device)).flatten(0, 1))
        for name in names:
            self.moments, source = {name: moments}, stream.checkpoint.sources[name][0]
            weight = stream.checkpoint.read(source).to(stream.device)
            self.rounder.round({name: weight}, self.take)
            values |= self.rounder.taken({name: weight})
            self.tied = {source: weight} if name == stream.tied else {}
        return values

    @torch.no_grad()
    def mtp(self, writer: Writer[V]) -> dict[str, V]:
        """Round the block of multi-token prediction, where it has targets, on what an engine gives it: the embedding as it was
        written, and what the head reads behind the rounded trunk. All tokens count alike."""
        if self.block is None:
            return {}
        stream, block = self.stream, self.block
        targets = sorted((name for name in self.rounder.targets if MTP_PREFIX.match(name)), key=is_later)
        prefix = MTP_PREFIX.match(targets[0])[0]
        for name, module in block.named_children():
            if name not in AROUND:
                stream.fill(module, f"{prefix}{name}.")
        stream.fill(block.embed_tokens, stream.embedding_prefix, {**writer.embedding(), **self.tied})
        block.rotary_emb.to(stream.device)
        collector = Collector(block, {name.removeprefix(prefix) for name in targets})
        with stream.ending() as inputs_of:
            for ids, hidden in zip(self.calibration.batches(), self.hidden, strict=True):
                block.normed(block.joined(ids.to(stream.device), inputs_of(hidden.to(stream.device))))
        collector.remove()
        stream.empty(block.embed_tokens)
        self.moments = {prefix + name: moments for name, moments in collector.moments.items()}
        parameters = {name: block.get_parameter(name.removeprefix(prefix)) for name in targets}
        self.rounder.round(parameters, self.take)
        values = self.rounder.taken(parameters)
        parameters.clear()
        stream.empty(block)
        return values

    def take(self, name: str) -> tuple[Statistics, Tensor]:
        """The statistics of a parameter's inputs and their mass [E]; they are in memory only until they are taken."""
        if name not in self.moments:
            raise UserError("no calibration activation reached it; give more or other calibration text")
        moments = self.moments.pop(name)
        floor = self.calibration.floor * moments.shape[-1]
        statistics = moments.statistics(floor, self.calibration.damping, self.calibration.shrinkage)
        self.cold[name] = int((statistics.tokens < floor).sum())
        self.unrouted[name] = int((statistics.tokens == 0).sum())
        return statistics, moments.weight

    def files_behind(self, index: int) -> tuple[Path, Path]:
        """The activations behind decoder layer ``index`` while the run is unfinished, and what is known of its experts."""
        return self.run_dir / f"activations-{index:05d}.st", self.run_dir / f"activations-{index:05d}.json"

    def save(self, index: int) -> None:
        """Keep the activations behind layer ``index``, and the counts so far, for a run that resumes there."""
        activations, facts = self.files_behind(index)
        write_json(facts, {"cold": self.cold, "unrouted": self.unrouted})
        save_tensors(activations, {str(i): hidden.contiguous() for i, hidden in enumerate(self.hidden)})

    def load(self, index: int) -> None:
        """What :meth:`save` kept."""
        activations, facts = self.files_behind(index)
        saved, counts = load_file(activations), read_json(facts)
        self.hidden = [saved[str(i)] for i in range(len(saved))]
        self.cold, self.unrouted = counts["cold"], counts["unrouted"]

    @staticmethod
    def _experts(counts: Mapping[str, int]) -> int:
        """How many experts ``counts``, by parameter, tell of: each has several matrices, with the same tokens."""
        by_module: dict[str, int] = {}
        for name, count in counts.items():
            module = name.rpartition(".")[0]
            if module.endswith(".experts"):
                by_module[module] = max(count, by_module.get(module, 0))
        return sum(by_module.values())

    def facts(self) -> dict[str, Any]:
        """What the record says of the calibration: experts below the floor and never routed to, over all layers."""
        cold, unrouted = (self._experts(counts) for counts in (self.cold, self.unrouted))
        return {"experts_below_floor": cold, "experts_never_routed": unrouted} | self.calibration.weighting()
