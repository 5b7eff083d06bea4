"""nn.Experts: each rank's part starts as the whole module does, and gives the whole one's result and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.nn import full_tensor

from ..world import World

FORMS: tuple[dict[str, Any], ...] = (
    {},
    dict(bias=True, transposed=True, interleaved=True, limit=0.5, alpha=1.702, up_shift=1.0),
    dict(gated=False, activation="relu2", bias=True),
)


def experts_case(form: dict[str, Any], count: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = group.rank(), group.size()
    for way in ("ep", "tp"):
        torch.manual_seed(1)
        whole = sp.Experts(count, 12, 20, dtype=torch.float64, **form)
        torch.manual_seed(1)
        mine = sp.Experts(count, 12, 20, dtype=torch.float64, group=group, experts=way, **form)
        taken = sp.Experts.from_torch(whole, group, form=whole.form, experts=way)
        x = torch.randn(13, 12, dtype=torch.float64)
        index, weights = torch.rand(13, count).argsort(1)[:, :3], torch.rand(13, 3, dtype=torch.float64)
        part = slice(0, 5) if rank == 0 else slice(5, 13) if rank == 1 else slice(13, 13)
        expected = whole(x, index, weights)
        expected.square().sum().backward()
        for module in (mine, taken):
            out = module(x[part], index[part], weights[part])
            torch.testing.assert_close(out, expected[part])
            out.square().sum().backward()
            for name, param in module.named_parameters():
                theirs = whole.get_parameter(name)
                spec = module.sharded.get(name)
                assert param.grad is not None
                full, grad = (t if spec is None else full_tensor(t, spec, group) for t in (param, param.grad))
                assert torch.equal(full, theirs), name
                torch.testing.assert_close(grad, theirs.grad)
    with pytest.raises(ValueError, match=r"intermediate_size: expected .* multiple"):
        sp.Experts(8, 4, 8 * ranks + 1, group=group, experts="tp")


@pytest.mark.parametrize("count", [8, 5, 3], ids=["", "uneven", "fewer than ranks"])
@pytest.mark.parametrize("form", FORMS, ids=["plain", "gpt-oss", "no gate"])
def test_parts_are_the_whole(world: World, form: dict[str, Any], count: int) -> None:
    world.run(experts_case, form, count)


def test_refused() -> None:
    with pytest.raises(ValueError, match="experts: expected 'ep' or 'tp'"):
        sp.Experts(4, 4, 4, experts="both")
    with pytest.raises(ValueError, match="hidden_size: expected a positive int"):
        sp.Experts(4, 0, 4)
    with pytest.raises(ValueError, match="module: expected a parameter gate_up_proj"):
        sp.Experts.from_torch(torch.nn.Linear(3, 3), form=sp.nn.ExpertForm())
