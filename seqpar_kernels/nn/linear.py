"""Column- and row-parallel linear layers of a sequence-parallel region."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import planned_all_gather_linear, planned_linear_reduce_scatter
from ..layout import Group
from ..overlap.planner import Plan
from .region import Region, shard_behind
from .sharding import ShardSpec, check_shardable, local_part


class _ParallelLinear(nn.Module):
    """What the two share: a sharded weight in torch.nn.Linear's layout, or transposed for Hugging Face's Conv1D."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _cut_input = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sharded: dict[str, ShardSpec],
        group: Group,
        seq_dim: int,
        chunks: int | None,
        engine: str,
        transposed: bool,
    ):
        super().__init__()
        for label, size in (("in_features", in_features), ("out_features", out_features)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{label}: expected a positive int, got {size!r}")
        self.in_features, self.out_features = in_features, out_features
        self.sharded = sharded
        self.region = Region(group, seq_dim)
        self.chunks, self.engine, self.transposed = chunks, engine, transposed
        self.ran: Plan | None = None  # how the last forward ran
        label, size = ("in_features", in_features) if self._cut_input else ("out_features", out_features)
        check_shardable(label, size, sharded["weight"], self.region.ranks)

    def _full_shape(self) -> tuple[int, int]:
        return (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)

    def _set(self, name: str, full: Tensor | None, requires_grad: bool = True) -> None:
        """Register this rank's part of ``full``."""
        if full is None:
            self.register_parameter(name, None)
            return
        spec = self.sharded.get(name)
        part = full.detach().clone() if spec is None else local_part(full, spec, self.region.group)
        self.register_parameter(name, nn.Parameter(part, requires_grad=requires_grad))

    def _initialise(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """torch.nn.Linear's initialisation of the whole layer, then cut: a run on t ranks starts as a run on one."""
        full = torch.empty(self._full_shape(), device=device, dtype=dtype)
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(full, -bound, bound)
        self._set("weight", full)
        self._set(
            "bias", torch.empty(self.out_features, device=device, dtype=dtype).uniform_(-bound, bound) if bias else None
        )

    def _linear_weight(self) -> Tensor:
        """[out, in], whatever the parameter's layout."""
        return self.weight.t() if self.transposed else self.weight

    def extra_repr(self) -> str:
        local = tuple(self.weight.shape)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"local weight {local}, {self.region!r}"
        )


def _linear_features(module: nn.Module) -> tuple[int, int, bool]:
    """(in_features, out_features, transposed) of nn.Linear or Hugging Face's Conv1D.

    Raises:
        ValueError: neither.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features, False
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1], True
    raise ValueError(f"module: expected torch.nn.Linear or transformers' Conv1D, got {type(module).__name__}")


def _column_sharding(transposed: bool, sections: int) -> dict[str, ShardSpec]:
    return {"weight": ShardSpec(1 if transposed else 0, sections), "bias": ShardSpec(0, sections)}


def _row_sharding(transposed: bool) -> dict[str, ShardSpec]:
    return {"weight": ShardSpec(0 if transposed else 1)}


class ColumnParallelLinear(_ParallelLinear):
    """All-gathers a sequence shard and multiplies it with this rank's rows of the weight, overlapped.

    Args:
        in_features: K, not cut.
        out_features: N of the whole layer; each rank holds N/t.
        bias: whether there is one; it is cut like the output.
        group, seq_dim: where the sequence is sharded.
        chunks, engine: see :func:`seqpar_kernels.all_gather_linear`.
        sections: how many equal projections are packed in the output (3 for q|k|v); each is cut on its own.
        transposed: keep the weight as [K, N/t].

    Raises:
        ValueError: N is not a multiple of sections * t.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group = None,
        seq_dim: int = -2,
        chunks: int | None = None,
        engine: str = "auto",
        sections: int = 1,
        transposed: bool = False,
    ):
        sharded = _column_sharding(transposed, sections)
        super().__init__(in_features, out_features, sharded, group, seq_dim, chunks, engine, transposed)
        self.shared_gather: SharedGather | None = None
        self._initialise(bias, device, dtype)

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        group: Group = None,
        *,
        seq_dim: int = -2,
        chunks: int | None = None,
        engine: str = "auto",
        sections: int = 1,
    ) -> ColumnParallelLinear:
        """This rank's part of an nn.Linear or a transformers Conv1D."""
        features_in, features_out, transposed = _linear_features(module)
        new = cls.__new__(cls)
        sharded = _column_sharding(transposed, sections)
        _ParallelLinear.__init__(new, features_in, features_out, sharded, group, seq_dim, chunks, engine, transposed)
        new.shared_gather = None
        return _take_over(new, module)

    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., K] -> [..., S, ..., N/t]"""
        x = shard_behind(x)
        region = self.region
        seq_len = region.seq_len if seq_len is None else seq_len
        if self.shared_gather is not None:
            return self.shared_gather(self, x, seq_len)
        out: Tensor
        out, self.ran = planned_all_gather_linear(
            x, self._linear_weight(), self.bias, region.group, region.seq_dim, self.chunks, self.engine, seq_len
        )
        return out


class RowParallelLinear(_ParallelLinear):
    """Multiplies with this rank's columns of the weight and reduce-scatters the partial sums, overlapped.

    Args as in :class:`ColumnParallelLinear`; ``in_features`` is cut, the bias is whole on every rank, is added once,
    and gets its complete gradient on every rank.

    Raises:
        ValueError: K is not a multiple of t.
    """

    _cut_input = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group = None,
        seq_dim: int = -2,
        chunks: int | None = None,
        engine: str = "auto",
        transposed: bool = False,
    ):
        sharded = _row_sharding(transposed)
        super().__init__(in_features, out_features, sharded, group, seq_dim, chunks, engine, transposed)
        self._initialise(bias, device, dtype)

    @classmethod
    def from_torch(
        cls,
        module: nn.Module,
        group: Group = None,
        *,
        seq_dim: int = -2,
        chunks: int | None = None,
        engine: str = "auto",
    ) -> RowParallelLinear:
        """This rank's part of an nn.Linear or a transformers Conv1D."""
        features_in, features_out, transposed = _linear_features(module)
        new = cls.__new__(cls)
        sharded = _row_sharding(transposed)
        _ParallelLinear.__init__(new, features_in, features_out, sharded, group, seq_dim, chunks, engine, transposed)
        return _take_over(new, module)

    def forward(self, x: Tensor) -> Tensor:
        """[..., S, ..., K/t] -> [..., S/t, ..., N]"""
        region = self.region
        out, self.ran = planned_linear_reduce_scatter(
            x, self._linear_weight(), self.bias, region.group, region.seq_dim, self.chunks, self.engine
        )
        return out


def _take_over(new: Any, module: nn.Module) -> Any:
    """Fill a parallel layer from the whole one it replaces; on one rank it keeps the very same parameters."""
    for name in ("weight", "bias"):
        param = getattr(module, name, None)
        if new.region.ranks == 1:
            new.register_parameter(name, param)
        else:
            new._set(name, param, param is not None and param.requires_grad)
    return new.train(module.training)


class SharedGather:
    """Lets column-parallel layers that are fed the same tensor share one all-gather (q, k, v; gate, up).

    The first one called computes for all; the others find their result waiting, provided that nothing has changed: the
    very same tensor, the same weights, gradients wanted or not. Else a layer computes anew.
    """

    def __init__(self, members: list[ColumnParallelLinear]):
        self.members = members
        self._input: Tensor | None = None
        self._state: tuple[Any, ...] = ()
        self._waiting: dict[int, Tensor] = {}

    def __call__(self, module: ColumnParallelLinear, x: Tensor, seq_len: int | None) -> Tensor:
        key = next(i for i, member in enumerate(self.members) if member is module)
        state = (x._version, seq_len, torch.is_grad_enabled(), *(m.weight._version for m in self.members))
        if self._input is not x or self._state != state or key not in self._waiting:
            region = module.region
            weights = [member._linear_weight() for member in self.members]
            biases = [member.bias for member in self.members]
            outs, ran = planned_all_gather_linear(
                x, weights, biases, region.group, region.seq_dim, module.chunks, module.engine, seq_len
            )
            for member in self.members:
                member.ran = ran
            self._input, self._state = x, state
            self._waiting = dict(enumerate(outs))
        out = self._waiting.pop(key)
        if not self._waiting:
            self._input = None
        return out

    def clear(self) -> None:
        """Forget results nobody came for."""
        self._input = None
        self._waiting = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedGather:
        twin = SharedGather([])
        memo[id(self)] = twin
        twin.members = [copy.deepcopy(member, memo) for member in self.members]
        return twin
