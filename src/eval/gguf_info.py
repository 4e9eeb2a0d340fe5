"""What a GGUF file says of itself: architecture, tensors, chat template, digest.

Not a command. ``describe_gguf(path)`` is the model entry of a record; ``open_gguf(path)`` reads header and tensor table.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import UserError, files_sha256
from records import public_path

if TYPE_CHECKING:
    from gguf import GGUFReader

MODEL_TYPES = {  # transformers' names of llama.cpp's architectures, where they differ
    "qwen35moe": "qwen3_5_moe_text",
    "qwen35": "qwen3_5_text",
    "qwen3next": "qwen3_next",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "deepseek2": "deepseek_v3",
}
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf$")


def is_gguf(path: str | Path) -> bool:
    return str(path).endswith(".gguf")


def gguf_files(path: str | Path) -> list[Path]:
    """The file, or all files of a split model whose first file is given."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    match = SHARD.match(path.name)
    if not match:
        return [path]
    if match[2] != "00001":
        raise UserError(f"{path}: part {int(match[2])} of a split model; give the first, {match[1]}-00001-of-{match[3]}.gguf")
    files = [path.with_name(f"{match[1]}-{part:05d}-of-{match[3]}.gguf") for part in range(1, int(match[3]) + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{path}: the split model lacks {', '.join(missing)}")
    return files


def open_gguf(path: str | Path) -> GGUFReader:
    """Header and tensor table, checked against the file's length; a damaged file is a :class:`UserError`."""
    from gguf import GGUFReader  # here: machines that evaluate checkpoints only may lack it

    path = Path(path)
    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, IndexError, OverflowError, KeyError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a whole GGUF file ({told}); copy or make it again") from None
    size = path.stat().st_size
    needed = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    if size < needed:
        raise UserError(f"{path}: {size:,} bytes, its tensors need {needed:,}: truncated; copy or make it again")
    return reader


def metadata(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """The value of a metadata key."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def architecture_value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    """A value of the model's own section, such as ``context_length`` for ``qwen35moe.context_length``."""
    return metadata(reader, f"{metadata(reader, 'general.architecture')}.{key}", default)


def token_text(reader: GGUFReader, kind: str) -> str | None:
    """The text of the special token that ``tokenizer.ggml.KIND_token_id`` names."""
    index = metadata(reader, f"tokenizer.ggml.{kind}_token_id")
    if index is None:
        return None
    field = reader.get_field("tokenizer.ggml.tokens")
    return bytes(field.parts[field.data[int(index)]]).decode("utf-8")


def describe_gguf(path: str | Path, digest: bool = True) -> dict[str, Any]:
    """The model entry of a record: path, bytes, digest, tensors, architecture, and how many tensors have each type."""
    files = gguf_files(path)
    readers = [open_gguf(file) for file in files]
    types = Counter(tensor.tensor_type.name.lower() for reader in readers for tensor in reader.tensors)
    return {
        "path": public_path(str(Path(path).resolve())),
        "format": "gguf",
        "architecture": metadata(readers[0], "general.architecture"),
        "bytes": sum(file.stat().st_size for file in files),
        "tensors": sum(types.values()),
        "types": dict(sorted(types.items())),
        **({"weights_sha256": files_sha256(files)} if digest else {}),
    }


def config_of_gguf(path: str | Path) -> dict[str, Any]:
    """What config.json of the model said, as far as it tells which model it is."""
    reader = open_gguf(gguf_files(path)[0])
    architecture = metadata(reader, "general.architecture")
    layers = int(architecture_value(reader, "block_count", 0)) - int(architecture_value(reader, "nextn_predict_layers", 0))
    config = {"model_type": MODEL_TYPES.get(architecture, architecture), "num_hidden_layers": layers}
    for ours, theirs in (("hidden_size", "embedding_length"), ("num_experts", "expert_count")):
        if (value := architecture_value(reader, theirs)) is not None:
            config[ours] = int(value)
    return config
