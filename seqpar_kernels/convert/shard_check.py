"""Follows the sequence shard through the first forward of a converted model.

A shard that reaches a parameter outside the plan gives that parameter a partial gradient on every rank, and a forward
that looks right: the commonest silent bug of sequence parallelism. So tensors are marked at the entrance, every torch
function passes the mark on, and a parameter (or what was computed from one), a dropout or a model output that meets a
mark where none is planned is an error that names it. Costs one slow forward per mode (training, evaluation); later
forwards pay nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..nn.own_forward import follow
from .foreign import Functions, described, leaf_behind, see, statement, trainable_inputs
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


#: Mark of what is computed from parameters whose gradients the conversion sums over the ranks.
OWNED = object()


def mark(value: Any, kind: Any) -> None:
    """Say of every tensor in ``value`` what it is: a Kind, None for whole, OWNED, or the parameter it comes from."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            setattr(leaf, _MARK, kind)
            if not isinstance(kind, str):
                see(leaf)


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

    ``owned`` maps modules that the conversion made or prepared to (name, the style that handles their input). Their own
    forwards are trusted, and nothing else: not what hooks, wrappers and patched forwards add around them. Parameters in
    ``planned`` may meet marked tensors anywhere.
    """

    def __init__(
        self,
        model: nn.Module,
        owned: Mapping[nn.Module, tuple[str, str]],
        planned: frozenset[str],
        inside: Callable[[], bool] = lambda: True,
    ):
        super().__init__()
        self._model = model
        self._owned = owned
        self._covered = planned
        # id -> (the parameter, its name); held here, for an id is another tensor's as soon as its owner is gone.
        self._named: dict[int, tuple[nn.Parameter, str]] = {}
        self._allowed: dict[int, nn.Parameter] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            part = part_of(param)
            if isinstance(part, nn.Parameter):
                if name in planned:
                    self._allowed[id(part)] = part
                else:
                    self._named[id(part)] = part, name
        self._lent = [self._lent_now("", model)]
        self._stack: list[str] = []
        self._trusted = 0  # depth inside forwards of modules the conversion owns
        self._summed = 0  # depth inside modules that were left as they are, and whose parameters' gradients are summed
        self._ran: set[nn.Module] = set()
        self._inside = inside  # whether the sequence is cut now
        self.entered: set[nn.Module] = set()  # modules called where it was
        self.used: set[Any] = set()  # ids and names of parameters outside the plan used where it was
        self._handles: list[RemovableHandle] = []
        self._arguments: list[Tensor] = []  # those that are trained
        self._functions = Functions(self._applied)

    def start(self, entrance: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Hook every module and follow torch functions from here on, in the forward of ``entrance``, under way."""
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
        follow(self)
        self.__enter__()

    def stop(self) -> None:
        """Take the hooks off; may be called twice."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._functions.stop()
            for leaf in self._arguments:  # they are the user's
                vars(leaf).pop(_MARK, None)
            self._arguments.clear()
            follow(None)
            self.__exit__(None, None, None)

    def check_output(self, output: Any) -> None:
        """Raises RuntimeError where a model output is still a shard."""
        items = output.items() if isinstance(output, dict) else [("", output)]
        if is_shard([value for key, value in items if key != "past_key_values"]):
            raise RuntimeError(
                f"{type(self._model).__name__} returns a sequence shard: the plan has no 'gather_output' between the "
                "last sharded module and the output (hidden states and other by-products are shards too)"
            )

    def _entering(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(name)
            self._ran.discard(module)
            if self._inside():
                self.entered.add(module)

        return hook

    def _lending(self, name: str) -> Callable[..., None]:
        """Behind the hook with which fully_shard gathers parameters."""

        def hook(module: nn.Module, args: Any) -> None:
            if isinstance(module, FSDPModule):
                self._lent.append(self._lent_now(name, module))

        return hook

    def _left(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if module not in self._owned or module in self._ran or torch.compiler.is_compiling():
                return
            if self._owned[module][1] != "replicated":
                raise RuntimeError(self._replaced(module, vars(module).get("forward", type(module).forward)))

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:
            self._stack.pop()
        if isinstance(module, FSDPModule) and len(self._lent) > 1:
            self._lent.pop()

    def own(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The forward of a module that the conversion made; any other of this package's is a module like any."""
        if module not in self._owned or self._trusted:
            return forward(module, *args, **kwargs)
        name, style = self._owned[module]
        self._ran.add(module)
        self._check_parts(module, name)
        self._check_input(name, style, args, kwargs)
        with self.trusted():
            out = forward(module, *args, **kwargs)
        mark(out, EXPECTED[style][1])
        return out

    def summed(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, tensors: Mapping[str, Tensor]
    ) -> Any:
        """The forward of a module that was left as it is, with ``tensors`` in place of its parameters."""
        if module not in self._owned or self._trusted:
            return forward(*args, **kwargs)
        name, style = self._owned[module]
        self._ran.add(module)
        whole = style != "own_parameters"
        if whole:
            self._check_input(name, style, args, kwargs)
        plain = {id(t): t for t in tensors.values() if isinstance(t, nn.Parameter) and id(t) not in self._allowed}
        mark(tensors, OWNED)
        self._allowed.update(plain)
        self._summed += whole
        try:
            out = forward(*args, **kwargs)
        finally:
            self._summed -= whole
            for key in plain:
                del self._allowed[key]
        if whole:
            mark(out, EXPECTED[style][1])
        return out

    @contextmanager
    def trusted(self) -> Iterator[None]:
        """Nothing is followed inside."""
        self._trusted += 1
        try:
            yield
        finally:
            self._trusted -= 1

    def _check_input(self, name: str, style: str, args: Any, kwargs: Any) -> None:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._summed or not leaves:
            return
        wanted, got = EXPECTED[style][0], _kind(leaves[0])
        source = next((s for leaf in leaves if (s := self._source(leaf, True)) is not None), None)
        if got is not wanted if wanted is not None else got is Kind.SHARD:
            takes = "the whole sequence" if wanted is None else wanted.value
            came = "the whole sequence" if got is None else got.value
            origin = f", computed from {self._called(source)}" if source is not None else ""
            raise RuntimeError(f"{name}: the plan says {style!r}, which takes {takes}, but its input is {came}{origin}")
        if source is not None:
            raise RuntimeError(self._missed(source, Kind.PARTS if got is None else got))

    def _check_parts(self, module: nn.Module, name: str) -> None:
        """A converted module computes with parameters of its own: none computed by a parametrization or a hook."""
        for child in ("weight", "bias"):
            if getattr(type(module), child, None) is not None or isinstance(vars(module).get(child), Tensor):
                raise RuntimeError(
                    f"{name}: {child!r} is computed from other tensors (a parametrization, weight_norm or an adapter) "
                    "since parallelize, and their gradients would be a different part of the sum on every rank. "
                    "Apply it before parallelize and remove or merge it (parametrize.remove_parametrizations), or "
                    "leave this module out of it"
                )

    def _replaced(self, module: nn.Module, forward: Any) -> str:
        name, style = self._owned[module]
        function = getattr(forward, "__func__", forward)
        what = f"{getattr(function, '__qualname__', function)} of {getattr(function, '__module__', '?')}"
        return (
            f"{name}: its forward has been replaced by {what} since parallelize, which does not do what the style "
            f"{style!r} needs: gradients would be a different part of the sum on every rank. Leave this module out of "
            "the patch (of use_liger_kernel, liger_kernel_config={'rms_norm': False}, say), or patch before parallelize"
        )

    def _applied(self, function: type, args: Any, call: Callable[[], Any]) -> Any:
        """An autograd function: torch function modes see what it does in Python, not its arguments."""
        if self._trusted or not self._handles or self not in _get_current_function_mode_stack():
            return call()
        leaves = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if function.__module__.startswith("seqpar_kernels."):
            return call()
        if function.__module__.startswith("torch."):
            out = call()
            found = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
            if len(found) == len(leaves):  # identities, of backward hooks and fully_shard
                for before, after in zip(leaves, found, strict=True):
                    if hasattr(before, _MARK) and not hasattr(after, _MARK):
                        mark(after, getattr(before, _MARK))
            return out
        kind, source = self._judged(function, leaves)
        out = call()
        for leaf in tree_leaves(out):
            if not hasattr(leaf, _MARK):
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
        if kind is Kind.SHARD and not self._summed and func in _DROPOUTS and self._drops(args, kwargs):
            raise RuntimeError(
                f"{self._where()}: dropout on a sequence shard that the plan does not know: its mask would depend on "
                f"how the sequence is cut. Give it the style 'dropout', or set its probability to 0"
            )
        out = func(*args, **kwargs)
        if isinstance(out, (Tensor, tuple, list)):
            self._note(out, kind, source)  # 0-d results (a mean, say) are partial too
        return out

    def _where(self) -> str:
        return self._stack[-1] if self._stack else type(self._model).__name__

    def _judged(self, func: Any, leaves: Sequence[Tensor]) -> tuple[Any, str | None]:
        """What a result of ``leaves`` is, and a trainable outside the plan that it is computed from.

        Raises:
            RuntimeError: a shard or this rank's heads meet such a trainable, or each other.
        """
        kinds = {kind for leaf in leaves if (kind := _kind(leaf)) is not None}
        owned = any(getattr(leaf, _MARK, None) is OWNED for leaf in leaves)
        met = bool(kinds) or bool(self._summed and owned)
        source = next((name for leaf in leaves if (name := self._source(leaf, met)) is not None), None)
        if len(kinds) > 1 and not self._summed:
            raise RuntimeError(
                f"{self._where()}: {getattr(func, '__name__', func)} takes a sequence shard and a tensor-parallel "
                "tensor; between the two there must be a 'colwise' or 'rowwise' module"
            )
        kind = kinds.pop() if kinds else None
        if met and source is not None:
            raise RuntimeError(self._missed(source, kind or Kind.PARTS))
        return kind or (OWNED if owned else None), source

    @staticmethod
    def _note(out: Any, kind: Any, source: str | None) -> None:
        if source is None:
            if kind is not None:
                mark(out, kind)
            return
        graded = torch.is_grad_enabled()
        for leaf in tree_leaves(out):  # only what has a gradient, or would have
            if isinstance(leaf, Tensor) and (leaf.requires_grad if graded else leaf.is_floating_point()):
                mark(leaf, source)

    def _source(self, leaf: Tensor, met: bool) -> str | None:
        """The trainable tensor outside the plan that ``leaf`` is, or was computed from."""
        found = getattr(leaf, _MARK, None)
        if found is not None:
            trained = leaf.requires_grad or not torch.is_grad_enabled()
            return found if isinstance(found, str) and trained else None
        named = self._named.get(id(leaf))
        if named is not None:
            if self._inside():
                self.used |= {id(leaf), named[1]}
            return named[1] if leaf.requires_grad else None
        if id(leaf) in self._allowed:
            return None
        if any(self._lent) and type(leaf) is Tensor and leaf.numel():
            lent = next((lent[leaf.data_ptr()] for lent in reversed(self._lent) if leaf.data_ptr() in lent), None)
            if lent is not None:
                self.used.add(lent)
                return lent or None
        if type(leaf) not in (Tensor, nn.Parameter) or not leaf.requires_grad:
            return None
        if leaf.is_leaf:
            return described(leaf)
        if met and not hasattr(leaf, _MARK) and not any(self._lent):
            behind = leaf_behind(leaf, self._allowed)
            named = None if behind is None else self._named.get(id(behind))
            return None if behind is None else described(behind) if named is None else named[1]
        return None

    def _lent_now(self, prefix: str, module: nn.Module) -> dict[int, str]:
        """Address -> name of the parameters that fully_shard has gathered for ``module``'s forward; "" if no matter.

        They are memory on loan, behind a tensor made anew at each use: no identity to know them by but the address,
        which is theirs until that forward is over.
        """
        found = {}
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for name, param in module.named_parameters(prefix, remove_duplicate=False):
                part = part_of(param)
                if type(part) is Tensor and part.numel():
                    found[part.data_ptr()] = name if name not in self._covered and param.requires_grad else ""
        return found

    def _called(self, source: str) -> str:
        return source if " " in source else f"parameter {source!r}"

    def _missed(self, source: str, kind: Kind) -> str:
        """The error: ``kind`` meets ``source``, a parameter's name or the description of a tensor."""
        at, where = statement(), self._where()
        apart = "its gradient would be a different part of the sum on every rank"
        otherwise = "Otherwise freeze it (requires_grad_(False)), or merge it into the weights before parallelize"
        if " " in source:
            return (
                f"{where}: {kind.value} meets {source} ({at}): {apart}. Hold it as a parameter of a module that the "
                f"plan gives a style that fits before parallelize: {_FITTING[kind]}; or use it where the sequence is "
                f"whole (prompt tuning in place of prefix tuning, say). {otherwise}"
            )
        module, _, child = source.rpartition(".")
        owner = next((m for m, (name, _) in self._owned.items() if name == module), None)
        if owner is not None and child in ("weight", "bias") and owner not in self._ran and "forward" in vars(owner):
            return self._replaced(owner, vars(owner)["forward"])
        add = f"Add {module!r} to the plan with a style that fits: {_FITTING[kind]}"
        if owner is not None:
            add = (
                f"It is none of the parameters that {self._owned[owner][1]!r} handles: put it into a module of its own"
            )
            add += f", and that into the plan before parallelize: {_FITTING[kind]}"
        return (
            f"{module or type(self._model).__name__}: {kind.value} reaches parameter {source!r}, which the plan does "
            f"not cover ({at}): {apart}. {add}. {otherwise}"
        )

    @staticmethod
    def _drops(args: Any, kwargs: Any) -> bool:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return bool(training) and p > 0
