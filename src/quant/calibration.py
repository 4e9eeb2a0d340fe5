"""One decoder layer in memory: run calibration tokens through a checkpoint layer by layer and collect what rounding needs.

Not a command; quant_save drives it for the calibrated methods. transformers supplies each family's layer, built on the meta
device and filled from the checkpoint one layer at a time. For every linear and every routed expert the second moment of
its inputs is collected (an expert's inputs weighted by the square of their routing weight: that is how its error reaches
the layer's output), then the layer is rounded and the activations go on through the rounded layer.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import Checkpoint
from console import UserError
from families import LAYER_PREFIX, place_of
from moe_ptq import Statistics, shrink


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Token ids [sequences, length] and how they are used. ``record``: the data's entry for results and for resuming.

    ``floor``: effective tokens below which an expert's statistics are shrunk, as a share of its inputs. ``propagate``:
    'quantized' sends the activations through the rounded layers, 'bf16' through the original ones. ``token_power``: of
    the squared gradient that a token's weight in the second moments is (token_weights.py); 0 counts all tokens alike.
    ``damping``: of the mean second moment, added to each before anything is rounded: what the text hardly uses keeps some worth.
    """

    ids: Tensor
    record: dict[str, Any]
    batch: int = 8
    floor: float = 1.0
    propagate: str = "quantized"
    token_power: float = 0.0
    damping: float = 0.0
    device: torch.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations at work: bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def batches(self) -> tuple[Tensor, ...]:
        """The ids in batches of one size, which is the largest that divides both ``batch`` and the sequences."""
        return self.ids.split(math.gcd(self.batch, len(self.ids)))

    def settings(self) -> dict[str, Any]:
        """What decides the result, for recipe.json and for resuming."""
        fields = {"batch": self.batch, "floor": self.floor, "propagate": self.propagate}
        return {"data": self.record, "shape": list(self.ids.shape), **fields, **self.weighting(), "dtype": str(self.dtype)}

    def weighting(self) -> dict[str, float]:
        """``token_power`` and ``damping`` where they are not 0."""
        return {key: value for key in ("token_power", "damping") if (value := getattr(self, key))}


def layer_bytes(jobs: Sequence[Any], calibration: Calibration) -> int:
    """Bytes of the largest decoder layer at work: weights, second moments, the activations before and after it, and the weights
    of the layer that is being written. With a GPU the first two are in its memory, which leaves room on the host for the layer
    that is read ahead."""
    item = torch.empty((), dtype=calibration.dtype).itemsize
    layers: dict[str, int] = {}
    width = 0
    for job in jobs:
        place = place_of(job.name)
        if not (match := LAYER_PREFIX.match(place.parameter)):
            width = max(width, job.info.shape[-1])
            continue
        size = item * job.info.numel + job.info.bytes
        if job.bits and place.part != "up":  # gate and up have the same inputs
            size += 4 * math.prod(job.info.shape[:-2]) * job.info.shape[-1] ** 2
        layers[match[1]] = layers.get(match[1], 0) + size
    return max(layers.values(), default=0) + 2 * item * calibration.ids.numel() * width


def trim_heap() -> None:
    """Return freed memory to the system. glibc keeps freed tensors below 32 MB in its heap, where small objects that live
    on keep whole layers resident; other C libraries have no such call and need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Moments:
    """Running second moment of one linear's inputs, or of every expert's: sums [E, I, I], weights [E], squares [E]."""

    def __init__(self, experts: int, inputs: int, device: torch.device) -> None:
        self.total = torch.zeros(experts, inputs, inputs, device=device)
        self.weight = torch.zeros(experts, device=device)
        self.square = torch.zeros(experts, device=device)

    def add(self, index: int, x: Tensor, weight: Tensor | None = None) -> None:
        """Inputs x [N, I] of matrix ``index``; ``weight`` [N] multiplies each input."""
        x = x.float()
        w = torch.ones(len(x), device=x.device) if weight is None else weight.float() ** 2
        scaled = x if weight is None else x * weight.float()[:, None]
        self.total[index].addmm_(scaled.t(), scaled)
        self.weight[index] += w.sum()
        self.square[index] += (w * w).sum()

    def statistics(self, floor: float) -> Statistics:
        """Means, and effective counts (sum w)**2 / sum w**2; matrices below ``floor`` tokens are shrunk to the mean."""
        if not bool(torch.isfinite(self.total).all()):
            raise UserError("a calibration activation is NaN or infinite")
        tokens = self.weight**2 / self.square.clamp_min(1e-30)
        mean = self.total / self.weight.clamp_min(1e-30)[:, None, None]
        return Statistics(shrink(mean, tokens, floor) if len(tokens) > 1 else mean, tokens)


class Collector:
    """Hooks on one decoder layer that fill :class:`Moments` for the parameters in ``wanted``.

    ``weights`` [tokens] multiply the squares of each token, in the order in which the layer sees them; None: all alike.
    """

    def __init__(self, layer: nn.Module, wanted: set[str], weights: Tensor | None = None) -> None:
        self.roots = None if weights is None else weights.sqrt()
        self.place = slice(0, 0)  # of the batch at work among all tokens
        self.moments: dict[str, Moments] = {}
        self.routed: dict[str, Tensor] = {}  # experts module -> tokens sent to each expert
        self.mass: dict[str, Tensor] = {}  # experts module -> sum of their routing weights
        self.handles = [layer.register_forward_pre_hook(self._advance)]
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and f"{name}.weight" in wanted:
                self.handles.append(module.register_forward_pre_hook(self._linear(f"{name}.weight")))
            elif f"{name}.gate_up_proj" in wanted or f"{name}.down_proj" in wanted:
                self.handles.append(module.register_forward_pre_hook(self._experts(name)))

    def _get(self, name: str, experts: int, inputs: int, device: torch.device) -> Moments:
        if name not in self.moments:
            self.moments[name] = Moments(experts, inputs, device)
        return self.moments[name]

    def _advance(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.place = slice(self.place.stop, self.place.stop + args[0].shape[:-1].numel())

    def _own(self, device: torch.device) -> Tensor | None:
        """The roots of the weights of the tokens at work."""
        return None if self.roots is None else self.roots[self.place].to(device)

    def _linear(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            self._get(name, 1, x.shape[1], x.device).add(0, x, self._own(x.device))

        return hook

    def _experts(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            hidden, chosen, weights = args[:3]
            hidden = hidden.reshape(-1, hidden.shape[-1])
            count, inner = module.down_proj.shape[0], module.down_proj.shape[2]
            ups = self._get(f"{name}.gate_up_proj", count, hidden.shape[1], hidden.device)
            downs = self._get(f"{name}.down_proj", count, inner, hidden.device)
            own = self._own(hidden.device)
            routed = torch.bincount(chosen.flatten(), minlength=count)[:count]
            self.routed[name] = self.routed.get(name, 0) + routed
            mass = torch.zeros(count, device=hidden.device).index_add_(0, chosen.flatten(), weights.flatten().float())
            self.mass[name] = self.mass.get(name, 0) + mass
            for expert in routed.nonzero()[:, 0].tolist():
                token, place = torch.where(chosen == expert)
                x, weight = hidden[token], weights[token, place]
                weight = weight if own is None else weight * own[token]
                gate, up = nn.functional.linear(x, module.gate_up_proj[expert]).chunk(2, -1)
                ups.add(expert, x, weight)
                downs.add(expert, module.act_fn(gate) * up, weight)

        return hook

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def output(layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """What a decoder layer makes of its input [B, T, H]."""
    out = layer(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes the keyword arguments that the model gives it and passes its input on."""

    def __init__(self, layer: nn.Module, seen: list[dict[str, Any]]) -> None:
        super().__init__()
        self._layer, self._seen = [layer], seen  # in a list, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_layer"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise TypeError("a decoder layer is called with positional arguments; calibration does not know them")
        self._seen.append(kwargs)
        return hidden


class LayerStream:
    """The decoder of a checkpoint, with parameters in memory only for what is at work.

    ``device`` and ``dtype`` are those of the computation. Calibration sequences must have one length. ``ahead``: whether
    :meth:`read_ahead` reads (by default where a GPU works meanwhile; it takes a layer's bytes of the host's memory).
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, ahead: bool | None = None) -> None:
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        config = AutoConfig.from_pretrained(str(checkpoint.path), local_files_only=True).get_text_config()
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        self.decoder = self.model.model
        for module in self.decoder.modules():
            made = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and not buffer.is_meta}
            module._buffers.update({name: buffer.to(self.device) for name, buffer in made.items()})
        self.layers = list(self.decoder.layers)
        self.places = {name: place_of(name) for name in checkpoint.tensors}
        self.ahead = device.type == "cuda" if ahead is None else ahead
        self._reader = ThreadPoolExecutor(1, "ahead")
        self._coming: dict[str, Future[Tensor]] = {}
        self.by_parameter: dict[str, list[str]] = {}
        for name, place in self.places.items():
            self.by_parameter.setdefault(place.parameter, []).append(name)

    def fill(self, module: nn.Module, prefix: str, values: Mapping[str, Tensor] | None = None) -> None:
        """Give ``module`` its parameters and persistent buffers from the checkpoint (or from ``values``, by checkpoint
        name, where they are there). ``prefix`` ends in a dot. :class:`UserError` where the checkpoint lacks one; a parameter
        that is in memory and not in the checkpoint (an adapter's) stays."""
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            parameter = prefix + name
            if parameter not in self.by_parameter:
                if isinstance(tensor, nn.Parameter) and tensor.is_meta:
                    raise UserError(f"{self.checkpoint.path}: has no tensor for {parameter}")
                continue
            dtype = self.dtype if isinstance(tensor, nn.Parameter) else tensor.dtype
            full = torch.empty(tensor.shape, dtype=dtype, device=self.device)
            for source in self.by_parameter[parameter]:
                value = values[source] if values and source in values else self._read(source)
                self.places[source].view(full).copy_(value.view_as(self.places[source].view(full)))
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(full, requires_grad=False) if isinstance(tensor, nn.Parameter) else full
            setattr(module.get_submodule(owner), leaf, value)

    def read_ahead(self, index: int) -> None:
        """Begin to read what :meth:`fill` will ask for decoder layer ``index``, where there is one, while the device works."""
        if self.ahead and index < len(self.layers):
            layer = self.layers[index]
            for name, _ in [*layer.named_parameters(), *layer.named_buffers()]:
                for source in self.by_parameter.get(f"model.layers.{index}.{name}", ()):
                    self._coming[source] = self._reader.submit(self.checkpoint.read, source)

    def close(self) -> None:
        """Read no more ahead."""
        self._reader.shutdown(cancel_futures=True)
        self._coming.clear()

    def _read(self, name: str) -> Tensor:
        coming = self._coming.pop(name, None)
        return self.checkpoint.read(name) if coming is None else coming.result()

    @staticmethod
    def empty(module: nn.Module) -> None:
        """Drop a module's parameters again, and give their memory back. What no checkpoint holds (gemma's scale of the
        embedding) stays: nothing could fill it a second time."""
        kept = [(part, name, part._buffers[name]) for part in module.modules() for name in part._non_persistent_buffers_set]
        module.to("meta")
        for part, name, buffer in kept:
            part._buffers[name] = buffer
        trim_heap()

    @torch.no_grad()
    def arguments(self, ids: Tensor) -> list[dict[str, Any]]:
        """What the model hands to each decoder layer for token ids [B, T]: masks, positions. They depend on the shape only."""
        seen: list[dict[str, Any]] = []
        self.decoder.layers = nn.ModuleList(_Recorder(layer, seen) for layer in self.layers)
        embeds = torch.zeros(*ids.shape, self.decoder.config.hidden_size, dtype=self.dtype, device=self.device)
        norm, self.decoder.norm = self.decoder.norm, nn.Identity()
        try:
            self.decoder(inputs_embeds=embeds, use_cache=False)
        finally:
            self.decoder.layers, self.decoder.norm = nn.ModuleList(self.layers), norm
        return seen

    @torch.no_grad()
    def embed(self, parts: Iterable[Tensor], values: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        """Each batch of token ids [B, T] embedded, [B, T, H] on the CPU, by the family's own module (gemma scales)."""
        self.fill(self.decoder.embed_tokens, "model.embed_tokens.", values)
        out = [self.decoder.embed_tokens(ids.to(self.device)).cpu() for ids in parts]
        self.empty(self.decoder.embed_tokens)
        return out

    @contextlib.contextmanager
    def predictions(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes logits of the last layer's output, by the family's own norm, head (maybe the embedding) and cap."""
        norm, head = self.decoder.norm, self.model.lm_head
        self.fill(norm, "model.norm.")
        self.fill(head, "lm_head." if "lm_head.weight" in self.by_parameter else "model.embed_tokens.")
        cap = getattr(self.decoder.config, "final_logit_softcapping", None)  # gemma2's

        def logits(hidden: Tensor) -> Tensor:
            found = head(norm(hidden))
            return found if cap is None else cap * torch.tanh(found / cap)

        yield logits
        self.empty(norm)
        self.empty(head)

    @torch.no_grad()
    def run(self, layer: nn.Module, batches: Iterable[Tensor], kwargs: dict[str, Any]) -> Iterator[Tensor]:
        """Each batch [B, T, H] through a filled decoder layer."""
        for hidden in batches:
            yield output(layer, hidden.to(self.device), kwargs)
