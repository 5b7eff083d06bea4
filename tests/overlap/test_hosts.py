"""What one rank can prove about where the others are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest
import torch.distributed as dist

from seqpar_kernels.overlap.figures import default_figures
from seqpar_kernels.overlap.hosts import on_one_host
from seqpar_kernels.overlap.loopback import Loopback

GROUP = cast(dist.ProcessGroup, None)  # its members are made up


def known(monkeypatch: pytest.MonkeyPatch, rank: int, members: Sequence[int], store: dist.Store | None = None) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: list(members))
    met_at = dist.HashStore() if store is None else store
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: dist.PrefixStore("a", met_at))


@pytest.mark.parametrize(
    ("members", "expected"), [([4, 5], True), ([4, 5, 6, 7], True), ([1, 5], False), ([5, 8], False)]
)
def test_torchrun_tells(monkeypatch: pytest.MonkeyPatch, members: list[int], expected: bool) -> None:
    """Four ranks a host; this is rank 5, the second of the second host."""
    known(monkeypatch, 5, members)
    assert on_one_host(GROUP, {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}) is expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "1"},
        {"RANK": "one", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},  # of whoever started the process that spawned us
        {"GLOO_SOCKET_IFNAME": "eth0"},
    ],
)
def test_nothing_is_proved(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    known(monkeypatch, 1, [0, 1])
    assert on_one_host(GROUP, environment) is None


def test_ranks_on_the_loopback_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, 1, [0, 1])
    assert on_one_host(GROUP, {"GLOO_SOCKET_IFNAME": "lo"}) is True


def test_ranks_that_met_at_a_loopback_address(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    known(monkeypatch, 1, [0, 1], store)
    assert on_one_host(GROUP, {}) is True
    # torchrun knows better: the first host may call itself so.
    assert on_one_host(GROUP, {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}) is False


def test_a_group_that_torch_does_not_know() -> None:
    assert on_one_host(GROUP, {}) is None


def test_defaults_follow() -> None:
    assert default_figures("cpu", True).link_bytes > default_figures("cpu").link_bytes
    assert default_figures("cpu", False) == default_figures("cpu")
    assert default_figures("cuda", False).link_bytes < default_figures("cuda").link_bytes
    assert default_figures("cuda", True) == default_figures("cuda")
    assert "InfiniBand" in default_figures("cuda", False).source


def test_virtual_ranks_prove_nothing() -> None:
    with Loopback(2) as world:
        assert on_one_host(world.groups[0], {}) is None
