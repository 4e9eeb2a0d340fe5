"""The floors of the house, and the pages of its modules and keys: python src/eval/page_house.py [--check]

FLOORS is the one table of where a module stands. Imports go down only, and src/quant <- src/eval <- src/distill;
tests/test_house.py holds the rules, and this command writes docs/MODULES.md and
the README's tree from the table and the docstrings, the tables of configs/README.md from the commands' own declarations, and
that of docs/CHECKPOINTS.md from the families and the record that tried them.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

from console import UserError, atomic_path, run_cli
from families import FAMILIES, Role
from records import read_result

REPO = Path(__file__).resolve().parents[2]
DOCUMENT, README, CONFIGS = REPO / "docs/MODULES.md", REPO / "README.md", REPO / "configs/README.md"
CHECKPOINTS, TRIED = REPO / "docs/CHECKPOINTS.md", REPO / "results/bench/families.json"
CHECKPOINT_MARKS = ("<!-- families: python src/eval/page_house.py -->", "<!-- end of families -->")
GGUF_MARKS = ("<!-- ggufs: python src/eval/page_house.py -->", "<!-- end of ggufs -->")
TREE_MARKS = ("<!-- tree: python src/eval/page_house.py -->", "<!-- end of tree -->")
KEY_MARKS = ("<!-- keys: python src/eval/page_house.py -->", "<!-- end of keys -->")
KEYS = {
    "quantize.sh": "src/quant/quant_save.py",
    "pack_gguf.sh": "src/quant/gguf_pack.py",
    "smoke.sh": "src/eval/smoke.py",
    "distill.sh": "src/distill/distill_run.py",
    "recovery.sh": "src/distill/study_recovery.py",
    "make_tiny.sh": "src/distill/tiny_train.py",
}
FOLDERS = {
    "configs": "settings of the pipelines, locks of the packages",
    "docs": "how it works, what was found",
    "results": "a JSON for every run, and RESULTS.md",
    "models": "razor-tiny, razor-tiny-mtp and razor-tiny-vl",
    "tests": "against slow references, published outputs and properties",
    "archive": "what was given up, and why",
}
MEASURING = ("speed_", "study_", "tiny_", "page_")  # what no product module imports
FLOORS = {  # by folder, from the lowest floor up; a module imports from its own floor and from below
    "quant": {
        "ground": """console settings devices safetensors_file hub source_formats checkpoint families records hf_model task_text
            kl llama_cpp gguf_convert""",
        "arithmetic": """moe_quant clip_kernel moe_ptq ggml_types scalar_kernel lattice_kernel ggml_scalar ggml_lattice
            ggml_codecs ggml_round""",
        "formats": "recipe run_dir packed_format gguf_format gguf_layout",
        "passes": """mtp calibration calibration_text token_weights calibrated_pass rounders size_model plans pack_plan
            pack_reference write_checkpoint sensitivity""",
        "commands": "quant_save gguf_pack gguf_dequant packed_export moe_probe",
        "measuring": "synthetic_moe speed_quant",
        "pages": "page_sizes",
    },
    "eval": {
        "ground": "intervals task pictures sample_log",
        "grading": "graders math_answers reasoning sandbox_child code_sandbox",
        "benchmarks": "tasks_code tasks_text tasks_tiny tasks_tools tau2_runner bench8_loaders bench_mm",
        "engines": "backend eval_settings vllm_eval backend_openai llamacpp_eval8 llamacpp_logprobs",
        "evaluation": "runner",
        "commands": """vllm_eval8 mm_eval moe_eval gguf_kl text_judge panel compare_tags gate regrade fetch_gguf deploy
            check_results smoke day_one""",
        "measuring": "vllm_form vllm_tokens speed_eval speed_gguf study_spread study_text",
        "pages": "page_tables page_results page_report page_house",
    },
    "distill": {
        "ground": "opd_losses target_grid fsdp_setup moe_lora opd_data",
        "passes": "opd_student opd_trainer opd_budget",
        "commands": "opd_gen opd_score opd_train_fsdp merge_adapter distill_run",
        "measuring": "tiny_data tiny_corpus tiny_model tiny_train study_recovery speed_multi_gpu speed_families",
    },
}


def modules() -> dict[str, Path]:
    """Every module of src by its name."""
    return {file.stem: file for file in sorted((REPO / "src").glob("*/*.py"))}


def floors() -> dict[str, tuple[int, int, str]]:
    """By module: (number of its folder, number of its floor in it, name of the floor)."""
    found: dict[str, tuple[int, int, str]] = {}
    for folder_number, folder in enumerate(FLOORS.values()):
        for number, (floor, names) in enumerate(folder.items()):
            for name in names.split():
                if name in found:
                    raise UserError(f"FLOORS: {name} stands on two floors")
                found[name] = (folder_number, number, floor)
    return found


def first_line(file: Path) -> str:
    """The first line of a module's docstring, without the command that some of them end in."""
    text = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return text.split(": python src/")[0].split(": bash pipelines/")[0].rstrip(":.") + "."


def index() -> str:
    """docs/MODULES.md."""
    known, files = floors(), modules()
    if missing := sorted(files.keys() - known.keys()):
        raise UserError(f"FLOORS: {', '.join(missing)}: on no floor")
    if gone := sorted(known.keys() - files.keys()):
        raise UserError(f"FLOORS: {', '.join(gone)}: no such module")
    lines = [
        "# Modules",
        "",
        "Written by `python src/eval/page_house.py` from its table of floors and the first line of each module. Imports go",
        "down only: `src/quant` <- `src/eval` <- `src/distill`, and inside a folder from its last floor here to its first.",
        "`speed_*`, `study_*`, `tiny_*` and `page_*` measure, train toys and write pages; no product module imports them.",
        "`tests/test_house.py` holds the rules.",
        "",
    ]
    for folder, stories in FLOORS.items():
        count = sum(len(names.split()) for names in stories.values())
        lines += [f"## src/{folder}: {count} modules", "", "| floor | module | what it is |", "| --- | --- | --- |"]
        for floor, names in stories.items():
            for name in names.split():
                lines.append(f"| {floor} | [{name}](../src/{folder}/{name}.py) | {first_line(files[name])} |")
        lines.append("")
    return "\n".join(lines)


def half(text: str) -> str:
    """Half a sentence of a file: its first line without what stands in brackets, up to a break that leaves enough."""
    text = re.sub(r" \([^)]*\)?", "", text)
    breaks = [match.start() for match in re.finditer(r"[:;,.?] | (?=that |with |in |and |-> )", text)]
    return text[: max((b for b in breaks if b <= 95), default=95) if len(text) > 95 else len(text)].rstrip(".:?")


def tree() -> str:
    """The README's tree: pipelines and modules, each with half a sentence."""
    lines = ["```"]
    for folder, text in FOLDERS.items():
        lines.append(f"{folder + '/':<24}{text}")
    lines.append("pipelines/")
    for file in sorted((REPO / "pipelines").glob("*.sh")):
        first = file.read_text(encoding="utf-8").splitlines()[1].removeprefix("# ")
        lines.append(f"  {file.name:<22}{half(first.split(':  ')[0])}")
    for folder, stories in FLOORS.items():
        lines.append(f"src/{folder}/")
        for names in stories.values():
            lines += [f"  {name + '.py':<22}{half(first_line(modules()[name]))}" for name in names.split()]
    return "\n".join([*lines, "```"])


def keys() -> str:
    """The tables of keys in configs/README.md, as the commands behind the pipelines print them."""
    parts = []
    for pipeline, command in KEYS.items():
        done = subprocess.run([sys.executable, REPO / command, "--keys"], capture_output=True, text=True, check=True)
        parts.append(f"### {pipeline}: `{Path(command).name}`\n\n{done.stdout}")
    return "\n" + "\n".join(parts)


def filled(path: Path, *parts: tuple[tuple[str, str], str]) -> str:
    """A document with a text between each pair of marks."""
    page = path.read_text(encoding="utf-8")
    for marks, text in parts:
        before, _, rest = page.partition(marks[0])
        page = f"{before}{marks[0]}\n{text}\n{marks[1]}{rest.partition(marks[1])[2]}"
    return page


def families() -> str:
    """The table of docs/CHECKPOINTS.md, from the table of families and the record that tried them."""
    found = read_result(TRIED)["metrics"]["families"]
    lines = [
        "| model_type | experts on disk | clip | gptq with text | probe | adapters | llama.cpp's name | its header compared |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, family in FAMILIES.items():
        own = found.get(name) or found.get(f"{name}_text")
        experts = any(role is Role.ROUTED_EXPERT for _, role in family.layer)
        stored = "[E, I, O]" if family.transposed else "one by one or fused" if experts else "none"
        kl = [f"KL {own[method]['kl_mean']:.1e}" if own else "not tried" for method in ("clip", "gptq")]
        count = own["router"]["layers"] if own else 0
        watched = f"{count} layer{'s' * (count != 1)}" if own and experts else "-" if own else "not tried"
        trained = "train, merge" if own else "not tried"
        cells = [f"`{name}`", stored, *kl, watched, trained, family.ggml or "-", "yes" if family.carried else "no"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ggufs() -> str:
    """The table of docs/CHECKPOINTS.md on what each family becomes as a GGUF, and the reason of every step that failed."""
    lines = [
        "| model_type | traced | REFERENCE=1 | F16, Q8_0 | error feedback | llama-server | to transformers | float32 file |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    reasons = []
    for name, tried in read_result(TRIED)["metrics"]["families"].items():
        if not (own := tried.get("gguf")):
            continue
        done = {step: found for step, found in own.items() if not isinstance(found, str)}
        failed = {found: [step for step in own if own[step] == found] for found in own.values() if isinstance(found, str)}
        reasons += [f"| `{name}` | {', '.join(steps)} | {found} |" for found, steps in failed.items()]
        if differs := done.get("equal"):
            reasons.append(f"| `{name}` | bytes | {'; '.join(differs[:3])} |")
        cells = [f"`{name}`", str(sum(done["traced"].values())) if "traced" in done else "no"]
        cells.append("yes" if "reference" in done else "no")
        cells.append("equal" if done.get("equal") == [] else "no")
        if fed := done.get("ldlq"):
            cells.append(f"{fed['fed']} of {fed['fed'] + sum(fed['nearest'].values())}")
        else:
            cells.append("no")
        cells.append("yes" if "served" in done else "no")
        cells += [f"{done[step]['difference']:.4f}" if step in done else "-" for step in ("served", "exact")]
        lines.append(f"| {' | '.join(cells)} |")
    if len(lines) == 2:
        return "The record does not have it yet."
    return "\n".join([*lines, *(["", "| what failed | step | why |", "| --- | --- | --- |", *reasons] if reasons else [])])


def written() -> dict[Path, str]:
    """The documents that this module writes, with what they should hold."""
    pages = {DOCUMENT: index(), README: filled(README, (TREE_MARKS, tree())), CONFIGS: filled(CONFIGS, (KEY_MARKS, keys()))}
    return pages | {CHECKPOINTS: filled(CHECKPOINTS, (CHECKPOINT_MARKS, families()), (GGUF_MARKS, ggufs()))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="fail where one of them is another")
    args = parser.parse_args()
    made = written()
    old = [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in old:
        print(f"{path.relative_to(REPO)}: {'old; run python src/eval/page_house.py' if args.check else 'written'}", flush=True)
        if not args.check:
            with atomic_path(path) as temporary:
                temporary.write_text(made[path], encoding="utf-8")
    return int(args.check and bool(old))


if __name__ == "__main__":
    run_cli(main)
