"""Random initialisation of a listed parameter: draws the whole tensor, as on one rank, and keeps this rank's part."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset(
    {"normal_", "uniform_", "random_", "bernoulli_", "exponential_", "geometric_", "log_normal_", "cauchy_"}
)
_DATA_OF = vars(torch._C.TensorBase)["data"].__get__  # made anew at each look: compare with ==
_DRAWS_LIKE = frozenset({torch.rand_like, torch.randn_like, torch.randint_like})
#: Functions of torch.nn.init make their scratch tensors with these: DTensors, on which each rank would draw its own.
_MADE = frozenset({"empty_like", "new_empty", "zeros_like", "rand_like", "randn_like"})


def listed_to_draw(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """The tensor that ``func`` fills with random numbers; None for other functions.

    Raises:
        RuntimeError: ``func`` is a step of a function of torch.nn.init (orthogonal_, trunc_normal_) that would draw
            another distribution, or the same part on every rank.
    """
    name = getattr(func, "__name__", "")
    if name in _MADE:
        if args and (hasattr(args[0], "cut") or cut_behind(args[0]) is not None):
            _refuse_step(sys._getframe(2))  # the caller of __torch_function__
        return None
    if name.endswith("_") and getattr(func, "__module__", "") == "torch.nn.init":
        return args[0] if args else kwargs.get("tensor")
    if name in _DRAWS and not (torch.is_grad_enabled() and args[0].requires_grad):  # torch refuses it otherwise
        return args[0]
    return None


def draws_like(func: Callable[..., Any]) -> bool:
    """Whether ``func`` makes a tensor of random numbers of another's shape."""
    return func in _DRAWS_LIKE


def _refuse_step(caller: FrameType) -> None:
    if caller.f_globals.get("__name__") == "torch.nn.init":
        raise RuntimeError(
            f"torch.nn.init.{caller.f_code.co_name.removeprefix('_no_grad_')}: takes no listed parameter of a "
            "parallelized model, of which each rank holds a part: initialise before parallelize, with "
            "model.apply(...) of the module that holds it, or a whole tensor that load_state_dict then cuts"
        )


def cut_behind(part: Any) -> Any:
    """The listed parameter that the plain tensor ``part`` is a part of; None for other tensors."""
    listed = getattr(part, "_seqpar_listed", None)
    return None if listed is None or listed.cut.spec is None else listed


class DrawsWhole(TorchFunctionMode):
    """Inside, a module's plain parameter that is filled with random numbers gets its part of the whole one's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        drawn = listed_to_draw(func, args, kwargs)
        listed = cut_behind(drawn)
        if listed is None:
            out = func(*args, **kwargs)
            if func == _DATA_OF and cut_behind(args[0]) is not None:
                out._seqpar_listed = args[0]._seqpar_listed
            return out
        # Functions of torch.nn.init depend on the shape, and have seen the part's.
        if getattr(func, "__module__", "") != "torch.nn.init":
            _refuse_step(sys._getframe(1))
        draw_whole(func, listed, args, kwargs)
        return drawn


@torch.no_grad()
def draw_whole(func: Callable[..., Any], listed: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call ``func`` on a tensor of the whole shape, and keep this rank's part in ``listed``.

    ``listed`` is a ListedParameter, or a CutTensor: its ``data``, or one of a ``state_dict``.

    DTensor's own random functions draw for the part alone; on CPU ranks, the same part on each.
    """
    part = getattr(listed, "part", listed._local_tensor)
    whole = torch.empty(listed.cut.shape, dtype=part.dtype, device=part.device)
    if args:
        func(whole, *args[1:], **kwargs)
    else:
        func(**{**kwargs, "tensor": whole})
    part.copy_(whole if listed.cut.spec is None else listed.cut.part(whole))
    return listed
