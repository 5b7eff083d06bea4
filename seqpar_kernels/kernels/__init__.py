"""Kernel backends and the choice among them.

Every backend is a module with the functions of :mod:`.reference` and ``unavailable(device) -> str | None``, the reason
why it cannot run there. It may also have ``NormForward`` and ``NormBackward`` as :mod:`.native` does: the norm's two
functions prepared for one kind of call, for calls so small that host time matters.
"""

import functools
import importlib
from typing import cast

import torch

from ..strict import refuse
from .spec import (
    Backend,
    NormGiven,
    NormGrads,
    NormKind,
    NormOutputs,
    NormSpec,
    NormStores,
    NormTensors,
    NormWants,
    RowMap,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "NormGiven",
    "NormGrads",
    "NormKind",
    "NormOutputs",
    "NormSpec",
    "NormStores",
    "NormTensors",
    "NormWants",
    "RowMap",
    "choice",
    "remark",
    "select",
    "why_not",
]

# name -> (module, the device type that it needs)
BACKENDS: dict[str, tuple[str, str | None]] = {
    "native": ("native", None),
    "cpu": ("native", "cpu"),
    "cuda": ("native", "cuda"),
    "triton": ("triton_norm", None),
    "reference": ("reference", None),
}


def why_not(backend: str, device: torch.device) -> str | None:
    """The reason why ``backend`` cannot run on ``device``; None when it can."""
    name, device_type = BACKENDS[backend]
    if device_type is not None and device.type != device_type:
        return f"it runs on {device_type} tensors, these are on {device.type}"
    if name == "reference":
        return None
    try:
        module = importlib.import_module(f".{name}", __name__)
    except ImportError as error:
        return str(error)
    reason: str | None = module.unavailable(device)
    return reason


def remark(backend: str, device: torch.device) -> str | None:
    """A remark on a ``backend`` that can run on ``device``."""
    module = importlib.import_module(f".{BACKENDS[backend][0]}", __name__)
    said: str | None = module.remark(device) if hasattr(module, "remark") else None
    return said


@functools.cache
def choice(device: torch.device) -> tuple[str | None, dict[str, str]]:
    """The backend that runs on ``device`` by default (None: none can), and why each preferred one cannot."""
    passed_over: dict[str, str] = {}
    for candidate in ["native", "triton"] if device.type != "cpu" else ["native"]:
        reason = why_not(candidate, device)
        if reason is None:
            return candidate, passed_over
        passed_over[candidate] = reason
    return None, passed_over


@functools.cache
def _select(backend: str, device: torch.device) -> Backend:
    if backend:
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {sorted(BACKENDS)} or None, got {backend!r}")
        reason = why_not(backend, device)
        if reason is not None:
            raise RuntimeError(f"backend: {backend!r} cannot run here: {reason}")
        return cast(Backend, importlib.import_module(f".{BACKENDS[backend][0]}", __name__))
    chosen, reasons = choice(device)
    if chosen is not None:
        if reasons:
            missing = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items())
            refuse(f"kernels on {device} are {chosen}'s", f"{missing}; backend={chosen!r} asks for them")
        return _select(chosen, device)
    raise RuntimeError(
        f"no fused kernel can run on {device}: "
        + "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        + "; backend='reference' runs anywhere, slowly"
    )


def select(backend: str | None, device: torch.device) -> Backend:
    """The backend module for tensors on ``device``: ``backend`` if given, else the compiled kernels, else Triton's.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend cannot run there, with the reason.
    """
    return _select(backend or "", device)
