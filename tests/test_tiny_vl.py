"""razor-tiny-vl: the fast forward is transformers' function, pictures are patched as the processor does it, splits part."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from console import UserError
from pictures import load_processor
from settings import parse_settings
from task_text import split_of
from tasks_tiny import TINY_VISION_TASKS
from tiny_data import build_vl_tokenizer, completion_text, encode_scenes, vl_prompt, vl_texts
from tiny_model import patches_of, save_processor, vision_forward, vision_tables, vl_forward
from tiny_train import TrainSettings, VlRun, token_loss, train

CONFIG = Path(__file__).resolve().parent.parent / "configs/make_tiny_vl.env"
CPU = torch.device("cpu")


def small_config(**changes):
    config, _ = parse_settings(TrainSettings, "", argv=["--config", str(CONFIG)])
    return dataclasses.replace(config, **({"rows": 6, "layers": 2, "vision_layers": 1, "max_seconds": 0} | changes))


@pytest.fixture(scope="module")
def tokenizer():
    return build_vl_tokenizer(vl_texts(300))


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    """(run, directory): an untrained checkpoint with its processor."""
    path = tmp_path_factory.mktemp("vl")
    run = VlRun(small_config(), tokenizer, path / "work", CPU)
    run.model.save_pretrained(path / "model")
    save_processor(tokenizer, path / "model")
    return run, path / "model"


def test_training_forward_equals_transformers_through_the_processor(saved, tokenizer):
    run, path = saved
    processor = load_processor(path)
    model, info = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rng = random.Random(0)
    scenes = [task().scene_of(rng, "test") for task in TINY_VISION_TASKS]
    ids, _, pixels = encode_scenes(tokenizer, scenes, 80, 0.0)
    patches = patches_of(pixels)
    for scene, row, own in zip(scenes, ids, patches, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": scene.question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert text.replace("<|image_pad|>", "<|image_pad|>" * 16) == vl_prompt(scene.question, 16)
        whole = text + completion_text(scene.solution).removesuffix("\n")
        batch = processor(text=[whole], images=[[scene.image]], return_tensors="pt")
        length = batch["input_ids"].shape[1]
        assert batch["input_ids"][0].tolist() == row[:length].tolist()
        assert torch.allclose(batch["pixel_values"], own, atol=1e-6)
        with torch.no_grad():
            expected = model(**batch).logits[0]
            hidden, _, load = vl_forward(run.model, row[None], own[None], torch.float32)
        torch.testing.assert_close(run.model.lm_head(hidden)[0, :length], expected, atol=2e-4, rtol=1e-3)
        assert load.shape == (2, 8)


@pytest.mark.parametrize("task", TINY_VISION_TASKS)
def test_splits_part_and_the_references_are_graded_right(task):
    instance, rng = task(), random.Random(3)
    pairs = instance.load_with_solutions(40)
    again = instance.load_with_solutions(40)
    assert [item.meta["picture"].data for item, _ in pairs] == [item.meta["picture"].data for item, _ in again]
    trained = {instance.scene_of(rng, "train").key for _ in range(400)}
    assert all(split_of(f"{task.name}:{key}") == "train" for key in trained)
    tested, rng = set(), random.Random(f"{task.name}:{task.revision}:test")
    while len(tested) < 40:
        tested.add(instance.scene_of(rng, "test").key)
    assert not trained & tested
    for item, solution in pairs:
        answer = solution.rpartition("</think>")[2].strip()
        assert instance.grade(item, instance.extract(item, answer))
        wrong = answer.replace(item.gold, "B" if item.gold == "A" else "A" if item.gold in "ABCD" else item.gold + "1")
        assert not instance.grade(item, instance.extract(item, wrong))


def test_pictures_show_what_the_gold_says():
    """Read the drawings back by their pixels: bars by their coloured columns, shapes by occupied cells."""
    rng = random.Random(5)
    for _ in range(20):
        scene = TINY_VISION_TASKS[2]().scene(rng)
        pixels = torch.from_numpy(patches_pixels(scene.image))
        heights = [(pixels[:, 16 * i : 16 * i + 16].amin(-1) < 200).any(1).sum().item() for i in range(4)]
        order = max if "tallest" in scene.question else min
        assert "ABCD"[heights.index(order(heights))] == scene.gold
        scene = TINY_VISION_TASKS[0]().scene(rng)
        cells = scene.key.split(":")[0].split("|")
        pixels = torch.from_numpy(patches_pixels(scene.image))
        shown = [(pixels[16 * (i // 4) :, 16 * (i % 4) :][:16, :16].amin(-1) < 200).any().item() for i in range(16)]
        assert shown == [cell != "-" for cell in cells]


def patches_pixels(image):
    return np.array(image, dtype="int16")


def test_what_a_gpu_compiles_is_one_graph(saved, tokenizer):
    """The tower without a break, and to the same values: a graph break would cost the training run its minutes."""
    visual = saved[0].model.model.visual
    patches = torch.rand(2, 64, 384, generator=torch.Generator().manual_seed(0)) * 2 - 1
    tables = vision_tables(visual, 64, CPU)
    compiled = torch.compile(vision_forward, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(
        compiled(visual, patches, tables, torch.float32), vision_forward(visual, patches, tables, torch.float32)
    )


def test_training_resumes_to_the_same_weights_and_the_loss_falls(tokenizer, tmp_path):
    """One batch again and again: the loss falls by half. A run stopped and resumed equals one that went through."""
    config = small_config(steps=20, warmup=2, rows=3, vision_layers=1)
    whole = VlRun(config, tokenizer, tmp_path / "a", CPU)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    train(whole, 0, 100, stop=4)
    train(VlRun(config, tokenizer, tmp_path / "b", CPU), 0, 2, stop=2)
    resumed = VlRun(config, tokenizer, tmp_path / "b", CPU)
    assert resumed.step == 2
    with pytest.raises(UserError, match="made with other settings"):
        VlRun(dataclasses.replace(config, seed=2), tokenizer, tmp_path / "b", CPU)
    assert VlRun(dataclasses.replace(config, steps=30), tokenizer, tmp_path / "b", CPU).step == 2  # extended
    train(resumed, 0, 2, stop=4)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    ids, weights, pixels = whole.batches()[0]
    patches, losses = patches_of(pixels), []
    for _ in range(15):
        hidden, _, _ = vl_forward(whole.model, ids[:, :-1], patches, torch.float32)
        loss = token_loss(whole.model, hidden, ids[:, 1:], weights[:, 1:])
        loss.backward()
        whole.optimizer.step()
        whole.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    whole.export(tmp_path / "out")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "out").iterdir()
    }


def test_the_clock_ends_a_run_with_a_decayed_rate():
    config = small_config(steps=1000, max_seconds=100, warmup=1, decay_from=0.5, learning_rate=1.0)
    assert config.rate(100, 1.0) == 1.0
    assert config.progress(100, 100.0) >= 1
    assert config.rate(100, 99.999) == pytest.approx(0.02, rel=0.01)
    assert config.rate(750, 1.0) == pytest.approx(0.51, rel=0.01)
