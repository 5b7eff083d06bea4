"""What runs before, between and behind the modules of a converted model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._pytree import tree_leaves, tree_map

from ..comm.coordination import agreement_of
from ..functional import copy_to_tensor_parallel, gather_sequence, scatter_sequence
from ..nn.deferred_sum import settled
from ..nn.region import mark_entrance, show_whole
from ..nn.sequence_view import EmbeddedRows
from .attention_dropout import head_dropouts
from .changes import Watch
from .compiled import Seen
from .conversion import Conversion
from .foreign import trained_arguments
from .marks import place_rows, rows_of
from .plans import STREAM_NAMES, counted, matches
from .rules import Rules
from .shard_check import Kind, ShardCheck, is_shard, mark
from .verify_offer import offer_verify

Place = tuple[nn.Module, str]  # a module's parent, and its name there
_BY_PRODUCTS = {
    "output_hidden_states": "hidden states of a sequence-parallel model are shards",
    "output_attentions": "attention weights of a tensor-parallel model are those of this rank's heads",
}


def install_hooks(conversion: Conversion) -> None:
    model, region = conversion.model, conversion.region
    unique = {id(param): param for param in conversion.replicated if param is not None}
    conversion.replicated = list(unique.values())
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
    if region.group is None:
        return
    dropouts = list(head_dropouts(model, region))
    blocks = list(_blocks(model, conversion))
    paths = [name.split(".") for name, style in conversion.styles.items() if style == "rowwise"]
    prefixes = {".".join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
    around = [model.get_submodule(prefix) for prefix in sorted(prefixes)]  # rowwise layers, and what holds them
    for _, block, _ in blocks:
        block.register_forward_hook(_settle_hook(conversion))

    ends = conversion.edges_at("scatter_input", "gather_output")
    watch = conversion.watch = Watch(model, conversion.owned, *ends)
    seen = conversion.seen = Seen(model)
    state: dict[str, Any] = {}

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        conversion.running = False
        cleanup(module)  # what an interrupted forward may have left
        region.seq_len, conversion.running = None, True
        conversion.compiled = torch.compiler.is_compiling()
        if not torch.compiler.is_compiling():  # both stay: a recomputation in the backward must do the same
            conversion.crossing = conversion.trusted and all(_is_plain(*block) for block in blocks)
            # The autograd function that serves backward hooks takes a waiting sum for a leaf.
            served = _hooked_everywhere() or any(m._backward_hooks or m._backward_pre_hooks for m in around)
            region.deferring = None if served else torch.is_grad_enabled()
        config = getattr(module, "config", None)
        for asked, what in _BY_PRODUCTS.items():
            if kwargs.get(asked, getattr(config, asked, False)):
                raise ValueError(f"{asked}: expected False, the {what}")
        if not torch.compiler.is_compiling():
            region.sum_together(conversion.replicated)
        if torch.compiler.is_compiling() or _inside_compile():
            if not conversion.trusted and module.training not in conversion.checked:
                raise RuntimeError(
                    "a plan is checked by the first forward, which must be an eager one: call the model once before "
                    "torch.compile"
                )
            seen.refuse_others()
            return
        start(module, args, kwargs)

    def start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        watch.begin(model.training)
        state["key"] = key = id(module), model.training, *trained_arguments(args, kwargs)
        if watch.unchecked(key):
            for refuse in conversion.before_check:
                refuse(conversion)
            planned = conversion.planned_parameters(model)
            rules = Rules(model, region, conversion.styles, counted(model, conversion.plan))
            conversion.check = ShardCheck(
                model, conversion.owned, planned, frozenset(ends[1]), rules, lambda: watch.stage == "cut"
            )
            watch.check()
            conversion.check.start(module, args, kwargs)

    def finished(module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        close(output)
        if torch.is_grad_enabled():
            _return_to_this_forward(output, conversion)
        conversion.running = False

    def close(output: Any) -> None:
        check = conversion.check
        if check is not None:
            check.stop()
            check.check_output(output)
            if check.rules.conclusive:
                watch.passed(state["key"], check)
                seen.remember()
                conversion.checked.add(model.training)
            conversion.check = None
        watch.finished()

    def cleanup(module: nn.Module, *_: Any) -> None:
        # Where the forward has not finished, its error is on its way; else what is handled around the call.
        failed, conversion.running = conversion.running, False
        if torch.compiler.is_compiling():
            region.summed = {}
        else:
            watch.end()
        if region.summed:  # kept, like seq_len: a recomputation in the backward needs them
            region.kept, region.summed = region.summed, {}
        for gather in conversion.gathers:
            gather.clear()
        for dropout in dropouts:
            dropout.restore()
        give_up(failed)

    def give_up(failed: bool) -> None:
        """End the check; after an error peers that do not meet it themselves shall not wait for this rank."""
        check, conversion.check = conversion.check, None
        if check is not None:
            check.stop()
        error = sys.exc_info()[1] if failed and not torch.compiler.is_compiling() else None
        if error is not None and region.group is not None:
            if check is not None:
                check.rules.note_on(error)
            offer_verify(error)
            agreement_of(region.group).stop(error)

    def entered(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or _inside_compile() or _backward():
            return
        if watch.stage is None:
            state["inner"] = module
            start(module, args, kwargs)

    def left(module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and state.get("inner") is module:
            close(output)
            state["inner"] = None
            watch.end()

    def left_always(module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and state.get("inner") is module:
            state["inner"] = None
            watch.end()
            give_up(failed=True)

    for inner in _around_region(model, *ends):  # may be called without the model around them
        inner.register_forward_pre_hook(entered, with_kwargs=True)
        inner.register_forward_hook(left)
        inner.register_forward_hook(left_always, always_call=True)
    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(finished)
    model.register_forward_hook(cleanup, always_call=True)


def _backward() -> bool:
    """Whether this is a recomputation."""
    return torch._C._current_graph_task_id() != -1


def _around_region(model: nn.Module, cuts: list[str], gathers: list[str]) -> Iterator[nn.Module]:
    """Modules inside ``model`` that hold every place where the sequence is cut and put together."""
    for name, module in model.named_modules():
        if name and cuts and gathers and all(edge.startswith(f"{name}.") for edge in (*cuts, *gathers)):
            yield module


def _hooked_everywhere() -> bool:
    return bool(module_hooks._global_backward_hooks or module_hooks._global_backward_pre_hooks)


def _return_to_this_forward(output: Any, conversion: Conversion) -> None:
    """Let what a recomputation in the backward reads be this forward's, were there others in between.

    The backward comes to an output before anything of its forward, and has done all that is later by then.
    """
    region, crossing = conversion.region, conversion.crossing
    seq_len, deferring, summed = region.seq_len, region.deferring, region.summed

    def hook(grad: Tensor) -> None:
        conversion.crossing = crossing
        region.seq_len, region.deferring = seq_len, deferring
        region.kept = summed

    for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(hook)


def _inside_compile() -> bool:
    """Whether torch.compile has given this frame up but goes on with those it calls: a check would see half of it."""
    return callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def _blocks(model: nn.Module, conversion: Conversion) -> Iterator[tuple[Place, nn.Module, tuple[type, Any]]]:
    """Modules that hold a norm and, however deep, a rowwise layer that it may follow: (place, module, its forward)."""
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
    """Whether ``block`` is called by its model as ever: not wrapped, sharded further, compiled or checkpointed."""
    parent, name = place
    in_place = getattr(parent, name, None) is block and _forward_of(block) == forward
    in_place = in_place and block._compiled_call_impl is None
    return in_place and not getattr(block, "gradient_checkpointing", False)


def _settle_hook(conversion: Conversion) -> Callable[..., Any]:
    """A sum may wait for the norm of the next block where nothing but a known model lies between; else it ends here:
    checkpointing and FSDP expect tensors that are computed."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if conversion.crossing:
            return None
        return tuple(settled(item) for item in output) if isinstance(output, tuple) else settled(output)

    return hook


def _residual_stream(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor at a module's entrance, and (args, kwargs) with another in its place."""
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
            if conversion.watch.stage is None and torch.is_grad_enabled() and not _backward():
                raise RuntimeError(_unwatched(name, conversion))
            conversion.watch.cut(name)
        length = x.shape[region.seq_dim]
        if not conversion.running and not torch.compiler.is_compiling() and not _backward():
            # A model inside is called on its own: nothing holds that the last forward of the whole one has settled.
            conversion.crossing, region.deferring, region.summed = False, None, {}
        # Only where it is needed: a recomputation during backward must not find the length of a later forward.
        region.seq_len = length if length % region.ranks else None
        conversion.batch = tuple(x.shape[:-2]) if region.seq_dim in (-2, x.dim() - 2) else ()
        shard = x.rows() if isinstance(x, EmbeddedRows) else scatter_sequence(x, region.group, region.seq_dim)
        if torch.compiler.is_compiling() and conversion.compiled:
            # Here and not before the model: torch.compile traces hooks of the outermost module as graphs of their own.
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
        f"{name}: the sequence is cut in no forward of the model, but in a loop over its layers, say: nothing would be "
        f"checked there, and gradients might be parts of a sum. Call the model, or a module inside that holds {name} "
        f"and {together}; a loop of your own belongs into the forward of such a module before parallelize. Without "
        "gradients (torch.no_grad()) it runs"
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
    """``partial``: each rank computes a part of the gradient (tensor-parallel); else each has the whole one."""
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
        loss = conversion.loss if conversion.loss is not None and conversion.loss.active else None
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
            # What follows runs alike on every rank, so each has the whole gradient: the backward splits.
            whole = gather_sequence(
                first, region.group, region.seq_dim, seq_len=region.seq_len, tensor_parallel_output_grad=False
            )
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the output of a model inside, maybe
                _return_to_this_forward(whole, conversion)
        if torch.compiler.is_compiling():
            region.summed = {}  # what is left in place becomes an output of the graph
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
    """What a module computes from whole tensors meets the shard: its gradient is summed over the ranks."""
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
    """The tensor a module returns, alone or first of a tuple, and the output with another in its place."""
    first = settled(output[0] if isinstance(output, tuple) and output else output)
    if not isinstance(first, Tensor):
        raise RuntimeError(
            f"{name}: {style!r} takes a module that returns a tensor or a tuple that begins with one, "
            f"got {type(first).__name__}"
        )
    return first, lambda x: (x, *output[1:]) if isinstance(output, tuple) else x
