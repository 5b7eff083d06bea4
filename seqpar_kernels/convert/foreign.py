"""Names trainable tensors that a plan does not cover, and finds them behind tensors computed out of sight."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import chain
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_leaves

from ..ops import mappings

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


#: Upstream of these a tensor is whole again on every rank, and so is its gradient: cut, or summed over the ranks.
_INTO_REGION = frozenset(
    function._backward_cls for function in (mappings._Split, mappings.CopyToRegion, mappings.SumGradients)
)
_OUT_OF_REGION = mappings._Gather._backward_cls


def leaves_within(tensor: Tensor, entrances: Sequence[Any]) -> Iterator[tuple[Tensor, str]]:
    """(leaf, name of the autograd node that took it) of all out of which ``tensor`` was computed in the sharded region.

    The region ends upstream at the nodes ``entrances``, and wherever something whole was cut or copied into it. A part
    of the model that runs on whole tensors in between (style 'replicated') is passed through. What a reentrant
    checkpoint has computed is out of sight.
    """
    seen: list[set[Any]] = [set(), set()]  # in the region, where tensors are whole
    left: list[tuple[Any, bool]] = [(tensor.grad_fn, False)]
    while left and len(seen[0]) < _MOST_NODES:
        node, whole = left.pop()
        if node is None or node in seen[whole] or node in entrances:
            continue
        seen[whole].add(node)
        whole = (whole or type(node) in _INTO_REGION) and type(node) is not _OUT_OF_REGION
        for upstream, _ in node.next_functions:
            leaf = None if whole else getattr(upstream, "variable", None)
            if leaf is None:
                left.append((upstream, whole))
            elif upstream not in seen[0]:
                seen[0].add(upstream)
                yield leaf, node.name()


def where_held(model: nn.Module, tensor: Tensor) -> str | None:
    """In words, what of ``model`` holds ``tensor``: an attribute, or a forward or hook that has it in its closure."""
    for name, module in model.named_modules():
        where = name or type(model).__name__
        for key, value in vars(module).items():
            if key in ("forward", "_forward_hooks", "_forward_pre_hooks"):
                functions = value.values() if isinstance(value, dict) else [value]
                found = next((f for f in functions if _at_hand(f, tensor)), None)
                if found is not None:
                    kind = "its forward" if key == "forward" else "a hook"
                    return f"{where} ({kind}, {getattr(found, '__qualname__', type(found).__name__)})"
            elif any(leaf is tensor for leaf in tree_leaves(value)):
                return f"{where}.{key}"
    return None


def _at_hand(function: Any, tensor: Tensor, depth: int = 0) -> bool:
    """Whether a function has ``tensor`` at hand besides arguments and globals."""
    found = [
        getattr(getattr(function, "__self__", function), "__dict__", None),
        getattr(function, "__defaults__", None),
    ]
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            found.append(cell.cell_contents)
    leaves = tree_leaves([dict(item) if isinstance(item, Mapping) else item for item in found])
    inner = [leaf for leaf in leaves if isinstance(leaf, FunctionType)] if depth < 2 else []
    return any(leaf is tensor for leaf in leaves) or any(_at_hand(f, tensor, depth + 1) for f in inner)


def trainable_inputs(args: Any, kwargs: dict[str, Any], names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of the arguments of a forward that have gradients, and of what a cache among them holds."""
    for name, value in [*zip(names, args, strict=False), *kwargs.items()]:
        found = _leaves(value)
        for layer in getattr(value, "layers", ()) if not isinstance(value, nn.Module) else ():
            found += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        yield from ((name, leaf) for leaf in found if isinstance(leaf, Tensor) and leaf.requires_grad)


def _leaves(value: Any) -> list[Any]:
    """What ``value`` holds; a mapping that torch does not know (transformers.BatchEncoding) is taken for a dict."""
    return tree_leaves(dict(value) if isinstance(value, Mapping) else value)


def trained_arguments(args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """Which arguments of a forward may bring gradients in, quickly: positions and names, with places inside them."""
    if not torch.is_grad_enabled():
        return
    for name, value in chain(enumerate(args), kwargs.items()):
        if isinstance(value, Tensor):
            if value.requires_grad:
                yield name
        elif name == "past_key_values":
            if value is not None:
                yield name
        elif isinstance(value, (Mapping, list, tuple)):
            leaves = enumerate(_leaves(value))
            yield from ((name, i) for i, leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad)


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
