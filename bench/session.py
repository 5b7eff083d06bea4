"""One run: the rows found so far, where they go, what is under way."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    memory gave just then. How the two lie to one another changes a copy by half on some CPUs, so that varies."""
    like = sources[0]
    apart = [like.new_empty(like.numel() + 160 * i)[160 * i :].view_as(like) for i in range(4)]
    calls = itertools.count()
    return lambda i: apart[next(calls) % len(apart)].copy_(sources[i % len(sources)])


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
    command_line: str = ""
    rows: list[Row] = field(default_factory=list)
    progress: Progress = field(default_factory=Progress)
    _memory_rate: float | None = None
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
        row.command = self.command_line
        self.rows.append(row)
        if time.monotonic() - self._saved_at > SAVE_EVERY:
            self.save()
        return row

    def add_timed(self, row: Row, stats: Stats) -> Row:
        """A row with its times."""
        row.p20_ms, row.p50_ms, row.p80_ms, row.samples = stats.p20, stats.p50, stats.p80, stats.samples
        return self.add(row)

    def add_bandwidth(self, row: Row, stats: Stats) -> Row:
        """A row with its times and its percent of the measured memory bandwidth."""
        rate = self.memory_rate()
        row.percent = 100 * (row.bytes or 0) / (stats.p50 / 1e3) / rate
        row.ceiling = f"memory {rate / 1e9:.4g} GB/s"
        return self.add_timed(row, stats)

    def time_beside_copy(
        self,
        runners: Mapping[str, Runner],
        sources: Sequence[Tensor],
        errors: Mapping[str, float],
        new_row: Callable[[str], Row],
    ) -> None:
        """Time the runners and a copy of ``sources`` in the same rounds; a row each, with its error."""
        timed = interleave({**runners, "copy": copy_runner(sources)}, self.device, self.effort)
        for name, stats in timed.items():
            row = new_row(name)
            if name == "copy":
                row.bytes = 2 * sources[0].nbytes
            else:
                row.metrics["error"] = round(errors[name], 3)
            self.add_bandwidth(row, stats)

    def measured(
        self, planned: Sequence[CaseT], title: Callable[[CaseT], str], measure: Callable[[Session, CaseT], None]
    ) -> list[Row]:
        """Measure cases that memory bounds; returns the rows added, those of its bandwidth first."""
        first = len(self.rows)
        self.progress.plan(len(planned))
        self.memory_rate()
        for case in planned:
            self.progress.step(title(case))
            measure(self, case)
        return self.rows[first:]

    def wanted(self, provider: str) -> bool:
        return self.peers is None or provider in self.peers

    def memory_rate(self) -> float:
        """Bytes a second of this run's memory: the best of several large copies and, on a CPU, of reading alone.

        Several, since on a CPU the addresses of two tensors change what their copy takes by half; reading, since
        ordinary stores also read what they replace. From p20, so that noise flatters nobody.
        """
        if self._memory_rate is None:
            cuda = self.device == "cuda"
            size = (2**31 if cuda else 2**27) >> (3 if self.quick else 0)
            count = max(4, min(8, 2 * facts.cache_bytes(self.device) // size))

            def tensor(offset: int) -> Tensor:
                return torch.ones(size + offset, dtype=torch.uint8, device=self.device)[offset:].view(torch.float32)

            pairs = [(tensor(0), tensor(offset * 1088)) for offset in range(count)]
            runners: dict[str, Runner] = {
                f"copy {i}": lambda _, into=into, source=source: into.copy_(source)  # type: ignore[misc]
                for i, (source, into) in enumerate(pairs)
            }
            if not cuda:
                runners["read"] = lambda i: pairs[i % count][0].sum()
            rates = {}
            for name, stats in interleave(runners, self.device, self.effort.share(2)).items():
                moved = size * (1 if name == "read" else 2)
                rates[name] = moved / (stats.p20 / 1e3)
                row = Row(op=f"ceiling.{name.split()[0]}", provider="torch", shape=[size], dtype="fp32", bytes=moved)
                row.clock = "cuda" if cuda else "wall"
                if name != "read":
                    row.params = {"pair": int(name.split()[1])}
                self.add_timed(row, stats)
            self._memory_rate = max(rates.values())
        return self._memory_rate

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
