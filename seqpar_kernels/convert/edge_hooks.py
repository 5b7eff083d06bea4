"""Hooks at the edges of the sharded region and of modules: they cut the sequence, gather it, or show it whole."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..functional import copy_to_tensor_parallel, gather_sequence, scatter_sequence
from ..nn.deferred_sum import settled
from ..nn.region import mark_entrance, show_whole
from ..nn.sequence_view import EmbeddedRows
from ..ops.registry import in_backward
from .conversion import Conversion
from .marks import place_rows, rows_of
from .plans import STREAM_NAMES, matches
from .shard_check import Kind, is_shard, mark


def install_edge_hooks(conversion: Conversion) -> None:
    """Hook every module that has a style at its edges, and those that run on the whole sequence."""
    model = conversion.model
    for name, style in conversion.styles.items():
        if style == "replicated":
            module = model.get_submodule(name)
            module.register_forward_pre_hook(
                _gather_hook(name, conversion, partial=False), with_kwargs=True, prepend=True
            )
            module.register_forward_hook(_scatter_output_hook(name, conversion))
        elif style == "conditioning":
            model.get_submodule(name).register_forward_hook(_copied_hook(conversion))
    for pattern, arguments in conversion.plan.scattered.items():
        for name, module in model.named_modules():
            if matches(pattern, name):
                rows = _scatter_arguments_hook(arguments, conversion)
                module.register_forward_pre_hook(rows, with_kwargs=True, prepend=True)
    for name, edges in conversion.edges.items():
        module = model.get_submodule(name)
        if "rows" in edges:
            _take_rows(name, conversion)
        if "scatter_input" in edges:
            module.register_forward_pre_hook(_scatter_hook(name, conversion), with_kwargs=True, prepend=True)
        if "whole_input" in edges:
            module.register_forward_pre_hook(_whole_hook(name, conversion), with_kwargs=True, prepend=True)
        if "gather_input" in edges:
            module.register_forward_pre_hook(
                _gather_hook(name, conversion, partial=True), with_kwargs=True, prepend=True
            )
        if "gather_output" in edges:
            module.register_forward_hook(_gather_output_hook(name, conversion))


def return_to_this_forward(output: Any, conversion: Conversion) -> None:
    """Let a recomputation in the backward read the state of this forward, even after later forwards.

    The backward reaches the output of a forward before the rest of that forward, and after all later ones.
    """
    region, crossing, batch = conversion.region, conversion.crossing, conversion.batch
    seq_len, deferring, summed = region.seq_len, region.deferring, region.summed

    def hook(grad: Tensor) -> None:
        conversion.crossing, conversion.batch = crossing, batch
        region.seq_len, region.deferring = seq_len, deferring
        region.kept = summed

    for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(hook)


def _residual_stream(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The residual stream among a module's arguments, and a function that gives (args, kwargs) with another one."""
    if args and isinstance(args[0], Tensor):
        return settled(args[0]), lambda x: ((x, *args[1:]), kwargs)
    key = next((key for key in STREAM_NAMES if isinstance(kwargs.get(key), Tensor)), None)
    if key is not None:
        return settled(kwargs[key]), lambda x: (args, {**kwargs, key: x})
    raise RuntimeError(
        f"{name}: the plan found no tensor at its entrance: no first argument, hidden_states=, x= or input="
    )


def _scatter_hook(name: str, conversion: Conversion) -> Callable[..., Any]:
    region = conversion.region

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if region.group is None:
            return None
        x, rebuilt = _residual_stream(name, args, kwargs)
        if is_shard(x) and conversion.check is not None:
            raise RuntimeError(f"{name}: 'scatter_input' was given a sequence shard: the plan scatters twice")
        if conversion.watch is not None and not torch.compiler.is_compiling():
            if conversion.watch.stage is None and torch.is_grad_enabled() and not in_backward():
                raise RuntimeError(_unwatched(name, conversion))
            conversion.watch.cut(name)
        length = x.shape[region.seq_dim]
        if not conversion.running and not torch.compiler.is_compiling() and not in_backward():
            # An inner model is called on its own: the settings of the last whole forward do not hold for it.
            conversion.crossing, region.deferring, region.summed = False, None, {}
        # None where it is not needed: a recomputation must not find the length of a later forward.
        region.seq_len = length if length % region.ranks else None
        conversion.batch = tuple(x.shape[:-2]) if region.seq_dim in (-2, x.dim() - 2) else ()
        shard = x.rows() if isinstance(x, EmbeddedRows) else scatter_sequence(x, region.group, region.seq_dim)
        if torch.compiler.is_compiling() and conversion.compiled:
            # Not before the model: torch.compile traces the hooks of the outermost module as graphs of their own.
            region.sum_together(conversion.replicated)
        elif not torch.compiler.is_compiling():
            mark_entrance(shard)
            if conversion.watch is not None:
                conversion.watch.entered_by(shard)
        if conversion.check is not None:
            conversion.check.rules.length = length
            mark(shard, Kind.SHARD)
        return rebuilt(shard)

    return hook


def _unwatched(name: str, conversion: Conversion) -> str:
    (gathers,) = conversion.edges_at("gather_output")
    together = " and ".join(gathers) or "the place where the sequence is put together"
    return (
        f"{name}: the sequence is cut in no forward of the model (but in a loop over its layers, say). Nothing would "
        "be checked there, and gradients might be parts of a sum. Call the model, or a module inside that holds "
        f"{name} and {together}. Write a loop of your own into the forward of such a module before parallelize. "
        "Without gradients (torch.no_grad()) the loop runs"
    )


def _scatter_arguments_hook(names: tuple[str, ...], conversion: Conversion) -> Callable[..., Any]:
    region = conversion.region

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if region.group is None:
            return None
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        for name in names:
            if isinstance(call.arguments.get(name), Tensor):
                call.arguments[name] = scatter_sequence(call.arguments[name], region.group, region.seq_dim)
                if conversion.check is not None:
                    mark(call.arguments[name], Kind.SHARD)
        return call.args, call.kwargs

    return hook


def _whole_hook(name: str, conversion: Conversion) -> Callable[..., Any]:
    region = conversion.region

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if region.group is None:
            return None
        x, rebuilt = _residual_stream(name, args, kwargs)
        stand_in = show_whole(x, region)
        if conversion.check is not None:
            mark(stand_in, Kind.SHARD)
        return rebuilt(stand_in)

    return hook


def _take_rows(name: str, conversion: Conversion) -> None:
    """Let a module take the shard's rows as [B * S/t, H] too: its layers are given [B, S/t, H]."""
    region, module = conversion.region, conversion.model.get_submodule(name)
    flat: list[Tensor] = []  # the input of the forward under way

    def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat.clear()
        if region.group is None:
            return None
        x, rebuilt = _residual_stream(name, args, kwargs)
        if x.dim() != 2 or not conversion.batch:
            return None
        flat.append(x)
        rows = x.unflatten(0, (*conversion.batch, -1))
        if conversion.check is not None:
            mark(rows, Kind.SHARD)
        return rebuilt(rows)

    def leaving(module: nn.Module, args: Any, output: Any) -> Any:
        if not flat:
            return None
        out = settled(output).flatten(0, -2)
        if conversion.check is not None:
            mark(out, Kind.SHARD)
            place_rows(out, rows_of(flat[0], region.seq_dim))
        flat.clear()
        return out

    module.register_forward_pre_hook(entering, with_kwargs=True, prepend=True)
    module.register_forward_hook(leaving)


def _gather_hook(name: str, conversion: Conversion, partial: bool) -> Callable[..., Any]:
    """Gather the input. With ``partial`` each rank computes a part of its gradient, else the whole."""
    region = conversion.region

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if region.group is None:
            return None
        x, rebuilt = _residual_stream(name, args, kwargs)
        if conversion.check is not None and not is_shard(x):
            raise RuntimeError(f"{name}: its input is to be gathered, but is no sequence shard")
        if conversion.check is not None:
            conversion.check.rules.placed(name, x)
        whole = gather_sequence(
            x, region.group, region.seq_dim, seq_len=region.seq_len, tensor_parallel_output_grad=partial
        )
        if conversion.check is not None:
            mark(whole, Kind.PARTS if partial else None)
        return rebuilt(whole)

    return hook


def _gather_output_hook(name: str, conversion: Conversion) -> Callable[..., Any]:
    region = conversion.region

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        loss = conversion.loss if conversion.loss is not None and conversion.loss.hides else None
        if region.group is None and loss is None:
            return None
        if conversion.watch is not None and not torch.compiler.is_compiling():
            conversion.watch.gather(name)
        first, rebuilt = _first_tensor(name, "gather_output", output)
        if conversion.watch is not None and not torch.compiler.is_compiling():
            conversion.watch.judge_leaves(name, first)
        if conversion.check is not None:
            conversion.check.rules.leaves_region(name, first)
        if loss is not None:
            whole = loss.hide(first)
        else:
            # What follows runs on every rank alike. Each has the whole gradient, and the backward cuts it.
            whole = gather_sequence(
                first, region.group, region.seq_dim, seq_len=region.seq_len, tensor_parallel_output_grad=False
            )
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # it may be the output of an inner model
                return_to_this_forward(whole, conversion)
        if torch.compiler.is_compiling():
            region.summed = {}  # a tensor left there becomes an output of the graph
        if conversion.check is not None:
            mark(whole, None)
        return rebuilt(whole)

    return hook


def _scatter_output_hook(name: str, conversion: Conversion) -> Callable[..., Any]:
    region = conversion.region

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if region.group is None:
            return None
        whole, rebuilt = _first_tensor(name, "replicated", output)
        shard = scatter_sequence(whole, region.group, region.seq_dim)
        if conversion.check is not None:
            mark(shard, Kind.SHARD)
        return rebuilt(shard)

    return hook


def _copied_hook(conversion: Conversion) -> Callable[..., Any]:
    """Sum the gradient of a module's output over the ranks: each meets it with its own shard."""
    group = conversion.region.group

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        def copied(leaf: Any) -> Any:
            return (
                copy_to_tensor_parallel(leaf, group) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            )

        if group is None:
            return None
        out = tree_map(copied, output)
        if conversion.check is not None:
            mark(out, Kind.COPIED)
        return out

    return hook


def _first_tensor(name: str, style: str, output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor a module returns, alone or first of a tuple, and a function that gives the output with another one."""
    first = settled(output[0] if isinstance(output, tuple) and output else output)
    if not isinstance(first, Tensor):
        raise RuntimeError(
            f"{name}: {style!r} takes a module that returns a tensor or a tuple that begins with one, "
            f"got {type(first).__name__}"
        )
    return first, lambda x: (x, *output[1:]) if isinstance(output, tuple) else x
