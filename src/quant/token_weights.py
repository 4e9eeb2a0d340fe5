"""How much each calibration token matters to the predictions: by the loss's gradient behind every decoder layer.

Not a command; gguf_pack drives it. An error of a token's activation costs about  d F d  nats of KL, where F is the Fisher
information of the predictions; its trace is the expected squared gradient of log p(y) for a y drawn from the prediction
itself. Second moments that weigh tokens by it are those of GuidedQuant (Kim et al. 2025, arXiv 2505.07004). Where a model is
sure of most tokens, the trace differs between tokens by many orders of magnitude: with it as it is, a few dozen of 65,536
tokens of razor-tiny's text would make up the moments. A power of it below 1 keeps them well-founded.

The checkpoint is streamed twice: forward, with the input of every layer put on disk, then backward layer by layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from calibration import Calibration, LayerStream, output
from checkpoint import Checkpoint, different_file
from console import UserError, progress
from families import layer_count, text_config
from safetensors_file import save_tensors

FILE = "token-weights.st"


def token_weights(
    stream: LayerStream, calibration: Calibration, directory: Path, path: Path | None = None, seed: int = 0
) -> Tensor | None:
    """Weights [layers, tokens] of mean 1 in each layer, tokens in the order of the batches; None where all count alike.

    They are kept in ``path`` (default: in ``directory``, which is also for the work), where a killed run, and other runs on the
    same model and text, find them again: none of it depends on what is rounded. Those of another are a :class:`UserError`.
    """
    if not calibration.token_power:
        return None
    path = path or directory / FILE
    made_of = {"source": stream.checkpoint.identity, **calibration.settings()}
    if path.exists():
        check_same(path, made_of)
    else:
        with progress(4 * len(stream.layers), "token weights", "pass") as bar:
            kwargs, hidden = _forward(stream, calibration, directory, bar)
            sizes = _backward(stream, kwargs, head_gradients(stream, hidden, seed), directory, bar)
        found = {"weights": powered(sizes, calibration.token_power)}
        save_tensors(path, found, {"made_of": json.dumps(made_of, sort_keys=True)})
        for index in range(len(stream.layers)):
            _inputs_file(directory, index).unlink()
    return load_file(path)["weights"]


def check_same(path: Path, made_of: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` unless the token weights in ``path`` are of this model, text and power."""
    try:
        with safe_open(path, "pt") as file:
            before = json.loads((file.metadata() or {})["made_of"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a file of token weights ({error!r:.120}); give another file, or remove it") from None
    changed = [key for key in sorted(made_of.keys() | before.keys()) if made_of.get(key) != before.get(key)]
    if "source" in changed:
        other = different_file(before.get("source"), made_of["source"])
        raise UserError(f"{path}: token weights of another model ({other}); give another file, or remove it")
    if changed:
        raise UserError(
            f"{path}: token weights of another text or power ({', '.join(changed)}); give another file, or remove it"
        )


def kept_bytes(checkpoint: Checkpoint, calibration: Calibration | None) -> int:
    """Bytes of the activations that wait on disk: those behind the last two layers, for a run that resumes; before them, while
    the tokens are weighed, the input of every decoder layer."""
    if not calibration:
        return 0
    config = text_config(checkpoint.config)
    item = torch.empty((), dtype=calibration.dtype).itemsize
    count = layer_count(config) or 1
    layers = max(2, count) if calibration.token_power else 2
    return item * calibration.ids.numel() * config["hidden_size"] * layers


def powered(sizes: Tensor, power: float) -> Tensor:
    """Squared gradients [layers, tokens] to weights of mean 1; a layer without any gets ones."""
    bad = (~torch.isfinite(sizes)).any(-1).nonzero()[:, 0].tolist()
    if bad:  # it flows from the last layer to the first
        raise UserError(f"the gradient at a calibration token is NaN or infinite, first behind decoder layer {bad[-1]}")
    weights = sizes.double() ** power
    mean = weights.mean(-1, keepdim=True)
    return torch.where(mean > 0, weights / mean.clamp_min(1e-300), 1.0).float()


def _inputs_file(directory: Path, index: int) -> Path:
    return directory / f"inputs-{index:05d}.st"


@torch.no_grad()
def _forward(
    stream: LayerStream, calibration: Calibration, directory: Path, bar: Any
) -> tuple[Sequence[Mapping[str, Any]], list[Tensor]]:
    """Keep the inputs of every layer; returns the layers' other arguments and the output of the last."""
    kwargs, hidden = stream.arguments(calibration.batches()[0]), stream.embed(calibration.batches())
    for index, layer in enumerate(stream.layers):
        save_tensors(_inputs_file(directory, index), {str(i): h.contiguous() for i, h in enumerate(hidden)})
        stream.fill(layer, f"model.layers.{index}.")
        hidden = [out.cpu() for out in stream.run(layer, hidden, kwargs[index])]
        stream.empty(layer)
        bar.update()
    return kwargs, hidden


def head_gradients(stream: LayerStream, hidden: Sequence[Tensor], seed: int) -> list[Tensor]:
    """A random vector at the last layer's output of every position whose second moment is the Fisher information there.

    With signs e:  sum over tokens y of sqrt(p(y)) e(y) d log p(y). Its square is near the trace in every draw, where the
    gradient of one drawn token is nearly 0 at most positions and large at a few. A sequence at a time.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    with stream.predictions() as logits_of:
        for batch in hidden:
            rows = []
            for row in batch:
                with torch.enable_grad():
                    x = row.to(stream.device).requires_grad_(True)
                    logits = logits_of(x)
                    (gradient,) = torch.autograd.grad(logits, x, score(logits.detach(), generator))
                rows.append(gradient.cpu())
            found.append(torch.stack(rows))
    return found


def score(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Random vectors [N, V] whose covariance is that of the predictions, diag(p) - p p^T."""
    p = logits.float().softmax(-1)
    signs = torch.randint(0, 2, p.shape, dtype=torch.int8, generator=generator).to(p.device) * 2 - 1
    part = p.sqrt() * signs
    return (part - p * part.sum(-1, keepdim=True)).to(logits.dtype)


def _backward(
    stream: LayerStream, kwargs: Sequence[Mapping[str, Any]], gradients: list[Tensor], directory: Path, bar: Any
) -> Tensor:
    """Squared sizes [layers, tokens] of the gradient at the output of each layer."""
    sizes = []
    for index in reversed(range(len(stream.layers))):
        sizes.append(torch.cat([g.float().square().sum(-1).flatten() for g in gradients]))
        if index:
            inputs, layer = load_file(_inputs_file(directory, index)), stream.layers[index]
            stream.fill(layer, f"model.layers.{index}.")
            gradients = [through(layer, inputs[str(i)], g, kwargs[index], stream.device) for i, g in enumerate(gradients)]
            stream.empty(layer)
        bar.update(3)  # backward costs about three times forward
    return torch.stack(sizes[::-1])


def through(layer: nn.Module, hidden: Tensor, gradient: Tensor, kwargs: Mapping[str, Any], device: torch.device) -> Tensor:
    """The gradient at a layer's input of the gradient at its output, both [B, T, H] on the CPU."""
    with torch.enable_grad():
        x = hidden.to(device).requires_grad_(True)
        (found,) = torch.autograd.grad(output(layer, x, kwargs), x, gradient.to(device))
    return found.cpu()
