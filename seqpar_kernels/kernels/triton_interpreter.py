"""Makes Triton's interpreter (``TRITON_INTERPRET=1``) round as a GPU does while kernels of this package run in it.

Without this it truncates float32 to bfloat16 and loses the carry into the exponent of float8_e4m3; hardware rounds to
the nearest. Other kernels of the process, and Triton outside of the interpreter, are not changed.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl

_HOOK = "_convert_float"
_lock = threading.Lock()
_inside = 0
_original: Callable[..., Any] | None = None


def interpreted(kernel: object) -> bool:
    """Whether ``kernel`` was made where ``TRITON_INTERPRET=1`` was set."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def rounds() -> bool:
    """Whether this Triton's interpreter can be made to round as a GPU does."""
    from triton.runtime import interpreter

    return callable(getattr(interpreter, _HOOK, None))


def _convert(source: Any, source_type: Any, target_type: Any, mode: Any) -> Any:
    as_torch = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    if source_type != tl.float32 or target_type not in as_torch:
        assert _original is not None
        return _original(source, source_type, target_type, mode)
    rounded = torch.tensor(source).to(as_torch[target_type])
    bits = torch.int16 if target_type == tl.bfloat16 else torch.int8
    return rounded.view(bits).numpy().view(f"uint{8 * rounded.element_size()}")


@contextlib.contextmanager
def rounding() -> Iterator[None]:
    """While any thread is in here, the interpreter rounds as a GPU does."""
    global _inside, _original
    from triton.runtime import interpreter

    with _lock:
        _inside += 1
        if _inside == 1:
            _original = getattr(interpreter, _HOOK)
            setattr(interpreter, _HOOK, _convert)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                setattr(interpreter, _HOOK, _original)


class _Rounding:
    """An interpreted kernel with the launch syntax of kernels."""

    def __init__(self, kernel: Any):
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self._kernel[grid]

        def run(*args: Any, **options: Any) -> Any:
            with rounding():
                return launch(*args, **options)

        return run


def as_on_a_gpu(kernel: Any) -> Any:
    """``kernel``; where it is interpreted, its launches round as a GPU does, or a warning says that they do not."""
    if not interpreted(kernel):
        return kernel
    if rounds():
        return _Rounding(kernel)
    warnings.warn(
        f"the interpreter of Triton {triton.__version__} truncates float32 to bfloat16 where a GPU rounds, and this "
        "package does not know how to mend that in this version: bfloat16 results of backend='triton' differ on CPU",
        stacklevel=2,
    )
    return kernel
