"""The output of a vocabulary-parallel embedding, sharded along the sequence before the model shards it.

A model embeds tokens, may scale them and add positions, and passes the sum to its first block, where the sequence is
sharded. With :class:`EmbeddedRows` the ranks' partial embeddings are reduce-scattered straight into that shard. It has
the shape of the whole tensor and holds this rank's rows. Functions that treat rows one by one run on these rows. Any
other function gets the whole tensor, by an all-gather: together as many bytes as the all-reduce that they replace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..functional import gather_sequence, scatter_sequence
from .deferred_sum import version_of
from .region import Region

_DESCRIPTIONS = frozenset(
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "requires_grad")
) | frozenset(
    {Tensor.size, Tensor.dim, Tensor.__len__, Tensor.numel, Tensor.is_floating_point, torch.is_floating_point}
)
_ROW_BY_ROW = frozenset(
    {
        *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
        *(torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__),
        *(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__),
        *(torch.div, Tensor.div, Tensor.__truediv__),
        *(Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.type_as, Tensor.contiguous),
    }
)


class SequenceEmbedding(Protocol):
    """The embedding that makes :class:`EmbeddedRows`, as far as they use it."""

    region: Region
    scattered: bool | None
    taken_whole_by: str


class EmbeddedRows(Tensor):
    """A tensor of shape [..., S, ..., H] that holds ``shard`` [..., S/t, ..., H].

    Element-wise functions of it and numbers, or tensors that are whole on every rank, return another EmbeddedRows.
    Every other function gets the whole tensor, and ``embedding.taken_whole_by`` is set to its name.
    """

    shard: Tensor
    embedding: SequenceEmbedding
    whole: Tensor | None
    whole_version: int
    grad_mode: bool

    @staticmethod
    def __new__(cls, shard: Tensor, length: int, embedding: SequenceEmbedding) -> EmbeddedRows:
        shape = list(shard.shape)
        shape[embedding.region.seq_dim] = length
        new: Any = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=shard.dtype, device=shard.device, requires_grad=shard.requires_grad
        )
        if shard.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                new.register_hook(_lost)
        new.shard, new.embedding, new.whole, new.grad_mode = shard, embedding, None, torch.is_grad_enabled()
        return new

    @property
    def length(self) -> int:
        """S"""
        return int(self.shape[self.embedding.region.seq_dim])

    def rows(self) -> Tensor:
        """This rank's shard, with the in-place changes of the whole tensor."""
        if self.whole is not None and version_of(self.whole) != self.whole_version:
            region = self.embedding.region
            return scatter_sequence(self.whole, region.group, region.seq_dim)
        return self.shard

    def value(self, taker: str) -> Tensor:
        """The whole tensor, for ``taker``. All ranks compute the same with it, so that each has the whole gradient."""
        if self.whole is None:
            region = self.embedding.region
            with torch.set_grad_enabled(self.grad_mode):
                self.whole = gather_sequence(
                    self.shard, region.group, region.seq_dim, seq_len=self.length, tensor_parallel_output_grad=False
                )
            self.whole_version = version_of(self.whole)
            self.embedding.scattered, self.embedding.taken_whole_by = False, taker
        return self.whole

    def _operand(self, other: Any) -> Any:
        """This rank's rows of the operand ``other``; None where it has no such rows."""
        if isinstance(other, EmbeddedRows):
            return other.rows() if other.shape == self.shape else None
        if not isinstance(other, Tensor):
            return other
        seq_dim = self.embedding.region.seq_dim
        from_end = seq_dim if seq_dim < 0 else seq_dim - self.dim()
        if type(other) not in (Tensor, nn.Parameter) or not other.is_floating_point() or other.dim() > self.dim():
            return None
        if other.device != self.device and other.dim():
            return None
        if other.dim() >= -from_end and other.shape[from_end] == self.length:
            fits = all(a in (1, b) for a, b in zip(reversed(other.shape), reversed(self.shape), strict=False))
            return scatter_sequence(other, self.embedding.region.group, from_end) if fits else None
        # An operand that all rows share would get the gradient of this rank's rows only.
        return other if other.numel() == 1 and not other.requires_grad else None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIPTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is Tensor.requires_grad_ and args[1:] in ((), (True,)) and not kwargs and args[0].shard.requires_grad:
            return args[0]  # Transformers calls requires_grad_ on embeddings before checkpointed blocks
        if func in _ROW_BY_ROW and (done := _row_by_row(func, args, kwargs)) is not None:
            return done
        name = getattr(func, "__name__", str(func))

        def whole(x: Any) -> Any:
            return x.value(name) if isinstance(x, EmbeddedRows) else x

        args, kwargs = tree_map(whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own default is no class method
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(f"{func}: expected a whole embedding, got one with only this rank's rows of the sequence")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # of an untyped signature
        return f"EmbeddedRows({tuple(self.shape)}, this rank's rows {tuple(self.shard.shape)})"


def _row_by_row(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> EmbeddedRows | None:
    """``func`` of this rank's rows; None where it needs the others."""
    this = next(arg for arg in args if isinstance(arg, EmbeddedRows))
    if any(isinstance(value, Tensor) for value in kwargs.values()):
        return None
    operands = [this._operand(arg) if isinstance(arg, Tensor) else arg for arg in args]
    if any(operand is None and arg is not None for operand, arg in zip(operands, args, strict=True)):
        return None
    shard = func(*operands, **kwargs)
    rows = this.rows()
    if shard is rows:
        return this
    if not isinstance(shard, Tensor) or shard.shape != rows.shape or shard.device != rows.device:
        return None
    return EmbeddedRows(shard, this.length, this.embedding)


def _lost(grad: Tensor) -> None:
    """Raise in the backward: a torch.autograd.Function ignores tensor subclasses and would take this for a leaf."""
    raise RuntimeError(
        "a custom autograd function was given an embedding of which each rank holds its rows of the sequence only, and "
        "its gradient would be lost: give it x.clone()"
    )
