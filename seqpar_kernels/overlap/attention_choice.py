"""Chooses the engine of attention over a sharded sequence, by the bytes that each engine would send.

All engines support all masks. They differ in what ranks send:

- ``ulysses``: q, k, v and out, (2 Hq + 2 Hkv)/t numbers a row and head dimension, whatever the mask.
- ``ring``: the keys and values that other ranks' masks need, while each rank computes with its own.
- ``all_gather``: the same keys and values, but the computation starts when all of them are there.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from ..caches import MOST
from ..sequence_layout import Interval, count
from . import planner
from .attention_plan import KEYS, Sizes, arriving, leaving, remote_rows

_UNDER_WAY = 3  # messages alive at one time with a workspace bound: one computed with, one arriving, one leaving

ENGINES = ("auto", "ulysses", "ring", "all_gather")


class Wire(NamedTuple):
    """Bytes that the busiest rank sends, forward and backward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


class MessageSize(NamedTuple):
    """How a shard of keys and values is cut into messages where the caller does not say."""

    nbytes: int  # of a message, about
    most: int  # messages a shard


def message_size(device_type: str) -> MessageSize:
    """On a CPU small: what a rank computes before its first and behind its last message hides no communication."""
    return MessageSize(4 << 20, 4) if device_type == "cuda" else MessageSize(256 << 10, 8)


class Problem(NamedTuple):
    """The description of a call from which the engine is chosen, the same on all ranks."""

    q_len: int
    k_len: int
    batch: int
    q_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    layout: str
    ranks: int
    left: int | None  # of Sizes
    right: int | None
    bias_row: int = 0  # bytes of a bias and a mask for one query row, where each row has its own
    cut: int = KEYS  # messages are cut at multiples of so many keys, so that the kernels' sums do not depend on where
    message: MessageSize = message_size("cpu")


class Choice(NamedTuple):
    """How a call runs, and why."""

    engine: str  # "ulysses", "ring", "all_gather"; "ring" with several columns is the hybrid
    sizes: Sizes
    save_kv: bool
    wire: Wire
    imbalance: float  # the work of the busiest rank divided by the mean, without regard to documents
    reason: str


@functools.lru_cache(MOST)
def work(sizes: Sizes, row: int) -> float:
    """Pairs of a query and a key of each row of the grid, a head, estimated without regard to documents."""
    mask, total = sizes.mask(), 0.0
    for rows in sizes.rows(sizes.q_len, row):
        step = max(1, rows.size // 256)
        samples = range(rows.start + step // 2, rows.stop, step)
        seen = sum(mask.hull(Interval(at, at + 1), sizes.k_len).size for at in samples)
        total += seen * rows.size / max(1, len(samples))
    return total


def imbalance(sizes: Sizes) -> float:
    """The work of the busiest rank divided by the mean."""
    heads = [len(sizes.heads(column)[0]) for column in range(sizes.ulysses)]
    done = [work(sizes, row) * h for row in range(sizes.ring) for h in heads]
    return max(done) * len(done) / sum(done) if sum(done) else 1.0


def wire(sizes: Sizes, problem: Problem, save_kv: bool) -> Wire:
    """Bytes that a rank sends, without the log-sum-exp of ``return_lse``."""
    p, worst = problem, Wire(0, 0)
    wide = 8 if p.itemsize == 8 else 4
    shared = wide if p.kv_heads < sizes.ulysses else p.itemsize  # of gradients that are sums over ranks
    for rank in range(sizes.ranks):
        row, column = divmod(rank, sizes.ulysses)
        heads, others = sizes.heads(column), [sizes.heads(c) for c in range(sizes.ulysses) if c != column]
        q_rows, k_rows = (count(sizes.held(n, rank)) for n in (p.q_len, p.k_len))
        # A rank sends its rows of other ranks' heads, and later other ranks' rows of its own heads.
        q_there, kv_there = q_rows * sum(len(h[0]) for h in others), k_rows * sum(len(h[1]) for h in others)
        q_back = (count(sizes.rows(p.q_len, row)) - q_rows) * len(heads[0])
        kv_back = (count(sizes.rows(p.k_len, row)) - k_rows) * len(heads[1])
        both, biases = p.head_dim + p.value_dim, q_rows * p.bias_row * (sizes.ulysses - 1)
        forward = p.itemsize * (q_there * p.head_dim + kv_there * both + q_back * p.value_dim)
        backward = q_there * (p.itemsize * p.value_dim + wide) + q_back * p.itemsize * p.head_dim
        backward += kv_back * shared * both
        key_bytes = p.itemsize * len(heads[1]) * both
        sent = sum(piece.keys.size for piece in leaving(sizes, None, row)) * key_bytes
        received = sum(piece.keys.size for piece in arriving(sizes, None, row)) * key_bytes
        backward += received + (0 if save_kv else sent)
        found = Wire(p.batch * (forward + sent) + biases, p.batch * backward + biases)
        worst = max(worst, found, key=lambda w: w.total)
    return worst


def _keeps(sizes: Sizes, problem: Problem) -> bool:
    """Whether the backward keeps keys and values of other ranks: where they are no larger than q, k, v and out."""
    p = problem
    kept = max(remote_rows(sizes, row) for row in range(sizes.ring)) * max(
        len(sizes.heads(c)[1]) for c in range(sizes.ulysses)
    )
    own = -(-p.q_len // p.ranks) * p.q_heads + -(-p.k_len // p.ranks) * p.kv_heads
    return kept <= own


def _chunk_rows(problem: Problem, ring: int, heads: int, chunks: int | None) -> int:
    """Rows of a message: ``chunks`` a shard; None: as :class:`MessageSize` says. Within the bound."""
    p = problem
    row_bytes = p.batch * p.itemsize * max(1, heads) * (p.head_dim + p.value_dim)
    shard = max(1, -(-p.k_len // ring))
    if chunks is None:
        chunks = max(1, min(p.message.most, shard * row_bytes // p.message.nbytes))
    rows = -(-shard // chunks)
    bound = planner.max_workspace_bytes()
    if bound is not None and ring > 1:
        most = bound // (_UNDER_WAY * max(1, row_bytes))
        if most < p.cut:
            raise ValueError(
                f"max_workspace_bytes: expected at least {_UNDER_WAY * p.cut * row_bytes}, room for {_UNDER_WAY} "
                f"messages of {p.cut} keys and values, got {bound}"
            )
        rows = min(rows, most // p.cut * p.cut)
    return math.ceil(rows / p.cut) * p.cut


def choose(
    problem: Problem,
    engine: str = "auto",
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    save_kv: bool | None = None,
    chunks: int | None = None,
) -> Choice:
    """The engine, the grid and the message size of a call.

    Raises:
        ValueError: an engine, degrees or sizes that do not fit together, by name.
    """
    return _choose(problem, engine, ulysses_degree, ring_degree, save_kv, chunks, planner.max_workspace_bytes())


@functools.lru_cache(MOST)
def _choose(
    problem: Problem,
    engine: str,
    ulysses_degree: int | None,
    ring_degree: int | None,
    save_kv: bool | None,
    chunks: int | None,
    bound: int | None,
) -> Choice:
    columns, reason = _columns(problem, engine, ulysses_degree, ring_degree)
    found = [_with_columns(problem, engine, u, save_kv, chunks, reason) for u in columns]
    best = min(found, key=lambda c: (c.wire.total, c.imbalance, c.sizes.ulysses))
    if len(found) > 1:
        others = ", ".join(f"{c.sizes.ulysses} x {c.sizes.ring}: {c.wire.total}" for c in found)
        best = best._replace(reason=f"the fewest bytes of (ulysses x ring: bytes) {others}")
    return best


def _columns(
    problem: Problem, engine: str, ulysses_degree: int | None, ring_degree: int | None
) -> tuple[list[int], str]:
    """The possible numbers of columns, and the reason where there is only one."""
    ranks, heads = problem.ranks, problem.q_heads
    for name, degree in (("ulysses_degree", ulysses_degree), ("ring_degree", ring_degree)):
        if degree is not None and ranks % degree:
            raise ValueError(f"{name}: expected a divisor of the {ranks} ranks of the group, got {degree}")
    if ulysses_degree is not None and ring_degree is not None and ulysses_degree * ring_degree != ranks:
        raise ValueError(
            f"ring_degree: expected {ranks // ulysses_degree}, the {ranks} ranks of the group by "
            f"ulysses_degree={ulysses_degree}, got {ring_degree}"
        )
    if ulysses_degree is None and ring_degree is not None:
        ulysses_degree = ranks // ring_degree
    if engine == "ulysses" and ulysses_degree not in (None, ranks):
        raise ValueError(f"ulysses_degree: expected {ranks} or None with engine='ulysses', got {ulysses_degree}")
    if engine == "ulysses":
        ulysses_degree = ranks
    if ulysses_degree is not None and ulysses_degree > heads > 0:
        name = "engine" if engine == "ulysses" else "ulysses_degree"
        raise ValueError(
            f"{name}: expected no more ranks to share heads than there are query heads, {heads}, got {ulysses_degree}; "
            f"a ring takes any number, and a hybrid ulysses_degree x ring_degree"
        )
    if ulysses_degree is not None:
        return [ulysses_degree], "as asked for"
    if engine != "auto":
        return [1], "as asked for"
    # More columns than key heads would copy keys to several of them.
    most = max(1, problem.kv_heads)
    return [u for u in range(1, ranks + 1) if ranks % u == 0 and u <= most], "no other engine fits"


def _with_columns(
    problem: Problem, engine: str, ulysses: int, save_kv: bool | None, chunks: int | None, reason: str
) -> Choice:
    p, ring = problem, problem.ranks // ulysses
    heads = -(-p.kv_heads // ulysses)
    rows = _chunk_rows(p, ring, heads, chunks)
    sizes = Sizes(p.q_len, p.k_len, p.q_heads, p.kv_heads, p.layout, p.ranks, ulysses, p.left, p.right, rows)
    keeps = _keeps(sizes, p) if save_kv is None else save_kv
    name = engine if engine == "all_gather" else "ulysses" if ring == 1 and ulysses > 1 else "ring"
    return Choice(name, sizes, keeps, wire(sizes, p, keeps), imbalance(sizes), reason)
