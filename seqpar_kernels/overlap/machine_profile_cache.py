"""Measured figures on disk, one file for each machine, device, backend, kind of group and version.

Whatever is wrong with a file, it is passed over and the reason is told: a cache never stops a program.
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

from .machine_profile import Figures

_FORMAT = 3  # raised when figures change their meaning


class Place(NamedTuple):
    """What figures are valid for."""

    machine: str
    processor: str
    device: str
    threads: int
    backend: str
    ranks: int
    one_host: bool | None  # whether they share one; None: not known
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
        """In $XDG_CACHE_HOME/seqpar_kernels, ~/.cache without it."""
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqpar_kernels"
        digest = zlib.crc32(json.dumps(self).encode())
        return folder / f"figures-{self.device}-{self.backend}-{self.ranks}ranks-{digest:08x}.json"


def load(place: Place) -> tuple[Figures | None, str]:
    """The figures kept for ``place``, or None and the reason."""
    try:
        file = place.file
        found = json.loads(file.read_text())
        if not isinstance(found, dict) or sorted(found) != ["figures", "place"]:
            return None, f"{file} is damaged: expected an object with figures and place"
        if found["place"] != place._asdict():
            return None, f"{file} belongs to another machine or version: {found['place']}"
        return Figures.from_json(json.dumps(found["figures"])), ""
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


def save(place: Place, figures: Figures) -> str:
    """Keep them; returns the file, or why there is none. Readers see the old file or the new, never half of one."""
    try:
        file = place.file
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w") as out:
                json.dump({"place": place._asdict(), "figures": json.loads(figures.to_json())}, out, indent=1)
            os.replace(name, file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except (OSError, RuntimeError) as error:
        return f"not kept: {error}"
    return str(file)
