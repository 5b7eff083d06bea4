"""What was worked out once for each kind of call, kept within bounds."""

from __future__ import annotations

from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")

#: How many kinds of calls a cache holds. A model has some dozens for each length; training on ever-new lengths must
#: not fill memory with those that never come again.
MOST = 1024


class Remembered(dict[K, V]):
    """A dict of at most :data:`MOST` entries: a full one starts anew."""

    def __setitem__(self, kind: K, found: V) -> None:
        if len(self) >= MOST:
            self.clear()
        super().__setitem__(kind, found)
