"""The ranks that take part in :func:`seqpar_kernels.verify`, and their exchanges."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_flatten

from ..comm.coordination import coordination_of
from .conversion import Conversion
from .verify_offer import raised_in

T = TypeVar("T")
_CHUNK = 1 << 20
_HEARD = "stopped before its next op: "


class Ranks:
    """The tensor-parallel group, and the data-parallel groups across it where fully_shard has been applied."""

    def __init__(self, model: nn.Module, conversion: Conversion):
        self.group: ProcessGroup | None = conversion.region.group
        self.number = dist.get_rank() if self.group is not None else 0
        listed = next(model.parameters(), None)
        self.rows: ProcessGroup | None = None
        if isinstance(listed, DTensor) and listed.device_mesh.ndim > 1:
            self.rows = listed.device_mesh.get_group(0)

    @property
    def first(self) -> bool:
        """Whether this is the first rank of its tensor-parallel group: the one that runs the reference."""
        return self.group is None or self.group.rank() == 0

    def neighbours(self, value: T) -> list[tuple[int, T]]:
        """(global rank, its value) for the ranks of the tensor-parallel group."""
        return _gathered([(self.number, value)], self.group)

    def everyone(self, value: T) -> list[tuple[int, T]]:
        """(global rank, its value) for all ranks."""
        return _gathered(self.neighbours(value), self.rows)

    def from_first(self, value: T | None) -> T:
        """The value of the first rank of the tensor-parallel group."""
        return cast("T", self.neighbours(value)[0][1])

    def sent(self, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The first rank's tensor on every rank of the tensor-parallel group."""
        out = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.to(device).contiguous()
        if self.group is not None:
            dist.broadcast(out, group=self.group, group_src=0)
        return out

    def together(self, what: str, attempt: Callable[[], T], alone: bool = False) -> T:
        """Call ``attempt`` on every rank. If it fails on one rank, all ranks raise.

        With ``alone`` first ranks call it, and the others get None.

        Raises:
            ValueError, RuntimeError: with ``what`` and the error of each rank that has one.
        """
        found, error = None, None
        try:
            if self.first or not alone:
                found = attempt()
        except Exception as caught:
            error = caught
            if self.group is not None:  # wakes peers that wait for this rank inside an op
                coordination_of(self.group).stop(caught)
        said = None if error is None else (type(error).__name__, str(error))
        told = self.everyone(said)
        failed = [(rank, said) for rank, said in told if said is not None]
        if not failed:
            return cast("T", found)
        self._go_on()
        kind = ValueError if {name for _, (name, _) in failed} == {"ValueError"} else RuntimeError
        raised = kind(what + _told(failed, named=not alone and len(failed) < len(told)))
        if error is None or raised_in(error, "seqpar_kernels."):  # the message is complete without a traceback
            raise raised from None
        raise raised from error

    def _go_on(self) -> None:
        """Let the next op begin anew on all ranks after a failure."""
        if self.group is not None:
            coordination = coordination_of(self.group)
            most = max(steps for _, steps in self.neighbours(coordination.steps))
            coordination.go_on(most, "a rank failed in verify")


def _gathered(values: list[tuple[int, T]], group: ProcessGroup | None) -> list[tuple[int, T]]:
    if group is None:
        return values
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, values, group=group)
    return [pair for part in found for pair in part]


def _told(failed: list[tuple[int, tuple[str, str]]], named: bool) -> str:
    """The messages of the failed ranks, each once; with ``named``, with the numbers of the ranks."""
    texts: dict[str, list[str]] = {}
    for rank, (name, text) in failed:
        said = text if name in ("ValueError", "RuntimeError") else f"{name}: {text}"
        texts.setdefault(said, []).append(str(rank))
    # Leave out messages that repeat what a failed rank told the others.
    own = {text: ranks for text, ranks in texts.items() if _HEARD not in text} or texts
    if len(own) == 1 and not named and len(texts) == 1:
        return next(iter(own))
    return "; ".join(f"rank {', '.join(ranks)}: {text}" for text, ranks in own.items())


def checksum(tensor: Tensor) -> int:
    """A 64-bit checksum of the bits of ``tensor``."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.is_complex() or flat.dtype == torch.bool:
        flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat.to(torch.uint8)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    total = flat.numel()
    for chunk in flat.view(whole).split(_CHUNK):
        place = torch.arange(1, 2 * chunk.numel(), 2, device=chunk.device)
        total = (total * 6364136223846793005 + int((chunk.long() * place).sum())) & (2**64 - 1)
    return total


def fingerprint(batch: Any) -> list[str]:
    """A text for each leaf of ``batch``, equal on ranks that hold the same batch."""
    leaves, form = tree_flatten(_plain(batch))
    return [str(form), *(_leaf(leaf) for leaf in leaves)]


def _plain(value: Any) -> Any:
    """Turn other mappings (BatchEncoding, say) into dictionaries."""
    if hasattr(value, "items"):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _leaf(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {leaf.dtype} {checksum(leaf):x}"
    return repr(leaf) if isinstance(leaf, (str, int, float, bool, type(None))) else type(leaf).__name__


def differing(names: list[str], found: list[tuple[int, list[Any]]]) -> Iterator[tuple[str, int]]:
    """(name, rank) of a tensor that differs from the first rank's; None if none does."""
    for index, name in enumerate(names):
        for rank, values in found[1:]:
            if values[index] != found[0][1][index]:
                yield name, rank
                break
