"""The one schema of all results: a row is one provider doing one thing at one shape; a file is JSON lines of rows."""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .errors import BenchError

STATUSES = ("ok", "wrong", "absent", "failed")


#: Providers of which at least a part is ours: the op itself, its kernels one by one, its schedule cut otherwise.
OWN_CODE = ("ours", "two-steps", "one after the other", "messages")


@dataclass
class Row:
    """One measurement, or the reason why there is none.

    Attributes:
        op: what was done: "norm.layer", "linear.all_gather_linear", "ceiling.copy", ...
        provider: who did it: "ours", "eager", "compile", ...
        direction: "fwd", "fwd+bwd", or "" where there is none.
        shape: the sizes that matter to the op, in the op's own order.
        params: the rest of the question: dropout probability, chunks, link. Part of the row's identity.
        status: "ok"; "wrong" (failed the check against the oracle, not timed); "absent" or "failed", with ``reason``.
        p20_ms, p50_ms, p80_ms: quantiles over ``samples`` runs, milliseconds of ``clock``.
        clock: "wall", "cpu" (time of the calling thread; of the process where the device is cuda) or "cuda" (events).
        bytes, flops: what the op must move and compute, whoever does it; in memory rows, the bytes kept.
        percent: percent of ``ceiling``, a rate measured in the same run.
        metrics: further results: floors, error, units.
        command: what was typed, --save left out.
    """

    op: str
    provider: str
    direction: str = ""
    shape: list[int] = field(default_factory=list)
    dtype: str = ""
    device: str = "cpu"
    ranks: int = 1
    params: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples: int = 0
    clock: str = "wall"
    bytes: int | None = None
    flops: int | None = None
    percent: float | None = None
    ceiling: str = ""
    metrics: dict[str, Any] = field(default_factory=dict)
    threads: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    machine: str = ""
    commit: str = ""
    time: str = ""
    command: str = ""

    def question(self) -> tuple[Any, ...]:
        """What was asked, whoever answered: rows with the same question are ranked against each other."""
        params = tuple(sorted((k, str(v)) for k, v in self.params.items() if k != "chunks"))
        return self.op, self.direction, tuple(self.shape), self.dtype, self.device, self.ranks, params

    @property
    def family(self) -> str:
        """The kind of op: "norm" of "norm.layer"."""
        return self.op.partition(".")[0]

    def is_peer(self) -> bool:
        """Whether none of our code is measured."""
        return not self.provider.startswith(OWN_CODE)

    def key(self) -> tuple[Any, ...]:
        """Identity across runs."""
        return (*self.question(), str(self.params.get("chunks", "")), self.provider)

    def who(self) -> str:
        """The provider, and into how many chunks it was told to cut."""
        return self.provider + (f" chunks={self.params['chunks']}" if "chunks" in self.params else "")

    def label(self) -> str:
        """The question in words."""
        params = [f"{k}={v}" for k, v in self.params.items() if k != "chunks"]
        parts = [self.op, self.direction, "x".join(map(str, self.shape)), self.dtype, *params]
        if self.ranks > 1:
            parts.append(f"{self.ranks} ranks")
        return " ".join(filter(None, parts))


_SPELLED = {f.name: f.type for f in dataclasses.fields(Row)}
_TYPES = get_type_hints(Row)


def _is(value: Any, kind: Any) -> bool:
    """Whether what JSON gave is of an annotated type of :class:`Row`."""
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if origin is UnionType:
        return any(_is(value, one) for one in inside)
    if origin is list:
        return isinstance(value, list) and all(_is(one, inside[0]) for one in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(one, inside[1]) for one in value.values())
    return type(value) is kind or (kind is float and type(value) is int)  # exactly: True is no whole number


def _what_is_wrong(found: dict[str, Any]) -> str | None:
    """What of the fields was expected and what came; None where nothing is wrong."""
    for name, value in found.items():
        if not _is(value, _TYPES[name]):
            return f"{name}: expected {_SPELLED[name]}, got {reprlib.repr(value)}"
    status = found.get("status", "ok")
    if status not in STATUSES:
        return f"status: expected one of {', '.join(STATUSES)}, got {status!r}"
    times = [found.get(name) for name in ("p20_ms", "p50_ms", "p80_ms")]
    if times != [None] * 3 and (None in times or not 0 < times[0] <= times[1] <= times[2] < float("inf")):
        return f"p20_ms, p50_ms, p80_ms: expected positive times in this order or none of them, got {times}"
    return None


def parse_row(text: str, where: str) -> Row:
    """One line of a file.

    Raises:
        BenchError: not JSON, or not a row of this schema.
    """
    advice = "delete the file, or restore it, or measure again with --save"
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise BenchError(f"{where}: damaged, not JSON ({error.msg} at column {error.colno}): {advice}") from None
    if not isinstance(found, dict) or not {"op", "provider"} <= found.keys():
        raise BenchError(f"{where}: not a line of a results file (no op and provider): {advice}")
    unknown = sorted(found.keys() - _TYPES.keys())
    if unknown:
        raise BenchError(f"{where}: fields of another schema ({', '.join(unknown)}): {advice}")
    wrong = _what_is_wrong(found)
    if wrong is not None:
        raise BenchError(f"{where}: {wrong}: {advice}")
    return Row(**found)


def load(path: Path) -> list[Row]:
    """The rows of a file, or of all ``*.jsonl`` in a folder; of rows with the same identity the latest.

    Raises:
        BenchError: nothing there, or damaged.
    """
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise BenchError(f"{path}: no *.jsonl file in this folder: measure first, with --save {path}")
    elif path.is_file():
        files = [path]
    else:
        raise BenchError(f"{path}: no such file or folder: name what --save wrote")
    rows: dict[tuple[Any, ...], Row] = {}
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"{file}: cannot be read as a results file ({error})") from None
        if not any(line.strip() for line in lines):
            raise BenchError(f"{file}: empty: delete it, or measure again with --save")
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = parse_row(line, f"{file}:{number}")
                known = rows.get(row.key())
                if known is None or known.time <= row.time:
                    rows[row.key()] = row
    return list(rows.values())


def check_writable(folder: Path) -> None:
    """Before anything is measured.

    Raises:
        BenchError: results could not be saved there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BenchError(f"--save {folder}: cannot be written to ({error.strerror}): name another folder") from None


def write_atomically(path: Path, content: str | bytes) -> None:
    """All of it or nothing: a temporary file beside it, then a rename."""
    raw = content.encode() if isinstance(content, str) else content
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save(path: Path, rows: Iterable[Row]) -> None:
    """JSON lines, each field in the schema's order."""
    write_atomically(path, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
