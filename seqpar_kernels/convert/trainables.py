"""Trained tensors outside the plan, and what is computed from them, in the forward that is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .dtensor_params import part_of
from .foreign import described, leaf_behind
from .marks import MARK, kind_of, mark_of


class Trainables:
    """Parameters of ``model`` by identity. Those called ``planned`` may meet marked tensors anywhere.

    ``used`` has ids and names of the others that were used while ``inside()``: where the sequence is cut.
    """

    def __init__(self, model: nn.Module, planned: frozenset[str], inside: Callable[[], bool]):
        self._covered = planned
        # id -> (parameter, name). Held, because Python gives the id of a lost object to another.
        self._named: dict[int, tuple[nn.Parameter, str]] = {}
        self._allowed: dict[int, nn.Parameter] = {}
        for name, param in model.named_parameters(remove_duplicate=False):
            part = part_of(param)
            if isinstance(part, nn.Parameter):
                if name in planned:
                    self._allowed[id(part)] = part
                else:
                    self._named[id(part)] = part, name
        self._inside = inside
        self._lent = [self._lent_now("", model)]
        self.used: set[Any] = set()

    def lend(self, name: str, module: nn.Module) -> None:
        """Note that fully_shard has gathered the parameters of ``module``, whose forward begins."""
        self._lent.append(self._lent_now(name, module))

    def take_back(self) -> None:
        """Note that the forward of a module with fully_shard has ended."""
        if len(self._lent) > 1:
            self._lent.pop()

    @contextmanager
    def allowing(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """Inside, parameters among ``tensors`` may meet marked tensors."""
        new = {id(t): t for t in tensors if isinstance(t, nn.Parameter) and id(t) not in self._allowed}
        self._allowed.update(new)
        try:
            yield
        finally:
            for key in new:
                del self._allowed[key]

    def source(self, leaf: Tensor, met: bool) -> str | None:
        """The trained tensor outside the plan that ``leaf`` is, or was computed from."""
        found = mark_of(leaf)
        if found is not None:
            if not isinstance(found, str) or kind_of(leaf) is not None:
                return None  # reading requires_grad of a deferred sum would compute it
            return found if leaf.requires_grad or not torch.is_grad_enabled() else None
        if id(leaf) in self._allowed:
            return None
        named = self._named.get(id(leaf))
        if named is not None:
            if self._inside():
                self.used |= {id(leaf), named[1]}
            return named[1] if leaf.requires_grad else None
        if any(self._lent) and type(leaf) is Tensor and leaf.numel():
            lent = next((lent[leaf.data_ptr()] for lent in reversed(self._lent) if leaf.data_ptr() in lent), None)
            if lent is not None:
                self.used.add(lent)
                return lent or None
        if type(leaf) not in (Tensor, nn.Parameter) or not leaf.requires_grad:
            return None
        if leaf.is_leaf:
            return described(leaf)
        if met and not hasattr(leaf, MARK) and not any(self._lent):
            behind = leaf_behind(leaf, self._allowed)
            named = None if behind is None else self._named.get(id(behind))
            return None if behind is None else described(behind) if named is None else named[1]
        return None

    def _lent_now(self, prefix: str, module: nn.Module) -> dict[int, str]:
        """Address -> name of the parameters that fully_shard has gathered for ``module``'s forward; "" if not trained.

        A gathered parameter is a new tensor at each use, so its id does not identify it. Its address does, until that
        forward ends.
        """
        found = {}
        with torch.no_grad(), torch._C.DisableTorchFunction():
            for name, param in module.named_parameters(prefix, remove_duplicate=False):
                part = part_of(param)
                if type(part) is Tensor and part.numel():
                    found[part.data_ptr()] = name if name not in self._covered and param.requires_grad else ""
        return found
