"""Whether another process of this machine has ended, so that its peers stop waiting for it.

A process is known by the boot of its machine, its namespace of process numbers, its number and when it was started.
Of one on another machine, or on a system without /proc, nothing is known.
"""

from __future__ import annotations

import os
from pathlib import Path


def identity() -> str:
    """This process, for :func:`ended` on another rank; "" where it cannot be told."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # a sandbox that numbers processes otherwise
            return ""
        return " ".join([*_here(), str(os.getpid()), _stat(os.getpid())[1]])
    except (OSError, IndexError):
        return ""


def ended(who: str) -> bool:
    """Whether it is certain that the process ``who`` has ended."""
    try:
        boot, space, number, started = who.split()
        if [boot, space] != _here():
            return False
        state, began = _stat(int(number))
        return began != started or state in "ZX"
    except FileNotFoundError:
        return True
    except ProcessLookupError:
        return True
    except (OSError, ValueError, IndexError):
        return False


def _here() -> list[str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [boot, os.readlink("/proc/self/ns/pid")]


def _stat(number: int) -> tuple[str, str]:
    """State, and start in ticks since boot. The name before them may hold blanks and brackets."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
