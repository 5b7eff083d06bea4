"""Argument checks shared by the public functions and modules. Each error names the argument, expected and got."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from .layout import WrongTypeError
from .tensors import is_dtensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INF = math.inf


class TensorLike(Protocol):
    """A tensor, or an object with the same description."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...


def check_tensor(name: str, t: object) -> None:
    """A tensor of this rank alone.

    Raises:
        ValueError: no tensor (also a TypeError), or a DTensor.
    """
    if not isinstance(t, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(t).__name__}")
    if is_dtensor(type(t)):
        d: Any = t
        raise WrongTypeError(
            f"{name}: expected a plain tensor, what this rank holds, got a DTensor {tuple(t.shape)} with placements "
            f"{d.placements} on {d.device_mesh}; pass {name}.to_local() where these placements are the ones wanted "
            f"here, else redistribute it first, and DTensor.from_local(result, mesh, placements) afterwards"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_probability(name: str, p: float) -> None:
    if not _is_number(p) or not 0.0 <= p <= 1.0:
        raise ValueError(f"{name}: expected a probability in [0, 1], got {p}")


def check_eps(eps: float) -> None:
    if not _is_number(eps) or not 0.0 < eps < _INF:
        raise ValueError(f"eps: expected a positive finite number, got {eps}")


def check_float(name: str, x: TensorLike) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")


def check_same_device(name: str, t: TensorLike, like_name: str, like: TensorLike) -> None:
    if t.device != like.device:
        raise ValueError(f"{name}: expected on {like.device} like {like_name}, got {t.device}")


def check_same_shape(name: str, t: TensorLike, like_name: str, like: TensorLike) -> None:
    if t.shape != like.shape:
        raise ValueError(f"{name}: expected the shape of {like_name} {tuple(like.shape)}, got {tuple(t.shape)}")


def check_vector(
    name: str, t: TensorLike | None, size: int, like: TensorLike, size_name: str = "the last size of x"
) -> None:
    if t is None:
        return
    if t.shape != (size,):
        raise ValueError(f"{name}: expected shape ({size},), {size_name}, got {tuple(t.shape)}")
    check_float(name, t)
    check_same_device(name, t, "x", like)


def check_sequence(name: str, x: TensorLike, seq_dim: int) -> int:
    """``seq_dim`` as a non-negative index of a [..., S, ..., H] tensor.

    Raises:
        ValueError: fewer than two dimensions, or ``seq_dim`` out of range or the feature dimension.
    """
    check_float(name, x)
    if not isinstance(seq_dim, int):
        raise ValueError(f"seq_dim: expected an int, got {seq_dim!r}")
    ndim = len(x.shape)
    if ndim < 2:
        raise ValueError(f"{name}: expected [..., S, ..., H] with at least two dimensions, got {tuple(x.shape)}")
    if not -ndim <= seq_dim < ndim or seq_dim % ndim == ndim - 1:
        raise ValueError(f"seq_dim: expected a dimension of x {tuple(x.shape)} other than the last, got {seq_dim}")
    return seq_dim % ndim


def check_weight(name: str, weight: Tensor, features: int, x: Tensor) -> None:
    """A linear weight [N, K] that fits x [..., K]."""
    check_tensor(name, weight)
    if weight.dim() != 2:
        raise ValueError(f"{name}: expected [out_features, in_features], got shape {tuple(weight.shape)}")
    if weight.shape[1] != features:
        raise ValueError(
            f"{name}: expected in_features = {features}, the last size of x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"{name}: expected the dtype of x, {x.dtype}, got {weight.dtype}")
    check_same_device(name, weight, "x", x)


def check_linear_bias(name: str, bias: Tensor | None, weight: Tensor) -> None:
    """The bias [N] of a weight [N, K]."""
    if bias is None:
        return
    check_tensor(name, bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{name}: expected shape ({weight.shape[0]},), the out_features of its weight, got {tuple(bias.shape)}"
        )
    if bias.dtype != weight.dtype:
        raise ValueError(f"{name}: expected the dtype of its weight, {weight.dtype}, got {bias.dtype}")
    check_same_device(name, bias, "x", weight)


def check_main_grad(name: str, main_grad: Tensor | None, weight: Tensor) -> None:
    """Check the buffer that the gradient of a weight [N, K] is added to.

    Raises:
        ValueError: the buffer does not fit the weight.
        RuntimeError: under torch.compile, which has no op that changes an argument and returns a list of tensors.
    """
    if main_grad is None:
        return
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: not possible under torch.compile, which takes no such op; run this layer eagerly")
    check_tensor(name, main_grad)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if main_grad.shape != weight.shape or main_grad.dtype != wide or main_grad.requires_grad:
        raise ValueError(
            f"{name}: expected {wide} {tuple(weight.shape)} without gradient, like its weight, "
            f"got {main_grad.dtype} {tuple(main_grad.shape)}, requires_grad={main_grad.requires_grad}"
        )
    check_same_device(name, main_grad, "x", weight)


def check_divides(name: str, size: int, parts: int, what: str) -> None:
    """``size`` splits evenly over ``parts`` ranks."""
    if size % parts != 0:
        raise ValueError(f"{name}: expected {what} to be a multiple of the {parts} ranks of the group, got {size}")


def check_chunks(chunks: int | None) -> None:
    if chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
        raise ValueError(f"chunks: expected a positive int or None, got {chunks!r}")


_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def renamed(**names: str) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Decorates a function whose keyword arguments had other names before, ``old="new"``: both are taken.

    Raises:
        ValueError: an argument under both names.
    """

    def decorate(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @functools.wraps(function)
        def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
            for old, new in names.items():
                if old in options:
                    if new in options:
                        raise ValueError(f"{old}: expected {new} alone, got both; {old} is its old name")
                    options[new] = options.pop(old)
            return function(*args, **options)

        return run

    return decorate
