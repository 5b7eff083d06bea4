"""The two linears again, keeping less: what their input was made from is kept, and the input is made once more.

A column-parallel linear behind a norm reads y = norm(z), where the norm keeps z already: ``all_gather_linear_of_norm``
keeps z too, and rebuilds its shard of y before the backward gathers it. A row-parallel linear behind an activation
reads activation(x), or activation(gate) * x: ``activation_linear_reduce_scatter`` keeps x and gate. Neither repeats a
matmul or a collective. (Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv 2205.05198, section 5.)

``all_gather_linear_of_norm``: x = norm(z) is made again for wgrad, [..., S/t, ..., H], without communication.

=======  ==========================================  ===================  ===========================================
pass     computes                                    result               communication
=======  ==========================================  ===================  ===========================================
forward  y = all_gather(x) @ weight.T + bias         [..., S, ..., N/t]   all-gather of x
dgrad    dx = reduce_scatter(dy @ weight)            [..., S/t, ..., H]   reduce-scatter of dy @ weight
wgrad    dweight = dy.T @ all_gather(norm(z))        [N/t, H]             all-gather of norm(z)
dbias    dbias = sum of dy over rows                 [N/t]                none
=======  ==========================================  ===================  ===========================================

``activation_linear_reduce_scatter``: a = activation(x) or activation(gate) * x, [..., S, ..., K/t], is made again for
wgrad.

=======  ==========================================  ===================  ===========================================
pass     computes                                    result               communication
=======  ==========================================  ===================  ===========================================
forward  y = reduce_scatter(a @ weight.T) + bias     [..., S/t, ..., N]   reduce-scatter of a @ weight.T
dgrad    da = all_gather(dy) @ weight; dx, dgate     [..., S, ..., K/t]   all-gather of dy
wgrad    dweight = all_gather(dy).T @ a              [N, K/t]             none: that of dgrad
dbias    dbias = sum of all_gather(dy) over rows     [N]                  none: that of dgrad
=======  ==========================================  ===================  ===========================================

Sizes are those of the whole layer, t the ranks of the group. Without a group nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import NormKind, NormSpec, NormStores, NormTensors, RowMap, select
from ..kernels.spec import accumulation_dtype
from ..tensors import reshaped, rows_of
from . import gather_linear, linear_scatter
from .linear_common import PLACE
from .norm import declared
from .registry import register, without_autocast

# --- all_gather_linear_of_norm ---------------------------------------------------------------------------------------


class NormRecipe(NamedTuple):
    """What the input of a column-parallel linear was made from, in the order of the op's arguments.

    x = norm(z) * norm_weight + norm_bias. z [..., S/t, ..., H] is kept anyway; the vectors are [H].
    """

    z: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    kind: NormKind
    zero_centered: bool
    eps: float


_RECIPE = len(NormRecipe._fields)


@without_autocast
def _rebuild(z: Tensor, recipe: NormRecipe, dtype: torch.dtype) -> Tensor:
    """x = norm(z), the bits of the forward: the kernel computes in fp32 and rounds once. [..., S/t, ..., H]"""
    vectors = [v for v in (recipe.norm_weight, recipe.norm_bias) if v is not None]
    wide = accumulation_dtype(z.dtype)
    w_dtype = z.dtype if all(v.dtype == z.dtype for v in vectors) else wide
    dtypes = (z.dtype, z.dtype, z.dtype, w_dtype)
    spec = NormSpec(NormKind(recipe.kind), recipe.zero_centered, recipe.eps, 0.0, RowMap(0, 0, 0), *dtypes)
    weight, bias = (None if v is None else v.to(w_dtype).contiguous() for v in (recipe.norm_weight, recipe.norm_bias))
    tensors = NormTensors(rows_of(z.contiguous()), None, weight, bias)
    y = select(None, z.device).norm_forward(tensors, spec, NormStores(store_z=False)).y
    assert y is not None
    return reshaped(y, z.shape).to(dtype)


@without_autocast
def _gather(x: Tensor, *args: Any) -> list[Tensor]:
    """Kernel and fake: the recipe is for the backward alone."""
    outs: list[Tensor] = gather_linear.all_gather_linear.below_autograd(x, *args[_RECIPE:])
    return outs


class _AllGatherLinearOfNorm(torch.autograd.Function):
    """Gradients go to x, through which they reach the norm; z and the norm's vectors are only the recipe."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, recipe: NormRecipe, main_grads: list[Tensor | None], place: tuple[Any, ...], *flat: Any
    ) -> tuple[Tensor, ...]:
        """``flat``: the weights, then the biases."""
        count = len(main_grads)
        weights, biases = list(flat[:count]), list(flat[count:])
        z, norm_weight, norm_bias, *norm = recipe
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, norm_weight, norm_bias, *weights)
        ctx.norm, ctx.x_dtype, ctx.place = norm, x.dtype, place
        ctx.main_grads = main_grads  # not saved: other micro-batches may add to them first
        return tuple(all_gather_linear_of_norm.below_autograd(x, *recipe, weights, biases, *place))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z, norm_weight, norm_bias, *weights = ctx.saved_tensors
        main_grads, (want_dx, _, _, _, *needs) = ctx.main_grads, ctx.needs_input_grad
        count = len(main_grads)
        reached = [grad is not None for grad in grads]
        if not any(reached):
            return (None,) * len(ctx.needs_input_grad)
        want_dw, want_db = (
            [need and hit for need, hit in zip(part, reached, strict=True)] for part in (needs[:count], needs[count:])
        )
        recipe = NormRecipe(z, norm_weight, norm_bias, *ctx.norm)
        args = (list(grads), list(weights), want_dx, want_dw, want_db)
        if any(main_grad is not None for main_grad in main_grads):
            x = (_rebuild if any(want_dw) else _unread)(z, recipe, ctx.x_dtype)
            out = iter(gather_linear.all_gather_linear_backward_into(x, *args, False, *ctx.place, main_grads))
        else:
            out = iter(all_gather_linear_of_norm_backward(*recipe, ctx.x_dtype, *args, *ctx.place))
        dx = next(out) if want_dx else None
        dws = [next(out) if want else None for want in gather_linear.returned(want_dw, main_grads)]
        dbs = [next(out) if want else None for want in want_db]
        return dx, None, None, None, *dws, *dbs


def _gather_autograd(x: Tensor, *args: Any) -> list[Tensor]:
    weights = args[_RECIPE]
    return all_gather_linear_of_norm_into([None] * len(weights), x, *args)


def all_gather_linear_of_norm_into(main_grads: list[Tensor | None], x: Tensor, *args: Any) -> list[Tensor]:
    """The op with gradients of weights added to ``main_grads``; not traceable where there are any."""
    recipe, (weights, biases, *place) = NormRecipe(*args[:_RECIPE]), args[_RECIPE:]
    # Spreads the lists: autograd sees only tensors that are arguments of their own.
    return list(_AllGatherLinearOfNorm.apply(x, recipe, main_grads, tuple(place), *weights, *biases))


def _unread(z: Tensor, _: NormRecipe, dtype: torch.dtype) -> Tensor:
    """Stands for x where nothing reads it: only weight gradients do."""
    return z.new_empty(z.shape, dtype=dtype)


def _gather_backward(rebuild: Callable[[Tensor, NormRecipe, torch.dtype], Tensor], *args: Any) -> list[Tensor]:
    """Kernel and fake, which differ in how x is made again."""
    recipe, (x_dtype, grads, weights, want_dx, want_dw, want_db, *place) = NormRecipe(*args[:_RECIPE]), args[_RECIPE:]
    x = (rebuild if any(want_dw) else _unread)(recipe.z, recipe, x_dtype)
    given = (x, grads, weights, want_dx, want_dw, want_db, False, *place)
    out: list[Tensor] = gather_linear.all_gather_linear_backward.below_autograd(*given)
    return out


# --- activation_linear_reduce_scatter --------------------------------------------------------------------------------

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def activate(x: Tensor, gate: Tensor | None, activation: str) -> Tensor:
    """activation(x), or activation(gate) * x (GLU variants: Shazeer 2020, arXiv 2002.05202)."""
    inner = x if gate is None else gate
    match activation:
        case "gelu":
            out = F.gelu(inner)
        case "gelu_tanh":
            out = F.gelu(inner, approximate="tanh")
        case "relu":
            out = F.relu(inner)
        case "silu":
            out = F.silu(inner)
        case _:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
    return out if gate is None else out * x


def _activation_backward(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """The gradient of an activation of one input, by PyTorch's own kernel."""
    aten = torch.ops.aten
    dx: Tensor
    match activation:
        case "gelu":
            dx = aten.gelu_backward(dy, x)
        case "gelu_tanh":
            dx = aten.gelu_backward(dy, x, approximate="tanh")
        case "relu":
            dx = aten.threshold_backward(dy, x, 0)
        case _:
            dx = aten.silu_backward(dy, x)
    return dx


@without_autocast
def _scatter(
    x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, *place: Any
) -> Tensor:
    """Kernel and fake: the op that it calls has one of its own."""
    y: Tensor = linear_scatter.linear_reduce_scatter.below_autograd(activate(x, gate, activation), weight, bias, *place)
    return y


class _ActivationLinearReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        main_grad: Tensor | None,
        activation: str,
        *place: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.main_grad = main_grad  # not saved: other micro-batches may add to it first
        ctx.activation, ctx.place = activation, place
        y: Tensor = activation_linear_reduce_scatter.below_autograd(x, gate, weight, bias, activation, *place)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        args = (dy, x, gate, weight, ctx.bias_dtype, list(ctx.needs_input_grad[:4]), ctx.activation, *ctx.place)
        return (*activation_gradients(ctx.main_grad, *args), None, None, *(None,) * len(ctx.place))


def activation_gradients(
    main_grad: Tensor | None,
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    wants: list[bool],
    *args: Any,
) -> tuple[Tensor | None, ...]:
    """dx, dgate, dweight (None where it goes to ``main_grad``), dbias: those wanted."""
    given = (dy, x, gate, weight, bias_dtype, wants, *args)
    if main_grad is None or not wants[2]:
        out, returned = activation_linear_reduce_scatter_backward(*given), wants
    else:
        out = activation_linear_reduce_scatter_backward_into(*given, main_grad)
        returned = [*wants[:2], False, wants[3]]
    found = iter(out)
    return tuple(next(found) if want else None for want in returned)


def activation_linear_reduce_scatter_into(
    main_grad: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    *place: Any,
) -> Tensor:
    """The op with the gradient of its weight added to ``main_grad``; not traceable if there is one."""
    out: Tensor = _ActivationLinearReduceScatter.apply(x, gate, weight, bias, main_grad, activation, *place)
    return out


@without_autocast
def _scatter_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    wants: list[bool],
    activation: str,
    *place: Any,  # main_grad behind it where there is one
) -> list[Tensor]:
    """Kernel and fake: the ops that it calls have fakes of their own."""
    want_dx, want_dgate, want_dw, want_db = wants
    want_da = want_dx or want_dgate
    if gate is None:
        activated = None
        a = activate(x, None, activation) if want_dw else x  # only the weight's gradient reads it
    else:
        activated = activate(gate, None, activation)
        a = activated * x if want_dw else x
    backward = linear_scatter.linear_reduce_scatter_backward
    if isinstance(place[-1], Tensor):
        backward = linear_scatter.linear_reduce_scatter_backward_into
    out: list[Tensor] = backward.below_autograd(dy, a, weight, bias_dtype, want_da, want_dw, want_db, *place)
    if not want_da:
        return out
    da, *rest = out
    if activated is None:
        return [_activation_backward(da, x, activation), *rest]
    assert gate is not None
    grads = [da * activated] if want_dx else []
    if want_dgate:
        grads.append(_activation_backward(da * x, gate, activation))
    return grads + rest


all_gather_linear_of_norm = register(
    f"all_gather_linear_of_norm(Tensor x, {declared(NormRecipe)}, Tensor[] weights, Tensor?[] biases, {PLACE}) "
    "-> Tensor[]",
    _gather,
    _gather,
    _gather_autograd,
)

#: Returns dx if wanted, then the wanted weight gradients, then the wanted bias gradients.
all_gather_linear_of_norm_backward = register(
    f"all_gather_linear_of_norm_backward({declared(NormRecipe)}, ScalarType x_dtype, Tensor?[] grads, "
    f"Tensor[] weights, bool want_dx, bool[] want_dw, bool[] want_db, {PLACE}) -> Tensor[]",
    without_autocast(partial(_gather_backward, _rebuild)),
    partial(_gather_backward, _unread),
    None,
)

activation_linear_reduce_scatter = register(
    "activation_linear_reduce_scatter(Tensor x, Tensor? gate, Tensor weight, Tensor? bias, str activation, "
    f"{PLACE}) -> Tensor",
    _scatter,
    _scatter,
    partial(activation_linear_reduce_scatter_into, None),
)

_SCATTER_BACKWARD = (
    "Tensor dy, Tensor x, Tensor? gate, Tensor weight, ScalarType? bias_dtype, bool[] wants, str activation, " + PLACE
)

#: Returns the wanted ones among dx, dgate, dweight, dbias.
activation_linear_reduce_scatter_backward = register(
    f"activation_linear_reduce_scatter_backward({_SCATTER_BACKWARD}) -> Tensor[]",
    _scatter_backward,
    _scatter_backward,
    None,
)

#: The same with dweight, if wanted, added to main_grad.
activation_linear_reduce_scatter_backward_into = register(
    f"activation_linear_reduce_scatter_backward_into({_SCATTER_BACKWARD}, Tensor(a!) main_grad) -> Tensor[]",
    _scatter_backward,
    _scatter_backward,
    None,
)
