"""llama.cpp's own converter, run from its source tree with the pre-tokenizers named that it does not know.

    python src/quant/gguf_convert.py SOURCE convert MODEL --outfile FILE --outtype bf16 [...]     (convert_hf_to_gguf's options)
    python src/quant/gguf_convert.py SOURCE header MODEL PLAN.json HEADER

`header` writes what stands in a GGUF file before its first tensor, for the tensors of PLAN.json: {"ftype": 23, "no_mtp": true,
"keys": {key: float}, "ends": [token ids], "tensors": [[name, shape, ggml type, bytes], ...]}. The key-values, the tokenizer
among them, are the converter's, and "keys" (of the architecture) and "ends" beside them. Only the process of this script
imports from SOURCE; its gguf-py stands before an installed one.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

# Qwen2's split pattern, published in its tokenizer.json: every digit is a token of its own. razor-tiny's tokenizer has it too.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The converter knows a tokenizer by the digest of what it makes of one text, which depends on the vocabulary. A tokenizer of
# unknown digest is known here by the expression that splits its text: llama.cpp's name for it.
PRE_TOKENIZERS = {QWEN2_PATTERN: "qwen2"}
# Tokens at which llama.cpp stops by their text alone (llama-vocab.cpp), among those that models name as their ends.
STOPS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<|end_of_text|>", "<eos>")


def split_pattern(model: Path) -> str | None:
    """The regular expression that the byte-level tokenizer of a checkpoint splits text by; None where it does otherwise."""
    try:
        pre = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
        split, levels = pre["pretokenizers"]
        plain = split["behavior"] == "Isolated" and not split["invert"] and levels["type"] == "ByteLevel"
        return split["pattern"]["Regex"] if plain and not levels["use_regex"] and not levels["add_prefix_space"] else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def name_pre_tokenizers(base: Any) -> None:
    """Let the converter's class for text models also know :data:`PRE_TOKENIZERS`."""
    known = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        warn = base.logger.warning
        base.logger.warning = lambda *_: None  # a page of advice to edit the converter
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            pattern = split_pattern(Path(self.dir_model))
            if pattern not in PRE_TOKENIZERS:
                raise SystemExit(
                    f"the pre-tokenizer of {self.dir_model} (it splits by {pattern!r}) is not known to llama.cpp; "
                    "name it in PRE_TOKENIZERS of src/quant/gguf_convert.py"
                ) from None
            return PRE_TOKENIZERS[pattern]
        finally:
            base.logger.warning = warn

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre


def without_sentencepiece() -> None:
    """The converter imports sentencepiece before it looks whether a checkpoint has a tokenizer.model; one without is read
    otherwise, and one with it is refused by name."""
    if importlib.util.find_spec("sentencepiece"):
        return

    def refuse(*_: Any) -> None:
        raise SystemExit("its tokenizer.model is read by sentencepiece, which is not installed: pip install sentencepiece")

    stand = types.ModuleType("sentencepiece")
    stand.SentencePieceProcessor = type("SentencePieceProcessor", (), {"LoadFromFile": refuse})  # type: ignore[attr-defined]
    sys.modules["sentencepiece"] = stand


def write_header(base: Any, gguf: Any, model: Path, plan: dict[str, Any], out: Path) -> None:
    """The magic, key-values, tensor table and padding of a GGUF file with the planned tensors."""
    from conversion import get_model_architecture, get_model_class

    hparams = base.ModelBase.load_hparams(model, False)
    kind = get_model_class(get_model_architecture(hparams, base.ModelType.TEXT), mmproj=False)
    kind.no_mtp = bool(plan["no_mtp"])
    converter = kind(model, gguf.LlamaFileType(plan["ftype"]), out)
    writer = converter.gguf_writer
    for name, shape, type_name, size in plan["tensors"]:
        writer.add_tensor_info(name, shape, None, size, raw_dtype=gguf.GGMLQuantizationType[type_name])
    converter.prepare_metadata(vocab_only=False)
    for key, value in plan["keys"].items():
        writer.add_float32(f"{writer.arch}.{key}", value)
    add_ends(writer, gguf.Keys.Tokenizer, plan["ends"])
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.close()


def add_ends(writer: Any, keys: Any, ends: list[int]) -> None:
    """Name the tokens at which generation ends (llama.cpp also stops at some that it knows by their text) in keys that the
    tokenizer has left free: end of text, of turn, of message."""
    values = writer.kv_data[0]
    known = {values[key].value for key in (keys.EOS_ID, keys.EOT_ID, keys.EOM_ID) if key in values}
    free = [key for key in (keys.EOS_ID, keys.EOT_ID, keys.EOM_ID) if key not in values]
    tokens = [token.decode("utf-8", "replace") if isinstance(token, bytes) else token for token in values[keys.LIST].value]
    if odd := [end for end in ends if not 0 <= end < len(tokens)]:
        raise SystemExit(f"generation_config.json: eos_token_id {odd[0]} is not one of {len(tokens)} tokens")
    rest = [end for end in ends if end not in known and tokens[end] not in STOPS]
    if len(rest) > len(free):
        raise SystemExit(f"generation_config.json: a GGUF has no place for the ends {rest[len(free) :]} beside {sorted(known)}")
    for key, end in zip(free, rest):
        writer.add_uint32(key, end)


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    source, mode, *rest = sys.argv[1:]
    sys.path[:0] = [str(Path(source) / "gguf-py"), source]
    import gguf
    from conversion import base

    name_pre_tokenizers(base)
    without_sentencepiece()
    if mode == "header":
        model, plan, out = map(Path, rest)
        write_header(base, gguf, model, json.loads(plan.read_text(encoding="utf-8")), out)
    elif mode == "convert":
        import conversion
        import convert_hf_to_gguf

        if "--no-mtp" in rest:  # refused where the converter writes no multi-token prediction anyway
            hparams = base.ModelBase.load_hparams(Path(rest[0]), False)
            name = conversion.get_model_architecture(hparams, base.ModelType.TEXT)
            if not conversion.get_model_class(name, mmproj=False).supports_mtp_export:
                rest.remove("--no-mtp")
        sys.argv = [str(Path(source) / "convert_hf_to_gguf.py"), *rest]
        convert_hf_to_gguf.main()
    else:
        raise SystemExit(f"unknown mode {mode!r}: convert or header")


if __name__ == "__main__":
    main()
