"""The experts of a mixture, whole ones or a part of each on a rank."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..functional.moe import counted_moe_mlp
from ..kernels.expert_activation import ExpertActivation
from ..layout import Group
from ..ops import announced
from .own_forward import own_forward
from .region import Region
from .sharding import ShardSpec, check_shardable, local_part


class ExpertForm(NamedTuple):
    """What experts compute, and how their weights lie.

    ``transposed``: [E, in, out] instead of [E, out, in]. ``by_expert``: the module is given each expert's rows in turn,
    scaled (:class:`RowsByExpert`).

    Examples:
        >>> import seqpar_kernels as sp
        >>> sp.nn.ExpertForm(bias=True).names()
        ('gate_up_proj', 'down_proj', 'gate_up_proj_bias', 'down_proj_bias')
    """

    activation: ExpertActivation = ExpertActivation()
    bias: bool = False
    transposed: bool = False
    by_expert: bool = False

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


class ExpertTraffic(NamedTuple):
    """What travelled in one forward of :class:`Experts`: the same on every rank."""

    counts: Tensor  # [t, t, 2] int64: tokens of rank i that went to j, and pairs of a token and an expert there
    row_bytes: int  # of a token
    top_k: int

    def sent(self) -> list[int]:
        """Tokens that each rank sent to others."""
        tokens = self.counts[:, :, 0]
        return (tokens.sum(1) - tokens.diagonal()).tolist()  # type: ignore[no-any-return]

    def wire_bytes(self) -> int:
        """What the rank that sent most has sent: its tokens, with numbers and weights of experts, and results."""
        tokens = self.counts[:, :, 0]
        out, back = (tokens.sum(dim) - tokens.diagonal() for dim in (1, 0))
        return int((out * (self.row_bytes + 8 * self.top_k) + back * self.row_bytes).max())

    def fullest(self) -> float:
        """Pairs on the fullest rank over their mean; 1 where there is none."""
        pairs = self.counts[:, :, 1].sum(0).double()
        return float(pairs.max() / pairs.mean()) if bool(pairs.any()) else 1.0


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
        accumulate_into_main_grad: gradients of the two projections are added to their ``main_grad``, as those of
            :class:`seqpar_kernels.ColumnParallelLinear`; those of biases are not. May also be set later.

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
        accumulate_into_main_grad: bool = False,
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
        self.accumulate_into_main_grad = accumulate_into_main_grad
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
        self.accumulate_into_main_grad = False
        self.ran: ExpertTraffic | None = None  # what travelled in the last forward
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
        return self._run(hidden_states, top_k_index, top_k_weights)

    def _run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        first, second = (self._laid_out(name) for name in (self.form.first, "down_proj"))
        first_bias, second_bias = (self._parameters.get(f"{n}_bias") for n in (self.form.first, "down_proj"))
        main_grads = [self._main_grad(name) for name in (self.form.first, "down_proj")]
        act = self.form.activation
        out, counts = counted_moe_mlp(
            hidden_states,
            top_k_index,
            top_k_weights,
            (first, first_bias, second, second_bias),
            self.region.group,
            self.num_experts,
            self.experts,
            (act.name, act.gated, act.interleaved, act.alpha, act.limit, act.up_shift),
            self.chunks,
            main_grads if any(m is not None for m in main_grads) else None,
        )
        if not torch.compiler.is_compiling():
            row_bytes = hidden_states.shape[-1] * out.element_size()
            self.ran = ExpertTraffic(counts, row_bytes, top_k_index.shape[-1])
        return out

    def _laid_out(self, name: str) -> Tensor:
        """A projection as [e, out, in]."""
        weight = self._parameters[name]
        assert weight is not None
        used = announced(weight) if self.accumulate_into_main_grad else weight
        return used.transpose(1, 2) if self.form.transposed else used

    def _main_grad(self, name: str) -> Tensor | None:
        """Where the gradient of a projection goes, as [e, out, in]; None: to the parameter.

        Raises:
            ValueError: it was asked for, and the parameter has none.
        """
        weight = self._parameters[name]
        assert weight is not None
        if not self.accumulate_into_main_grad or not (torch.is_grad_enabled() and weight.requires_grad):
            return None
        main_grad: Tensor | None = getattr(weight, "main_grad", None)
        if main_grad is None:
            raise ValueError(
                f"accumulate_into_main_grad: expected {name}.main_grad, a float32 tensor {tuple(weight.shape)}, found "
                "none; allocate it before the first forward"
            )
        return main_grad.transpose(1, 2) if self.form.transposed else main_grad

    def extra_repr(self) -> str:
        local = tuple(self._parameters["down_proj"].shape)  # type: ignore[union-attr]
        return (
            f"num_experts={self.num_experts}, intermediate_size={self.intermediate_size}, experts={self.experts!r}, "
            f"local down_proj {local}, {self.region!r}"
        )


class RowsByExpert(Experts):
    """Experts that are given all tokens for the first expert, then all for the second, ..., as those of Llama 4.

    A row is scaled by the token's weight for the expert, and 0 where the token has not chosen it. An expert makes 0 of
    such a row, and its gradients are 0, so that only the others travel and are multiplied.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> from seqpar_kernels.nn import RowsByExpert
        >>> experts = RowsByExpert(2, 16, 32)
        >>> rows = torch.stack([torch.randn(16), torch.zeros(16), torch.zeros(16), torch.randn(16)])
        >>> experts(rows).any(1)  # two tokens: the first is expert 0's, the second expert 1's
        tensor([ True, False, False,  True])
    """

    @own_forward
    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """[E * T, H] -> [E * T, H]"""
        experts = torch.arange(self.num_experts, device=hidden_states.device)
        experts = experts.repeat_interleave(hidden_states.shape[0] // self.num_experts)
        rows = hidden_states.detach().any(1).nonzero().view(-1)
        index = experts[rows, None]
        out = self._run(hidden_states.index_select(0, rows), index, torch.ones_like(index, dtype=hidden_states.dtype))
        return out.new_zeros(hidden_states.shape).index_add(0, rows, out)
