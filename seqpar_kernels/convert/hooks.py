"""Hooks around the forward of a converted model, and of the models inside that may be called alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from ..nn.deferred_sum import settled
from ..ops.registry import in_backward
from .attention_dropout import head_dropouts
from .checked_forward import CheckedForward
from .conversion import Conversion
from .edge_hooks import return_to_this_forward

Place = tuple[nn.Module, str]  # (parent of a module, its name there)
_BY_PRODUCTS = {
    "output_hidden_states": "hidden states of a sequence-parallel model are shards",
    "output_attentions": "attention weights of a tensor-parallel model are those of this rank's heads",
}


def install_forward_hooks(conversion: Conversion) -> None:
    """Hook the whole model, and inner models, where there is a group."""
    model, region = conversion.model, conversion.region
    if region.group is None:
        return
    dropouts = list(head_dropouts(model, region))
    blocks = list(_blocks(model, conversion))
    paths = [name.split(".") for name, style in conversion.styles.items() if style == "rowwise"]
    prefixes = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
    # Rowwise layers, and the modules that hold them.
    around = [model.get_submodule(prefix) for prefix in sorted(prefixes)]
    for _, block, _ in blocks:
        block.register_forward_hook(_settle_hook(conversion))

    checking = CheckedForward(conversion)
    watch, structure = checking.watch, checking.structure

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        conversion.running = False
        cleanup(module)  # an interrupted forward may have left state
        region.seq_len, conversion.running = None, True
        conversion.compiled = torch.compiler.is_compiling()
        if not torch.compiler.is_compiling():  # both stay set: a recomputation in the backward must do the same
            conversion.crossing = conversion.trusted and all(_is_plain(*block) for block in blocks)
            # The autograd function behind backward hooks would take a deferred sum for a leaf.
            served = _hooked_everywhere() or any(m._backward_hooks or m._backward_pre_hooks for m in around)
            region.deferring = None if served else torch.is_grad_enabled()
        config = getattr(module, "config", None)
        for asked, what in _BY_PRODUCTS.items():
            if kwargs.get(asked, getattr(config, asked, False)):
                raise ValueError(f"{asked}: expected False, the {what}")
        if not torch.compiler.is_compiling():
            region.sum_together(conversion.replicated)
        if torch.compiler.is_compiling() or inside_compile():
            if not conversion.trusted and module.training not in conversion.checked:
                raise RuntimeError(
                    "a plan is checked by the first forward, which must be an eager one: call the model once before "
                    "torch.compile"
                )
            structure.refuse_changes()
            return
        checking.start(module, args, kwargs)

    def finished(module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        checking.close(output)
        if torch.is_grad_enabled():
            return_to_this_forward(output, conversion)
        conversion.running = False

    def cleanup(module: nn.Module, *_: Any) -> None:
        # A forward that has not finished raises. Otherwise the error being handled is not its own.
        failed, conversion.running = conversion.running, False
        if torch.compiler.is_compiling():
            region.summed = {}
        else:
            watch.end()
        if region.summed:  # kept, like seq_len, for a recomputation in the backward
            region.kept, region.summed = region.summed, {}
        for gather in conversion.gathers:
            gather.clear()
        for dropout in dropouts:
            dropout.restore()
        checking.give_up(failed)

    _hook_inner_models(model, checking)
    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(finished)
    model.register_forward_hook(cleanup, always_call=True)


def _hook_inner_models(model: nn.Module, checking: CheckedForward) -> None:
    """Check calls of inner models, which may be called without the whole one."""
    watch = checking.watch
    under: list[nn.Module] = []  # the module of the current call

    def entered(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or inside_compile() or in_backward():
            return
        if watch.stage is None:
            under[:] = [module]
            checking.start(module, args, kwargs)

    def left(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and under and under[0] is module:
            checking.close(output)
            under.clear()
            watch.end()

    def left_always(module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and under and under[0] is module:
            under.clear()
            watch.end()
            checking.give_up(failed=True)

    for inner in _around_region(model, *checking.ends):
        inner.register_forward_pre_hook(entered, with_kwargs=True)
        inner.register_forward_hook(left)
        inner.register_forward_hook(left_always, always_call=True)


def _around_region(model: nn.Module, cuts: list[str], gathers: list[str]) -> Iterator[nn.Module]:
    """Yield modules inside ``model`` that hold every place where the sequence is cut and gathered."""
    for name, module in model.named_modules():
        if name and cuts and gathers and all(edge.startswith(f"{name}.") for edge in (*cuts, *gathers)):
            yield module


def _hooked_everywhere() -> bool:
    return bool(module_hooks._global_backward_hooks or module_hooks._global_backward_pre_hooks)


def inside_compile() -> bool:
    """Whether torch.compile runs this frame eagerly but compiles those it calls; a check would see half of them."""
    return callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def _blocks(model: nn.Module, conversion: Conversion) -> Iterator[tuple[Place, nn.Module, tuple[type, Any]]]:
    """Yield (place, module, its forward) of modules that hold a norm and, at any depth, a rowwise layer."""
    rows = [name for name, style in conversion.styles.items() if style == "rowwise"]
    norms = {name.rpartition(".")[0] for name, style in conversion.styles.items() if style == "norm"}
    for name in sorted(norms - {""}):
        if any(row.startswith(name + ".") for row in rows):
            block = model.get_submodule(name)
            parent, _, child = name.rpartition(".")
            yield (model.get_submodule(parent), child), block, _forward_of(block)


def _forward_of(block: nn.Module) -> tuple[type, Any]:
    return type(block), vars(block).get("forward")


def _is_plain(place: Place, block: nn.Module, forward: tuple[type, Any]) -> bool:
    """Whether ``block`` is as converted: not wrapped, sharded further, compiled or checkpointed."""
    parent, name = place
    in_place = getattr(parent, name, None) is block and _forward_of(block) == forward
    in_place = in_place and block._compiled_call_impl is None
    return in_place and not getattr(block, "gradient_checkpointing", False)


def _settle_hook(conversion: Conversion) -> Callable[..., Any]:
    """Compute the deferred sums in a block's output, unless the norm of the next block may do so.

    That holds between blocks of a proven model only. Checkpointing and FSDP expect computed tensors.
    """

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if conversion.crossing:
            return None
        return tuple(settled(item) for item in output) if isinstance(output, tuple) else settled(output)

    return hook
