"""nn.Experts: each rank's part starts as the whole module does, and gives the whole one's result and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels.nn import RowsByExpert, full_tensor

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


def rows_case() -> None:
    """Scaled rows for each expert in turn, two experts a token: what a matmul of all rows gives, zeros included."""
    group = dist.group.WORLD
    assert group is not None
    rank = group.rank()
    for way, count in (("ep", 5), ("ep", 3), ("tp", 4)):
        torch.manual_seed(2)
        whole = RowsByExpert(count, 12, 8, dtype=torch.float64, transposed=True)
        mine = RowsByExpert.from_torch(whole, group, form=whole.form, experts=way)
        tokens = torch.randn(9, 12, dtype=torch.float64)
        tokens[3] = 0.0  # a token that is 0 is chosen too
        scores = torch.rand(9, count, dtype=torch.float64)
        scores *= torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0)
        part = slice(0, 6) if rank == 0 else slice(6, 9) if rank == 1 else slice(9, 9)
        found = []
        for module, some in ((None, slice(0, 9)), (mine, part)):
            x, s = tokens[some].clone().requires_grad_(), scores[some].clone().requires_grad_()
            rows = x.repeat(count, 1) * s.t().reshape(-1, 1)
            if module is None:  # Llama4TextExperts.forward
                gate, up = torch.bmm(rows.view(count, -1, 12), whole.gate_up_proj).chunk(2, -1)
                out = torch.bmm(up * torch.nn.functional.silu(gate), whole.down_proj).view(-1, 12)
            else:
                out = module(rows)
            summed = out.reshape(count, -1, 12).sum(0)
            summed.square().sum().backward()
            # The router's scores of experts that were not chosen come from sigmoid(-inf), which lets no gradient pass.
            found.append((summed.detach(), x.grad, s.grad * (scores[some] > 0)))
        for ours, theirs in zip(found[1], found[0], strict=True):
            torch.testing.assert_close(ours, theirs[part])
        for name, param in mine.named_parameters():
            spec, theirs = mine.sharded[name], whole.get_parameter(name)
            torch.testing.assert_close(full_tensor(param.grad, spec, group), theirs.grad)


def test_rows_by_expert(world: World) -> None:
    world.run(rows_case)


def test_refused() -> None:
    with pytest.raises(ValueError, match="experts: expected 'ep' or 'tp'"):
        sp.Experts(4, 4, 4, experts="both")
    with pytest.raises(ValueError, match="hidden_size: expected a positive int"):
        sp.Experts(4, 0, 4)
    with pytest.raises(ValueError, match="module: expected a parameter gate_up_proj"):
        sp.Experts.from_torch(torch.nn.Linear(3, 3), form=sp.nn.ExpertForm())
