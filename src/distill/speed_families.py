"""Every family on a tiny checkpoint as its publisher lays it out: what works, how near it stays, how long it takes.

    python src/distill/speed_families.py [--families minimax_m2,gpt_oss] [--result results/bench/families.json --tag families]

Each is quantized to 8 bits without text and with it (gptq, tokens weighed), loaded again by transformers with no name missing
or left over, and compared with the original on 2,000 positions of random tokens; its router is watched; adapters on every role
are trained two steps on the scores of the original and merged. Then it becomes a GGUF: by llama.cpp's tools and by ours, whose
bytes are compared, and by error feedback, which llama-server runs beside transformers (--gguf: only this). The checkpoints are
untrained: a KL says that the layers, the grids and the places of the weights are right, not how good a method is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from calibration import Calibration, LayerStream
from checkpoint import Checkpoint
from console import UserError, progress, run_cli
from devices import default_device
from families import FAMILIES, Role, roles_of
from fsdp_setup import World
from gguf_format import GgufFile, same_file
from gguf_layout import Piece, pieces_of, read_parameter, to_gguf
from gguf_pack import write_pack
from hf_model import load_model
from kl import divergence
from llamacpp_eval8 import LlamaServer, server_logprobs
from merge_adapter import merge
from moe_lora import trainable
from opd_data import Example, TrainSettings, collate, model_identity
from opd_losses import gathered
from opd_student import build_student
from opd_trainer import Trainer, write_adapter
from pack_plan import plan_pack
from pack_reference import make_reference, run_tool
from quant_save import quantize_checkpoint
from recipe import Recipe
from records import REPO, add_record_arguments, check_record_arguments, peak_rss_mib, write_result
from rounders import is_quantized
from sensitivity import probe

SIZES: dict[str, Any] = dict(
    vocab_size=832, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, max_position_embeddings=512, moe_intermediate_size=32, num_experts=4, num_local_experts=4,
    n_routed_experts=4, num_experts_per_tok=2, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None,
    eos_token_id=827, first_k_dense_replace=1, n_group=2, topk_group=1, n_shared_experts=1, initializer_range=0.05,
)  # fmt: skip
LATENT = dict(q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, num_key_value_heads=4)
INDEXED = LATENT | dict(index_n_heads=2, index_head_dim=32, index_topk=128)
HYBRID = dict(
    layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=16, linear_value_head_dim=16, shared_expert_intermediate_size=32, decoder_sparse_step=1,
)  # fmt: skip
MAMBA = dict(
    mamba_n_heads=4, mamba_d_head=32, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2, mamba_dt_rank=4,
    use_mamba_kernels=False,
)  # fmt: skip
FAMILY: dict[str, dict[str, Any]] = {  # model_type of config.json -> what it has beside SIZES
    "qwen3_5_moe_text": HYBRID | dict(head_dim=32),  # room for the sections of its rotation
    "qwen3_5_text": HYBRID | dict(head_dim=32),
    "qwen3_next": HYBRID,
    "qwen3_moe": {},
    "mixtral": {},
    "olmoe": dict(num_key_value_heads=4),
    "deepseek_v3": LATENT,
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": dict(query_pre_attn_scalar=16),
    "gemma3_text": dict(query_pre_attn_scalar=16),
    "kimi_k2": LATENT,
    "deepseek_v2": LATENT | dict(topk_method="greedy"),
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": INDEXED | dict(num_hidden_layers=3, indexer_types=["full", "shared", "full"]),
    "glm4_moe": {},
    "glm4_moe_lite": LATENT,
    "qwen2_moe": dict(shared_expert_intermediate_size=32, decoder_sparse_step=1),
    "mistral": {},
    "hunyuan_v1_moe": {},
    "minimax_m2": dict(rotary_dim=16),
    "ernie4_5_moe": dict(
        moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1
    ),
    "phimoe": {},
    "gemma4_text": dict(
        initializer_range=0.03, enable_moe_block=True, top_k_experts=2, hidden_size_per_layer_input=0, num_kv_shared_layers=0,
    ),
    "granitemoehybrid": MAMBA | dict(layer_types=["mamba", "attention"], shared_intermediate_size=32, embedding_multiplier=3.0),
    "jamba": MAMBA | dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
    "gpt_oss": {},
    "llama4_text": dict(intermediate_size_mlp=96, interleave_moe_layer_step=2, num_hidden_layers=4),
    "nemotron_h": dict(
        layers_block_type=["mamba", "moe", "attention", "moe"], num_hidden_layers=4, mamba_num_heads=4, mamba_head_dim=32,
        ssm_state_size=16, n_groups=1, moe_shared_expert_intermediate_size=32, use_mamba_kernels=False,
    ),
}  # fmt: skip
RENAMED = {"kimi_k2": "deepseek_v3"}  # transformers' class of a model_type that it does not know


PUBLISHED: dict[str, dict[str, Any]] = {  # fields of config.json as the publisher has them, where transformers writes others
    "kimi_k2": {"model_type": "kimi_k2", "scoring_func": "sigmoid"},
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "deepseek_v32": {"scoring_func": "sigmoid"},
    "glm_moe_dsa": {"scoring_func": "sigmoid"},
    "phimoe": {"architectures": ["PhiMoEForCausalLM"], "original_max_position_embeddings": 512},
    "minimax_m2": {"scoring_func": "sigmoid"},
    "glm4_moe_lite": {"first_k_dense_replace": 1, "scoring_func": "sigmoid"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
}
GLM_TOKENS = {829: "<|user|>", 830: "<|observation|>", 831: "[gMASK]"}  # that llama.cpp's converter looks for
PIECES = ("gemma4_text", "jamba")  # whose vocabulary llama.cpp's converter takes as pieces of text with bytes among them


def tokenizer(path: Path, model_type: str) -> None:
    """razor-tiny's tokenizer, or one of as many tokens, with what llama.cpp's converter asks of the family's."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(REPO / "models/razor-tiny" / name, path)
    text, config = (json.loads((path / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json"))
    if model_type.startswith("glm"):
        for token in text["added_tokens"]:
            token["content"] = GLM_TOKENS.get(token["id"], token["content"])
        config["extra_special_tokens"] = ["<|endoftext|>", "<|im_end|>"]
    if model_type == "deepseek_v32":
        config |= {"add_bos_token": True, "bos_token": "<|im_start|>", "tokenizer_class": "LlamaTokenizer"}
    if model_type in PIECES:
        pieces = [
            "<pad>",
            "<|im_end|>",
            "<bos>",
            "<unk>",
            *(f"<0x{byte:02X}>" for byte in range(256)),
            "\u2581",
            "a",
            "b",
            "ab",
        ]
        pieces += [chr(0x4E00 + i) for i in range(SIZES["vocab_size"] - len(pieces))]
        pieces[SIZES["eos_token_id"]] = "<|im_end|>"
        replaced = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
        text |= {
            "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "merges": ["a b"]}
            | {"vocab": {piece: index for index, piece in enumerate(pieces)}},
            "decoder": {"type": "Sequence", "decoders": [replaced, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, "pre_tokenizer": None,
            "added_tokens": [
                dict(id=i, content=pieces[i], special=True, single_word=False, lstrip=False, rstrip=False, normalized=False)
                for i in (0, 2, 3, SIZES["eos_token_id"])
            ],
        }  # fmt: skip
        config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|im_end|>", "pad_token": "<pad>", "bos_token": "<bos>"}
    (path / "tokenizer.json").write_text(json.dumps(text))
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def tiny_family(path: Path, model_type: str) -> Path:
    """Write the checkpoint of ``model_type`` with razor-tiny's tokenizer; returns ``path``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(RENAMED.get(model_type, model_type), **SIZES | FAMILY[model_type])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if "correction_bias" in name or name.endswith("sinks"):
                value.normal_(0, 0.02)
            if name.endswith(("router.weight", "router.proj.weight", "mlp.gate.weight", "mixer.gate.weight", "gate.wg.weight")):
                value.mul_(
                    160 if "proj" in name else 20
                )  # decided routing, as of a trained model: a tie that rounding turns is a whole expert's output
    model.bfloat16().save_pretrained(path, max_shard_size="200KB")  # some converters look for an index
    known = {*type(config)().to_dict(), *FAMILY[model_type], "architectures"}  # a stray "num_experts" makes a mixture of it
    text = {key: value for key, value in json.loads((path / "config.json").read_text()).items() if key in known}
    (path / "config.json").write_text(json.dumps(text | PUBLISHED.get(model_type, {})))
    tokenizer(path, model_type)
    return path


IDS = torch.randint(5, 830, (40, 50), generator=torch.Generator().manual_seed(0))  # 2,000 positions


def calibration(power: float = 0.4) -> Calibration:
    record = {"name": "random tokens", "revision": "seed 0", "sha256": None, "n": 16}
    return Calibration(IDS[:16, :48], record, token_power=power, damping=0.1 if power else 0.0)


@torch.no_grad()
def logits_of(path: Path, ids: Tensor = IDS) -> Tensor:
    return load_model(path)(ids.to(default_device())).logits.float().cpu()


def layers(path: Path) -> dict[str, float]:
    """The stream of layers, one in memory at a time, against transformers' own model: the largest difference of a logit."""
    device = default_device()
    stream = LayerStream(Checkpoint(path), device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    (hidden,), arguments = stream.embed([IDS]), stream.arguments(IDS)
    for index, layer in enumerate(stream.layers):
        stream.fill(layer, f"model.layers.{index}.")
        with torch.no_grad():
            hidden = next(iter(stream.run(layer, [hidden], arguments[index])))
        stream.empty(layer)
    with stream.predictions() as logits, torch.no_grad():
        own = logits(hidden.to(device)).float().cpu()
    return {"difference": float((own - logits_of(path)).abs().max())}


def quantized(path: Path, out: Path, method: str) -> dict[str, float]:
    """Quantize to 8 bits, load, compare; raises where a tensor is not as before, or a name is missing or left over."""
    from transformers import AutoModelForCausalLM

    started, recipe = time.perf_counter(), Recipe(expert_bits=8, linear_bits=8, group=16, method=method)
    quantize_checkpoint(path, out, recipe, calibration=calibration() if method != "clip" else None)
    seconds, before, after = time.perf_counter() - started, Checkpoint(path), Checkpoint(out)
    same_tensors(before, after)
    roles = roles_of({name: info.shape for name, info in before.tensors.items()}, before.config)
    changed = [name for name in before.tensors if not torch.equal(before.read(name), after.read(name))]
    wanted = [name for name, role in roles.items() if recipe.bits_for(role)]
    if changed != wanted:
        raise UserError(f"{out}: changed {min(set(changed) ^ set(wanted))} against the recipe")
    if not FAMILIES.get(before.model_type, FAMILIES["llama"]).alias:  # transformers knows its model_type
        _, said = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
        if any(said[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
            raise UserError(f"{out}: transformers finds {said}")
    kl, _ = divergence(logits_of(path).flatten(0, 1), logits_of(out).flatten(0, 1))
    return {"kl_mean": float(kl.mean()), "positions": len(kl), "tensors": len(wanted), "seconds": round(seconds, 2)}


def same_tensors(one: Checkpoint, other: Checkpoint) -> None:
    """Raise unless the two have the same tensors by name, dtype and shape."""
    mine, theirs = ({name: (info.dtype, info.shape) for name, info in c.tensors.items()} for c in (one, other))
    if mine != theirs:
        raise UserError(f"{other.path}: its tensors are not those of {one.path}")


def router(path: Path) -> dict[str, float]:
    """Layers with routed experts that the probe sees, of how many there are."""
    checkpoint = Checkpoint(path)
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    there = {checkpoint.places[name].parameter.split(".")[2] for name, role in roles.items() if role is Role.ROUTED_EXPERT}
    reports, _ = probe(checkpoint, calibration(0.0))
    if reports.keys() != there or any(abs(sum(report["frequency"]) - 1) > 1e-4 for report in reports.values()):
        raise UserError(f"{path}: layers {sorted(there)} have experts, the probe reports {sorted(reports)}")
    return {"layers": len(there)}


def adapter(path: Path, out: Path) -> dict[str, float]:
    """A student of 3 and 4 bits, LoRA on every role for two steps, merged: the student's first logits are the checkpoint's, the
    merged checkpoint's are its last."""
    quantize_checkpoint(path, out / "q", Recipe(3, 4, 16, 1))
    config, alone = TrainSettings(rank=2, linears=True, steps=2, lr=0.5, clip=1e9), World(0, 1, default_device())
    student = build_student(out / "q", path, config, alone, ("forward_kl", "forward_kl"), 1.0, recompute=True)
    ids = IDS[:4]
    with torch.no_grad():
        first = student.logits(ids.to(alone.device)).float().cpu()
    start = float((first - logits_of(out / "q", ids)).abs().max())
    scores = [own[3:-1] for own in logits_of(path, ids)]
    rows = [Example(row, 4, gathered(own, own.topk(8).indices)) for row, own in zip(ids, scores, strict=True)]
    trainer = Trainer(student, config, alone, out / "a", {})
    for _ in range(2):
        student(collate(rows).to(alone.device)).backward()
        if not all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trainable(student).values()):
            raise UserError(f"{path}: an adapter has no finite gradient")
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    (out / "a").mkdir()
    trainer.curve = [[1, 0.0, 0.0]]
    write_adapter(trainer, {"student": model_identity(out / "q"), "teacher": model_identity(path)}, {})
    merge(out / "q", path, out / "a", out / "r", False)
    same_tensors(Checkpoint(path), Checkpoint(out / "r"))
    last = logits_of(out / "r", ids)
    with torch.no_grad():
        end = float((last - student.logits(ids.to(alone.device)).float().cpu()).abs().max())
    return {"start": start, "merged": end, "moved": float((last - first).abs().max())}


KIND, WRITTEN = "iq4_nl", [("token_embd|^output", "q8_0")]  # of rows that are multiples of 32
POSITIONS = (2, 256)  # sequences and tokens of each whose predictions are compared


def gguf_difference(file: Path, model: Path) -> dict[str, float]:
    """Log-probabilities of a GGUF in llama-server against those of transformers for a checkpoint: the mean absolute difference
    over all positions and tokens, and KL. It must also generate."""
    ids = torch.randint(5, 825, POSITIONS, generator=torch.Generator().manual_seed(1))
    with LlamaServer(file, POSITIONS[1] + 8, 1) as server:
        answer = server.client.call("/completion", {"prompt": ids[0, :8].tolist(), "n_predict": 4, "ignore_eos": True})
        if answer["tokens_predicted"] != 4:
            raise UserError(f"{file.name}: llama-server generated {answer['tokens_predicted']} of 4 tokens")
        rows = [server_logprobs(server, np.append(own.numpy(), 5).astype(np.int32), SIZES["vocab_size"], 0) for own in ids]
    expected = logits_of(model, ids).flatten(0, 1).log_softmax(-1)
    own = torch.cat(rows)
    kl = (expected.exp() * (expected - own)).sum(-1)
    return {"difference": float((own - expected).abs().mean()), "kl": float(kl.mean()), "positions": len(own)}


def as_gguf(path: Path, out: Path) -> dict[str, Any]:
    """What becomes of a checkpoint as a GGUF, a step a key; a step that fails has its reason as text, and ends what needs it.

    ``reference``: llama.cpp's convert, imatrix and quantize (REFERENCE=1). ``nearest``: F16 by trace, ``equal``: how it differs
    from llama.cpp's convert and llama-quantize --pure, and what its values in Q8_0 would. ``exact``: a float32 file against
    transformers, which is how far apart the two programs are whatever a file holds. ``ldlq``: error feedback, ``served``:
    against transformers on what DEQUANT_OUT writes."""
    found: dict[str, Any] = {}

    def step(name: str, make: Callable[[], Any]) -> bool:
        try:
            found[name] = make()
        except UserError as error:
            found[name] = " ".join(str(error).replace(f"{out}/", "").replace(f"{path}", path.name).split())[:200]
        return not isinstance(found[name], str)

    checkpoint, server = Checkpoint(path), {}

    def packed(name: str, kind: str, method: str) -> dict[str, Any]:
        calibrated = calibration() if method == "ldlq" else None
        pack, _ = plan_pack(checkpoint, kind, WRITTEN if method == "ldlq" else [], method, calibrated)
        if not pack.is_calibrated:
            pack = dataclasses.replace(pack, calibration=None)
        made = write_pack(pack, out / name, dequant_out=out / f"{name}-bf16" if method == "ldlq" else None)
        server[name] = out / name / pack.file_name
        fed = sum(is_quantized(pack.types[p.name]) and p.name in pack.fed for p in pack.pieces)
        return {"tensors": len(pack.pieces), "fed": fed, "nearest": made.get("uncalibrated", {})}

    def reference() -> dict[str, Any]:
        pack, _ = plan_pack(checkpoint, KIND, WRITTEN, "nearest", calibration(0.0))
        made = make_reference(pack.seen_whole(), calibration(0.0), out / "reference", WRITTEN)
        return {"file_bytes": made["file_bytes"]}

    def differences() -> list[str]:
        plain = out / "reference" / f"{path.name}-BF16.gguf"
        for kind in ("F16", "Q8_0"):
            run_tool("llama-quantize", ["--pure", plain, out / f"{kind}.gguf", kind], out / "llama.log")
        theirs, (pack, _) = GgufFile(out / "Q8_0.gguf"), plan_pack(checkpoint, "q8_0", [], "nearest")
        lines = same_file(server["nearest"], out / "F16.gguf")
        lines += [f"{name}: not planned" for name in theirs.tensors.keys() - pack.types.keys()]
        for piece in pack.pieces:
            if (kind := theirs.kind(piece.name)) != pack.types[piece.name]:
                lines.append(f"{piece.name}: {pack.types[piece.name]} instead of {kind}")
            elif kind == "q8_0":  # llama.cpp's own rounding of our values: ours searches for a better unit
                value = pack.values(piece.name, piece.shape) if piece.function == "converter" else None
                value = to_gguf(piece, read_parameter(checkpoint, piece)) if value is None else value
                own = gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
                if not np.array_equal(own, theirs.data(piece.name).numpy()):
                    lines.append(f"{piece.name}: other bytes in Q8_0")
        return lines

    out.mkdir(exist_ok=True)
    if step("traced", lambda: dict(Counter(kind_of(piece) for piece in pieces_of(checkpoint)))):
        step("reference", reference)
        if step("nearest", lambda: packed("nearest", "f16", "nearest")):
            step("equal", differences)
        if step("float32", lambda: packed("float32", "f32", "nearest")):
            step("exact", lambda: gguf_difference(server["float32"], path))
        if step("ldlq", lambda: packed("ldlq", KIND, "ldlq")):
            step("served", lambda: gguf_difference(server["ldlq"], out / "ldlq-bf16"))
    return found


def kind_of(piece: Piece) -> str:
    """How a tensor of a GGUF is made of the checkpoint's, in words."""
    if piece.function != "same":
        return "function"
    moved = "rows" if piece.rows is not None else "part" if piece.span is not None else "same"
    stack = "stack" if len(piece.sources) > 1 else moved
    return "transposed" if piece.transposed else "columns" if piece.columns is not None else stack


def checks(path: Path, out: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """(what was tried, what came out) of one family's checkpoint; a failure is raised."""
    yield "layers", layers(path)
    for method in ("clip", "gptq"):
        yield method, quantized(path, out / method, method)
    yield "router", router(path)
    yield "adapter", adapter(path, out / "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--gguf", action="store_true", help="only what becomes of each as a GGUF")
    parser.add_argument("--families", default=",".join(FAMILY), help="names with commas between (default: all)")
    add_record_arguments(parser)
    args = parser.parse_args()
    check_record_arguments(args)
    names, started = args.families.split(","), time.time()
    found: dict[str, Any] = {}
    if unknown := sorted(set(names) - set(FAMILY)):
        raise UserError(f"--families {unknown[0]}: known are {', '.join(FAMILY)}")
    with progress(len(names), "families", "family") as bar:
        for name in names:
            begun = time.perf_counter()
            with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
                path = tiny_family(Path(work, name), name)
                own: dict[str, Any] = {} if args.gguf else dict(checks(path, Path(work)))
                own["gguf"] = as_gguf(path, Path(work, "gguf"))
            own = found[name] = own | {"seconds": round(time.perf_counter() - begun, 1)}
            kl = "" if args.gguf else f"KL clip {own['clip']['kl_mean']:.2e} gptq {own['gptq']['kl_mean']:.2e}"
            print(f"{name:<20} {kl} {own['seconds']:>5.1f} s  GGUF: {json.dumps(own['gguf'])}", flush=True)
            bar.update()
    if args.result:
        model = {"path": "made by the command", "config_sha256": None, "bytes": 0, "tensors": 0}
        metrics = {"families": found, "peak_rss_mib": peak_rss_mib()}
        write_result(args.result, kind="bench", tag=args.tag, started=started, model=model, metrics=metrics)


if __name__ == "__main__":
    run_cli(main)
