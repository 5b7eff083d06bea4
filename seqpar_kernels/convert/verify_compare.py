"""Compares the results of a converted model with the reference's: errors, tolerances, verdicts."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .conversion import Conversion
from .dtensor_params import Cut, first_row_of
from .verify_ranks import Ranks, checksum
from .verify_report import VerifyRow
from .verify_run import Run, device_of

Key = tuple[str, str]  # (what, name)
# A gradient may consist of rounding only: the softmax ignores the bias of keys. So no gradient is measured in smaller
# units than this part of the largest gradient of the model.
_LEAST_MAGNITUDE = 1e-3
_FEW = 32


class Measure(NamedTuple):
    """What a converted model is compared with, and the error that passes.

    Attributes:
        exact: the run to compare with: the reference's in fp64, or its own.
        own: the errors of the reference against its run in fp64; None without such a run.
        flat: the tolerance if ``own`` is None, else the rounding of a result.
        text: for the table.
    """

    exact: Run
    own: dict[Key, float] | None
    flat: float
    text: str


class _Entry(NamedTuple):
    """One tensor of the reference, as the first rank describes it to the others."""

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: float
    tolerance: float


def named(found: Run) -> dict[Key, Tensor]:
    """(what, name) -> tensor, of everything that is compared."""
    kinds = {
        "loss": found.losses,
        "output": found.outputs,
        "gradient": found.gradients,
        "input gradient": found.input_gradients,
    }
    return {(what, name): tensor for what, tensors in kinds.items() for name, tensor in tensors.items()}


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite if one of the two is not finite."""
    if not got.numel():
        return 0.0
    found = (got.double() - expected.double()).abs().amax().item()
    return found if math.isfinite(found) else math.inf


def compare(
    model: nn.Module, conversion: Conversion, ranks: Ranks, measure: Measure | None, got: Run
) -> tuple[VerifyRow, ...]:
    """A row for every tensor of either model, the same rows on every rank. First ranks pass ``measure``."""
    theirs = {} if measure is None else named(measure.exact)
    entries = ranks.from_first(None if measure is None else _entries(theirs, measure))
    mine = named(got)
    params = dict(model.named_parameters())
    device = device_of(model)
    rows, sums = [], []
    for entry in entries:
        what, name = entry.key
        whole = ranks.sent(theirs.get(entry.key), entry.shape, entry.dtype, device)
        tensor = mine.pop(entry.key, None)
        cut = conversion.cuts.get(name) if what == "gradient" else None
        if tensor is None:
            rows.append(_absent(entry, whole, conversion.loss is not None, ranks.number))
        else:
            part = _part(params[name], cut, whole) if what == "gradient" else whole
            rows.append(_judged(entry, local(tensor), part, ranks.number))
        replicated = cut is None or cut.spec is None
        sums.append(checksum(local(tensor)) if tensor is not None and replicated else None)
    # Tensors that the reference does not have, on any rank.
    for what, name in sorted({key for _, keys in ranks.everyone(list(mine)) for key in keys}):
        tensor = mine.get((what, name))
        if tensor is None or not bool(local(tensor).any()):
            rows.append(VerifyRow(name, what, math.nan, math.nan, "ok", ranks.number, "zeros; none in the reference"))
        else:
            note = f"the reference has no such {what}"
            rows.append(VerifyRow(name, what, math.nan, math.nan, "extra", ranks.number, note))
        sums.append(None)
    apart = _apart(ranks.neighbours(sums), len(rows))
    found = ranks.everyone((rows, apart))
    merged = []
    for index in range(len(rows)):
        row = max((theirs[index] for _, (theirs, _) in found), key=lambda row: (row.verdict != "ok", row.share))
        differs = any(flags[index] for _, (_, flags) in found)
        if differs and row.verdict == "ok" and device.type == "cpu":
            row = replace(
                row, verdict="ranks differ", note="within the tolerance, but other bits than on the first rank"
            )
        elif differs:  # a GPU sums by atomics, so no two runs agree
            row = replace(row, note=f"{row.note}{'; ' if row.note else ''}the bits differ between the ranks")
        merged.append(row)
    return tuple(merged)


def _entries(theirs: dict[Key, Tensor], measure: Measure) -> list[_Entry]:
    """The scale of every tensor of the reference, and its tolerance in units of the scale."""
    largest = {key: difference(tensor, torch.zeros_like(tensor)) for key, tensor in theirs.items()}
    gradients = [size for (what, _), size in largest.items() if what == "gradient" and size < math.inf]
    least = _LEAST_MAGNITUDE * max(gradients, default=0.0)
    # A loss may cancel to nearly nothing; it is then a difference of numbers that were rounded.
    smallest = {"gradient": least, "loss": measure.exact.sensitivity}
    scales = {key: max(size, smallest.get(key[0], 0.0)) for key, size in largest.items()}
    scales = {key: scale if 0 < scale < math.inf else 1.0 for key, scale in scales.items()}
    tolerances = dict.fromkeys(theirs, measure.flat)
    if measure.own is not None:
        # Some tensors are nearer to fp64 than most by chance, so each may have the median error. The error of a few
        # numbers tells little about the next run, so such a tensor may have twice the largest error.
        own = {key: error / scales[key] for key, error in measure.own.items() if error < math.inf}
        for key, tensor in theirs.items():
            kind = "gradient" if key[0].endswith("gradient") else "output"
            others = [error for (what, _), error in own.items() if what == kind] or [0.0]
            usual = statistics.median(others) if tensor.numel() >= _FEW else 2 * max(others)
            tolerances[key] = 2 * (max(own.get(key, 0.0), usual) + measure.flat)
    return [_Entry(k, tuple(tensor.shape), tensor.dtype, scales[k], tolerances[k]) for k, tensor in theirs.items()]


def _judged(entry: _Entry, got: Tensor, expected: Tensor, rank: int) -> VerifyRow:
    what, name = entry.key
    if got.shape != expected.shape:
        note = f"expected {tuple(expected.shape)}, got {tuple(got.shape)}"
        return VerifyRow(name, what, math.inf, entry.tolerance, "wrong", rank, note)
    error = difference(got, expected.to(got.device)) / entry.scale
    note = "not finite" if error == math.inf else ""
    return VerifyRow(name, what, error, entry.tolerance, "ok" if error <= entry.tolerance else "wrong", rank, note)


def _absent(entry: _Entry, whole: Tensor, hidden: bool, rank: int) -> VerifyRow:
    """The row of a tensor that the converted model does not have."""
    what, name = entry.key
    if what == "output" and hidden:
        note = "does not exist in the converted model, as loss_parallel says"
        return VerifyRow(name, what, math.nan, entry.tolerance, "ok", rank, note)
    if bool(whole.any()):
        return VerifyRow(
            name, what, math.nan, entry.tolerance, "missing", rank, f"the converted model has no such {what}"
        )
    return VerifyRow(name, what, math.nan, entry.tolerance, "ok", rank, "zeros in the reference; none here")


def _apart(found: list[tuple[int, list[int | None]]], count: int) -> list[bool]:
    """For each row, whether its bits differ between the ranks."""
    columns = ([sums[index] for _, sums in found if sums[index] is not None] for index in range(count))
    return [len(set(column)) > 1 for column in columns]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _part(param: Any, cut: Cut | None, whole: Tensor) -> Tensor:
    """This rank's part of a whole gradient."""
    part = whole if cut is None or cut.spec is None else cut.part(whole)
    if isinstance(param, DTensor) and param.device_mesh.ndim == 2:  # fully_shard keeps some of its rows
        start = first_row_of(param, part.shape[0])
        part = part[start : start + param._local_tensor.shape[0]]
    return part
