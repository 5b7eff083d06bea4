"""The layer by hand: no more collectives than a good implementation has, and the same result in every mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from bench.layer_plain import LayerCase, PlainLayer
from bench.layer_providers import by_hand, inputs

CASES = {
    "gpt": LayerCase("gpt", 8, 2, 32, 4, 4, 64, "fp32", 0.0),
    "llama": LayerCase("llama", 8, 2, 32, 4, 2, 48, "fp32", 0.0),
}


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(
    ("mode", "collectives"),
    [
        # Forward: q/k/v and the MLP. Backward: both again, and dy of the two row-parallel linears.
        ("sp", {"gather": 2 + 4, "scatter": 2 + 2, "all_reduce": 1}),
        ("tp", {"all_reduce": 2 + 2}),
    ],
)
def test_collectives_by_hand(
    kind: str, mode: str, collectives: dict[str, int], alone: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, called = CASES[kind], Counter[str]()

    def counted(name: str, fn: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            called[name] += 1
            return fn(*args, **kwargs)

        return call

    names = {"all_gather_single": "gather", "all_gather_into_tensor": "gather", "all_reduce": "all_reduce"}
    names |= {"reduce_scatter_single": "scatter", "reduce_scatter_tensor": "scatter"}
    for function, name in names.items():
        if hasattr(dist, function):
            monkeypatch.setattr(dist, function, counted(name, getattr(dist, function)))
    provider = by_hand(mode)(case, "cpu", alone)
    x, dy = inputs(case, "cpu")
    torch.autograd.grad(provider.call(x.requires_grad_()), [x, *provider.params.values()], dy)
    assert called == collectives


@pytest.mark.parametrize("kind", CASES)
def test_by_hand_alone_is_the_whole_layer(kind: str, alone: dist.ProcessGroup) -> None:
    found = []
    for mode in ("whole", "tp", "sp"):
        layer = PlainLayer(CASES[kind], torch.float64, "cpu", mode, alone)
        x, dy = (t.double() for t in inputs(CASES[kind], "cpu"))
        y = layer(x.requires_grad_())
        found.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
