"""``seqpar::moe_mlp``: the weighted sum of each token's experts, wherever they are.

| | computed | what travels (n tokens to a rank, each once) |
|---|---|---|
| forward | h = x W1 + b1, a = act(h), y = a W2 + b2; [T, H] | rows [n, H], ids and weights [n, K]; rows [n, H] back |
| dgrad | da = dy W2^T, dh, dx = dh W1^T; dweights = rowsum(da * a) | dy [n, H]; dx [n, H] and dweights [n, K] back |
| wgrad | dW1 = dh^T x, dW2 = dy^T (weight * a), over the tokens of all ranks | nothing: behind dgrad's last messages |
| dbias | column sums of dh and of weight * dy | nothing |

h is kept, and the peers' rows; what stands between is made again. W1 [E, W, H], W2 [E, H, I]; W = 2 * I with a gate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.expert_activation import ExpertActivation
from ..kernels.spec import accumulation_dtype
from ..layout import group_size
from ..overlap import moe_backward, moe_forward
from ..overlap.moe_backward import MainGrads, Wants
from ..overlap.moe_exchange import Experts, Received
from ..overlap.moe_routes import ExpertPlacement
from .registry import apply, group_named, register, without_autocast


class MoeScalars(NamedTuple):
    """What a call is told beside its tensors, in the order of the schema; alike on all ranks."""

    experts: int
    way: str
    chunks: int | None
    bound: int | None  # bytes of rows before and after their experts at a time; the backward needs what the forward had
    group: str
    name: str
    gated: bool
    interleaved: bool
    alpha: float
    limit: float | None
    up_shift: float

    def activation(self) -> ExpertActivation:
        return ExpertActivation(*self[5:])

    def placement(self) -> ExpertPlacement:
        return ExpertPlacement(self.experts, group_size(group_named(self.group)), self.way)


_SCALARS_COUNT = len(MoeScalars._fields)
_SCHEMA = "Tensor x, Tensor ids, Tensor weights, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2"
_SCALARS = (
    "int experts, str way, int? chunks, int? bound, str group, str name, bool gated, bool interleaved, "
    "float alpha, float? limit, float up_shift"
)


def _details(experts: Experts, scalars: MoeScalars) -> str:
    biases = f"biases {experts.b1 is not None, experts.b2 is not None}"
    inner = f", inner {experts.w2.shape[2]}" if scalars.way == "ep" else ""
    return f"{scalars.activation()}, {biases}{inner}"


@without_autocast
def _kernel(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    experts, scalars = Experts(*rest[:4]), MoeScalars(*rest[4:])
    out, received = moe_forward.forward(
        group_named(scalars.group),
        x,
        ids,
        weights,
        scalars.placement(),
        experts,
        scalars.activation(),
        scalars.chunks,
        scalars.bound,
        _details(experts, scalars),
    )
    return (out, *received)


def _fake(x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    experts, scalars = Experts(*rest[:4]), MoeScalars(*rest[4:])
    context = torch.library.get_ctx()
    tokens, pairs, peers_pairs = (context.new_dynamic_size() for _ in range(3))
    ranks, top_k, width = scalars.placement().ranks, ids.shape[1], experts.w1.shape[1]
    return (
        x.new_empty(x.shape),
        torch.empty(ranks, ranks, 2, dtype=torch.int64),
        x.new_empty(tokens, x.shape[1]),
        ids.new_empty((tokens, top_k), dtype=torch.int32),
        weights.new_empty((tokens, top_k), dtype=accumulation_dtype(x.dtype)),
        x.new_empty(pairs, width),
        x.new_empty(peers_pairs, width),
    )


class _MoeMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, main_grads: MainGrads, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        out, *received = moe_mlp.below_autograd(x, ids, weights, *rest)
        ctx.scalars = rest[4:]
        ctx.main_grads = main_grads  # not saved: other micro-batches may add to them first
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, ids, weights, *rest[:4], *received)
        ctx.mark_non_differentiable(*received)
        return (out, *received)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *nothing: None) -> tuple[Tensor | None, ...]:
        _, *needs = ctx.needs_input_grad
        wants = [needs[i] for i in (0, 2, 3, 4, 5, 6)]
        tensors = ctx.saved_tensors
        if dout is None:  # peers wait for this rank's messages even where nobody used its result
            dout = torch.zeros_like(tensors[0])
        if any(main_grad is not None for main_grad in ctx.main_grads):
            made = iter(moe_mlp_backward_into(dout, *tensors, wants, *ctx.scalars, list(ctx.main_grads)))
        else:
            made = iter(moe_mlp_backward(dout, *tensors, wants, *ctx.scalars))
        grads = [next(made) if want else None for want in _returned(wants, ctx.main_grads)]
        return (None, grads[0], None, *grads[1:], *(None for _ in ctx.scalars))


def moe_mlp_into(main_grads: MainGrads, *args: Any) -> tuple[Tensor, ...]:
    """moe_mlp with gradients of w1 and w2 added to ``main_grads``; not traceable where there are any."""
    out: tuple[Tensor, ...] = apply(_MoeMLP, main_grads, *args)
    return out


def _returned(wants: list[bool], main_grads: MainGrads) -> list[bool]:
    """Which gradients come back, of x, weights, w1, b1, w2 and b2: the others are added to their main_grad."""
    into = dict(zip((2, 4), main_grads, strict=True))
    return [want and into.get(i) is None for i, want in enumerate(wants)]


@without_autocast
def _backward_kernel(dout: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> list[Tensor]:
    experts, received = Experts(*rest[:4]), Received(*rest[4:10])
    wants, scalars = Wants(*rest[10]), MoeScalars(*rest[11 : 11 + _SCALARS_COUNT])
    main_grads = rest[11 + _SCALARS_COUNT] if len(rest) > 11 + _SCALARS_COUNT else (None, None)
    made = moe_backward.backward(
        group_named(scalars.group),
        dout.contiguous(),
        x,
        ids,
        weights,
        received,
        scalars.placement(),
        experts,
        scalars.activation(),
        scalars.chunks,
        scalars.bound,
        wants,
        _details(experts, scalars),
        tuple(main_grads),
    )
    if made.weights is not None:
        made = made._replace(weights=made.weights.to(weights.dtype))
    return [grad for grad in made if grad is not None]


def _backward_fake(dout: Tensor, x: Tensor, ids: Tensor, weights: Tensor, *rest: Any) -> list[Tensor]:
    of = (x, weights, *rest[:4])
    main_grads = rest[11 + _SCALARS_COUNT] if len(rest) > 11 + _SCALARS_COUNT else (None, None)
    return [torch.empty_like(t) for t, want in zip(of, _returned(rest[10], main_grads), strict=True) if want]


#: x [T, H], ids and weights [T, K]. Returns out [T, H] and what the backward wants: ``Received``.
moe_mlp = register(
    f"moe_mlp({_SCHEMA}, {_SCALARS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel,
    _fake,
    lambda *args: moe_mlp_into((None, None), *args),
)
_BACKWARD = (
    f"Tensor dout, {_SCHEMA}, Tensor counts, Tensor rows, Tensor got_ids, Tensor got_weights, "
    f"Tensor own_h, Tensor h, bool[] wants, {_SCALARS}"
)
#: Returns the wanted gradients of x, weights, w1, b1, w2, b2.
moe_mlp_backward = register(f"moe_mlp_backward({_BACKWARD}) -> Tensor[]", _backward_kernel, _backward_fake, None)
#: The same, but a gradient of w1 or w2 that has a main_grad is added to it and not returned.
moe_mlp_backward_into = register(
    f"moe_mlp_backward_into({_BACKWARD}, Tensor(a!)?[] main_grads) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    None,
)
