"""Notices that a converted model has changed since its forward was checked.

The structure of the model and its plain attributes are compared at every eager forward; a changed model is checked
again. A flag that is held elsewhere can still bring other modules or parameters into a forward, or skip the place where
the sequence is cut. Hooks catch that where it happens. Trained tensors that are no parameters are looked for with
autograd in some of the forwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.dropout import _DropoutNd

from ..compiling import is_compiled_module
from .attributes import Attributes, alike_name
from .dtensor_params import Parameters
from .foreign import described, leaves_within, where_held
from .shard_check import ShardCheck
from .structure import Structure


class _Accessed(dict[str, Any]):
    """The parameters of a module that was added after the conversion."""

    accessed: Callable[[str, Any], Any]

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        return None if param is None else self.accessed(name, param)

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def report_access(module: nn.Module, accessed: Callable[[str, Any], Any]) -> None:
    """Let ``module`` get ``accessed(name, parameter)`` whenever it takes one of its parameters."""
    if not isinstance(module._parameters, Parameters):
        module.__dict__["_parameters"] = _Accessed(module._parameters)
    vars(module)["_parameters"].accessed = accessed


class Watch:
    """Follows the stage of every eager forward, and refuses what no checked forward has used.

    ``stage`` is None outside of a forward, "whole" before the sequence is cut, "cut", and "whole again".
    """

    def __init__(
        self,
        model: nn.Module,
        owned: dict[nn.Module, tuple[str, str]],
        structure: Structure,
        cuts: list[str],
        gathers: list[str],
    ):
        self._model, self._owned = model, owned
        self._cuts, self._gathers = cuts, gathers
        self.stage: str | None = None
        self.training = self.checking = False  # checking: this forward is checked, and the check sees more
        self._cut_by: set[str] = set()  # modules that cut the sequence in this forward
        self._cut_again: set[str] = set()  # modules that may cut it more than once: a check passed
        self._structure = structure
        self._attributes = Attributes(model)
        self._forwards = 0  # forwards with gradients since the last checked one
        self._looking = False  # whether the leaves of this forward are looked at
        self._entrances: list[Any] = []  # autograd nodes of the shards that were cut in it
        self._met: dict[int, weakref.ref[Tensor]] = {}  # leaves that a check has passed
        self._entered: dict[bool, set[str]] = {}  # training -> names of modules called where the sequence was cut
        self._used: set[Any] = set()  # ids and names of parameters outside the plan that were used there
        self._read: set[str] = set()  # names of parameters that a module at least took there
        self._guarded: set[nn.Module] = set()
        self._ends_cut: dict[bool, bool] = {}
        fed_shards = {name for name, style in owned.values() if style not in ("tensor_parallel", "own_parameters")}
        for name, module in _beside(model, cuts, fed_shards):
            module.register_forward_pre_hook(self._reached_whole(name), prepend=True)

    def unchecked(self, key: Any) -> bool:
        """Whether no forward with ``key`` has been checked of the model as it is now."""
        if self._structure.changed():
            self._attributes.forget()
        return self._attributes.unchecked(key)

    def begin(self, training: bool) -> None:
        """Begin a forward."""
        self.stage, self.training = "whole", training
        self._cut_by.clear()
        self._forwards += torch.is_grad_enabled()
        self._looking = torch.is_grad_enabled() and (self._forwards <= _FIRST or self._forwards % _EVERY == 0)

    def end(self) -> None:
        """End the forward, also after an error."""
        self.stage, self.checking = None, False
        self._entrances.clear()

    def check(self) -> None:
        """This forward is checked."""
        self._guard()
        self._attributes.check()
        self.checking, self._forwards = True, 0

    def passed(self, key: Any, check: ShardCheck) -> None:
        """Note that the check of this forward has passed."""
        entered = {alike_name(name) for name, module in self._model.named_modules() if module in check.entered}
        self._entered.setdefault(self.training, set()).update(entered)
        self._used |= check.used
        self._ends_cut[self.training] = self.stage == "cut"
        self._attributes.passed(key)
        self._structure.remember(checked=True)

    def cut(self, name: str) -> None:
        """The sequence is cut at the entrance of ``name``."""
        if self.stage is None:
            return
        if self.stage == "cut" and name in self._cut_by:
            if self.checking:
                self._cut_again.add(name)
            elif name not in self._cut_again:
                raise RuntimeError(f"{name}: 'scatter_input' was given a sequence shard: the plan scatters twice")
        self._cut_by.add(name)
        self.stage = "cut"

    def entered_by(self, shard: Tensor) -> None:
        """The sharded region begins with ``shard``."""
        if self.stage is not None and (self._looking or self.checking) and shard.grad_fn is not None:
            self._entrances.append(shard.grad_fn)

    def judge_leaves(self, name: str, shard: Tensor) -> None:
        """In some forwards, look at the trained tensors that ``shard``, gathered behind ``name``, was computed from.

        The count of forwards decides, so that all ranks look in the same one.

        Raises:
            RuntimeError: one of them is no parameter of the model, and no checked forward has used it.
        """
        if self.stage is None or not (self._looking or self.checking) or shard.grad_fn is None:
            return
        known = _parameter_ids(self._model)
        for leaf, function in leaves_within(shard, self._entrances):
            met = self._met.get(id(leaf))
            if id(leaf) in known or (met is not None and met() is leaf):
                continue
            if self.checking:
                self._met[id(leaf)] = weakref.ref(leaf)
                continue
            held = where_held(self._model, leaf)
            raise RuntimeError(
                f"{name}: {described(leaf)}{f', held by {held},' if held else ''} {_LATE} it went into {function}, and "
                f"{_PARTIAL}. Hold it as a parameter of a module that the plan gives a style that fits ('norm', "
                "'sequence', 'tensor_parallel' or 'own_parameters') before parallelize, use it where the sequence is "
                "whole, or freeze it (requires_grad_(False))"
            )

    def gather(self, name: str) -> None:
        """The sequence is gathered behind ``name``."""
        if self.stage == "whole" and self._cuts and not self.checking and not self._out_of_sight():
            raise RuntimeError(self._skipped(name))
        if self.stage is not None:
            self.stage = "whole again"

    def finished(self) -> None:
        """The forward returns.

        Raises:
            RuntimeError: the output consists of shards.
        """
        if self.stage == "cut" and not self._ends_cut.get(self.training, True):
            raise RuntimeError(
                f"{type(self._model).__name__}: the sequence was cut, but not put together again in this forward: "
                f"{' and '.join(self._gathers)}, where the plan says 'gather_output', took no part in it. Call it in "
                "every forward, or say 'gather_output' at a module that every forward calls"
            )

    def _skipped(self, name: str) -> str:
        return (
            f"{name}: the sequence has not been cut in this forward: {' and '.join(self._cuts)}, where the plan says "
            "'scatter_input', took no part in it (skipped, pruned or replaced). Prune before parallelize; where a "
            "forward may skip it, say 'scatter_input' at a module that every forward calls before (a dropout behind "
            "the embedding, say)"
        )

    def _out_of_sight(self) -> bool:
        """Whether the sequence may have been cut inside a module that is compiled by itself."""
        for cut in self._cuts:
            module: Any = self._model
            for part in cut.split("."):
                module = getattr(module, part, None)
                if is_compiled_module(module):
                    return True
        return False

    def _reached_whole(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if not torch.compiler.is_compiling() and self.stage == "whole" and not self._out_of_sight():
                raise RuntimeError(self._skipped(name))

        return hook

    def _guard(self) -> None:
        """Hook the modules outside the plan that hold trained tensors or apply dropout."""
        handled: list[str] = []
        for name, module in self._model.named_modules():
            if any(name.startswith(other) for other in handled):
                continue
            if module in self._owned and self._owned[module][1] != "own_parameters":
                handled.append(f"{name}.")
            if module in self._guarded or module in self._owned or getattr(module, "sharded", None):
                continue
            trained = any(isinstance(p, Tensor) for p in dict.values(module._parameters))
            if not trained and not isinstance(module, _DropoutNd):
                continue
            self._guarded.add(module)
            if trained:
                report_access(module, self._accessed(name))
            else:
                module.register_forward_pre_hook(self._dropped(name), prepend=True)

    def _remedy(self) -> str:
        behind = " and ".join(self._gathers)
        left_out = f". Or has {behind}, where 'gather_output' puts the sequence together, been left out?"
        return (
            "Add it to the plan with a style that fits ('norm', 'sequence', 'tensor_parallel', 'dropout', or "
            "'own_parameters' for the module that holds it), or freeze it" + (left_out if behind else "")
        )

    def _late(self) -> bool:
        return not torch.compiler.is_compiling() and self.stage == "cut" and not self.checking

    def _dropped(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if not self._late() or not (module.training and module.p > 0):
                return
            if alike_name(name) not in self._entered.get(self.training, ()):
                what = "its mask would depend on how the sequence is cut"
                raise RuntimeError(f"{name}: {_LATE} {what}. {self._remedy()}")

        return hook

    def _accessed(self, owner: str) -> Callable[[str, Any], Any]:
        def report(name: str, param: Any) -> Any:
            if torch.compiler.is_compiling() or self.stage != "cut":
                return param
            full = f"{owner}.{name}" if owner else name
            if self.checking:
                self._read.add(full)
            elif torch.is_grad_enabled() and param.requires_grad and not self._used & {full, id(param)}:
                error = f"{full}: {_LATE} {_PARTIAL}. {self._remedy()}"
                if full not in self._read:
                    raise RuntimeError(error)
                if type(param) is nn.Parameter:  # taken in every forward, but not used in a checked one
                    param = param.view_as(param)
                    param.register_hook(_refusal(error))
            return param

        return report


def _refusal(error: str) -> Callable[[Tensor], None]:
    def hook(grad: Tensor) -> None:
        raise RuntimeError(error)

    return hook


def _parameter_ids(model: nn.Module) -> set[int]:
    """ids of the tensors that autograd knows the parameters of ``model`` by."""
    found = {id(param) for module in model.modules() for param in dict.values(module._parameters)}
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gathered parameters are in the modules during their forward only
            state: Any = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            gathered = [param for group in groups if group is not None for param in group.fsdp_params]
            found.update(id(param._unsharded_param) for param in gathered if hasattr(param, "_unsharded_param"))
    return found


#: Leaves are looked at in the first ``_FIRST`` forwards with gradients after a check, then in every ``_EVERY``-th.
_FIRST, _EVERY = 4, 8
_LATE = "comes into play where the sequence is cut, for the first time since the forward that was checked:"
_PARTIAL = "its gradient would be a different part of the sum on every rank"


def _beside(model: nn.Module, cuts: list[str], planned: set[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that are or hold one of ``planned``, and hold no place where the sequence is cut."""

    def below(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for child, inner in module.named_children():
            name = f"{prefix}.{child}" if prefix else child
            if name in cuts or not any(f"{other}.".startswith(f"{name}.") for other in planned):
                continue
            holds = any(cut.startswith(f"{name}.") for cut in cuts)
            if holds or isinstance(inner, (nn.ModuleList, nn.ModuleDict)):
                yield from below(name, inner)
            else:
                yield name, inner

    return below("", model) if cuts else iter(())
