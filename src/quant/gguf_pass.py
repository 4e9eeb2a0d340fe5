"""The calibrated pass that writes a GGUF: each decoder layer is calibrated, rounded into ggml blocks, appended and run.

Not a command; gguf_pack drives it. The activations go on through the decoded blocks, so what a layer is calibrated on is what
the file gives it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calibrated_pass import LM_HEAD, CalibratedPass
from calibration import Calibration, LayerStream, Moments
from console import UserError
from ggml_round import ldlq
from ggml_types import TYPES, decode_rows, encode
from gguf_layout import Piece, into_parameter, ordered_hessian, read_parameter, to_gguf

METHODS = ("ldlq", "nearest")


def is_quantized(kind: str) -> bool:
    return TYPES[kind].block > 1


def encoded(value: Tensor, kind: str, method: str, hessian: Tensor) -> Tensor:
    """Bytes of ``value`` [E, O, I] with second moments ``hessian`` [E, I, I] of its inputs."""
    if method == "ldlq" and is_quantized(kind):
        return ldlq(value, kind, hessian)
    return encode(value, kind, hessian.diagonal(dim1=1, dim2=2)[:, None])


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """Sum over matrices of tr(D H D^T); D [E, O, I], H [E, I, I]."""
    total = 0.0
    for d, h in zip(difference, hessian, strict=True):
        total += ((d @ h) * d).sum(dtype=torch.float64).item()
    return total


class GgufPass(CalibratedPass):
    """``targets``: the pieces of every parameter that has a quantized one. ``errors``: by piece, the squared error of its
    output and the squared output, over calibration inputs."""

    def __init__(
        self,
        stream: LayerStream,
        calibration: Calibration,
        targets: Mapping[str, Sequence[Piece]],
        types: Mapping[str, str],
        method: str,
    ) -> None:
        super().__init__(stream, calibration, targets, method)  # type: ignore[arg-type]
        self.types = types
        self.encoded: dict[str, Tensor] = {}
        self.errors: dict[str, list[float]] = {}

    def _round(self, layer: torch.nn.Module, prefix: str, name: str, moments: Moments | None) -> None:
        self._encode(prefix + name, layer.get_parameter(name), moments)

    def _encode(self, name: str, parameter: Tensor, moments: Moments | None) -> None:
        try:
            if moments is None:
                raise UserError("no calibration activation reached it; give more or other calibration text")
            statistics = self._statistics(name, moments)
            for piece in self.targets[name]:
                self._piece(piece, parameter, ordered_hessian(piece, statistics.hessian))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def _piece(self, piece: Piece, parameter: Tensor, hessian: Tensor) -> None:
        kind = self.types[piece.name]
        value = to_gguf(piece, parameter).float()
        value = value if value.ndim == 3 else value[None]
        data = encoded(value.contiguous(), kind, self.method, hessian)
        decoded = decode_rows(data, kind)
        sizes = (output_error(value - decoded, hessian), output_error(value, hessian))
        self.errors[piece.name] = [float(f"{size:.6g}") for size in sizes]
        into_parameter(piece, decoded.view(piece.shape), parameter)
        self.encoded[piece.name] = data.cpu()

    def _disk_values(self, layer: torch.nn.Module, prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
        return self.taken()

    def taken(self) -> dict[str, Tensor]:
        """The bytes of the pieces that were encoded since the last call."""
        values, self.encoded = self.encoded, {}
        return values

    @torch.no_grad()
    def head(self) -> dict[str, Tensor]:
        """Encode lm_head, where it is quantized, on the normed output of the last layer."""
        if LM_HEAD not in self.targets:
            return {}
        stream, moments = self.stream, self._head_moments()
        (piece,) = self.targets[LM_HEAD]
        self._encode(LM_HEAD, read_parameter(stream.checkpoint, piece).to(stream.device, torch.float32), moments)
        return self.taken()
