"""Runs forward and backward of a model, keeps the results, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LossFn = Callable[[Any, Any], Tensor]
#: Outputs that hold this rank's own heads for the model's next call.
OWN_OUTPUTS = ("past_key_values",)


@dataclass
class Run:
    """The results of one model for all micro-batches."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, Tensor] = field(default_factory=dict)
    # As each parameter holds it; parameters without one are left out.
    gradients: dict[str, Tensor] = field(default_factory=dict)
    input_gradients: dict[str, Tensor] = field(default_factory=dict)
    # How far a loss moves, by unit of relative rounding of the trained weights. No loss is known better than that.
    sensitivity: float = 0.0
    left_out: set[str] = field(default_factory=set)
    drew: bool = False  # whether forward or backward drew random numbers


def run(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFn | None,
    *,
    call: Callable[..., Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Run:
    """Run forward and backward of every batch, and add up the gradients. Call it inside :func:`untouched`.

    ``call`` is called in place of ``model``, and uses its parameters. Floating-point inputs are cast to ``dtype``.
    """
    found = Run()
    device = device_of(model)
    before = _generators(device)
    for number, given in enumerate(batches):
        prefix = f"batch {number}: " if len(batches) > 1 else ""
        batch = _own_copy(given, device, dtype)
        with torch.enable_grad():
            output = _call(model if call is None else call, batch)
            loss = _loss(output, batch, loss_fn)
        for name, tensor in named_outputs(output, found.left_out):
            if tensor is not loss:
                found.outputs[prefix + name] = tensor.detach()
        found.losses[f"{prefix}loss"] = loss.detach()
        loss.backward()
        for name, tensor in named_outputs(batch, set()):
            if tensor.grad is not None:
                found.input_gradients[prefix + name] = tensor.grad
    found.gradients = {name: g for name, param in model.named_parameters() if (g := _gradient(param)) is not None}
    found.drew = any(not torch.equal(a, b) for a, b in zip(before, _generators(device), strict=True))
    return found


def named_outputs(value: Any, left_out: set[str], name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every floating-point tensor in an output; names of caches go to ``left_out``."""
    dot = f"{name}." if name else ""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name or "output", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key in OWN_OUTPUTS:
                left_out.add(key)
            else:
                yield from named_outputs(item, left_out, f"{dot}{key}")
    elif isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", range(len(value)))
        for key, item in zip(names, value, strict=True):
            yield from named_outputs(item, left_out, f"{dot}{key}")
    elif is_dataclass(value):
        for entry in fields(value):
            yield from named_outputs(getattr(value, entry.name), left_out, f"{dot}{entry.name}")
    elif value is not None and not isinstance(value, (str, int, float, bool)):
        left_out.add(f"{name or 'output'} ({type(value).__name__})")


def _call(model: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _loss(output: Any, batch: Any, loss_fn: LossFn | None) -> Tensor:
    """
    Raises:
        ValueError: there is none, or it is no scalar with a gradient.
    """
    loss: Any
    if loss_fn is not None:
        loss, where = loss_fn(output, batch), "loss_fn: expected it to return"
    else:
        where = "loss_fn: the model's output has none of its own; give loss_fn(output, batch) that returns"
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None and isinstance(output, tuple) and output:
            loss = output[0]
        if loss is None and isinstance(output, Tensor):
            loss = output
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        got = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"{where} a scalar tensor, got {got}")
    if not loss.requires_grad:
        raise ValueError(f"{where} a loss with a gradient; no parameter that it depends on is trainable")
    return loss


def _own_copy(batch: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A copy of ``batch`` that a forward may change. Inputs keep ``requires_grad``."""

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        to = dtype if leaf.is_floating_point() else None
        return leaf.detach().to(device, to, copy=True).requires_grad_(leaf.requires_grad)

    if isinstance(batch, Mapping):
        return {key: tree_map(copied, value) for key, value in batch.items()}
    return tree_map(copied, batch)


def _gradient(param: Any) -> Tensor | None:
    """The gradient; by Megatron's convention ``main_grad``, if the parameter's own is None or a placeholder."""
    plain = _plain(param)
    main: Tensor | None = getattr(plain, "main_grad", None)
    if main is not None and (param.grad is None or getattr(plain, "grad_added_to_main_grad", False)):
        return main
    return param.grad


def _plain(param: Any) -> Any:
    """The tensor that autograd knows behind a listed parameter."""
    return getattr(param, "part", param)


def device_of(model: nn.Module) -> torch.device:
    return next((param.device for param in model.parameters()), torch.device("cpu"))


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if device.type not in ("cpu", "meta"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextlib.contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore all generators afterwards. Ranks with different states would draw different dropout masks."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    devices = [] if device.type in ("cpu", "meta") else [device]
    kind = {"device_type": device.type} if devices else {}
    try:
        with torch.random.fork_rng(devices, **kind):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore afterwards what a forward, a backward, :func:`without_dropout` or ``train`` change inside.

    Gradients are None at the start. Hooks behind their accumulation do not run: they step optimizers, or count steps.
    """
    device = device_of(model)
    params = list(model.parameters())
    gradients = [param.grad for param in params]
    plain = [_plain(param) for param in params]
    hooks = [getattr(param, "_post_accumulate_grad_hooks", None) or {} for param in plain]
    kept_hooks = [dict(found) for found in hooks]
    marks = [{k: v for k, v in vars(p).items() if k in ("main_grad", "grad_added_to_main_grad")} for p in plain]
    buffers = [(m, dict(m._buffers), {k: _copy(v) for k, v in m._buffers.items()}) for m in model.modules()]
    modes = [(module, module.training) for module in model.modules()]
    rates = list(_dropout_rates(model))
    try:
        with same_random_numbers(device):
            for param, found, mark in zip(params, hooks, marks, strict=True):
                param.grad = None
                found.clear()
                if mark.get("main_grad") is not None:
                    _plain(param).main_grad = torch.zeros_like(mark["main_grad"])
                if "grad_added_to_main_grad" in mark:
                    _plain(param).grad_added_to_main_grad = False
            yield
    finally:
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        for found, kept in zip(hooks, kept_hooks, strict=True):
            found.update(kept)
        for param, mark in zip(plain, marks, strict=True):
            vars(param).update(mark)
        for module, held, values in buffers:
            module._buffers.clear()
            module._buffers.update(held)
            for name, value in values.items():
                buffer = held[name]
                if value is not None and buffer is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)
        for module, mode in modes:
            module.training = mode
        for owner, name, rate in rates:
            setattr(owner, name, rate)


def _copy(buffer: Tensor | None) -> Tensor | None:
    return None if buffer is None else buffer.detach().clone()


def without_dropout(model: nn.Module) -> bool:
    """Set every dropout probability to 0; returns whether there was one. :func:`untouched` restores them."""
    rates = list(_dropout_rates(model))
    for owner, name, _ in rates:
        setattr(owner, name, 0.0)
    return bool(rates)


def _dropout_rates(model: nn.Module) -> Iterator[tuple[Any, str, float]]:
    """Yield (owner, attribute, value) of ``p`` of dropout modules, and of numbers that are called dropout."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        owners[id(module)] = module
        config = vars(module).get("config")
        if hasattr(config, "__dict__"):
            owners[id(config)] = config
    for owner in owners.values():
        for name, value in list(vars(owner).items()):
            named = "drop" in name or (name == "p" and isinstance(owner, nn.Module) and "drop" in _kind(owner))
            if named and type(value) is float and 0.0 < value <= 1.0:
                yield owner, name, value


def _kind(owner: nn.Module) -> str:
    return " ".join(kind.__name__ for kind in type(owner).__mro__).lower()
