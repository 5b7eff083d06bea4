"""gloo's own threads, once a group has been used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.overlap.gloo_threads import calm_gloo

from ..world import World

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="no such scheduler on this system")


def policies() -> dict[str, list[int]]:
    """Name -> scheduling policies of this process's threads of that name."""
    found: dict[str, list[int]] = {}
    for comm in Path("/proc/self/task").glob("*/comm"):
        name = comm.read_text().strip()
        found.setdefault(name, []).append(os.sched_getscheduler(int(comm.parent.name)))
    return found


def after_an_op() -> tuple[dict[str, list[int]], int, int]:
    sp.all_gather_linear(torch.randn(2, 4, 6), torch.randn(3, 6), group=dist.group.WORLD)
    return policies(), os.sched_getscheduler(0), calm_gloo()


def test_movers_take_no_core_from_a_running_thread(world2: World) -> None:
    for found, own, again in world2.run(after_an_op):
        movers = found.pop("gloo_tcp_loop")
        assert movers and set(movers) == {os.SCHED_BATCH}
        assert {policy for of in found.values() for policy in of} == {own}
        assert again == 0
