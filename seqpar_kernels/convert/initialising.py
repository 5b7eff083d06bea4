"""Initialisation after conversion: draws the whole weight, as a run on one rank does, and keeps this rank's part.

``module.reset_parameters()`` and ``model.apply(fn)`` of a converted model call the function with the module as it was
before, with weights of the whole shape. Each rank then keeps its part.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.sharding import ShardSpec, local_part
from .conversion import Conversion
from .drawn import DrawsWhole
from .dtensor_params import Cut


def initialise_whole(model: nn.Module, originals: Mapping[str, nn.Module], conversion: Conversion) -> None:
    """Give the converted modules of ``model`` their ``apply`` and ``reset_parameters``.

    ``originals``: name -> the module before the conversion; the same module where only its parameters were cut.
    """
    for name, module in model.named_modules():
        original = originals.get(name)
        cut = getattr(module, "sharded", {})
        if original is None or not module._parameters or not (cut or original is not module):
            if module._modules:
                vars(module)["apply"] = types.MethodType(_applied_around, module)
            continue
        twin = Twin(module, original, conversion)
        vars(module)["apply"] = types.MethodType(_applied, twin)
        reset = getattr(original, "reset_parameters", None)
        if reset is not None or type(original).__name__ == "Conv1D":
            vars(module)["reset_parameters"] = types.MethodType(_reset, twin)


class Twin:
    """A converted module, and the original one, which borrows parameters of the whole shape."""

    def __init__(self, module: nn.Module, original: nn.Module, conversion: Conversion):
        self.module, self.original, self.region = module, original, conversion.region

    @property
    def sharded_further(self) -> bool:
        """Whether fully_shard has replaced the parameters."""
        return any(type(part) is not nn.Parameter for _, part, _ in self._parts())

    def _parts(self) -> Iterator[tuple[str, Tensor, ShardSpec | None]]:
        held = self.module._parameters
        sharded = getattr(self.module, "sharded", {})
        for key in list(held):
            part = held[key]  # indexing gives the plain parameter, listing a DTensor
            if part is not None and key in self.original._parameters:
                yield key, part, sharded.get(key)

    @torch.no_grad()
    def initialise(self, fn: Callable[[nn.Module], Any]) -> None:
        """Call ``fn`` with the original and whole parameters, and keep this rank's part of them.

        Entries that this rank does not hold are NaN before, which shows a function that computes with old values.

        Raises:
            RuntimeError: ``fn`` did so, or gave a parameter another shape, or ``fully_shard`` has been applied.
        """
        original, name = self.original, type(self.original).__name__
        before = original._parameters
        lent: dict[str, nn.Parameter] = {}
        if self.sharded_further:
            raise RuntimeError(f"{name}: cannot be initialised after fully_shard; initialise before")
        parts = list(self._parts())
        for key, part, spec in parts:
            whole = part.detach().clone()
            if spec is not None:
                cut = Cut.of(part, spec, self.region.ranks, self.region.rank)
                whole = part.new_full(cut.shape, float("nan"))
                for piece in cut.pieces():
                    mine = part.detach().narrow(spec.dim, piece.local, piece.length)
                    whole.narrow(spec.dim, piece.whole, piece.length).copy_(mine)
            lent[key] = nn.Parameter(whole, requires_grad=part.requires_grad)
            vars(lent[key]).update({k: v for k, v in vars(part).items() if not k.startswith("_seqpar")})
        original.__dict__["_parameters"] = {**dict.fromkeys(dict.keys(before)), **lent}
        try:
            fn(original)
            given = {key: original._parameters[key] for key in lent}
        finally:
            original.__dict__["_parameters"] = before
        for key, part, spec in parts:
            new = given[key]
            if new is None or new.shape != lent[key].shape:
                raise RuntimeError(f"{name}.{key}: expected to stay {tuple(lent[key].shape)}, got {new!r}")
            mine = new.detach() if spec is None else local_part(new, spec, self.region.group)
            if spec is not None and bool(mine.isnan().any()) and not bool(part.isnan().any()):
                raise RuntimeError(
                    f"{name}.{key}: the function computes with the old values of the whole weight, of which each rank "
                    "of a converted model holds a part; apply it before parallelize"
                )
            if not torch.equal(part, mine):  # a tensor's version does not tell: much is written through .data
                part.copy_(mine)


def _applied(twin: Twin, fn: Callable[[nn.Module], Any]) -> nn.Module:
    """Take the place of ``nn.Module.apply``: call ``fn`` with the module, and with the original."""
    module = twin.module
    for child in module.children():
        child.apply(fn)
    if twin.sharded_further:
        fn(module)
        return module
    if module is twin.original:
        twin.initialise(fn)
        return module
    state = torch.get_rng_state()
    device = next((part.device for _, part, _ in twin._parts()), torch.device("cpu"))
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    fn(module)
    torch.set_rng_state(state)  # only the draws with the original count
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
    twin.initialise(fn)
    return module


def _applied_around(module: nn.Module, fn: Callable[[nn.Module], Any]) -> nn.Module:
    """Take the place of ``nn.Module.apply`` of modules that may initialise parameters of their children."""
    for child in module.children():
        child.apply(fn)
    with DrawsWhole():
        fn(module)
    return module


def _reset(twin: Twin) -> None:
    """Take the place of the original's ``reset_parameters``."""

    def reset(original: Any) -> None:
        if hasattr(original, "reset_parameters"):
            original.reset_parameters()
            return
        nn.init.normal_(original.weight, std=0.02)  # as the constructor of Conv1D does
        nn.init.zeros_(original.bias)

    twin.initialise(reset)
