"""The short form of ``python -m bench.soak``."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from bench import soak_ranks as soak

from .world import World


def on_world(what: str, *args: Any) -> Any:
    group = dist.new_group(list(range(dist.get_world_size())))
    return getattr(soak, what)(group, *args)


def test_faults(world2: World) -> None:
    """Every kind of fault; results right, the group usable. How long a call may take is for an idle machine."""
    for one in world2.run(on_world, "faults", 16, 0.3):
        assert one["rounds"] == 16 and not one["wrong"] and not one["unusable"], one
        # the rounds are drawn so that each kind comes early
        assert len(one["slowest"]) == len(soak._KINDS), one
        assert max(one["slowest"].values()) < 30, one


def test_lengths_that_never_come_again(world2: World) -> None:
    """Enough to run through; caches are bounded by count, which a long run shows."""
    for seen in world2.run(on_world, "lengths", 100):
        assert [step for step, _ in seen] == list(range(10, 101, 10))


def test_growth_is_that_after_warm_up() -> None:
    seen = [(step, 100.0 if step < 400 else 200.0 + step / 250) for step in range(100, 1001, 100)]
    assert round(soak.growth(seen), 3) == 4.0
