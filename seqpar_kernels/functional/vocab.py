"""Embedding of a language model whose vocabulary is cut over the ranks; its losses are in :mod:`.vocab_loss`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import check_float, check_same_device, check_sequence, check_tensor
from ..comm.coordination import checked_together
from ..layout import Group, group_rank, group_size, resolve_group, vocabulary_range
from ..ops.registry import group_name


def vocab_parallel_embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    group: Group,
    seq_dim: int = -2,
    vocab_size: int | None = None,
    padding_idx: int | None = None,
    whole_output: bool = False,
) -> Tensor:
    """``embedding(ids, whole weight)`` with the rows of the weight split over ranks; returns a sequence shard.

    Each rank looks up the ids in its rows. The partial results are reduce-scattered into the shard. The backward
    gathers the gradient of the shard and sums it, in fp32 (fp64 for fp64), for this rank's rows of the weight.

    Args:
        ids: [..., S, ...] int64 or int32, the whole sequence, the same on every rank.
        weight: [V/t, H]; rank r holds rows r * ceil(V/t) and on, as ``torch.chunk`` cuts.
        group: ProcessGroup or 1-D DeviceMesh of t ranks; None computes locally.
        seq_dim: the sequence dimension of the result.
        vocab_size: V; needed only where it is not a multiple of t.
        padding_idx: the entry that gets no gradient.
        whole_output: return the whole sequence on every rank, for code that needs all rows. All ranks must compute the
            same with it, so that each has the whole gradient.

    Returns:
        [..., S/t, ..., H], this rank's shard of the sequence; [..., S, ..., H] with ``whole_output``.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit, by name.
        RuntimeError: an index outside the vocabulary; ranks that disagree, a peer that failed.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> ids, weight = torch.tensor([[3, 1, 4, 1]]), torch.randn(10, 16)
        >>> rows = sp.vocab_parallel_embedding(ids, weight, group=None)
        >>> torch.equal(rows, torch.nn.functional.embedding(ids, weight))
        True
    """
    pg = resolve_group(group)
    with checked_together(pg):
        check_indices("ids", ids)
        check_tensor("weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"weight: expected [V/t, H], got shape {tuple(weight.shape)}")
        check_float("weight", weight)
        check_same_device("ids", ids, "weight", weight)
        out = torch.empty(0, dtype=weight.dtype, device="meta").expand(*ids.shape, 0)
        seq_dim = check_sequence("the embedding of ids", out, seq_dim)
        vocab = check_vocabulary("weight", weight.shape[0], vocab_size, pg)
        if padding_idx is not None and not -vocab <= padding_idx < vocab:
            raise ValueError(f"padding_idx: expected an index into the {vocab} entries or None, got {padding_idx!r}")
    padding = -1 if padding_idx is None else padding_idx % vocab
    place = (group_name(pg), vocab, padding, seq_dim, whole_output)
    return ops.vocab_embedding(ids.long(), weight, *place)


def check_indices(name: str, t: Tensor) -> None:
    check_tensor(name, t)
    if t.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name}: expected int64 or int32, got {t.dtype}")


def check_vocabulary(name: str, local: int, vocab_size: int | None, pg: ProcessGroup | None) -> int:
    """The size of the whole vocabulary."""
    ranks, rank = group_size(pg), group_rank(pg)
    vocab = local * ranks if vocab_size is None else vocab_size
    start, stop = vocabulary_range(vocab, ranks, rank)
    if stop - start != local:
        raise ValueError(
            f"{name}: rank {rank} of {ranks} holds {local} entries, but its part of vocab_size={vocab} has "
            f"{stop - start} (entries {start}..{stop}, cut as torch.chunk does)"
        )
    return vocab
