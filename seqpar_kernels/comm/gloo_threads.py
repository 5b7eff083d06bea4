"""Keeps gloo's own thread from preempting the thread that posts messages.

gloo moves bytes in a thread that wakes when a socket is ready. A thread that posts a message holds the lock of its
connection. gloo's thread then spins for the lock, it does not sleep. On Linux a thread that wakes may take the core of
a running thread. If gloo's thread takes the core of the thread with the lock, both are stuck until the next tick of
the scheduler, up to 4 ms. With as many cores as ranks this happens to every sixth small message.

A thread under SCHED_BATCH takes no core from a running thread when it wakes; else it is scheduled like any other. That
needs no privilege. gloo's threads have had a name since January 2026; with an older gloo nothing changes.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..environment import flag

_NAME = b"gloo_tcp_loop"


def calm_gloo() -> int:
    """Put gloo's threads of this process under SCHED_BATCH; returns how many were changed.

    It changes nothing and raises nothing on another system, in a sandbox that forbids it, or with SEQPAR_CALM_GLOO=0.
    """
    calmed, wanted = 0, flag("SEQPAR_CALM_GLOO", default=True)
    with contextlib.suppress(Exception):
        if not wanted or os.readlink("/proc/self") != str(os.getpid()):
            return 0  # not wanted, or /proc is that of another process namespace
        for comm in Path("/proc/self/task").glob("*/comm"):
            with contextlib.suppress(OSError):  # the thread has ended
                thread = int(comm.parent.name)
                if comm.read_bytes().strip() == _NAME and os.sched_getscheduler(thread) == os.SCHED_OTHER:
                    os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))
                    calmed += 1
    return calmed
