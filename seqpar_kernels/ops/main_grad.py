"""Weight gradients that are added to a float32 buffer: Megatron's ``main_grad`` convention.

A sum of 16-bit gradients of many micro-batches loses low bits. Here the matmul accumulates in float32 and adds to the
buffer (:func:`add_weight_gradient`), and no gradient of the weight's own dtype exists.

=======  ===========================================  ========  =============
pass     computes                                     result    communication
=======  ===========================================  ========  =============
forward  the weight itself (``_Announce``)            [N, K]    none
wgrad    a placeholder, for hooks that wait for one   [N, K]    none
=======  ===========================================  ========  =============
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.weight_gradient import add_weight_gradient

_FLAG = "grad_added_to_main_grad"


def weight_gradient(main_grad: Tensor | None, dy: Tensor, x: Tensor) -> Tensor | None:
    """dy.T @ x [N, K] for dy [rows, N], x [rows, K]; with ``main_grad`` added to it and not returned."""
    if main_grad is None:
        return dy.t().mm(x)
    add_weight_gradient(main_grad, dy, x)
    return None


def weight_gradients(
    main_grads: Sequence[Tensor | None] | None, dys: Iterable[tuple[int, Tensor]], x: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """:func:`weight_gradient` of each wanted weight, of several that share x; ``dys`` by the weight's index."""
    return [weight_gradient(main_grads[i] if main_grads else None, dy, x) for i, dy in dys if wanted[i]]


class _Announce(torch.autograd.Function):
    """Gives a weight whose gradient was added to ``main_grad`` a placeholder gradient.

    Megatron's hooks run when a weight's gradient is accumulated. They read ``weight.grad`` and add it to ``main_grad``,
    unless the weight's ``grad_added_to_main_grad`` is set. This node sets both.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        if grad is not None:
            return grad
        setattr(ctx.weight, _FLAG, True)
        return torch.empty_like(ctx.weight)


def announced(weight: Tensor) -> Tensor:
    """``weight`` behind an autograd node that runs the hooks of its gradient; itself where it has no such flag."""
    if not hasattr(weight, _FLAG) or not weight.requires_grad:
        return weight
    out: Tensor = _Announce.apply(weight)
    return out
