"""How an op is registered: schema, kernel, fake and autograd, without the layers that cost time per call.

``torch.library.custom_op`` + ``register_autograd`` takes about twice the host time of ``define``/``impl`` + a plain
``autograd.Function`` on the Autograd key, so the latter is what stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

NAMESPACE = "seqpar"
_library = torch.library.Library(NAMESPACE, "DEF")


def register(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Any) -> Callable[..., Any]:
    """Define ``seqpar::<schema>`` and return a function that calls it.

    ``autograd`` is a Function whose forward calls the op again, below autograd. Without one, the op refuses inputs that
    require grad: it is itself a backward, and second derivatives are not there.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def differentiable(*args: Any) -> Any:
        if torch.is_grad_enabled() and _requires_grad(args):
            if autograd is None:
                raise RuntimeError(f"{NAMESPACE}::{name} has no derivative (second derivatives are not supported)")
            return autograd.apply(*args)
        return below_autograd(op, *args)

    _library.impl(name, differentiable, "Autograd")
    return op  # type: ignore[no-any-return]


def below_autograd(op: Callable[..., Any], *args: Any) -> Any:
    """Run ``op`` without entering its Autograd kernel again."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _requires_grad(args: Sequence[Any]) -> bool:
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.requires_grad:
                return True
        elif isinstance(arg, (list, tuple)) and _requires_grad(arg):
            return True
    return False


def group_name(group: ProcessGroup | None) -> str:
    """How a group travels through an op: by name, "" for none."""
    return "" if group is None else group.group_name


def group_named(name: str) -> ProcessGroup | None:
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]
