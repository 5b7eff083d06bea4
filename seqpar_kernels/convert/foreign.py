"""Names trainable tensors that a plan does not cover, and finds them behind tensors computed out of sight."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_leaves

_NODE = "_seqpar_seen"  # in the metadata of autograd's nodes
_MOST_NODES = 10_000


def described(tensor: Tensor) -> str:
    """A trainable tensor that has no name."""
    return f"a trainable tensor of shape {tuple(tensor.shape)} that is no parameter of the model"


def see(tensor: Tensor) -> None:
    """Remember with autograd that ``tensor`` has been marked."""
    if type(tensor) is Tensor and tensor.grad_fn is not None:
        node: Any = tensor.grad_fn
        node.metadata[_NODE] = True


def leaf_behind(tensor: Tensor, known: Container[int]) -> Tensor | None:
    """A trainable leaf out of which ``tensor`` was computed, past no tensor that was marked, and whose id is unknown.

    Autograd knows what no torch function shows: kernels that are called from an autograd function.
    """
    seen: set[Any] = set()
    left: list[Any] = [tensor.grad_fn]
    while left and len(seen) < _MOST_NODES:
        node = left.pop()
        if node is None or node in seen or node.metadata.get(_NODE):
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in known:
            return leaf
        left.extend(upstream for upstream, _ in node.next_functions)
    return None


def trainable_inputs(args: Any, kwargs: dict[str, Any], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the arguments of a forward that have gradients, and of what a cache among them holds."""
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        found = tree_leaves(value)
        for layer in getattr(value, "layers", ()) if not isinstance(value, nn.Module) else ():
            found += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        yield from ((name, leaf) for leaf in found if isinstance(leaf, Tensor) and leaf.requires_grad)


def trained_arguments(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """Which arguments of a forward may bring gradients in: positions and names, quickly."""
    if torch.is_grad_enabled():
        for name, value in chain(enumerate(args), kwargs.items()):
            if value.requires_grad if isinstance(value, Tensor) else name == "past_key_values" and value is not None:
                yield name


class Functions:
    """Shows calls of autograd functions, which torch function modes never see, to ``follow(cls, args, call)``."""

    def __init__(self, follow: Callable[[type, Any, Callable[..., Any]], Any]):
        self._follow = follow

    def start(self) -> None:
        follow = self._follow

        def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
            # Looked up anew at every call, whatever alias of Function.apply was called.
            plain = super(_SingleLevelFunction, cls).apply  # type: ignore[misc]
            return follow(cls, (args, kwargs), lambda: plain(*args, **kwargs))

        _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]

    def stop(self) -> None:
        if "apply" in vars(_SingleLevelFunction):
            del _SingleLevelFunction.apply  # type: ignore[attr-defined]
