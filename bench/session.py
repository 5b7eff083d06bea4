"""One run: the rows found so far, where they go, what is under way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from . import facts
from .errors import BenchError, NotHere
from .report import Progress
from .schema import Row, check_writable, save
from .timing import Effort, Runner, Stats, interleave

CaseT = TypeVar("CaseT")
SAVE_EVERY = 0.25  # seconds


def copy_runner(sources: Sequence[Tensor]) -> Runner:
    """One tensor read, one written, in the rounds of those who move memory: a floor for them, and what the machine's
    memory gave just then."""
    outs = [torch.empty_like(source) for source in sources[:2]]
    return lambda i: outs[i % len(outs)].copy_(sources[i % len(sources)])


@dataclass
class Session:
    """What every benchmark is handed.

    Attributes:
        device: "cpu" or "cuda".
        effort: how long each provider is timed.
        peers: names of peers to time; None for all.
        rows: everything found, peers that are absent included.
    """

    command: str
    device: str = "cpu"
    effort: Effort = field(default_factory=Effort)
    quick: bool = False
    peers: list[str] | None = None
    folder: Path | None = None
    rows: list[Row] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    _copy_rate: float | None = None
    _saved_at: float = 0.0

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise NotHere("--device cuda: torch sees no CUDA device here: use --device cpu, or another machine")
        if self.folder is not None:
            check_writable(self.folder)
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        self.file_name = f"{self.command}-{self.device}-{stamp}.jsonl"

    def add(self, row: Row) -> Row:
        row.device = self.device
        row.threads = row.threads or torch.get_num_threads()
        row.versions = facts.versions()
        row.machine = facts.machine(self.device)
        row.commit = facts.commit()
        row.time = facts.now()
        self.rows.append(row)
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()
        return row

    def add_timed(self, row: Row, stats: Stats) -> Row:
        """A row with its times."""
        row.p20_ms, row.p50_ms, row.p80_ms, row.samples = stats.p20, stats.p50, stats.p80, stats.samples
        return self.add(row)

    def add_bandwidth(self, row: Row, stats: Stats) -> Row:
        """A row with its times and its percent of the measured copy bandwidth."""
        rate = self.copy_rate()
        row.percent = 100 * (row.bytes or 0) / (stats.p50 / 1e3) / rate
        row.ceiling = f"copy {rate / 1e9:.4g} GB/s"
        return self.add_timed(row, stats)

    def measured(
        self, planned: Sequence[CaseT], title: Callable[[CaseT], str], measure: Callable[[Session, CaseT], None]
    ) -> list[Row]:
        """Measure cases that are compared with a copy; returns the rows added, the copy's first."""
        first = len(self.rows)
        self.progress.plan(len(planned))
        self.copy_rate()
        for case in planned:
            self.progress.step(title(case))
            measure(self, case)
        return self.rows[first:]

    def wanted(self, provider: str) -> bool:
        return self.peers is None or provider in self.peers

    def copy_rate(self) -> float:
        """Bytes a second, read and written, of a large copy in this run: from p20, so that noise flatters nobody."""
        if self._copy_rate is None:
            size = (2**31 if self.device == "cuda" else 2**27) >> (3 if self.quick else 0)
            count = max(2, min(8, 2 * facts.cache_bytes(self.device) // size))
            pairs = [[torch.ones(size, dtype=torch.uint8, device=self.device) for _ in "io"] for _ in range(count)]
            runners = {"copy": lambda i: pairs[i % count][1].copy_(pairs[i % count][0])}
            stats = interleave(runners, self.device, self.effort)["copy"]
            row = Row(op="ceiling.copy", provider="torch", shape=[size], dtype="uint8", bytes=2 * size)
            row.clock = "cuda" if self.device == "cuda" else "wall"
            self.add_timed(row, stats)
            self._copy_rate = 2 * size / (stats.p20 / 1e3)
        return self._copy_rate

    def save(self) -> None:
        """What there is so far: a run that is killed, as one that hangs on a GPU must be, leaves it behind."""
        self._saved_at = time.monotonic()
        if self.folder is None or not self.rows:
            return
        path = self.folder / self.file_name
        try:
            save(path, self.rows)
        except OSError as error:
            raise BenchError(f"{path}: cannot be saved ({error.strerror}): name another folder") from None

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Whatever happens inside, the rows found until then are saved."""
        try:
            yield
        finally:
            self.progress.stop()
            self.save()
