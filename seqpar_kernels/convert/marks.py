"""The marks of the first forward's check on tensors: what a tensor is, and where its rows or features are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .foreign import see

MARK = "_seqpar_shard"
#: Called with every tensor that is marked, by the checks that are active.
collectors: list[Callable[[Tensor], None]] = []
_ROWS = "_seqpar_rows"
_FEATURES = "_seqpar_features"
_HEADS = "_seqpar_heads"
_FINITE = "_seqpar_finite"


class Kind(Enum):
    """What a marked tensor is. A tensor without a mark is whole, and the same on every rank."""

    SHARD = "a sequence shard"
    PARTS = "a tensor-parallel tensor"  # this rank's heads or features, or a whole tensor that is used for them only
    COPIED = "a whole tensor whose gradient is summed over the ranks"  # may meet tensors of both other kinds


#: style -> (kind of the input, kind of the output). None: any but a shard.
EXPECTED: dict[str, tuple[Kind | None, Kind]] = {
    "colwise": (Kind.SHARD, Kind.PARTS),
    "shared_heads": (Kind.SHARD, Kind.PARTS),
    "gathered_colwise": (Kind.PARTS, Kind.PARTS),
    "rowwise": (None, Kind.SHARD),
    "norm": (Kind.SHARD, Kind.SHARD),
    "split_norm": (Kind.PARTS, Kind.PARTS),
    "dropout": (Kind.SHARD, Kind.SHARD),
    "sequence": (Kind.SHARD, Kind.SHARD),
    "tensor_parallel": (None, Kind.PARTS),
    "replicated": (None, Kind.SHARD),  # the check sees the input behind the gather
    "conditioning": (None, Kind.COPIED),
    "experts": (Kind.SHARD, Kind.SHARD),
}

#: Mark of tensors computed from parameters whose gradients the conversion sums over the ranks.
OWNED = object()


@dataclass(frozen=True)
class Rows:
    """Where the rows of a sequence shard are: element i of the flattened tensor is of row ``i // inner % count``."""

    count: int
    inner: int


@dataclass(frozen=True)
class Features:
    """Where a tensor-parallel tensor holds features that colwise has cut, not yet viewed as heads.

    ``sections``: this rank's sizes of the packed sections along ``dim``. ``whole``: features on all ranks.
    """

    dim: int
    sections: tuple[int, ...]
    whole: int
    layer: str

    @property
    def size(self) -> int:
        return sum(self.sections)


@dataclass(frozen=True)
class Heads:
    """Where a tensor-parallel tensor holds this rank's heads, after it was viewed as heads.

    ``rows``: as rows of a shard. ``whole``: heads on all ranks. ``group``: how many neighbours are copies
    (``repeat_kv``).
    """

    rows: Rows
    whole: int
    layer: str
    group: int = 1


@dataclass(frozen=True)
class Mixed:
    """A tensor in which rows of a shard, or one rank's heads or features, were mixed or picked out."""

    why: str  # ends a sentence, and quotes the statement
    remedy: str = ""  # empty: the remedy for rows


@dataclass(frozen=True)
class Piece(Mixed):
    """Head ``index`` of this rank's ``count``. All of them put together are heads again."""

    index: int = 0
    count: int = 1
    whole: int = 1
    layer: str = ""


@dataclass(frozen=True)
class Local:
    """A tensor made from a count of this rank."""

    statement: str
    of: str = "rows"  # "rows": a shard's length, "heads": a size that `divided` names, "number": computed with a count
    numbered: bool = False  # whether its entries enumerate, as those of arange do


def mark(value: Any, kind: Any) -> None:
    """Mark every tensor in ``value`` as ``kind``.

    ``kind`` is a Kind, a Mixed, a Local, OWNED, the name of a parameter that it was computed from, or None: whole.
    """
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            setattr(leaf, MARK, kind)
            vars(leaf).pop(_ROWS, None)
            vars(leaf).pop(_FEATURES, None)
            vars(leaf).pop(_HEADS, None)
            if not isinstance(kind, str):
                see(leaf)
                if collectors and kind is not None:
                    collectors[-1](leaf)


def mark_of(value: Any) -> Any:
    return getattr(value, MARK, None)


def kind_of(value: Any) -> Kind | None:
    found = getattr(value, MARK, None)
    if isinstance(found, Kind):
        return found
    return Kind.COPIED if getattr(value, "_seqpar_copied", False) else None


def is_shard(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and kind_of(leaf) is Kind.SHARD for leaf in tree_leaves(value))


def note_finite(value: Tensor) -> None:
    """Note that ``value`` tells whether numbers are finite. A forward may read that: an overflow stops every rank."""
    setattr(value, _FINITE, True)


def is_finite(value: Tensor) -> bool:
    """Whether :func:`note_finite` was called with ``value``."""
    return getattr(value, _FINITE, False) is True


def place_rows(shard: Tensor, rows: Rows) -> None:
    setattr(shard, _ROWS, rows)


def rows_of(shard: Tensor, seq_dim: int) -> Rows:
    """The rows noted by :func:`place_rows`, else those of a shard that enters a module."""
    found = getattr(shard, _ROWS, None)
    return found if isinstance(found, Rows) else usual_rows(shard, seq_dim)


def usual_rows(shard: Tensor, seq_dim: int) -> Rows:
    """The rows of a shard with the sequence at ``seq_dim``."""
    dim = min(seq_dim % shard.dim() if -shard.dim() <= seq_dim < shard.dim() else 0, shard.dim())
    inner = 1
    for size in shard.shape[dim + 1 :]:
        inner *= int(size)
    return Rows(int(shard.shape[dim]) if shard.dim() else 1, inner)


def place_features(tensor: Tensor, features: Features) -> None:
    setattr(tensor, _FEATURES, features)


def features_of(tensor: Any) -> Features | None:
    found = getattr(tensor, _FEATURES, None)
    return found if isinstance(found, Features) else None


def place_heads(tensor: Tensor, heads: Heads) -> None:
    setattr(tensor, _HEADS, heads)


def heads_of(tensor: Any) -> Heads | None:
    found = getattr(tensor, _HEADS, None)
    return found if isinstance(found, Heads) else None
