"""Tries whether a function treats the rows of a sequence shard one by one.

Such a function of rows picked from a tensor returns the rows picked from its result. So the first forward runs it twice
more: on random rows of the shard's shape, and on some of these in another order, with repetitions. ``mean`` over the
sequence, ``roll``, ``flip``, ``x[:, 0]``, attention, a convolution over tokens, and positions counted from the start of
the shard fail. Elementwise functions, linear layers, norms, views and transposes pass, and the result shows where the
rows are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .marks import Rows

_ARITHMETIC = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
#: Elementwise functions, which need no trial.
ELEMENTWISE = frozenset(
    {f"__{sign}{name}__" for name in _ARITHMETIC for sign in ("", "r", "i")}
    | {f"__{name}__" for name in ("neg", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "rdiv", "idiv")}
    | {f"{name}{end}" for end in ("", "_") for name in (
        "add", "sub", "mul", "div", "true_divide", "neg", "abs", "exp", "log", "sqrt", "rsqrt", "square", "pow", "tanh",
        "sigmoid", "relu", "clamp", "reciprocal", "addcmul", "lerp", "masked_fill", "erf", "sin", "cos", "detach")}
    | {"gelu", "silu", "leaky_relu", "softplus", "relu6", "mish", "hardswish", "elu", "where", "to", "float", "half",
       "bfloat16", "double", "type_as", "contiguous", "clone", "logical_not", "isnan", "isinf", "isfinite", "minimum",
       "maximum", "requires_grad_", "data", "type", "nan_to_num"}
)  # fmt: skip
_SCALES = {torch.float64: 1e-6, torch.float32: 1e-4}
_ROUGH = 2e-2  # floating-point types of 16 bits and less
_LARGE = 5e3  # values of masks (-1e9, finfo.min) would hide the others


class Undecided(Exception):
    """The function could not be tried."""


def changes_in_place(name: str, kwargs: Any) -> bool:
    """Whether the function called ``name`` writes to its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__iter__", "__int__"))
    return name.endswith("_")


def elementwise(name: str, shards: list[tuple[Tensor, Rows]], others: list[Tensor], out: Any) -> Rows | None:
    """Where the rows of an elementwise function's result are; None if shapes do not tell."""
    if name not in ELEMENTWISE or not isinstance(out, Tensor):
        return None
    places = {_dim_from_right(tuple(shard.shape), rows) for shard, rows in shards}
    place = places.pop()
    if places or place is None or len({rows.count for _, rows in shards}) > 1 or place > out.dim():
        return None
    if any(other.dim() >= place and other.shape[-place] != 1 for other in others):
        return None  # it has an entry for every row; a trial must show what it is
    count = shards[0][1].count
    inner = _product(out.shape[out.dim() - place + 1 :])
    return Rows(count, inner) if out.shape[-place] == count else None


class Trial:
    """Runs a call on stand-ins for some of its tensors. The tensors themselves are not changed."""

    def __init__(self, call: Callable[..., Any], args: Any, kwargs: Any, name: str):
        self._call, self._args, self._kwargs = call, args, kwargs
        self._writes = changes_in_place(name, kwargs)
        self._copies = self._writes or kwargs.get("out") is not None

    def run(self, stand_ins: dict[int, Tensor], number: Callable[[Any], Any] = lambda leaf: leaf) -> list[Tensor]:
        """The tensors that the call returns. ``number`` maps the other arguments."""
        copies = dict(stand_ins)

        def other(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return number(leaf)
            if id(leaf) not in copies and self._copies:
                copies[id(leaf)] = leaf.detach().clone()
            return copies.get(id(leaf), leaf)

        args, kwargs = tree_map(other, (self._args, self._kwargs))
        out = self._call(*args, **kwargs)
        if self._writes:
            out = args[0]
        return [leaf.detach().clone() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]

    def constant(self, base: list[Tensor], held: list[Tensor], generator: torch.Generator) -> list[bool]:
        """For each of the results ``base``, whether it does not depend on the values of ``held``."""
        others = [self.run({id(t): values(t, generator, which) for t in held}) for which in (1, 2)]
        return [all(alike(out, other) for other in same) for out, *same in zip(base, *others, strict=True)]


def tried(
    call: Callable[..., Any], args: Any, kwargs: Any, shards: list[tuple[Tensor, Rows]], name: str, seq_dim: int
) -> list[Rows | bool | None]:
    """For each tensor that ``call`` returns: where its rows are, None if they are mixed, False if it has none.

    ``shards`` are the arguments that hold rows. They are not changed.

    Raises:
        Undecided: the function fails on other values than its own.
    """
    counts = {rows.count for _, rows in shards}
    generator, trial = generator_of(shards[0][0].device), Trial(call, args, kwargs, name)
    with torch.no_grad():
        try:
            base_in = {id(shard): values(shard, generator, 0) for shard, _ in shards}
            base = trial.run({key: value.clone() for key, value in base_in.items()})
            if len(counts) > 1:
                return [None] * len(base)
            count = counts.pop()
            given = [rows.inner for _, rows in shards]
            found: list[list[Rows]] = [list(candidates(out, count, given, seq_dim)) for out in base]
            for index in selections(count, shards[0][0].device):
                now = trial.run({id(shard): selected(base_in[id(shard)], rows, index) for shard, rows in shards})
                found = [
                    [rows for rows in kept if alike(selected(out, rows, index), other)]
                    for kept, out, other in zip(found, base, now, strict=True)
                ]
            constant = [False] * len(base)
            scalars = count < 2 and any(out.dim() == 0 for out in base)
            if not all(found) or scalars:
                constant = trial.constant(base, [shard for shard, _ in shards], generator)
        except Exception as error:
            raise Undecided(f"{type(error).__name__}: {error}") from error
    places: list[Rows | bool | None] = []
    for kept, same, out in zip(found, constant, base, strict=True):
        if same and (not kept or out.dim() == 0):
            places.append(False)
        else:
            places.append(kept[0] if kept else None)
    return places


def of_any_length(
    call: Callable[..., Any], args: Any, kwargs: Any, shards: list[tuple[Tensor, Rows]], found: list[Rows | bool | None]
) -> bool:
    """Whether ``call`` treats rows alike for any number of them: some rows, or one repeated, give their results.

    ``found`` is the result of :func:`tried`. True also where the call runs with no other number of rows.
    """
    device, count = shards[0][0].device, shards[0][1].count
    if count < 1 or any(rows.count != count or _dim_from_right(tuple(s.shape), rows) is None for s, rows in shards):
        return True
    index = torch.arange(count // 2, device=device) if count > 1 else torch.tensor([0, 0], device=device)
    generator, trial = generator_of(device), Trial(call, args, kwargs, "forward")
    with torch.no_grad():
        base_in = {id(shard): values(shard, generator, 0) for shard, _ in shards}
        base = trial.run({key: value.clone() for key, value in base_in.items()})
        try:
            now = trial.run({id(shard): resized(base_in[id(shard)], rows, index) for shard, rows in shards})
        except Exception:  # it depends on the number of rows; an error on this rank's number is the user's
            return True
    for out, other, rows in zip(base, now, found, strict=False):
        if isinstance(rows, Rows) and _dim_from_right(tuple(out.shape), rows) is not None:
            expected = resized(out, rows, index)
            if not alike(expected, other):
                return False
    return True


def selections(count: int, device: torch.device) -> Iterator[Tensor]:
    """Rows to pick. Half are the same one, so that every mixture shows. The first and last are never in place."""
    if count == 2:
        yield from (torch.tensor(index, device=device) for index in ([1, 1], [0, 0]))
    elif count > 2:
        index = torch.randint(count, (count,), generator=torch.Generator().manual_seed(count))
        index[::2] = count // 2
        index[0], index[-1] = count // 2, (count - 1) // 2
        yield index.to(device)


def values(like: Tensor, generator: torch.Generator, which: int) -> Tensor:
    """Positive random values of the shape and dtype of ``like``, so that roots and logarithms are finite."""
    shape, device = tuple(like.shape), like.device
    if like.dtype == torch.bool:
        if which:
            return torch.full(shape, which == 1, device=device)
        return torch.rand(shape, generator=generator, device=device) > 0.5
    if like.is_floating_point() or like.is_complex():
        drawn = torch.rand(shape, generator=generator, device=device) * (1 + which) + 0.25
        return drawn.to(like.dtype)
    return torch.zeros_like(like) if which == 2 else like.detach().clone()  # an index must stay an index


def generator_of(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(7)


def selected(t: Tensor, rows: Rows, index: Tensor) -> Tensor:
    if rows.count < 2:
        return t.clone()
    return t.reshape(-1, rows.count, rows.inner).index_select(1, index).reshape(t.shape)


def resized(t: Tensor, rows: Rows, index: Tensor) -> Tensor:
    """Any number of rows picked from ``t``, which has a dimension for the rows alone."""
    dim = _dim_from_right(tuple(t.shape), rows)
    assert dim is not None
    return t.index_select(t.dim() - dim, index)


def candidates(out: Tensor, count: int, given: list[int], seq_dim: int | None) -> Iterator[Rows]:
    """Where the rows of ``out`` may be, the most likely place first."""
    shape, numel = tuple(out.shape), out.numel()
    if not count:  # this rank has no rows to judge by
        yield Rows(0, 1)
    if not count or not numel or numel % count:
        return
    products = [_product(shape[dim + 1 :]) for dim in range(len(shape))]
    likely = [product for dim, product in enumerate(products) if shape[dim] == count]
    usual = seq_dim % len(shape) if seq_dim is not None and -len(shape) <= seq_dim < len(shape) else -1
    first = [products[usual]] if usual >= 0 and shape[usual] == count else []
    merged = [*products, *(product // count for product in (numel, *products) if product % count == 0)]
    for inner in dict.fromkeys([*first, *(i for i in given if i in likely), *likely, *given, *merged]):
        if inner and numel % (inner * count) == 0:
            yield Rows(count, inner)


def alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point() and not a.is_complex():
        return torch.equal(a, b)
    if not a.numel() or torch.equal(a, b):
        return True
    exact = _SCALES.get(a.dtype, _ROUGH)
    if not a.is_complex():
        a, b = a.float() if a.dtype not in _SCALES else a, b.float() if b.dtype not in _SCALES else b
        finite = a.isfinite() & b.isfinite()
        if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
            return False
        a, b = a.where(finite, 0), b.where(finite, 0)
        large = torch.maximum(a.abs(), b.abs()) > _LARGE
        if bool(large.any()):
            one, other = a[large].double(), b[large].double()
            if bool(((one - other).abs() > exact * torch.maximum(one.abs(), other.abs())).any()):
                return False
            a, b = a.where(~large, 0), b.where(~large, 0)
    return bool((a - b).abs().max() <= exact * torch.maximum(a.abs().max(), b.abs().max()))


def _dim_from_right(shape: tuple[int, ...], rows: Rows) -> int | None:
    """The dimension of the rows, counted from the right (1 is the last); None if merged with another."""
    for dim in range(len(shape)):
        if shape[dim] == rows.count and _product(shape[dim + 1 :]) == rows.inner:
            return len(shape) - dim
    return None


def inner_size(tensor: Tensor, dim: int) -> int:
    """How many elements one index of a dimension spans."""
    return _product(tensor.shape[dim + 1 :])


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= int(size)
    return product
