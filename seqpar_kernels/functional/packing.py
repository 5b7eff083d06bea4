"""Attention over a batch of documents, each on as many ranks as it needs.

========  =================================================================  =================  =============
pass      computes                                                           result             communication
========  =================================================================  =================  =============
forward   two groups' attention, one after the other (``_After``: no copy)   [rows, heads, D]   none
backward  the later group's gradients first, on all ranks alike              those of inputs    none
========  =================================================================  =================  =============

What the groups send is that of :mod:`.sequence_attention`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..caches import per_group
from ..checks import check_tensor
from ..comm.coordination import coordination_of
from ..layout import Group, group_rank, group_size, resolve_group
from ..packer import divisors, pack
from ..packing import Costs, PackingPlan
from .sequence_attention import sequence_parallel_attention

#: A token costs a dense layer 12 h^2 multiply-adds, a pair of query and key costs 2 h. Their ratio at h = 4096.
TOKEN_WORK = 6.0 * 4096


def pack_documents(
    lengths: Sequence[int] | Tensor,
    ranks: int,
    *,
    max_tokens: int | None = None,
    pair_work: float = 1.0,
    token_work: float = TOKEN_WORK,
    max_imbalance: float = 1.05,
) -> PackingPlan:
    """Place the documents of a batch on ranks so that all ranks have about the same work and share few documents.

    A document is whole on one rank, or d consecutive ranks share it, where d divides the number of ranks and the first
    of these ranks is a multiple of d. Nothing is sent: the same arguments give the same plan on every rank.
    :func:`packed_attention` runs the plan.

    Args:
        lengths: tokens of each document; those of packed ones are ``cu_seqlens.diff()``.
        ranks: the number of ranks.
        max_tokens: the most tokens that a rank may hold; None: no bound.
        pair_work: the work of a pair of a query and a key; a document of length L has L (L + 1) / 2 pairs under a
            causal mask.
        token_work: the work of a token in the rest of a layer: 6 h pairs in a dense layer of hidden size h. The default
            is that of h = 4096. With a sliding window pass ``pair_work=0``: the work is then proportional to tokens.
        max_imbalance: the search ends when the slowest rank's work divided by the mean is no larger, since sharing more
            documents would only send more. Where no placement reaches it, the best one found is returned.

    Returns:
        PackingPlan: the place of every document, and how well the ranks balance.

    Raises:
        ValueError: an argument that does not fit, by name; no placement found holds ``max_tokens``.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> plan = sp.pack_documents([8, 2, 2], 2, token_work=0)
        >>> for segment in plan.segments:
        ...     print("documents", *segment.documents, "on ranks", *segment.ranks)
        documents 0 on ranks 0 1
        documents 1 on ranks 0
        documents 2 on ranks 1
        >>> mine = plan.on_rank(1)
        >>> mine.take(torch.arange(12))
        tensor([ 2,  3,  4,  5, 10, 11])
        >>> mine.position_ids()
        tensor([2, 3, 4, 5, 0, 1])
        >>> mine.next_token_labels(torch.arange(12))
        tensor([   3,    4,    5,    6,   11, -100])
    """
    if isinstance(lengths, Tensor):
        if lengths.dim() != 1 or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
            raise ValueError(f"lengths: expected integers [documents], got {lengths.dtype} {tuple(lengths.shape)}")
        lengths = lengths.tolist()
    if not isinstance(lengths, Sequence) or not all(type(n) is int and n >= 0 for n in lengths):
        raise ValueError(f"lengths: expected non-negative ints, the tokens of each document, got {lengths!r:.200}")
    if type(ranks) is not int or ranks < 1:
        raise ValueError(f"ranks: expected a positive int, got {ranks!r}")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 0):
        raise ValueError(f"max_tokens: expected a non-negative int or None, got {max_tokens!r}")
    for name, cost in (("pair_work", pair_work), ("token_work", token_work)):
        if not _is_number(cost) or not 0 <= cost < math.inf:
            raise ValueError(f"{name}: expected a finite number, 0 or more, got {cost!r}")
    if not pair_work and not token_work:
        raise ValueError("token_work: expected more than 0 where pair_work is 0, got 0")
    if not _is_number(max_imbalance) or not max_imbalance >= 1:
        raise ValueError(f"max_imbalance: expected a number, 1 or more, got {max_imbalance!r}")
    costs = Costs(float(pair_work), float(token_work))
    plan = pack(tuple(lengths), ranks, costs, max_tokens, max_imbalance)
    if isinstance(plan, int):
        raise ValueError(
            f"max_tokens: expected at least {plan}, the best placement found of {sum(lengths)} tokens in "
            f"{len(lengths)} documents on {ranks} ranks, got {max_tokens}"
        )
    _ = plan.segments  # computed now: torch.compile does not trace the first use of a cached property
    return plan


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def degree_groups(group: Group) -> dict[int, ProcessGroup | None]:
    """This rank's group of d consecutive ranks, for every divisor d of the number of ranks.

    The first call makes the groups; they are kept as long as ``group``. As for ``torch.distributed.new_group`` every
    rank of the world must make the first call, each with its own group. A rank that is in no group passes the value
    that ``new_group`` returned there. Where ``group`` has all ranks, :func:`packed_attention` makes the call itself.

    Args:
        group: the ranks that share a batch: a ProcessGroup, a 1-D DeviceMesh or None for this rank alone. None makes
            no groups and needs no call on other ranks.

    Returns:
        dict[int, ProcessGroup | None]: degree -> group; None for degree 1, ``group`` itself for all its ranks. Empty
        on a rank that is in no group.

    Raises:
        ValueError: ``group`` is no group, or the ranks of a group are not in ascending order.

    Examples:
        >>> import seqpar_kernels as sp
        >>> sp.degree_groups(None)
        {1: None}
    """
    if type(group) is int and group == dist.GroupMember.NON_GROUP_MEMBER:
        _make_subgroups(None)
        return {}
    pg = group.get_group() if isinstance(group, DeviceMesh) and group.ndim == 1 else group
    if isinstance(pg, ProcessGroup) and dist.get_world_size() > 1:
        _subgroups(pg)
    return _with_ends(resolve_group(group))


def _with_ends(group: ProcessGroup | None) -> dict[int, ProcessGroup | None]:
    if group is None:
        return {1: None}
    between: dict[int, ProcessGroup] = _subgroups(group) if _needs_subgroups(group) else {}
    return {1: None, **between, group.size(): group}


def _needs_subgroups(group: ProcessGroup) -> bool:
    return len(divisors(group.size())) > 2


#: Groups whose subgroups have been made. A call that fails must not make them, so it looks here.
_made: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()


@per_group
def _subgroups(group: ProcessGroup) -> dict[int, ProcessGroup]:
    found = _make_subgroups(group)
    _made.add(group)
    return found


def _make_subgroups(group: ProcessGroup | None) -> dict[int, ProcessGroup]:
    """Make the subgroups of all groups of the world, on all of its ranks in one order.

    ``use_local_synchronization=True`` would need a call of the members only. But it names a group after the number of
    groups that a rank is in (torch 2.13), and members where these numbers differ would wait until the time-out.
    """
    mine = None
    if group is not None:
        timeout = coordination_of(group).timeout
        mine = (tuple(dist.get_process_group_ranks(group)), dist.get_backend_config(group), timeout)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    found = {}
    for ranks, backend, timeout in dict.fromkeys(one for one in every if one is not None):
        if list(ranks) != sorted(ranks):
            raise ValueError(f"group: expected one whose ranks are in ascending order, got {list(ranks)}")
        for degree in divisors(len(ranks))[1:-1]:
            for first in range(0, len(ranks), degree):
                block = list(ranks[first : first + degree])
                made = dist.new_group(
                    block, timeout=timeout, backend=backend, group_desc=f"seqpar documents by {degree}"
                )
                if mine is not None and ranks == mine[0] and dist.get_rank() in block:
                    found[degree] = made
    return found


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PackingPlan,
    *,
    group: Group,
    is_causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    engine: str = "auto",
    save_kv: bool | None = None,
) -> Tensor:
    """Attention of each document of a plan over itself, on the ranks that share it.

    One call of :func:`sequence_parallel_attention` for each shared document, and one for all whole documents of a
    rank. All ranks of ``group`` must make the call, and run its backward. Ranks make their calls in the order of
    ``plan.segments``, and their backwards in the opposite order. So of the calls that are not done, the first one is
    the next call of all its ranks, and no rank waits forever. Under torch.compile ranks do not compare their plans, and
    :func:`degree_groups` must have been called before.

    Args:
        q: [B, T, Hq, D], this rank's rows, as ``plan.on_rank(rank).take`` returns them. B is usually 1.
        k: [B, T, Hkv, D]
        v: [B, T, Hkv, Dv]
        plan: the same on all ranks, made for as many ranks as ``group`` has.
        group: the ranks that share the batch: a ProcessGroup, a 1-D DeviceMesh or None for this rank alone.
        is_causal: as in :func:`sequence_parallel_attention`, and so are those below.
        window_size: as there, within each document.
        scale: as there.
        softcap: as there.
        sinks: as there; their gradient is this rank's part.
        engine: as there, for shared documents.
        save_kv: as there.

    Returns:
        Tensor: [B, T, Hq, Dv]

    Raises:
        ValueError: an argument that does not fit, by name, before anything is sent.
        RuntimeError: ranks that have unlike plans, or one that failed.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> plan = sp.pack_documents([5, 3], 1)
        >>> q, k, v = torch.randn(3, 1, 8, 4, 16).unbind(0)
        >>> sp.packed_attention(q, k, v, plan, group=None, is_causal=True).shape
        torch.Size([1, 8, 4, 16])
    """
    pg = resolve_group(group)
    waiting = _Waiting(pg)
    try:
        _check_plan(plan, pg)
        mine = plan.on_rank(group_rank(pg))
        waiting.degrees = tuple(dict.fromkeys(s.degree for s in mine.segments if s.degree > 1))
        for name, t in (("q", q), ("k", k), ("v", v)):
            check_tensor(name, t)
            if t.dim() != 4 or t.shape[1] != mine.tokens:
                raise ValueError(
                    f"{name}: expected [B, {mine.tokens}, H, D], the rows of rank {mine.rank} of the plan, got "
                    f"{tuple(t.shape)}"
                )
        if pg is not None and not torch.compiler.is_compiling():
            waiting.inside = pg.size()
            coordination_of(pg).require(f"packed_attention of {plan.signature}")
            waiting.inside = 1
        groups = _groups_for(pg)
        options: dict[str, Any] = dict(is_causal=is_causal, window_size=window_size, scale=scale, softcap=softcap)
        parts = list(zip(*(t.split(mine.sizes, 1) for t in (q, k, v)), strict=True))
        outs: list[Tensor] = []
        for segment, part in zip(mine.segments, parts, strict=True):
            inputs: tuple[Any, ...] = (*part, sinks)
            if outs:
                inputs, outs[-1] = _after(inputs, outs[-1])
            waiting.inside = segment.degree
            if segment.degree == 1:
                asked: dict[str, Any] = dict(group=None, cu_seqlens=mine.cu_seqlens(segment).to(q.device))
            else:
                length = plan.lengths[segment.documents[0]]
                asked = dict(group=groups[segment.degree], seq_len=length, kv_seq_len=length, layout="zigzag")
                asked.update(engine=engine, save_kv=save_kv)
            own_q, own_k, own_v, own_sinks = inputs
            out = sequence_parallel_attention(own_q, own_k, own_v, sinks=own_sinks, **asked, **options)
            assert isinstance(out, Tensor)
            outs.append(out)
            waiting.inside = 1
    except Exception as error:
        waiting.tell(error)
        raise
    if not outs:  # no row, but the result is part of the autograd graph as on the other ranks
        return v.new_zeros(*q.shape[:3], v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


class _Waiting:
    """Publishes an error of this rank in all groups whose ranks wait for it, so that none waits until the time-out."""

    def __init__(self, group: ProcessGroup | None):
        self._group = group
        self.degrees: tuple[int, ...] = ()  # the degrees of this rank's calls, without 1
        self.inside = 1  # the degree of the current call, which publishes its own errors

    def tell(self, error: Exception) -> None:
        if self._group is None or torch.compiler.is_compiling():
            return
        reason, whole = f"{type(error).__name__}: {error}", self._group.size()
        groups = _with_ends(self._group) if self._group in _made else {whole: self._group}
        for degree in dict.fromkeys((whole, *self.degrees)):
            group = groups.get(degree)
            if group is not None and degree != self.inside:
                coordination_of(group).fail(reason, step=degree in self.degrees)


def _groups_for(group: ProcessGroup | None) -> dict[int, ProcessGroup | None]:
    missing = group is not None and _needs_subgroups(group) and group not in _made
    if missing and group is not None and group.size() != dist.get_world_size():
        raise ValueError(
            "group: expected all ranks, or one for which degree_groups has been called on every rank of the world, "
            f"each with its own group; got ranks {dist.get_process_group_ranks(group)}"
        )
    return _with_ends(group)


def _check_plan(plan: Any, group: ProcessGroup | None) -> None:
    if not isinstance(plan, PackingPlan):
        raise ValueError(f"plan: expected what pack_documents returns, got {type(plan).__name__}")
    if plan.ranks != group_size(group):
        raise ValueError(f"plan: expected one for the {group_size(group)} ranks of group, got one for {plan.ranks}")


def _after(inputs: tuple[Tensor | None, ...], earlier: Tensor) -> tuple[tuple[Any, ...], Tensor]:
    """The same values, but the call that made ``earlier`` runs its backward after the call that takes ``inputs``."""
    at = next((i for i, t in enumerate(inputs) if t is not None and t.requires_grad), None)
    if at is None or not earlier.requires_grad or not torch.is_grad_enabled():
        return inputs, earlier
    later, earlier = _After.apply(inputs[at], earlier)
    return (*inputs[:at], later, *inputs[at + 1 :]), earlier


class _After(torch.autograd.Function):
    """An edge in the autograd graph: the gradient of ``earlier`` passes once that of ``later`` is there."""

    @staticmethod
    def forward(ctx: Any, later: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        return later.view_as(later), earlier.view_as(earlier)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads
