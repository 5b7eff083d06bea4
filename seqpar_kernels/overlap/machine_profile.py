"""The machine profile that the planner works with: rates and overheads of machine and links, and their source."""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import torch


class MachineProfile(NamedTuple):
    """Rates and overheads of one rank of a group, and their source."""

    flops_64: float  # FLOP/s of a large matmul of 64-bit numbers; the same below for 32 and 16 bit
    flops_32: float
    flops_16: float
    memory_bytes: float  # bytes/s at which a matmul reads its weight again for every chunk
    call_seconds: float  # overhead of one more matmul call, without reading the weight
    link_bytes: float  # bytes/s in each direction, with both directions busy
    message_seconds: float  # overhead of one more message
    busy_seconds: float  # processor time that moving one byte takes from the matmul
    source: str

    def flops(self, dtype: torch.dtype) -> float:
        if dtype.itemsize == 2:
            return self.flops_16
        return self.flops_32 if dtype == torch.float32 else self.flops_64

    def to_json(self) -> str:
        return json.dumps(self._asdict())

    @staticmethod
    def from_json(text: str) -> MachineProfile:
        """
        Raises:
            ValueError: ``text`` is not from :meth:`to_json`, or has numbers that no machine has.
        """
        found = json.loads(text)
        names = list(MachineProfile._fields)
        if not isinstance(found, dict) or sorted(found) != sorted(names):
            raise ValueError(f"expected an object with {', '.join(names)}")
        for name in names[:-1]:
            value, least = found[name], 0.0 if name.endswith("_seconds") else 1.0
            # An int may be too large for a float; a comparison with a float works all the same.
            if type(value) not in (int, float) or not least <= value <= sys.float_info.max:
                shown = f"an int of {value.bit_length()} bits" if isinstance(value, int) and value > 10**40 else value
                raise ValueError(f"{name}: expected a finite number from {least:g} up, got {shown!r}")
            found[name] = float(value)
        if not isinstance(found["source"], str):
            raise ValueError(f"source: expected a text, got {found['source']!r}")
        return MachineProfile(**found)


def default_profile(device_type: str, one_host: bool | None = None) -> MachineProfile:
    """The profile of a machine that has not been measured. ``one_host``: whether the ranks share one; None: unknown."""
    if device_type != "cpu":
        link, rate = ("InfiniBand, 400 Gbit/s a GPU", 50e9) if one_host is False else ("NVLink", 200e9)
        return MachineProfile(
            flops_64=30e12,
            flops_32=50e12,
            flops_16=600e12,
            memory_bytes=3e12,
            call_seconds=10e-6,
            link_bytes=rate,
            message_seconds=20e-6,
            busy_seconds=0.0,
            source=f"defaults for {device_type}: assumed, a GPU of the H100's class on {link}, unmeasured",
        )
    threads = torch.get_num_threads()
    # If the link is faster than assumed, a needless cut costs a few percent. If it is slower, a missing cut costs the
    # whole wire time. So a slow link is assumed.
    link, rate = ("between processes of one host, measured", 2e9) if one_host else ("assumed, 1 Gbit/s", 125e6)
    return MachineProfile(
        flops_64=100e9 * threads,
        flops_32=200e9 * threads,
        flops_16=800e9 * threads,
        memory_bytes=15e9,
        call_seconds=2e-6,
        link_bytes=rate,
        message_seconds=50e-6,
        busy_seconds=0.3e-9 / threads,
        source=f"defaults for cpu: {threads} threads of a 2026 Xeon with gloo, measured; its link {link}",
    )
