"""Attention with its projections on a shard, its heads in groups that travel while others are computed with.

Forward: project the q, k and v of group g + 1 while those of group g travel; attend with group g while g + 1 travels;
apply the output projection to group g - 1 while the result of g travels back. Backward: the same with gradients.

All ranks post the same exchanges in the same order, each of which has a send and a receive for every peer, so that no
rank waits in a circle where a post keeps later ones from moving.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import attention
from ..kernels.spec import accumulation_dtype
from ..sequence_layout import count
from . import attention_backward, attention_run, planner
from .attention_column import Column, Extras
from .attention_exchange import (
    Exchange,
    Part,
    expanded,
    expansion,
    post_heads_to_rows,
    post_rows_to_heads,
    summed,
)
from .head_groups import Group, HeadGroups, own_groups, own_heads
from .head_sum import HeadSum
from .messages import Messages


class Projections(NamedTuple):
    """Weights [H * D, E] of q, k and v and [E, Hq * Dv] of the result, and biases."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    out_bias: Tensor | None


class Columns(NamedTuple):
    """All rows of this rank's heads: [B, S, h, D], [B, S, h_kv, D], [B, S, h_kv, Dv], [B, h, S]; group by group."""

    q: Tensor
    k: Tensor
    v: Tensor
    lse: Tensor


class ProjectedGrads(NamedTuple):
    """Gradients of x, of each of :class:`Projections` (None where not wanted), and of sinks."""

    x: Tensor
    projections: list[Tensor | None]
    sinks: Tensor | None


def rotated(t: Tensor, cos: Tensor | None, sin: Tensor | None, inverse: bool = False) -> Tensor:
    """[B, S, H, D] with its first R features rotated by cos and sin [B or 1, S, R], as Llama pairs them.

    ``inverse``: the adjoint. Computed in fp32 (fp64) and rounded once.
    """
    if cos is None or sin is None:
        return t
    size, wide = cos.shape[-1], accumulation_dtype(t.dtype)
    cos, sin = (table.to(wide)[:, :, None] for table in (cos, sin))
    x = t[..., :size].to(wide)
    if inverse:
        first, second = (x * sin).chunk(2, -1)
        turned = torch.cat([second, -first], -1)
    else:
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1) * sin
    out = (x * cos + turned).to(t.dtype)
    return out if size == t.shape[-1] else torch.cat([out, t[..., size:]], -1)


def _flat(t: Tensor) -> Tensor:
    """[B, S, H, D] as [B S, H D]."""
    return t.reshape(t.shape[0] * t.shape[1], t.shape[2] * t.shape[3])


class ProjectedAttention:
    """One call on one rank. ``cos`` and ``sin``: [B or 1, S/t, R] or None."""

    def __init__(
        self,
        column: Column,
        groups: HeadGroups,
        sinks: Tensor | None,
        seed: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ):
        self._column, self._plan, self._sinks, self._seed = column, groups, sinks, seed
        self._cos, self._sin = cos, sin
        self._groups = own_groups(column.sizes, column.rank, groups)
        self._bounded = planner.max_workspace_bytes() is not None

    def _messages(self, what: str) -> contextlib.AbstractContextManager[Messages | None]:
        return contextlib.nullcontext() if self._column.sizes.ulysses == 1 else self._column.messages(what)

    def _column_of(self, group: Group) -> Column:
        """The call with the heads of one group."""
        spec = self._column.spec._replace(first_head=group.own_queries.start)
        return self._column._replace(choice=self._column.choice._replace(sizes=group.sizes), spec=spec)

    def _extras(self, group: Group) -> Extras:
        heads = group.own_queries
        return Extras(sinks=None if self._sinks is None else self._sinks[heads.start : heads.stop], seed=self._seed)

    def _pipelined(
        self,
        messages: Messages | None,
        prepare: Callable[[Group], list[Part]],
        out: Callable[[Group], Sequence[Tensor] | None],
        compute: Callable[[Group, Sequence[Tensor]], tuple[list[Part], Sequence[Tensor]]],
        consume: Callable[[int, Sequence[Tensor]], None],
        behind_the_first: Callable[[], None] = lambda: None,
    ) -> None:
        """Group by group: prepare rows, exchange them for heads, compute, exchange heads for rows, consume.

        With a workspace bound what was posted before is waited for before the next exchange is posted.
        """
        groups, ranks, me = self._groups, self._column.sizes.row_of_ranks(0), self._column.rank

        def post(index: int, parts: list[Part]) -> Exchange:
            return post_rows_to_heads(messages, ranks, me, parts, out(groups[index]), index=2 * index)

        there = post(0, prepare(groups[0]))
        behind_the_first()
        back: Exchange | None = None
        for index, group in enumerate(groups):
            following, returned = None, None
            parts = prepare(groups[index + 1]) if index + 1 < len(groups) else None
            if parts is not None and not self._bounded:
                following = post(index + 1, parts)
            arrived = there.finish()
            if self._bounded:
                returned = back.finish() if back is not None else None
                if messages is not None:
                    messages.drain()
                if parts is not None:
                    following = post(index + 1, parts)
            done, into = compute(group, arrived)
            before, back = back, post_heads_to_rows(messages, ranks, me, done, into, 2 * index + 1)
            if before is not None:
                consume(index - 1, before.finish() if returned is None else returned)
            if following is not None:
                there = following
        assert back is not None
        consume(len(groups) - 1, back.finish())

    # Forward ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, w: Projections, dims: tuple[int, int], save: bool) -> tuple[Tensor, Tensor, Columns]:
        """y [B, S/t, E], the result of the attention [B, S/t, Hq, Dv], and what the backward needs of other ranks."""
        sizes, batch, rows = self._column.sizes, x.shape[0], x.shape[1]
        head_dim, value_dim = dims
        q_heads, kv_heads = own_heads(sizes, self._column.rank, self._plan)
        q_rows, k_rows = (count(sizes.rows(n, 0)) for n in (sizes.q_len, sizes.k_len))
        columns = Columns(
            x.new_empty(batch, q_rows, q_heads, head_dim),
            x.new_empty(batch, k_rows, kv_heads, head_dim),
            x.new_empty(batch, k_rows, kv_heads, value_dim),
            x.new_empty((batch, q_heads, q_rows), dtype=accumulation_dtype(x.dtype)),
        ) if save else None  # fmt: skip
        out = x.new_empty(batch, rows, sizes.q_heads, value_dim)
        product = HeadSum(w.out.t(), w.out_bias, _flat(out))

        def projected(weight: Tensor, bias: Tensor | None, heads: range, size: int) -> Tensor:
            some = slice(heads.start * size, heads.stop * size)
            made = F.linear(x, weight[some], None if bias is None else bias[some])
            return made.view(batch, rows, len(heads), size)

        def prepare(group: Group) -> list[Part]:
            q = rotated(projected(w.q, w.q_bias, group.queries, head_dim), self._cos, self._sin)
            k = rotated(projected(w.k, w.k_bias, group.keys, head_dim), self._cos, self._sin)
            v = projected(w.v, w.v_bias, group.keys, value_dim)
            return [
                group.part(q, sizes.q_len, 0),
                group.part(k, sizes.k_len, 1),
                group.part(v, sizes.k_len, 1),
            ]

        def into(group: Group) -> list[Tensor] | None:
            if columns is None:
                return None
            at, keys_at = group.at, group.keys_at
            return [columns.q[:, :, at], columns.k[:, :, keys_at], columns.v[:, :, keys_at]]

        def attend(group: Group, arrived: Sequence[Tensor]) -> tuple[list[Part], list[Tensor]]:
            q, k, v = arrived
            index = expansion(group.sizes, group.me, q.device)
            keys, values = expanded(k, index), expanded(v, index)
            result, lse, _ = attention_run.forward(self._column_of(group), q, keys, values, self._extras(group), False)
            if columns is not None:
                columns.lse[:, group.at] = lse
            heads = slice(group.queries.start, group.queries.stop)
            return [group.part(result, sizes.q_len, 0)], [out[:, :, heads]]

        def add(index: int, _: Sequence[Tensor]) -> None:
            each = sizes.q_heads // sizes.kv_heads * value_dim
            product.add([range(block.start * each, block.stop * each) for block in self._plan.blocks(index)])

        with self._messages("heads in groups") as messages:
            self._pipelined(messages, prepare, into, attend, add)
        y = product.result().view(batch, rows, w.out.shape[0])
        if columns is None:
            none = x.new_empty(0, dtype=accumulation_dtype(x.dtype))
            columns = Columns(x.new_empty(0), x.new_empty(0), x.new_empty(0), none)
        return y, out, columns

    # Backward --------------------------------------------------------------------------------------------------------

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        w: Projections,
        out: Tensor,
        columns: Columns,
        wants: Sequence[bool],
        dims: tuple[int, int],
    ) -> ProjectedGrads:
        """``wants``: which of the gradients of :class:`Projections`, and at the end that of sinks."""
        sizes, batch, rows = self._column.sizes, x.shape[0], x.shape[1]
        (head_dim, value_dim), flat_x, flat_dy = dims, x.reshape(-1, x.shape[2]), dy.reshape(-1, dy.shape[2])
        grads: list[Tensor | None] = [
            torch.empty_like(t) if t is not None and wanted else None for t, wanted in zip(w, wants, strict=False)
        ]
        dsinks = None if self._sinks is None or not wants[-1] else torch.zeros_like(self._sinks)
        shapes = [(sizes.q_heads, head_dim), (sizes.kv_heads, head_dim), (sizes.kv_heads, value_dim)]
        given = [x.new_empty(batch, rows, *shape) for shape in shapes]  # dq, dk, dv of this rank's rows
        sums = [HeadSum(weight, None, _flat(t)) for weight, t in zip(w[:3], given, strict=True)]
        total = sums[0].shared_with(sums[1:])

        def prepare(group: Group) -> list[Part]:
            heads = slice(group.queries.start, group.queries.stop)
            weight = w.out[:, heads.start * value_dim : heads.stop * value_dim]
            dout = torch.mm(flat_dy, weight).view(batch, rows, len(group.queries), value_dim)
            delta = attention.row_dots(dout, out[:, :, heads])
            return [
                group.part(dout, sizes.q_len, 0),
                group.part(delta.transpose(1, 2)[..., None], sizes.q_len, 0),
            ]

        def out_gradients() -> None:
            if grads[3] is not None:
                torch.mm(flat_dy.t(), _flat(out), out=grads[3])
            if grads[7] is not None:
                grads[7].copy_(flat_dy.sum(0, dtype=accumulation_dtype(dy.dtype)))

        def attend(group: Group, arrived: Sequence[Tensor]) -> tuple[list[Part], list[Tensor]]:
            dout, inner = arrived
            delta = inner[..., 0].transpose(1, 2).contiguous()
            q, k, v = columns.q[:, :, group.at], columns.k[:, :, group.keys_at], columns.v[:, :, group.keys_at]
            lse = columns.lse[:, group.at].contiguous()
            index = expansion(group.sizes, group.me, q.device)
            keys, values = expanded(k, index), expanded(v, index)
            shared = sizes.kv_heads < sizes.ulysses
            kv_dtype = lse.dtype if shared else k.dtype
            extras, none = self._extras(group), k.new_empty(0)
            found = attention_backward.backward(
                self._column_of(group), dout, delta, q, keys, values, lse, none, extras, False, kv_dtype
            )
            dk, dv = summed(found.dk, index, k.shape[2]), summed(found.dv, index, k.shape[2])
            if dsinks is not None and extras.sinks is not None:
                heads = slice(group.own_queries.start, group.own_queries.stop)
                dsinks[heads] = attention_backward.sink_gradient(extras.sinks, lse, delta)
            some = (group.queries, group.keys, group.keys)
            into = [t[:, :, heads.start : heads.stop] for t, heads in zip(given, some, strict=True)]
            parts = [group.part(found.dq, sizes.q_len, 0)]
            return [*parts, *(group.part(t, sizes.k_len, 1) for t in (dk, dv))], into

        def add(index: int, arrived: Sequence[Tensor]) -> None:
            group = self._groups[index]
            each = sizes.q_heads // sizes.kv_heads
            for which, grad in enumerate(arrived):
                if which < 2 and self._cos is not None:
                    grad.copy_(rotated(grad, self._cos, self._sin, inverse=True))
                heads, size = (group.queries if which == 0 else group.keys), shapes[which][1]
                some, flat = slice(heads.start * size, heads.stop * size), _flat(grad)
                weight, bias = grads[which], grads[4 + which]
                if weight is not None:
                    torch.mm(flat.t(), flat_x, out=weight[some])
                if bias is not None:
                    bias[some] = flat.sum(0, dtype=accumulation_dtype(flat.dtype)).to(bias.dtype)
            for block in self._plan.blocks(index):
                for which, one in enumerate(sums):
                    size = shapes[which][1] * (each if which == 0 else 1)
                    one.add([range(block.start * size, block.stop * size)])

        with self._messages("gradients of heads in groups") as messages:
            self._pipelined(messages, prepare, lambda group: None, attend, add, out_gradients)
        return ProjectedGrads(total().view(x.shape), grads, dsinks)
