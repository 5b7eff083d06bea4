"""Which part of a whole parameter this rank holds, and where it is in the whole."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from ..nn.sharding import ShardSpec


class Piece(NamedTuple):
    """``length`` entries along a dimension: where they lie in this rank's part, and where in the whole tensor."""

    local: int
    whole: int
    length: int


class Cut(NamedTuple):
    """The part of a whole tensor of ``shape`` on one rank of ``ranks``. With ``spec`` None every rank has all of it."""

    spec: ShardSpec | None
    shape: torch.Size
    ranks: int
    rank: int

    @staticmethod
    def of(part: Tensor, spec: ShardSpec | None, ranks: int, rank: int) -> Cut:
        shape = list(part.shape)
        if spec is not None:
            shape[spec.dim] = shape[spec.dim] * ranks if spec.size is None else spec.size
        return Cut(spec, torch.Size(shape), ranks, rank)

    def placement(self) -> Placement:
        if self.spec is None:
            return Replicate()
        sections = len(self.spec.sizes(self.shape[self.spec.dim]))
        if sections > 1 and not self.unequal:
            return _StridedShard(self.spec.dim, split_factor=sections)
        return Shard(self.spec.dim)

    @property
    def unequal(self) -> bool:
        """Whether no placement of torch's describes the sections, or parts as even as can be. ``Shard`` stands in."""
        if self.spec is None:
            return False
        return self.spec.balanced or (isinstance(self.spec.sections, tuple) and len(set(self.spec.sections)) > 1)

    @property
    def even(self) -> bool:
        """Whether every rank holds one piece, of the same size."""
        return self.spec is None or (
            not self.unequal and self.spec.sections == 1 and self.shape[self.spec.dim] % self.ranks == 0
        )

    @property
    def empty_somewhere(self) -> bool:
        """Whether some rank holds nothing, as of a vocabulary that the first ranks use up."""
        if self.spec is None or self.spec.size is None:
            return False
        start, stop = self.spec.range(self.ranks, self.ranks - 1)
        return start == stop

    def pieces(self) -> list[Piece]:
        """This rank's pieces along ``spec.dim``."""
        assert self.spec is not None
        size = self.shape[self.spec.dim]
        if self.spec.size is not None:
            start, stop = self.spec.range(self.ranks, self.rank)
            return [Piece(0, start, stop - start)]
        out, local, whole = [], 0, 0
        for section in self.spec.sizes(size):
            part = section // self.ranks
            out.append(Piece(local, whole + self.rank * part, part))
            local, whole = local + part, whole + section
        return out

    def part_shape(self) -> torch.Size:
        """The shape of this rank's part."""
        shape = list(self.shape)
        if self.spec is not None:
            shape[self.spec.dim] = sum(piece.length for piece in self.pieces())
        return torch.Size(shape)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of ``whole``."""
        assert self.spec is not None
        dim = self.spec.dim
        return torch.cat([whole.narrow(dim, p.whole, p.length) for p in self.pieces()], dim)

    def chunks(self, part: Tensor, first_row: int = 0) -> list[tuple[ChunkStorageMetadata, Tensor]]:
        """Rectangles of the whole tensor, and the views of ``part`` that hold them.

        ``part`` may be the rows from ``first_row`` on of this rank's part: FSDP leaves these.
        """
        dim = 0 if self.spec is None else self.spec.dim
        pieces = [Piece(0, 0, self.shape[0])] if self.spec is None and self.shape else []
        pieces = self.pieces() if self.spec is not None else pieces
        if not pieces:  # a scalar
            return [(ChunkStorageMetadata(torch.Size(), torch.Size()), part)]
        found = []
        for piece in pieces:
            offset = [0] * part.dim()
            if dim == 0:
                start = max(piece.local, first_row)
                stop = min(piece.local + piece.length, first_row + part.shape[0])
                offset[0] = piece.whole + start - piece.local
                if start >= stop:
                    continue
                view = part.narrow(0, start - first_row, stop - start)
            else:
                offset[0], offset[dim] = first_row, piece.whole
                view = part.narrow(dim, piece.local, piece.length)
            if view.numel():
                found.append((ChunkStorageMetadata(torch.Size(offset), view.shape), view))
        return found
