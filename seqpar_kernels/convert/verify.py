"""``verify(model, reference, batch)``: a converted model beside the unsharded one, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .conversion import conversion_of
from .verify_compare import Measure, compare
from .verify_ranks import Ranks, fingerprint
from .verify_reference import Reference, some, with_weights
from .verify_report import Verification
from .verify_run import LossFn, Run, run, untouched, without_dropout


def verify(
    model: nn.Module,
    reference: nn.Module | Callable[[], nn.Module] | None,
    batch: Any,
    *,
    loss_fn: LossFn | None = None,
    tolerance: float | None = None,
    fp64: bool | None = None,
    rows: int = 10,
    verbose: bool = True,
    raise_on_mismatch: bool = False,
) -> Verification:
    """Compare loss, outputs and every gradient of a converted model with those of the unsharded model.

    A collective call: every rank of the group calls it with the same batch (with fully_shard, all data-parallel ranks
    too, with that same batch). Both models run forward and backward in the modes (training, evaluation) that ``model``
    is in, with dropout at 0; a reference that still draws random numbers lets both run in evaluation mode. Afterwards
    gradients, buffers, random states, modes and dropout are as before. Hooks that run behind the accumulation of a
    gradient (optimizers in the backward) do not run.

    The reference runs on the group's first rank alone. That rank needs memory for the whole model, its gradients and
    activations, and for 4 times the weights more (in fp32) where it is run in fp64 too; the others for one whole tensor
    at a time.

    Args:
        model: as :func:`parallelize` returned it, also compiled, also after ``fully_shard``.
        reference: the same model unconverted, with the same weights; or a callable without arguments that makes such
            a model, into which the weights of ``model`` are loaded. Only the first rank's is used: others may pass
            None.
        batch: a mapping (keyword arguments), a tuple (positional ones) or a tensor; a list of these are micro-batches,
            whose gradients add up.
        loss_fn: ``loss_fn(output, batch)`` -> scalar. None: ``output.loss``, or the first of a tuple.
        tolerance: the largest error that passes, in units of the largest magnitude of each tensor of the reference.
            None: twice the reference's own error against a run of it in fp64, where that is done, else ``TOLERANCES``.
        fp64: whether to run the reference in fp64 too; None: if it has at most ``MOST_IN_FP64`` parameters.
        rows: how many rows the table shows.
        verbose: print the table, on the first rank of the group.
        raise_on_mismatch: raise where something differs.

    Returns:
        Verification: the same on every rank; ``.ok``, ``.rows``, ``.worst``, ``.raise_if_wrong()``.

    Raises:
        ValueError: an argument that does not fit, other weights in ``reference``, other batches on other ranks.
        RuntimeError: one of the models raised (the converted one: its refusal), or with ``raise_on_mismatch`` a
            difference. Both are raised on all ranks.

    Examples:
        >>> import copy, torch, seqpar_kernels as sp
        >>> plain = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 32))
        >>> model = sp.parallelize(copy.deepcopy(plain), None, {"0": "scatter_input+norm", "1": "colwise"})
        >>> found = sp.verify(
        ...     model, plain, torch.randn(2, 8, 16), loss_fn=lambda out, batch: out.square().mean(), verbose=False
        ... )
        >>> found.ok
        True
    """
    inner = getattr(model, "_orig_mod", model)  # the model that torch.compile has wrapped
    conversion = conversion_of(inner)
    if conversion.context is not None:
        raise ValueError(
            "model: verify compares whole outputs, and with context_parallel each rank has those of its rows; compare "
            "the loss, gather_full_gradients(model) and unshard_sequence(logits, ...) with the unsharded model's"
        )
    ranks = Ranks(inner, conversion)
    batches = ranks.together("verify: ", lambda: _checked(ranks, reference, batch, loss_fn, tolerance, fp64, rows))
    kinds = ranks.everyone(fingerprint(batches))
    others = [rank for rank, found in kinds if found != kinds[0][1]]
    if others:
        raise ValueError(
            f"batch: expected the same on every rank, but rank {others[0]} has another than rank {kinds[0][0]}: seed "
            "the loaders alike, or broadcast the batch"
        )
    plain = with_weights(inner, conversion, ranks, reference)
    whole = None if plain is None else Reference(plain, inner, batches, loss_fn)
    training, evaluated = inner.training, False

    def unsharded() -> Run:
        assert whole is not None
        return whole.run(evaluated)

    expected = ranks.together("verify: the reference raised: ", unsharded, alone=True)
    if training and ranks.from_first(None if expected is None else expected.drew):
        evaluated = True
        expected = ranks.together("verify: the reference raised: ", unsharded, alone=True)

    def measured() -> tuple[Measure, torch.dtype]:
        assert whole is not None and expected is not None
        return whole.measure(expected, tolerance, fp64, evaluated), whole.dtype()

    def converted() -> Run:
        with untouched(inner):
            if evaluated:
                inner.eval()
            without_dropout(inner)
            return run(inner, batches, loss_fn, call=model)

    measure = ranks.together("verify: the reference raised in fp64: ", measured, alone=True)
    got = ranks.together("verify: the converted model raised: ", converted)
    found = compare(inner, conversion, ranks, measure and measure[0], got)
    text, dtype = ranks.from_first(measure and (measure[0].text, measure[1]))
    mode = "evaluation mode" if evaluated or not training else "training mode, dropout at 0"
    size = 1 if ranks.group is None else ranks.group.size()
    title = f"verify {type(inner).__name__}: {size} rank{'s' if size > 1 else ''}"
    if ranks.rows is not None:
        title += f" x {ranks.rows.size()} data-parallel"
    title += f", {str(dtype).removeprefix('torch.')}, {mode}"
    notes = [f"{text}; both in units of the largest magnitude of the tensor"]
    if evaluated:
        notes.append("in evaluation mode: in training mode the reference draws random numbers, with dropout at 0 too")
    left_out = got.left_out | ranks.from_first(None if expected is None else expected.left_out)
    if left_out:
        notes.append(f"not compared: {', '.join(sorted(left_out))}, each rank's own")
    without = [name for name, _ in inner.named_parameters() if name not in {row.name for row in found}]
    if without:
        notes.append(f"no gradient on either side: {some(without)}")
    result = Verification(title, found, tuple(notes), rows)
    if verbose and ranks.first and (ranks.rows is None or ranks.rows.rank() == 0):
        print(result, flush=True)
    if raise_on_mismatch:
        result.raise_if_wrong()
    return result


def _checked(ranks: Ranks, reference: Any, batch: Any, loss_fn: Any, tolerance: Any, fp64: Any, rows: Any) -> list[Any]:
    """Check the arguments; returns the micro-batches."""
    if reference is None and ranks.first:
        raise ValueError("reference: expected a module, or a callable that makes one, on the group's first rank")
    if reference is not None and not callable(reference):
        raise ValueError(f"reference: expected a module, or a callable that makes one, got {type(reference).__name__}")
    if loss_fn is not None and not callable(loss_fn):
        raise ValueError(f"loss_fn: expected loss_fn(output, batch) -> scalar, or None, got {loss_fn!r}")
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and 0 < tolerance < math.inf):
        raise ValueError(f"tolerance: expected a positive number or None, got {tolerance!r}")
    if fp64 not in (None, True, False):
        raise ValueError(f"fp64: expected True, False or None, got {fp64!r}")
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise ValueError(f"rows: expected a positive int, got {rows!r}")
    batches = batch if isinstance(batch, list) else [batch]
    for one in batches:
        if not isinstance(one, (Mapping, tuple, Tensor)):
            raise ValueError(
                "batch: expected a mapping, a tuple or a tensor, or a list of these as micro-batches, got "
                f"{type(one).__name__}{' in the list' if isinstance(batch, list) else ''}"
            )
    if not batches:
        raise ValueError("batch: expected at least one micro-batch, got an empty list")
    return batches
