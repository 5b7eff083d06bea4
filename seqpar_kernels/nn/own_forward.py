"""Tells the check of a converted model's first forward where this package's own statements begin and end.

The ``forward`` of a parallel module is correct by construction, so that the check skips its statements. It checks the
statements that hooks, wrappers and patched forwards add around it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

ForwardT = TypeVar("ForwardT", bound=Callable[..., Any])


class Follower(Protocol):
    """A check that follows a forward."""

    def own(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run ``forward(module, ...)``, the module's own."""

    def summed(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, tensors: Mapping[str, Tensor]
    ) -> Any:
        """Run ``forward(...)`` of a module whose parameters are ``tensors``, gradients summed over the ranks."""

    def trusted(self) -> AbstractContextManager[None]:
        """A block of statements of this package, which the check skips."""


class _State:
    follower: Follower | None = None


def follow(follower: Follower | None) -> None:
    """Make ``follower`` run the forwards from now on; None: no follower."""
    _State.follower = follower


def follower() -> Follower | None:
    """The follower of the current forward; None while torch.compile traces."""
    return None if torch.compiler.is_compiling() else _State.follower


def trusted() -> AbstractContextManager[None]:
    """A block of statements of this package, which are correct by construction."""
    following = follower()
    return nullcontext() if following is None else following.trusted()


def own_forward(forward: ForwardT) -> ForwardT:
    """Decorates the ``forward`` of a parallel module."""

    @functools.wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _State.follower is None:
            return forward(self, *args, **kwargs)
        return _State.follower.own(self, forward, args, kwargs)

    return cast(ForwardT, run)
