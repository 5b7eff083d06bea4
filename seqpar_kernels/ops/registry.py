"""How an op is registered: schema, kernel, fake and autograd, without the layers that cost time per call.

``torch.library.custom_op`` + ``register_autograd`` takes about twice the host time of ``define``/``impl`` + a plain
``autograd.Function`` on the Autograd key, so the latter is what stands here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from ..compiling import not_traced

NAMESPACE = "seqpar"
_library = torch.library.Library(NAMESPACE, "DEF")


class Op:
    """A registered op. Calling it takes the shortest way that is right.

    Under torch.compile, a dispatch mode, a functorch transform, or with tensor subclasses that is the dispatcher.
    In plain eager mode it would cost more host time than a small kernel itself, so autograd and kernel are called
    directly.
    """

    def __init__(self, overload: Any, kernel: Callable[..., Any], autograd: Callable[..., Any] | None):
        self.overload = overload
        self._kernel = kernel
        self._autograd = autograd
        are_tensors = ["Tensor" in str(argument.type) for argument in overload._schema.arguments]
        self._tensors = len(are_tensors) - are_tensors[::-1].index(True)  # behind them there are scalars alone

    def __call__(self, *args: Any) -> Any:
        tensors = args[: self._tensors]
        if not plain(tensors):
            return self.overload(*args)
        if torch.is_grad_enabled() and _requires_grad(tensors):
            return self._derived(*args)
        return self._kernel(*args)

    def differentiable(self, *args: Any) -> Any:
        """What stands on the Autograd key."""
        tensors = args[: self._tensors]
        # A Function without a forward-mode derivative says so; passing it by would drop the tangent in silence.
        if (torch.is_grad_enabled() and _requires_grad(tensors)) or _has_tangent(tensors):
            return self._derived(*args)
        return self.below_autograd(*args)

    def _derived(self, *args: Any) -> Any:
        if self._autograd is None:
            raise RuntimeError(f"{self.overload} has no derivative (second derivatives are not supported)")
        return self._autograd(*args)

    def below_autograd(self, *args: Any) -> Any:
        """The forward of an autograd.Function: the op without its Autograd kernel."""
        if plain(args[: self._tensors]):
            return self._kernel(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


#: Types of tensors that no Python code stands behind.
PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def eager() -> bool:
    """Nothing but eager PyTorch and its reverse-mode autograd is listening."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def in_backward() -> bool:
    """A backward is under way: what runs now belongs to it, or is recomputed for it."""
    return torch._C._current_graph_task_id() != -1


def plain(tensors: Sequence[Any]) -> bool:
    """Eager PyTorch alone has to do with these, and with sequences of them: memory that kernels may read."""
    return eager() and are_plain(tensors)


def are_plain(tensors: Sequence[Any]) -> bool:
    """No tensor among these, and in lists of them, has Python code or no memory behind it."""
    for t in tensors:
        if type(t) in PLAIN_TYPES:
            if t.is_meta:
                return False
        elif isinstance(t, Tensor) or (type(t) in (list, tuple) and not are_plain(t)):
            return False
    return True


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for plain tensors in eager mode: without its care for functorch it takes half as long."""
    found: Callable[..., Any] = getattr(super(torch.autograd.Function, function), "apply")  # noqa: B009
    return found


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, as fast as it is right."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return plain_apply(function)(*args)
    return function.apply(*args)


def register(
    schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], autograd: Callable[..., Any] | None
) -> Op:
    """Define ``seqpar::<schema>``.

    ``autograd`` takes the op's arguments and applies a Function whose forward calls :meth:`Op.below_autograd`. Without
    one, the op refuses inputs that require grad: it is itself a backward, and second derivatives are not there.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    # Where torch.compile has given a frame up it goes on with the frames below: not with those of a kernel.
    _library.impl(name, not_traced(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = Op(getattr(getattr(torch.ops, NAMESPACE), name).default, kernel, autograd)
    _library.impl(name, op.differentiable, "Autograd")
    return op


def _requires_grad(args: Sequence[Any]) -> bool:
    for arg in args:
        if arg is None:
            continue
        if _requires_grad(arg) if type(arg) in (list, tuple) else getattr(arg, "requires_grad", False):
            return True
    return False


def _has_tangent(args: Sequence[Any]) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)


def without_autocast(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Forward casts are made by the caller; a backward under autocast must not cast what the forward did not."""

    @functools.wraps(kernel)
    def run(x: Tensor, *args: Any, **options: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return kernel(x, *args, **options)
        with torch.autocast(x.device.type, enabled=False):
            return kernel(x, *args, **options)

    return run


def group_name(group: ProcessGroup | None) -> str:
    """How a group travels through an op: by name, "" for none."""
    return "" if group is None else group.group_name


def group_named(name: str) -> ProcessGroup | None:
    return _resolve_process_group(name) if name else None  # type: ignore[arg-type]
