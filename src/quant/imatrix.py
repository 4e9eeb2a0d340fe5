"""llama.cpp's importance matrix as a GGUF file: write it from calibration statistics, read it back.

Not a command; `python src/quant/moe_probe.py --model DIR --imatrix FILE` writes one. Format (llama.cpp, tools/imatrix): for
every weight a float32 tensor NAME.in_sum2 [matrices, inputs], the summed squared inputs, and NAME.counts [matrices, 1], what
they are divided by; keys general.type "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from torch import Tensor

from calibration import Moments
from console import UserError, atomic_path
from gguf_layout import name_map


class Entry(NamedTuple):
    """``sums`` [matrices, inputs] of (weighted) squared inputs and ``counts`` [matrices], both float32."""

    sums: np.ndarray
    counts: np.ndarray


def ggml_names(parameter: str, model_type: str, layers: int) -> list[str]:
    """llama.cpp's names of the weights that a parameter of transformers' module tree becomes."""
    names = name_map(model_type, layers)
    base = parameter.removesuffix(".weight")
    parts = [base]
    if base.endswith("experts.gate_up_proj"):  # stored as two weights with the same inputs
        parts = [base.replace("gate_up_proj", part) for part in ("gate_proj", "up_proj")]
    found = [names.get_name(part) for part in parts]
    return [f"{name}.weight" for name in found if name]


def entries_of(moments: Mapping[str, Moments], model_type: str, layers: int, order: Tensor | None = None) -> dict[str, Entry]:
    """The entries of calibration statistics, by llama.cpp's names; ``order``: where each input of linear_attn.out_proj lies
    for ggml (gguf_layout.head_order), None for its own place."""
    entries = {}
    for parameter, value in moments.items():
        sums = value.total.diagonal(dim1=1, dim2=2).float().cpu().numpy()
        if order is not None and parameter.endswith("linear_attn.out_proj.weight"):
            sums = sums[:, order.numpy()]
        for name in ggml_names(parameter, model_type, layers):
            entries[name] = Entry(sums, value.weight.float().cpu().numpy())
    return entries


def write_imatrix(path: str | Path, entries: Mapping[str, Entry], datasets: Iterable[str], chunks: int, length: int) -> None:
    """Write ``entries``; ``chunks`` sequences of ``length`` tokens were read. The file appears when it is complete."""
    with atomic_path(path) as temporary:
        writer = gguf.GGUFWriter(temporary, arch="")
        # Not gguf-py's own general.architecture: llama-quantize knows an imatrix by general.type alone.
        writer.kv_data[0].pop(gguf.Keys.General.ARCHITECTURE, None)
        writer.add_string("general.type", "imatrix")
        writer.add_array("imatrix.datasets", list(datasets))
        writer.add_uint32("imatrix.chunk_count", chunks)
        writer.add_uint32("imatrix.chunk_size", length)
        for name, entry in sorted(entries.items()):
            writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(entry.sums, dtype=np.float32))
            writer.add_tensor(f"{name}.counts", np.ascontiguousarray(entry.counts, dtype=np.float32)[:, None])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: str | Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """(entries, {"datasets", "chunk_count", "chunk_size"}) of an imatrix; another file is a :class:`UserError`."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such imatrix")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: not a GGUF file ({error}); the old .dat format is not read") from None
    kind = reader.fields.get("general.type")
    if kind is None or kind.contents() != "imatrix":
        raise UserError(f"{path}: a GGUF file, but not an imatrix (general.type)")
    tensors = {tensor.name: np.array(tensor.data, dtype=np.float32) for tensor in reader.tensors}
    names = [name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")]
    lost = next((name for name in names if f"{name}.counts" not in tensors), None)
    if lost or 2 * len(names) != len(tensors):
        raise UserError(f"{path}: {lost or 'a tensor'} has sums or counts but not both; write it again")
    entries = {name: Entry(tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"].reshape(-1)) for name in names}
    keys = ("datasets", "chunk_count", "chunk_size")
    return entries, {key: reader.fields[f"imatrix.{key}"].contents() for key in keys}
