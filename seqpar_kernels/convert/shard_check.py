"""Follows the sequence shard through the first forward of a converted model.

A shard that reaches a parameter outside the plan gives that parameter a partial gradient on every rank, and a forward
that looks right: the commonest silent bug of sequence parallelism. So tensors are marked at the entrance, every torch
function passes the mark on, and a parameter (or what was computed from one), a dropout or a model output that meets a
mark where none is planned is an error that names it. Costs one slow forward per mode (training, evaluation); later
forwards pay nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .presented import part_of

_MARK = "_seqpar_shard"
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


class Kind(Enum):
    """What a marked tensor is; tensors without a mark are whole and the same on every rank."""

    SHARD = "a sequence shard"
    PARTS = "a tensor-parallel tensor"  # this rank's heads or features, or a whole tensor used for them alone


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
}


def mark(value: Any, kind: Kind | str | None) -> None:
    """Say of every tensor in ``value`` what it is: a Kind, None for whole, or the parameter it was computed from."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            setattr(leaf, _MARK, kind)


def _kind(value: Any) -> Kind | None:
    found = getattr(value, _MARK, None)
    return found if isinstance(found, Kind) else None


def is_shard(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and _kind(leaf) is Kind.SHARD for leaf in tree_leaves(value))


_FITTING = {
    Kind.SHARD: "'norm', 'colwise', 'rowwise', or 'sequence' for a module that treats rows one by one",
    Kind.PARTS: "'tensor_parallel' where every rank uses it for its own heads, or 'rowwise'",
}


class ShardCheck(TorchFunctionMode):
    """Active during one forward of ``model``.

    ``styles`` maps module names to the style that handles their input; the parameters in ``planned`` may meet marked
    tensors outside of them; behind the modules in ``gathers`` the sequence is whole again.
    """

    def __init__(self, model: nn.Module, styles: dict[str, str], planned: frozenset[str], gathers: frozenset[str]):
        super().__init__()
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
        self._stack: list[str] = []
        self._planned = 0  # depth inside modules the plan handles
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Hook every module and follow torch functions from here on."""
        for name, module in self._model.named_modules():
            if name:
                style = self._styles.get(name)
                self._handles.append(module.register_forward_pre_hook(self._entering(name, style), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leaving(name, style), always_call=True))
        self.__enter__()

    def stop(self) -> None:
        """Take the hooks off; may be called twice."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self.__exit__(None, None, None)

    def check_output(self, output: Any) -> None:
        """Raises RuntimeError where a model output is still a shard."""
        items = output.items() if isinstance(output, dict) else [("", output)]
        if is_shard([value for key, value in items if key != "past_key_values"]):
            raise RuntimeError(
                f"{type(self._model).__name__} returns a sequence shard: the plan has no 'gather_output' between the "
                "last sharded module and the output (hidden states and other by-products are shards too)"
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
                got = _kind(first)
                if got is not wanted if wanted is not None else got is Kind.SHARD:
                    takes = "the whole sequence" if wanted is None else wanted.value
                    self._stack.pop()
                    raise RuntimeError(
                        f"{name}: the plan says {style!r}, which takes {takes}, "
                        f"but its input is {'the whole sequence' if got is None else got.value}"
                    )
            self._planned += 1

        return hook

    def _leaving(self, name: str, style: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._stack:
                self._stack.pop()
            if isinstance(module, FSDPModule):
                self._lent.pop()
            if style is not None and self._planned:
                self._planned -= 1
                mark(output, None if name in self._gathers else EXPECTED[style][1])

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._planned:
            return func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = [name for leaf in leaves if (name := self._source(leaf)) is not None]
        kinds = {kind for leaf in leaves if (kind := _kind(leaf)) is not None}
        where = self._stack[-1] if self._stack else type(self._model).__name__
        if not kinds:
            out = func(*args, **kwargs)
            if sources and isinstance(out, (Tensor, tuple, list)):
                mark(out, sources[0])
            return out
        if len(kinds) > 1:
            raise RuntimeError(
                f"{where}: {getattr(func, '__name__', func)} takes a sequence shard and a tensor-parallel tensor; "
                "between the two there must be a 'colwise' or 'rowwise' module"
            )
        kind = kinds.pop()
        if sources:
            raise RuntimeError(self._missed(sources[0], kind))
        if kind is Kind.SHARD and func in _DROPOUTS and self._drops(args, kwargs):
            raise RuntimeError(
                f"{where}: dropout on a sequence shard that the plan does not know: its mask would depend on how the "
                f"sequence is cut. Give it the style 'dropout', or set its probability to 0"
            )
        out = func(*args, **kwargs)
        if isinstance(out, (Tensor, tuple, list)):
            mark(out, kind)  # 0-d results (a mean, say) are partial too
        return out

    def _source(self, leaf: Tensor) -> str | None:
        """The parameter that ``leaf`` is, or was computed from outside the plan."""
        found = getattr(leaf, _MARK, None)
        if isinstance(found, str):
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

    def _missed(self, parameter: str, kind: Kind) -> str:
        module = parameter.rpartition(".")[0] or type(self._model).__name__
        return (
            f"{module}: {kind.value} reaches parameter {parameter!r}, which the plan does not cover: its gradient "
            f"would be a different part of the sum on every rank. Add {module!r} to the plan with a style that fits: "
            + _FITTING[kind]
        )

    @staticmethod
    def _drops(args: Any, kwargs: Any) -> bool:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return bool(training) and p > 0
