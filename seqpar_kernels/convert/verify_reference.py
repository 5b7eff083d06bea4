"""The unsharded model that :func:`seqpar_kernels.verify` compares with: its weights, its runs, its rounding."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from .conversion import Conversion
from .state import _whole
from .verify_compare import Measure, difference, local, named
from .verify_ranks import Ranks, checksum, differing
from .verify_run import LossFn, Run, device_of, run, same_random_numbers, untouched, without_dropout

#: Tolerances without a run in fp64, by the coarsest dtype of the parameters. That of fp64 is wide because models
#: compute parts in fp32 (Transformers' norms and losses do).
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: Models of at most this many parameters also run in fp64 by default.
MOST_IN_FP64 = 1 << 26


@torch.no_grad()
def with_weights(model: nn.Module, conversion: Conversion, ranks: Ranks, reference: Any) -> nn.Module | None:
    """The reference, checked on first ranks to have the weights of ``model``; None on other ranks."""

    def made() -> nn.Module:
        plain = reference
        if not isinstance(reference, nn.Module):
            with same_random_numbers(device_of(model)):
                plain = reference()
        if not isinstance(plain, nn.Module):
            raise ValueError(f"reference: expected the callable to return a module, got {type(plain).__name__}")
        plain = getattr(plain, "_orig_mod", plain)  # the model that torch.compile has wrapped
        made_by = getattr(plain, "_seqpar", None)
        if plain is model or (made_by is not None and made_by.region.group is not None):
            raise ValueError(
                "reference: expected the model as it was before parallelize, got a parallelized one; give a callable "
                "that makes the plain model, or copy.deepcopy(model) from before"
            )
        return plain

    plain = ranks.together("verify: ", made, alone=True)
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    cuts = conversion.cuts
    replicas = [name for name in state if name not in cuts or cuts[name].spec is None]
    sums = ranks.neighbours([checksum(local(state[name])) for name in replicas])
    apart = [f"{name} (rank {rank})" for name, rank in differing(replicas, sums)]
    apart = sorted({text for _, texts in ranks.everyone(apart) for text in texts})
    if apart:
        raise ValueError(
            f"model: the ranks hold different values of what is whole on each: {some(apart)}; load the same weights on "
            "all of them"
        )
    load = plain is not None and not isinstance(reference, nn.Module)
    if load:
        _made_alike(plain, model, state)
    theirs = {} if plain is None else plain.state_dict()
    differ: list[str] = []
    for name, tensor in state.items():
        # One at a time, so that other ranks hold no whole model.
        full = _whole(tensor, cuts.get(name), conversion.region.group)
        if plain is None:
            continue
        other = theirs.pop(name, None)
        if other is None:
            differ.append(f"{name} (not in the reference)")
        elif other.shape != full.shape or other.dtype != full.dtype:
            differ.append(f"{name} ({other.dtype} {tuple(other.shape)}, not {full.dtype} {tuple(full.shape)})")
        elif load:
            other.copy_(full)
        elif not torch.equal(other.to(full.device), full):
            differ.append(name)

    def same() -> None:
        found = [*differ, *(f"{name} (not in the converted model)" for name in theirs)]
        if found:
            raise ValueError(
                f"reference: expected the weights of the converted model, {len(found)} differ: {some(found)}; give "
                "a callable that makes the plain model, and the weights are loaded into it"
            )

    ranks.together("verify: ", same, alone=True)
    return plain


def _made_alike(plain: nn.Module, model: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a new reference the device, the dtypes and the frozen parameters of ``model``."""
    plain.to(device_of(model))
    trained = {name: param.requires_grad for name, param in model.named_parameters()}
    for name, param in plain.named_parameters():
        if name in state and param.dtype != state[name].dtype:
            param.data = param.data.to(state[name].dtype)
        param.requires_grad_(trained.get(name, param.requires_grad))


def some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@torch.no_grad()
def _sensitivity(plain: nn.Module, gradients: dict[str, Tensor]) -> float:
    """The root of the sum of (gradient * weight)^2: by that the loss moves when weights are rounded independently."""
    params = dict(plain.named_parameters())
    parts = [(grad.double() * params[name].double()).square().sum().item() for name, grad in gradients.items()]
    return math.sqrt(math.fsum(parts))


class Reference:
    """Runs the reference on first ranks, in the modes of ``model``."""

    def __init__(self, plain: nn.Module, model: nn.Module, batches: list[Any], loss_fn: LossFn | None):
        self._plain, self._batches, self._loss_fn = plain, batches, loss_fn
        self._modes = {name: module.training for name, module in model.named_modules()}

    def run(self, evaluated: bool) -> Run:
        return self._run(self._plain, evaluated, None)

    def _run(self, plain: nn.Module, evaluated: bool, dtype: torch.dtype | None) -> Run:
        with untouched(plain):
            for name, module in plain.named_modules():
                module.training = self._modes.get(name, module.training) and not evaluated
            without_dropout(plain)
            found = run(plain, self._batches, self._loss_fn, dtype=dtype)
            found.sensitivity = _sensitivity(plain, found.gradients)
            return found

    def dtype(self) -> torch.dtype:
        """The coarsest dtype of the parameters, which decides the tolerance."""
        device = device_of(self._plain).type
        used = {param.dtype for param in self._plain.parameters() if param.dtype in TOLERANCES}
        if torch.is_autocast_enabled(device):
            used.add(torch.get_autocast_dtype(device))
        return max(used or {torch.float32}, key=lambda dtype: TOLERANCES[dtype])

    def measure(self, expected: Run, tolerance: float | None, fp64: bool | None, evaluated: bool) -> Measure:
        """The Measure for the converted model."""
        dtype = self.dtype()
        name = str(dtype).removeprefix("torch.")
        if tolerance is not None:
            return Measure(
                expected, None, tolerance, f"error: against the reference; tolerance: {tolerance:g}, as given"
            )
        flat = TOLERANCES[dtype]
        usual = f"error: against the reference; tolerance: {flat:g}, the default for {name}"
        size = sum(param.numel() for param in self._plain.parameters())
        if fp64 is False or dtype == torch.float64:
            return Measure(expected, None, flat, usual)
        if fp64 is None and size > MOST_IN_FP64:
            text = f"{usual} ({size / 1e6:.0f} million parameters: not run in fp64 unless asked)"
            return Measure(expected, None, flat, text)
        try:
            oracle = copy.deepcopy(self._plain).double()
            device = device_of(oracle).type
            with torch.autocast(device, enabled=False):
                run64 = self._run(oracle, evaluated, torch.float64)
        except Exception as error:
            if fp64:
                raise
            reason = f"{type(error).__name__}: {str(error)[:80]}"
            return Measure(expected, None, flat, f"{usual} (the reference does not run in fp64: {reason})")
        found, exact = named(expected), named(run64)
        if any(key not in exact or exact[key].shape != tensor.shape for key, tensor in found.items()):
            return Measure(expected, None, flat, f"{usual} (in fp64 the reference returns something else)")
        own = {key: difference(tensor, exact[key]) for key, tensor in found.items()}
        text = f"error: against the reference in fp64; tolerance: twice that of the reference in {name}"
        return Measure(run64, own, torch.finfo(dtype).eps, text)
