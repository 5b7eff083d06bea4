"""The backward of attention over a sharded sequence on one rank, in a column of the grid.

Gradients of the other ranks' keys are posted to their owners block by block, before the rank computes with its own
keys. Where keys and values are sent again, it computes with half of its own keys while the first of them travel.

dq is the sum of two chains, one over the other ranks' keys in rotated order, one over this rank's keys in ascending
order; so is the gradient of a bias that is alike for all keys. Their bits then do not depend on the order in which a
rank computes, those of dq not on how messages are cut either. Owners sum gradients of keys and values in rank order in
fp32 (fp64).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import attention
from ..kernels.attention_spec import AttentionGrads, empty_like_heads
from ..kernels.spec import accumulation_dtype
from ..sequence_layout import Interval
from .attention_column import Column, Extras, Incoming, columns_of, gathered, kept_pieces, place_of
from .attention_plan import Piece, arriving
from .attention_returns import Returns
from .messages import Messages


class Grads(NamedTuple):
    """dq in the dtype of q, dk and dv in that asked for, dbias in the accumulation dtype."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


def backward(
    column: Column,
    dout: Tensor,
    delta: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    kept: Tensor,
    extras: Extras,
    bias_grad: bool,
    grad_dtype: torch.dtype,
) -> Grads:
    """``delta`` as in :func:`..kernels.attention.backward`; ``grad_dtype`` is that of dk and dv."""
    run = _Backward(column, dout, delta, q, k, v, lse, extras, bias_grad, grad_dtype)
    if column.sizes.ring == 1:
        dq, dk, dv = run.whole(k, v, grad_dtype)
        assert dq is not None and dk is not None and dv is not None
        return Grads(dq.to(q.dtype), dk, dv, run.dbias)
    return run.over_ranks(kept)


class _Backward:
    def __init__(
        self,
        column: Column,
        dout: Tensor,
        delta: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lse: Tensor,
        extras: Extras,
        bias_grad: bool,
        grad_dtype: torch.dtype,
    ):
        self._column, self._dout, self._delta, self._lse, self._extras = column, dout, delta, lse, extras
        self._q, self._k, self._v, self._grad_dtype = q, k, v, grad_dtype
        self._wide = accumulation_dtype(q.dtype)
        self.dbias: Tensor | None = None
        if bias_grad and extras.bias is not None:
            self.dbias = torch.zeros(extras.bias.shape, dtype=self._wide, device=q.device)

    def whole(self, k: Tensor, v: Tensor, dtype: torch.dtype) -> AttentionGrads:
        """The gradients over all keys in one kernel call."""
        return self._block(k, v, Interval(0, k.shape[1]), None, dtype)

    def _block(
        self,
        k: Tensor,
        v: Tensor,
        keys: Interval,
        into: AttentionGrads | None,
        dtype: torch.dtype | None = None,
        dbias: Tensor | None = None,
    ) -> AttentionGrads:
        """The gradients over one block of keys; that of the bias is added to ``dbias``, or to the one of this rank."""
        spec, masks = self._column.block(self._extras, keys, self._q.device)
        given = (self._dout, self._q, k, v, self._lse, self._delta, spec, masks)
        if self.dbias is not None:
            target = columns_of(self.dbias if dbias is None else dbias, keys)
            assert target is not None
            target += attention.bias_gradient(*given, target.shape)
        return attention.backward(*given, into=into, grad_dtype=dtype)

    def over_ranks(self, kept: Tensor) -> Grads:
        """The gradients with keys and values of other ranks, kept or sent again. Keys and gradients are a step each."""
        column = self._column
        if column.choice.save_kv:
            with column.messages("gradients of keys and values", "scatter") as back:
                return self._all(kept, None, back)
        with (
            column.messages("keys and values again") as messages,
            column.messages("gradients of keys and values", "scatter") as back,
        ):
            return self._all(None, messages, back)

    def _all(self, kept: Tensor | None, fetch: Messages | None, back: Messages) -> Grads:
        column, k, v = self._column, self._k, self._v
        out = Returns(column, back, k, v)
        if column.choice.engine == "all_gather":
            _, keys, values = gathered(column, fetch or back, k, v, kept)
            return self._gathered(keys, values, out)
        if fetch is None:
            assert kept is not None
            remote: Iterator[tuple[Piece, Tensor, Tensor] | None] = kept_pieces(column, k, v, kept)
        else:
            remote = iter(Incoming(column, fetch, k, v, None))
        blocks = list(_own_halves(column))
        before = 0 if fetch is None else len(blocks) // 2  # while keys and values are on their way
        own = self._own_blocks(blocks[:before], None) if before else None
        dq, remote_dbias = self._remote_blocks(remote, out)
        own = self._own_blocks(blocks[before:], own)
        if self.dbias is not None and remote_dbias is not None:
            self.dbias += remote_dbias
        own_dq, dk, dv = own
        assert own_dq is not None and dk is not None and dv is not None
        dq += own_dq
        del own, own_dq  # the rest needs their room
        dq = dq.to(self._q.dtype)
        return Grads(dq, *out.summed(dk, dv, self._grad_dtype), self.dbias)

    def _gathered(self, keys: Tensor, values: Tensor, out: Returns) -> Grads:
        """The gradients over all keys [B, Sk, Hkv, D] at once."""
        column = self._column
        grads = self._block(keys, values, Interval(0, column.sizes.k_len), None, self._wide)
        assert grads.dq is not None and grads.dk is not None and grads.dv is not None
        for piece in arriving(column.sizes, column.documents, column.row):
            rows = slice(piece.keys.start, piece.keys.stop)
            out.send(piece, grads.dk[:, rows], grads.dv[:, rows])
        own_dk, own_dv = (empty_like_heads(t, t.shape[3], self._wide) for t in (self._k, self._v))
        for at in column.k_rows:
            rows, place = slice(at.start, at.stop), place_of(column, at)
            own_dk[:, place.start : place.stop] = grads.dk[:, rows]
            own_dv[:, place.start : place.stop] = grads.dv[:, rows]
        dk, dv = out.summed(own_dk, own_dv, self._grad_dtype)
        return Grads(grads.dq.to(self._q.dtype), dk, dv, self.dbias)

    def _remote_blocks(
        self, remote: Iterator[tuple[Piece, Tensor, Tensor] | None], out: Returns
    ) -> tuple[Tensor, Tensor | None]:
        """dq and dbias over the other ranks' keys; the gradients of each of their pieces are sent when they are there.

        dbias is None where each block has columns of its own: those are in this rank's.
        """
        dq, dbias = self._zeros(self._q), None
        if self.dbias is not None and self.dbias.shape[-1] == 1:
            dbias = torch.zeros_like(self.dbias)
        for received in remote:
            if received is None:
                out.skip()
                continue
            piece, keys, values = received
            dk, dv = (torch.zeros(t.shape, dtype=self._wide, device=t.device) for t in (keys, values))
            self._block(keys, values, piece.keys, AttentionGrads(dq, dk, dv), dbias=dbias)
            del received, keys, values  # the message takes their room
            out.send(piece, dk, dv)
            del dk, dv
        return dq, dbias

    def _own_blocks(self, blocks: Sequence[Interval], into: AttentionGrads | None) -> AttentionGrads:
        """``into``, by default zeros, with the gradients over blocks of this rank's keys added."""
        dq, dk, dv = into or (self._zeros(t) for t in (self._q, self._k, self._v))
        assert dk is not None and dv is not None
        for keys in blocks:
            at = place_of(self._column, keys)
            rows = slice(at.start, at.stop)
            self._block(self._k[:, rows], self._v[:, rows], keys, AttentionGrads(dq, dk[:, rows], dv[:, rows]))
        return AttentionGrads(dq, dk, dv)

    def _zeros(self, like: Tensor) -> Tensor:
        return empty_like_heads(like, like.shape[3], self._wide).zero_()


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """-sum over this rank's rows of exp(sink - lse) * delta. [Hq]"""
    weights = torch.exp(sinks.to(lse.dtype)[:, None] - lse.masked_fill(lse == -torch.inf, torch.inf))
    return -(weights.double() * delta.double()).sum((0, 2)).to(sinks.dtype)


def _own_halves(column: Column) -> Iterator[Interval]:
    """This rank's own keys in two halves, each a list of blocks."""
    rows = column.k_rows
    if len(rows) % 2 == 0:
        yield from rows
        return
    for interval in rows:
        middle = interval.start + interval.size // 2 // 8 * 8
        yield Interval(interval.start, middle)
        yield Interval(middle, interval.stop)
