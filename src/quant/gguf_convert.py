"""llama.cpp's own converter, run from its source tree with the pre-tokenizers named that it does not know.

    python src/quant/gguf_convert.py SOURCE convert MODEL --outfile FILE --outtype bf16 [...]     (convert_hf_to_gguf's options)
    python src/quant/gguf_convert.py SOURCE header MODEL PLAN.json HEADER

`header` writes what stands in a GGUF file before its first tensor, for the tensors of PLAN.json: {"ftype": 23, "no_mtp": true,
"tensors": [[name, shape, ggml type, bytes], ...]}. The key-values, the tokenizer among them, are the converter's. Only the
process of this script imports from SOURCE; its gguf-py stands before an installed one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# A tokenizer is known by the digest of what it makes of one text. models/razor-tiny splits text by Qwen2's expression.
PRE_TOKENIZERS = {"70c6637b2fe7720953db0f36fc3f4e289168f22ee75ec72c58fac3e1e8adc1c0": "qwen2"}


def name_pre_tokenizers(base: Any) -> None:
    """Let the converter's class for text models also know :data:`PRE_TOKENIZERS`. The digest is read where the converter
    itself reports it, from its warning about an unknown one."""
    known = base.TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        reported: list[str] = []
        warn = base.logger.warning
        base.logger.warning = lambda text, *more: reported.append(str(text))
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            digest = next((line.split()[-1] for line in reported if "chkhsh:" in line), "")
            if digest not in PRE_TOKENIZERS:
                raise SystemExit(
                    f"the pre-tokenizer of {self.dir_model} (digest {digest}) is not known to llama.cpp; "
                    "name it in PRE_TOKENIZERS of src/quant/gguf_convert.py"
                ) from None
            return PRE_TOKENIZERS[digest]
        finally:
            base.logger.warning = warn

    base.TextModel.get_vocab_base_pre = get_vocab_base_pre


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
    writer.write_header_to_file(path=out)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(writer.fout[0], writer.fout[0].tell())
    writer.close()


def main() -> None:
    source, mode, *rest = sys.argv[1:]
    sys.path[:0] = [str(Path(source) / "gguf-py"), source]
    import gguf
    from conversion import base

    name_pre_tokenizers(base)
    if mode == "header":
        model, plan, out = map(Path, rest)
        write_header(base, gguf, model, json.loads(plan.read_text(encoding="utf-8")), out)
    elif mode == "convert":
        import convert_hf_to_gguf

        sys.argv = [str(Path(source) / "convert_hf_to_gguf.py"), *rest]
        convert_hf_to_gguf.main()
    else:
        raise SystemExit(f"unknown mode {mode!r}: convert or header")


if __name__ == "__main__":
    main()
