"""The mappings for any dimension and dtype: integers are communicated without gradient, parts may have any sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..checks import check_tensor
from ..comm.coordination import checked_together, coordination_of
from ..layout import Group, SequenceShard, group_rank, group_size, normalize_dim, resolve_group, shard_of
from ..ops.registry import group_name
from .mappings import (
    copy_to_tensor_parallel,
    gather_dimension,
    reduce_from_tensor_parallel,
    reduce_scatter_dimension,
    split_dimension,
)


def _is_integer(x: object) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point() and not x.is_complex()


def check_divides_by(name: str, x: Tensor, dim: int, parts: int) -> None:
    """Raise where dimension ``dim`` of ``x`` is no multiple of ``parts``."""
    check_tensor(name, x)
    dim = normalize_dim("dim", dim, x.dim())
    if x.shape[dim] % parts:
        raise ValueError(
            f"{name}: expected dimension {dim} to be a multiple of the {parts} ranks of the group, got {tuple(x.shape)}"
        )


def copy_to(x: Tensor, group: Group) -> Tensor:
    """Identity; the backward sums over ranks."""
    if _is_integer(x):
        resolve_group(group)
        check_tensor("x", x)
        return x
    return copy_to_tensor_parallel(x, group)


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks; the backward is the identity."""
    return _integer_sum(x, group) if _is_integer(x) else reduce_from_tensor_parallel(x, group)


def split(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part; the backward gathers."""
    if not _is_integer(x):
        return split_dimension(x, group, dim)
    pg, dim = _checked(x, group, dim)
    return x if pg is None else _own_part(x, pg, dim)


def gather(x: Tensor, group: Group, dim: int, *, partial_grad: bool, size: int | None = None) -> Tensor:
    """The parts of all ranks; the backward sums and scatters with ``partial_grad``, else splits."""
    if not _is_integer(x):
        return gather_dimension(x, group, dim, size, partial_grad)
    pg, dim = _checked(x, group, dim)
    if pg is None:
        return x
    with checked_together(pg):
        shard = shard_of("x", x.shape[dim], pg, size)
    return _gather_bytes(x, pg, dim, shard.length)


def reduce_scatter(x: Tensor, group: Group, dim: int) -> Tensor:
    """This rank's part of the sum over ranks; the backward gathers."""
    if not _is_integer(x):
        return reduce_scatter_dimension(x, group, dim)
    pg, dim = _checked(x, group, dim)
    return x if pg is None else _own_part(_integer_sum(x, pg), pg, dim)


def gather_sizes(x: Tensor, group: Group, dim: int, sizes: Sequence[int], *, partial_grad: bool) -> Tensor:
    """:func:`gather` of parts with ``sizes``, which are sent padded to the largest."""
    pg, dim = _checked(x, group, dim)
    with checked_together(pg):
        sizes = _sizes("output_split_sizes", sizes, group_size(pg))
        own = sizes[group_rank(pg)]
        if x.shape[dim] != own:
            raise ValueError(
                f"output_split_sizes: expected {x.shape[dim]} for this rank, the size of dimension {dim} of the input "
                f"{tuple(x.shape)}, got {own} in {sizes}"
            )
    if pg is None:
        return x
    _agree("output_split_sizes", sizes, pg)
    most = max(sizes)
    whole = gather(_padded(x, dim, most), pg, dim, partial_grad=partial_grad)
    return torch.cat([part.narrow(dim, 0, n) for part, n in zip(whole.split(most, dim), sizes, strict=True)], dim)


def reduce_scatter_sizes(x: Tensor, group: Group, dim: int, sizes: Sequence[int]) -> Tensor:
    """:func:`reduce_scatter` into parts with ``sizes``, which are sent padded to the largest."""
    pg, dim = _checked(x, group, dim)
    with checked_together(pg):
        sizes = _sizes("input_split_sizes", sizes, group_size(pg))
        if sum(sizes) != x.shape[dim]:
            raise ValueError(
                f"input_split_sizes: expected a sum of {x.shape[dim]}, the size of dimension {dim} of the input "
                f"{tuple(x.shape)}, got {sizes}"
            )
    if pg is None:
        return x
    _agree("input_split_sizes", sizes, pg)
    most = max(sizes)
    padded = torch.cat([_padded(part, dim, most) for part in x.split(sizes, dim)], dim)
    return reduce_scatter(padded, pg, dim).narrow(dim, 0, sizes[pg.rank()])


def all_to_all(
    x: Tensor, group: Group, output_sizes: Sequence[int] | None, input_sizes: Sequence[int] | None
) -> Tensor:
    """Send rows of dimension 0 to every rank; the backward sends gradients back. None: equal numbers of rows."""
    pg, _ = _checked(x, group, 0)
    ranks = group_size(pg)
    with checked_together(pg):
        if not _is_integer(x) and not x.is_floating_point():
            raise ValueError(f"input_: expected a floating-point or integer tensor, got {x.dtype}")
        given = output_sizes is not None or input_sizes is not None
        if output_sizes is None or input_sizes is None:
            check_divides_by("input_", x, 0, ranks)
        equal = [x.shape[0] // ranks] * ranks
        outputs = equal if output_sizes is None else _sizes("output_split_sizes", output_sizes, ranks)
        inputs = equal if input_sizes is None else _sizes("input_split_sizes", input_sizes, ranks)
        if sum(inputs) != x.shape[0]:
            raise ValueError(f"input_split_sizes: expected a sum of {x.shape[0]}, the rows of the input, got {inputs}")
    if pg is None:
        if outputs != inputs:
            raise ValueError(f"output_split_sizes: expected {inputs} on one rank, got {outputs}")
        return x
    if not torch.compiler.is_compiling():
        rows = "rows of sizes given" if given else f"{x.shape[0]} rows"
        coordination_of(pg).require(f"all_to_all of {rows}, each {x.dtype} {tuple(x.shape[1:])}")
        if given:
            _check_counts(outputs, inputs, pg)
    if x.dtype == torch.bool:
        return ops.all_to_all(x.view(torch.uint8), outputs, inputs, group_name(pg)).view(torch.bool)
    return ops.all_to_all(x, outputs, inputs, group_name(pg))


def _check_counts(outputs: list[int], inputs: list[int], pg: ProcessGroup) -> None:
    """Raise, on all ranks, where a rank sends another number of rows than the receiver expects."""
    own = torch.tensor([[outputs, inputs]])
    table = _gather_bytes(own, pg, 0, pg.size())  # [receiver or sender, (outputs, inputs), ranks]
    wrong = (table[:, 0] != table[:, 1].t()).nonzero()
    if len(wrong):
        receiver, sender = wrong[0].tolist()
        raise RuntimeError(
            f"output_split_sizes: rank {receiver} expects {table[receiver, 0, sender]} rows from rank {sender}, whose "
            f"input_split_sizes send it {table[sender, 1, receiver]}; nothing was sent"
        )


def _checked(x: Tensor, group: Group, dim: int) -> tuple[ProcessGroup | None, int]:
    pg = resolve_group(group)
    with checked_together(pg):
        check_tensor("x", x)
        return pg, normalize_dim("dim", dim, x.dim())


def _sizes(name: str, sizes: Sequence[int], ranks: int) -> list[int]:
    found = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
    if len(found) != ranks or not all(type(n) is int and n >= 0 for n in found):
        raise ValueError(f"{name}: expected {ranks} sizes, one for each rank of the group, got {found}")
    return found


def _agree(name: str, sizes: Sequence[int], pg: ProcessGroup) -> None:
    """Raise where ``sizes`` differ between ranks; each rank has checked its own size."""
    if not torch.compiler.is_compiling():
        coordination_of(pg).require(f"{name}={sizes}")


def _padded(x: Tensor, dim: int, size: int) -> Tensor:
    if x.shape[dim] == size:
        return x
    shape = list(x.shape)
    shape[dim] = size - x.shape[dim]
    return torch.cat([x, x.new_zeros(shape)], dim)


def _own_part(x: Tensor, pg: ProcessGroup, dim: int) -> Tensor:
    shard = SequenceShard(x.shape[dim], pg.size(), pg.rank())
    return x.narrow(dim, shard.start, shard.size).clone(memory_format=torch.contiguous_format)


def _gather_bytes(x: Tensor, pg: ProcessGroup, dim: int, length: int) -> Tensor:
    """All-gather of a tensor of any dtype, sent as bytes."""
    raw = x.contiguous().unsqueeze(-1).view(torch.uint8)
    found = ops.gather(raw, dim, length, group_name(pg), False)
    return found.view(x.dtype).squeeze(-1)


def _integer_sum(x: Tensor, group: Group) -> Tensor:
    pg = resolve_group(group)
    with checked_together(pg):
        check_tensor("x", x)
        if x.dtype == torch.bool:
            raise ValueError("x: expected numbers to sum over ranks, got torch.bool; convert it, e.g. x.int()")
    if pg is None:
        return x
    return _gather_bytes(x.unsqueeze(0), pg, 0, pg.size()).sum(0, dtype=x.dtype)
