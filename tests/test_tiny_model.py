"""The training forward of razor-tiny against transformers' own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from hf_model import load_tokenizer
from tiny_model import TextShape, balance_loss, init_weights, text_model, train_forward


@pytest.mark.parametrize("experts", [8, 24, 0], ids=["8 experts", "24 experts, grouped", "dense"])
def test_training_forward_equals_transformers(random_tiny, experts):
    if experts == 8:
        model = AutoModelForCausalLM.from_pretrained(random_tiny, dtype=torch.float32)
    else:
        shape = TextShape(hidden=128, inner=64, experts=experts, top_k=3, layers=4, dense=192)
        model = text_model(shape, load_tokenizer(random_tiny), 256)
        init_weights(model, 0)
    ids = torch.randint(8, model.config.vocab_size, (2, 128), generator=torch.Generator().manual_seed(0))
    ids[ids == model.config.pad_token_id] = 9  # transformers gives the padding token no gradient
    hidden, probs, load = train_forward(model, ids, torch.float32)
    logits = F.linear(hidden, model.lm_head.weight)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=2e-4)
    assert (
        load.shape == (4, experts or 1) and torch.allclose(load.sum(-1), torch.ones(4)) and 0.9 < balance_loss(probs, load) < 8
    )
    gradients = []
    for output in (logits, expected):
        model.zero_grad()
        F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    ours, theirs = gradients
    for name, gradient in theirs.items():
        scale = gradient.abs().max().clamp_min(1e-8)
        assert ((ours[name] - gradient).abs().max() / scale) < 2e-3, name
