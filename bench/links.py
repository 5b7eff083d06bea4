"""Links of a chosen rate: a network namespace for each rank, joined by a bridge in a namespace of its own.

Every rank has one port, both directions shaped with a token bucket (``tc qdisc tbf``). Nothing leaves these namespaces:
they have no route to anywhere and no interface of the machine. They are removed when the block is left, at exit, and,
should this process be killed outright, at the next run, which sweeps what dead processes left.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from types import TracebackType

from .errors import BenchError, NotHere

PREFIX = "seqpar-bench"
# Tokens saved up while idle: little beside any message that is timed, but room for a whole segment of 64 KiB. Of a
# smaller bucket the kernel cuts segments into packets, each with its timer and its wake-up of the receiver, and the
# ranks' cores, which multiply beside it, spend on that what network cards spare them.
BURST = "68kb"
QUEUE = "64mb"  # never full, so nothing is dropped: the sender's window bounds what is in flight
MTU = "9000"  # headers then take less than one percent of the wire
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Link:
    """What ``--link`` asked for: a rate in bits a second, or a multiple of the matmul's time on the wire."""

    text: str
    rate: float | None = None
    ratio: float | None = None


def parse_link(text: str) -> Link:
    """
    Raises:
        BenchError: neither a rate nor a ratio.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text)
    if found and float(found[1]) > 0:
        return Link(text, rate=float(found[1]) * UNITS[found[2]])
    found = re.fullmatch(r"ratio:(\d+(?:\.\d+)?)", text)
    if found and float(found[1]) > 0:
        return Link(text, ratio=float(found[1]))
    raise BenchError(
        f"--link {text}: expected a rate such as 1gbit or 250mbit, or ratio:R, the rate at which the wire takes R "
        "times as long as the matmul"
    )


def why_not() -> str | None:
    """Why links cannot be shaped here, and what would help; None when they can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2 (apt install iproute2, dnf install iproute-tc)"
    probe = f"{PREFIX}-{os.getpid()}-probe"
    inside = ["-n", probe]
    needs = {
        "sch_tbf": ["tc", *inside, "qdisc", "replace", "dev", "lo", *_bucket(1e9)],
        "veth": ["ip", *inside, "link", "add", "one", "type", "veth", "peer", "name", "other"],
        "bridge": ["ip", *inside, "link", "add", "bridge", "type", "bridge"],
    }
    try:
        done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
        if done.returncode != 0:
            return f"no privilege to make network namespaces ({done.stderr.strip()}): run as root or with CAP_SYS_ADMIN"
        for module, command in needs.items():
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                said = f"`{' '.join(command)}` failed ({done.stderr.strip()})"
                return f"{said}: the kernel needs the module {module} (modprobe {module})"
    finally:
        subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return None


def _bucket(bits_per_second: float) -> list[str]:
    return ["root", "tbf", "rate", f"{bits_per_second:.0f}bit", "burst", BURST, "limit", QUEUE]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"--link: `{' '.join(command)}` failed: {done.stderr.strip()}")


def sweep_stale() -> list[str]:
    """Remove the namespaces of runs whose process is gone; returns their names."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    removed = []
    for name, pid in re.findall(rf"^({PREFIX}-(\d+)-\w+)", listed, re.MULTILINE):
        if not os.path.exists(f"/proc/{pid}"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            removed.append(name)
    return removed


@dataclass
class Network:
    """``with Network(ranks) as network``: the namespaces, unshaped until :meth:`shape`."""

    ranks: int
    interface: str = "eth0"
    _made: list[str] = field(default_factory=list)

    def __enter__(self) -> Network:
        reason = why_not()
        if reason is not None:
            raise NotHere(f"--link: {reason}")
        sweep_stale()
        atexit.register(self.remove)
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def namespace(self, rank: int | str) -> str:
        return f"{PREFIX}-{os.getpid()}-{rank}"

    def prefix(self, rank: int) -> list[str]:
        """Put before a command, runs it in the namespace of ``rank``."""
        return ["ip", "netns", "exec", self.namespace(rank)]

    def shape(self, bits_per_second: float) -> None:
        """Both directions of every rank's port."""
        switch = self.namespace("switch")
        for rank in range(self.ranks):
            port = ["tc", "-n", self.namespace(rank), "qdisc", "replace", "dev", self.interface]
            _run(*port, *_bucket(bits_per_second))
            _run("tc", "-n", switch, "qdisc", "replace", "dev", f"port{rank}", *_bucket(bits_per_second))

    def remove(self) -> None:
        """Whatever was made; processes inside must be gone, or the kernel keeps a nameless namespace until they are."""
        while self._made:  # forgotten once deleted: what is interrupted here is done again at exit
            subprocess.run(["ip", "netns", "del", self._made[-1]], capture_output=True)
            self._made.pop()
        atexit.unregister(self.remove)

    def _make(self) -> None:
        switch = self.namespace("switch")
        for name in (switch, *map(self.namespace, range(self.ranks))):
            self._made.append(name)  # first: to delete what was never made does no harm
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        for rank in range(self.ranks):
            own, port = self.namespace(rank), f"port{rank}"
            pair = ["type", "veth", "peer", "name", self.interface, "netns", own]
            _run("ip", "link", "add", port, "netns", switch, *pair)
            for namespace, device in ((own, self.interface), (switch, port)):
                _run("ip", "-n", namespace, "link", "set", device, "mtu", MTU, "addrgenmode", "none")
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", own, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", self.interface)
            _run("ip", "-n", own, "link", "set", self.interface, "up")
