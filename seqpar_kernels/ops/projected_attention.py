"""``seqpar::projected_attention``: attention over a sharded sequence with its projections, heads in groups.

The ranks exchange heads for rows ("ulysses"), one group of heads at a time. Saved for the backward beyond x and the
weights: all rows of this rank's heads of q, k and v, their lse, and this rank's rows of the result, as without groups.
Gradients of weights, biases and sinks are this rank's part of a sum over ranks.

| result | shape | sends, group by group |
|---|---|---|
| y, out | [B, S/t, E], [B, S/t, Hq, Dv] | all-to-all of q, k, v and of the result |
| dx | [B, S/t, E] | all-to-all of dout and of dq, dk, dv |
| dweights, dbiases, dsinks | those of the weights, biases and sinks | nothing more |
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.spec import accumulation_dtype
from ..layout import group_rank
from ..overlap import planner
from ..overlap.attention_plan import Sizes
from ..overlap.head_groups import HeadGroups, head_groups
from ..overlap.projected_attention import Columns, ProjectedAttention, Projections, own_heads
from ..sequence_layout import count
from .registry import group_named, register, without_autocast
from .sequence_attention import Call, Given, Scalars


class ProjectedScalars(NamedTuple):
    """The scalars of the op, in the order of its schema: these, then :class:`Scalars`."""

    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    head_groups: int | None


class _Tensors(NamedTuple):
    """The tensors of the op after x, in the order of its schema."""

    q_weight: Tensor
    k_weight: Tensor
    v_weight: Tensor
    out_weight: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    out_bias: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    sinks: Tensor | None
    cu_seqlens: Tensor | None
    seed: Tensor | None

    @property
    def projections(self) -> Projections:
        return Projections(*self[:4], *self[4:8])


_WEIGHTS = len(Projections._fields)


def _split(rest: tuple[Any, ...]) -> tuple[_Tensors, ProjectedScalars, Scalars]:
    tensors = len(_Tensors._fields)
    own = tensors + len(ProjectedScalars._fields)
    return _Tensors(*rest[:tensors]), ProjectedScalars(*rest[tensors:own]), Scalars(*rest[own:])


def heads_like(x: Tensor, own: ProjectedScalars) -> Tensor:
    """A tensor of the shape and dtype of q that takes no memory. [B, S/t, Hq, D]"""
    return x.new_empty(1).expand(x.shape[0], x.shape[1], own.q_heads, own.head_dim)


def grouped(x: Tensor, own: ProjectedScalars, s: Scalars) -> HeadGroups:
    """The groups of a call.

    Raises:
        ValueError: see :func:`..overlap.head_groups.head_groups`.
    """
    problem = s.problem(heads_like(x, own), own.kv_heads, own.value_dim, own.q_heads, None, None)
    bound = planner.max_workspace_bytes()
    return head_groups(s.choice(problem), problem, own.head_groups, x.device.type, bound)


def _run(x: Tensor, t: _Tensors, own: ProjectedScalars, s: Scalars) -> ProjectedAttention:
    given = Given(t.sinks, None, None, t.cu_seqlens, t.seed)
    call = Call(heads_like(x, own), own.kv_heads, own.q_heads, own.value_dim, given, s)
    groups = grouped(x, own, s)
    signature = f"projected, {len(groups.groups)} groups of heads, {call.signature}"
    return ProjectedAttention(call.column._replace(signature=signature), groups, t.sinks, t.seed, t.cos, t.sin)


@without_autocast
def _kernel(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    t, own, s = _split(rest)
    dims = own.head_dim, own.value_dim
    y, out, columns = _run(x, t, own, s).forward(x, t.projections, dims, s.save)
    return (y, out, *columns) if s.save else (y, x.new_empty(0), *columns)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    t, own, s = _split(rest)
    wide = accumulation_dtype(x.dtype)
    y = x.new_empty((*x.shape[:2], t.out_weight.shape[0]))
    if not s.save:
        return (y, *(x.new_empty(0) for _ in range(4)), x.new_empty(0, dtype=wide))
    problem = s.problem(heads_like(x, own), own.kv_heads, own.value_dim, own.q_heads, None, None)
    sizes: Sizes = s.choice(problem).sizes
    q_heads, kv_heads = own_heads(sizes, group_rank(group_named(s.group)), grouped(x, own, s))
    q_rows, k_rows = (count(sizes.rows(n, 0)) for n in (sizes.q_len, sizes.k_len))
    shapes = [(q_rows, q_heads, own.head_dim), (k_rows, kv_heads, own.head_dim), (k_rows, kv_heads, own.value_dim)]
    columns = [x.new_empty((x.shape[0], *shape)) for shape in shapes]
    out = x.new_empty((*x.shape[:2], own.q_heads, own.value_dim))
    return y, out, *columns, x.new_empty((x.shape[0], q_heads, q_rows), dtype=wide)


@without_autocast
def _backward_kernel(
    dy: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    wants: list[bool],
    x: Tensor,
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    t, own, s = _split(rest)
    run, columns = _run(x, t, own, s), Columns(q, k, v, lse)
    dims = own.head_dim, own.value_dim
    found = run.backward(dy, x, t.projections, out, columns, wants, dims)
    grads = [*found.projections, found.sinks]
    return found.x, [x.new_empty(0) if g is None else g for g in grads]


def _backward_fake(
    dy: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    wants: list[bool],
    x: Tensor,
    *rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    t, _, _ = _split(rest)
    inputs = [*t[:_WEIGHTS], t.sinks]
    grads = [
        x.new_empty(0) if p is None or not wanted else p.new_empty(p.shape)
        for p, wanted in zip(inputs, wants, strict=True)
    ]
    return x.new_empty(x.shape), grads


_TENSORS = 1 + len(_Tensors._fields)
_SINKS = 1 + _Tensors._fields.index("sinks")


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        own = len(ProjectedScalars._fields)
        scalars = args[_TENSORS : _TENSORS + own], Scalars(*args[_TENSORS + own :])._replace(save=True)
        ctx.scalars = (*scalars[0], *scalars[1])
        y, *kept = projected_attention.below_autograd(*args[:_TENSORS], *ctx.scalars)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*kept, *args[:_TENSORS])
        return (y, *kept)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them once
        kept, tensors = saved[:5], saved[5:]
        wanted = [*ctx.needs_input_grad[1 : 1 + _WEIGHTS], ctx.needs_input_grad[_SINKS]]
        dx, found = projected_attention_backward(dy, *kept, wanted, *tensors, *ctx.scalars)
        grads: list[Tensor | None] = [None] * (len(tensors) + len(ctx.scalars))
        grads[0] = dx
        for place, grad, wants in zip([*range(1, 1 + _WEIGHTS), _SINKS], found, wanted, strict=True):
            grads[place] = grad if wants and tensors[place] is not None else None
        return tuple(grads)


_REST = (
    "Tensor q_weight, Tensor k_weight, Tensor v_weight, Tensor out_weight, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? v_bias, Tensor? out_bias, Tensor? cos, Tensor? sin, Tensor? sinks, Tensor? cu_seqlens, Tensor? seed, "
    "int q_heads, int kv_heads, int head_dim, int value_dim, int? head_groups, int q_len, int k_len, float scale, "
    "float softcap, int? left, int? right, float p, str layout, str engine, int? ulysses_degree, int? ring_degree, "
    "bool? save_kv, int? chunks, bool want_lse, bool save, str group"
)
projected_attention = register(
    f"projected_attention(Tensor x, {_REST}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    _Projected.apply,
)
projected_attention_backward = register(
    "projected_attention_backward(Tensor dy, Tensor out, Tensor q, Tensor k, Tensor v, Tensor lse, bool[] wants, "
    f"Tensor x, {_REST}) -> (Tensor, Tensor[])",
    _backward_kernel,
    _backward_fake,
    None,
)
