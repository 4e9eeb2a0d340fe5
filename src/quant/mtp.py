"""The multi-token-prediction block of Qwen3-Next, 3.5 and 3.6 (mtp.*), which transformers leaves unread: what guesses the token
after the next.

Not a command. `load_mtp(checkpoint, device, dtype)`. Row t of its one decoder layer is mtp.fc of [norm of the embedding of
token t + 1, norm of what the head reads at token t], in this order; all three norms multiply by 1 + weight, as the family's
own; the layer is causal full attention at the place of the row. That is how vLLM runs it (qwen3_5_mtp.py). llama.cpp
(common/speculative.cpp, graph_mtp of src/models/qwen35moe.cpp) puts one more row before them, of the first token and zeros,
which the others see: ``lead``. Between rows only distances count, so their numbering from 0 or 1 is the same.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import Checkpoint, matrices_of
from console import UserError, read_object, write_json
from families import MTP_PREFIX, Role, roles_of
from hf_model import TOKENIZER_FILES, check_finite, listed, model_config
from safetensors_file import INDEX, SINGLE, save_tensors

RUN = ("qwen3_next", "qwen3_5", "qwen3_5_moe")  # the families whose block it is
AROUND = ("embed_tokens", "lm_head")  # of the block's modules those of the model


class MtpBlock(nn.Module):
    """Made of the family's own classes on the meta device. The names of its own parameters are those on disk without "mtp."
    (experts fused); ``embed_tokens`` and ``lm_head`` are the model's."""

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        """``config``: transformers' of the text model."""
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        super().__init__()
        self.config = config
        one, size = copy.deepcopy(config), config.hidden_size
        one.num_hidden_layers, one.layer_types = 1, ["full_attention"]
        with init_empty_weights(include_buffers=False):
            whole = AutoModelForCausalLM.from_config(one, dtype=dtype).eval()
            norm = type(whole.model.norm)
            self.fc = nn.Linear(2 * size, size, bias=False, dtype=dtype)
            self.pre_fc_norm_embedding = norm(size, eps=config.rms_norm_eps).to(dtype)
            self.pre_fc_norm_hidden = norm(size, eps=config.rms_norm_eps).to(dtype)
        self.layers, self.norm, self.rotary_emb = whole.model.layers, whole.model.norm, whole.model.rotary_emb
        self.embed_tokens, self.lm_head = whole.get_input_embeddings(), whole.lm_head
        self._whole = [whole]  # in a list: its modules are registered above

    def put(self, name: str, value: Tensor, trained: bool = False) -> None:
        """Give the parameter ``name`` its values."""
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=trained))

    def own(self) -> dict[str, nn.Parameter]:
        """The block's parameters by their names on disk, experts fused."""
        return {f"mtp.{name}": value for name, value in self.named_parameters() if not name.startswith(AROUND)}

    def joined(self, ids: Tensor, hidden: Tensor, lead: bool = False) -> Tensor:
        """What the decoder layer reads: token ids [B, T] and what the head reads at each of them [B, T, H] ->
        [B, T - 1, H], or with ``lead`` [B, T, H]."""
        embedded, before = self.embed_tokens(ids), hidden[:, :-1]
        if lead:
            before = torch.cat([torch.zeros_like(hidden[:, :1]), before], 1)
        else:
            embedded = embedded[:, 1:]
        return self.fc(torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(before)], -1))

    def normed(self, rows: Tensor) -> Tensor:
        """:meth:`joined` -> what the head reads, by the layer and the block's norm. For a second drafted token it takes the
        place of ``hidden``."""
        return self._whole[0].model(inputs_embeds=rows, use_cache=False).last_hidden_state

    def forward(self, ids: Tensor, hidden: Tensor, lead: bool = False) -> Tensor:
        """Token ids [B, T], the trunk's states behind its final norm [B, T, H] -> logits [B, T - 1, V]; row t is of token
        t + 2."""
        out = self.normed(self.joined(ids, hidden, lead))
        return self.lm_head(out[:, 1:] if lead else out)


def is_run(model_type: str) -> bool:
    """Whether the block of multi-token prediction of a model type is this one."""
    return model_type.removesuffix("_text") in RUN


def sources_of(checkpoint: Checkpoint, block: MtpBlock) -> dict[str, list[str]]:
    """The tensors of each of the block's own parameters; raises :class:`UserError` where the checkpoint has no block, or not
    this one."""
    roles = roles_of({name: info.shape for name, info in checkpoint.tensors.items()}, checkpoint.config)
    found = [name for name, role in roles.items() if role is Role.MTP]
    if not found:
        raise UserError(f"{checkpoint.path}: has no multi-token prediction (mtp.*)")
    places: dict[str, list[str]] = {}
    for name in found:
        parameter = MTP_PREFIX.sub("mtp.", checkpoint.places[name].parameter)
        places.setdefault(parameter, []).append(name)
    own = block.own()
    if strange := sorted(set(places) - set(own)):
        raise UserError(f"{checkpoint.path}: multi-token prediction of another kind: {listed(strange)} is not known (mtp.py)")
    if missing := sorted(set(own) - set(places)):
        raise UserError(f"{checkpoint.path}: multi-token prediction is not whole: it lacks {listed(missing)}")
    for name, parameter in own.items():
        shape = checkpoint.parameter_shape(checkpoint.places[places[name][0]].parameter)
        if shape != parameter.shape:
            raise UserError(f"{checkpoint.path}: {places[name][0]} is {list(shape)} instead of {list(parameter.shape)}")
    return places


def load_mtp(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> MtpBlock:
    """The block of a checkpoint with its weights, frozen; raises like :func:`sources_of`."""
    block = MtpBlock(model_config(checkpoint.path).get_text_config(), dtype)
    places = sources_of(checkpoint, block)
    head = "lm_head.weight" if "lm_head.weight" in checkpoint.sources else "model.embed_tokens.weight"
    places |= {"mtp.embed_tokens.weight": checkpoint.sources["model.embed_tokens.weight"]}
    places |= {"mtp.lm_head.weight": checkpoint.sources[head]}
    for name, tensor in list(block.named_parameters(remove_duplicate=False)):
        full = torch.empty(tensor.shape, dtype=dtype, device=device)
        for source in places[f"mtp.{name}"]:
            part = checkpoint.places[source].view(full)
            check_finite(part.copy_(checkpoint.read(source).view_as(part)), source, checkpoint.path)
        block.put(name, full)
    return block.to(device)


def write_beside(model: Path, out: Path, block: MtpBlock) -> None:
    """A checkpoint of ``model`` with ``block``: links to the files of the model, which has one shard and no such block, and a
    second shard with the block in BF16, its experts matrix by matrix."""
    tensors: dict[str, Tensor] = {}
    for name, value in block.own().items():
        value = value.detach().to("cpu", torch.bfloat16)
        if value.ndim == 1:
            tensors[name] = value
            continue
        matrices = matrices_of(name, tuple(value.shape))
        parts = value.reshape(-1, value.shape[-1]).split([rows for _, rows in matrices])
        tensors |= {f"{module}.weight": own.contiguous() for (module, _), own in zip(matrices, parts, strict=True)}
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    out.mkdir(parents=True, exist_ok=True)
    links = {name: name for name in TOKENIZER_FILES if (model / name).is_file()} | {first: SINGLE}
    for name, source in links.items():
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(os.path.relpath(model / source, out))
    save_tensors(out / second, tensors)
    files = dict.fromkeys(Checkpoint(model).tensors, first) | dict.fromkeys(tensors, second)
    write_json(out / INDEX, {"metadata": {}, "weight_map": dict(sorted(files.items()))})
    write_json(out / "config.json", read_object(model / "config.json") | {"mtp_num_hidden_layers": len(block.layers)})
