"""Parameters that every rank holds whole and uses for rows of its own: their gradients are summed over the ranks.

The sum takes place at the end of each backward, whatever way a parameter has taken into the model (tied weights,
recomputation), so that ``param.grad`` is complete when ``backward`` returns, also where gradients accumulate. Ranks add
in rank order in fp32: all get the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ...ops.mappings import sum_over_ranks
from ...ops.registry import group_name, in_backward

_BUCKET = 1 << 24  # elements that travel, and are copied, together


class GradientSum:
    """Sums the gradients of a model's parameters over ``group``."""

    def __init__(self, group: ProcessGroup | None):
        self._group = group
        self._watched: list[nn.Parameter] = []
        self._places: dict[int, int] = {}  # id -> place in _watched
        self._fired: set[int] = set()
        self._before: dict[int, Tensor] = {}  # what had been accumulated when the backward began
        self._divided: set[int] = set()

    def watch(self, model: nn.Module) -> None:
        """Before a forward: take up parameters that have come or been replaced since.

        Raises:
            ValueError: ``fully_shard`` over ranks that are not all of the group, or gradients that others take away
                before they are summed.
        """
        if self._group is None:
            return
        if not in_backward():
            self._forget()
        sharded = self._sharded(model)
        watched = [p for p in model.parameters() if p.requires_grad and id(p) not in sharded]
        for param in watched:
            if getattr(param, "main_grad", None) is not None:
                raise ValueError("main_grad: expected none with context_parallel, whose ranks sum param.grad")
            if param._post_accumulate_grad_hooks and not isinstance(param, DTensor):
                raise ValueError(
                    "register_post_accumulate_grad_hook: expected none with context_parallel, whose ranks sum the "
                    "gradients at the end of a backward; step the optimizer behind it"
                )
        if len(watched) != len(self._watched) or any(a is not b for a, b in zip(watched, self._watched, strict=True)):
            known = {id(p) for p in self._watched}
            for param in watched:
                if id(param) not in known:
                    param.register_hook(self._hook(param))
            self._watched = watched
            self._places = {id(p): place for place, p in enumerate(watched)}

    def _sharded(self, model: nn.Module) -> set[int]:
        """Parameters whose gradients ``fully_shard`` sums, also as it shows them during a forward, by id.

        It averages over its ranks: those that share a sequence are one batch.
        """
        assert self._group is not None
        mine, found = set(torch.distributed.get_process_group_ranks(self._group)), set()
        for module in model.modules():
            if not isinstance(module, FSDPModule):
                continue
            for params in module._get_fsdp_state()._fsdp_param_groups:
                mesh = params.mesh_info.mesh
                ranks = set(mesh.mesh.flatten().tolist())
                if not mine <= ranks:
                    raise ValueError(
                        f"fully_shard: expected a mesh with the ranks {sorted(mine)} of context_parallel, got ranks "
                        f"{sorted(ranks)}: shard over both, fully_shard(model, mesh=mesh['dp', 'cp']._flatten('dp_cp'))"
                    )
                if id(params) not in self._divided and params.gradient_divide_factor is None:
                    params.gradient_divide_factor = float(mesh.size() // self._group.size())
                    params.force_sum_reduction_for_comms = True  # gloo has no sum of what is divided before
                self._divided.add(id(params))
                for param in params.fsdp_params:
                    found |= {id(param.sharded_param), id(getattr(param, "_unsharded_param", None))}
        return found

    def _hook(self, param: nn.Parameter) -> Any:
        key = id(param)

        def fire(grad: Tensor) -> None:
            if key not in self._places:
                return
            if torch.is_grad_enabled():
                raise RuntimeError("context_parallel: second derivatives (create_graph=True) are not supported")
            if not self._fired:
                Variable._execution_engine.queue_callback(self._finish)  # type: ignore[attr-defined]
            if key not in self._fired and param.grad is not None:
                self._before[key], param.grad = param.grad, None
            self._fired.add(key)  # again, maybe: a reentrant checkpoint runs backwards of its own

        return fire

    def _finish(self) -> None:
        """At the end of the backward. A rank without a gradient that others have takes part with zeros."""
        assert self._group is not None
        fired, before = self._fired, self._before
        self._fired, self._before = set(), {}
        with torch.no_grad():
            device = _local(self._watched[0]).device
            present = [float(id(p) in fired and p.grad is not None) for p in self._watched]
            (counts,) = sum_over_ranks([torch.tensor(present, device=device)], group_name(self._group))
            wanted = [p for p, count in zip(self._watched, counts.tolist(), strict=True) if count]
            for bucket in _buckets(wanted):
                self._sum(bucket, before)
        for param in self._watched:
            if id(param) in before and param.grad is None:  # torch.autograd.grad took it
                param.grad = before[id(param)]

    def _sum(self, params: list[nn.Parameter], before: dict[int, Tensor]) -> None:
        for param in params:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        grads = [_local(param.grad) for param in params]
        for param, grad, total in zip(params, grads, sum_over_ranks(grads, group_name(self._group)), strict=True):
            accumulated = before.get(id(param))
            if accumulated is None:
                grad.copy_(total)
            else:
                _local(accumulated).add_(total)
                param.grad = accumulated

    def _forget(self) -> None:
        """What a backward that failed has left."""
        for param in self._watched:
            if id(param) in self._before:
                param.grad = self._before[id(param)]
        self._fired, self._before = set(), {}


def _local(tensor: Any) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _buckets(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    found: list[list[nn.Parameter]] = []
    held = _BUCKET
    for param in params:
        size = _local(param).numel()
        if held + size > _BUCKET:
            found.append([])
            held = 0
        found[-1].append(param)
        held += size
    return found
