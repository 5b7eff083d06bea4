"""Tries whether a function treats this rank's heads one by one, as :mod:`.row_mixing` tries rows of a shard.

Heads differ from rows in three ways. Tensors hold several numbers of heads (queries and keys), neighbours may be copies
(``repeat_kv``), and a whole tensor may have an entry for each head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .marks import Rows
from .row_mixing import Trial, Undecided, alike, candidates, generator_of, selected, selections, values

_MOST = 8  # most ways that are tried to take entries of heads from whole tensors


class Held(NamedTuple):
    """A tensor that holds heads, where it holds them, and how many neighbours are copies."""

    tensor: Tensor
    rows: Rows
    group: int = 1


class Found(NamedTuple):
    """What a result is. ``rows``: where its heads are. ``picked``: it is this head alone. ``constant``: it has none."""

    rows: Rows | None = None
    group: int = 1
    picked: int | None = None
    constant: bool = False


def tried(
    call: Callable[..., Any],
    args: Any,
    kwargs: Any,
    held: list[Held],
    others: list[Tensor],
    name: str,
    number: Callable[[Any], Any],
) -> list[Found]:
    """What each tensor is that ``call`` returns.

    ``others`` are arguments that may have an entry for each head. ``number`` doubles an argument that counts heads, for
    a trial with twice as many.

    Raises:
        Undecided: the function fails on other values than its own, or the numbers of heads do not fit.
    """
    counts = sorted({h.rows.count for h in held} | {h.rows.count // h.group for h in held})
    if not counts[0] or any(b % a for a, b in pairwise(counts)):
        raise Undecided(f"heads of numbers {counts}")
    device = held[0].tensor.device
    generator, trial = generator_of(device), Trial(call, args, kwargs, name)
    with torch.no_grad():
        try:
            base_in = {id(h.tensor): _stand_in(h, generator) for h in held}
            base = trial.run({key: value.clone() for key, value in base_in.items()})
            found: list[Found | None] = [None] * len(base)
            for level in dict.fromkeys((counts[-1], counts[0])):  # the finest first
                coarse = [h if level == counts[-1] else Held(h.tensor, _coarser(h.rows, level)) for h in held]
                for moved in _moved(others, level):
                    new = _equivariant(trial, coarse, base_in, base, moved)
                    found = [old or now for old, now in zip(found, new, strict=True)]
                    if all(found):
                        break
                if all(found):
                    break
            if counts[-1] == 1 and any(found):
                more_in = {id(h.tensor): values(h.tensor, generator, 1) for h in held}
                found = _of_two(trial, held, (base_in, more_in), base, found, number)
            elif not all(found):
                constant = trial.constant(base, [h.tensor for h in held], generator)
                found = [f or (Found(constant=True) if c else None) for f, c in zip(found, constant, strict=True)]
        except Undecided:
            raise
        except Exception as error:
            raise Undecided(f"{type(error).__name__}: {error}") from error
    return [f or _picked(out, held, base_in) for f, out in zip(found, base, strict=True)]


def _equivariant(
    trial: Trial, held: list[Held], base_in: dict[int, Tensor], base: list[Tensor], moved: list[tuple[Tensor, Rows]]
) -> list[Found | None]:
    """Whether heads in another order, some of them repeated, give the results in that order."""
    counts = sorted({h.rows.count for h in held} | {h.rows.count // h.group for h in held})
    count = counts[-1]
    given = [h.rows.inner for h in held if h.rows.count == count]
    found = [list(candidates(out, count, given, None)) for out in base]
    for index in _indices(counts, held[0].tensor.device):
        stand_ins = {id(h.tensor): selected(base_in[id(h.tensor)], h.rows, index[h.rows.count]) for h in held}
        try:
            now = trial.run(
                stand_ins | {id(t): selected(t.detach(), rows, index[rows.count]) for t, rows in moved if t.dim()}
            )
        except Exception:
            if not moved:
                raise
            return [None] * len(base)
        found = [
            [rows for rows in kept if alike(selected(out, rows, index[count]), other)]
            for kept, out, other in zip(found, base, now, strict=True)
        ]
    return [_grouped(out, kept[0]) if kept else None for kept, out in zip(found, base, strict=True)]


def _indices(counts: list[int], device: torch.device) -> Iterator[dict[int, Tensor]]:
    """For every number of heads, indices to pick; copies of one head stay together."""
    variants = 2
    for variant in range(variants):
        index, size = torch.zeros(1, dtype=torch.long, device=device), 1
        of: dict[int, Tensor] = {1: index}
        for count in counts:
            each = count // size
            picks = list(selections(each, device)) or [torch.arange(each, device=device)]
            index = (index[:, None] * each + picks[variant % len(picks)]).flatten()
            size, of[count] = count, index
        yield of


def _moved(others: list[Tensor], count: int) -> Iterator[list[tuple[Tensor, Rows]]]:
    """Entries to take from tensors that have some for each head: first none, then along dimensions that fit."""
    yield []
    if count < 2:
        return
    options = []
    for t in others:
        fits: list[tuple[Tensor, Rows] | None] = [None]
        for dim in range(t.dim()):
            if t.shape[dim] == count:
                fits.append((t, Rows(count, _product(t.shape[dim + 1 :]))))
        options.append(fits)
    for tries, chosen in enumerate(product(*options)):
        if tries >= _MOST:
            return
        picked = [choice for choice in chosen if choice is not None]
        if picked:
            yield picked


def _of_two(
    trial: Trial,
    held: list[Held],
    given: tuple[dict[int, Tensor], dict[int, Tensor]],
    base: list[Tensor],
    found: list[Found | None],
    number: Callable[[Any], Any],
) -> list[Found | None]:
    """The trial of a single head, which has no other order: two in one call must give what each gives alone.

    Raises:
        Undecided: the call does not run with two.
    """
    try:
        more = trial.run({key: value.clone() for key, value in given[1].items()})
        now = trial.run(
            {id(h.tensor): _both(given[0][id(h.tensor)], given[1][id(h.tensor)], h.rows) for h in held}, number
        )
    except Exception as error:
        raise Undecided(f"{type(error).__name__}: {error}") from error
    if not len(now) == len(base) == len(more):
        return [None] * len(base)
    result: list[Found | None] = []
    for f, one, two, other in zip(found, base, more, now, strict=True):
        fits = [
            rows
            for rows in candidates(one, 1, [h.rows.inner for h in held], None)
            if other.numel() == one.numel() + two.numel()
            and alike(other.reshape(-1, 2, rows.inner), torch.stack([t.reshape(-1, rows.inner) for t in (one, two)], 1))
        ]
        fixed = one.shape == other.shape and alike(one, two) and alike(one, other)
        result.append(Found(fits[0]) if fits and f is not None else Found(constant=True) if fixed else None)
    return result


def _both(t: Tensor, other: Tensor, rows: Rows) -> Tensor:
    """The one head of each; the dimension that holds it grows."""
    inner = [_product(t.shape[dim + 1 :]) for dim in range(t.dim())]
    dims = [d for d in range(t.dim()) if t.shape[d] == 1 and inner[d] == rows.inner]
    dims = dims or [d for d in range(t.dim()) if t.shape[d] * inner[d] == rows.inner and t.shape[d] > 1]
    if len(dims) != 1:
        raise Undecided("which dimension holds the head is open")
    shape = list(t.shape)
    shape[dims[0]] *= 2
    return torch.stack([t.reshape(-1, rows.inner), other.reshape(-1, rows.inner)], 1).reshape(shape)


def _picked(out: Tensor, held: list[Held], base_in: dict[int, Tensor]) -> Found:
    """The head that ``out`` consists of, if it is one head alone."""
    for h in held if len(held) == 1 else ():
        if out.numel() * h.rows.count == h.tensor.numel() and h.group == 1:
            heads = base_in[id(h.tensor)].reshape(-1, h.rows.count, h.rows.inner)
            for index in range(h.rows.count):
                if torch.equal(heads[:, index].flatten(), out.flatten()):
                    return Found(picked=index)
    return Found()


def _grouped(out: Tensor, rows: Rows) -> Found:
    """Where copied heads are: in the dimension of the heads, or in one behind it."""
    for dim in range(out.dim()):
        inner, size = _product(out.shape[dim + 1 :]), int(out.shape[dim])
        each = 1
        if rows.count and size > rows.count and size * inner == rows.count * rows.inner:
            each = size // rows.count
        elif size == rows.count and inner == rows.inner and dim + 1 < out.dim():
            each = int(out.shape[dim + 1])
        if each > 1 and rows.inner % each == 0:
            of = out.reshape(-1, rows.count, each, rows.inner // each)
            if bool((of == of[:, :, :1]).all()) and not bool((of == of.flatten()[0]).all()):
                return Found(Rows(rows.count * each, rows.inner // each), each)
    return Found(rows)


def _coarser(rows: Rows, count: int) -> Rows:
    return Rows(count, rows.inner * (rows.count // count))


def _stand_in(held: Held, generator: torch.Generator) -> Tensor:
    drawn, (_, rows, group) = values(held.tensor, generator, 0), held
    if group == 1:
        return drawn
    of = drawn.reshape(-1, rows.count // group, group, rows.inner)
    return of[:, :, :1].expand(of.shape).reshape(drawn.shape)


def _product(sizes: Any) -> int:
    total = 1
    for size in sizes:
        total *= int(size)
    return total
