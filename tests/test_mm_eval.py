"""Multimodal benchmarks and harness: images keep their place, rows of the published shapes, a real run that resumes."""

import base64
import json

import pytest
import torch
from conftest import REPO, untrained_vl
from PIL import Image

from backend import HfMmBackend, Sampling
from bench_mm import MathVision, MedXpert, Mmmu, same_phrase, short_answer
from console import UserError
from pictures import Picture, Prompt, image_part, interleave, load_processor, render_messages, text_part, unmatched
from runner import get_benchmarks


def picture(colour, size=(40, 48)):
    return Picture.of_image(Image.new("RGB", size, colour))


def column(colour, size=(40, 48)):
    return base64.b64encode(picture(colour, size).data).decode()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An untrained vision-language checkpoint."""
    return untrained_vl(tmp_path_factory.mktemp("mm") / "model", 200, 2)


def test_markers_are_replaced_in_the_order_of_the_text():
    red, blue, green = picture("red"), picture("blue"), picture("green")
    parts = interleave("is <image 2> like <image1>? (A) <image 2>", {1: red, 2: blue, 3: green})
    expected = [image_part(green), text_part("is "), image_part(blue), text_part(" like "), image_part(red)]
    assert parts == [*expected, text_part("? (A) "), image_part(blue)]
    assert unmatched("is <image 2>", {1: red}) and not unmatched("is <image 1>", {1: red})
    assert interleave("see <image 4>", {}) == [text_part("see <image 4>")]


def test_an_image_is_whole_transparent_on_white_and_identified(tmp_path):
    layers = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    assert Picture.of_image(layers).open().getpixel((0, 0)) == (255, 255, 255)
    assert picture("red", (1999, 31)).open().size == (1999, 31)
    (tmp_path / "a.png").write_bytes(picture("red").data)
    for value in ("a.png", column("red"), "data:image/png;base64," + column("red"), {"bytes": picture("red").data}):
        assert Picture.of_column(value, "row", tmp_path) == picture("red")
    for value in ("b.png", None, 7, base64.b64encode(b"not an image at all").decode()):
        with pytest.raises(UserError, match="row"):
            Picture.of_column(value, "row", tmp_path)
    one, other = Prompt("same", [picture("red")]), Prompt("same", [picture("blue")])
    assert one != other and one.text == other.text == "same"


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_rows_of_the_published_columns_become_prompts(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "MM-1-a.jpeg").write_bytes(picture("red").data)
    base = {"id": "v_1", "answer": "B", "image_1": column("red"), "image_2": None}
    options, choice = "['<image 2>', 'two']", {"question_type": "multiple-choice"}
    write_rows(tmp_path / "mmmu.jsonl", [
        base | {"question": "<image 1> What?", "options": options, "image_2": column("blue")} | choice,
        base | {"id": "v_2", "question": "How much in <image 1>?", "options": "[]", "answer": "['8.0', 'eight']"}
        | {"question_type": "open"},
    ])  # fmt: skip
    write_rows(tmp_path / "mmmu_pro_standard.jsonl", [base | {"question": "So <image 1>?", "options": "['x', 'y', 'z']"}])
    vision = {"id": "p", "options": "['x', 'y']", "answer": "B", "image": column("red")}
    write_rows(tmp_path / "mmmu_pro_vision.jsonl", [vision])
    maths = {"image": "images/MM-1-a.jpeg", "level": 1, "subject": "s", "question": "Look <image1>."}
    write_rows(tmp_path / "mathvision.jsonl", [
        maths | {"id": "1", "options": list("ABCDE"), "answer": "D"},
        maths | {"id": "2", "options": ["1", "2", "3", "4", "5"], "answer": "C"},
        maths | {"id": "3", "options": [], "answer": "\\frac{1}{2}"},
    ])  # fmt: skip
    medical = {"id": "MM-1", "question": "Which? Answer Choices: (A) a (B) b", "options": {"A": "a", "B": "b", "F": None}}
    write_rows(tmp_path / "medxpert.jsonl", [medical | {"label": "A", "images": ["MM-1-a.jpeg"]}])
    loaded = {b.name: (b, b.load()) for b in get_benchmarks(["mmmu", "mmmu_pro", "mathvision", "medxpert"], tmp_path, True)}
    bench, (choice, open_item) = loaded["mmmu"]
    kinds = [part["type"] for part in choice.meta["parts"]]
    assert kinds == ["image", "text", "image", "text"] and "Answer with the option's letter" in choice.question
    assert bench.grade(choice, bench.extract(choice, "B")) and not bench.grade(choice, bench.extract(choice, "A"))
    assert bench.grade(open_item, bench.extract(open_item, "The answer is 8.")) and not bench.grade(open_item, "9")
    bench, (item,) = loaded["mmmu_pro_standard"]
    assert [part["type"] for part in item.meta["parts"]] == ["text", "image", "text"]
    assert "A. x\nB. y\nC. z\nAnswer the preceding multiple choice question." in item.question
    assert bench.extract(item, "It is not C.\nAnswer: B") == "B"
    bench, (item,) = loaded["mmmu_pro_vision"]
    assert [part["type"] for part in item.meta["parts"]] == ["text", "image"]
    bench, items = loaded["mathvision"]
    assert "(A)" not in items[0].question and "(C) 3\n" in items[1].question
    assert bench.grade(items[0], bench.extract(items[0], "so \\boxed{D}"))
    assert not bench.grade(items[1], bench.extract(items[1], "so \\boxed{D}"))
    bench, (item,) = loaded["medxpert"]
    system, user = bench.messages(item)
    assert system["role"] == "system" and [part["type"] for part in user["content"]] == ["image", "text"]
    assert item.meta["letters"] == "AB"


def test_free_form_answers_go_to_the_judge_of_mathematics(tmp_path):
    row = {"id": "3", "options": [], "answer": "0.5", "question": "<image1>", "image": column("red")}
    item = MathVision(tmp_path).item(row, 0, None)
    valued = MathVision(tmp_path).item(row | {"options": ["1", "2", "3", "4", "5"], "answer": "C"}, 0, None)
    answers = ["\\frac12", "0.6", None]
    assert MathVision(tmp_path).grade_all([item, item, item, valued, valued], [*answers, "3", "4"]) == [
        True, False, False, True, False,
    ]  # fmt: skip


def test_open_answers():
    assert short_answer("First.\nThe answer is **12.5 m**") == "12.5 m" and short_answer("") is None
    assert short_answer("I think\n\\boxed{7}") == "7"
    assert same_phrase("1,200", "1200.0") and same_phrase("$8.00", "8") and not same_phrase("8.02", "8")
    assert same_phrase("The Louvre.", "the louvre") and not same_phrase("Louvre", "Prado")


@pytest.mark.parametrize(
    "rows,message",
    [
        ([{"id": "1"}], "row 1 lacks question, options"),
        ([{"id": "1", "options": "[", "question_type": "open", "question": "", "answer": ""}], "not a list"),
        ([], "no rows"),
    ],
)
def test_bad_rows_are_one_line(tmp_path, rows, message):
    write_rows(tmp_path / "mmmu.jsonl", rows)
    with pytest.raises(UserError, match=message.replace("[", "\\[")):
        Mmmu(tmp_path).load()
    with pytest.raises(UserError, match="has no medxpert.jsonl"):
        MedXpert(tmp_path).load()


def test_batches_answer_as_single_prompts_do(model):
    """Pictures of different sizes and numbers in one padded batch, against each prompt alone."""
    content = [
        [text_part("a "), image_part(picture("red", (64, 64))), text_part(" b")],
        [image_part(picture("blue", (100, 37))), text_part("How many?"), image_part(picture("green", (33, 33)))],
    ]
    together, alone = HfMmBackend(model, batch=2), HfMmBackend(model, batch=1)
    prompts = [together.render([{"role": "user", "content": parts}]) for parts in content]
    assert prompts[1].text.index("<|image_pad|>") < prompts[1].text.index("How many?") < prompts[1].text.rindex("<|image_pad|>")
    sampling = Sampling(max_tokens=6)
    both = dict(together.generate(prompts, sampling))
    assert both == dict(alone.generate(prompts, sampling))
    expected = alone.processor(text=[prompts[0].text], images=[[picture("red", (64, 64)).open()]])["input_ids"][0]
    assert both[0].prompt_tokens == len(expected) and both[0].tokens == 6 and both[0].finish_reason == "length"
    picked = dict(alone.generate([prompts[0], Prompt(prompts[0].text, [picture("black", (64, 64))])], sampling))
    with torch.inference_mode():
        inputs = [alone.processor(text=[prompts[0].text], images=[[p.open()]], return_tensors="pt") for p in
                  (picture("red", (64, 64)), picture("black", (64, 64)))]  # fmt: skip
        red, black = (alone.model(**i).logits[0, -1] for i in inputs)
    assert picked and not torch.equal(red, black)  # the picture reaches the logits


def test_nothing_is_scaled_between_the_processors_limits(model):
    processor = load_processor(model)
    prompt = render_messages(processor, [{"role": "user", "content": [image_part(picture("red", (96, 112)))]}])
    inputs = processor(text=[prompt.text], images=[[prompt.pictures[0].open()]], return_tensors="pt")
    assert inputs["image_grid_thw"].tolist() == [[1, 112 // 8, 96 // 8]]
    assert not hasattr(processor, "video_processor")


def test_the_command_logs_resumes_and_records(model, tmp_path, command):
    arguments = ["--model", model, "--tag", "t", "--benchmarks", "tiny_count,tiny_bars", "--limit", 2, "--out", tmp_path]
    done = command("src/eval/mm_eval.py", *arguments, "--backend", "hf")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "t.json").read_text())
    assert record["metrics"]["tiny_bars"]["n"] == 2 and record["pixels"]["size"]["longest_edge"] == 128 * 128
    log = tmp_path / "t.samples.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert len(lines) == 5 and len({json.loads(line)["prompt_sha256"] for line in lines[1:]}) == 4
    log.write_text("".join(lines[:3]) + lines[3][:20])
    (tmp_path / "t.json").unlink()
    again = command("src/eval/mm_eval.py", *arguments, "--backend", "hf")
    assert again.returncode == 0, again.stderr
    assert sorted(log.read_text().splitlines(keepends=True)) == sorted(lines)
    assert json.loads((tmp_path / "t.json").read_text())["metrics"] == record["metrics"]


def test_a_dry_run_stops_after_the_plan(model, tmp_path, command):
    run = ["src/eval/mm_eval.py", "--model", model, "--tag", "t", "--limit", 2, "--out", tmp_path / "eval", "--dry-run"]
    done = command(*run)
    assert done.returncode == 0 and "tiny_bars              2" in done.stdout, (done.stdout, done.stderr)
    assert done.stdout.endswith("dry run: nothing was written\n") and not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"--benchmarks": "mmlu"}, "unknown benchmark 'mmlu'; known: mmmu, mmmu_pro_standard"),
        ({"--benchmarks": "mmmu", "--data-dir": "."}, "has no mmmu.jsonl"),
        ({"--model": "text"}, "config.json has no vision_config"),
        ({"--batch": 0}, "--batch 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(model, random_tiny, tmp_path, command, changes, message):
    flags = {"--model": model, "--tag": "t", "--out": tmp_path, "--backend": "hf"} | changes
    flags["--model"] = random_tiny if flags["--model"] == "text" else flags["--model"]
    done = command("src/eval/mm_eval.py", *(x for pair in flags.items() for x in pair), cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())


RAZOR = REPO / "models/razor-tiny-vl"


def test_the_committed_model_sees_and_its_quantized_copy_too(tmp_path, command):
    """Quantized, evaluated and compared by the commands, from the committed weights; a blank picture is not answered right."""
    from moe_eval import held_out, inputs_of

    done = command("src/quant/quant_save.py", "--model", RAZOR, "--out", tmp_path / "q", "--expert-bits", 3, "--linear-bits", 4)
    assert done.returncode == 0, done.stderr
    for tag, path in (("full", RAZOR), ("q", tmp_path / "q")):
        done = command(
            "src/eval/mm_eval.py", "--model", path, "--tag", tag, "--limit", 8, "--backend", "hf", "--out", tmp_path / "eval"
        )
        assert done.returncode == 0, done.stderr
        record = json.loads((tmp_path / "eval" / f"{tag}.json").read_text())
        assert record["model"]["family"] == "RAZOR_TINY_VL" and all(m["acc"] == 1 for m in record["metrics"].values())
    done = command("src/eval/compare_tags.py", "full", "q", "--results", tmp_path)
    assert done.returncode == 0 and done.stdout.count("no difference shown") == 3, done.stderr
    backend = HfMmBackend(RAZOR, batch=8)
    task = get_benchmarks(["tiny_digits"], pictures=True)[0]
    items = task.load(8)
    blank = [Prompt(backend.render(task.messages(item)).text, [picture("white", (64, 64))]) for item in items]
    answers = dict(backend.generate(blank, Sampling(max_tokens=64)))
    assert not any(f"boxed{{{item.gold}}}" in answers[i].text for i, item in enumerate(items))
    backend.tokenizer.padding_side = "right"
    pairs, _ = held_out(backend.processor, 1)
    inputs, answer = inputs_of(backend.processor, pairs)
    for ids, own, (_, turn) in zip(inputs["input_ids"], answer, pairs, strict=True):
        assert backend.tokenizer.decode(ids[own]) == turn


def test_logs_of_pictures_are_regraded_and_shown(tmp_path, monkeypatch):
    """The committed evaluation, packed, graded anew: pictures are drawn again from the seed, and no verdict changes."""
    import shutil

    from eval_settings import load_settings
    from page_report import page
    from regrade import regrade
    from sample_log import read_samples

    (tmp_path / "eval").mkdir()
    for name in ("razor_tiny_vl_int3_int4.json", "razor_tiny_vl_int3_int4.samples.jsonl.gz"):
        shutil.copy(REPO / "results/eval" / name, tmp_path / "eval" / name)
    before = json.loads((tmp_path / "eval/razor_tiny_vl_int3_int4.json").read_text())
    packed = (tmp_path / "eval/razor_tiny_vl_int3_int4.samples.jsonl.gz").read_bytes()
    version = read_samples(tmp_path / "eval/razor_tiny_vl_int3_int4.samples.jsonl.gz")[1][0]["grader"]
    monkeypatch.setattr("regrade.GRADER_VERSION", version)  # every row, and so every byte, names it
    record, changed = regrade(tmp_path / "eval", "razor_tiny_vl_int3_int4", None, None)
    assert changed == 0 and record["metrics"] == before["metrics"] and record["data"] == before["data"]
    assert record["pixels"] == before["pixels"] and (tmp_path / "eval" / before["samples"]).with_suffix(".jsonl.gz").exists()
    assert (tmp_path / "eval/razor_tiny_vl_int3_int4.samples.jsonl.gz").read_bytes() == packed
    shown = json.loads(page(tmp_path, load_settings()).split('id="data">')[1].split("</script>")[0])
    assert len(shown) == 120 and all(entry["question"] and len(entry["pictures"]) == 1 for entry in shown)
    image = Picture(base64.b64decode(shown[0]["pictures"][0].partition(",")[2]))
    assert image.open().size == (64, 64)
