"""Remembers what a model consists of, and tells whether it has changed.

A changed model is checked again by its next eager forward. So every change counts, and the comparison runs before each
forward, in microseconds. A compiled forward cannot be checked, so a change is an error there that names the module. It
is looked for at trace time only; ``torch.compile`` traces again after a change that matters. Hooks that are known to
train nothing are allowed there.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from operator import attrgetter, is_not, itemgetter, methodcaller
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module as module_hooks
from torch.nn.modules.dropout import _DropoutNd

from ..compiling import constant_when_traced

_forward, _parameters = methodcaller("get", "forward"), itemgetter("_parameters")
_kind, _trained = attrgetter("__class__"), attrgetter("requires_grad")
_is_there = partial(is_not, None)


class Structure:
    """The modules, hooks, forwards, parameters and dropouts of ``model``.

    A compiled model may get hooks and forwards whose ``__module__`` begins with one of ``harmless``.
    """

    def __init__(self, model: nn.Module, harmless: tuple[str, ...] = ()):
        self._model, self._harmless = model, harmless
        self._by_module: dict[str, list[Any]] = {}
        self._state: _State | None = None

    def remember(self, checked: bool) -> None:
        """Remember the model as it is now. :meth:`changed` compares with a model that was ``checked``."""
        self._by_module = self._described()
        if checked:
            self._state = _State(self._model)

    def changed(self) -> bool:
        """Whether the model differs from the one checked last. A change is reported once."""
        if self._state is None or self._state.same():
            return False
        self._state = None  # it holds parameters
        return True

    def refuse_changes(self) -> None:
        """
        Raises:
            RuntimeError: a module, a hook or a forward is other than remembered.
        """
        changed = self._changed_module()
        if changed:
            raise RuntimeError(
                f"{changed}: a module, a hook or a forward has been added or replaced since the model was checked. "
                "Call the model once before torch.compile: an eager forward checks it again"
            )

    @constant_when_traced
    def _changed_module(self) -> str:
        now = self._described()
        found = next((name for name, parts in now.items() if parts != self._by_module.get(name)), None)
        return "" if found is None else found or type(self._model).__name__

    def _described(self) -> dict[str, list[Any]]:
        """Name -> the module, its hooks and its own forward."""
        found: dict[str, list[Any]] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            # Hooks of the whole model are left out: the sequence is whole there.
            hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()] if name else []
            added = [*hooks, vars(module).get("forward")]
            found[name] = [module, *(part for part in added if not self._is_harmless(part))]
        return found

    def _is_harmless(self, part: Any) -> bool:
        # fully_shard's are torch's.
        return str(getattr(part, "__module__", "")).startswith(("torch.distributed.", *self._harmless))


class _State:
    """All that a check of ``model`` depends on, in lists that take microseconds to compare."""

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._dicts = [vars(module) for module in self._modules]
        self._sharded = any(isinstance(module, FSDPModule) for module in self._modules)
        self._dropouts = [vars(module) for module in self._modules if isinstance(module, _DropoutNd)]
        self._classes = list({type(module) for module in self._modules})
        # Held, because Python gives the id of a lost object to another.
        self._held = [p for d in self._dicts for p in dict.values(d["_parameters"])]
        self._children = [d["_modules"] for d in self._dicts]
        self._hooks = [d[kind] for d in self._dicts for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._hooks += [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        self._then = self._now()

    def same(self) -> bool:
        """Whether nothing has changed since."""
        return self._then == self._now()

    def _now(self) -> list[Any]:
        dicts = self._dicts
        params = list(map(_parameters, dicts))  # looked up, because model.to replaces them
        values = list(chain.from_iterable(map(dict.values, params)))
        return [
            list(chain.from_iterable(map(dict.values, self._children))),
            list(chain.from_iterable(self._hooks)),
            list(map(_forward, dicts)),
            list(map(_kind, self._modules)),
            [kind.forward for kind in self._classes],
            list(chain.from_iterable(map(dict.keys, params))),
            [] if self._sharded else list(map(id, values)),  # fully_shard replaces them in every forward
            list(map(_trained, filter(_is_there, values))),
            [d["p"] for d in self._dropouts],
        ]
