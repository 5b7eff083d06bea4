"""Fixtures: worlds of real gloo ranks, one per size and session."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from .world import World

# No test is decided by time: a busy machine is not a failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def world2() -> Iterator[World]:
    world = World(2)
    yield world
    world.close()


@pytest.fixture(scope="session")
def world4() -> Iterator[World]:
    world = World(4)
    yield world
    world.close()


@pytest.fixture(params=[2, 4], ids=["2ranks", "4ranks"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(f"world{request.param}")
    return found
