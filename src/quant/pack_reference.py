"""The reference of a pack: the same file by llama.cpp's own converter, llama-imatrix and llama-quantize.

Not a command; gguf_pack runs it with --reference. Each step keeps its file with the settings that it was made with, so a killed
run goes on, and other settings are refused.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
from calibration import Calibration
from checkpoint import different_file, model_name
from console import UserError, files_sha256, read_json, write_json, writing
from gguf_format import GgufFile, bos_of, run_converter
from gguf_layout import Patterns, check_header, file_name
from hf_model import load_tokenizer
from pack_plan import Pack, report, table, write_mmproj
from records import sha256_text

STEPS = "steps.json"


def run_tool(name: str, arguments: Sequence[object], log: Path) -> None:
    """Run one of llama.cpp's tools with its output in ``log``."""
    command = [llama_cpp.tool(name), *arguments]
    print("+ " + " ".join([name, *map(str, arguments)]), flush=True)
    log.unlink(missing_ok=True)
    code, _ = llama_cpp.watched(command, name, "tensor" if name == "llama-quantize" else "chunk", log)
    if code:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise UserError(f"{name} failed ({lines[-1].strip()[:200] if lines else f'exit code {code}'}); its output is in {log}")


class Steps:
    """The files of an output directory and the settings that each was made with."""

    def __init__(self, out: Path, force: bool) -> None:
        self.out, self.force = out, force
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        self.made: dict[str, Any] = read_json(out / STEPS) if (out / STEPS).exists() else {}
        if not isinstance(self.made, dict) or not all(isinstance(settings, dict) for settings in self.made.values()):
            raise UserError(f"{out / STEPS}: does not say how the files beside it were made; choose another --out")
        if not self.made and any(out.iterdir()):
            raise UserError(f"{out}: not an output of this command (no {STEPS}); choose another")

    def step(self, name: str, settings: dict[str, Any], make: Callable[[Path], object]) -> Path:
        """The file ``name``, made by ``make(temporary name)`` unless it is there."""
        path, before = self.out / name, self.made.get(name)
        if path.exists() and before == settings:
            print(f"kept {path}", flush=True)
            return path
        if path.exists() and not self.force:
            model = different_file(before.get("source"), settings["source"]) if before and "source" in settings else None
            what = f"of another model ({model})" if model else "with other settings"
            raise UserError(f"{path}: made {what}; give another --out, or --force to make it again")
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
    name, length = model_name(model), calibration.ids.shape[1]
    source: dict[str, Any] = {"source": pack.checkpoint.identity}
    options, more = ([], ["--nextn"]) if pack.mtp == "file" else (["--no-mtp"], [])
    if pack.mtp == "file":
        source |= {"mtp": True}
    plain = steps.step(
        f"{name}-BF16.gguf", source,
        lambda path: run_converter("convert", model, "--outfile", path, "--outtype", "bf16", *options),
    )  # fmt: skip
    ids, prefix = calibration.ids.flatten(), calibration.record.get("prefix")
    if prefix and bos_of(plain) == prefix[0]:  # llama-imatrix puts it there
        ids = ids[1:]
    tokenizer = load_tokenizer(model, chat=False)
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    read = {"sha256": sha256_text(text), "length": length}
    written = steps.step("calibration.txt", read, lambda path: path.write_text(text, encoding="utf-8"))
    log = out / "llama.log"
    context = ["-c", length, "-b", length, "--parse-special", *more]  # its perplexity tells how far it is
    imatrix = steps.step(
        "imatrix.gguf", source | read,
        lambda path: run_tool("llama-imatrix", ["-m", plain, "-f", written, *context, "-o", path], log),
    )  # fmt: skip

    def quantize(path: Path) -> None:
        # without --pure llama-quantize mixes types by category and number of experts, and bytes are not equal
        flags: list[object] = ["--pure", "--imatrix", imatrix]
        if patterns:
            stripped = out / "tensor_types.txt"  # llama.cpp knows no comments
            stripped.write_text("".join(f"{pattern}={kind}\n" for pattern, kind in patterns), encoding="utf-8")
            flags += ["--tensor-type-file", stripped]
        run_tool("llama-quantize", [*flags, plain, path, file_name(pack.base)], log)

    file = GgufFile(steps.step(pack.file_name, source | read | {"types": dict(pack.types)}, quantize))
    write_mmproj(pack.checkpoint, out)
    check_types(file, pack)
    check_header(file.fields, pack.checkpoint)
    check_loads(file.path)
    made = report(pack, file.path.stat().st_size) | {"file": file.path.name, "sha256": files_sha256([file.path])}
    print(table(made))
    return made


def check_types(file: GgufFile, pack: Pack) -> None:
    """The types are those that were planned; anything else would make a comparison at equal bytes void."""
    for piece in pack.pieces:
        if file.kind(piece.name) != pack.types[piece.name]:
            raise UserError(f"{file.path}: {piece.name} is {file.kind(piece.name)}, expected {pack.types[piece.name]}")


def check_loads(path: Path) -> None:
    """Let llama.cpp, where a build of it is at hand, load the file and read one token: :class:`UserError` if it does not."""
    if (bench := llama_cpp.at_hand("llama-bench")) is None:
        print(
            f"{path.name} was not tried in llama.cpp: no build of it here (bash pipelines/llama_cpp.sh makes one)", flush=True
        )
        return
    command = [bench, "-m", path, "-p", "1", "-n", "0", "-r", "1", "-ngl", "0", "--no-warmup", "-o", "json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        said = [
            line for line in done.stderr.splitlines() if "error" in line.lower() or "GGML_ASSERT" in line
        ] or done.stderr.strip().splitlines()[-1:]
        reason = " | ".join(line.strip() for line in said[:3])[:400] or f"exit code {done.returncode}"
        raise UserError(f"{path.name}: llama.cpp does not load it ({reason})")
    print(f"{path.name} was loaded by llama.cpp", flush=True)
