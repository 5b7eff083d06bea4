"""Measured profiles on disk: one file for each machine, device, backend, kind of group and version.

A file that cannot be read is ignored and the reason is returned: a cache never stops a program.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from .machine_profile import MachineProfile

_FORMAT = 3  # raised when the meaning of a profile changes


class Place(NamedTuple):
    """The machine and the group that a profile is valid for."""

    machine: str
    processor: str
    device: str
    threads: int
    backend: str
    ranks: int
    one_host: bool | None  # whether the ranks share a host; None: unknown
    torch: str
    format: int

    @staticmethod
    def here(device_type: str, backend: str, ranks: int, one_host: bool | None = None) -> Place:
        cuda = device_type == "cuda" and torch.cuda.is_available()
        return Place(
            machine=platform.node(),
            processor=torch.cuda.get_device_name() if cuda else platform.machine(),
            device=device_type,
            threads=torch.get_num_threads(),
            backend=backend,
            ranks=ranks,
            one_host=one_host,
            torch=torch.__version__,
            format=_FORMAT,
        )

    @property
    def file(self) -> Path:
        """The file, in $XDG_CACHE_HOME/seqpar_kernels, or in ~/.cache/seqpar_kernels without that variable."""
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqpar_kernels"
        digest = zlib.crc32(json.dumps(self).encode())
        return folder / f"profile-{self.device}-{self.backend}-{self.ranks}ranks-{digest:08x}.json"


def load(place: Place) -> tuple[MachineProfile | None, str]:
    """The saved profile of ``place``, or None and the reason."""
    try:
        file = place.file
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or sorted(found) != ["place", "profile"]:
            return None, f"{file} is damaged: expected an object with profile and place"
        if found["place"] != place._asdict():
            return None, f"{file} belongs to another machine or version: {found['place']}"
        return MachineProfile.from_json(json.dumps(found["profile"])), ""
    except FileNotFoundError:
        return None, "never tuned here"
    except (
        OSError,
        ValueError,
        ArithmeticError,
        RecursionError,
        RuntimeError,
    ) as error:  # RuntimeError: no home directory
        return None, f"{file if 'file' in locals() else 'the cache'} is damaged or unreadable: {error}"


def save(place: Place, profile: MachineProfile) -> str:
    """Save ``profile``; returns the file, or why it was not written. Readers see the old file or the new one."""
    try:
        file = place.file
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump({"place": place._asdict(), "profile": json.loads(profile.to_json())}, out, indent=1)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except (OSError, RuntimeError) as error:
        return f"not kept: {error}"
    return str(file)
