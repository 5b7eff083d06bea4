"""Caches: a dict with a bound on its size, and a value for each process group."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import TypeVar

from torch.distributed import ProcessGroup

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")

#: The most entries of a cache. A model has some dozens of kinds of calls for each length, and training on ever new
#: lengths must not fill the memory.
MOST = 1024


class Remembered(dict[K, V]):
    """A dict of at most :data:`MOST` entries; a full one is cleared."""

    def __setitem__(self, kind: K, found: V) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(kind, found)


_making = threading.RLock()


def per_group(make: Callable[[ProcessGroup], T]) -> Callable[[ProcessGroup], T]:
    """``make(group)``, once for each group of this process; forgotten with the group."""
    made: dict[weakref.ref[ProcessGroup], T] = {}  # a WeakKeyDictionary's look-up takes three times as long

    def forget(gone: weakref.ref[ProcessGroup]) -> None:
        made.pop(gone, None)

    @functools.wraps(make)
    def of(group: ProcessGroup) -> T:
        found = made.get(weakref.ref(group))
        if found is None:
            with _making:  # two threads may come at once
                found = made.get(weakref.ref(group))
                if found is None:
                    found = made[weakref.ref(group, forget)] = make(group)
        return found

    return of
