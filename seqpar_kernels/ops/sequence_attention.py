"""``seqpar::sequence_attention``: attention over a sequence that the ranks of a group share.

u ranks exchange heads ("ulysses", where u > 1), r ranks form a ring ("ring", where r > 1), and t = u r. Gradients of
sinks and of broadcast dimensions of the bias are this rank's part of a sum over ranks.

| result | shape | ulysses sends | ring sends |
|---|---|---|---|
| out, lse | [B, S/t, Hq, Dv], [B, Hq, S/t] | all-to-all of q, k, v and of out, lse | k and v that masks need |
| dq, dk, dv | those of q, k, v | all-to-all of dout and of dq, dk, dv | k and v again, unless kept; dk and dv |
| dsinks | [Hq] | nothing more | nothing more |
| dbias | that of the bias | all-to-all of dbias, where the bias has rows | nothing more |
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels import attention
from ..kernels.attention_spec import AttentionSpec, empty_like_heads
from ..kernels.spec import accumulation_dtype
from ..layout import group_rank, group_size
from ..overlap import attention_backward, attention_choice, attention_run
from ..overlap.attention_choice import Choice, Problem
from ..overlap.attention_column import Column, Extras, kept_elements
from ..overlap.attention_exchange import (
    Part,
    expanded,
    expansion,
    heads_to_rows,
    key_of_each,
    rows_to_heads,
    summed,
)
from ..overlap.attention_plan import check_documents
from ..overlap.messages import agree
from ..sequence_layout import count
from .registry import group_named, register, without_autocast


class Scalars(NamedTuple):
    """The scalars of the op, in the order of its schema."""

    q_len: int
    k_len: int
    scale: float
    softcap: float
    left: int | None  # a row at P sees keys at P - left .. P + right; ends are aligned already
    right: int | None
    p: float
    layout: str
    engine: str
    ulysses_degree: int | None
    ring_degree: int | None
    save_kv: bool | None
    chunks: int | None
    want_lse: bool
    save: bool
    group: str

    def choice(self, problem: Problem) -> Choice:
        asked = (self.engine, self.ulysses_degree, self.ring_degree, self.save_kv, self.chunks)
        return attention_choice.choose(problem, *asked)

    def problem(
        self, q: Tensor, k_heads: int, value_dim: int, q_heads: int, bias: Tensor | None, mask: Tensor | None
    ) -> Problem:
        ranks = group_size(group_named(self.group))
        q_len, k_len = int(self.q_len), int(self.k_len)
        sizes = (int(q.shape[0]), q_heads, k_heads, int(q.shape[3]), value_dim, q.dtype.itemsize)
        bias_row = sum(
            t.shape[0] * t.shape[1] * t.shape[3] * t.dtype.itemsize
            for t in (bias, mask)
            if t is not None and has_rows(t, q_len, ranks)
        )
        cuts = attention.canonical_keys(q.device.type), attention_choice.message_size(q.device.type)
        return Problem(q_len, k_len, *sizes, self.layout, ranks, self.left, self.right, int(bias_row), *cuts)


class Given(NamedTuple):
    """The optional tensors of a call, in the order of the schemas."""

    sinks: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    seed: Tensor | None


def _split(rest: tuple[Any, ...]) -> tuple[Given, Scalars]:
    """Split the arguments after the first tensors of a schema into optional tensors and scalars."""
    tensors = len(Given._fields)
    return Given(*rest[:tensors]), Scalars(*rest[tensors:])


def has_rows(t: Tensor, q_len: int, ranks: int) -> bool:
    """Whether a bias or a mask is treated as having a row for each query.

    With one or two rows a shard, a rank cannot tell from its own shape; all ranks then treat it so.
    """
    return q_len <= 2 * ranks or t.shape[2] != 1


class Call:
    """One op on one rank."""

    def __init__(
        self,
        q: Tensor,
        kv_heads: int,
        q_heads: int,
        value_dim: int,
        given: Given,
        s: Scalars,
    ):
        attention.require_kernels(q.device, q.dtype, q.shape[3], value_dim)  # raises before anything is sent
        self.group: ProcessGroup | None = group_named(s.group)
        self.rank, self.given = group_rank(self.group), given
        problem = s.problem(q, kv_heads, value_dim, q_heads, given.bias, given.mask)
        self.choice = s.choice(problem)
        self.sizes = sizes = self.choice.sizes
        self.me = self.rank % sizes.ulysses
        self.row = self.rank // sizes.ulysses
        self.ranks = sizes.row_of_ranks(self.row)
        self.heads = [sizes.heads(c) for c in range(sizes.ulysses)]
        documents = None
        if given.cu_seqlens is not None:
            documents = tuple(given.cu_seqlens.tolist())
            check_documents(documents, problem.q_len, problem.k_len)
        scores = (("bias", given.bias), ("mask", given.mask))
        shapes = [(name, tuple(t.shape[:2])) for name, t in scores if t is not None]
        if documents is not None and self.group is not None:
            # The keys that are sent depend on cu_seqlens. Ranks with different ones raise before anything is sent.
            agree(
                self.group, f"cu_seqlens of {len(documents) - 1} documents {zlib.crc32(repr(documents).encode()):08x}"
            )
        self.signature = (
            f"sequence_parallel_attention(B={problem.batch}, S={problem.q_len}, {problem.k_len} keys, heads "
            f"{q_heads}, {kv_heads}, sizes {problem.head_dim}, {problem.value_dim}, {q.dtype}, {s.layout}, "
            f"window {s.left}, {s.right}, p={s.p}, {shapes}, {self.choice.engine} {sizes.ulysses} x {sizes.ring}, "
            f"messages of {sizes.chunk_rows}, save_kv={self.choice.save_kv}, lse={s.want_lse})"
        )
        spec = AttentionSpec(s.scale, s.softcap, s.left, s.right, p=s.p, all_heads=q_heads, all_rows=problem.q_len)
        spec = spec._replace(first_head=self.heads[self.me][0].start)
        self.column = Column(self.choice, self.group, self.rank, documents, spec, self.signature)

    @property
    def exchanges(self) -> bool:
        return self.sizes.ulysses > 1

    @property
    def shares_keys(self) -> bool:
        """Whether several columns have the same key head."""
        return self.sizes.kv_heads < self.sizes.ulysses

    def part(self, tensor: Tensor | None, length: int, which: int, **like: Any) -> Part:
        """[B, rows, heads, columns] with query heads (0) or key heads (1)."""
        rows = tuple(self.sizes.held(length, rank) for rank in self.ranks)
        heads = tuple(h[which] for h in self.heads)
        all_heads = (self.sizes.q_heads, self.sizes.kv_heads)[which]
        return Part(rows, heads, self.sizes.rows(length, self.row), all_heads, tensor, **like)

    def score_part(self, t: Tensor, rows_first: Tensor | None = None) -> Part:
        """A bias or a mask [B, H or 1, Sq, Sk] as a part; one with a single head is sent to all columns."""
        part = self.part(t.transpose(1, 2) if rows_first is None else rows_first, self.sizes.q_len, 0)
        return part if t.shape[1] > 1 else part._replace(heads=(range(1),) * len(self.ranks), all_heads=1)

    def own_heads(self, t: Tensor) -> Tensor:
        """This column's heads of a bias or mask that has no row for each query."""
        heads = self.heads[self.me][0]
        return t if t.shape[1] == 1 else t[:, heads.start : heads.stop]

    def has_rows(self, t: Tensor) -> bool:
        return has_rows(t, self.sizes.q_len, self.sizes.ranks)

    def extras(self) -> Extras:
        """The extra tensors for this column's heads and rows. With ulysses one exchange sends those that have rows."""
        heads = self.heads[self.me][0]
        sinks, bias, mask, _, seed = self.given
        sinks = None if sinks is None else sinks[heads.start : heads.stop]
        if not self.exchanges:
            return Extras(sinks, bias, mask, seed)
        found: dict[str, Tensor | None] = {"bias": bias, "mask": mask}
        parts = {}
        rows = count(self.sizes.held(self.sizes.q_len, self.rank))
        for name, t in found.items():
            if t is not None and self.has_rows(t):
                raw = t.expand(-1, -1, rows, -1)
                parts[name] = self.score_part(raw.view(torch.uint8) if raw.dtype == torch.bool else raw)
            elif t is not None:
                found[name] = self.own_heads(t)
        if parts:
            with self.column.messages(", ".join(parts)) as messages:
                outs = rows_to_heads(messages, self.ranks, self.me, list(parts.values()))
            for name, out in zip(parts, outs, strict=True):
                found[name] = (out.view(torch.bool) if name == "mask" else out).transpose(1, 2)
        return Extras(sinks, found["bias"], found["mask"], seed)


@without_autocast
def _kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    given, s = _split(rest)
    call = Call(q, k.shape[2], q.shape[2], v.shape[3], given, s)
    sizes, none = call.sizes, [q.new_empty(0) for _ in range(3)]
    extras = call.extras()
    if not call.exchanges:
        out, lse, kept = attention_run.forward(call.column, q, k, v, extras, s.save)
        return out, lse, *none, lse.new_empty(0), kept
    with call.column.messages("rows to heads") as messages:
        parts = [call.part(q, sizes.q_len, 0), call.part(k, sizes.k_len, 1), call.part(v, sizes.k_len, 1)]
        q_column, k_column, v_column = rows_to_heads(messages, call.ranks, call.me, parts)
    index = expansion(call.sizes, call.me, q.device)
    keys, values = expanded(k_column, index), expanded(v_column, index)
    out_column, lse_column, kept = attention_run.forward(call.column, q_column, keys, values, extras, s.save)
    parts = [call.part(out_column, sizes.q_len, 0)]
    outs = [empty_like_heads(q, v.shape[3], q.dtype)]
    if s.want_lse:
        parts.append(call.part(lse_column.transpose(1, 2)[..., None], sizes.q_len, 0))
        outs.append(lse_column.new_empty(*q.shape[:3], 1))
    with call.column.messages("heads to rows") as messages:
        heads_to_rows(messages, call.ranks, call.me, parts, outs)
    lse = outs[1][..., 0].transpose(1, 2).contiguous() if s.want_lse else lse_column.new_empty(0)
    if not s.save:
        return outs[0], lse, *none, lse_column.new_empty(0), kept
    return outs[0], lse, q_column, k_column, v_column, lse_column, kept


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    given, s = _split(rest)
    choice = s.choice(s.problem(q, int(k.shape[2]), int(v.shape[3]), int(q.shape[2]), given.bias, given.mask))
    sizes, rank = choice.sizes, group_rank(group_named(s.group))
    out, wide = empty_like_heads(q, v.shape[3], q.dtype), accumulation_dtype(q.dtype)
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide)
    none = [q.new_empty(0) for _ in range(3)]
    keeps = s.save and choice.save_kv and sizes.ring > 1
    if sizes.ulysses == 1:
        kept = k.new_empty(kept_elements(choice, rank, k, v) if keeps else 0)
        return out, lse, *none, lse.new_empty(0), kept
    if not s.want_lse:
        lse = lse.new_empty(0)
    if not s.save:
        return out, lse, *none, lse.new_empty(0), k.new_empty(0)
    row, column = divmod(rank, sizes.ulysses)
    q_heads, kv_heads = (len(h) for h in sizes.heads(column))
    q_rows, k_rows = (count(sizes.rows(n, row)) for n in (sizes.q_len, sizes.k_len))
    q_column = q.new_empty((q.shape[0], q_rows, q_heads, q.shape[3]))
    k_column, v_column = (t.new_empty((t.shape[0], k_rows, kv_heads, t.shape[3])) for t in (k, v))
    each = kv_heads if key_of_each(sizes, column) is None else q_heads
    expanded = [t.new_empty((t.shape[0], k_rows, each, t.shape[3])) for t in (k, v)]
    kept = k.new_empty(kept_elements(choice, rank, *expanded) if keeps else 0)
    return out, lse, q_column, k_column, v_column, q.new_empty((q.shape[0], q_heads, q_rows), dtype=wide), kept


@without_autocast
def _backward_kernel(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    kv_heads: int,
    sinks_grad: bool,
    bias_grad: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, s = _split(rest)
    call = Call(q, kv_heads, out.shape[2], out.shape[3], given, s)
    sinks, bias = given.sinks, given.bias
    sizes, wide = call.sizes, lse.dtype
    delta = attention.row_dots(dout, out)
    if dlse is not None:
        delta -= dlse
    extras = call.extras()
    index = None
    if call.exchanges:
        parts = [call.part(dout, sizes.q_len, 0), call.part(delta.transpose(1, 2)[..., None], sizes.q_len, 0)]
        with call.column.messages("gradients of rows to heads") as messages:
            dout, inner = rows_to_heads(messages, call.ranks, call.me, parts)
        delta = inner[..., 0].transpose(1, 2).contiguous()
        index = expansion(call.sizes, call.me, q.device)
    keys, values = expanded(k, index), expanded(v, index)
    kv_dtype = wide if call.shares_keys else k.dtype
    args = (call.column, dout, delta, q, keys, values, lse, kept, extras, bias_grad, kv_dtype)
    grads = attention_backward.backward(*args)
    dq, dk, dv = grads.dq, summed(grads.dk, index, k.shape[2]), summed(grads.dv, index, k.shape[2])
    dsinks = q.new_empty(0)
    if sinks is not None and sinks_grad:
        dsinks = torch.zeros(sinks.shape, dtype=sinks.dtype, device=sinks.device)
        heads = call.heads[call.me][0]
        dsinks[heads.start : heads.stop] = attention_backward.sink_gradient(sinks[heads.start : heads.stop], lse, delta)
    dbias = grads.dbias
    if call.exchanges:
        parts = [call.part(dq, sizes.q_len, 0), call.part(dk, sizes.k_len, 1), call.part(dv, sizes.k_len, 1)]
        batch, q_rows, k_rows = q.shape[0], out.shape[1], count(sizes.held(sizes.k_len, call.rank))
        outs = [q.new_empty(batch, q_rows, sizes.q_heads, q.shape[3])]
        outs += [t.new_empty(batch, k_rows, kv_heads, t.shape[3]) for t in (k, v)]
        with call.column.messages("gradients of heads to rows") as messages:
            dq, dk, dv = heads_to_rows(messages, call.ranks, call.me, parts, outs)
        if bias is not None and dbias is not None:
            dbias = _bias_rows(call, bias, dbias, q_rows)
    dbias = q.new_empty(0) if dbias is None or bias is None else dbias.sum_to_size(bias.shape).to(bias.dtype)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsinks, dbias.contiguous()


def _bias_rows(call: Call, bias: Tensor, dbias: Tensor, rows: int) -> Tensor:
    """The bias gradient of this rank's rows, from that of its column's rows and heads."""
    if not call.has_rows(bias):
        if bias.shape[1] == 1:
            return dbias
        total = dbias.new_zeros(bias.shape)
        heads = call.heads[call.me][0]
        total[:, heads.start : heads.stop] = dbias
        return total
    out = dbias.new_empty(bias.shape[0], rows, bias.shape[1], bias.shape[3])
    part = call.score_part(bias, dbias.transpose(1, 2))
    with call.column.messages("gradients of a bias") as messages:
        heads_to_rows(messages, call.ranks, call.me, [part], [out])
    return out.transpose(1, 2)


def _backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    kv_heads: int,
    sinks_grad: bool,
    bias_grad: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:
    given, s = _split(rest)
    choice = s.choice(s.problem(q, kv_heads, int(out.shape[3]), int(out.shape[2]), given.bias, given.mask))
    if choice.sizes.ulysses == 1:
        grads = [empty_like_heads(t, t.shape[3], t.dtype) for t in (q, k, v)]
    else:
        k_rows = count(choice.sizes.held(choice.sizes.k_len, group_rank(group_named(s.group))))
        grads = [q.new_empty((*out.shape[:3], q.shape[3]))]
        grads += [t.new_empty((out.shape[0], k_rows, kv_heads, t.shape[3])) for t in (k, v)]
    sinks, bias = given.sinks, given.bias
    dsinks = q.new_empty(0) if sinks is None or not sinks_grad else sinks.new_empty(sinks.shape)
    dbias = q.new_empty(0) if bias is None or not bias_grad else bias.new_empty(bias.shape)
    return (*grads, dsinks, dbias)


_TENSORS = 3 + len(Given._fields)


class _SequenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        scalars = Scalars(*args[_TENSORS:])._replace(save=True)
        results = sequence_attention.below_autograd(*args[:_TENSORS], *scalars)
        out, lse, *columns, lse_column, kept = results
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*columns, lse_column, kept)
        ctx.scalars, ctx.kv_heads = scalars, args[1].shape[2]
        exchanged = lse_column.dim() == 3
        operands = (*columns, lse_column) if exchanged else (*args[:3], lse)
        ctx.save_for_backward(*operands, out, kept, *args[3:_TENSORS])
        return results

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        q, k, v, lse, out, kept, *rest = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        wants = bool(ctx.needs_input_grad[3]), bool(ctx.needs_input_grad[4])
        grads = sequence_attention_backward(
            dout, dlse, out, lse, q, k, v, kept, ctx.kv_heads, *wants, *rest, *ctx.scalars
        )
        dsinks, dbias = (g if want else None for g, want in zip(grads[3:], wants, strict=True))
        return (*grads[:3], dsinks, dbias, *(None,) * (_TENSORS - 5 + len(Scalars._fields)))


_REST = (
    "Tensor? sinks, Tensor? bias, Tensor? mask, Tensor? cu_seqlens, Tensor? seed, int q_len, int k_len, float scale, "
    "float softcap, int? left, int? right, float p, str layout, str engine, int? ulysses_degree, int? ring_degree, "
    "bool? save_kv, int? chunks, bool want_lse, bool save, str group"
)
sequence_attention = register(
    f"sequence_attention(Tensor q, Tensor k, Tensor v, {_REST}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    _SequenceAttention.apply,
)
sequence_attention_backward = register(
    "sequence_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    f"Tensor kept, int kv_heads, bool sinks_grad, bool bias_grad, {_REST}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
    None,
)
