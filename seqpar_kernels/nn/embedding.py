"""Embedding and language-model head with the vocabulary cut over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..functional import (
    copy_to_tensor_parallel,
    gather_tensor_parallel,
    vocab_parallel_embedding,
    vocab_parallel_linear_cross_entropy,
)
from ..layout import Group
from .region import Region
from .sequence_view import EmbeddedRows
from .sharding import ShardSpec, local_part


def _vocabulary_part(full: Tensor | None, size: int, region: Region) -> Any:
    """This rank's rows of a parameter (or None); on one rank the parameter itself."""
    if full is None or region.ranks == 1:
        return full
    return nn.Parameter(local_part(full, ShardSpec(0, size=size), region.group), requires_grad=full.requires_grad)


class VocabParallelEmbedding(nn.Module):
    """``torch.nn.Embedding`` with its rows split over the ranks; returns a sequence shard.

    Args:
        num_embeddings: V, not necessarily a multiple of t: rank r holds rows r * ceil(V/t) to (r + 1) * ceil(V/t).
        embedding_dim: H.
        padding_idx: the entry that starts as zeros and gets no gradient.
        group, seq_dim: where the sequence of the result is sharded.
        whole_output: return the whole sequence on every rank instead of a shard.

    Attributes:
        whole_needed: set in converted models with ``whole_output``: called in each forward, returns the reason why the
            whole result is needed at once. Where it returns None the result is an :class:`.sequence_view.EmbeddedRows`.
        scattered: whether the last forward computed this rank's shard only; None before the first forward.
        taken_whole_by: the name of the code that needed the whole tensor in the last forward; "" for none.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> plain = torch.nn.Embedding(10, 16)
        >>> embedding = sp.VocabParallelEmbedding.from_torch(plain, group=None)
        >>> ids = torch.tensor([[3, 1, 4, 1]])
        >>> torch.equal(embedding(ids), plain(ids))
        True
    """

    weight: nn.Parameter
    embed_scale: Tensor | float | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        group: Group = None,
        seq_dim: int = -2,
        whole_output: bool = False,
    ):
        super().__init__()
        # Initialise the whole table as torch.nn.Embedding does, then cut it: t ranks start with the weights of one.
        full = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._take(full, Region(group, seq_dim), whole_output)

    def _take(self, module: nn.Embedding, region: Region, whole_output: bool) -> None:
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx, self.whole_output = module.padding_idx, whole_output
        self.region = region
        self.whole_needed: Callable[[], str | None] | None = None
        self.scattered: bool | None = None
        self.taken_whole_by = ""
        self.sharded = {"weight": ShardSpec(0, size=self.num_embeddings)}
        self.weight = _vocabulary_part(module.weight, self.num_embeddings, region)
        scale = _scale_of(module)
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale, persistent="embed_scale" in module.state_dict())
        else:
            self.embed_scale = scale

    @classmethod
    def from_torch(
        cls, module: nn.Embedding, group: Group = None, *, seq_dim: int = -2, whole_output: bool = False
    ) -> VocabParallelEmbedding:
        """This rank's rows of an nn.Embedding, or of one that multiplies them by its ``embed_scale`` (Gemma's).

        Raises:
            ValueError: no nn.Embedding, one whose forward does anything else, or one with ``max_norm``,
                ``scale_grad_by_freq`` or ``sparse``.
        """
        check_embedding(module)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._take(module, Region(group, seq_dim), whole_output)
        return new.train(module.training)

    def forward(self, ids: Tensor) -> Tensor:
        """[..., S, ...] -> [..., S/t, ..., H]"""
        taken_by = self._taken_by() if self.whole_output else None
        standing_in = self.whole_output and taken_by is None
        self.scattered, self.taken_whole_by = taken_by is None, taken_by or ""
        out = vocab_parallel_embedding(
            ids,
            self.weight,
            group=self.region.group,
            seq_dim=self.region.seq_dim,
            vocab_size=self.num_embeddings,
            padding_idx=self.padding_idx,
            whole_output=self.whole_output and not standing_in,
        )
        if isinstance(self.embed_scale, Tensor):
            out = out * self.embed_scale.to(self.weight.dtype)
        elif self.embed_scale is not None:
            out = out * self.embed_scale
        if not standing_in:
            return out
        seq_dim = self.region.seq_dim
        return EmbeddedRows(out, ids.shape[seq_dim + 1 if seq_dim < 0 else seq_dim], self)

    def _taken_by(self) -> str | None:
        """The name of the code that needs the whole tensor; None where none is known."""
        if self.region.group is None or self.whole_needed is None:
            return "the model"
        if torch.compiler.is_compiling():  # EmbeddedRows would break the graph
            return "torch.compile"
        return self.whole_needed()

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self.region!r}"


def check_embedding(module: nn.Module) -> None:
    """Raise ValueError for a module that :class:`VocabParallelEmbedding` cannot replace."""
    if not isinstance(module, nn.Embedding):
        raise ValueError(f"module: expected torch.nn.Embedding, got {type(module).__name__}")
    if type(module).forward is not nn.Embedding.forward and not _only_scales(module):
        raise ValueError(
            "module: expected torch.nn.Embedding with its own forward, or one that multiplies by its embed_scale, got "
            f"{type(module).__name__}"
        )
    for option, off in (("max_norm", None), ("scale_grad_by_freq", False), ("sparse", False)):
        if getattr(module, option) != off:
            raise ValueError(f"module.{option}: expected {off}, got {getattr(module, option)!r}")


def _scale_of(module: nn.Embedding) -> Tensor | float | None:
    """The factor by which a subclass of nn.Embedding multiplies its rows; None for nn.Embedding itself."""
    return None if type(module).forward is nn.Embedding.forward else cast(Tensor | float, module.embed_scale)


@torch.no_grad()
def _only_scales(module: nn.Embedding) -> bool:
    """Whether an overridden forward returns the rows times ``embed_scale``, found by calling it."""
    scale = getattr(module, "embed_scale", None)
    if not (isinstance(scale, float) or (isinstance(scale, Tensor) and scale.dim() == 0 and not scale.requires_grad)):
        return False
    ids = {0, 1, module.num_embeddings // 2, module.num_embeddings - 1, module.padding_idx or 0}
    probe = torch.tensor([sorted(i for i in ids if 0 <= i < module.num_embeddings)], device=module.weight.device)
    rows = nn.Embedding.forward(module, probe)
    return torch.equal(module(probe), rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale))


class VocabParallelHead(nn.Module):
    """The linear layer from the last hidden state to logits; each rank holds some rows of the weight.

    A call returns whole logits on every rank; :meth:`loss` returns the loss and never holds the logits.

    Args:
        in_features: H.
        out_features: V, not necessarily a multiple of t.
        bias: whether the layer has a bias; it is cut like the weight.
        group, seq_dim: the ranks, and where the sequence of what :meth:`loss` takes is sharded.
        chunks, engine: see :func:`seqpar_kernels.vocab_parallel_linear_cross_entropy`.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> head = sp.VocabParallelHead(16, 10, bias=False)
        >>> x, target = torch.randn(1, 4, 16), torch.tensor([[3, 1, 4, 1]])
        >>> loss = head.loss(x, target)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(head(x)[0], target[0]), atol=1e-5)
        True
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

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
    ):
        super().__init__()
        full = nn.Linear(in_features, out_features, bias, device, dtype)
        self._take(full, Region(group, seq_dim), chunks, engine)

    def _take(self, module: nn.Linear, region: Region, chunks: int | None, engine: str) -> None:
        self.in_features, self.out_features = module.in_features, module.out_features
        self.region, self.chunks, self.engine = region, chunks, engine
        self.sharded = {name: ShardSpec(0, size=self.out_features) for name in ("weight", "bias")}
        self.weight = _vocabulary_part(module.weight, self.out_features, region)
        self.register_parameter("bias", _vocabulary_part(module.bias, self.out_features, region))

    @classmethod
    def from_torch(
        cls,
        module: nn.Linear,
        group: Group = None,
        *,
        seq_dim: int = -2,
        chunks: int | None = None,
        engine: str = "auto",
    ) -> VocabParallelHead:
        """This rank's rows of an nn.Linear.

        Raises:
            ValueError: no nn.Linear, or one whose forward has been overridden.
        """
        check_head(module)
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        new._take(module, Region(group, seq_dim), chunks, engine)
        return new.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """The whole hidden state [..., H] -> whole logits [..., V], both the same on every rank."""
        region = self.region
        if region.group is None:
            return nn.functional.linear(x, self.weight, self.bias)
        local = nn.functional.linear(copy_to_tensor_parallel(x, region.group), self.weight, self.bias)
        most = -(-self.out_features // region.ranks)
        padded = nn.functional.pad(local, (0, most - local.shape[-1]))
        whole = gather_tensor_parallel(padded, region.group, -1, size=most * region.ranks)
        return whole.narrow(-1, 0, self.out_features)

    def loss(self, x: Tensor, target: Tensor, **options: Any) -> Tensor:
        """A shard [..., S/t, ..., H] and classes [..., S, ...] -> cross-entropy, the same on every rank.

        ``options`` are those of :func:`seqpar_kernels.vocab_parallel_linear_cross_entropy`.
        """
        return vocab_parallel_linear_cross_entropy(
            x,
            self.weight,
            target,
            self.bias,
            group=self.region.group,
            seq_dim=self.region.seq_dim,
            vocab_size=self.out_features,
            chunks=self.chunks,
            engine=self.engine,
            **options,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"local weight {tuple(self.weight.shape)}, {self.region!r}"
        )


def check_head(module: nn.Module) -> None:
    """Raise ValueError for a module that :class:`VocabParallelHead` cannot replace."""
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        raise ValueError(f"module: expected torch.nn.Linear with its own forward, got {type(module).__name__}")
