"""The reference GGUF, by llama.cpp's own tools: convert_hf_to_gguf -> llama-imatrix -> llama-quantize.

    python src/quant/gguf_reference.py --model models/razor-tiny --out work/reference --base-type IQ3_XXS \
        [--tensor-types configs/gguf_tensor_types_iq3.txt] [--calib FILE]

OUT holds NAME-BF16.gguf, calibration.txt, imatrix.gguf, NAME-TYPE.gguf and, for a model with a vision tower,
NAME-mmproj-f16.gguf. A file that is there is kept: a killed run goes on with the step that it was at, and another base type
reuses the conversion and the imatrix. A step with other settings than its file was made with is refused (--force repeats it).
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
from calibration import Calibration
from console import UserError, file_sha256, read_json, write_json
from gguf_format import GgufFile, run_converter
from gguf_layout import Patterns, file_name
from hf_model import load_tokenizer
from pack_plan import Pack, report, table, write_mmproj
from records import sha256_text

STEPS = "steps.json"


def run_tool(name: str, arguments: Sequence[object], log: Path) -> None:
    """Run one of llama.cpp's tools with its output in ``log``."""
    command = [llama_cpp.tool(name), *arguments]
    print("+ " + " ".join([name, *map(str, arguments)]), flush=True)
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(list(map(str, command)), stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise UserError(f"{name} failed ({lines[-1].strip()[:200] if lines else f'exit code {code}'}); its output is in {log}")


class Steps:
    """The files of an output directory and the settings that each was made with."""

    def __init__(self, out: Path, force: bool) -> None:
        self.out, self.force = out, force
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{out}: cannot be created ({error.strerror})") from None
        self.made: dict[str, Any] = read_json(out / STEPS) if (out / STEPS).exists() else {}
        if not self.made and any(out.iterdir()):
            raise UserError(f"{out}: not an output of this command (no {STEPS}); choose another")

    def step(self, name: str, settings: dict[str, Any], make: Callable[[Path], object]) -> Path:
        """The file ``name``, made by ``make(temporary name)`` unless it is there."""
        path, before = self.out / name, self.made.get(name)
        if path.exists() and before == settings:
            print(f"kept {path}", flush=True)
            return path
        if path.exists() and not self.force:
            raise UserError(f"{path}: made with other settings; give another --out, or --force to make it again")
        started, temporary = time.time(), self.out / f".{name}"
        make(temporary)
        temporary.rename(path)
        self.made[name] = settings
        write_json(self.out / STEPS, self.made)
        print(f"wrote {path} ({path.stat().st_size / 1e6:.2f} MB) in {time.time() - started:.1f} s", flush=True)
        return path


def make_reference(
    pack: Pack, calibration: Calibration, out: Path, patterns: Patterns = (), force: bool = False
) -> dict[str, Any]:
    """Run all steps, on the text of the tokens that the calibrated pass would read; the report of the quantized file."""
    model, steps = pack.checkpoint.path, Steps(out, force)
    name, length = model.resolve().name, calibration.ids.shape[1]
    text = load_tokenizer(model).decode(
        calibration.ids.flatten(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    source = {"config_sha256": pack.checkpoint.config_sha256, "bytes": pack.checkpoint.bytes}
    # The direct path leaves multi-token prediction out as well; llama-imatrix does not reach it.
    plain = steps.step(
        f"{name}-BF16.gguf", source,
        lambda path: run_converter("convert", model, "--outfile", path, "--outtype", "bf16", "--no-mtp"),
    )  # fmt: skip
    read = {"sha256": sha256_text(text), "length": length}
    written = steps.step("calibration.txt", read, lambda path: path.write_text(text, encoding="utf-8"))
    log = out / "llama.log"
    context = ["-c", length, "-b", length, "--parse-special", "--no-ppl"]
    imatrix = steps.step(
        "imatrix.gguf", source | read,
        lambda path: run_tool("llama-imatrix", ["-m", plain, "-f", written, *context, "-o", path], log),
    )  # fmt: skip

    def quantize(path: Path) -> None:
        flags: list[object] = ["--pure", "--imatrix", imatrix]
        if patterns:
            stripped = out / "tensor_types.txt"  # llama.cpp knows no comments
            stripped.write_text("".join(f"{pattern}={kind}\n" for pattern, kind in patterns), encoding="utf-8")
            flags += ["--tensor-type-file", stripped]
        run_tool("llama-quantize", [*flags, plain, path, file_name(pack.base)], log)

    file = GgufFile(steps.step(pack.file_name, source | read | {"types": dict(pack.types)}, quantize))
    write_mmproj(pack.checkpoint, out)
    check_types(file, pack)
    made = report(pack, file.path.stat().st_size) | {"file": file.path.name, "sha256": file_sha256(file.path)}
    print(table(made))
    return made


def check_types(file: GgufFile, pack: Pack) -> None:
    """The types are those that were planned; anything else would make a comparison at equal bytes void."""
    for piece in pack.pieces:
        if file.kind(piece.name) != pack.types[piece.name]:
            raise UserError(f"{file.path}: {piece.name} is {file.kind(piece.name)}, expected {pack.types[piece.name]}")
