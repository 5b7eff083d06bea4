"""gloo's own thread must not push aside the one that talks to it.

gloo moves bytes in a thread that wakes when a socket is ready. Should another thread hold the lock of that connection,
as one that posts a message does, the mover does not sleep: it asks again at once, until it gets the lock. On Linux a
thread that wakes may take the core of one that runs. Where that is the one with the lock, the two are stuck until the
next tick of the scheduler, up to 4 ms; on as many cores as ranks this befalls every sixth small message.

A thread under SCHED_BATCH is scheduled like any other but takes no core from a running thread when it wakes. It needs
no privilege.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_NAME = "gloo_tcp_loop"


def calm_gloo() -> int:
    """Put gloo's movers of this process under SCHED_BATCH; returns how many. None where there is no such scheduler."""
    if not hasattr(os, "sched_setscheduler"):
        return 0
    calmed = 0
    for thread in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended, or a sandbox forbids
            number = int(thread.parent.name)
            if thread.read_text().strip() == _NAME and os.sched_getscheduler(number) == os.SCHED_OTHER:
                os.sched_setscheduler(number, os.SCHED_BATCH, os.sched_param(0))
                calmed += 1
    return calmed
