"""Adapters on the target grid: every family, exact starts, straight-through gradients, routing under recomputation."""

import pytest
import torch
from safetensors.torch import load_file
from test_quant_save import FAMILIES, TINY
from transformers import AutoConfig, AutoModelForCausalLM

from console import UserError
from fsdp_setup import World
from merge_adapter import merge
from moe_lora import Adapter, adapters_of, checkpoint_layer, digest, experts_of, trainable
from moe_quant import fake_quant, quantize_group
from opd_data import AdapterSettings, Example, TrainSettings, collate, model_identity
from opd_losses import gathered
from opd_student import build_student
from opd_trainer import Trainer, write_adapter
from quant_save import quantize_checkpoint
from recipe import Recipe
from target_grid import IntGrid, int_cells, recover_scales, resolution

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
MOE = ("qwen3_5_moe_text", "olmoe")  # all: test_families.py


def pair(tmp_path, family, recipe):
    """A random teacher of a family and its quantized student."""
    rotary = {"head_dim": 16, "num_key_value_heads": 2} if family == "deepseek_v3" else {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **TINY | rotary))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.05) if p.ndim > 1 else None
    model.bfloat16().save_pretrained(tmp_path / "m")
    quantize_checkpoint(tmp_path / "m", tmp_path / "q", recipe)
    return tmp_path / "m", tmp_path / "q", model.float()


def batch_of(model, rows=3, length=40, prompt=4, k=8):
    """Random rollouts with the scores of ``model``."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for row in range(rows):
        ids = torch.randint(3, model.config.vocab_size, (length - row,), generator=generator)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, prompt - 1 : -1]
        examples.append(Example(ids, prompt, gathered(logits, logits.topk(k).indices)))
    return collate(examples)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_cells_start_at_the_student_and_point_to_the_teacher(bits, stored):
    teacher = torch.randn(24, 256, generator=torch.Generator().manual_seed(bits)).to(stored)
    teacher[0, :128] = 0
    student = fake_quant(teacher, bits, 128, 4)
    scale, found = recover_scales(student.view(-1, 128), bits)
    assert found.all()
    bad = teacher.clone()
    bad[3, 7] = float("nan")
    for pair_, whose in (((bad, teacher), "student"), ((student, bad), "teacher")):
        with pytest.raises(UserError, match=f"the {whose}'s weights hold NaN"):
            int_cells(*pair_, (bits,), 128)
    grid = IntGrid([int_cells(student, teacher, (bits,), 128)], 128, stored)
    assert torch.equal(grid.values(slice(0, 1), None, None)[0], student)
    q = quantize_group(teacher, bits, 128, 4)
    assert torch.equal(grid.codes(slice(0, 1), None)[0], q.codes.float()) or stored is torch.bfloat16
    latent = grid.latent.view(torch.int8)[0].float().view(24, 2, 128) / resolution(bits) * grid.scale[0].float()[..., None]
    if bits < 8:  # where no code is at the edge, the latent weight is nearer to the teacher than the student is
        assert (latent.view(24, 256) - teacher.float()).abs().mean() < 0.5 * (student - teacher).float().abs().mean()
    broken = student.clone()
    broken[3, 5] = 0.777 * broken[3].abs().max()
    with pytest.raises(UserError, match="not on a symmetric grid"):
        int_cells(broken, None, (2,) if bits == 2 else (2, 3), 128)


@pytest.mark.parametrize("mode", ["both", "steps"])
def test_gradients_are_those_of_a_plain_straight_through(mode):
    torch.manual_seed(0)
    teacher = torch.randn(3, 16, 64)
    cells = [int_cells(fake_quant(w, bits, 32, 1), w, (bits,), 32) for w, bits in zip(teacher, (2, 3, 2))]
    adapter = Adapter("x", IntGrid(cells, 32, torch.bfloat16), False, mode, 4)
    with torch.no_grad():
        adapter.b.normal_(0, 0.3)
        adapter.growth.normal_(0, 0.1)
    out = adapter(torch.float32)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    a, b, growth = (p.detach().clone().requires_grad_() for p in (adapter.a, adapter.b, adapter.growth))
    qmax = torch.tensor([1.0, 3.0, 1.0])[:, None, None]
    latent = adapter.grid.latent.view(torch.int8).float() / torch.tensor([64.0, 32.0, 64.0])[:, None, None]
    if mode == "steps":  # the codes follow the step, and one at the end of the grid no longer moves with it
        latent = (latent.view(3, 16, 2, 32) / (1 + growth)[..., None]).view(3, 16, 64)
        nearest = (latent + b @ a).detach().round().clamp(-qmax, qmax)
        latent = torch.where((latent + b @ a - nearest).abs() <= 0.5, latent, latent.detach())
    position = latent + b @ a
    code = position + (position.round().clamp(-qmax, qmax) - position).detach()
    scale = adapter.grid.scale.float() * (1 + growth)
    scale = scale + (scale.bfloat16().float() - scale).detach()
    plain = (code.view(3, 16, 2, 32) * scale[..., None]).view(3, 16, 64)
    assert torch.equal(plain.detach().bfloat16().float(), out.detach())
    (plain * weights).sum().backward()
    for own, expected in ((adapter.a, a), (adapter.b, b), (adapter.growth, growth)):
        loose = mode == "steps" and own is adapter.growth  # the reference multiplies its latent weight by the rounded scale
        torch.testing.assert_close(own.grad, expected.grad, rtol=1e-4, atol=0.05 if loose else 1e-5)


@pytest.mark.parametrize("family", MOE)
def test_every_family_trains_and_merges_to_the_same_logits(family, tmp_path):
    assert family.removesuffix("_text") in {name.removesuffix("_text") for name in FAMILIES}
    teacher, quantized, model = pair(tmp_path, family, Recipe(2, 4, 32, 1))
    config = TrainSettings(
        rank=4, linears=family != "olmoe", mode="both" if family == "olmoe" else "lora", steps=2, lr=0.5, clip=1e9
    )
    student = build_student(quantized, teacher, config, ALONE, ("reverse_kl",) * 2, 1.0, recompute=True)
    batch = batch_of(model)
    loaded = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32)
    with torch.no_grad():
        before = loaded(input_ids=batch.ids, use_cache=False).logits
        torch.testing.assert_close(student.logits(batch.ids), before, rtol=0, atol=1e-6)
    tokens = {}
    for name, module in student.named_modules():
        if any(isinstance(child, Adapter) and not child.flat for child in module.children()):
            note = lambda m, args, name=name: tokens.update({name: args[1].flatten().unique()})  # noqa: E731
            module.register_forward_pre_hook(note)
    trainer = Trainer(student, config, ALONE, tmp_path / "a", {})
    for _ in range(2):
        loss = student(batch)
        loss.backward()
        for name, adapter in adapters_of(student).items():
            experts = next((used for module, used in tokens.items() if name.startswith(module[len("model.") :])), None)
            if experts is not None and adapter.mode != "scales":
                grown = adapter.b.grad.flatten(1).abs().amax(1)
                assert (grown[experts] > 0).all(), (name, grown, experts)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
    assert len(adapters_of(student)) > 2
    (tmp_path / "a").mkdir()
    trainer.curve = [[1, 0.0, 0.0]]
    identities = {"student": model_identity(quantized), "teacher": model_identity(teacher)}
    write_adapter(trainer, identities, {})
    recovery = merge(quantized, teacher, tmp_path / "a", tmp_path / "r", False)
    assert recovery["changed_weights"] > 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "r", dtype=torch.float32)
    with torch.no_grad():
        after = merged(input_ids=batch.ids, use_cache=False).logits
        torch.testing.assert_close(after, student.logits(batch.ids), rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    with pytest.raises(UserError, match="trained on another teacher"):
        merge(quantized, quantized, tmp_path / "a", tmp_path / "r2", False)


def test_unsupported_experts_are_refused_by_name():
    module = torch.nn.Module()
    module.w1, module.down_proj = (torch.nn.Parameter(torch.zeros(2, 4, 4)) for _ in range(2))
    with pytest.raises(UserError, match="Module: experts with down_proj, w1 are not supported"):
        experts_of(module)


def test_a_recomputed_layer_routes_as_its_forward_did(tmp_path):
    teacher, quantized, model = pair(tmp_path, "qwen3_moe", Recipe(2, 4, 32, 1))
    batch = batch_of(model)
    gradients = []
    for recompute, disturbed in ((False, False), (True, False), (True, True)):
        student = build_student(quantized, teacher, AdapterSettings(rank=4), ALONE, ("reverse_kl",) * 2, 1.0, recompute)
        calls, chosen = [0], []
        for layer in student.layers:
            experts = next(m for m in layer.modules() if is_adapted(m))

            after = len(student.layers) if disturbed else 99

            def disturb(module, args, calls=calls, after=after):
                calls[0] += 1
                return (args[0], args[1].flip(0), args[2]) if calls[0] > after else None  # far off, when recomputed

            experts.register_forward_pre_hook(disturb, prepend=True)
            experts.register_forward_pre_hook(lambda m, args, chosen=chosen: chosen.append(args[1].clone()))
        student(batch).backward()
        layers = len(student.layers)
        assert len(chosen) == (2 if recompute else 1) * layers
        for index in range(layers if recompute else 0):  # the backward goes through the layers in reverse
            assert torch.equal(chosen[index], chosen[2 * layers - 1 - index])
        gradients.append({name: p.grad.clone() for name, p in trainable(student).items()})
    for other in gradients[1:]:
        assert all(torch.allclose(gradients[0][name], other[name], atol=1e-6) for name in other)


def is_adapted(module):
    return any(isinstance(child, Adapter) and not child.flat for child in module.children())


def test_digest_and_checkpoint_are_pure():
    a = torch.arange(6).bfloat16()
    assert digest(a) == digest(a.clone()) != digest(a + 1)
    layer = torch.nn.Linear(2, 2)
    checkpoint_layer(layer)
    assert torch.equal(layer(torch.ones(1, 2)), torch.nn.Linear.forward(layer, torch.ones(1, 2)))


@pytest.mark.parametrize("name", ["q4_K", "q2_K", "iq4_nl", "iq3_xxs", "iq2_xs"])
def test_a_ggml_grid_packs_what_it_computed(name):
    from ggml_codecs import decode_rows, encode
    from target_grid import GgmlGrid

    torch.manual_seed(0)
    weight = (torch.randn(2, 4, 256) * 0.05).bfloat16()
    adapter = Adapter("x", GgmlGrid(weight, name, torch.float32), False, "lora", 4)
    assert torch.equal(adapter.baked(), decode_rows(encode(weight.float(), name), name))  # starts as llama.cpp's file would
    with torch.no_grad():
        adapter.b.normal_(0, 0.5)
    packed = adapter.packed()
    assert torch.equal(decode_rows(packed, name), adapter.baked())  # no scale is searched again
    out = adapter(torch.float32)
    assert torch.equal(out.detach(), adapter.baked()) and not torch.equal(packed, encode(weight.float(), name))
    out.square().sum().backward()
    assert (adapter.b.grad.flatten(1).abs().amax(1) > 0).all() and adapter.a.grad.isfinite().all()


def test_a_student_on_a_ggml_grid_merges_with_its_blocks(tmp_path):
    from ggml_codecs import decode_rows

    teacher, quantized, model = pair(tmp_path, "qwen3_moe", Recipe(2, 4, 32, 1))
    config = TrainSettings(rank=4, ggml="iq4_nl", steps=1, lr=0.3)
    student = build_student(quantized, teacher, config, ALONE, ("forward_kl",) * 2, 1.0, recompute=False)
    batch = batch_of(model)
    trainer = Trainer(student, config, ALONE, tmp_path / "a", {})
    student(batch).backward()
    trainer.optimizer.step()
    (tmp_path / "a").mkdir()
    write_adapter(trainer, {role: model_identity(p) for role, p in (("student", quantized), ("teacher", teacher))}, {})
    merge(quantized, teacher, tmp_path / "a", tmp_path / "r", False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "r", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=batch.ids).logits, student.logits(batch.ids), rtol=0, atol=1e-5)
    for name, blocks in load_file(tmp_path / "r/ggml.safetensors").items():
        assert torch.equal(decode_rows(blocks, "iq4_nl").bfloat16().float(), merged.get_parameter(name)), name
