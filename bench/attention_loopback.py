"""``bench attention`` over virtual ranks: one device, links paced, every engine beside unsharded attention.

The virtual ranks share the device, so the ideal is the whole sequence's attention once, by the faster of SDPA and our
kernels, or the paced wire where that is slower. The pace stands for a network; what one costs its host is not in it.
Unsharded rows are in percent of the rate of a matmul of squares in the same dtype, timed in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

import seqpar_kernels as sp
from seqpar_kernels.functional import attention_choice

from . import facts
from .attention_providers import AttentionCase, ours, ours_unsharded, unsharded
from .attention_rank import ENGINES, oracle
from .check import error_ratio
from .links import Link
from .schema import Row
from .session import Session
from .timing import Runner, interleave

UNSHARDED, OURS_UNSHARDED = "unsharded", "ours/unsharded"
MATMUL = "matmul"  # of squares in the same dtype: the rate beside which kernels are read
_SQUARE = 2048


def flops(case: AttentionCase, direction: str) -> int:
    """What the mask needs: two matmuls over the pairs forward, five backward."""
    return 2 * case.pairs() * case.heads * case.head_dim * (2 if direction == "fwd" else 7)


def run(
    session: Session, planned: Sequence[AttentionCase], dtypes: Sequence[str], ranks: Sequence[int], link: Link
) -> list[Row]:
    """Measure every case in every dtype for every number of virtual ranks; returns the rows added."""
    first = len(session.rows)
    session.progress.plan(2 * len(planned) * len(dtypes) * len(ranks))
    for case in planned:
        for dtype in dtypes:
            tensors = whole(case, facts.DTYPES[dtype], session.device)
            truth = oracle(case, *tensors)
            reference = attended(unsharded(case).attend, tensors, True)
            for count in ranks:
                for direction in ("fwd", "fwd+bwd"):
                    session.progress.step(f"attention S={case.seq} {dtype} {count} virtual ranks: {direction}")
                    measure(session, case, dtype, count, direction, link, tensors, truth, reference)
    return session.rows[first:]


def whole(case: AttentionCase, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q, k, v and the gradient of the result, [1, S, H, D]."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(1, case.seq, heads, case.head_dim, generator=generator, device=device).to(dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads, case.heads)
    ]


def attended(attend: Callable[..., Tensor], tensors: Sequence[Tensor], both: bool) -> list[Tensor]:
    """The result, and with ``both`` dq, dk and dv."""
    if not both:
        with torch.no_grad():
            return [attend(*tensors[:3])]
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    y = attend(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, tensors[3])]


def measure(
    session: Session,
    case: AttentionCase,
    dtype: str,
    ranks: int,
    direction: str,
    link: Link,
    tensors: list[Tensor],
    truth: list[Tensor],
    reference: list[Tensor],
) -> None:
    """Unsharded and every engine, interleaved; the engines over links of one pace."""
    from seqpar_kernels.comm.loopback import Loopback

    both = direction == "fwd+bwd"
    alone: dict[str, Callable[..., Tensor]] = {UNSHARDED: unsharded(case).attend, OURS_UNSHARDED: on_one(case)}
    runners: dict[str, Runner] = {name: partial(_again, attend, tensors, both) for name, attend in alone.items()}
    size = min(_SQUARE, case.seq)
    square = torch.randn(size, size, device=session.device).to(facts.DTYPES[dtype])
    runners[MATMUL] = lambda _: torch.mm(square, square)
    errors = {OURS_UNSHARDED: worst(attended(alone[OURS_UNSHARDED], tensors, both), reference, truth)}
    choices: dict[str, Any] = {}
    with Loopback(ranks, session.device) as free:
        for name, engine in names():
            choices[name] = free.run(partial(planned, case, tensors, engine))[0]
    seconds = interleave({"": runners[UNSHARDED]}, session.device, session.effort)[""].p50 / 1e3
    sent = {name: choice.wire.total if both else choice.wire.forward for name, choice in choices.items()}
    rate = link.rate / 8 if link.rate else max(1, sent["ours"]) / ((link.ratio or 1.0) * seconds)
    with Loopback(ranks, session.device, bytes_per_second=rate) as world:
        for name, engine in names():
            call = partial(on_rank, case, tensors, engine, both, torch.get_num_threads())
            errors[name] = worst(gathered(world.run(call), case, ranks), reference, truth)
            if errors[name] <= 2:
                runners[name] = partial(_on_all, world, call)
        timed = interleave(runners, session.device, session.effort)
    ideal = min(timed[name].p50 for name in alone)
    matmul_rate = 2 * size**3 / timed[MATMUL].p50  # of FLOPs a millisecond
    params: dict[str, Any] = {"link": link.text, "layout": case.layout}
    params |= {"window": case.window} if case.window else {}
    params |= {"documents": case.documents} if case.documents > 1 else {}
    for name in (*alone, *choices):
        row = Row(
            op="attention.loopback",
            provider=name,
            direction=direction,
            shape=[case.seq, case.heads, case.kv_heads, case.head_dim],
            dtype=dtype,
            ranks=ranks,
            params=params,
            clock="cuda" if session.device == "cuda" else "wall",
            flops=flops(case, direction),
        )
        row.metrics = {"error": round(errors[name], 3)} if name in errors else {}
        if name not in timed:
            row.status, row.reason = "wrong", f"errs {errors[name]:.1f} times as much as PyTorch in the same dtype"
            session.add(row)
            continue
        row.metrics |= {"ideal_ms": round(ideal, 3), "x_ideal": round(timed[name].p50 / ideal, 3)}
        if name in alone:
            row.percent, row.ceiling = 100 * (row.flops or 0) / timed[name].p50 / matmul_rate, "matmul of squares"
        if name in choices:
            row.bytes = sent[name]
            wire = 1e3 * row.bytes / rate
            row.percent, row.ceiling = 100 * max(ideal, wire) / timed[name].p50, "the slower of the ideal and its wire"
            grid = f"{choices[name].sizes.ulysses}x{choices[name].sizes.ring}"
            row.metrics |= {"wire_ms": round(wire, 3), "paced_mbit": round(8e-6 * rate, 1)}
            row.metrics |= {"engine": choices[name].engine, "grid": grid}
        session.add_timed(row, timed[name])


def names() -> list[tuple[str, str]]:
    """(provider, engine) of ours."""
    return [("ours", "auto"), *((f"ours/{engine}", engine) for engine in ENGINES)]


def on_one(case: AttentionCase) -> Callable[..., Tensor]:
    """Our kernels on the whole sequence."""
    return ours_unsharded(case, None, always=True).attend  # type: ignore[arg-type]


def planned(case: AttentionCase, tensors: list[Tensor], engine: str, group: ProcessGroup) -> Any:
    q, k, v = (sp.shard_sequence(t, group, 1, layout=case.layout) for t in tensors[:3])
    options: dict[str, Any] = dict(window_size=case.bounds(), layout=case.layout, engine=engine)
    return attention_choice(q, k, v, group=group, is_causal=True, **options)


def on_rank(
    case: AttentionCase, tensors: list[Tensor], engine: str, both: bool, threads: int, group: ProcessGroup
) -> list[Tensor]:
    """One virtual rank's results; on a CPU the ranks share ``threads``."""
    if tensors[0].device.type == "cpu":
        torch.set_num_threads(max(1, threads // group.size()))  # of this thread
    shards = [sp.shard_sequence(t, group, 1, layout=case.layout) for t in tensors]
    return attended(ours(case, group, engine).attend, shards, both)


def gathered(found: list[list[Tensor]], case: AttentionCase, ranks: int) -> list[Tensor]:
    """Rows of all ranks in order."""
    from seqpar_kernels.sequence_layout import rows_of

    order = torch.tensor(
        [at for r in range(ranks) for i in rows_of(case.layout, case.seq, ranks, r) for at in range(*i)]
    )
    results = []
    for parts in zip(*found, strict=True):
        joined = torch.cat(parts, 1)
        out = torch.empty_like(joined)
        out[:, order.to(joined.device)] = joined
        results.append(out)
    return results


def worst(found: list[Tensor], reference: list[Tensor], truth: list[Tensor]) -> float:
    """The largest error, in units of that of SDPA in the same dtype."""
    return max(error_ratio(a, b, c) for a, b, c in zip(found, reference, truth, strict=False))


def _again(attend: Callable[..., Tensor], tensors: Sequence[Tensor], both: bool, _: int) -> None:
    attended(attend, tensors, both)


def _on_all(world: Any, call: Callable[[ProcessGroup], list[Tensor]], _: int) -> None:
    world.run(call)
