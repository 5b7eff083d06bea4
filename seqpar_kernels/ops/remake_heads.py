"""Queries and keys that attention need not keep: a norm of heads made them, and rotary positions or copies followed.

Attention keeps them, and the norm its input: the same heads twice. Where every step between the norm and the attention
is one pass over them (views, the rotation, copies for grouped queries), attention repeats the norm and the steps. That
is some six passes over q and k in the backward, so it is done where ``recompute="max"`` asks for it. What a matmul has
made without a norm in between is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .remake import let_go, way_of

_Memo = dict[tuple[int, int], Tensor]  # by node and result: both halves of a rotation read one norm
_Step = Callable[[_Memo], Tensor]
_MOST_VIEWS = 8  # between attention and the linear behind it

_VIEWS = frozenset(
    f"{name}Backward0"
    for name in ("View", "UnsafeView", "Transpose", "Clone", "Permute", "ReshapeAlias", "Squeeze", "ToCopy")
)


def release_heads(x: Tensor) -> None:
    """Let queries and keys go that the attention in front of ``x``, the input of a linear, keeps."""
    node: Any = x.grad_fn
    for _ in range(_MOST_VIEWS):
        name = type(node).__name__
        if name.startswith("ScaledDotProduct"):
            break
        if name not in _VIEWS:
            return
        node = node.next_functions[0][0]
    else:
        return
    for position, kept in enumerate((node._raw_saved_query, node._raw_saved_key)):
        step = _step(*node.next_functions[position])
        if step is not None:
            let_go(kept, _evaluated(step))


def _evaluated(step: _Step) -> Callable[[], Tensor]:
    return lambda: step({})


def _step(node: Any, number: int) -> _Step | None:
    """How result ``number`` of ``node`` is computed from a norm; None where something else is in between."""
    if node is None:
        return None
    if hasattr(type(node), "_forward_cls"):
        way = way_of(type(node))
        make = None if way is None else way(node, number, None)
        found: _Step | None = None if make is None else partial(_called, make)
    else:
        rule = _RULES.get(type(node).__name__)
        if rule is None:
            return None
        sources = node.next_functions
        if rule is _times:  # it may keep a factor that needs no gradient
            sources = [source for source in sources if source[0] is not None]
        inputs = [_step(*source) for source in sources]
        if not inputs or None in inputs:
            return None
        found = _joined(rule, node, [step for step in inputs if step is not None])
    return None if found is None else _once(found, (id(node), number))


def _called(make: Callable[[], Tensor], memo: _Memo) -> Tensor:
    return make()


def _joined(rule: Callable[..., Tensor], node: Any, inputs: list[_Step]) -> _Step:
    return lambda memo: rule(node, *(step(memo) for step in inputs))


def _once(step: _Step, key: tuple[int, int]) -> _Step:
    def run(memo: _Memo) -> Tensor:
        if key not in memo:
            memo[key] = step(memo)
        return memo[key]

    return run


def _times(node: Any, x: Tensor, *other: Tensor) -> Tensor:
    """x * cos: autograd keeps what needs no gradient; the product of two that do is of two steps."""
    if other:
        return x * other[0]
    first, _ = node.next_functions
    product: Tensor = x * node._saved_other if first[0] is not None else node._saved_self * x
    return product


def _signed(number: int) -> int:
    """autograd shows negative dimensions as unsigned numbers."""
    return number - 2**64 if number >= 2**63 else number


def _slice(node: Any, x: Tensor) -> Tensor:
    numbers = (node._saved_dim, node._saved_start, node._saved_end, node._saved_step)
    dim, start, stop, step = (None if number is None else _signed(number) for number in numbers)
    part: Tensor = torch.ops.aten.slice(x, dim, start, stop, step)
    return part


def _shape(node: Any) -> torch.Size:
    return torch.Size(node._input_metadata[0].shape)  # of its result


_RULES: dict[str, Callable[..., Tensor]] = {
    "AddBackward0": lambda node, x, y: torch.add(x, y, alpha=node._saved_alpha),
    "CatBackward0": lambda node, *parts: torch.cat(parts, _signed(node._saved_dim)),
    "CloneBackward0": lambda node, x: x.contiguous(),
    "ExpandBackward0": lambda node, x: x.expand(_shape(node)),
    "MulBackward0": _times,
    "NegBackward0": lambda node, x: -x,
    "PermuteBackward0": lambda node, x: x.permute(*map(_signed, node._saved_dims)),
    "SliceBackward0": _slice,
    "ToCopyBackward0": lambda node, x: x.to(node._input_metadata[0].dtype),
    "TransposeBackward0": lambda node, x: x.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1)),
    "UnsafeViewBackward0": lambda node, x: x.reshape(_shape(node)),
    "UnsqueezeBackward0": lambda node, x: x.unsqueeze(_signed(node._saved_dim)),
    "ViewBackward0": lambda node, x: x.reshape(_shape(node)),  # a clone may lie otherwise here
}
