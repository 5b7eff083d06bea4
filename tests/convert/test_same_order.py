"""Accelerate's shuffled loaders on ranks that are seeded apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler, SubsetRandomSampler, WeightedRandomSampler

from ..world import World
from .test_training_loops import converted, launched, mesh_of

pytest.importorskip("accelerate")

ROWS = torch.arange(12)


def loaders(seed: int) -> dict[str, DataLoader[Any]]:
    own = torch.Generator().manual_seed(seed)
    samplers: dict[str, Sampler[Any]] = {
        "subset": SubsetRandomSampler(range(12)),
        "weighted": WeightedRandomSampler([1.0] * 12, 12),
    }
    found = {name: DataLoader(ROWS, batch_size=2, sampler=sampler) for name, sampler in samplers.items()}
    found["shuffled"] = DataLoader(ROWS, batch_size=2, shuffle=True)
    found["own generator"] = DataLoader(ROWS, batch_size=2, shuffle=True, generator=own)
    found["in order"] = DataLoader(ROWS, batch_size=2)
    return found


def order_case(data_parallel: int, seedable: bool) -> dict[str, list[list[int]]]:
    """Loader -> the rows of two epochs on this rank."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from seqpar_kernels.convert.hf.accelerate import parallelism_config

    launched()
    config = DataLoaderConfiguration(use_seedable_sampler=seedable)
    model = converted(mesh_of(data_parallel))
    accelerator = Accelerator(cpu=True, dataloader_config=config, parallelism_config=parallelism_config(model))
    torch.manual_seed(100 + dist.get_rank())
    state = torch.get_rng_state()
    found = {}
    for name, loader in loaders(dist.get_rank()).items():
        prepared = accelerator.prepare(loader)
        found[name] = [[row for batch in prepared for row in batch.tolist()] for _ in range(2)]
    assert not torch.equal(state, torch.get_rng_state()) or name == "in order"
    return found


@pytest.mark.parametrize("seedable", [True, False], ids=["seedable", ""])
def test_shuffled_alike_for_tensor_parallel_ranks(world2: World, seedable: bool) -> None:
    first, second = world2.run(order_case, 1, seedable)
    assert first == second
    for name, (one, two) in first.items():
        assert len(one) == len(two) == 12, name
        assert (one == two) is (name == "in order"), name


@pytest.mark.parametrize("seedable", [True, False], ids=["seedable", ""])
def test_shuffled_alike_for_each_model_of_several(world4: World, seedable: bool) -> None:
    found = world4.run(order_case, 2, seedable)
    assert found[0] == found[1] and found[2] == found[3]
    for name in set(found[0]) - {"weighted"}:
        for epoch in range(2):
            assert sorted(found[0][name][epoch] + found[2][name][epoch]) == list(range(12)), name
