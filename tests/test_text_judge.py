"""The judge of models that read real text: its statistics against slow ones, its items against what they promise."""

import gzip
import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import REPO

from intervals import bounds, resampled, weighted_means, weighted_quantiles
from study_text import FIRST, all_rows, calibration_texts
from tasks_text import Item, closing_lines, continuations, facts
from text_judge import Judged, answers, corpus_windows, pair

WORDS = [f"word{i}" for i in range(300)]


def encode(text):
    """A token for each character."""
    return [ord(c) % 997 + 1 for c in text]


def row(stratum, number, path="a/b.md", text=None):
    rng = random.Random(f"{stratum}{number}")
    return {"package": f"p{number}", "path": path, "stratum": stratum, "text": text or " ".join(rng.choices(WORDS, k=400))}


def code(number):
    rng = random.Random(number)
    lines = []
    for name in rng.sample(WORDS, 24):
        lines += [
            f"def {name}(a):",
            f"    if a > {rng.randrange(99)}:",
            f"        return {rng.choice(WORDS)}",
            f"    print({name})",
        ]
    return row("code", number, "x-1/m.py", "\n".join(lines))


@pytest.fixture(scope="module")
def documents():
    return {"code": [code(i) for i in range(20)], "prose": [row("prose", i) for i in range(20)]}


def test_items_are_the_same_each_time_and_have_four_distinct_choices(documents):
    for make in (
        lambda seed: continuations(documents, encode, 30, seed),
        lambda seed: closing_lines(documents["code"], encode, 30, seed),
    ):
        items = make(1)
        assert items == make(1) != make(2) and len(items) == 30
        assert {item.answer for item in items} == {0, 1, 2, 3}
        assert all(len({tuple(choice) for choice in item.choices}) == 4 for item in items)


def test_the_true_choice_stands_behind_its_prompt(documents):
    texts = [encode(row["text"]) for rows in documents.values() for row in rows]

    def stands(ids, text):
        return any(text[i : i + len(ids)] == ids for i in range(len(text)))

    for item in continuations(documents, encode, 10) + closing_lines(documents["code"], encode, 10):
        behind = [any(stands(item.prompt + choice, text) for text in texts) for choice in item.choices]
        assert behind == [place == item.answer for place in range(4)]


def test_facts_are_what_training_text_states():
    imports = "".join(f"from pack.part{i % 7}.inner{i} import Thing{i}Maker\n" * 3 for i in range(8))
    twice = "from pack.one import Everywhere\nfrom pack.two import Everywhere\n" * 3
    told = "from pack.a.gadget import MyGadget\n" * 4
    manual = "\n\n".join(f"--option{c}\nDoes the thing that is called {c * 8} here." for c in "abcdef")
    rows = [row("code", 0, "p/x.py", imports + twice + told), row("manual pages", 1, "man1/tool.1", manual)]
    found = facts(rows, 12)
    assert found == facts(rows, 12) and {fact.kind for fact in found} == {"module", "option"}
    for fact in found:
        true = fact.choices[fact.answer]
        assert len(set(fact.choices)) == 4
        name = fact.question.split()[3 if fact.kind == "module" else 4].strip(".")
        assert (f"from {true} import {name}\n" in imports) if fact.kind == "module" else (f"{name}\n{true}" in manual)


def test_windows_hold_an_equal_share_of_every_stratum(documents):
    text = corpus_windows(documents, encode, 0, [5, 6], 64, 500)
    assert len(text.owner) >= 500 and text.ids.shape[1] == 64 and (text.ids[:, :2] == torch.tensor([5, 6])).all()
    counts = np.bincount(text.owner)
    shares = {name: sum(n for n, own in zip(counts, text.strata) if own == name) for name in documents}
    assert len(set(shares.values())) == 1 and counts.max() <= 33 and len(text.targets) == len(text.owner)


def test_statistics_equal_slow_ones():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(12), 25)
    strata = [0] * 6 + [1] * 6
    values = rng.exponential(1 + owner % 3)
    weights = resampled(strata, 200)
    assert (weights[:, :6].sum(1) == 6).all() and (weights[:, 6:].sum(1) == 6).all()
    means = weighted_means(weights, np.bincount(owner, values), np.bincount(owner))
    tails = weighted_quantiles(weights, owner, values, (0.5, 0.99))
    for draw in (0, 7):
        drawn = np.concatenate([np.tile(values[owner == d], int(weights[draw, d])) for d in range(12)])
        assert means[draw] == pytest.approx(drawn.mean())
        assert tails[draw] == pytest.approx(np.quantile(drawn, (0.5, 0.99), method="inverted_cdf"))
    # documents of one level each: the error is that of 12 means, several times what single positions would say
    value, low, high = bounds(means)
    assert low < value < high and value == pytest.approx(values.mean())


def test_a_pair_is_compared_in_the_same_samples():
    rng = np.random.default_rng(1)
    sums = rng.exponential(1, 40) + 0.1
    text = {"strata": [0] * 40, "positions": [10] * 40}
    base = {"kl_sums": sums, "tasks": {"t": {"right": "1100" * 50}}}
    other = {"kl_sums": sums / 2, "tasks": {"t": {"right": "1000" * 50}}}
    found = pair(text, base, other)
    assert [found["kl"][key] for key in ("ratio", "ratio_low", "ratio_high")] == pytest.approx([0.5] * 3)
    assert found["tasks"]["t"]["difference"] == -0.25 and (found["tasks"]["t"]["lost"], found["tasks"]["t"]["won"]) == (50, 0)


def test_a_shared_prompt_gives_what_whole_texts_give(random_tiny):
    """Prompts read once, then four choices behind each, by linear and by full attention."""
    model = Judged(random_tiny, 300)
    rng = random.Random(0)
    tokens = lambda n: [rng.randrange(5, 400) for _ in range(n)]  # noqa: E731
    items = [Item(tokens(9 + i % 2), tuple(tokens(1 + (i + j) % 5) for j in range(4)), i % 4) for i in range(12)]
    sums, counts = model.choices(items)
    for item, own in zip(items, sums):
        for choice, found in zip(item.choices, own):
            ids = torch.tensor([item.prompt + choice])
            with torch.inference_mode():
                likely = model.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
            slow = sum(float(likely[len(item.prompt) + j - 1, token]) for j, token in enumerate(choice))
            assert found == pytest.approx(slow, abs=2e-3)
    made = answers(items, sums, counts)
    right = [int(np.argmax(own / n) == item.answer) for item, own, n in zip(items, sums, counts)]
    assert made["right"] == "".join(map(str, right)) and made["items"] == 12


def test_the_judge_of_a_corpus(random_tiny, tmp_path, documents, command):
    """A model against itself and one with another head: KL as written down, and a record with its positions."""
    from safetensors.torch import load_file, save_file

    for name, rows in (("heldout", [row for own in documents.values() for row in own]), ("train", documents["code"])):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps(each) + "\n" for each in rows)
    other = shutil.copytree(random_tiny, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    fixed = [
        "--reference",
        str(random_tiny),
        "--model",
        str(random_tiny),
        "--model",
        str(other),
        "--result",
        "r.json",
        "--tag",
        "t",
    ]
    sizes = ["--positions", "300", "--items", "8", "--window", "64"]
    done = command("src/eval/text_judge.py", "--text", str(tmp_path), *fixed, *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "r.json").read_text())["metrics"]
    same, changed = (model["strata"]["all"] for model in metrics["models"])
    assert same["mean"] < 1e-6 and same["top1"] == 1 and same["ppl_ratio"] == pytest.approx(1) and changed["mean"] > 1e-4
    assert changed["positions"] == sum(metrics["text"]["positions"]) and changed["documents"] == len(metrics["text"]["strata"])
    assert metrics["models"][1]["tasks"]["continuation"]["items"] == 8 and "recall" not in metrics["models"][1]["tasks"]
    assert metrics["pairs"][0]["kl"]["difference"] == pytest.approx(changed["mean"] - same["mean"], rel=1e-4)


@pytest.mark.parametrize(("window", "scored"), [(32, "half"), (64, "all"), (0, None)])
def test_a_text_file_has_the_perplexity_that_moe_eval_finds(random_tiny, tmp_path, command, window, scored):
    (tmp_path / "text").write_text("\n\n".join(row("prose", i)["text"] for i in range(2)))
    how = ["--text", "text", "--window", window, *(["--scored", scored] if scored else []), "--tag", "t"]
    for done in (
        command("src/eval/text_judge.py", "--reference", random_tiny, *how, "--result", "r.json", cwd=tmp_path),
        command("src/eval/moe_eval.py", "--model", random_tiny, *how, "--out", ".", cwd=tmp_path),
    ):
        assert done.returncode == 0, done.stderr
    judged, evaluated = (json.loads((tmp_path / name).read_text())["metrics"] for name in ("r.json", "t.json"))
    own = judged["reference"]["strata"]["all"]
    assert own["positions"] == evaluated["tokens"] and own["ppl"] == pytest.approx(evaluated["ppl"], rel=1e-4)


def test_rows_of_the_study_and_its_calibration_texts(documents):
    rows = all_rows(3)
    assert len({row.name for row in rows}) == len(rows) and rows[0].name == "int3_clip"
    order = [row.method in FIRST for row in rows]
    assert order == sorted(order, reverse=True)
    texts = calibration_texts(documents, 3, 4000)
    parts = [set(text.split("\n\n")) for text in texts]
    assert all(len(text) >= 4000 for text in texts) and not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_a_study_keeps_a_tied_embedding_in_some_rows(tmp_path, documents, command):
    """A dense model has one number of bits throughout; `_kept` differs from it in the bytes of the embedding alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = REPO / "models/razor-tiny/tokenizer.json"
    words, width = 1 + max(json.loads(tokenizer.read_text())["model"]["vocab"].values()), 64
    words += 64  # special tokens
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REPO / "models/razor-tiny" / name, tmp_path / "small")
    with gzip.open(tmp_path / "heldout.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(each) + "\n" for own in documents.values() for each in own)
    sizes = ["--positions", 300, "--items", 0, "--texts", 1, "--group", 32, "--rows", "int3*_clip", "--results", "r"]
    done = command("src/eval/study_text.py", "--model", "small", "--text", ".", "--work", "w", *sizes, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rounded, kept = (
        json.loads((tmp_path / f"r/text/small_int3{which}_clip.json").read_text())["metrics"] for which in ("", "_kept")
    )
    assert kept["bytes"] - rounded["bytes"] == words * width * (16 - 3 - 16 / 32) / 8
    made = [metrics["models"][0]["model"]["path"].split("/")[-1] for metrics in (rounded, kept)]
    assert made == ["int3_clip", "int3_kept_clip"]  # what a killed row left is not in the way of another
    assert kept["models"][0]["recipe"]["linear_bits"] == 3 and rounded["models"][0]["strata"]["all"]["mean"] > 0
