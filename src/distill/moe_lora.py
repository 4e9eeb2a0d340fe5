"""Per-expert low-rank adapters on fused experts (and on plain linears) whose forward goes through the real target grid.

Not a command; opd_train_fsdp trains them and merge_adapter bakes them. Duck typing: a module with 3-D parameters gate_up_proj
(or up_proj) and down_proj is a block of experts, whatever family it comes from (calibration.Layout). The weight that it
computes with is

    grid(latent + B @ A)      A [E, r, inputs], B [E, outputs, r], in steps of the grid (target_grid.py)

with the gradient of the identity in place of that of the rounding. Mode "scales" leaves the codes and trains the relative
growth of every group's scale, rounded to bfloat16; mode "both" does both; in mode "steps" the latent weights also keep their
size when a scale changes, so that their codes follow it.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from calibration import Layout
from console import UserError
from target_grid import FreeGrid, Grid, parts_of

MODES = ("lora", "scales", "both", "steps")
DIGEST_PIECE = 1 << 24  # bytes of a tensor that are digested at once


class _OnGrid(torch.autograd.Function):
    """(a, b, growth) -> weights on the grid, matrix by matrix; straight-through where codes are rounded. ``follow``: the
    codes follow the scales."""

    @staticmethod
    def forward(
        ctx: Any, grid: Grid, a: Tensor | None, b: Tensor | None, growth: Tensor | None, dtype: Any, follow: bool
    ) -> Tensor:
        ctx.grid, ctx.follow = grid, follow
        ctx.save_for_backward(a, b, growth)
        out = torch.empty(grid.shape, dtype=dtype, device=grid.scale.device)
        for part in parts_of(grid):
            moved = None if a is None else torch.bmm(b[part], a[part])
            out[part] = grid.values(part, moved, None if growth is None else growth[part], follow).to(dtype)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        grid, (a, b, growth) = ctx.grid, ctx.saved_tensors
        grad_a, grad_b, grad_growth = (None if value is None else torch.empty_like(value) for value in (a, b, growth))
        for part in parts_of(grid):
            own = gradient[part].float()
            grown = None if growth is None else growth[part]
            if growth is not None:
                moved = None if a is None else torch.bmm(b[part], a[part])
                grad_growth[part] = grid.growth_gradient(part, moved, grown, own, ctx.follow)
            if a is not None:
                own = (grid.grouped(own) * grid.step(part, grown)).view(own.shape)
                grad_a[part] = torch.bmm(b[part].transpose(1, 2), own)
                grad_b[part] = torch.bmm(own, a[part].transpose(1, 2))
        return None, grad_a, grad_b, grad_growth, None, None


class Adapter(nn.Module):
    """What stands in for one parameter [E, O, I] (or [O, I], kept as E = 1): a frozen grid and what is trained on it.

    A starts as noise that depends on ``seed`` and ``name`` alone, B and the growth at zero: the first forward is the student's.
    """

    def __init__(self, name: str, grid: Grid, flat: bool, mode: str, rank: int, seed: int = 0) -> None:
        super().__init__()
        self.name, self.grid, self.flat, self.mode, self.rank = name, grid, flat, mode, rank
        experts, outputs, inputs = grid.shape
        device = grid.scale.device
        self.a = self.b = self.growth = None
        if mode != "scales":
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
            noise = torch.randn(experts, rank, inputs, generator=generator) / rank**0.5
            self.a = nn.Parameter(noise.to(device))
            self.b = nn.Parameter(torch.zeros(experts, outputs, rank, device=device))
        if mode != "lora":
            self.growth = nn.Parameter(torch.zeros(grid.scale.shape, device=device))

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weights [E, O, I] (or [O, I], or [N] of a norm) on the grid, in ``dtype``."""
        weights = _OnGrid.apply(self.grid, self.a, self.b, self.growth, dtype, self.mode == "steps")
        return weights.flatten() if isinstance(self.grid, FreeGrid) else weights[0] if self.flat else weights

    @torch.no_grad()
    def baked(self) -> Tensor:
        """The final weights in the dtype of the checkpoint: bit for bit those of :meth:`forward` on this device."""
        return self(self.grid.stored)

    @torch.no_grad()
    def packed(self) -> Tensor:
        """The final blocks of a ggml grid, uint8 [E, O, row bytes]."""
        return torch.cat([self.grid.packed(part, torch.bmm(self.b[part], self.a[part])) for part in parts_of(self.grid)])


def digest(weights: Tensor) -> str:
    """SHA-256 of the bytes of a tensor on any device, piece by piece through one buffer: a whole copy in new memory would take
    a GPU's parameter longer than its digest."""
    data, found = weights.detach().contiguous().flatten().view(torch.uint8), hashlib.sha256()
    buffer = torch.empty(min(DIGEST_PIECE, len(data)), dtype=torch.uint8)
    for piece in data.split(DIGEST_PIECE):
        buffer[: len(piece)].copy_(piece)
        found.update(memoryview(buffer[: len(piece)].numpy()))
    return found.hexdigest()


def experts_of(module: nn.Module) -> Layout | None:
    """How a module holds fused experts, None where it holds none; a block of experts of another kind is refused by name."""
    fused = {name for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
    if not fused or isinstance(module, nn.Conv1d):
        return None
    if fused not in ({"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}):
        raise UserError(f"{type(module).__name__}: experts with {', '.join(sorted(fused))} are not supported by moe_lora")
    return Layout.of(module)


def adaptable(layer: nn.Module, linears: bool, norms: bool) -> Iterator[tuple[nn.Module, str, str, bool]]:
    """(module, attribute, parameter's name in the layer, whether it lies as [E, I, O]) of everything in a decoder layer that
    can have an adapter."""
    for name, module in layer.named_modules():
        if (layout := experts_of(module)) is not None:
            for attribute in (layout.first, "down_proj"):
                yield module, attribute, f"{name}.{attribute}", layout.transposed
        elif isinstance(module, nn.Linear):
            if linears:
                yield module, "weight", f"{name}.weight", False
        elif norms and getattr(getattr(module, "weight", None), "ndim", 0) == 1:
            yield module, "weight", f"{name}.weight", False


def attach(owner: nn.Module, attribute: str, adapter: Adapter, turned: bool = False) -> None:
    """Let ``owner`` compute with the adapter's weights in place of its parameter ``attribute``; ``turned``: to [E, I, O].

    The weights are made when the owner is called and dropped when it returns, so that one layer's are alive at a time; a
    checkpointed layer makes them again in its backward.
    """
    dtype = getattr(owner, attribute).dtype
    del owner._parameters[attribute]
    owner.add_module(f"{attribute}_adapter", adapter)

    def make(module: nn.Module, args: Any) -> None:  # what a pre-hook returned would replace the module's arguments
        weights = adapter(dtype)
        module.__dict__[attribute] = weights.mT if turned else weights

    def drop(module: nn.Module, args: Any, out: Any) -> None:
        module.__dict__.pop(attribute, None)

    owner.register_forward_pre_hook(make)
    owner.register_forward_hook(drop, always_call=True)


def adapters_of(module: nn.Module) -> dict[str, Adapter]:
    """Every adapter in a module, by the name of the parameter that it stands in for."""
    return {found.name: found for found in module.modules() if isinstance(found, Adapter)}


# ---------------------------------------------------------------- gradient checkpointing with dynamic routing

_tape: list[Any] | None = None  # where the experts of the layer at work note their routing, or read it from
_replaying = False


@contextlib.contextmanager
def _use_tape(tape: list[Any], replay: bool) -> Iterator[None]:
    global _tape, _replaying
    before = _tape, _replaying
    _tape, _replaying = (list(tape) if replay else tape), replay
    try:
        yield
    finally:
        _tape, _replaying = before


def _route(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Hook of the experts: in the forward note which experts each token goes to, in the recomputation send it there again."""
    if _tape is None:
        return None
    if len(args) < 2:  # llama4: every expert is given a row for every token, so nothing can differ in shape
        return None
    hidden, chosen, *rest = args
    if _replaying:
        return (hidden, _tape.pop(0), *rest)
    _tape.append(chosen.detach())
    return None


def checkpoint_layer(layer: nn.Module) -> None:
    """Recompute a decoder layer in its backward, with the routing of its forward.

    A recomputation that differs by one rounding may send a token to another expert; its tensors would then not fit. The
    experts noted in the forward are used again (position p keeps the p-th routing weight).
    """
    forward = layer.forward

    def contexts() -> tuple[Any, Any]:
        tape: list[Any] = []
        return _use_tape(tape, False), _use_tape(tape, True)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)

    layer.forward = checkpointed
    for module in layer.modules():
        if any(isinstance(child, Adapter) and not child.flat for child in module.children()):
            module.register_forward_pre_hook(_route)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters as PARAMETER.a, PARAMETER.b and PARAMETER.growth, in the order of the model."""
    found = {}
    for name, adapter in adapters_of(module).items():
        for leaf in ("a", "b", "growth"):
            if getattr(adapter, leaf) is not None:
                found[f"{name}.{leaf}"] = getattr(adapter, leaf)
    return found


Maker = Callable[[str], Adapter | None]


def adapt_layer(layer: nn.Module, prefix: str, linears: bool, norms: bool, make: Maker) -> None:
    """Attach what ``make`` gives for the name of each adaptable parameter (None leaves it)."""
    for owner, attribute, local, turned in list(adaptable(layer, linears, norms)):
        adapter = make(prefix + local)
        if adapter is not None:
            attach(owner, attribute, adapter, turned)
