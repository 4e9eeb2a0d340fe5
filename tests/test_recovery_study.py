"""The study's plan, and blocks that go into a GGUF as they were trained."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint import Checkpoint
from console import UserError
from ggml_codecs import decode_rows
from gguf_format import GgufFile
from gguf_layout import pieces_of, read_parameter, to_gguf
from gguf_pack import write_pack
from merge_adapter import GGML_FILE
from pack_plan import Blocks, plan_pack
from page_tables import learned, recovery_cells
from settings import parse_settings
from study_recovery import STUDY, StudySettings, recipes, run_part, stages


def study_of(changes):
    study, _ = parse_settings(StudySettings, "", argv=["--config", str(STUDY)])
    return dataclasses.replace(study, **{name.lower(): value for name, value in changes.items()})


def test_a_block_type_is_trained_and_packed_byte_for_byte(random_tiny, tmp_path):
    small = {
        "TEACHER": random_tiny,
        "WORK": tmp_path / "w",
        "RESULTS": tmp_path / "r",
        "STEPS": 1,
        "ROWS": 2,
        "LIMIT": 1,
        "FREE": 1,
        "LONG_FREE": 1,
    }
    small |= {"MAX_TOKENS": 8, "CHUNK": 4, "RANK": 4, "KL_ITEMS": 1, "EVAL_LIMIT": 0, "WARMUP": 0, "FINE_LR": 0.5}
    small |= {"FINISHED_ONLY": False, "SCORE_BATCH": 4}  # an untrained teacher ends nothing
    study = study_of(small)
    for part in ("students", "cache", "iq2_xs"):
        run_part(study, part)
    work = tmp_path / "w/recovery_iq2_xs"
    before, after = (load_file(work / name / GGML_FILE) for name in ("before", "recovered"))
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    made = Checkpoint(work / "recovered")
    pack, _ = plan_pack(made, "bf16", [], "nearest", blocks=Blocks(work / "recovered" / GGML_FILE))
    write_pack(pack, tmp_path / "gguf")
    file = GgufFile(tmp_path / "gguf" / pack.file_name)
    experts = 0
    for piece in pieces_of(made):
        held = decode_rows(file.data(piece.name), file.kind(piece.name)).view(piece.shape)
        value = to_gguf(piece, read_parameter(made, piece))
        assert torch.equal(held.to(value.dtype), value), piece.name  # the file holds what was evaluated
        if piece.parameter in after:
            packed = after[piece.parameter]
            own = packed if piece.span is None else packed[:, slice(*piece.span)]
            assert file.kind(piece.name) == "iq2_xs" and torch.equal(file.data(piece.name).view(own.shape), own), piece.name
            experts += 1
    assert experts == 3 * 4
    record = json.loads((tmp_path / "r/distill/recovery_iq2_xs.json").read_text())
    assert record["metrics"]["kl_before"]["mean"] > 0 and record["metrics"]["changed_weights"] > 0
    result = tmp_path / "r/distill/recovery_iq2_xs.json"
    result.unlink()
    run_part(study, "iq2_xs")  # nothing but the record
    assert json.loads(result.read_text())["metrics"] == record["metrics"]
    result.unlink()
    for name, change, said in (
        (
            "recovered/recipe.json",
            lambda old: old.replace(b'"adapter_sha256": "', b'"adapter_sha256": "0'),
            "not made of .*adapter",
        ),
        (
            "recovered/model.safetensors",
            lambda old: old[:-1] + bytes([old[-1] ^ 1]),
            "is not what was measured: model.saf.* differs",
        ),
        (
            "adapter/adapter.json",
            lambda old: old.replace(b'"scores_sha256": "', b'"scores_sha256": "0'),
            "not made of .*scores",
        ),
        ("adapter/adapter.json", lambda old: b"{}", "adapter.json: has no"),
    ):
        old = (work / name).read_bytes()
        (work / name).write_bytes(change(old))
        with pytest.raises(UserError, match=said):
            run_part(study, "iq2_xs")
        (work / name).write_bytes(old)
        assert not result.exists()
    with pytest.raises(UserError, match="rest goes to nearest"):
        plan_pack(made, "bf16", [], "ldlq", blocks=Blocks(work / "recovered" / GGML_FILE))
    name = next(iter(after))
    save_file({name: after[name][:, :8].contiguous()}, tmp_path / "bad.safetensors", {"type": "iq2_xs"})
    with pytest.raises(UserError, match="does not fit the checkpoint"):
        plan_pack(made, "bf16", [], "nearest", blocks=Blocks(tmp_path / "bad.safetensors"))


def test_every_part_of_the_study_has_the_same_steps():
    study = study_of({})
    parts = stages(study)
    tags = [stage.tag for part in parts.values() for stage in part]
    assert len(set(tags)) == len(tags)
    for name, part in parts.items():
        steps = [stage.changes.get("steps", study.steps) for stage in part]
        assert name == "long" or sum(steps) == study.steps or name in recipes(study), name
        if name in recipes(study):  # all cells go on by as many steps from one warm start
            assert set(steps) == {study.recipe_steps} and len(part) == 6
            assert {stage.changes["init"] for stage in part[1:]} == {study.work / part[0].tag / "adapter"}
    assert len(recipes(study)) == 3 * study.seeds


def test_the_cells_of_the_study_stand_by_seed():
    def record(part, seed, **settings):
        metrics = {"kl_answer_after": seed / 100, "kl_after": {"mean": seed / 10}}
        own = {"seed": seed, "teacher_loss": "forward_kl", "student_loss": "reverse_kl"} | settings
        return f"distill/{part}_{seed}.json", {
            "tag": f"recovery_recipe_lora_{seed}_{part}",
            "settings": own,
            "metrics": metrics,
        }

    found = [record("mixture", seed, trajectories="mixture") for seed in (2, 0)]
    found += [record("warm", 0, trajectories="teacher"), ("distill/other.json", {"tag": "recovery_int2_policy"})]
    section = recovery_cells(found)
    assert section.head[2:] == ["in answers, `0`", "in answers, `2`", "all, `0`", "all, `2`"]
    warm, mixture = sorted(section.rows, key=lambda row: row[1].text, reverse=True)
    assert [cell.text for cell in mixture] == [
        "lora",
        "forward_kl, teacher; reverse_kl, student",
        "0.00000",
        "0.02000",
        "0.00000",
        "0.20000",
    ]
    assert [cell.text for cell in warm] == ["lora", "warm start: forward_kl, teacher", "0.00000", "", "0.00000", ""]
    assert mixture[5].source == "distill/mixture_2.json#metrics.kl_after.mean" and recovery_cells(found[-1:]) is None
    old = {"settings": {"loss": "cross_entropy", "trajectories": "teacher"}}
    assert learned(old) == "cross_entropy, teacher"
