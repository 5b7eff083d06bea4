"""The experts of a mixture, whole ones or a part of each on a rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional import moe_mlp
from ..kernels.expert_activation import ExpertActivation
from ..layout import Group
from .own_forward import own_forward
from .region import Region
from .sharding import ShardSpec, check_shardable, local_part


class ExpertForm(NamedTuple):
    """What experts compute, and how their weights lie.

    ``transposed``: [E, in, out] instead of [E, out, in].

    Examples:
        >>> import seqpar_kernels as sp
        >>> sp.nn.ExpertForm(bias=True).names()
        ('gate_up_proj', 'down_proj', 'gate_up_proj_bias', 'down_proj_bias')
    """

    activation: ExpertActivation = ExpertActivation()
    bias: bool = False
    transposed: bool = False

    @property
    def first(self) -> str:
        """The name of the first projection."""
        return "gate_up_proj" if self.activation.gated else "up_proj"

    def names(self) -> tuple[str, ...]:
        """Of the parameters, as in Transformers."""
        names = (self.first, "down_proj")
        return (*names, *(f"{name}_bias" for name in names)) if self.bias else names

    def sharding(self, experts: str, uneven: int | None = None) -> dict[str, ShardSpec]:
        """How ``"ep"`` or ``"tp"`` cuts them. A down_proj_bias is whole with ``"tp"``.

        ``uneven``: the number of experts, where it is no multiple of the ranks of ``"ep"``.
        """
        if experts == "ep":
            return {name: ShardSpec(0, size=uneven, balanced=uneven is not None) for name in self.names()}
        packed = 2 if self.activation.gated and not self.activation.interleaved else 1
        out, inside = (2, 1) if self.transposed else (1, 2)
        specs = {self.first: ShardSpec(out, packed), "down_proj": ShardSpec(inside)}
        if self.bias:
            specs[f"{self.first}_bias"] = ShardSpec(1, packed)
        return specs


class Experts(nn.Module):
    """The experts of a mixture on tokens that ranks share: :func:`seqpar_kernels.moe_mlp` with its parameters.

    Parameters have the names and the layout of Transformers' experts: ``gate_up_proj`` [E, 2 * I, H] (``up_proj``
    [E, I, H] without a gate), ``down_proj`` [E, H, I], and ``*_bias``; each rank holds its part. They start as those of
    the same module on one rank.

    Args:
        num_experts: E; with ``experts="ep"`` rank r has part r of ``tensor_split`` of them.
        hidden_size: H.
        intermediate_size: I, a multiple of t with ``experts="tp"``.
        group: ProcessGroup or 1-D DeviceMesh of t ranks, None for this one alone.
        experts: ``"ep"``: whole experts on each rank. ``"tp"``: I/t of every expert.
        activation, gated, interleaved, alpha, limit, up_shift, chunks: see :func:`seqpar_kernels.moe_mlp`.
        bias: whether both projections have one.
        transposed: weights lie as [E, in, out].

    Raises:
        ValueError: an inner dimension that does not divide by the ranks of ``"tp"``.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> experts = sp.Experts(8, 16, 32)
        >>> weights, index = torch.randn(10, 8).softmax(-1).topk(2)
        >>> experts(torch.randn(10, 16), index, weights).shape
        torch.Size([10, 16])
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group = None,
        experts: str = "ep",
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        interleaved: bool = False,
        transposed: bool = False,
        alpha: float = 1.0,
        limit: float | None = None,
        up_shift: float = 0.0,
        chunks: int | None = None,
    ):
        super().__init__()
        for label, size in (
            ("num_experts", num_experts),
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
        ):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{label}: expected a positive int, got {size!r}")
        act = ExpertActivation(activation, gated, interleaved, alpha, limit, up_shift)
        self._begin(ExpertForm(act, bias, transposed), Region(group), experts, num_experts, intermediate_size, chunks)
        width = act.width(intermediate_size)
        sizes = {self.form.first: (width, hidden_size), "down_proj": (hidden_size, intermediate_size)}
        for name, (outs, ins) in sizes.items():
            bound = 1 / math.sqrt(ins)
            shape = (num_experts, ins, outs) if transposed else (num_experts, outs, ins)
            self._set(name, torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound))
            if bias:
                full = torch.empty(num_experts, outs, device=device, dtype=dtype).uniform_(-bound, bound)
                self._set(f"{name}_bias", full)

    def _begin(
        self, form: ExpertForm, region: Region, experts: str, num_experts: int, inner: int, chunks: int | None
    ) -> None:
        if experts not in ("ep", "tp"):
            raise ValueError(f"experts: expected 'ep' or 'tp', got {experts!r}")
        self.form, self.region, self.experts = form, region, experts
        self.num_experts, self.intermediate_size, self.chunks = num_experts, inner, chunks
        self.sharded = form.sharding(experts, num_experts if num_experts % region.ranks else None)
        if experts == "tp":
            check_shardable("intermediate_size", inner, ShardSpec(0), region.ranks)

    def _set(self, name: str, full: Tensor, requires_grad: bool = True) -> None:
        """Register this rank's part of ``full``."""
        spec = self.sharded.get(name)
        part = full.detach().clone() if spec is None else local_part(full, spec, self.region.group)
        self.register_parameter(name, nn.Parameter(part, requires_grad=requires_grad))

    @classmethod
    def from_torch(
        cls, module: nn.Module, group: Group = None, *, form: ExpertForm, experts: str = "ep", chunks: int | None = None
    ) -> Experts:
        """This rank's part of a module with such parameters.

        Args:
            module: has the parameters that ``form`` names, whole.
            group: see :class:`Experts`.
            form: what the module computes.
            experts: ``"ep"`` or ``"tp"``.
            chunks: see :func:`seqpar_kernels.moe_mlp`.

        Raises:
            ValueError: parameters that are not there or do not fit; with ``"tp"`` an inner dimension that does
                not divide by the ranks.
        """
        found: dict[str, nn.Parameter] = {}
        for name in form.names():
            param = getattr(module, name, None)
            dims = 2 if name.endswith("_bias") else 3
            if not isinstance(param, nn.Parameter) or param.dim() != dims:
                kind = tuple(param.shape) if isinstance(param, Tensor) else type(param).__name__
                raise ValueError(f"module: expected a parameter {name} with {dims} dimensions, got {kind}")
            found[name] = param
        down = found["down_proj"]
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        inner = down.shape[1 if form.transposed else 2]
        new._begin(form, Region(group), experts, down.shape[0], inner, chunks)
        for name, param in module._parameters.items():  # their order is that of an optimizer's state
            if name in found and param is not None:
                new._set(name, found[name], param.requires_grad)
        return new.train(module.training)

    @own_forward
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[..., H], [..., K], [..., K] -> [..., H]: this rank's tokens."""
        form, params = self.form, self._parameters
        first, second = params[form.first], params["down_proj"]
        assert first is not None and second is not None
        weights = (first.transpose(1, 2), second.transpose(1, 2)) if form.transposed else (first, second)
        biases = [params.get(f"{form.first}_bias"), params.get("down_proj_bias")]
        act = form.activation
        return moe_mlp(
            hidden_states,
            top_k_index,
            top_k_weights,
            *weights,
            *biases,
            group=self.region.group,
            num_experts=self.num_experts,
            experts=self.experts,
            activation=act.name,
            gated=act.gated,
            interleaved=act.interleaved,
            alpha=act.alpha,
            limit=act.limit,
            up_shift=act.up_shift,
            chunks=self.chunks,
        )

    def extra_repr(self) -> str:
        local = tuple(self._parameters["down_proj"].shape)  # type: ignore[union-attr]
        return (
            f"num_experts={self.num_experts}, intermediate_size={self.intermediate_size}, experts={self.experts!r}, "
            f"local down_proj {local}, {self.region!r}"
        )
