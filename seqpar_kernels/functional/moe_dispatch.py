"""Tokens to the ranks of their experts and back, for your own experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import check_float, check_tensor
from ..comm.coordination import checked_together, coordination_of
from ..kernels.spec import accumulation_dtype
from ..layout import Group, group_size, resolve_group
from ..ops.registry import group_name
from ..overlap.moe_routes import ExpertPlacement
from .moe import check_num_experts, check_routing


@dataclass(frozen=True)
class DispatchedTokens:
    """What :func:`moe_dispatch` has brought to this rank: the tokens of rank 0, those of rank 1, ...

    Attributes:
        rows: [N, H], each token once.
        index: [N, K] int32, numbers among this rank's experts, -1 where the expert is elsewhere.
        weights: [N, K], like ``top_k_weights``.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> index = torch.tensor([[0, 3], [1, 2]])
        >>> there = sp.moe_dispatch(torch.randn(2, 4), index, torch.rand(2, 2), group=None, num_experts=4)
        >>> there.index.tolist()
        [[0, 3], [1, 2]]
    """

    rows: Tensor
    index: Tensor
    weights: Tensor
    _group: ProcessGroup | None
    _shape: torch.Size  # of x
    _tokens: list[Tensor]  # which of this rank's tokens have gone to each rank
    _counts: list[int]  # how many have come from each


def moe_dispatch(
    x: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, group: Group, num_experts: int
) -> DispatchedTokens:
    """Bring each token to the ranks that have experts of it, once a rank. All ranks of the group must call it.

    For your own experts, between this and :func:`moe_combine`; :func:`moe_mlp` overlaps the way with the work.
    Differentiable in ``x`` and ``top_k_weights``; sums over ranks are taken in fp32 (fp64 for fp64).

    Args:
        x: [..., H], this rank's tokens; ranks may have any numbers of them.
        top_k_index: [..., K] integers, each token's experts, 0 .. E - 1; E or -1 is no expert.
        top_k_weights: [..., K], any floating-point dtype.
        group: ProcessGroup or 1-D DeviceMesh of t ranks, None for this one alone.
        num_experts: E; rank r has part r of ``tensor_split`` of them.

    Raises:
        ValueError: an argument that does not fit, by name, on every rank, before anything is sent.
        RuntimeError: ranks that disagree.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, index, weights = torch.randn(6, 4), torch.randint(8, (6, 2)), torch.rand(6, 2)
        >>> there = sp.moe_dispatch(x, index, weights, group=None, num_experts=8)
        >>> y = there.rows * (there.weights * (there.index >= 0)).sum(-1, keepdim=True)  # experts that change nothing
        >>> torch.allclose(sp.moe_combine(y, there), x * weights.sum(-1, keepdim=True))
        True
    """
    pg = resolve_group(group)
    with checked_together(pg):
        check_tensor("x", x)
        check_float("x", x)
        check_num_experts(num_experts)
        check_routing(x, top_k_index, top_k_weights, num_experts)
    placement = ExpertPlacement(num_experts, group_size(pg), "ep")
    top_k = top_k_index.shape[-1]
    rows, index, weights = x.reshape(-1, x.shape[-1]), top_k_index.reshape(-1, top_k), top_k_weights.reshape(-1, top_k)
    tokens = [placement.tokens(index, rank) for rank in range(placement.ranks)]
    local = [placement.local(index.index_select(0, some), rank) for rank, some in enumerate(tokens)]
    # One rounding of the gradient's sum over ranks: it is taken in the wide dtype of what is selected from.
    wide_rows, wide_weights = (t.to(accumulation_dtype(t.dtype)) for t in (rows, weights))
    sent = [
        torch.cat([t.index_select(0, some) for some in tokens]).to(dtype)
        for t, dtype in ((wide_rows, x.dtype), (wide_weights, top_k_weights.dtype))
    ]
    if pg is None:
        return DispatchedTokens(sent[0], local[0], sent[1], None, x.shape, tokens, [len(tokens[0])])
    coordination_of(pg).require(
        f"moe_dispatch of H={x.shape[-1]} {x.dtype}, K={top_k} {top_k_weights.dtype}, {num_experts} experts"
    )
    ones, name = [1] * pg.size(), group_name(pg)
    leaving = [len(some) for some in tokens]
    counts: list[int] = ops.all_to_all(torch.tensor(leaving, device=x.device), ones, ones, name).tolist()
    got_rows, got_weights = (ops.all_to_all(t, counts, leaving, name) for t in sent)
    got_index = ops.all_to_all(torch.cat(local), counts, leaving, name)
    return DispatchedTokens(got_rows, got_index, got_weights, pg, x.shape, tokens, counts)


def moe_combine(y: Tensor, dispatched: DispatchedTokens) -> Tensor:
    """Bring what the experts made of each token back, and sum it over ranks, in their order, in fp32 (fp64).

    Args:
        y: [N, H'], a row for each of ``dispatched.rows``: the weighted sum of this rank's experts of it.
        dispatched: what :func:`moe_dispatch` returned.

    Returns:
        [..., H'], in place of ``x``; 0 for a token without an expert.

    Raises:
        ValueError: ``y`` does not fit, on every rank, before anything is sent.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, index, weights = torch.randn(6, 4), torch.randint(8, (6, 2)), torch.rand(6, 2)
        >>> there = sp.moe_dispatch(x, index, weights, group=None, num_experts=8)
        >>> sp.moe_combine(there.rows, there).shape
        torch.Size([6, 4])
    """
    pg = dispatched._group
    with checked_together(pg):
        check_tensor("y", y)
        check_float("y", y)
        if y.dim() != 2 or y.shape[0] != dispatched.rows.shape[0]:
            raise ValueError(f"y: expected [{dispatched.rows.shape[0]}, H], a row a token, got {tuple(y.shape)}")
    leaving = [len(some) for some in dispatched._tokens]
    if pg is not None:
        coordination_of(pg).require(f"moe_combine of H={y.shape[1]} {y.dtype}")
        y = ops.all_to_all(y, leaving, dispatched._counts, group_name(pg))
    wide, shape = accumulation_dtype(y.dtype), dispatched._shape
    total = torch.zeros(shape[:-1].numel(), y.shape[1], dtype=wide, device=y.device)
    for some, part in zip(dispatched._tokens, y.split(leaving), strict=True):
        total = total.index_add(0, some, part.to(wide))
    return total.to(y.dtype).view(*shape[:-1], y.shape[1])
