"""Follows the sequence shard through the first forward of a converted model.

A shard that reaches a parameter outside the plan gives that parameter a partial gradient on every rank, and a forward
that looks right: the commonest silent bug of sequence parallelism. So tensors are marked at the entrance, every torch
function passes the mark on, and a parameter (or what was computed from one), a dropout or a model output that meets a
mark where none is planned is an error that names it. Costs one slow forward per mode (training, evaluation); later
forwards pay nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .culprit import PACKAGE, statement
from .marks import Kind, Local, Mixed, is_shard, kind_of, mark, mark_of
from .presented import part_of
from .rules import REMEDY, Rules

__all__ = ["EXPECTED", "Kind", "ShardCheck", "is_shard", "mark"]

_DROPOUTS = frozenset(
    {
        nn.functional.dropout,
        nn.functional.dropout1d,
        nn.functional.dropout2d,
        nn.functional.dropout3d,
        nn.functional.alpha_dropout,
        nn.functional.feature_alpha_dropout,
        torch.dropout,
        torch.native_dropout,
    }
)


#: style -> (what its input is, what its output is); None: anything but a shard.
EXPECTED: dict[str, tuple[Kind | None, Kind]] = {
    "colwise": (Kind.SHARD, Kind.PARTS),
    "shared_heads": (Kind.SHARD, Kind.PARTS),
    "gathered_colwise": (Kind.PARTS, Kind.PARTS),
    "rowwise": (None, Kind.SHARD),
    "norm": (Kind.SHARD, Kind.SHARD),
    "split_norm": (Kind.PARTS, Kind.PARTS),
    "dropout": (Kind.SHARD, Kind.SHARD),
    "sequence": (Kind.SHARD, Kind.SHARD),
    "tensor_parallel": (None, Kind.PARTS),
    "replicated": (None, Kind.SHARD),  # seen behind the gather
    "conditioning": (None, Kind.COPIED),
}


_FITTING = {
    Kind.SHARD: "'norm', 'colwise', 'rowwise', or 'sequence' for a module that treats rows one by one",
    Kind.PARTS: "'tensor_parallel' where every rank uses it for its own heads, or 'rowwise'",
}


_WHOLE = "; a module that computes from whole tensors what meets the shard (adaLN_modulation, say) takes 'conditioning'"


class ShardCheck(TorchFunctionMode):
    """Active during one forward of ``model``.

    ``styles`` maps module names to the style that handles their input; the parameters in ``planned`` may meet marked
    tensors outside of them; behind the modules in ``gathers`` the sequence is whole again.
    """

    def __init__(
        self,
        model: nn.Module,
        styles: dict[str, str],
        planned: frozenset[str],
        gathers: frozenset[str],
        rules: Rules,
    ):
        super().__init__()
        self.rules = rules
        self._model = model
        self._styles = styles
        self._gathers = gathers
        self._covered = planned
        # id -> (the parameter, its name); held here, for an id is another tensor's as soon as its owner is gone.
        self._named: dict[int, tuple[nn.Parameter, str]] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            part = part_of(param)
            if name not in planned and isinstance(part, nn.Parameter):
                self._named[id(part)] = part, name
        self._lent = [self._lent_now("", model)]
        self._stack = rules.stack
        self._planned = 0  # depth inside modules the plan handles
        self._inside_parts = 0  # the same, of those that compute with this rank's heads and parameters of their own
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Hook every module and follow torch functions from here on."""
        for name, module in self._model.named_modules():
            if name:
                style = self._styles.get(name)
                self._handles.append(module.register_forward_pre_hook(self._entering(name, style), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leaving(name, style), always_call=True))
        self.rules.start()
        self.__enter__()

    def stop(self) -> None:
        """Take the hooks off; may be called twice."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self.rules.stop()
            self.__exit__(None, None, None)

    def check_output(self, output: Any) -> None:
        """Raises RuntimeError where a model output is still a shard, or what was made of one."""
        items = output.items() if isinstance(output, dict) else [("", output)]
        values = [value for key, value in items if key != "past_key_values"]
        found = next((m for leaf in tree_leaves(values) if isinstance(m := mark_of(leaf), Mixed)), None)
        if found is not None:
            raise RuntimeError(f"{type(self._model).__name__} returns {found.why}. {REMEDY}")
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

    def _entering(self, name: str, style: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            if isinstance(module, FSDPModule):
                self._lent.append(self._lent_now(name, module))
            if style is None:
                return
            wanted = EXPECTED[style][0]
            first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if not self._planned and first is not None:
                got = kind_of(first)
                try:
                    self.rules.entering(name, style, name in self._gathers, first)
                except RuntimeError:
                    self._stack.pop()
                    raise
                if got is not wanted if wanted is not None else got is Kind.SHARD:
                    takes = "the whole sequence" if wanted is None else wanted.value
                    self._stack.pop()
                    raise RuntimeError(
                        f"{name}: the plan says {style!r}, which takes {takes}, "
                        f"but its input is {'the whole sequence' if got is None else got.value}"
                        + (_WHOLE if style == "sequence" and got is None else "")
                    )
            if style == "tensor_parallel":
                self._inside_parts += 1
                return
            self._planned += 1
            if style == "sequence" and self._planned == 1:
                try:
                    self.rules.row_by_row(name, module, args, kwargs)
                except RuntimeError:
                    self._planned -= 1
                    self._stack.pop()
                    raise

        return hook

    def _leaving(self, name: str, style: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._stack:
                left = self._stack.pop()
                if sys.exc_info()[1] is not None and output is None:
                    self.rules.failed_in = self.rules.failed_in or left
            if isinstance(module, FSDPModule):
                self._lent.pop()
            counter = "_inside_parts" if style == "tensor_parallel" else "_planned"
            if style is not None and getattr(self, counter):
                setattr(self, counter, getattr(self, counter) - 1)
                mark(output, None if name in self._gathers else EXPECTED[style][1])
                if not self._planned and name not in self._gathers:
                    self.rules.leaving(name, style, module, args, output)

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._planned:
            return func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if sys._getframe(1).f_code.co_filename.startswith(PACKAGE):  # our own statement: it knows what it does
            out = func(*args, **kwargs)
            passed = next((m for leaf in leaves if (m := mark_of(leaf)) is not None), None)
            if passed is not None and isinstance(out, (Tensor, tuple, list)):
                mark(out, passed)
            return out
        if self._inside_parts:
            return self.rules.inside(func, args, kwargs, leaves)
        sources = [name for leaf in leaves if (name := self._source(leaf)) is not None]
        kinds = {kind for leaf in leaves if (kind := kind_of(leaf)) is not None}
        where = self._stack[-1] if self._stack else type(self._model).__name__
        noted = any(isinstance(mark_of(leaf), (Mixed, Local)) for leaf in leaves)
        if not kinds and not (noted and not sources):
            if sources and any(isinstance(mark_of(leaf), Mixed) for leaf in leaves):
                return self.rules.call(func, args, kwargs, leaves, None, trained=True)
            out = func(*args, **kwargs)
            found: Any = sources[0] if sources else self.rules.made_of_length(args, kwargs)
            local = next((m for leaf in leaves if isinstance(m := mark_of(leaf), Local)), None)
            if sources and local is not None:  # an embedding of positions, say
                found = Mixed(self.rules.of_positions(sources[0], local))
            if found is not None and isinstance(out, (Tensor, tuple, list)):
                mark(out, found)
            return out
        if len(kinds) > 1:
            kinds.discard(Kind.COPIED)
        if len(kinds) > 1:
            raise RuntimeError(
                f"{where}: {getattr(func, '__name__', func)} takes a sequence shard and a tensor-parallel tensor; "
                f"between the two there must be a 'colwise' or 'rowwise' module. It is in {statement()}"
            )
        kind = kinds.pop() if kinds else None
        if sources and kind is not None:
            self._refuse_source(leaves, sources, kind, where)
        if kind is Kind.SHARD and func in _DROPOUTS and self._drops(args, kwargs):
            raise RuntimeError(
                f"{where}: dropout on a sequence shard that the plan does not know: its mask would depend on how the "
                f"sequence is cut. Give it the style 'dropout', or set its probability to 0. It is in {statement()}"
            )
        return self.rules.call(func, args, kwargs, leaves, kind)

    def _source(self, leaf: Tensor) -> str | None:
        """The parameter that ``leaf`` is, or was computed from outside the plan."""
        found = mark_of(leaf)
        if isinstance(found, str) and kind_of(leaf) is None:
            return found
        if id(leaf) in self._named:
            return self._named[id(leaf)][1]
        if any(self._lent) and type(leaf) is Tensor and leaf.numel():
            return next((lent[leaf.data_ptr()] for lent in reversed(self._lent) if leaf.data_ptr() in lent), None)
        return None

    def _lent_now(self, prefix: str, module: nn.Module) -> dict[int, str]:
        """Address -> name of the parameters outside the plan that fully_shard has gathered for ``module``'s forward.

        They are memory on loan, behind a tensor made anew at each use: no identity to know them by but the address,
        which is theirs until that forward is over.
        """
        found = {}
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for name, param in module.named_parameters(prefix, remove_duplicate=False):
                part = part_of(param)
                if name not in self._covered and type(part) is Tensor and part.numel():
                    found[part.data_ptr()] = name
        return found

    def _refuse_source(self, leaves: list[Tensor], sources: list[str], kind: Kind, where: str) -> None:
        """A parameter outside the plan, or what was computed from one, meets a marked tensor.

        Raises:
            RuntimeError: always.
        """
        parameter = sources[0]
        module = parameter.rpartition(".")[0] or type(self._model).__name__
        met = [leaf for leaf in leaves if self._source(leaf) == parameter]
        derived = kind is not Kind.COPIED and not any(isinstance(leaf, nn.Parameter) for leaf in met)
        outside = not f"{where}.".startswith(f"{module}.") and where != type(self._model).__name__
        if derived and outside:
            block = where if where not in self._styles else where.rpartition(".")[0]
            raise RuntimeError(
                f"{block}: {kind.value} meets a tensor that is whole on every rank and was computed from parameters "
                f"({parameter!r} among them) in {statement()}: their gradients would be a different part of the sum on "
                "every rank. Where a module of the block computes it (adaLN_modulation, say), give that module the "
                "style 'conditioning', which sums the gradient of its output over the ranks; by hand, "
                "seqpar_kernels.copy_to_tensor_parallel(tensor, group) does so; or give the whole block the style "
                f"'replicated'. A parameter that is used there alone: add {module!r} to the plan with a style that "
                "fits: " + _FITTING[kind]
            )
        if kind is Kind.COPIED:
            raise RuntimeError(
                f"{where}: {kind.value} ('conditioning', or copy_to_tensor_parallel) meets {parameter!r} in "
                f"{statement()}, and no shard: what is whole on every rank would count once for every rank. The style "
                "is for modules whose output meets the shard, and that alone"
            )
        raise RuntimeError(
            f"{module}: {kind.value} reaches parameter {parameter!r}, which the plan does not cover: its gradient "
            f"would be a different part of the sum on every rank. Add {module!r} to the plan with a style that fits: "
            f"{_FITTING[kind]}. It is in {statement()}"
        )

    @staticmethod
    def _drops(args: Any, kwargs: Any) -> bool:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return bool(training) and p > 0
