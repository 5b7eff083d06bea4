"""Threads that watch in the background, and end before the interpreter does.

A daemon thread that comes back from C++ after the interpreter has been finalised is ended by force inside of C++. If
one of its frames is a destructor, the process aborts ("terminate called without an active exception"), whatever its
exit status was to be.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

_GRACE_SECONDS = 2.0  # for all threads together; one that waits for a store that is gone may take longer
_ending = threading.Event()
_threads: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def start_watching(look: Callable[..., None], *args: Any, name: str) -> None:
    """Run ``look(*args)`` in a thread of this name; between two looks it calls :func:`pause`, and returns on False."""
    thread = threading.Thread(target=look, args=args, daemon=True, name=name)
    _threads.add(thread)
    thread.start()


def pause(seconds: float) -> bool:
    """Wait, and say whether to go on: False where the process ends."""
    return not _ending.wait(seconds)


@atexit.register
def _end() -> None:
    _ending.set()
    end = time.monotonic() + _GRACE_SECONDS
    for thread in list(_threads):
        thread.join(max(0.0, end - time.monotonic()))
