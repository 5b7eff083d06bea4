"""What one rank can tell about where the others are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
import torch.distributed as dist

from seqpar_kernels.comm.loopback import Loopback
from seqpar_kernels.comm.topology import on_one_host
from seqpar_kernels.overlap.machine_profile import default_profile

GROUP = cast(dist.ProcessGroup, None)  # its members are made up


def known(monkeypatch: pytest.MonkeyPatch, rank: int, members: Sequence[int], ranks: int) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(members))


def torchrun(rank: int, local: int, here: int, ranks: int) -> dict[str, str]:
    numbers = {"RANK": rank, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": here, "WORLD_SIZE": ranks}
    return {"TORCHELASTIC_RUN_ID": "none", **{name: str(number) for name, number in numbers.items()}}


@pytest.mark.parametrize(
    ("members", "expected"), [([4, 5], True), ([4, 5, 6, 7], True), ([1, 5], False), ([5, 8], False)]
)
def test_torchrun_tells(monkeypatch: pytest.MonkeyPatch, members: list[int], expected: bool) -> None:
    """Four ranks a host; this is rank 5, the second of the second host."""
    known(monkeypatch, 5, members, 12)
    assert on_one_host(GROUP, torchrun(5, 1, 4, 12)) is expected


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1", "TORCHELASTIC_RUN_ID": "none"},
        {**torchrun(0, 0, 2, 2), "RANK": "zero"},
        torchrun(0, 0, 1, 1),  # of whoever started the process that spawned us
        {k: v for k, v in torchrun(1, 0, 1, 2).items() if k != "TORCHELASTIC_RUN_ID"},  # another launcher
        {"GLOO_SOCKET_IFNAME": "eth0", "MASTER_ADDR": "localhost"},
    ],
)
def test_nothing_is_told(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], rank: int) -> None:
    known(monkeypatch, rank, [0, 1], 2)
    assert on_one_host(GROUP, environment) is None


def test_ranks_on_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, 1, [0, 1], 2)
    assert on_one_host(GROUP, {"GLOO_SOCKET_IFNAME": "lo"}) is True
    # torchrun knows better.
    assert on_one_host(GROUP, {"GLOO_SOCKET_IFNAME": "lo", **torchrun(1, 0, 1, 2)}) is False


def test_a_group_that_torch_does_not_know() -> None:
    assert on_one_host(GROUP, {}) is None


def test_defaults_follow() -> None:
    assert default_profile("cpu", True).link_bytes > default_profile("cpu").link_bytes
    assert default_profile("cpu", False) == default_profile("cpu")
    assert default_profile("cuda", False).link_bytes < default_profile("cuda").link_bytes
    assert default_profile("cuda", True) == default_profile("cuda")
    assert "InfiniBand" in default_profile("cuda", False).source


def test_virtual_ranks_tell_nothing() -> None:
    with Loopback(2) as world:
        assert on_one_host(world.groups[0], {}) is None
