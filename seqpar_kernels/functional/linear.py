"""Matmuls with their collective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import check_chunks, check_linear_bias, check_sequence, check_tensor, check_weight
from ..layout import Group, SequenceShard, group_rank, group_size, resolve_group, shard_of
from ..ops.library import group_name
from ..overlap.agreement import checked_together
from ..overlap.planner import Plan, check_engine, plan


@overload
def all_gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
) -> Tensor: ...


@overload
def all_gather_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
) -> tuple[Tensor, ...]: ...


def all_gather_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """``linear(all_gather(x), weight, bias)``, the gather hidden behind the matmul (column-parallel linear).

    The backward gathers ``x`` again under dgrad and reduce-scatters dx under wgrad; only the local shard is kept.

    Args:
        x: [..., S/t, ..., K], this rank's shard of the sequence.
        weight: [N/t, K], or several such: one gather feeds them all and a tuple comes back.
        bias: [N/t], or a sequence with one entry (a tensor or None) for each weight.
        group: ProcessGroup or 1-D DeviceMesh of t ranks; None computes locally.
        seq_dim: the sequence dimension of ``x``.
        chunks: pieces each shard is cut into; None lets the planner choose.
        engine: "auto", "single" (one gather, one matmul) or "collective" (pipelined over torch.distributed).
        seq_len: the unsharded length S; needed only where it is not a multiple of t.

    Returns:
        [..., S, ..., N/t], or a tuple of such.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: ranks that disagree, a peer that failed.
    """
    return planned_all_gather_linear(x, weight, bias, group, seq_dim, chunks, engine, seq_len)[0]


def planned_all_gather_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    group: Group,
    seq_dim: int,
    chunks: int | None,
    engine: str,
    seq_len: int | None,
) -> tuple[Any, Plan]:
    """:func:`all_gather_linear` and the plan it ran by."""
    pg = resolve_group(group)
    with checked_together(pg):
        check_tensor("x", x)
        seq_dim = check_sequence("x", x, seq_dim)
        several = isinstance(weight, Iterable) and not isinstance(weight, Tensor)
        weights: list[Tensor] = list(weight) if several else [weight]  # type: ignore[list-item]
        if not weights:
            raise ValueError("weight: expected at least one weight, got an empty sequence")
        if several:
            biases = [None] * len(weights) if bias is None else list(bias)
            if isinstance(bias, Tensor) or len(biases) != len(weights):
                got = "a single tensor" if isinstance(bias, Tensor) else f"{len(biases)} entries"
                raise ValueError(f"bias: expected a sequence of {len(weights)} entries, one for each weight, got {got}")
        elif bias is None or isinstance(bias, Tensor):
            biases = [bias]
        else:
            raise ValueError("bias: expected a tensor or None beside a single weight, got a sequence")
        x, weights, biases = _autocast(x, weights, biases)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            index = f"[{i}]" if several else ""
            check_weight(f"weight{index}", w, x.shape[-1], x)
            check_linear_bias(f"bias{index}", b, w)
        shard = shard_of("x", x.shape[seq_dim], pg, seq_len)
        settled = _settle_plan(x, seq_dim, shard, x.shape[-1], engine, chunks)
    outs = ops.all_gather_linear(x, weights, biases, *_place(pg, seq_dim, shard, settled))
    return (tuple(outs) if several else outs[0]), settled


def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
) -> Tensor:
    """``reduce_scatter(linear(x, weight)) + bias``, the scatter hidden behind the matmul (row-parallel linear).

    Partial results are summed in rank order in fp32; the bias is added once, after the sum, and its gradient is
    complete on every rank.

    Args:
        x: [..., S, ..., K/t], the whole sequence, this rank's features.
        weight: [N, K/t].
        bias: [N], the same on every rank.
        group, seq_dim, chunks, engine: as in :func:`all_gather_linear`.

    Returns:
        [..., S/t, ..., N], this rank's shard of the sequence.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: ranks that disagree, a peer that failed.
    """
    return planned_linear_reduce_scatter(x, weight, bias, group, seq_dim, chunks, engine)[0]


def planned_linear_reduce_scatter(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: Group, seq_dim: int, chunks: int | None, engine: str
) -> tuple[Tensor, Plan]:
    """:func:`linear_reduce_scatter` and the plan it ran by."""
    pg = resolve_group(group)
    with checked_together(pg):
        check_tensor("x", x)
        seq_dim = check_sequence("x", x, seq_dim)
        x, (weight,), (bias,) = _autocast(x, [weight], [bias])
        check_weight("weight", weight, x.shape[-1], x)
        check_linear_bias("bias", bias, weight)
        length = x.shape[seq_dim]
        shard = SequenceShard(length, group_size(pg), group_rank(pg))
        settled = _settle_plan(x, seq_dim, shard, weight.shape[0], engine, chunks)
    return ops.linear_reduce_scatter(x, weight, bias, *_place(pg, seq_dim, shard, settled)), settled


def _settle_plan(x: Tensor, seq_dim: int, shard: SequenceShard, features: int, engine: str, chunks: int | None) -> Plan:
    check_engine(engine)
    check_chunks(chunks)
    other = 1
    for i, size in enumerate(x.shape[:-1]):
        other *= 1 if i == seq_dim else size
    largest = shard.of(0).size
    return plan(
        engine,
        chunks,
        shard_bytes=largest * other * features * x.element_size(),
        ranks=shard.ranks,
        device=x.device,
    )


def _place(pg: ProcessGroup | None, seq_dim: int, shard: SequenceShard, settled: Plan) -> tuple[Any, ...]:
    return group_name(pg), seq_dim, shard.length, settled.chunks, settled.engine != "single"


def _autocast(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """What torch.nn.functional.linear does under torch.autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weights, biases
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t

    return cast(x), [cast(w) for w in weights], [cast(b) for b in biases]
