"""Every public name has an example in its docstring, which runs and gives what it says."""

from __future__ import annotations

import doctest
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp

from .world import World

#: Names whose example needs several ranks: measuring a link is one.
RANKS = {"tune": 2}


def public_names() -> dict[str, Any]:
    """Name -> object, each object once: functions and classes of the package, of ``nn`` and of ``megatron``."""
    modules = {"": sp, "nn.": sp.nn, "megatron.": sp.megatron}
    found: dict[str, Any] = {}
    for prefix, module in modules.items():
        for name in module.__all__:
            public = getattr(module, name)
            if not inspect.ismodule(public) and not any(public is other for other in found.values()):
                found[prefix + name] = public
    return found


NAMES = public_names()


def examples_of(name: str) -> list[doctest.DocTest]:
    return doctest.DocTestFinder(recurse=False).find(NAMES[name], name, globs={})


def run_examples(name: str) -> None:
    """
    Raises:
        AssertionError: an example gives something else than its docstring says.
    """
    torch.manual_seed(0)
    for example in examples_of(name):
        said: list[str] = []
        failed = doctest.DocTestRunner().run(example, out=said.append).failed
        assert not failed, "".join(said)


def run_on_a_rank(name: str, cache: str) -> None:
    os.environ["XDG_CACHE_HOME"] = cache
    run_examples(name)


@pytest.fixture(scope="module")
def group_of_one() -> Iterator[None]:
    """A default group of this process alone: what torchrun makes, for examples that name ``group.WORLD``."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_has_an_example(name: str) -> None:
    # The site shows this section as code, and one called "Example" as quoted text.
    assert "\nExamples:\n" in (inspect.getdoc(NAMES[name]) or "")
    assert sum(len(example.examples) for example in examples_of(name)) > 1


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANKS])
@pytest.mark.usefixtures("group_of_one")
def test_example_runs(name: str) -> None:
    run_examples(name)


@pytest.mark.parametrize("name", RANKS)
def test_example_runs_on_ranks(name: str, tmp_path: Path) -> None:
    ranks = World(RANKS[name])
    try:
        ranks.run(run_on_a_rank, name, str(tmp_path))
    finally:
        ranks.close()
