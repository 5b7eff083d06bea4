"""Engines: their names, old and new, and the backend's own all-gather where nothing is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.comm import p2p
from seqpar_kernels.comm.loopback import Loopback
from seqpar_kernels.functional import checked_all_gather_linear, checked_linear_reduce_scatter
from seqpar_kernels.overlap import engines

from ..comm.test_loopback import layer, one_thread_a_rank  # noqa: F401
from ..world import World


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def test_names_are_those_of_the_engines() -> None:
    assert engines.NAMES == ("auto", "single", "p2p", "symm_mem", "fused")
    for engine in engines.ENGINES:
        assert engines.named(engine.name) is engine
        assert engine.everywhere == (engine.variable == "")
    assert engines.named("collective") is engines.P2P and engines.named("peer") is engines.SYMM_MEM
    for name in (*engines.NAMES, "collective", "peer"):
        engines.check_engine(name)
    for wrong in ("none", None, ["p2p"], "P2P"):
        with pytest.raises(
            ValueError, match=r"engine: expected one of \('auto', 'single', 'p2p', 'symm_mem', 'fused'\)"
        ):
            engines.check_engine(wrong)  # type: ignore[arg-type]


def old_name_case() -> None:
    """A rank that says "collective" and one that says "p2p" mean the same, eager and compiled."""
    x, w = torch.ones(1, 4, 6), torch.ones(3, 6)
    name = ("collective", "p2p")[group().rank() % 2]
    for fn in (checked_all_gather_linear, checked_linear_reduce_scatter):
        more = (None,) if fn is checked_all_gather_linear else ()
        call, operands = fn(x, w, None, group(), 1, 2, name, *more)  # type: ignore[operator]
        call(*operands)
        assert call.plan[:3] == ("p2p", 2, "chunks=2 given")

    @torch.compile(fullgraph=True, backend="eager")
    def compiled(x: Tensor) -> Tensor:
        return sp.all_gather_linear(x, w, group=group(), chunks=2, engine=name)

    assert torch.equal(compiled(x), sp.all_gather_linear(x, w, group=group(), chunks=2, engine="p2p"))


def test_an_old_name_is_the_new_one(world2: World) -> None:
    world2.run(old_name_case)


def test_an_old_name_of_symmetric_memory_says_the_new_one() -> None:
    def ask(g: dist.ProcessGroup) -> str:
        with pytest.raises(RuntimeError) as caught:
            sp.all_gather_linear(torch.ones(2, 4, 6), torch.ones(3, 6), group=g, engine="peer")
        return str(caught.value)

    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with Loopback(2) as loopback:
        assert all("engine: 'symm_mem' cannot run here" in text for text in loopback.run(ask))


def own_all_gather_case(length: int, seq_dim: int, dtype: torch.dtype) -> tuple[int, bool]:
    """The bits of messages, from one collective a gather where shards are alike."""
    calls, ours = [0], (length, seq_dim, None, "single", dtype)
    expected = layer(group(), *ours)  # type: ignore[arg-type]
    gather, gathers = dist.all_gather_into_tensor, p2p.gathers_itself

    def counting(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return gather(*args, **options)

    dist.all_gather_into_tensor, p2p.gathers_itself = counting, lambda group, device_type: True  # type: ignore[assignment]
    try:
        got = layer(group(), *ours)  # type: ignore[arg-type]
    finally:
        dist.all_gather_into_tensor, p2p.gathers_itself = gather, gathers  # type: ignore[assignment]
    return calls[0], all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seq_dim", [0, 1])
@pytest.mark.parametrize("length", [16, 13, 1])
def test_the_backends_own_all_gather(world: World, length: int, seq_dim: int, dtype: torch.dtype) -> None:
    """As on NCCL: the forward's gather, and those of x and dy in the backward. gloo stands in for it."""
    for calls, same in world.run(own_all_gather_case, length, seq_dim, dtype):
        assert same and calls == (0 if length % world.ranks else 3)


def failing_gather_case() -> str:
    """An error of the backend names the op; afterwards the group works."""
    x, w = torch.ones(1, 4, 6), torch.ones(3, 6)
    gather, gathers = dist.all_gather_into_tensor, p2p.gathers_itself

    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("the cable is out")

    dist.all_gather_into_tensor, p2p.gathers_itself = broken, lambda group, device_type: True  # type: ignore[assignment]
    try:
        with pytest.raises(RuntimeError) as caught:
            sp.all_gather_linear(x, w, group=group(), engine="single")
    finally:
        dist.all_gather_into_tensor, p2p.gathers_itself = gather, gathers  # type: ignore[assignment]
    y = sp.all_gather_linear(x, w, group=group(), engine="single")
    assert torch.equal(y, torch.full_like(y, 6.0))
    return str(caught.value)


def test_an_all_gather_that_fails_names_its_op(world2: World) -> None:
    for text in world2.run(failing_gather_case):
        assert text.startswith("all_gather_linear(S=8") and "the cable is out" in text


def test_gloo_sends_messages(world2: World) -> None:
    assert world2.run(_gloos_choice) == [False, False]


def _gloos_choice() -> bool:
    return p2p.gathers_itself(group(), "cpu") or p2p.gathers_itself(group(), "cuda")
