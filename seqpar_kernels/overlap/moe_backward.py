"""The backward of a mixture of experts over several ranks; see :mod:`.moe_exchange`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..kernels.expert_activation import ExpertActivation, activate_experts_backward
from ..kernels.grouped_matmul import (
    add_grouped_weight_gradient,
    grouped_matmul,
    grouped_row_sums,
    grouped_weight_gradient,
    one_matmul_a_run,
)
from ..kernels.spec import accumulation_dtype
from .moe_exchange import (
    NAME,
    Call,
    Experts,
    Received,
    Returns,
    joined,
    part_of,
    selected,
    summed,
)
from .moe_routes import ExpertPlacement, Pairs, PairsByExpert, Strip, pairs_of, sum_of_experts
from .profiling import span


class Wants(NamedTuple):
    """Which gradients are wanted. ``x`` and ``weights`` must be alike on all ranks: they travel."""

    x: bool
    weights: bool
    w1: bool
    b1: bool
    w2: bool
    b2: bool


#: Where gradients of w1 and w2 are added, in the accumulation dtype; None: nowhere, they are returned.
MainGrads = tuple[Tensor | None, Tensor | None]


class Gradients(NamedTuple):
    """None where not wanted, or added to a main_grad.

    ``x`` [T, H], ``weights`` [T, K] in the accumulation dtype; the others as in Experts.
    """

    x: Tensor | None
    weights: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None


class _Backward:
    """The experts' backward, batch by batch; gradients of what the experts are made of come at the end.

    A batch are pairs that are worked on at a time. What the weights' gradients are made of is written where one matmul
    an expert will read it.
    """

    def __init__(
        self,
        call: Call,
        experts: Experts,
        activation: ExpertActivation,
        wants: Wants,
        main_grads: MainGrads,
        batches: Sequence[Pairs],
    ):
        self._call, self._experts, self._activation, self._wants = call, experts, activation, wants
        self._main_grads, self.batches, self._order = main_grads, batches, PairsByExpert(batches)
        size, (_, width, features), inner = self._order.size, experts.w1.shape, experts.w2.shape[2]

        def room(columns: int, want: bool) -> Tensor | None:
            return experts.w1.new_empty(size, columns) if want else None

        self._xs, self._dhs = room(features, wants.w1), room(width, wants.w1)
        self._dys, self._scaled = room(features, wants.w2), room(inner, wants.w2)
        shapes = (experts.w1.shape[:2], wants.b1), (experts.w2.shape[:2], wants.b2)
        self._db1, self._db2 = (
            torch.zeros(shape, dtype=call.wide, device=experts.w1.device) if want else None for shape, want in shapes
        )

    def columns(self) -> list[tuple[int, torch.dtype]]:
        """Of what goes back for each row."""
        call, wants = self._call, self._wants
        return [(call.features, call.dtype)] * wants.x + [(call.top_k, call.wide)] * wants.weights

    def batch(self, number: int, x: Tensor, dout: Tensor, source: Tensor, weights: Tensor, h: Tensor) -> list[Tensor]:
        """What goes back: the gradients of the n rows of a batch and of their weights, as far as they are wanted.

        Args:
            x, dout: [N, H].
            source: [P], the row of each pair among these.
            weights: [n, K].
            h: [P, W].
        """
        wants, pairs, wide = self._wants, self.batches[number], self._call.wide
        of_pairs = weights[pairs.rows, pairs.slots]
        dx = x.new_empty(pairs.size if wants.x else 0, x.shape[1])
        dots = torch.empty(pairs.size, dtype=wide, device=x.device)
        for strip in pairs.strips(one_matmul_a_run(x)):
            self._strip(number, strip, x, dout, source[strip.pairs], of_pairs[strip.pairs], h[strip.pairs], dx, dots)
        answer = []
        if wants.x:
            answer.append(sum_of_experts(dx, None, pairs).to(self._call.dtype))
        if wants.weights:
            dweights = torch.zeros(weights.shape, dtype=wide, device=x.device)
            dweights[pairs.rows, pairs.slots] = dots
            answer.append(dweights)
        return answer

    def _strip(
        self,
        number: int,
        strip: Strip,
        x: Tensor,
        dout: Tensor,
        source: Tensor,
        weights: Tensor,
        h: Tensor,
        dx: Tensor,
        dots: Tensor,
    ) -> None:
        """Fill ``dx`` [P, H] and ``dots`` [P], the gradients of the pairs' weights, for the pairs of a strip."""
        w1, w2, counts = self._experts.w1[strip.experts], self._experts.w2[strip.experts], strip.counts
        b2 = part_of(self._experts.b2, strip.experts)
        place, size = self._order.place(number, strip), source.shape[0]

        def target(whole: Tensor | None, columns: int) -> Tensor:
            return whole[place] if whole is not None and isinstance(place, slice) else x.new_empty(size, columns)

        dy = target(self._dys, x.shape[1])
        torch.index_select(dout, 0, source, out=dy)  # not yet weighted
        da = grouped_matmul(dy, w2.transpose(1, 2), counts)
        into = target(self._scaled, da.shape[1]), target(self._dhs, h.shape[1])
        made = activate_experts_backward(h, da, weights, self._activation, into)
        if self._wants.x:
            grouped_matmul(made.h, w1.transpose(1, 2), counts, out=dx[strip.pairs])
        dots[strip.pairs] = made.weights
        if b2 is not None and self._call.adds_bias() and self._wants.weights:
            dots[strip.pairs] += _dots_with_bias(dy, b2, counts)
        if self._db1 is not None:
            self._db1[strip.experts] += grouped_row_sums(made.h, counts)
        if self._db2 is not None:
            self._db2[strip.experts] += grouped_row_sums(dy, counts, weights)
        if self._xs is not None and isinstance(place, slice):
            torch.index_select(x, 0, source, out=self._xs[place])
        elif isinstance(place, Tensor):
            rows = None if self._xs is None else x.index_select(0, source)
            for whole, part in zip(
                (self._xs, self._dhs, self._dys, self._scaled), (rows, made.h, dy, made.scaled), strict=True
            ):
                if whole is not None and part is not None:
                    whole.index_copy_(0, place, part)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of w1, b1, w2, b2: one matmul an expert, over the rows of all ranks."""
        (into1, into2), experts, counts = self._main_grads, self._experts, self._order.counts
        dw1 = dw2 = None
        with span(NAME, "wgrad"):
            if self._dys is not None and self._scaled is not None:
                dw2 = _weight_gradient(into2, self._dys, self._scaled, counts, experts.w2)
                self._dys = self._scaled = None
            if self._dhs is not None and self._xs is not None:
                dw1 = _weight_gradient(into1, self._dhs, self._xs, counts, experts.w1)
                self._dhs = self._xs = None
        db1 = None if self._db1 is None or experts.b1 is None else self._db1.to(experts.b1.dtype)
        db2 = None if self._db2 is None or experts.b2 is None else self._db2.to(experts.b2.dtype)
        return dw1, db1, dw2, db2


def backward(
    group: ProcessGroup | None,
    dout: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    received: Received,
    placement: ExpertPlacement,
    experts: Experts,
    activation: ExpertActivation,
    chunks: int | None,
    bound: int | None,
    wants: Wants,
    details: str,
    main_grads: MainGrads = (None, None),
) -> Gradients:
    """The gradients of :func:`.moe_forward.forward`; ``dout`` [T, H], the other tensors as there."""
    call = Call(group, x, ids, placement, chunks, bound)
    weights = weights.to(call.wide)
    # Of own tokens first: their ids, and which of them are worked on at a time; then the same of the peers'.
    own_ids = call.placement.local(selected(ids, call.tokens[call.rank]), call.rank)
    if group is None:
        parts = call.bounded(0, own_ids.shape[0])
        work = _Backward(call, experts, activation, wants, main_grads, _batches(call, [(own_ids, parts)]))
        own = _own_backward(call, work, dout, x, weights, received.own_h, parts)
        return _gradients(call, x, weights, [own], wants, work.finish())
    with call.messages("backward", f"{details}, gradients of x {wants.x}, of weights {wants.weights}") as messages:
        call.settle(received.counts)
        douts = dout.new_empty(received.rows.shape)
        call.post_rows(messages, dout, douts)
        parts = call.bounded(0, own_ids.shape[0])
        of_rounds = [call.bounded(incoming.start, incoming.stop) for incoming in call.rounds]
        pairs = _batches(call, [(own_ids, parts), *((received.ids, some) for some in of_rounds)])
        work = _Backward(call, experts, activation, wants, main_grads, pairs)
        returns = Returns(call, messages, work.columns(), x)
        own = _own_backward(call, work, dout, x, weights, received.own_h, parts)
        done, batch = 0, len(parts)
        for number, of_round in enumerate(of_rounds):
            call.wait_rows(messages, number, douts)
            answers = []
            with span(NAME, "dgrad of a round"):
                for part in of_round:
                    source = pairs[batch].rows + part.start
                    h = received.h[done : done + pairs[batch].size]
                    answers.append(work.batch(batch, received.rows, douts, source, received.weights[part], h))
                    done, batch = done + pairs[batch].size, batch + 1
            returns.answer(number, [joined(answer) for answer in zip(*answers, strict=True)])
        of_experts = work.finish()
        return _gradients(call, x, weights, returns.wait(own), wants, of_experts)


def _batches(call: Call, of: Sequence[tuple[Tensor, Sequence[slice]]]) -> list[Pairs]:
    return [pairs_of(ids[part], call.local) for ids, parts in of for part in parts]


def _own_backward(
    call: Call,
    work: _Backward,
    dout: Tensor,
    x: Tensor,
    weights: Tensor,
    h: Tensor,
    parts: Sequence[slice],
) -> list[Tensor]:
    """What :meth:`_Backward.batch` returns, for this rank's own tokens."""
    tokens = call.tokens[call.rank]
    own_weights, done, answers = selected(weights, tokens), 0, []
    for number, part in enumerate(parts):
        pairs = work.batches[number]
        of_pairs = h[done : done + pairs.size]
        done += pairs.size
        answers.append(work.batch(number, x, dout, tokens[part][pairs.rows], own_weights[part], of_pairs))
    return [joined(answer) for answer in zip(*answers, strict=True)]


def _gradients(
    call: Call,
    x: Tensor,
    weights: Tensor,
    parts: list[list[Tensor]],
    wants: Wants,
    of_experts: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> Gradients:
    """Sums over what each rank has sent back."""
    dx = summed(call, x, [part[0] for part in parts]) if wants.x else None
    dweights = summed(call, weights, [part[-1] for part in parts]) if wants.weights else None
    return Gradients(dx, dweights, *of_experts)


def _weight_gradient(into: Tensor | None, dy: Tensor, x: Tensor, counts: list[int], weight: Tensor) -> Tensor | None:
    if into is None:
        return grouped_weight_gradient(dy, x, counts, weight)
    add_grouped_weight_gradient(into, dy, x, counts)
    return None


def _dots_with_bias(dy: Tensor, bias: Tensor, counts: Sequence[int]) -> Tensor:
    """dy[p] . bias[e] for the rows of each expert. [P] in the accumulation dtype"""
    wide = accumulation_dtype(dy.dtype)
    runs = dy.split(list(counts))
    return torch.cat([run.to(wide) @ bias[e].to(wide) for e, run in enumerate(runs)])
