"""Counts the bytes that autograd keeps for the backward, and computes those of Korthikanti et al. 2022."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .ops.remake import Held


@dataclass
class ActivationReport:
    """Bytes autograd keeps after one forward.

    Attributes:
        total: bytes, each storage once, parameters and buffers left out.
        by_module: path of class names of the running module -> bytes that are first kept in its forward.
        result: what ``fn`` returned; its graph holds the bytes.
    """

    total: int = 0
    by_module: dict[str, int] = field(default_factory=dict)
    result: Any = None

    def beside_paper(self, s: int, b: int, h: int, a: int, t: int = 1, layers: int = 1) -> str:
        """A table: bytes a layer measured, and those of the paper (:func:`paper_bytes_per_layer`), also in sbh/t."""
        unit = s * b * h / t
        paper = {
            "unsharded": paper_bytes_per_layer(s, b, h, a),
            "TP": paper_bytes_per_layer(s, b, h, a, t),
            "TP + SP": paper_bytes_per_layer(s, b, h, a, t, sequence_parallel=True),
            "TP + SP + selective": paper_bytes_per_layer(s, b, h, a, t, sequence_parallel=True, selective=True),
        }
        rows = {"measured": self.total / layers, **{f"paper, 16 bit: {name}": size for name, size in paper.items()}}
        return "\n".join(f"{name:<36} {size:>16,.0f} bytes {size / unit:>8.1f} sbh/t" for name, size in rows.items())

    def __str__(self) -> str:
        rows = sorted(self.by_module.items(), key=lambda item: -item[1])
        width = max((len(name) for name, _ in rows), default=5)
        lines = [f"{name.ljust(width)}  {size:>14,}" for name, size in [*rows, ("total", self.total)]]
        return "\n".join(lines)


def activation_bytes(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> ActivationReport:
    """Call ``fn(*args, **kwargs)`` and count the bytes autograd saved for its backward.

    Every storage counts once, however many views of it are saved; parameters and buffers of modules do not count.
    Inputs that autograd keeps do. What a converted linear lets go since it makes it again does not
    (``parallelize(recompute=)``).

    Returns:
        ActivationReport: ``total``, ``by_module``, ``result``.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> layer = torch.nn.Linear(16, 32)
        >>> report = sp.activation_bytes(layer, torch.randn(8, 16))
        >>> report.total  # the input: 8 * 16 floats
        512
    """
    report = ActivationReport()
    not_counted: set[int] = set()
    # (what a node keeps, where it began, its storages; none once it has let them go). Held until the end: a new
    # storage could get the address of a freed one.
    kept: list[tuple[weakref.ref[Held], str, list[torch.UntypedStorage]]] = []
    stack: list[str] = []

    def pack(tensor: Tensor) -> Held:
        base = tensor._base if tensor._base is not None else tensor
        if isinstance(base, nn.Parameter):
            return Held(tensor)
        storages = list(_storages(tensor))
        held = Held(tensor.detach(), storages.clear)  # the tensor itself would be a circle where it is a node's result
        kept.append((weakref.ref(held), stack[-1] if stack else "(outside any module)", storages))
        return held

    def enter(module: nn.Module, inputs: Any) -> None:
        for held in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            not_counted.update(storage.data_ptr() for storage in _storages(held))
        name = type(module).__name__
        stack.append(f"{stack[-1]}.{name}" if stack else name)

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        stack.pop()

    handles = [
        module_hooks.register_module_forward_pre_hook(enter),
        module_hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, Held.unpack):
            report.result = fn(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    # Counted now: a tensor that is made again has been let go in the meantime.
    # A graph that is gone altogether counts as it was; else what went with a part of the graph is kept by nobody.
    gone = all(held() is None for held, _, _ in kept)
    for held_by, where, storages in kept:
        if held_by() is None and not gone:
            continue
        for storage in storages:
            if storage.data_ptr() not in not_counted:
                not_counted.add(storage.data_ptr())
                report.by_module[where] = report.by_module.get(where, 0) + storage.nbytes()
                report.total += storage.nbytes()
    return report


def _storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """The storages of a tensor; those of a subclass such as DTensor are in the tensors that it wraps."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for part in (getattr(tensor, name) for name in names):
            if isinstance(part, Tensor):  # a DTensor also names its mesh
                yield from _storages(part)
    else:
        yield tensor.untyped_storage()


def paper_bytes_per_layer(
    s: int, b: int, h: int, a: int, t: int = 1, *, sequence_parallel: bool = False, selective: bool = False
) -> float:
    """Activation bytes of one GPT layer at 16 bit: Korthikanti et al. 2022 (arXiv 2205.05198), table 2.

    Args:
        s, b, h, a: sequence length, batch, hidden size, attention heads.
        t: tensor-parallel ranks.
        sequence_parallel: also the norms and dropouts are sharded.
        selective: attention is recomputed (or never stored: flash attention).
    """
    attention = 0.0 if selective else 5 * a * s / (h * t)
    if t == 1:
        return s * b * h * (34 + attention)
    return s * b * h * ((34 / t if sequence_parallel else 10 + 24 / t) + attention)
