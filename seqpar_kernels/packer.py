"""Places documents on ranks so that the ranks have about the same work and share as few documents as possible.

The order is longest processing time first (Graham 1969), from high degrees to low. When documents of degree d are
placed, the ranks of each block of d ranks have the same load. So a rank ends above the mean by about its last piece at
most. The search varies how many ranks share a document: no piece may be larger than the mean, then than a half of it,
a quarter and so on. Between these bounds it raises the degree of documents of the slowest rank, one at a time.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence

from .packing import Costs, PackingPlan, Place, Share, shares

_PARTS = (1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 64, 0.0)  # bounds of a piece, in units of the mean
_PLACEMENTS = 20_000  # the most documents that are placed again for each of these bounds


def pack(
    lengths: Sequence[int], ranks: int, costs: Costs, max_tokens: int | None, max_imbalance: float
) -> PackingPlan | int:
    """The first placement within both bounds, or else the best balanced one within ``max_tokens``.

    Where none is within ``max_tokens``: the fewest tokens of the fullest rank in any placement.
    """
    best: PackingPlan | None = None
    for plan in _candidates(lengths, ranks, costs, costs, max_tokens):
        if best is None or plan.work_imbalance < best.work_imbalance:
            best = plan
        if best.work_imbalance <= max_imbalance:
            return best
    if best is not None:
        return best
    # Balance tokens without the bound, so that the number in the error message is one that succeeds.
    by_tokens = list(_candidates(lengths, ranks, Costs(0.0, 1.0), costs, None))
    fitting = [plan for plan in by_tokens if max_tokens is None or max(plan.tokens) <= max_tokens]
    if fitting:
        return min(fitting, key=lambda plan: plan.work_imbalance)
    return min(max(plan.tokens) for plan in by_tokens)


def _candidates(
    lengths: Sequence[int], ranks: int, costs: Costs, counted: Costs, max_tokens: int | None
) -> Iterator[PackingPlan]:
    """Placements balanced by ``costs``, those with little sharing first; their plans have the costs ``counted``."""
    degrees_of = divisors(ranks)
    work = [costs.of(shares(length, 1)[0]) for length in lengths]
    mean = sum(work) / ranks
    raises = max(4, min(4 * ranks, _PLACEMENTS // max(1, len(lengths))))
    seen: set[tuple[int, ...]] = set()
    for part in _PARTS:
        degrees = [next((d for d in degrees_of if w <= d * part * mean), ranks) for w in work]
        for _ in range(raises):
            if tuple(degrees) in seen:
                break
            seen.add(tuple(degrees))
            places = Placing(lengths, ranks, costs, max_tokens).place(degrees, work)
            if places is None:
                break
            plan = PackingPlan(tuple(lengths), places, ranks, costs)
            yield plan if counted == costs else PackingPlan(plan.lengths, places, ranks, counted)
            if not _raise_slowest(plan, degrees, work, degrees_of):
                break


def _raise_slowest(plan: PackingPlan, degrees: list[int], work: Sequence[float], degrees_of: Sequence[int]) -> bool:
    """Raise the degree of one document of the slowest rank: a shared one, else the largest."""
    slowest = plan.work.index(max(plan.work))
    found = [
        (place.degree, work[document], -document)
        for document, place in enumerate(plan.places)
        if place.first <= slowest < place.first + place.degree < place.first + plan.ranks and work[document]
    ]
    if not found:
        return False
    degree, _, document = max(found)
    degrees[-document] = degrees_of[degrees_of.index(degree) + 1]
    return True


def divisors(ranks: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, ranks + 1) if ranks % d == 0)


class Placing:
    """The state of one placement."""

    def __init__(self, lengths: Sequence[int], ranks: int, costs: Costs, max_tokens: int | None):
        self._lengths, self._ranks, self._costs, self._max_tokens = lengths, ranks, costs, max_tokens
        self._work, self._tokens = [0.0] * ranks, [0] * ranks

    def place(self, degrees: Sequence[int], work: Sequence[float]) -> tuple[Place, ...] | None:
        """Place all documents, high degrees and large ones first; None where one does not fit.

        A document that fits on no block of its degree gets the next higher degree.
        """
        places: dict[int, Place] = {}
        order = sorted(range(len(degrees)), key=lambda i: (-degrees[i], -work[i], -self._lengths[i], i))
        whole = next((at for at, i in enumerate(order) if degrees[i] == 1), len(order))
        for document in order[:whole]:
            place = self._shared(document, degrees[document])
            if place is None:
                return None
            places[document] = place
        heap = self._heap()
        for document in order[whole:]:
            rank = self._whole(document, heap)
            if rank is not None:
                places[document] = Place(1, rank)
                continue
            place = self._shared(document, 2)
            if place is None:
                return None
            places[document] = place
            heap = self._heap()
        return tuple(places[document] for document in range(len(degrees)))

    def _heap(self) -> list[tuple[float, int, int]]:
        heap = [(self._work[rank], self._tokens[rank], rank) for rank in range(self._ranks)]
        heapq.heapify(heap)
        return heap

    def _whole(self, document: int, heap: list[tuple[float, int, int]]) -> int | None:
        """The rank with the least work among those with room."""
        (share,), full = shares(self._lengths[document], 1), []
        rank = None
        while heap and rank is None:
            top = heapq.heappop(heap)
            if self._fits(top[2], share):
                rank = top[2]
            else:
                full.append(top)
        for entry in full:
            heapq.heappush(heap, entry)
        if rank is not None:
            self._add(rank, share)
            heapq.heappush(heap, (self._work[rank], self._tokens[rank], rank))
        return rank

    def _shared(self, document: int, at_least: int) -> Place | None:
        """The block with room, of the lowest degree that has one, whose slowest rank then has the least work."""
        for degree in divisors(self._ranks):
            if degree < at_least:
                continue
            own, best = shares(self._lengths[document], degree), None
            for first in range(0, self._ranks, degree):
                if not all(self._fits(first + i, share) for i, share in enumerate(own)):
                    continue
                key = max(self._work[first + i] + self._costs.of(share) for i, share in enumerate(own))
                if best is None or key < best[0]:
                    best = (key, first)
            if best is not None:
                for i, share in enumerate(own):
                    self._add(best[1] + i, share)
                return Place(degree, best[1])
        return None

    def _fits(self, rank: int, share: Share) -> bool:
        return self._max_tokens is None or self._tokens[rank] + share.tokens <= self._max_tokens

    def _add(self, rank: int, share: Share) -> None:
        self._work[rank] += self._costs.of(share)
        self._tokens[rank] += share.tokens
