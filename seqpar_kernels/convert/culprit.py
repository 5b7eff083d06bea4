"""Finds and quotes the user's statement that is being run."""

from __future__ import annotations

import linecache
import os
import sys
from types import CodeType, FrameType
from typing import Any

import torch

#: The folder of this package.
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_SKIPPED = (PACKAGE, _TORCH + os.sep)
_CALL = (torch.nn.Module._call_impl.__code__.co_filename, ("_call_impl", "inner"))


def is_library(file: str) -> bool:
    """Whether a source file belongs to torch, einops or this package."""
    return file.startswith(_SKIPPED) or f"{os.sep}einops{os.sep}" in file


def user_frame() -> FrameType | None:
    """The innermost frame outside of torch, einops and this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and is_library(frame.f_code.co_filename):
        frame = frame.f_back
    return frame


def statement() -> str:
    """The innermost statement outside of torch, einops and this package: "`y = x.mean(1)` (model.py:12)"."""
    frame = user_frame()
    if frame is None:
        return "a statement"
    return written(frame.f_code.co_filename, frame.f_lineno, frame.f_globals)


def written(file: str, line: int, module: dict[str, Any] | None = None) -> str:
    """The statement at ``line`` of ``file``. ``module``: globals of the code, where it has no file of its own."""
    text = " ".join(linecache.getline(file, line, module).split())
    if len(text) > 100:
        text = text[:97] + "..."
    return f"`{text}` ({file}:{line})" if text else f"line {line} of {file}"


def in_hook() -> bool:
    """Whether the user's statement is part of a module's hook, not of a forward."""
    frame = user_frame()
    while frame is not None and frame.f_back is not None:
        caller = frame.f_back
        if caller.f_code.co_filename == _CALL[0] and caller.f_code.co_name in _CALL[1]:
            return frame.f_code in _codes(caller.f_locals.get("hook"))
        frame = caller
    return False


def _codes(hook: Any) -> list[CodeType]:
    hook = getattr(hook, "func", hook)  # functools.partial
    candidates = (hook, getattr(hook, "__func__", None), vars(type(hook)).get("__call__"))
    return [code for c in candidates if isinstance(code := getattr(c, "__code__", None), CodeType)]


def name_of(func: Any) -> str:
    """A function's name; of a property, the property's."""
    name = getattr(func, "__name__", None) or str(func)
    if name == "__get__":
        owner = getattr(func, "__self__", None)
        name = getattr(owner, "__name__", name)
    return str(name)
