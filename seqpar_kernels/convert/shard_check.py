"""Follows the sequence shard through the first forward of a converted model.

A shard that reaches a parameter outside the plan gives that parameter a partial gradient on every rank, while the
forward looks right: the most common silent bug of sequence parallelism. So tensors are marked at the entrance, and
every torch function passes the mark on. A parameter, a tensor computed from one, a dropout or a model output that meets
a mark outside of the plan is an error that names it. The check makes one forward per mode (training, evaluation) slow.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..nn.own_forward import follow
from .culprit import PACKAGE, name_of, statement
from .dropout_functions import drops
from .foreign import Functions, trainable_inputs
from .kept import Collector
from .marks import EXPECTED, MARK, OWNED, Kind, Local, Mixed, collectors, is_shard, kind_of, mark, mark_of
from .rules import REMEDY, Rules
from .trainable_errors import called, missed, replaced
from .trainables import Trainables

__all__ = ["EXPECTED", "Kind", "ShardCheck", "is_shard", "mark"]

_WHOLE = "; a module that computes from whole tensors what meets the shard (adaLN_modulation, say) takes 'conditioning'"


class ShardCheck(TorchFunctionMode):
    """Active during one forward of ``model``.

    ``owned`` maps modules that the conversion made or prepared to (name, style for their input). Their own forwards are
    trusted; hooks, wrappers and patched forwards around them are not. Parameters in ``planned`` may meet marked tensors
    anywhere. Behind the modules called ``gathers`` the sequence is whole again. ``rules`` judge calls on shards and
    heads. ``inside`` tells whether the sequence is cut now.
    """

    def __init__(
        self,
        model: nn.Module,
        owned: Mapping[nn.Module, tuple[str, str]],
        planned: frozenset[str],
        gathers: frozenset[str],
        rules: Rules,
        inside: Callable[[], bool] = lambda: True,
    ):
        super().__init__()
        self.rules, self._gathers = rules, gathers
        self._model = model
        self._owned = owned
        self._trainables = Trainables(model, planned, inside)
        self._stack = rules.stack
        self._trusted = 0  # depth in forwards of owned modules
        self._summed = 0  # depth in unchanged modules whose parameters' gradients are summed
        self._parts = 0  # depth in those of style 'tensor_parallel'
        self._ran: set[nn.Module] = set()
        self._inside = inside
        self.entered: set[nn.Module] = set()  # modules called where the sequence was cut
        self._handles: list[RemovableHandle] = []
        self._arguments: list[Tensor] = []  # arguments that are trained
        self._functions = Functions(self._applied)
        self._kept = Collector(type(model).__name__)

    def start(self, entrance: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook every module and follow torch functions, in the current forward of ``entrance``."""
        names = list(inspect.signature(entrance.forward).parameters)
        for name, module in self._model.named_modules():
            if name and module is not entrance:
                entering, lending = self._entering(name), self._lending(name)
                self._handles.append(module.register_forward_pre_hook(entering, prepend=True))
                self._handles.append(module.register_forward_pre_hook(lending))
                self._handles.append(module.register_forward_hook(self._left(name)))
                self._handles.append(module.register_forward_hook(self._leaving, always_call=True))
        for name, leaf in trainable_inputs(args, kwargs, names):
            mark(leaf, f"argument {name!r} that is trained")
            self._arguments.append(leaf)
        self._functions.start()
        # Compiled modules inside run eagerly: the check would see nothing in them.
        self._eager = torch.compiler.set_stance("force_eager")
        collectors.append(self._kept.add)
        self.rules.start()
        follow(self)
        self.__enter__()

    def stop(self) -> None:
        """Remove the hooks. A second call does nothing."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._functions.stop()
            self._eager.__exit__(None, None, None)
            collectors.remove(self._kept.add)
            self.rules.stop()
            for leaf in self._arguments:  # the user's tensors keep no mark
                vars(leaf).pop(MARK, None)
            self._arguments.clear()
            follow(None)
            self.__exit__(None, None, None)

    def check_output(self, output: Any) -> None:
        """Check the output, and follow marked tensors that outlive the forward.

        Raises:
            RuntimeError: an output is a shard, or was made of one.
        """
        items = output.items() if isinstance(output, dict) else [("", output)]
        values = [value for key, value in items if key != "past_key_values"]
        found = next((m for leaf in tree_leaves(values) if isinstance(m := mark_of(leaf), Mixed)), None)
        if found is not None:
            raise RuntimeError(f"{type(self._model).__name__} returns {found.why}. {found.remedy or REMEDY}")
        if is_shard(values):
            raise RuntimeError(
                f"{type(self._model).__name__} returns a sequence shard: the plan has no 'gather_output' between the "
                "last sharded module and the output (hidden states and other by-products are shards too)"
            )
        if any(kind_of(leaf) is Kind.COPIED for leaf in tree_leaves(values)):
            raise RuntimeError(
                f"{type(self._model).__name__} returns a tensor that has met no shard, but whose gradient is summed "
                "over the ranks ('conditioning' or copy_to_tensor_parallel): it would count once for every rank"
            )
        self._kept.close()

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(name)
            self._ran.discard(module)
            if self._inside():
                self.entered.add(module)

        return hook

    def _lending(self, name: str) -> Callable[..., None]:
        """A hook that runs behind the one with which fully_shard gathers parameters."""

        def hook(module: nn.Module, args: Any) -> None:
            if isinstance(module, FSDPModule):
                self._trainables.lend(name, module)

        return hook

    def _left(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if module not in self._owned or module in self._ran or torch.compiler.is_compiling():
                return
            if self._owned[module][1] not in ("replicated", "conditioning"):
                raise RuntimeError(replaced(*self._owned[module], vars(module).get("forward", type(module).forward)))

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            left = self._stack.pop()
            if output is None and sys.exc_info()[1] is not None:
                self.rules.failed_in = self.rules.failed_in or left
        if isinstance(module, FSDPModule):
            self._trainables.take_back()

    def own(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run and check the forward of a module that the conversion made."""
        if module not in self._owned or self._trusted:
            return forward(module, *args, **kwargs)
        name, style = self._owned[module]
        self._ran.add(module)
        self._check_parts(module, name)
        self._check_input(name, style, args, kwargs)
        with self.trusted():
            out = forward(module, *args, **kwargs)
        mark(out, EXPECTED[style][1])
        self.rules.leaving(name, style, module, args, out)
        return out

    def summed(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, tensors: Mapping[str, Tensor]
    ) -> Any:
        """Run and check the forward of an unchanged module, with ``tensors`` in place of its parameters."""
        if module not in self._owned or self._trusted:
            return forward(*args, **kwargs)
        name, style = self._owned[module]
        self._ran.add(module)
        whole, parts = style != "own_parameters", style == "tensor_parallel"
        if whole:
            self._check_input(name, style, args, kwargs)
        if style == "sequence" and not self._summed:
            with self.trusted():
                self.rules.row_by_row(name, module, forward, args, kwargs)
        mark(tensors, OWNED)
        self._summed += whole
        self._parts += parts
        try:
            with self._trainables.allowing(tensors.values()):
                out = forward(*args, **kwargs)
        finally:
            self._summed -= whole
            self._parts -= parts
        if whole:
            mark([leaf for leaf in tree_leaves(out) if not (parts and self._followed(leaf))], EXPECTED[style][1])
            self.rules.leaving(name, style, module, args, out)
        return out

    @staticmethod
    def _followed(leaf: Any) -> bool:
        """Whether the mark of ``leaf`` already tells about this rank's heads."""
        return kind_of(leaf) is Kind.PARTS or isinstance(mark_of(leaf), Mixed)

    @contextmanager
    def trusted(self) -> Iterator[None]:
        """Inside, nothing is followed."""
        self._trusted += 1
        try:
            yield
        finally:
            self._trusted -= 1

    def _check_input(self, name: str, style: str, args: Any, kwargs: Any) -> None:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._summed or not leaves:
            return
        wanted, got = EXPECTED[style][0], kind_of(leaves[0])
        self.rules.entering(name, style, name in self._gathers, leaves[0])
        source = next((s for leaf in leaves if (s := self._trainables.source(leaf, True)) is not None), None)
        if got is not wanted if wanted is not None else got is Kind.SHARD:
            takes = "the whole sequence" if wanted is None else wanted.value
            came = "the whole sequence" if got is None else got.value
            origin = f", computed from {called(source)}" if source is not None else ""
            hint = _WHOLE if style == "sequence" and got is None else ""
            raise RuntimeError(
                f"{name}: the plan says {style!r}, which takes {takes}, but its input is {came}{origin}{hint}"
            )
        if source is not None:
            raise RuntimeError(self._missed(leaves, source, Kind.PARTS if got is None else got))

    def _check_parts(self, module: nn.Module, name: str) -> None:
        """Refuse a converted module whose weight or bias is computed by a parametrization or a hook."""
        for child in ("weight", "bias"):
            if getattr(type(module), child, None) is not None or isinstance(vars(module).get(child), Tensor):
                raise RuntimeError(
                    f"{name}: {child!r} is computed from other tensors (a parametrization, weight_norm or an adapter) "
                    "since parallelize, and their gradients would be a different part of the sum on every rank. "
                    "Apply it before parallelize and remove or merge it (parametrize.remove_parametrizations), or "
                    "leave this module out of it"
                )

    def _applied(self, function: type, args: Any, call: Callable[[], Any]) -> Any:
        """Check a call of an autograd function, whose arguments torch function modes do not see."""
        if self._trusted or not self._handles or self not in _get_current_function_mode_stack():
            return call()
        leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if function.__module__.startswith("seqpar_kernels."):
            return call()
        if function.__module__.startswith("torch."):
            out = call()
            found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            alike = [leaf.shape for leaf in leaves] == [leaf.shape for leaf in found]
            if alike:  # identities of backward hooks and fully_shard; custom ops have functions of torch too
                for before, after in zip(leaves, found, strict=True):
                    if hasattr(before, MARK) and not hasattr(after, MARK):
                        mark(after, mark_of(before))
            return out
        kind, source = self._judged(function, leaves)
        out = call()
        for leaf in tree_leaves(out):
            if not hasattr(leaf, MARK):
                self._note(leaf, kind, source)
        return out

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._trusted:
            return func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        kind, source = self._judged(func, leaves)
        noted = next((m for leaf in leaves if isinstance(m := mark_of(leaf), (Mixed, Local))), None)
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):  # a call by this package is trusted
            out = func(*args, **kwargs)
            self._note(out, kind if noted is None else noted, source)
            return out
        if self._parts:
            out = self.rules.inside(func, args, kwargs, leaves)
            if (kind is not None or source is not None) and kind is not Kind.PARTS and noted is None:
                self._note(out, kind, source)
            return out
        if self._summed:  # 'sequence': the module is tried as a whole
            out = func(*args, **kwargs)
            self._note(out, kind, source)
            return out
        marked = kind if isinstance(kind, Kind) else None
        if marked is None and (noted is None or source is not None):
            return self._on_whole(func, args, kwargs, leaves, kind, source)
        if marked is Kind.SHARD and drops(func, args, kwargs):
            raise RuntimeError(
                f"{self._where()}: dropout on a sequence shard that the plan does not know: its mask would depend on "
                f"how the sequence is cut. Give it the style 'dropout', or set its probability to 0. It is in "
                f"{statement()}"
            )
        return self.rules.call(func, args, kwargs, leaves, marked)

    def _on_whole(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: dict[str, Any],
        leaves: list[Tensor],
        kind: Any,
        source: str | None,
    ) -> Any:
        """Call a function of tensors that are neither shards nor this rank's heads."""
        if source is not None and any(isinstance(mark_of(leaf), Mixed) for leaf in leaves):
            return self.rules.call(func, args, kwargs, leaves, None, trained=True)
        out = func(*args, **kwargs)
        local = next((m for leaf in leaves if isinstance(m := mark_of(leaf), Local)), None)
        if source is not None and local is not None and local.of == "rows":  # an embedding of positions is one
            self._note(out, Mixed(self.rules.of_positions(source, local)), None)
        elif source is None and kind is None:
            self._note(out, self.rules.made_of_counts(name_of(func), args, kwargs), None)
        else:
            self._note(out, kind, source)
        return out

    def _where(self) -> str:
        return self._stack[-1] if self._stack else type(self._model).__name__

    def _judged(self, func: Any, leaves: Sequence[Tensor]) -> tuple[Any, str | None]:
        """(mark of a result of ``leaves``, the trained tensor outside the plan that it is computed from).

        Raises:
            RuntimeError: a shard or this rank's heads meet such a trainable, or each other.
        """
        kinds = {kind for leaf in leaves if (kind := kind_of(leaf)) is not None}
        owned = any(mark_of(leaf) is OWNED for leaf in leaves)
        met = bool(kinds) or bool(self._summed and owned)
        # Ask for every leaf, because that notes it as used.
        source = next(iter([name for leaf in leaves if (name := self._trainables.source(leaf, met)) is not None]), None)
        if len(kinds) > 1:
            kinds.discard(Kind.COPIED)
        if len(kinds) > 1 and not self._summed:
            raise RuntimeError(
                f"{self._where()}: {getattr(func, '__name__', func)} takes a sequence shard and a tensor-parallel "
                "tensor; between the two there must be a 'colwise' or 'rowwise' module. It is in "
                f"{statement()}"
            )
        kind = kinds.pop() if kinds else None
        if met and source is not None:
            raise RuntimeError(self._missed(leaves, source, kind or Kind.PARTS))
        return kind or (OWNED if owned else None), source

    @staticmethod
    def _note(out: Any, kind: Any, source: str | None) -> None:
        if not isinstance(out, (Tensor, tuple, list)):
            return
        if source is None:
            # A function that returns its argument (float() of a float32) leaves what is known of that.
            if kind is not None and not (isinstance(out, Tensor) and mark_of(out) is kind):
                mark(out, kind)
            return
        graded = torch.is_grad_enabled()
        for leaf in tree_leaves(out):  # only tensors that have a gradient, or would have one
            if isinstance(leaf, Tensor) and (leaf.requires_grad if graded else leaf.is_floating_point()):
                mark(leaf, source)

    def _missed(self, leaves: Sequence[Tensor], source: str, kind: Kind) -> str:
        """The error: ``kind`` meets ``source``, a parameter's name or the description of a tensor."""
        met = [leaf for leaf in leaves if self._trainables.source(leaf, True) == source]
        as_it_is = any(isinstance(leaf, nn.Parameter) for leaf in met)
        return missed(kind, source, as_it_is, self._where(), type(self._model).__name__, self._owned, self._ran)

    @property
    def used(self) -> set[Any]:
        """ids and names of parameters outside the plan that were used where the sequence was cut."""
        return self._trainables.used
