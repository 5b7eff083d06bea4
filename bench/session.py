"""One run: the rows found so far, where they go, what is under way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import facts
from .errors import BenchError
from .report import Progress
from .schema import Row, check_writable, save
from .timing import Effort, Stats, interleave


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
    _ceilings: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BenchError("--device cuda: torch sees no CUDA device here: use --device cpu, or another machine")
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
        return row

    def add_timed(self, row: Row, stats: Stats, rate: str = "") -> Row:
        """A row with its times, and its percent of the measured ceiling ``rate`` ("copy", or "matmul" of its dtype)."""
        row.p20_ms, row.p50_ms, row.p80_ms, row.samples = stats.p20, stats.p50, stats.p80, stats.samples
        if rate:
            amount = row.bytes if rate == "copy" else row.flops
            ceiling = self.ceiling(rate, row.dtype)
            row.percent = 100 * (amount or 0) / (stats.p50 / 1e3) / ceiling
            row.ceiling = f"{rate} {ceiling:.4g}/s"
        return self.add(row)

    def wanted(self, provider: str) -> bool:
        return self.peers is None or provider in self.peers

    def ceiling(self, kind: str, dtype: str) -> float:
        """Bytes or FLOPs a second that this machine reached in this run: from p20, so that noise flatters nobody."""
        key = kind if kind == "copy" else f"{kind} {dtype}"
        if key not in self._ceilings:
            self._ceilings[key] = self._measure_copy() if kind == "copy" else self._measure_matmul(dtype)
        return self._ceilings[key]

    def _measure_copy(self) -> float:
        size = (2**31 if self.device == "cuda" else 2**27) >> (3 if self.quick else 0)
        count = max(2, min(8, 2 * facts.cache_bytes(self.device) // size))
        pairs = [[torch.ones(size, dtype=torch.uint8, device=self.device) for _ in "io"] for _ in range(count)]
        runners = {"copy": lambda i: pairs[i % count][1].copy_(pairs[i % count][0])}
        stats = interleave(runners, self.device, self.effort)["copy"]
        row = Row(op="ceiling.copy", provider="torch", shape=[size], dtype="uint8", bytes=2 * size)
        row.clock = "cuda" if self.device == "cuda" else "wall"
        self.add_timed(row, stats)
        return 2 * size / (stats.p20 / 1e3)

    def _measure_matmul(self, dtype: str) -> float:
        n = (8192 if self.device == "cuda" else 1024) // (2 if self.quick else 1)
        a, b = (torch.randn(n, n, device=self.device).to(facts.DTYPES[dtype]) for _ in "ab")
        stats = interleave({"matmul": lambda i: a @ b}, self.device, self.effort)["matmul"]
        row = Row(op="ceiling.matmul", provider="torch", shape=[n, n, n], dtype=dtype, flops=2 * n**3)
        row.clock = "cuda" if self.device == "cuda" else "wall"
        self.add_timed(row, stats)
        return 2 * n**3 / (stats.p20 / 1e3)

    @contextlib.contextmanager
    def saved(self) -> Iterator[None]:
        """Whatever happens inside, the rows found until then are saved."""
        try:
            yield
        finally:
            self.progress.stop()
            if self.folder is not None and self.rows:
                save(self.folder / self.file_name, self.rows)
