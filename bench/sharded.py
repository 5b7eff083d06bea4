"""What benchmarks over shaped links do alike: ranks are asked for times and bytes, and rows stand beside an ideal.

The ideal is what the whole work takes on one rank, unsharded, divided by the ranks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .links import Link, Network
    from .schema import Row
    from .session import Session

_LINK_BYTES = 2**22  # a message that times the link


class Question(NamedTuple):
    """What the ranks are asked: ``target`` runs in each of them, with ``case``, ``dtype`` and ``peers``."""

    target: str
    case: Any  # a dataclass
    dtype: str
    peers: list[str]
    title: str
    steps: int  # how many ``target`` reports


def measure_all(
    session: Session,
    planned: Sequence[Any],
    dtypes: Sequence[str],
    ranks: int,
    link: Link | None,
    measure: Callable[[Session, Any, str, int, Link | None, Network | None], None],
) -> list[Row]:
    """Measure every case in every dtype; returns the rows added."""
    from .links import Network

    first = len(session.rows)
    with Network(ranks) if link else contextlib.nullcontext() as network:
        for case in planned:
            for dtype in dtypes:
                measure(session, case, dtype, ranks, link, network)
    return session.rows[first:]


def ask(
    session: Session, question: Question, ranks: int, link: Link | None, network: Network | None
) -> tuple[list[dict[str, Any]], float | None, int]:
    """The ranks' answers, the rate of the links in bits a second (None: as they are), and the bytes that timed them."""
    from .ranks import run_ranks

    effort = dataclasses.replace(session.effort, least=min(session.effort.least, 7))
    order: dict[str, Any] = {
        "case": dataclasses.asdict(question.case),
        "dtype": question.dtype,
        "peers": question.peers,
        "effort": dataclasses.asdict(effort),
        "calibrate": False,
        "link_bytes": _LINK_BYTES >> (6 if session.quick else 0),
    }
    rate = None
    if link is not None and network is not None:
        rate = _settle_rate(session, question, order, ranks, link, network)
        order["link_bytes"] = int(min(order["link_bytes"], max(rate / 80, 2**14)))  # a tenth of a second
    session.progress.plan(question.steps)
    answers = run_ranks(
        question.target,
        order,
        ranks,
        network=network,
        on_step=lambda text: session.progress.step(f"{question.title}: {text}"),
    )
    return answers, rate, order["link_bytes"]


def _settle_rate(
    session: Session, question: Question, order: dict[str, Any], ranks: int, link: Link, network: Network
) -> float:
    """Bits a second; for a ratio the unsharded work is timed first. The links are shaped to it."""
    from .ranks import run_ranks
    from .timing import Effort

    rate = link.rate
    if rate is None:
        assert link.ratio is not None
        session.progress.plan(1)
        session.progress.step(f"{question.title}: unsharded alone")
        calibrating = {**order, "calibrate": True, "effort": dataclasses.asdict(Effort(seconds=1.0, least=5))}
        answers = run_ranks(question.target, calibrating, ranks, network=network)
        seconds = ideal_of(answers, "")[0] / 1e3
        rate = 8 * max(answer["planned"]["fwd+bwd"] for answer in answers) / (link.ratio * seconds)
    network.shape(rate)
    return rate


def ideal_of(answers: list[dict[str, Any]], direction: str) -> tuple[float, float]:
    """The ideal's milliseconds, and those of CPU time where that was taken."""
    from .attention_rank import OURS_UNSHARDED, UNSHARDED
    from .linear import stats_of

    names = [f"{name} {direction}".strip() for name in (UNSHARDED, OURS_UNSHARDED)]
    there = [name for name in names if name in answers[0]["times"]]
    fastest = min(there, key=lambda name: stats_of(answers, name).p50)
    cpu = cpu_of(answers, fastest) if fastest in answers[0]["cpu"] else 0.0
    return stats_of(answers, fastest).p50 / len(answers), cpu / len(answers)


def cpu_of(answers: list[dict[str, Any]], name: str) -> float:
    """CPU time of the rank that spent most, milliseconds."""
    return max(statistics.median(answer["cpu"][name]) for answer in answers)
