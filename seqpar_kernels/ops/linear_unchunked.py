"""The backwards of :mod:`.gather_linear` and :mod:`.linear_scatter` below the size floor, and without a group.

One exchange, one matmul for each gradient; without a group no exchange.

A backward has two of each, so there they overlap all the same: x is gathered under dgrad, dx is scattered under wgrad.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..overlap.unchunked import Unchunked, outputs_of, unchunked_kind
from ..tensors import rows_of
from .main_grad import weight_gradient, weight_gradients


def gather_linear_backward(
    group: ProcessGroup | None,
    x: Tensor,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    main_grads: Sequence[Tensor | None] | None,
    gathered: bool,
    seq_dim: int,
    seq_len: int,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and the wanted gradients of weights, None where added to a main_grad.

    x [..., S/t, ..., K], or all rows if ``gathered``.
    """
    # A weight whose output nobody used has no gradient and adds nothing to dx.
    used = [(i, rows_of(g)) for i, g in enumerate(grads) if g is not None]
    if group is None:
        local_dx = torch.ops.aten._unsafe_view.default(_dgrad(used, weights), x.shape) if want_dx else None
        return local_dx, weight_gradients(main_grads, used, rows_of(x), want_dw) if any(want_dw) else []
    features = x.shape[-1]
    wants = {"dx": want_dx, "dw": tuple(want_dw), "gathered": gathered}
    kind = unchunked_kind(
        "all_gather_linear backward", x, seq_dim, seq_len, group, features, N=outputs_of(weights), **wants
    )
    dws: list[Tensor | None] = []
    with Unchunked(kind) as call:
        whole = x if gathered or not any(want_dw) else call.gather(x)
        if want_dx:
            with call.label("dgrad"):
                dx = _dgrad(used, weights)
            partials = call.scatter(dx.view(kind.shape(seq_len, features)))
        if any(want_dw):
            if not gathered:
                call.gathered()
            with call.label("wgrad"):
                dws = weight_gradients(main_grads, used, rows_of(whole), want_dw)
        if not want_dx:
            return None, dws
        call.scattered()
        return partials.reduce(None), dws


def _dgrad(used: list[tuple[int, Tensor]], weights: list[Tensor]) -> Tensor:
    """[rows, K]"""
    (first, dy), *others = used
    dx = dy.mm(weights[first])
    for i, dy in others:
        dx.addmm_(dy, weights[i])
    return dx


def linear_scatter_backward(
    group: ProcessGroup | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    want_dx: bool,
    want_dw: bool,
    want_db: bool,
    main_grad: Tensor | None,
    seq_dim: int,
    seq_len: int,
) -> tuple[Tensor | None, list[Tensor | None], Tensor]:
    """dx, the weight's gradient if wanted, None where added to main_grad, and all rows of dy. dy [..., S/t, ..., N]"""
    if group is None:  # then it is the backward of a column-parallel linear
        place = (True, seq_dim, seq_len)
        return *gather_linear_backward(None, x, [dy], [weight], want_dx, [want_dw], [main_grad], *place), dy
    features_out, features_in = weight.shape
    wants = {"K": features_in, "dx": want_dx, "dw": want_dw, "db": want_db}
    kind = unchunked_kind("linear_reduce_scatter backward", dy, seq_dim, seq_len, group, features_out, **wants)
    dx, dws = None, []
    with Unchunked(kind) as call:
        whole = call.gather(dy)
        call.gathered()
        rows = rows_of(whole)
        if want_dx:
            with call.label("dgrad"):
                dx = torch.ops.aten._unsafe_view.default(rows.mm(weight), kind.shape(seq_len, features_in))
        if want_dw:
            with call.label("wgrad"):
                dws = [weight_gradient(main_grad, rows, rows_of(x))]
    return dx, dws, whole
