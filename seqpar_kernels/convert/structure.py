"""What a model consists of, and whether that has changed since it was remembered.

An eager forward of a model that has changed is checked again, so every change counts, and the comparison is made before
each forward: it takes microseconds. A compiled forward cannot be checked, so a change there is an error that names the
module. ``torch.compile`` asks at trace time only, and traces again where something changes that matters here. Hooks
known to bring in nothing to be trained are let pass then.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from operator import attrgetter, is_not, itemgetter, methodcaller
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules import module as module_hooks
from torch.nn.modules.dropout import _DropoutNd

_forward, _parameters = methodcaller("get", "forward"), itemgetter("_parameters")
_kind, _trained = attrgetter("__class__"), attrgetter("requires_grad")
_is_there = partial(is_not, None)


class Structure:
    """Modules, hooks, forwards, parameters and dropouts of ``model``.

    ``harmless``: beginnings of the names of modules of Python whose hooks and forwards a compiled model may have.
    """

    def __init__(self, model: nn.Module, harmless: tuple[str, ...] = ()):
        self._model, self._harmless = model, harmless
        self._by_module: dict[str, list[Any]] = {}
        self._state: _State | None = None

    def remember(self, checked: bool) -> None:
        """Remember the model as it is now. ``checked``: a forward of it was, so :meth:`changed` compares with it."""
        self._by_module = self._described()
        if checked:
            self._state = _State(self._model)

    def changed(self) -> bool:
        """Whether anything is other than in the forward that was checked. Says so once of a change."""
        if self._state is None or self._state.same():
            return False
        self._state = None  # it keeps parameters alive
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

    @torch._dynamo.assume_constant_result
    def _changed_module(self) -> str:
        now = self._described()
        found = next((name for name, parts in now.items() if parts != self._by_module.get(name)), None)
        return "" if found is None else found or type(self._model).__name__

    def _described(self) -> dict[str, list[Any]]:
        """Name -> the module, its hooks and its own forward."""
        found: dict[str, list[Any]] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            # Around the whole model the sequence is whole.
            hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()] if name else []
            added = [*hooks, vars(module).get("forward")]
            found[name] = [module, *(part for part in added if not self._is_harmless(part))]
        return found

    def _is_harmless(self, part: Any) -> bool:
        # fully_shard's are torch's.
        return str(getattr(part, "__module__", "")).startswith(("torch.distributed.", *self._harmless))


class _State:
    """All that a check of ``model`` depends on, in lists that are compared fast."""

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._dicts = [vars(module) for module in self._modules]
        self._sharded = any(isinstance(module, FSDPModule) for module in self._modules)
        self._dropouts = [vars(module) for module in self._modules if isinstance(module, _DropoutNd)]
        self._classes = list({type(module) for module in self._modules})
        self._held = [p for d in self._dicts for p in dict.values(d["_parameters"])]  # ids are taken again
        self._children = [d["_modules"] for d in self._dicts]
        self._hooks = [d[kind] for d in self._dicts for kind in ("_forward_hooks", "_forward_pre_hooks")]
        self._hooks += [module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks]
        self._then = self._now()

    def same(self) -> bool:
        """Whether nothing has changed since."""
        return self._then == self._now()

    def _now(self) -> list[Any]:
        dicts = self._dicts
        params = list(map(_parameters, dicts))  # model.to puts others in place
        values = list(chain.from_iterable(map(dict.values, params)))
        return [
            list(chain.from_iterable(map(dict.values, self._children))),
            list(chain.from_iterable(self._hooks)),
            list(map(_forward, dicts)),
            list(map(_kind, self._modules)),
            [kind.forward for kind in self._classes],
            list(chain.from_iterable(map(dict.keys, params))),
            [] if self._sharded else list(map(id, values)),  # fully_shard puts others in place in every forward
            list(map(_trained, filter(_is_there, values))),
            [d["p"] for d in self._dropouts],
        ]
