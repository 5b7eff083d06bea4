"""Who is timed in ``bench linear``, on one rank: ours at each chunk count, DTensor, Megatron, a collective by hand.

Both ops are those of a tensor-parallel MLP with ``[1, S, K]`` activations and F features inside, on t ranks:
``all_gather_linear``: [1, S/t, K] -> [1, S, F/t]; ``linear_reduce_scatter``: [1, S, F/t] -> [1, S/t, K].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar_kernels as sp

from .linear import OPS
from .providers import Absent


@dataclass
class LinearCase:
    """This rank's part of one question, and the whole of it for the oracle."""

    op: str
    x: Tensor
    weight: Tensor
    grad: Tensor
    whole_x: Tensor
    whole_weight: Tensor
    whole_grad: Tensor

    def local_x(self) -> Tensor:
        """What the matmul alone needs: for AG all rows of x, for RS x as it is."""
        return self.whole_x if self.op == OPS[0] else self.x

    def local_grad(self) -> Tensor:
        """The gradient of the matmul alone: for AG as it is, for RS all rows."""
        return self.grad if self.op == OPS[0] else self.whole_grad


def make_case(op: str, s: int, k: int, f: int, dtype: torch.dtype, device: str, group: dist.ProcessGroup) -> LinearCase:
    t, rank = group.size(), group.rank()
    generator = torch.Generator().manual_seed(0)  # alike on all ranks

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if op == OPS[0]:
        x, weight, grad = random(1, s, k), random(f, k) / k**0.5, random(1, s, f)
        parts = x.chunk(t, 1)[rank], weight.chunk(t, 0)[rank], grad.chunk(t, 2)[rank]
    else:
        x, weight, grad = random(1, s, f), random(k, f) / f**0.5, random(1, s, k)
        parts = x.chunk(t, 2)[rank], weight.chunk(t, 1)[rank], grad.chunk(t, 1)[rank]
    own = [part.contiguous().clone() for part in parts]
    return LinearCase(op, own[0].requires_grad_(), own[1].requires_grad_(), own[2], x, weight, grad)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[B, S/t, K] -> [B, S, K]; collectives want the sequence first, which costs nothing where B = 1."""
    rows = x.transpose(0, 1).contiguous()
    out = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
    single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    single(out, rows, group=group)
    return out.transpose(0, 1)


def _scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks of [B, S, K] -> [B, S/t, K]"""
    rows = x.transpose(0, 1).contiguous()
    out = rows.new_empty(rows.shape[0] // group.size(), *rows.shape[1:])
    single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    single(out, rows, group=group)
    return out.transpose(0, 1)


def _scattered_in_parts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """As :func:`_scattered`, each part sent to its owner, who adds: gloo's reduce-scatter sends twice the bytes."""
    rows = x.transpose(0, 1).contiguous()
    parts = torch.empty_like(rows)
    dist.all_to_all_single(parts, rows, group=group)
    return parts.unflatten(0, (group.size(), -1)).sum(0).transpose(0, 1)


Scatter = Callable[[Tensor, dist.ProcessGroup], Tensor]


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return dy.flatten(0, 1).t() @ x.flatten(0, 1)


class GatherThenLinear(torch.autograd.Function):
    """One collective, one matmul; keeps the shard and gathers again in the backward, as Megatron does."""

    @staticmethod
    def forward(ctx, x, weight, group, scatter=_scattered):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.scatter = group, scatter
        return F.linear(_gathered(x, group), weight)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        x, weight = ctx.saved_tensors
        whole = _gathered(x, ctx.group)
        return ctx.scatter(dy @ weight, ctx.group), _weight_gradient(dy, whole), None, None


class LinearThenScatter(torch.autograd.Function):
    """One matmul, one collective."""

    @staticmethod
    def forward(ctx, x, weight, group, scatter=_scattered):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return scatter(F.linear(x, weight), group)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        x, weight = ctx.saved_tensors
        whole = _gathered(dy, ctx.group)
        return whole @ weight, _weight_gradient(whole, x), None, None


class FusedGatherLinear(torch.autograd.Function):
    """PyTorch's async tensor parallelism: x gathered under the matmul, dx scattered under its own."""

    @staticmethod
    def forward(ctx, x, weight, group):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, weight)
        ctx.group = group
        fused = torch.ops.symm_mem.fused_all_gather_matmul
        return fused(x, [weight.t()], 1, group.group_name, return_A=False)[1][0]

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        x, weight = ctx.saved_tensors
        dx = torch.ops.symm_mem.fused_matmul_reduce_scatter(dy, weight, "sum", 1, ctx.group.group_name)
        return dx, _weight_gradient(dy, _gathered(x, ctx.group)), None


class FusedLinearScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, group):  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return torch.ops.symm_mem.fused_matmul_reduce_scatter(x, weight.t(), "sum", 1, group.group_name)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def,override]
        x, weight = ctx.saved_tensors
        fused = torch.ops.symm_mem.fused_all_gather_matmul
        whole, (dx,) = fused(dy.contiguous(), [weight], 1, ctx.group.group_name)
        return dx, _weight_gradient(whole, x), None


Forward = Callable[[Tensor], Tensor]


def by_hand(case: LinearCase, group: dist.ProcessGroup, scatter: Scatter = _scattered) -> tuple[Forward, Tensor]:
    fn = GatherThenLinear if case.op == OPS[0] else LinearThenScatter
    return lambda x: fn.apply(x, case.weight, group, scatter), case.weight


def by_hand_in_parts(case: LinearCase, group: dist.ProcessGroup) -> tuple[Forward, Tensor]:
    """By hand for a backend whose reduce-scatter sends more than it must."""
    return by_hand(case, group, _scattered_in_parts)


def ours_keeping(case: LinearCase, group: dist.ProcessGroup) -> tuple[Forward, Tensor]:
    """Ours with the gathered x kept, as DTensor keeps it: no second gather, and t times the bytes."""
    return lambda x: sp.all_gather_linear(x, case.weight, group=group, save_gathered=True), case.weight


def ours(
    case: LinearCase, group: dist.ProcessGroup, chunks: int | None = None, engine: str = "auto"
) -> tuple[Forward, Tensor]:
    op = sp.all_gather_linear if case.op == OPS[0] else sp.linear_reduce_scatter
    return lambda x: op(x, case.weight, group=group, chunks=chunks, engine=engine), case.weight


def dtensor(case: LinearCase, group: dist.ProcessGroup) -> tuple[Forward, Tensor]:
    """PyTorch's own plan for sequence-parallel linears."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(case.x.device.type, (group.size(),))
    out_features, in_features = case.whole_weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device=case.x.device, dtype=case.x.dtype)
    linear.weight = nn.Parameter(case.whole_weight.clone())
    style = ColwiseParallel(input_layouts=Shard(1)) if case.op == OPS[0] else RowwiseParallel(output_layouts=Shard(1))
    module = parallelize_module(linear, mesh, style)

    def forward(x: Tensor) -> Tensor:
        y: Tensor = module(x)
        if isinstance(y, AsyncCollectiveTensor):  # its reduce-scatter may still be under way
            y.trigger_wait()
        return y

    return forward, linear.weight


def megatron(case: LinearCase, group: dist.ProcessGroup) -> tuple[Forward, Tensor]:
    """megatron-core's Column/RowParallelLinear with sequence_parallel: [S, B, H] layout, its own initialisation."""
    if importlib.util.find_spec("megatron") is None:
        raise Absent("megatron-core is not installed")
    if case.x.device.type == "cpu":  # it asks for the current CUDA device wherever it runs
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=group.size())
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        sequence_parallel=True,
        params_dtype=case.x.dtype,
        use_cpu_initialization=case.x.device.type == "cpu",
        gradient_accumulation_fusion=False,
    )
    out_features, in_features = case.whole_weight.shape
    common = dict(config=config, init_method=nn.init.zeros_, bias=False, skip_bias_add=False)
    if case.op == OPS[0]:
        linear = ColumnParallelLinear(in_features, out_features, gather_output=False, **common)
    else:
        linear = RowParallelLinear(in_features, out_features, input_is_parallel=True, **common)
    with torch.no_grad():
        linear.weight.copy_(case.weight)
    return lambda x: linear(x.transpose(0, 1))[0].transpose(0, 1), linear.weight


def symmetric_memory(case: LinearCase, group: dist.ProcessGroup) -> tuple[Forward, Tensor]:
    """``torch.ops.symm_mem.fused_all_gather_matmul`` and ``fused_matmul_reduce_scatter``."""
    if case.x.device.type != "cuda":
        raise Absent("torch.ops.symm_mem.fused_* have no CPU kernels")
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    enable_symm_mem_for_group(group.group_name)
    fn = FusedGatherLinear if case.op == OPS[0] else FusedLinearScatter
    return lambda x: fn.apply(x, case.weight, group), case.weight


def deepspeed(case: LinearCase, group: dist.ProcessGroup) -> tuple[Forward, Tensor]:
    """Listed, for those who look for it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise Absent("deepspeed is not installed")
    raise Absent("deepspeed has neither op: its linears all-reduce, its Ulysses exchanges heads with an all-to-all")
