"""The two linears again, keeping less: what their input was made from is kept, and the input is made once more.

A column-parallel linear behind a norm reads y = norm(z), where the norm keeps z already: ``all_gather_linear_of_norm``
keeps z too, and rebuilds its shard of y before the backward gathers it. A row-parallel linear behind an activation
reads activation(x), or activation(gate) * x: ``activation_linear_reduce_scatter`` keeps x and gate. Neither repeats a
matmul or a collective. (Chen et al. 2016, arXiv 1604.06174; Korthikanti et al. 2022, arXiv 2205.05198, section 5.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import NormKind, NormSpec, RowMap, select
from ..kernels.spec import accumulation_dtype
from ..tensors import reshaped, rows_of
from . import gather_linear, linear_scatter
from .linear_common import PLACE
from .registry import register, without_autocast

# --- all_gather_linear_of_norm ---------------------------------------------------------------------------------------


def _rebuild(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: int,
    zero_centered: bool,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """y = norm(z), the same bits as in the forward: the kernel computes in fp32 and rounds once. [..., S/t, ..., H]"""
    vectors = [v for v in (norm_weight, norm_bias) if v is not None]
    wide = accumulation_dtype(z.dtype)
    w_dtype = z.dtype if all(v.dtype == z.dtype for v in vectors) else wide
    spec = NormSpec(NormKind(kind), zero_centered, eps, 0.0, RowMap(0, 0, 0), z.dtype, z.dtype, z.dtype, w_dtype)
    weight, bias = (None if v is None else v.to(w_dtype).contiguous() for v in (norm_weight, norm_bias))
    rows, nothing = rows_of(z.contiguous()), None
    kernels = select(None, z.device)
    y = kernels.norm_forward(
        rows, nothing, nothing, nothing, weight, bias, nothing, nothing, nothing, spec, store_z=False
    ).y
    return reshaped(y, z.shape).to(dtype)


@without_autocast
def _gather_kernel(
    x: Tensor,
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: int,
    zero_centered: bool,
    eps: float,
    weights: list[Tensor],
    biases: list[Tensor | None],
    *place: Any,
) -> list[Tensor]:
    return gather_linear.all_gather_linear.below_autograd(x, weights, biases, *place)


class _AllGatherLinearOfNorm(torch.autograd.Function):
    """Gradients go to x, through which they reach the norm; z and the norm's vectors are only the recipe."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm: tuple[int, bool, float],
        main_grads: list[Tensor | None],
        *args: Any,
    ) -> tuple[Tensor, ...]:
        count = len(main_grads)
        weights, biases, place = args[:count], args[count : 2 * count], args[2 * count :]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, norm_weight, norm_bias, *weights)
        ctx.norm, ctx.x_dtype, ctx.place = norm, x.dtype, place
        ctx.main_grads = main_grads  # not saved: other micro-batches may add to them first
        recipe = (z, norm_weight, norm_bias, *norm)
        return tuple(all_gather_linear_of_norm.below_autograd(x, *recipe, list(weights), list(biases), *place))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        z, norm_weight, norm_bias, *weights = ctx.saved_tensors
        main_grads, needs = ctx.main_grads, ctx.needs_input_grad
        count = len(main_grads)
        reached = [grad is not None for grad in grads]
        if not any(reached):
            return (None,) * len(needs)
        first = 6  # arguments ahead of the weights
        want_dw = [need and hit for need, hit in zip(needs[first : first + count], reached, strict=True)]
        want_db = [need and hit for need, hit in zip(needs[first + count : first + 2 * count], reached, strict=True)]
        recipe = (z, norm_weight, norm_bias, *ctx.norm, ctx.x_dtype)
        args = (list(grads), list(weights), needs[0], want_dw, want_db, *ctx.place)
        if any(main_grad is not None for main_grad in main_grads):
            x = _input_again(*recipe, any(want_dw))
            out = iter(gather_linear.all_gather_linear_backward_into(x, *args[:5], False, *args[5:], main_grads))
        else:
            out = iter(all_gather_linear_of_norm_backward(*recipe, *args))
        dx = next(out) if needs[0] else None
        dws = [next(out) if want else None for want in gather_linear.returned(want_dw, main_grads)]
        dbs = [next(out) if want else None for want in want_db]
        return (dx, *(None,) * (first - 1), *dws, *dbs, *(None,) * len(ctx.place))


def _gather_autograd(x: Tensor, *args: Any) -> list[Tensor]:
    weights = args[6]
    return all_gather_linear_of_norm_into([None] * len(weights), x, *args)


def all_gather_linear_of_norm_into(
    main_grads: list[Tensor | None],
    x: Tensor,
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: int,
    zero_centered: bool,
    eps: float,
    weights: list[Tensor],
    biases: list[Tensor | None],
    *place: Any,
) -> list[Tensor]:
    """The op with gradients of weights added to ``main_grads``; not traceable where there are any."""
    # Spreads the lists: autograd sees only tensors that are arguments of their own.
    recipe = (z, norm_weight, norm_bias, (kind, zero_centered, eps))
    return list(_AllGatherLinearOfNorm.apply(x, *recipe, main_grads, *weights, *biases, *place))


@without_autocast
def _input_again(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: int,
    zero_centered: bool,
    eps: float,
    x_dtype: torch.dtype,
    read: bool,
) -> Tensor:
    """x, or room for it: only weight gradients read it."""
    if not read:
        return z.new_empty(z.shape, dtype=x_dtype)
    return _rebuild(z, norm_weight, norm_bias, kind, zero_centered, eps, x_dtype)


@without_autocast
def _gather_backward_kernel(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: int,
    zero_centered: bool,
    eps: float,
    x_dtype: torch.dtype,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    want_db: list[bool],
    *place: Any,
) -> list[Tensor]:
    x = _input_again(z, norm_weight, norm_bias, kind, zero_centered, eps, x_dtype, any(want_dw))
    return gather_linear.all_gather_linear_backward.below_autograd(
        x, grads, weights, want_dx, want_dw, want_db, False, *place
    )


def _gather_backward_fake(
    z: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    kind: int,
    zero_centered: bool,
    eps: float,
    x_dtype: torch.dtype,
    grads: list[Tensor | None],
    weights: list[Tensor],
    want_dx: bool,
    want_dw: list[bool],
    want_db: list[bool],
    *place: Any,
) -> list[Tensor]:
    x = z.new_empty(z.shape, dtype=x_dtype)
    return gather_linear.all_gather_linear_backward.below_autograd(
        x, grads, weights, want_dx, want_dw, want_db, False, *place
    )


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
    match activation:
        case "gelu":
            return aten.gelu_backward(dy, x)  # type: ignore[no-any-return]
        case "gelu_tanh":
            return aten.gelu_backward(dy, x, approximate="tanh")  # type: ignore[no-any-return]
        case "relu":
            return aten.threshold_backward(dy, x, 0)  # type: ignore[no-any-return]
        case _:
            return aten.silu_backward(dy, x)  # type: ignore[no-any-return]


@without_autocast
def _scatter_kernel(
    x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, *place: Any
) -> Tensor:
    return linear_scatter.linear_reduce_scatter.below_autograd(activate(x, gate, activation), weight, bias, *place)


def _scatter_fake(
    x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, *place: Any
) -> Tensor:
    return linear_scatter.linear_reduce_scatter.below_autograd(x, weight, bias, *place)


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


def _scatter_autograd(
    x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str, *place: Any
) -> Tensor:
    return activation_linear_reduce_scatter_into(None, x, gate, weight, bias, activation, *place)


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
def _scatter_backward_kernel(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    wants: list[bool],
    activation: str,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grad: Tensor | None = None,
) -> list[Tensor]:
    want_dx, want_dgate, want_dw, want_db = wants
    want_da = want_dx or want_dgate
    if gate is None:
        activated = None
        a = activate(x, None, activation) if want_dw else x  # only the weight's gradient reads it
    else:
        activated = activate(gate, None, activation)
        a = activated * x if want_dw else x
    args = (dy, a, weight, bias_dtype, want_da, want_dw, want_db, group, seq_dim, seq_len, chunks, engine)
    if main_grad is None:
        out = linear_scatter.linear_reduce_scatter_backward.below_autograd(*args)
    else:
        out = linear_scatter.linear_reduce_scatter_backward_into.below_autograd(*args, main_grad)
    if not want_da:
        return out
    da, *rest = out
    if gate is None:
        return [_activation_backward(da, x, activation), *rest]
    grads = [da * activated] if want_dx else []
    if want_dgate:
        grads.append(_activation_backward(da * x, gate, activation))
    return grads + rest


def _scatter_backward_fake(
    dy: Tensor,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    wants: list[bool],
    activation: str,
    group: str,
    seq_dim: int,
    seq_len: int,
    chunks: int,
    engine: str,
    main_grad: Tensor | None = None,
) -> list[Tensor]:
    out = [x.new_empty(x.shape) for want in wants[:2] if want]
    if wants[2] and main_grad is None:
        out.append(weight.new_empty(weight.shape))
    if wants[3]:
        out.append(weight.new_empty(weight.shape[0], dtype=bias_dtype))
    return out


_RECIPE = "Tensor z, Tensor? norm_weight, Tensor? norm_bias, int kind, bool zero_centered, float eps"

all_gather_linear_of_norm = register(
    f"all_gather_linear_of_norm(Tensor x, {_RECIPE}, Tensor[] weights, Tensor?[] biases, {PLACE}) -> Tensor[]",
    _gather_kernel,
    _gather_kernel,  # the op it calls has a fake
    _gather_autograd,
)

#: Returns dx if wanted, then the wanted weight gradients, then the wanted bias gradients.
all_gather_linear_of_norm_backward = register(
    f"all_gather_linear_of_norm_backward({_RECIPE}, ScalarType x_dtype, Tensor?[] grads, Tensor[] weights, "
    f"bool want_dx, bool[] want_dw, bool[] want_db, {PLACE}) -> Tensor[]",
    _gather_backward_kernel,
    _gather_backward_fake,
    None,
)

activation_linear_reduce_scatter = register(
    "activation_linear_reduce_scatter(Tensor x, Tensor? gate, Tensor weight, Tensor? bias, str activation, "
    f"{PLACE}) -> Tensor",
    _scatter_kernel,
    _scatter_fake,
    _scatter_autograd,
)

_SCATTER_BACKWARD = (
    "Tensor dy, Tensor x, Tensor? gate, Tensor weight, ScalarType? bias_dtype, bool[] wants, str activation, " + PLACE
)

#: Returns the wanted ones among dx, dgate, dweight, dbias.
activation_linear_reduce_scatter_backward = register(
    f"activation_linear_reduce_scatter_backward({_SCATTER_BACKWARD}) -> Tensor[]",
    _scatter_backward_kernel,
    _scatter_backward_fake,
    None,
)

#: The same with dweight, if wanted, added to main_grad.
activation_linear_reduce_scatter_backward_into = register(
    f"activation_linear_reduce_scatter_backward_into({_SCATTER_BACKWARD}, Tensor(a!) main_grad) -> Tensor[]",
    _scatter_backward_kernel,
    _scatter_backward_fake,
    None,
)
