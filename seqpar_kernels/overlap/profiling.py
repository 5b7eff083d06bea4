"""Names for the steps of an op in traces: torch.profiler, and NVTX for Nsight Systems.

A label such as ``seqpar::all_gather_linear: wait for chunk 1 of rank 3`` explains a gap in a timeline. Without a tracer
a call only reads a flag.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
from torch.autograd import profiler

from ..comm.steps import Compute, Drain, Post, Step, Transfer, Wait
from ..environment import flag

# Nsight Systems sets NVTX_INJECTION64_PATH in the processes that it starts. SEQPAR_NVTX=1 is for other tools.
_nvtx = torch.version.cuda is not None and (flag("SEQPAR_NVTX") or "NVTX_INJECTION64_PATH" in os.environ)


_UNLABELLED = contextlib.nullcontext()


def listening() -> bool:
    """Whether a tracer is active."""
    return profiler._is_profiler_enabled or _nvtx


def traced(name: str, steps: Iterable[Step]) -> Iterable[Step]:
    """``steps``; with a tracer the work between a step and the next one has the label of the step."""
    return _labelled(name, steps) if listening() else steps


def _labelled(name: str, steps: Iterable[Step]) -> Iterator[Step]:
    for step in steps:
        with span(name, describe(step)):
            yield step


@contextlib.contextmanager
def _span(text: str) -> Iterator[None]:
    if _nvtx:
        torch.cuda.nvtx.range_push(text)
    try:
        # record_function costs microseconds even without a profiler; under emit_nvtx it is an NVTX range.
        with profiler.record_function(text) if profiler._is_profiler_enabled else contextlib.nullcontext():
            yield
    finally:
        if _nvtx:
            torch.cuda.nvtx.range_pop()


def span(name: str, what: str) -> contextlib.AbstractContextManager[None]:
    """A block with a label for one piece of work of op ``name``."""
    return _span(f"seqpar::{name}: {what}") if listening() else _UNLABELLED


def describe(step: Step) -> str:
    """The label of a step."""
    match step:
        case Post(sends, receives):
            parts = [f"send {_message(t)} to rank {t.target}" for t in sends]
            parts += [f"expect {_message(t)} from rank {t.source}" for t in receives]
            return ", ".join(parts)
        case Wait(transfer):
            return f"wait for {_message(transfer)} from rank {transfer.source}"
        case Drain():
            return "wait for sends"
        case Compute(stage, start, stop):
            return f"{stage} rows {start}..{stop}"


def _message(transfer: Transfer) -> str:
    chunk = f"chunk {transfer.rows.index} of rank {transfer.rows.owner}"
    return chunk if transfer.rows.owner == transfer.source else f"{transfer.buffer} for {chunk}"
