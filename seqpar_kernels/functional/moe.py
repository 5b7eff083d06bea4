"""Mixtures of experts whose tokens the ranks of a group share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..checks import check_chunks, check_float, check_main_grad, check_same_device, check_tensor
from ..comm.coordination import checked_together
from ..kernels.expert_activation import EXPERT_ACTIVATIONS
from ..layout import Group, group_rank, group_size, resolve_group
from ..ops.registry import group_name
from ..overlap.moe_routes import WAYS, ExpertPlacement
from ..overlap.planner import max_workspace_bytes
from .linear import autocast


def moe_mlp(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    group: Group,
    num_experts: int | None = None,
    experts: str = "ep",
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    up_shift: float = 0.0,
    chunks: int | None = None,
    main_grad: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The experts of a mixture on this rank's tokens: for each token the weighted sum of its K experts.

    A token travels to each rank that has experts of it once, and comes back once; while tokens travel, experts work on
    those that are there. All ranks of the group must make the call, and run its backward, ranks without a token too.
    Sums over experts and over ranks are taken in fp32 (fp64 for fp64) in a fixed order. No token is dropped.

    Args:
        x: [..., H], this rank's tokens; ranks may have any numbers of them.
        top_k_index: [..., K] integers, each token's experts, 0 .. E - 1; E or -1 is no expert.
        top_k_weights: [..., K], the weight of each, in any floating-point dtype. Its gradient is complete.
        gate_up_proj: [e, 2 * I, H], the first matmul of this rank's experts; [e, I, H] where not ``gated``. Weights
            that lie the other way round come as ``weight.transpose(1, 2)``, at no cost.
        down_proj: [e, H, I], the second.
        gate_up_bias: [e, 2 * I].
        down_bias: [e, H]; with ``experts="tp"`` whole and alike on every rank.
        group: ProcessGroup or 1-D DeviceMesh of t ranks; None computes locally.
        num_experts: E, of all ranks; None: e times t, or e with ``experts="tp"``.
        experts: ``"ep"``: a rank has whole experts, part r of ``tensor_split`` of them. ``"tp"``: every rank has I/t of
            every expert, and every token goes to every rank.
        activation: "gelu", "gelu_tanh", "relu", "relu2" (its square) or "silu", of the gate, or of all.
        gated: ``activation(gate) * (up + up_shift)``.
        interleaved: the rows of ``gate_up_proj`` are gate, up, gate, up ...; else all gates, then all ups.
        alpha: silu is ``g * sigmoid(alpha * g)``.
        limit: gates are cut off above it, ups beyond it on both sides (gpt-oss: 7, alpha 1.702, up_shift 1).
        up_shift: see ``gated``.
        chunks: pieces that a message to a rank is cut into; None: as many as leave the experts' matmuls full.
        main_grad: for ``gate_up_proj`` and ``down_proj``, each float32 (float64 for float64) of its shape, or None. The
            backward adds the weight's gradient to it and leaves ``weight.grad`` alone, as
            :func:`seqpar_kernels.all_gather_linear` does. Not under torch.compile.

    Returns:
        [..., H], like ``x``. Gradients of the experts' tensors are complete: they hold the tokens of all ranks.

    Raises:
        ValueError: an argument that does not fit, by name, on every rank, before anything is sent.
        RuntimeError: ranks that disagree, a peer that failed.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, router = torch.randn(10, 16), torch.randn(8, 16)
        >>> weights, index = (x @ router.t()).softmax(-1).topk(2)
        >>> gate_up, down = torch.randn(8, 64, 16), torch.randn(8, 16, 32)
        >>> sp.moe_mlp(x, index, weights, gate_up, down, group=None).shape
        torch.Size([10, 16])
    """
    return counted_moe_mlp(
        x,
        top_k_index,
        top_k_weights,
        (gate_up_proj, gate_up_bias, down_proj, down_bias),
        group,
        num_experts,
        experts,
        (activation, gated, interleaved, alpha, limit, up_shift),
        chunks,
        main_grad,
    )[0]


def counted_moe_mlp(
    x: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    tensors: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    group: Group,
    num_experts: int | None,
    experts: str,
    act: tuple[str, bool, bool, float, float | None, float],
    chunks: int | None,
    main_grad: Sequence[Tensor | None] | None,
) -> tuple[Tensor, Tensor]:
    """:func:`moe_mlp`, and how many tokens and pairs went where: ``Received.counts``."""
    gate_up_proj, gate_up_bias, down_proj, down_bias = tensors
    activation, gated, interleaved, alpha, limit, up_shift = act
    pg = resolve_group(group)
    with checked_together(pg):
        check_tensor("x", x)
        check_float("x", x)
        if experts not in WAYS:
            raise ValueError(f"experts: expected one of {WAYS}, got {experts!r}")
        x, (gate_up_proj, down_proj), (gate_up_bias, down_bias) = autocast(
            x, [gate_up_proj, down_proj], [gate_up_bias, down_bias]
        )
        ranks, rank = group_size(pg), group_rank(pg)
        total = _check_experts(x, gate_up_proj, down_proj, gate_up_bias, down_bias, gated, num_experts, experts, ranks)
        here = len(ExpertPlacement(total, ranks, experts).of(rank))
        if gate_up_proj.shape[0] != here:
            raise ValueError(
                f"gate_up_proj: expected {here} experts, those of rank {rank} of {ranks} of num_experts={total} by "
                f"{experts!r}, got {tuple(gate_up_proj.shape)}"
            )
        check_routing(x, top_k_index, top_k_weights, total)
        _check_activation(activation, gated, alpha, limit, up_shift)
        check_chunks(chunks)
        main_grads = _check_main_grads(main_grad, gate_up_proj, down_proj)
    options = (total, experts, chunks, max_workspace_bytes(), group_name(pg), activation, gated, interleaved)
    numbers = (float(alpha), None if limit is None else float(limit), float(up_shift))
    top_k = top_k_index.shape[-1]
    args = (
        x.reshape(-1, x.shape[-1]),
        top_k_index.reshape(-1, top_k),
        top_k_weights.reshape(-1, top_k),
        gate_up_proj,
        gate_up_bias,
        down_proj,
        down_bias,
        *ops.MoeScalars(*options, *numbers),
    )
    if torch.is_grad_enabled() and any(m is not None for m in main_grads):
        out, counts, *_ = ops.moe_mlp_into(main_grads, *args)
    else:
        out, counts, *_ = ops.moe_mlp(*args)
    return out.view(x.shape), counts


def _check_main_grads(
    main_grad: Sequence[Tensor | None] | None, gate_up_proj: Tensor, down_proj: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if main_grad is None:
        return None, None
    if isinstance(main_grad, Tensor) or len(main_grad) != 2:
        raise ValueError(f"main_grad: expected two, for gate_up_proj and down_proj, or None, got {type(main_grad)}")
    first, second = main_grad
    check_main_grad("main_grad[0]", first, gate_up_proj)
    check_main_grad("main_grad[1]", second, down_proj)
    return first, second


def check_routing(x: Tensor, top_k_index: Tensor, top_k_weights: Tensor | None, experts: int) -> None:
    """Which experts a token meets, and with which weights."""
    check_tensor("top_k_index", top_k_index)
    if top_k_index.is_floating_point() or top_k_index.is_complex() or top_k_index.dtype == torch.bool:
        raise ValueError(f"top_k_index: expected integers, got {top_k_index.dtype}")
    if top_k_index.dim() != x.dim() or top_k_index.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"top_k_index: expected {(*x.shape[:-1], 'K')} for x {tuple(x.shape)}, got {tuple(top_k_index.shape)}"
        )
    check_same_device("top_k_index", top_k_index, "x", x)
    if not torch.compiler.is_compiling() and top_k_index.numel() and not top_k_index.is_meta:
        low, high = (int(bound) for bound in torch.aminmax(top_k_index))
        if low < -1 or high > experts:
            raise ValueError(
                f"top_k_index: expected 0 .. {experts - 1}, or -1 or {experts} for no expert, got {low} .. {high}"
            )
    if top_k_weights is None:
        return
    check_tensor("top_k_weights", top_k_weights)
    check_float("top_k_weights", top_k_weights)
    if top_k_weights.shape != top_k_index.shape:
        raise ValueError(
            f"top_k_weights: expected the shape of top_k_index {tuple(top_k_index.shape)}, got "
            f"{tuple(top_k_weights.shape)}"
        )
    check_same_device("top_k_weights", top_k_weights, "x", x)


def _check_experts(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    gated: bool,
    num_experts: int | None,
    way: str,
    ranks: int,
) -> int:
    """The number of experts of all ranks."""
    for name, weight in (("gate_up_proj", w1), ("down_proj", w2)):
        check_tensor(name, weight)
        if weight.dim() != 3:
            raise ValueError(f"{name}: expected [experts, out, in], got {tuple(weight.shape)}")
        if weight.dtype != x.dtype:
            raise ValueError(f"{name}: expected the dtype of x, {x.dtype}, got {weight.dtype}")
        check_same_device(name, weight, "x", x)
    if w1.shape[2] != x.shape[-1]:
        raise ValueError(
            f"gate_up_proj: expected {x.shape[-1]} for its last size, that of x {tuple(x.shape)}, got {tuple(w1.shape)}"
        )
    if gated and w1.shape[1] % 2:
        raise ValueError(f"gate_up_proj: expected gates and ups, an even second size, got {tuple(w1.shape)}")
    inner = w1.shape[1] // 2 if gated else w1.shape[1]
    if tuple(w2.shape) != (w1.shape[0], x.shape[-1], inner):
        raise ValueError(
            f"down_proj: expected {(w1.shape[0], x.shape[-1], inner)} for gate_up_proj {tuple(w1.shape)}, got "
            f"{tuple(w2.shape)}"
        )
    for name, bias, like in (("gate_up_bias", b1, w1), ("down_bias", b2, w2)):
        if bias is None:
            continue
        check_tensor(name, bias)
        if bias.shape != like.shape[:2]:
            raise ValueError(f"{name}: expected {tuple(like.shape[:2])}, got {tuple(bias.shape)}")
        if bias.dtype != x.dtype:
            raise ValueError(f"{name}: expected the dtype of x, {x.dtype}, got {bias.dtype}")
        check_same_device(name, bias, "x", x)
    if num_experts is None:
        return int(w1.shape[0]) if way == "tp" else int(w1.shape[0]) * ranks
    check_num_experts(num_experts)
    return num_experts


def check_num_experts(num_experts: int) -> None:
    if not isinstance(num_experts, int) or isinstance(num_experts, bool) or num_experts < 1:
        raise ValueError(f"num_experts: expected a positive int, got {num_experts!r}")


def _check_activation(activation: str, gated: bool, alpha: float, limit: float | None, up_shift: float) -> None:
    if activation not in EXPERT_ACTIVATIONS:
        raise ValueError(f"activation: expected one of {EXPERT_ACTIVATIONS}, got {activation!r}")
    numbers = {"alpha": alpha, "up_shift": up_shift} | ({} if limit is None else {"limit": limit})
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if limit is not None and limit <= 0:
        raise ValueError(f"limit: expected more than 0, got {limit}")
    if alpha != 1.0 and activation != "silu":
        raise ValueError(f"alpha: expected 1.0 with activation={activation!r}, only silu has it, got {alpha}")
    if not gated and (limit is not None or up_shift != 0.0):
        raise ValueError(f"gated: expected True with limit or up_shift, got {gated}")
