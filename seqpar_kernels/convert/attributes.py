"""Tells whether plain attributes, on which a forward may branch, are as they were in a checked forward.

``block.mode = "mean"`` or ``block.act = torch.tanh`` brings new statements into a forward, and no module, hook or
parameter shows it. So numbers, strings, booleans and functions are compared before every eager forward: those in the
modules, in their ``config`` and in their classes. Where nothing has been assigned, identity decides, in microseconds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from enum import Enum
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType
from typing import Any

import torch
from torch import nn

from .counts import CONFIGS, Count

_PLAIN = (
    *(bool, int, float, str, complex, NoneType, Enum, torch.dtype),
    *(FunctionType, BuiltinFunctionType, MethodType, partial),
)
#: Attributes that torch writes into modules. A forward may branch on ``training``, so it is compared.
_TORCHS = frozenset(vars(nn.Module())) - {"training"} | {"_compiled_call_impl"}
_OURS = ("torch.", "seqpar_kernels.")
_MISSING = object()
_STATES = 8  # states of checked forwards that are remembered: modes may alternate
_MOST = 8  # checks that one attribute with ever new values may cause


def alike_name(name: str) -> str:
    """The name with ``*`` for numbers: one for the same module of all blocks, some of which a forward may skip."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(isinstance(item, _PLAIN) for item in value))


def _sources(model: nn.Module) -> Iterable[tuple[str, Any]]:
    """Yield (where, mapping) for every mapping that holds attributes."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if type(module).__module__.startswith("seqpar_kernels."):
            continue
        where = name or type(model).__name__
        yield where, vars(module)
        for key in CONFIGS:
            config = vars(module).get(key)
            held = config if isinstance(config, dict) else getattr(config, "__dict__", None)
            if held is not None and id(held) not in seen:
                seen.add(id(held))
                yield f"{where}.{key}", held
        for kind in type(module).__mro__:
            if id(kind) not in seen and kind is not object and not f"{kind.__module__}.".startswith(_OURS):
                seen.add(id(kind))
                yield kind.__qualname__, vars(kind)


class Attributes:
    """The plain attributes of ``model``, and the states of them in which forwards have been checked.

    A state is the values of all attributes as a forward begins. A forward is checked once for each state and ``key``.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._states: list[tuple[dict[Any, Any], set[Any]]] = []  # (state, keys), the latest last
        self._begun: dict[Any, Any] = {}  # the state of the forward that is being checked
        self._changed: set[str] = set()  # attributes that caused this check
        self._caused, self._within = Counter[str](), Counter[str]()
        self._ignored: set[str] = set()
        self._lengths: list[int] = []
        self._getters: list[tuple[Any, Any]] = []
        self._values: list[Any] = []
        self.forget()

    def forget(self) -> None:
        """Forget all checks, because the model has changed."""
        self._sources = list(_sources(self._model))
        self._states.clear()

    def _settle(self, state: dict[Any, Any]) -> None:
        """Let :meth:`_same` compare with ``state``."""
        self._lengths = [len(held) for _, held in self._sources]
        self._getters, self._values = [], []
        for where, held in self._sources:
            keys = [k for k in list(held) if (where, k) in state or self._counts(where, k, held[k])]
            if keys:
                keys.append(keys[0])  # itemgetter of one key returns no tuple
                self._getters.append((itemgetter(*keys), held))
                self._values += [state.get((where, key), _MISSING) for key in keys]

    def _counts(self, where: str, key: Any, value: Any) -> bool:
        if key in _TORCHS or not _is_plain(value) or (type(key) is str and key.startswith("__")):
            return False
        return f"{alike_name(where)}.{key}" not in self._ignored

    def _now(self) -> list[Any]:
        return list(chain.from_iterable([getter(held) for getter, held in self._getters]))

    def _read(self) -> dict[Any, Any]:
        return {
            (where, key): value
            for where, held in self._sources
            for key, value in list(held.items())
            if self._counts(where, key, value)
        }

    def _same(self) -> bool:
        """Whether all values are equal to those of the last call."""
        try:
            now = self._now()
        except KeyError:
            return False
        if list(map(len, [held for _, held in self._sources])) != self._lengths:
            return False
        if all(map(is_, now, self._values)):
            return True
        for new, old in zip(now, self._values, strict=True):
            if new is not old and not (type(new) is type(old) and _is_plain(new) and new == old):
                return False
        self._values = now
        return True

    def unchecked(self, key: Any) -> bool:
        """Whether no forward with ``key`` has been checked with the present attributes."""
        self._changed.clear()
        if not self._states:
            return True
        if not self._same():
            found = self._read()
            self._settle(found)
            at = next((i for i, (state, _) in enumerate(self._states) if state == found), None)
            if at is None:
                latest = self._states[-1][0]
                names = {name for name in {*latest, *found} if _differ(name, latest, found)}
                self._changed = _labels(names)
                self._states.append((found, set()))
                del self._states[:-_STATES]
            else:
                self._states.append(self._states.pop(at))
        return key not in self._states[-1][1]

    def check(self) -> None:
        """Note the state in which a checked forward begins."""
        self._begun = self._read()

    def passed(self, key: Any) -> None:
        """Note that the checked forward was right.

        An attribute that forwards write themselves (a counter) is ignored from the second time on. So is one that has
        caused :data:`_MOST` checks.
        """
        for _, held in self._sources:
            if isinstance(held, dict):
                counts = [key for key, value in held.items() if type(value) is Count]
                # Counts are the check's own: the forward stored one.
                held.update((key, int.__int__(held[key])) for key in counts)
        after = self._read()
        numbers = {
            name
            for name in self._begun
            if type(self._begun[name]) in (int, float) and _differ(name, self._begun, after)
        }
        self._within.update(_labels(numbers))
        self._caused.update(self._changed)
        self._changed = set()
        ignored = {label for label, times in self._within.items() if times >= 2}
        ignored |= {label for label, times in self._caused.items() if times >= _MOST}
        if ignored - self._ignored:
            self._ignored |= ignored
            kept = [({n: v for n, v in s.items() if not _labels([n]) & ignored}, keys) for s, keys in self._states]
            self._states = kept
            self._begun = {n: v for n, v in self._begun.items() if not _labels([n]) & ignored}
        checked = {k for state, keys in self._states if state == self._begun for k in keys} | {key}
        self._states = [(state, keys) for state, keys in self._states if state != self._begun]
        self._states.append((self._begun, checked))
        self._begun = {}
        self._settle(self._states[-1][0])


def _differ(name: Any, before: dict[Any, Any], after: dict[Any, Any]) -> bool:
    old, new = before.get(name, _MISSING), after.get(name, _MISSING)
    return old is not new and not (type(old) is type(new) and old == new)


def _labels(names: Iterable[tuple[str, Any]]) -> set[str]:
    return {f"{alike_name(where)}.{key}" for where, key in names}
