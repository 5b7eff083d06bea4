"""Shards of a sequence, contiguous or zigzag: their rows, their positions and their next-token labels."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import check_tensor
from ..comm.coordination import checked_together
from ..layout import Group, group_rank, group_size, normalize_dim, resolve_group, shard_of
from ..ops.registry import group_name
from ..sequence_layout import check_layout, rows_of
from .exchange import gather, split


def sequence_positions(
    seq_len: int, group: Group = None, layout: str = "contiguous", *, device: torch.device | str | None = None
) -> Tensor:
    """Positions of this rank's rows in the unsharded sequence, for rotary embeddings and position ids.

    Args:
        seq_len: rows of the unsharded sequence.
        group: the ranks that share the sequence: a ProcessGroup, a 1-D DeviceMesh or None.
        layout: ``"contiguous"``: rank r holds the r-th part of ``torch.tensor_split``. ``"zigzag"``: it holds as many
            rows, half of them from the front of the sequence, half from the back, so that under a causal mask all
            ranks have about the same work.
        device: of the result.

    Returns:
        Tensor: int64 [S/t], ascending.

    Raises:
        ValueError: an argument that does not fit, by name.

    Examples:
        >>> import seqpar_kernels as sp
        >>> sp.sequence_positions(6)
        tensor([0, 1, 2, 3, 4, 5])
    """
    pg = resolve_group(group)
    with checked_together(pg, step=False):
        check_layout(layout)
        if not isinstance(seq_len, int | torch.SymInt) or isinstance(seq_len, bool) or seq_len < 0:
            raise ValueError(f"seq_len: expected a non-negative int, got {seq_len!r}")
    held = rows_of(layout, seq_len, group_size(pg), group_rank(pg))
    return torch.cat([torch.arange(0, device=device), *(torch.arange(i.start, i.stop, device=device) for i in held)])


def shard_sequence(x: Tensor, group: Group, seq_dim: int = -2, *, layout: str = "contiguous") -> Tensor:
    """This rank's rows of a tensor that every rank holds whole; the backward gathers. [..., S, ...] -> [..., S/t, ...]

    Args:
        x: of any dtype; token ids [B, S] take ``seq_dim=-1``.
        group: ProcessGroup, 1-D DeviceMesh or None.
        seq_dim: the sequence dimension.
        layout: as in :func:`sequence_positions`.

    Returns:
        Tensor: like ``x``, with the rows at :func:`sequence_positions`.

    Raises:
        ValueError: an argument that does not fit, by name.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> sp.shard_sequence(torch.arange(8).view(1, 8), None, -1, layout="zigzag").shape
        torch.Size([1, 8])
    """
    pg, dim = _checked(x, group, seq_dim, layout, step=False)
    if pg is None:
        return x
    if layout == "zigzag":
        x = x.index_select(dim, _order(x.shape[dim], pg.size(), layout, x.device))
    return split(x, pg, dim)


def unshard_sequence(
    x: Tensor,
    group: Group,
    seq_dim: int = -2,
    *,
    layout: str = "contiguous",
    seq_len: int | None = None,
    partial_grad: bool = False,
) -> Tensor:
    """The unsharded tensor on every rank, rows in order. [..., S/t, ...] -> [..., S, ...]

    Args:
        x: this rank's rows.
        group: ProcessGroup, 1-D DeviceMesh or None.
        seq_dim: the sequence dimension.
        layout: that of ``x``, as in :func:`sequence_positions`.
        seq_len: the unsharded length; needed only where it is not a multiple of the number of ranks.
        partial_grad: False where every rank computes the same with the result, so that each has the whole gradient: the
            backward takes this rank's rows of it. True where each rank has a part of the gradient: the backward sums
            the parts over the ranks, in rank order in fp32.

    Returns:
        Tensor: like ``x``, all rows.

    Raises:
        ValueError: an argument that does not fit, by name.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> sp.unshard_sequence(torch.ones(1, 4, 2), None, layout="zigzag").shape
        torch.Size([1, 4, 2])
    """
    pg, dim = _checked(x, group, seq_dim, layout)
    if pg is None:
        return x
    with checked_together(pg):
        length = shard_of("x", x.shape[dim], pg, seq_len).length
    if x.is_floating_point():
        whole = ops.gather(x, dim, length, group_name(pg), partial_grad)
    else:
        whole = gather(x, pg, dim, partial_grad=partial_grad, size=length)
    if layout == "zigzag":
        whole = whole.index_select(dim, _order(length, pg.size(), layout, x.device).argsort())
    return whole


def next_token_labels(
    labels: Tensor,
    group: Group = None,
    seq_dim: int = -1,
    *,
    layout: str = "contiguous",
    input_is_sharded: bool = False,
    seq_len: int | None = None,
    cu_seqlens: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Labels of this rank's rows, each the label of the next position, whichever rank holds that position.

    A loss that shifts labels within a shard takes a wrong label at the end of the shard, and in zigzag layout in the
    middle too.

    Args:
        labels: integers [..., S]: whole, or with ``input_is_sharded`` this rank's rows in ``layout``.
        group: the ranks that share the sequence.
        seq_dim: the sequence dimension.
        layout: as in :func:`sequence_positions`.
        input_is_sharded: whether ``labels`` are this rank's rows. They are then gathered first.
        seq_len: the unsharded length, for sharded labels where it is not a multiple of the number of ranks.
        cu_seqlens: integers [documents + 1], from 0 to S: the last row of each document has no label.
        ignore_index: the label of rows that have none; the last row of the sequence is one.

    Returns:
        Tensor: like ``labels``, [..., S/t].

    Raises:
        ValueError: an argument that does not fit, by name.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> sp.next_token_labels(torch.tensor([[5, 6, 7, 8]]), cu_seqlens=torch.tensor([0, 2, 4]))
        tensor([[   6, -100,    8, -100]])
    """
    pg, dim = _checked(labels, group, seq_dim, layout, name="labels", step=input_is_sharded)
    with checked_together(pg, step=input_is_sharded):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise ValueError(f"labels: expected integers, got {labels.dtype}")
        if cu_seqlens is not None:
            check_tensor("cu_seqlens", cu_seqlens)
            if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or cu_seqlens.shape[0] < 2:
                raise ValueError(
                    f"cu_seqlens: expected integers [documents + 1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
                )
    if input_is_sharded:
        labels = unshard_sequence(labels, pg, dim, layout=layout, seq_len=seq_len)
    length = labels.shape[dim]
    next_one = torch.arange(1, length + 1, device=labels.device).clamp(max=max(0, length - 1))
    shifted = labels.index_select(dim, next_one)
    is_last = torch.zeros(length, dtype=torch.bool, device=labels.device)
    if length:
        is_last[-1] = True
    if cu_seqlens is not None and length:
        is_last[cu_seqlens[cu_seqlens > 0].to(labels.device, torch.int64) - 1] = True
    shape = [1] * labels.dim()
    shape[dim] = length
    return shard_sequence(shifted.masked_fill(is_last.view(shape), ignore_index), pg, dim, layout=layout)


@functools.lru_cache(16)
def _remembered_order(length: int, ranks: int, layout: str, device: torch.device) -> Tensor:
    return _make_order(length, ranks, layout, device)


def _make_order(length: int, ranks: int, layout: str, device: torch.device) -> Tensor:
    held = [i for rank in range(ranks) for i in rows_of(layout, length, ranks, rank)]
    return torch.cat([torch.arange(0, device=device), *(torch.arange(i.start, i.stop, device=device) for i in held)])


def _order(length: int, ranks: int, layout: str, device: torch.device) -> Tensor:
    """Positions of all ranks' rows, rank by rank. int64 [S]"""
    make = _make_order if torch.compiler.is_compiling() else _remembered_order
    return make(length, ranks, layout, device)


def _checked(
    x: Tensor, group: Group, seq_dim: int, layout: str, *, name: str = "x", step: bool = True
) -> tuple[ProcessGroup | None, int]:
    pg = resolve_group(group)
    with checked_together(pg, step=step):
        check_tensor(name, x)
        check_layout(layout)
        return pg, normalize_dim("seq_dim", seq_dim, x.dim())
