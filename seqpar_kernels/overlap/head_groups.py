"""The head groups of attention with its projections: what is projected, exchanged and attended with at one time.

A group is some consecutive key heads and the query heads that read them. The ranks share the heads of each group, so
that every exchange is an all-to-all in which all ranks take part alike.

A sum over heads (the output projection, the gradient of x) is added up block by block in the order of heads. Blocks do
not depend on groups or ranks, so the bits of a sum do not either.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

from torch import Tensor

from ..caches import MOST
from ..layout import split_point
from .attention_choice import Choice, Problem
from .attention_exchange import Part
from .attention_plan import Sizes

_MOST_GROUPS = 4  # more hide little more: what is not hidden is the first exchange and the last
_LEAST_BYTES = 1 << 18  # that a rank sends for one group and direction, on average
_BLOCK_FEATURES = {"cuda": 1024}  # of a block; each reads and writes the sum once
_BLOCK_FEATURES_ELSEWHERE = 128
_IN_FLIGHT = 4  # times what a group sends: two exchanges, each with buffers to send from and to receive into


class HeadGroups(NamedTuple):
    """How the heads of a call are grouped, and why."""

    groups: tuple[range, ...]  # of key heads
    block: int  # key heads of a block
    reason: str

    def blocks(self, group: int) -> list[range]:
        """The blocks of key heads of a group."""
        heads = self.groups[group]
        return [range(at, min(at + self.block, heads.stop)) for at in range(heads.start, heads.stop, self.block)]


def head_groups(choice: Choice, problem: Problem, asked: int | None, device_type: str, bound: int | None) -> HeadGroups:
    """The groups of a call whose ranks all exchange heads; ``asked``: their number, None: by size.

    Raises:
        ValueError: more groups than there can be, or a workspace bound that none of them meets.
    """
    return _grouped(choice, problem, asked, device_type, bound)


@functools.lru_cache(MOST)
def _grouped(choice: Choice, problem: Problem, asked: int | None, device_type: str, bound: int | None) -> HeadGroups:
    heads, ranks = problem.kv_heads, choice.sizes.ulysses
    features = max(1, problem.q_heads // heads * problem.value_dim)
    block = max(1, -(-_BLOCK_FEATURES.get(device_type, _BLOCK_FEATURES_ELSEWHERE) // features))
    unit = math.lcm(block, ranks)  # of key heads: whole blocks, as many heads on every rank
    ends = _ends(heads, unit, ranks)
    most = len(ends) - 1
    sent = max(choice.wire.forward, choice.wire.backward)
    if asked is not None and asked > most:
        raise ValueError(
            f"head_groups: expected at most {most}, groups of {unit} or more of the {heads} key heads for {ranks} "
            f"ranks, got {asked}"
        )
    if ranks == 1:
        return HeadGroups((range(heads),), block, "one rank exchanges nothing")
    count = min(most, _MOST_GROUPS, max(1, sent // _LEAST_BYTES)) if asked is None else asked
    reason = "as asked for" if asked is not None else f"{sent} bytes, groups of {unit} key heads or more"
    if most == 1:
        reason = f"{heads} key heads are one group: {ranks} ranks share {unit} or more at a time"
    if bound is not None and asked is None:
        needed = next((n for n in range(count, most + 1) if _in_flight(n, sent, ends) <= bound), None)
        if needed is None:
            raise ValueError(
                f"max_workspace_bytes: expected at least {_in_flight(most, sent, ends)}, room for two exchanges "
                f"of the smallest group of heads, got {bound}"
            )
        if needed > count:
            count, reason = needed, "within max_workspace_bytes"
    return HeadGroups(_ranges(count, ends), block, reason)


def _ends(heads: int, unit: int, ranks: int) -> list[int]:
    """Where a group may begin or end. What remains of the heads is a group where every rank gets one of them."""
    ends = list(range(0, heads + 1, unit))
    if ends[-1] == heads:
        return ends
    return [*ends, heads] if heads - ends[-1] >= ranks or len(ends) == 1 else [*ends[:-1], heads]


def _ranges(count: int, ends: list[int]) -> tuple[range, ...]:
    cuts = [ends[split_point(len(ends) - 1, count, i)] for i in range(count + 1)]
    return tuple(range(a, b) for a, b in itertools.pairwise(cuts))


def _in_flight(count: int, sent: int, ends: list[int]) -> int:
    """Bytes of message buffers at one time."""
    return _IN_FLIGHT * sent * max(map(len, _ranges(count, ends))) // ends[-1]


class Group(NamedTuple):
    """One group of heads on one rank; ``sizes`` are those of the group alone."""

    sizes: Sizes
    me: int
    queries: range  # of all query heads
    keys: range
    at: slice  # this rank's heads of the group, among its heads of all groups
    keys_at: slice

    @property
    def own_queries(self) -> range:
        own = self.sizes.heads(self.me)[0]
        return range(self.queries.start + own.start, self.queries.start + own.stop)

    def part(self, tensor: Tensor, length: int, which: int) -> Part:
        """A tensor of the group's query heads (0) or key heads (1)."""
        ranks = self.sizes.row_of_ranks(0)
        rows = tuple(self.sizes.held(length, rank) for rank in ranks)
        heads = tuple(self.sizes.heads(rank)[which] for rank in ranks)
        all_heads = (self.sizes.q_heads, self.sizes.kv_heads)[which]
        return Part(rows, heads, self.sizes.rows(length, 0), all_heads, tensor)


def own_groups(sizes: Sizes, me: int, groups: HeadGroups) -> list[Group]:
    """The groups of rank ``me``."""
    found, first, first_key = list[Group](), 0, 0
    each = sizes.q_heads // max(1, sizes.kv_heads)
    for keys in groups.groups:
        queries = range(keys.start * each, keys.stop * each)
        one = sizes._replace(q_heads=len(queries), kv_heads=len(keys))
        heads, key_heads = map(len, one.heads(me))
        at, keys_at = slice(first, first + heads), slice(first_key, first_key + key_heads)
        found.append(Group(one, me, queries, keys, at, keys_at))
        first, first_key = at.stop, keys_at.stop
    return found


def own_heads(sizes: Sizes, me: int, groups: HeadGroups) -> tuple[int, int]:
    """The numbers of query heads and key heads of rank ``me``, of all groups together."""
    last = own_groups(sizes, me, groups)[-1]
    return last.at.stop, last.keys_at.stop
