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
from ggml_codecs import decode_rows, encode
from ggml_round import ldlq
from ggml_types import TYPES
from gguf_layout import Piece, into_parameter, ordered_hessian, read_parameter, to_gguf

METHODS = ("ldlq", "nearest")
DAMPING = 0.1  # of the mean second moment, added to each: inputs that the calibration text hardly uses keep some worth


def is_quantized(kind: str) -> bool:
    return TYPES[kind].block > 1


def encoded(value: Tensor, kind: str, method: str, hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Bytes of ``value`` [E, O, I] with second moments ``hessian`` [E, I, I] of its inputs."""
    if method == "ldlq" and is_quantized(kind):
        return ldlq(value, kind, hessian, damping)
    return encode(value.float(), kind, hessian.diagonal(dim1=1, dim2=2)[:, None])


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
        damping: float,
    ) -> None:
        super().__init__(stream, calibration, targets, method)  # type: ignore[arg-type]
        self.types, self.damping = types, damping
        self.encoded: dict[str, Tensor] = {}
        self.waiting: list[tuple[str, Tensor, Moments]] = []
        self.errors: dict[str, list[float]] = {}

    def _round(self, layer: torch.nn.Module, prefix: str, name: str, moments: Moments | None) -> None:
        parameter = layer.get_parameter(name)
        if parameter.ndim == 2 and moments is not None:
            self.waiting.append((prefix + name, parameter, moments))
        else:
            self._encode(prefix + name, parameter, moments)

    def _round_waiting(self) -> None:
        """Encode the matrices put aside. Those of one type and the same inputs (queries, keys and values) are encoded as one: a
        sweep takes as long for a few rows as for many, since its columns come one after the other."""
        waiting, self.waiting = self.waiting, []
        groups: list[tuple[list[tuple[Piece, Tensor]], Tensor]] = []
        for name, parameter, moments in waiting:
            hessian = self._statistics(name, moments).hessian
            for piece in self.targets[name]:
                own = ordered_hessian(piece, hessian)
                for members, other in groups:
                    if self.types[members[0][0].name] == self.types[piece.name] and torch.equal(other, own):
                        members.append((piece, parameter))
                        break
                else:
                    groups.append(([(piece, parameter)], own))
        for members, hessian in groups:
            try:
                self._pieces(members, hessian)
            except UserError as error:
                raise UserError(f"{members[0][0].parameter}: {error}") from None

    def _encode(self, name: str, parameter: Tensor, moments: Moments | None) -> None:
        try:
            if moments is None:
                raise UserError("no calibration activation reached it; give more or other calibration text")
            statistics = self._statistics(name, moments)
            for members in self._alike(self.targets[name]):
                self._pieces([(piece, parameter) for piece in members], ordered_hessian(members[0], statistics.hessian))
        except UserError as error:
            raise UserError(f"{name}: {error}") from None

    def _alike(self, pieces: Sequence[Piece]) -> list[list[Piece]]:
        """The pieces of one parameter; those of one type (the gates of experts and what they gate) together, since the factor
        of their second moments is one. Pieces with an order of inputs of their own stay alone."""
        found: dict[tuple[str, int], list[Piece]] = {}
        for number, piece in enumerate(pieces):
            found.setdefault((self.types[piece.name], -1 if piece.columns is None else number), []).append(piece)
        return list(found.values())

    def _pieces(self, members: Sequence[tuple[Piece, Tensor]], hessian: Tensor) -> None:
        """Encode pieces of one type, with their parameters, whose inputs have the same second moments."""
        kind = self.types[members[0][0].name]
        values = [to_gguf(piece, parameter) for piece, parameter in members]
        values = [value if value.ndim == 3 else value[None] for value in values]
        value = values[0] if len(values) == 1 else torch.cat(values, 1)
        data = encoded(value.contiguous(), kind, self.method, hessian, self.damping)  # ldlq makes floats of a few experts
        for (piece, parameter), value, own in zip(members, values, data.split([value.shape[1] for value in values], 1)):
            value, decoded = value.float(), decode_rows(own.contiguous(), kind)
            sizes = (output_error(value - decoded, hessian), output_error(value, hessian))
            self.errors[piece.name] = [float(f"{size:.6g}") for size in sizes]
            into_parameter(piece, decoded.view(piece.shape), parameter)
            self.encoded[piece.name] = own.contiguous().cpu()

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
