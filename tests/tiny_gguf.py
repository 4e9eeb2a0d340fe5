"""Convert razor-tiny to GGUF with llama.cpp's own converter: python tests/tiny_gguf.py LLAMA_CPP_SOURCE MODEL OUT TYPE

The converter knows pre-tokenizers by a hash; razor-tiny's own BPE splits text as Qwen2's does, so that name is given.
"""

import runpy
import sys

if __name__ == "__main__":
    source, model, out, kind = sys.argv[1:]
    sys.path.insert(0, source)
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", kind, "--no-mtp"]
    runpy.run_path(f"{source}/convert_hf_to_gguf.py", run_name="__main__")
