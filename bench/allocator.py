"""One allocator environment for everybody who is timed on a CPU.

glibc hands blocks above a threshold back to the kernel at every free, and each new output then costs page faults that
dwarf the kernel that fills it. The settings keep freed memory in the process; they hold for ours and for the peers.
"""

from __future__ import annotations

import os
import platform
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_TOP_PAD_": str(2**30),
}


def settings_in_force() -> bool:
    """Whether this process was started with :data:`SETTINGS`; glibc reads them once, at the start."""
    return all(os.environ.get(name) == value for name, value in SETTINGS.items())


def restart_with_allocator_settings() -> None:
    """Replace this process by itself with :data:`SETTINGS`, once; nothing where the C library is not glibc."""
    if settings_in_force() or platform.libc_ver()[0] != "glibc":
        return
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, {**os.environ, **SETTINGS})
