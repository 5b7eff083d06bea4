"""gloo's own thread must not push aside the one that talks to it.

gloo moves bytes in a thread that wakes when a socket is ready. Should another thread hold the lock of that connection,
as one that posts a message does, the mover does not sleep: it asks again at once, until it gets the lock. On Linux a
thread that wakes may take the core of one that runs. Where that is the one with the lock, the two are stuck until the
next tick of the scheduler, up to 4 ms; on as many cores as ranks this befalls every sixth small message.

A thread under SCHED_BATCH is scheduled like any other but takes no core from a running thread when it wakes. It needs
no privilege. A mover is known by its name, which gloo gives it since January 2026: with an older one nothing changes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..environment import flag

_NAME = b"gloo_tcp_loop"


def calm_gloo() -> int:
    """Put gloo's movers of this process under SCHED_BATCH; returns how many that changes.

    Another system, a sandbox or SEQPAR_CALM_GLOO=0 may stand against it: then nothing happens, and no op fails for it.
    """
    calmed, wanted = 0, flag("SEQPAR_CALM_GLOO", default=True)
    with contextlib.suppress(Exception):
        if not wanted or os.readlink("/proc/self") != str(os.getpid()):
            return 0  # not wanted; or /proc numbers threads otherwise than the system does
        for comm in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # it has ended
                thread = int(comm.parent.name)
                if comm.read_bytes().strip() == _NAME and os.sched_getscheduler(thread) == os.SCHED_OTHER:
                    os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
                    calmed += 1
    return calmed
