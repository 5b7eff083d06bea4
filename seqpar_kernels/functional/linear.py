"""Matmuls with their collective."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import (
    check_linear_bias,
    check_main_grad,
    check_same_device,
    check_same_shape,
    check_sequence,
    check_tensor,
    check_weight,
)
from ..comm.coordination import checked_together
from ..layout import Group, SequenceShard, group_rank, group_size, resolve_group, shard_of
from ..ops.registry import are_plain, group_name
from ..overlap.engines import settle_plan
from ..overlap.planner import Plan
from ..overlap.tuning import profile_of
from .call_cache import known_call, remember
from .linear_calls import GatherLinear, LinearCall, LinearScatter


@overload
def all_gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
    main_grad: Tensor | None = None,
    save_gathered: bool = False,
) -> Tensor: ...


@overload
def all_gather_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
    main_grad: Sequence[Tensor | None] | None = None,
    save_gathered: bool = False,
) -> tuple[Tensor, ...]: ...


def all_gather_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    seq_len: int | None = None,
    main_grad: Tensor | Sequence[Tensor | None] | None = None,
    save_gathered: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """``linear(all_gather(x), weight, bias)``, the gather hidden behind the matmul (column-parallel linear).

    The backward gathers ``x`` again under dgrad and reduce-scatters dx under wgrad; only the local shard is kept
    (unless ``save_gathered``).

    Args:
        x: [..., S/t, ..., K], this rank's shard of the sequence.
        weight: [N/t, K], or several such: one gather feeds them all and a tuple comes back.
        bias: [N/t], or a sequence with one entry (a tensor or None) for each weight.
        group: ProcessGroup or 1-D DeviceMesh of t ranks; None computes locally.
        seq_dim: the sequence dimension of ``x``.
        chunks: pieces each shard is cut into; None lets the planner choose.
        engine: "auto", "single" (one gather, one matmul), "p2p" (pipelined over messages of torch.distributed),
            "symm_mem" (pipelined over symmetric memory; "auto" takes it where the variable SEQPAR_PEER=1 asks for it)
            or "fused" (the forward's matmul waits by itself, in one Triton launch; likewise with SEQPAR_FUSED=1).
            "collective" and "peer" are old names of "p2p" and "symm_mem".
        seq_len: the unsharded length S; needed only where it is not a multiple of t.
        main_grad: float32 (float64 for float64) of ``weight``'s shape, or one entry for each weight. The backward adds
            the weight's gradient to it, accumulated in that dtype, and leaves ``weight.grad`` alone (Megatron's
            ``gradient_accumulation_fusion``). Not under torch.compile. On CPU 16-bit factors are widened for it, which
            takes longer than their own matmul.
        save_gathered: keep the gathered ``x`` for the backward, which then does not gather it again: one exchange the
            fewer for t times the bytes, all of [..., S, ..., K] on every rank where there was a shard. Worth it where
            the wire takes longer than the matmul and memory is to spare. Nothing is kept where no weight wants a
            gradient.

    Returns:
        [..., S, ..., N/t], or a tuple of such.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: ranks that disagree, a peer that failed.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, weight, bias = torch.randn(2, 8, 16), torch.randn(32, 16), torch.randn(32)
        >>> out = sp.all_gather_linear(x, weight, bias, group=None)  # on 4 ranks: [2, 32, 32]
        >>> torch.allclose(out, torch.nn.functional.linear(x, weight, bias), atol=1e-5)
        True
        >>> q, k, v = sp.all_gather_linear(x, torch.randn(3, 16, 16).unbind(0), group=None)
    """
    call, operands = checked_all_gather_linear(
        x, weight, bias, group, seq_dim, chunks, engine, seq_len, main_grad, save_gathered
    )
    return call(*operands)


def checked_all_gather_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    group: Group,
    seq_dim: int,
    chunks: int | None,
    engine: str,
    seq_len: int | None,
    main_grad: Tensor | Sequence[Tensor | None] | None = None,
    save_gathered: bool = False,
    recipe: ops.NormRecipe | None = None,
    remake: int = 0,
) -> tuple[LinearCall, tuple[Any, ...]]:
    """The call that :func:`all_gather_linear` makes, which knows its plan, and what to call it with.

    With a ``recipe`` x is not kept but made again from it; with ``remake`` it is made again where its producer can
    (:mod:`seqpar_kernels.ops.remake`). ``save_gathered`` comes before both.
    """
    numbers, options = (seq_dim, chunks, seq_len), (engine, save_gathered, recipe is None, remake)
    key, call = known_call("all_gather_linear", group, numbers, options, x, weight, bias, main_grad)
    several = not isinstance(weight, Tensor) and isinstance(weight, Iterable)
    if call is not None:
        if not several:
            return call, (x, [weight], [bias], [main_grad], recipe)
        weights = list(weight)
        biases, main_grads = _one_each("bias", bias, len(weights)), _one_each("main_grad", main_grad, len(weights))
        return call, (x, weights, biases, main_grads, recipe)
    pg = resolve_group(group)
    profiles = None if pg is None else profile_of(pg)
    with checked_together(pg):
        check_tensor("x", x)
        seq_dim = check_sequence("x", x, seq_dim)
        given: Any = weight  # of what type is for the checks to see
        weights = list(given) if several else [given]
        if not weights:
            raise ValueError("weight: expected at least one weight, got an empty sequence")
        biases = _one_each("bias", bias, len(weights) if several else None)
        main_grads = _one_each("main_grad", main_grad, len(weights) if several else None)
        x, weights, biases = autocast(x, weights, biases)
        for i, (w, b, m) in enumerate(zip(weights, biases, main_grads, strict=True)):
            index = f"[{i}]" if several else ""
            check_weight(f"weight{index}", w, x.shape[-1], x)
            check_linear_bias(f"bias{index}", b, w)
            check_main_grad(f"main_grad{index}", m, w)
        shard = shard_of("x", x.shape[seq_dim], pg, seq_len)
        settled = settle_plan(
            x, seq_dim, shard, x.shape[-1], sum(w.numel() for w in weights), engine, chunks, profiles, pg
        )
    where = place(pg, seq_dim, shard, settled)
    if key is not None and recipe is None and are_plain((x, *weights, *biases)):
        call = ops.PreparedGatherLinear(settled, where, x, weights, biases, several, save_gathered, remake)
    else:
        call = GatherLinear(settled, where, several, save_gathered, remake)
    remember(group, key, call)
    return call, (x, weights, biases, main_grads, recipe)


def _one_each(name: str, given: Tensor | Sequence[Tensor | None] | None, weights: int | None) -> list[Tensor | None]:
    """What goes with each of several weights; ``weights=None``: with the only one."""
    if weights is None:
        if given is not None and not isinstance(given, Tensor):
            raise ValueError(f"{name}: expected a tensor or None beside a single weight, got a sequence")
        return [given]
    entries = [None] * weights if given is None else list(given)
    if isinstance(given, Tensor) or len(entries) != weights:
        got = "a single tensor" if isinstance(given, Tensor) else f"{len(entries)} entries"
        raise ValueError(f"{name}: expected a sequence of {weights} entries, one for each weight, got {got}")
    return entries


def linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    group: Group,
    seq_dim: int = -2,
    chunks: int | None = None,
    engine: str = "auto",
    activation: str | None = None,
    gate: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """``reduce_scatter(linear(x, weight)) + bias``, the scatter hidden behind the matmul (row-parallel linear).

    Partial results are summed in rank order in fp32; the bias is added once, after the sum, and its gradient is
    complete on every rank.

    Args:
        x: [..., S, ..., K/t], the whole sequence, this rank's features.
        weight: [N, K/t].
        bias: [N], the same on every rank.
        group, seq_dim, chunks, engine, main_grad: as in :func:`all_gather_linear`.
        activation: "gelu", "gelu_tanh", "relu" or "silu", applied to ``x`` first. Its result is not kept for the
            backward but made again from ``x``.
        gate: like ``x``: the activation is the gate's, and multiplies ``x`` (SwiGLU with "silu").

    Returns:
        [..., S/t, ..., N], this rank's shard of the sequence.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: ranks that disagree, a peer that failed.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> up, gate = torch.randn(2, 2, 8, 32).unbind(0)
        >>> weight = torch.randn(16, 32)
        >>> out = sp.linear_reduce_scatter(up, weight, group=None, activation="silu", gate=gate)
        >>> torch.allclose(out, (torch.nn.functional.silu(gate) * up) @ weight.t(), atol=1e-4)
        True
    """
    call, operands = checked_linear_reduce_scatter(
        x, weight, bias, group, seq_dim, chunks, engine, activation, gate, main_grad
    )
    return call(*operands)


def checked_linear_reduce_scatter(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: Group,
    seq_dim: int,
    chunks: int | None,
    engine: str,
    activation: str | None = None,
    gate: Tensor | None = None,
    main_grad: Tensor | None = None,
    remake: int = 0,
) -> tuple[LinearCall, tuple[Any, ...]]:
    """The call that :func:`linear_reduce_scatter` makes, which knows its plan, and what to call it with.

    ``remake``: as in :func:`checked_all_gather_linear`.
    """
    numbers, options = (seq_dim, chunks), (engine, activation, remake)
    key, call = known_call("linear_reduce_scatter", group, numbers, options, x, weight, bias, main_grad, gate)
    if call is None:
        pg = resolve_group(group)
        profiles = None if pg is None else profile_of(pg)
        with checked_together(pg):
            check_tensor("x", x)
            seq_dim = check_sequence("x", x, seq_dim)
            check_activation(x, activation, gate)
            x, (weight,), (bias, gate) = autocast(x, [weight], [bias, gate])
            check_weight("weight", weight, x.shape[-1], x)
            check_linear_bias("bias", bias, weight)
            check_main_grad("main_grad", main_grad, weight)
            length = x.shape[seq_dim]
            shard = SequenceShard(length, group_size(pg), group_rank(pg))
            settled = settle_plan(x, seq_dim, shard, weight.shape[0], weight.numel(), engine, chunks, profiles, pg)
        where = place(pg, seq_dim, shard, settled)
        if key is not None and activation is None and are_plain((x, weight, bias)):
            call = ops.PreparedLinearScatter(settled, where, x, weight, bias, remake)
        else:
            call = LinearScatter(settled, where, activation, remake)
        remember(group, key, call)
    return call, (x, weight, bias, main_grad, gate)


def check_activation(x: Tensor, activation: str | None, gate: Tensor | None) -> None:
    """The options of a row-parallel linear that is fed an activation."""
    if activation is not None and activation not in ops.ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ops.ACTIVATIONS} or None, got {activation!r}")
    if gate is None:
        return
    if activation is None:
        raise ValueError("gate: expected None without an activation; pass activation='silu' for SwiGLU")
    check_tensor("gate", gate)
    check_same_shape("gate", gate, "x", x)
    check_same_device("gate", gate, "x", x)
    if gate.dtype != x.dtype:
        raise ValueError(f"gate: expected the dtype of x, {x.dtype}, got {gate.dtype}")


def place(pg: ProcessGroup | None, seq_dim: int, shard: SequenceShard, settled: Plan) -> tuple[Any, ...]:
    return group_name(pg), seq_dim, shard.length, settled.chunks, settled.engine


def autocast(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """What torch.nn.functional.linear does under torch.autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weights, biases
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, Tensor) and t.dtype != torch.float64 else t

    return cast(x), [cast(w) for w in weights], [cast(b) for b in biases]
