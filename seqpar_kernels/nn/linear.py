"""Column- and row-parallel linear layers of a sequence-parallel region."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_divides
from ..functional import checked_all_gather_linear, checked_linear_reduce_scatter
from ..layout import Group
from ..ops import announced
from ..ops.remake import NONE, Kept, kept_of
from ..overlap.planner import Plan
from ..strict import refuse
from .deferred_sum import DeferredSum, settled, version_of
from .own_forward import own_forward
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
        self.accumulate_into_main_grad = False
        self.remake_input = NONE  # which inputs are not kept but made again: NONE, AUTO or MAX of ops.remake
        self.ran: Plan | None = None  # how the last forward ran
        self.kept: Kept | None = None  # what it kept of its input
        label, size = ("in_features", in_features) if self._cut_input else ("out_features", out_features)
        if "weight" in sharded:
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
        weight = announced(self.weight) if self.accumulate_into_main_grad else self.weight
        return weight.t() if self.transposed else weight

    def _main_grad(self) -> Tensor | None:
        """Where the weight's gradient goes, laid out like :meth:`_linear_weight`; None: to the weight.

        Raises:
            ValueError: it was asked for, and the weight has none.
        """
        if not self.accumulate_into_main_grad or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return None
        main_grad: Tensor | None = getattr(self.weight, "main_grad", None)
        if main_grad is None:
            raise ValueError(
                f"accumulate_into_main_grad: expected weight.main_grad, a float32 tensor {tuple(self.weight.shape)}, "
                f"found none; allocate it before the first forward"
            )
        return main_grad.t() if self.transposed else main_grad

    def _note_kept(self, x: Tensor, out: Tensor, gathered: bool = False) -> None:
        if not torch.compiler.is_compiling():
            self.kept = kept_of(x, out, self.remake_input, gathered)

    def extra_repr(self) -> str:
        local = tuple(self.weight.shape)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"local weight {local}, {self.region!r}"
        )


def _linear_features(module: nn.Module) -> tuple[int, int, bool]:
    """(in_features, out_features, transposed) of nn.Linear, Hugging Face's Conv1D, or one of ours on one rank.

    Raises:
        ValueError: none of them.
    """
    if isinstance(module, nn.Linear):
        if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
            raise ValueError(f"module: expected torch.nn.Linear with its own forward, got {type(module).__name__}")
        if module._parameters.get("weight") is None:
            raise ValueError(
                f"module: expected a weight that is a parameter, got {type(module).__name__}, which computes it "
                "(torch.nn.utils.parametrize.remove_parametrizations makes it one)"
            )
        return module.in_features, module.out_features, False
    if isinstance(module, _ParallelLinear) and module.region.ranks == 1:
        return module.in_features, module.out_features, module.transposed
    weight = getattr(module, "weight", None)
    own_forward = "forward" not in vars(module)
    if type(module).__name__ == "Conv1D" and own_forward and isinstance(weight, nn.Parameter) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1], True
    raise ValueError(f"module: expected torch.nn.Linear or transformers' Conv1D, got {type(module).__name__}")


Sections = int | tuple[int, ...]


def _column_sharding(transposed: bool, sections: Sections) -> dict[str, ShardSpec]:
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
        sections: how many equal projections are packed in the output (3 for q|k|v), or their sizes; each is cut on
            its own.
        transposed: keep the weight as [K, N/t].
        accumulate_into_main_grad: the weight's gradient is added to ``weight.main_grad`` (float32, allocated by whoever
            reduces gradients, as Megatron's DDP does) and not to ``weight.grad``. Where the weight has an attribute
            ``grad_added_to_main_grad`` it becomes True, and ``weight.grad`` a placeholder for hooks to find.
        save_gathered: see :func:`seqpar_kernels.all_gather_linear`. May also be set later, on converted layers too.

    Raises:
        ValueError: N is not a multiple of sections * t.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> plain = torch.nn.Linear(16, 64)
        >>> up = sp.ColumnParallelLinear.from_torch(plain, group=None)
        >>> x = torch.randn(2, 8, 16)
        >>> torch.allclose(up(x), plain(x), atol=1e-5)  # on 4 ranks: [2, 8, 16] -> [2, 32, 16]
        True
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
        sections: Sections = 1,
        transposed: bool = False,
        accumulate_into_main_grad: bool = False,
        save_gathered: bool = False,
    ):
        sharded = _column_sharding(transposed, sections)
        super().__init__(in_features, out_features, sharded, group, seq_dim, chunks, engine, transposed)
        self._alone()
        self.accumulate_into_main_grad = accumulate_into_main_grad
        self.save_gathered = save_gathered
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
        sections: Sections = 1,
    ) -> ColumnParallelLinear:
        """This rank's part of an nn.Linear or a transformers Conv1D."""
        features_in, features_out, transposed = _linear_features(module)
        new = cls.__new__(cls)
        sharded = _column_sharding(transposed, sections)
        _ParallelLinear.__init__(new, features_in, features_out, sharded, group, seq_dim, chunks, engine, transposed)
        new._alone()
        return _take_over(new, module)

    def _alone(self) -> None:
        self.shared_gather: SharedGather | None = None
        self.save_gathered = False
        self.input_is_whole = False  # the sequence has been gathered where it entered the module around this one

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """This rank's weight [N/t, K] and bias [N/t]."""
        return self._linear_weight(), self.bias

    @own_forward
    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """[..., S/t, ..., K] -> [..., S, ..., N/t]"""
        x = settled(shard_behind(x))
        region = self.region
        seq_len = region.seq_len if seq_len is None else seq_len
        if self.shared_gather is not None:
            return self.shared_gather(self, x, seq_len)
        group = None if self.input_is_whole else region.group
        weight, bias = self.operands()
        options = (group, region.seq_dim, self.chunks, self.engine, None if group is None else seq_len)
        call, operands = checked_all_gather_linear(
            x, weight, bias, *options, self._main_grad(), self.save_gathered, remake=self.remake_input
        )
        self.ran = call.plan
        out: Tensor = call(*operands)
        self._note_kept(x, out, self.save_gathered)
        return out


class SharedHeadsLinear(ColumnParallelLinear):
    """The key or value projection of fewer heads than ranks: neighbouring ranks compute the same head.

    The weight is whole on every rank; a rank uses the rows of its head alone, and the gradients are summed over ranks.

    Raises:
        ValueError: the number of ranks is not a multiple of ``heads``, or N is not.

    Examples:
        >>> import torch
        >>> from seqpar_kernels.nn import SharedHeadsLinear
        >>> plain = torch.nn.Linear(16, 4)  # the keys of one head of size 4
        >>> keys = SharedHeadsLinear.from_torch(plain, group=None, heads=1)
        >>> keys(torch.randn(2, 8, 16)).shape
        torch.Size([2, 8, 4])
    """

    @classmethod
    def from_torch(  # type: ignore[override]
        cls, module: nn.Module, group: Group = None, *, heads: int, seq_dim: int = -2, engine: str = "auto"
    ) -> SharedHeadsLinear:
        """From the whole projection, whose parameters it takes over."""
        features_in, features_out, transposed = _linear_features(module)
        new = cls.__new__(cls)
        _ParallelLinear.__init__(new, features_in, features_out, {}, group, seq_dim, None, engine, transposed)
        check_divides("heads", new.region.ranks, heads, "the number of ranks")
        check_divides("out_features", features_out, heads, "its size")
        new._alone()
        new.heads = heads
        for name in ("weight", "bias"):
            new.register_parameter(name, getattr(module, name, None))
        return new.train(module.training)

    heads: int

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """[N/heads, K], [N/heads]"""
        region, size = self.region, self.out_features // self.heads
        weight, bias = region.summing(self.weight, self.bias)
        assert weight is not None
        start = region.rank * self.heads // region.ranks * size
        weight = (weight.t() if self.transposed else weight).narrow(0, start, size)
        return weight, None if bias is None else bias.narrow(0, start, size)

    def _main_grad(self) -> Tensor | None:
        """
        Raises:
            ValueError: it was asked for.
        """
        if self.accumulate_into_main_grad:
            raise ValueError(
                "accumulate_into_main_grad: expected False for heads shared by ranks, whose gradients are summed over "
                "the ranks before anything is added to them"
            )
        return None


class RowParallelLinear(_ParallelLinear):
    """Multiplies with this rank's columns of the weight and reduce-scatters the partial sums, overlapped.

    Args as in :class:`ColumnParallelLinear`; ``in_features`` is cut, the bias is whole on every rank, is added once,
    and gets its complete gradient on every rank.

    Raises:
        ValueError: K is not a multiple of t.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> plain = torch.nn.Linear(64, 16)
        >>> down = sp.RowParallelLinear.from_torch(plain, group=None)
        >>> x = torch.randn(2, 8, 64)
        >>> torch.allclose(down(x), plain(x), atol=1e-5)  # on 4 ranks: [2, 8, 16] -> [2, 2, 16]
        True
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
        accumulate_into_main_grad: bool = False,
    ):
        sharded = _row_sharding(transposed)
        super().__init__(in_features, out_features, sharded, group, seq_dim, chunks, engine, transposed)
        self.accumulate_into_main_grad = accumulate_into_main_grad
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

    @own_forward
    def forward(self, x: Tensor) -> Tensor:
        """[..., S, ..., K/t] -> [..., S/t, ..., N]"""
        return DeferredSum(self, x) if self.region.defers(x) else self.summed(x)

    def summed(self, x: Tensor) -> Tensor:
        """The output, never deferred."""
        region = self.region
        options = (region.group, region.seq_dim, self.chunks, self.engine)
        call, operands = checked_linear_reduce_scatter(
            x, self._linear_weight(), self.bias, *options, main_grad=self._main_grad(), remake=self.remake_input
        )
        self.ran = call.plan
        out: Tensor = call(*operands)
        self._note_kept(x, out)
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

    Examples:
        >>> import torch
        >>> from seqpar_kernels.nn import ColumnParallelLinear, SharedGather
        >>> gate, up = ColumnParallelLinear(16, 32), ColumnParallelLinear(16, 32)
        >>> gate.shared_gather = up.shared_gather = SharedGather([gate, up])
        >>> x = torch.randn(2, 8, 16)
        >>> gate(x).shape, up(x).shape  # one all-gather for both
        (torch.Size([2, 8, 32]), torch.Size([2, 8, 32]))
    """

    def __init__(self, members: list[ColumnParallelLinear]):
        self.members = members
        self._input: Tensor | None = None
        self._state: tuple[Any, ...] = ()
        self._waiting: dict[int, Tensor] = {}
        self._changes = False  # whether something has been changed in place between two siblings

    def __call__(self, module: ColumnParallelLinear, x: Tensor, seq_len: int | None) -> Tensor:
        key = next(i for i, member in enumerate(self.members) if member is module)
        compiling = torch.compiler.is_compiling()
        # A traced tensor has no version to compare with: that nothing changes in between is known from eager forwards.
        versions = [] if compiling else [version_of(t) for t in (x, *(member.weight for member in self.members))]
        state = (*versions, seq_len, torch.is_grad_enabled())
        unsure = compiling and self._changes
        if unsure or self._input is not x or self._state != state or key not in self._waiting:
            if self._waiting:
                self._changes = self._changes or (self._input is x and self._state[:-2] != state[:-2])
                refuse(
                    f"all_gather_linear on {tuple(x.shape)}",
                    "gathered again for a layer that was to share the gather with its siblings: "
                    + ("its input is another tensor" if self._input is not x else "something changed in between"),
                )
            region = module.region
            weights, biases = zip(*(member.operands() for member in self.members), strict=True)
            options = (region.group, region.seq_dim, module.chunks, module.engine, seq_len)
            main_grads = [member._main_grad() for member in self.members]
            save = any(member.save_gathered for member in self.members)
            remake = module.remake_input
            call, operands = checked_all_gather_linear(x, weights, biases, *options, main_grads, save, remake=remake)
            outs = call(*operands)
            for member in self.members:
                member.ran = call.plan
            module._note_kept(x, outs[0], save)
            self._input, self._state = x, state
            self._waiting = dict(enumerate(outs))
        out = self._waiting.pop(key)
        if not self._waiting:
            self._input, self._state = None, ()
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
