"""Calls of the two linears that have been checked and planned: ready to run, and to be looked up the next time."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .. import ops
from ..kernels import NormKind, NormTensors
from ..ops.registry import plain
from ..overlap.planner import Plan


class LinearCall(Protocol):
    """One kind of call of a linear, checked and planned.

    ``ops.PreparedGatherLinear`` and ``ops.PreparedLinearScatter`` on plain tensors in eager mode; else those below.
    """

    plan: Plan

    def __call__(self, *operands: Any) -> Any:
        """The result, or a tuple of results."""


class GatherLinear:
    """An all_gather_linear whose operands the dispatcher must see, or one with a recipe for its x."""

    def __init__(self, plan: Plan, where: tuple[Any, ...], several: bool, save_gathered: bool, remake: int = 0):
        self.plan, self._where, self._several, self._remake = plan, where, several, remake
        self._save_gathered = save_gathered and where[0] != ""

    def __call__(
        self,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor | None],
        main_grads: list[Tensor | None],
        recipe: ops.NormRecipe | None,
    ) -> Any:
        where, grad = self._where, torch.is_grad_enabled()
        into = grad and any(m is not None for m in main_grads)
        keep = self._save_gathered and grad and any(w.requires_grad for w in weights)
        if keep and into:
            outs = ops.all_gather_linear_into(main_grads, x, weights, biases, *where, keep=True)[:-1]
        elif keep:
            outs = ops.all_gather_linear_keeping(x, weights, biases, *where)[:-1]
        elif recipe is not None:
            z, norm_weight, norm_bias, kind, *scalars = recipe
            args = (x, z, norm_weight, norm_bias, int(kind), *scalars, weights, biases, *where)
            if into:
                outs = ops.all_gather_linear_of_norm_into(main_grads, *args)
            else:
                outs = ops.all_gather_linear_of_norm(*args)
        elif into or (grad and self._remake and plain((x, *weights, *biases))):
            outs = ops.all_gather_linear_into(main_grads, x, weights, biases, *where, remake=self._remake)
        else:
            outs = ops.all_gather_linear(x, weights, biases, *where)
        return tuple(outs) if self._several else outs[0]


class LinearScatter:
    """A linear_reduce_scatter whose operands the dispatcher must see, or one that is fed an activation."""

    def __init__(self, plan: Plan, where: tuple[Any, ...], activation: str | None, remake: int = 0):
        self.plan, self._where, self._activation, self._remake = plan, where, activation, remake

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, main_grad: Tensor | None, gate: Tensor | None
    ) -> Any:
        grad = torch.is_grad_enabled()
        into = main_grad is not None and grad
        if self._activation is not None:
            args = (x, gate, weight, bias, self._activation, *self._where)
            if into:
                return ops.activation_linear_reduce_scatter_into(main_grad, *args)
            return ops.activation_linear_reduce_scatter(*args)
        if into or (grad and self._remake and plain((x, weight, bias))):
            return ops.linear_reduce_scatter_into(main_grad, x, weight, bias, *self._where, remake=self._remake)
        return ops.linear_reduce_scatter(x, weight, bias, *self._where)


class LinearNorm:
    """A linear_reduce_scatter_dropout_add_norm, which always goes through the dispatcher."""

    def __init__(self, plan: Plan, where: tuple[Any, ...], activation: str | None, norm: ops.NormCall, remake: int = 0):
        self.plan, self._where, self._activation, self._norm, self._remake = plan, where, activation, norm, remake

    def __call__(
        self, tensors: NormTensors, weight: Tensor, gate: Tensor | None, main_grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        spec = self._norm.spec
        args = (*tensors, weight, gate, *self._where, self._activation or "", *spec.flat(), self._norm.backend)
        grad = torch.is_grad_enabled()
        if grad and (main_grad is not None or (self._remake and plain((*tensors, weight)))):
            outs = ops.linear_reduce_scatter_dropout_add_norm_into(main_grad, *args, remake=self._remake)
        else:
            outs = ops.linear_reduce_scatter_dropout_add_norm(*args)
        return (None, outs[0]) if spec.kind == NormKind.NONE else (outs[0], outs[1])
