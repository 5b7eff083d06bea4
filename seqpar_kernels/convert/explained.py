"""Explains a raw shape error in the first forward: what this rank holds, and what the plan probably lacks."""

from __future__ import annotations

import re
from typing import Any

from torch import Tensor

from ..layout import SequenceShard
from ..nn.region import shard_behind
from .counts import known, numbers_in
from .culprit import statement
from .marks import Kind, features_of, kind_of, rows_of

_SHAPES = re.compile(
    r"\bshapes?\b|\bsizes?\b|dimension|broadcast|invalid for input|out of (range|bounds)|must match|numel",
    re.IGNORECASE,
)


def is_about_shapes(error: Exception) -> bool:
    """Whether ``error`` is about shapes. Errors of this package name ranks, and are complete."""
    text = str(error)
    return bool(_SHAPES.search(text)) and error.__cause__ is None and "rank" not in text


def rows_text(length: int | None, ranks: int, rank: int) -> str:
    if length is None:
        return f"rank {rank}'s part of the rows"
    shard = SequenceShard(length, ranks, rank)
    return f"rows {shard.start}..{shard.start + shard.size} of {length}"


def explained(
    where: str,
    error: Exception,
    args: Any,
    kwargs: Any,
    tensors: list[Tensor],
    length: int | None,
    ranks: int,
    rank: int,
    seq_dim: int,
    session: Any,
    around: dict[str, tuple[int, bool]],
) -> str:
    """The message of the error that replaces ``error``."""
    held = [_held(t, length, ranks, rank) for t in tensors if kind_of(t) is not None]
    numbers = numbers_in(args, kwargs)
    hints = list(_hints(where, tensors, numbers, length, ranks, rank, seq_dim, session, around))
    if not hints:
        hints = [
            "likely missing in the plan: 'whole_input' for a module that reads the shape of its input before its "
            "colwise layers, or an attribute that counts heads or features in `divided`"
        ]
    text = str(error).splitlines()[0]
    return f"{where}: {statement()} failed: {text}. This rank holds {'; '.join(held)}. Probably: {'; '.join(hints)}"


def _held(t: Tensor, length: int | None, ranks: int, rank: int) -> str:
    shape, features = list(t.shape), features_of(t)
    if kind_of(t) is Kind.SHARD:
        if shard_behind(t) is not t:
            return f"{shape}: the shape of the whole sequence ('whole_input'), of which it has a shard"
        return f"{shape}: {rows_text(length, ranks, rank)}"
    if features is not None:
        return f"{shape}: all rows, {features.size} of the {features.whole} features of {features.layer}"
    return f"{shape}: all rows, this rank's heads or features (1/{ranks} of them)"


def _hints(
    where: str,
    tensors: list[Tensor],
    numbers: list[int],
    length: int | None,
    ranks: int,
    rank: int,
    seq_dim: int,
    session: Any,
    around: dict[str, tuple[int, bool]],
) -> Any:
    parts = [t for t in tensors if kind_of(t) is Kind.PARTS]
    unmarked = [t for t in tensors if kind_of(t) is None]
    shards = [t for t in tensors if kind_of(t) is Kind.SHARD and shard_behind(t) is t]
    own = None if length is None else SequenceShard(length, ranks, rank).size
    if parts:
        plain = [number for number in numbers if known(number, session) is None]
        short = own is not None and own != length and (own in plain or any(own in t.shape for t in unmarked))
        short = short or any((n := known(number, session)) is not None and n.rows for number in numbers)
        if short:
            yield (
                f"the number of rows was read from a shard; {where!r} (or the module that reads it) needs the style "
                "'whole_input'"
            )
        module, attribute = next(iter(_undivided(parts, numbers, session, around)), ("", ""))
        product = 1
        for number in numbers:
            product *= abs(int(number))
        if attribute and not (short and -1 in numbers):
            yield (
                "an attribute counts the heads or features of all ranks: "
                f"ParallelPlan(..., divided={{{module or where!r}: ({attribute!r},)}})"
            )
        elif -1 not in numbers and any(product == t.numel() * ranks for t in parts):
            yield (
                "the sizes written are those of all ranks' heads or features together: write -1 for the one that is "
                "cut, or take it from an attribute that `divided` names"
            )
    for shard in shards:
        rows = rows_of(shard, seq_dim).count
        for other in unmarked:
            if length is not None and length in other.shape and rows != length:
                yield (
                    f"a tensor {list(other.shape)} with all {length} rows meets a shard with {rows}: combine them "
                    "before 'scatter_input', cut it by `scattered` (ParallelPlan) where a module takes it as "
                    "argument, or give the module the style 'replicated'"
                )
                return


def _undivided(parts: list[Tensor], numbers: list[int], session: Any, around: dict[str, tuple[int, bool]]) -> Any:
    """Yield (module, attribute) of numbers that count the heads or features of all ranks; "" is the present module."""
    wholes = {f.whole for t in parts if (f := features_of(t)) is not None}
    for number in numbers:
        noted = known(number, session)
        if noted is not None and noted.origin and noted.features == 0 and not noted.rows:
            if int(number) > 1:
                module, _, attribute = noted.origin.rpartition(".")
                yield module, attribute
        elif noted is None and int(number) > 1:
            for attribute, (value, cut) in around.items():
                if value == number and not cut and (not wholes or any(w % value == 0 for w in wholes)):
                    yield "", attribute
