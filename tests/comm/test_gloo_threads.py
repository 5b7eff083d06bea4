"""gloo's own threads, once a group has been used."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.comm.gloo_threads import calm_gloo

from ..world import World

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no such scheduler on this system")
MOVER = b"gloo_tcp_loop"


def policies() -> dict[bytes, list[int]]:
    """Name -> scheduling policies of this process's threads of that name."""
    found: dict[bytes, list[int]] = {}
    for comm in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended
            policy = os.sched_getscheduler(int(comm.parent.name))
            found.setdefault(comm.read_bytes().strip(), []).append(policy)
    return found


def after_ops() -> tuple[dict[bytes, list[int]], dict[bytes, list[int]], int, int]:
    """On the world's group, then on a later one, which has a thread of its own."""
    x, weight = torch.randn(2, 4, 6), torch.randn(3, 6)
    sp.all_gather_linear(x, weight, group=dist.group.WORLD)
    first = policies()
    group = dist.new_group()
    sp.all_gather_linear(x, weight, group=group)
    second = policies()
    dist.destroy_process_group(group)
    return first, second, os.sched_getscheduler(0), calm_gloo()


def test_movers_take_no_core_from_a_running_thread(world2: World) -> None:
    for first, second, own, again in world2.run(after_ops):
        if MOVER not in first and torch.__version__ < "2.12":
            pytest.skip("this gloo does not name its threads")
        assert os.SCHED_BATCH in first[MOVER]  # those of groups that nobody has used may be as they were
        assert set(second[MOVER]) == {os.SCHED_BATCH}
        assert len(second[MOVER]) > len(first[MOVER])
        assert {policy for name, of in second.items() if name != MOVER for policy in of} == {own}
        assert again == 0


def named(name: bytes) -> bytes:
    """calm_gloo in a process that has a thread of this name; what that thread is called then."""
    comm = Path(f"/proc/self/task/{threading.get_native_id()}/comm")
    comm.write_bytes(name)
    calm_gloo()
    return comm.read_bytes().strip()


def test_no_name_and_no_refusal_stops_an_op(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []
    for name in ("обучение".encode()[:15], MOVER):  # cut within a letter, as the system cuts; and one to be calmed
        thread = threading.Thread(target=lambda name=name: found.append(named(name)))
        thread.start()
        thread.join()
        assert found.pop() == name

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    thread = threading.Thread(target=lambda: found.append(named(MOVER)))
    thread.start()
    thread.join()
    assert found == [MOVER]


def test_it_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQPAR_CALM_GLOO", "0")
    found: list[tuple[int, int]] = []

    def mover() -> None:
        named(MOVER)
        found.append((calm_gloo(), os.sched_getscheduler(0)))

    thread = threading.Thread(target=mover)
    thread.start()
    thread.join()
    assert found == [(0, os.sched_getscheduler(0))]
