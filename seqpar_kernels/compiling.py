"""Marks for torch.compile and questions about it that do not import the compiler.

``torch.compiler``'s own decorators import all of ``torch._dynamo`` where they decorate, which takes several times as
long as the rest of this package. Eager programs, and those that only ask for help, never need it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_traced(function: F) -> F:
    """Mark a function that torch.compile calls once and whose result it keeps in the graph.

    Source: ``torch.compiler.assume_constant_result``, whose mark this is.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_traced(function: F) -> F:
    """Mark a function that torch.compile runs eagerly: ``torch.compiler.disable``, applied at the first call."""
    return torch._disable_dynamo(function)  # type: ignore[return-value]


def is_compiled_module(module: Any) -> bool:
    """Whether ``torch.compile(module)`` or ``module.compile()`` made it."""
    compiler = sys.modules.get("torch._dynamo.eval_frame")  # nothing is compiled before it is imported
    wrapped = compiler is not None and isinstance(module, compiler.OptimizedModule)
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None
