"""Checks that this rank's features are viewed and split as the features of all ranks would be.

A colwise layer keeps F/ranks of F features: consecutive ones, or consecutive ones of each packed section. When these
are viewed as heads, the number of heads must shrink, and not their size. ``view(..., n_head, -1)`` with the heads of
all ranks would make heads of another size, and the shape does not show it. :class:`.counts.Count` does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from .counts import Count, known, numbers_in
from .culprit import statement
from .marks import Features, Heads, Piece, Rows, features_of, mark, place_features, place_heads

_VIEWS = ("view", "reshape", "unflatten", "view_as", "reshape_as", "_unsafe_view", "as_strided")
_SPLITS = (
    "split",
    "chunk",
    "tensor_split",
    "split_with_sizes",
    "unsafe_split",
    "unsafe_chunk",
    "narrow",
    "__getitem__",
)


class WrongHeads(Exception):
    """A statement splits features into other heads than the whole model would."""

    def __init__(self, why: str, attribute: str = ""):
        super().__init__(why)
        self.attribute = attribute  # the attribute that is probably missing in ``divided``


def follow(
    name: str,
    args: Any,
    kwargs: Any,
    out: Any,
    tensors: list[Tensor],
    session: Any,
    around: dict[str, tuple[int, bool]],
) -> None:
    """Check a call on tensor-parallel tensors, and note where the features of the results are.

    Raises:
        WrongHeads: the call splits features where the whole model would not.
    """
    tracked = [(t, f) for t in tensors if (f := features_of(t)) is not None]
    if not tracked:
        return
    source, features = tracked[0]
    if len({(f.sections, f.size) for _, f in tracked}) > 1:
        return
    if name in _VIEWS and args and args[0] is source:
        sizes = _written_sizes(name, source, args, kwargs, out)
        _viewed(source, features, out, sizes, session, around)
    elif name in _SPLITS and args and args[0] is source and isinstance(out, (Tensor, tuple, list)):
        _split(name, source, features, out, args, kwargs, session, around)
    else:
        for leaf in tree_leaves(out):
            dim = _kept_dim(source, features, leaf, name)
            if dim is not None:
                place_features(leaf, Features(dim, features.sections, features.whole, features.layer))


def _kept_dim(source: Tensor, features: Features, out: Any, name: str) -> int | None:
    """The dimension of a result's features, if it follows from the shape."""
    if not isinstance(out, Tensor) or features_of(out) is not None:
        return None
    if name in ("transpose", "permute", "swapaxes", "movedim", "mT", "T", "swapdims", "moveaxis", "t"):
        found = [dim for dim in range(out.dim()) if out.shape[dim] == features.size]
        found = [d for d in found if out.stride(d) == source.stride(features.dim)] if len(found) > 1 else found
        return found[0] if len(found) == 1 and out.dim() == source.dim() else None
    if out.shape == source.shape:
        return features.dim
    from_right = source.dim() - features.dim
    place = out.dim() - from_right
    return place if place >= 0 and out.shape[place] == features.size else None


# --- views ----------------------------------------------------------------------------------------------------


def _written_sizes(name: str, source: Tensor, args: Any, kwargs: Any, out: Tensor) -> list[Any]:
    """The sizes of ``out`` as the call gives them, -1 included; the plain sizes if it gives none."""
    given = list(args[1:])
    if name == "unflatten":
        dim = kwargs.get("dim", given[0] if given else 0)
        sizes = kwargs.get("sizes", given[1] if len(given) > 1 else ())
        if not isinstance(dim, int):
            return list(out.shape)
        dim %= source.dim()
        return [*source.shape[:dim], *sizes, *source.shape[dim + 1 :]]
    if name == "as_strided":
        given = given[:1]
    shape = kwargs.get("shape", kwargs.get("size", given))
    if isinstance(shape, (list, tuple)) and len(shape) == 1 and isinstance(shape[0], (list, tuple)):
        shape = shape[0]
    sizes = list(shape) if isinstance(shape, (list, tuple)) else []
    return sizes if len(sizes) == out.dim() and all(isinstance(s, int) for s in sizes) else list(out.shape)


def _viewed(
    source: Tensor,
    features: Features,
    out: Any,
    sizes: list[Any],
    session: Any,
    around: dict[str, tuple[int, bool]],
) -> None:
    if not isinstance(out, Tensor) or not out.numel():
        return
    before, size = _product(source.shape[: features.dim]), features.size
    behind = source.dim() - features.dim - 1
    alike = out.dim() >= source.dim() and out.shape[: features.dim] == source.shape[: features.dim]
    if alike and (not behind or out.shape[-behind:] == source.shape[-behind:]):
        _parted(list(range(features.dim, out.dim() - behind)), features, out, sizes, session, around)
        return
    products = [1]
    for extent in out.shape:
        products.append(products[-1] * int(extent))
    inside = [p for p in products if before < p < before * size]
    if before not in products or before * size not in products:
        if inside:
            raise WrongHeads(
                f"it cuts the {size} features that this rank holds of {features.whole} of {features.layer} together "
                "with other dimensions"
            )
        return  # merged with other dimensions
    start = len(products) - 1 - products[::-1].index(before)
    stop = products.index(before * size)
    dims = [dim for dim in range(start, stop) if out.shape[dim] != 1] or [start]
    front = dims[0] - 1
    if (
        len(dims) == 1
        and front >= products.index(before)
        and (int(sizes[front]) == -1 or _scales(sizes[front], session))
    ):
        dims = [front, *dims]  # this rank has one head only
    _parted(dims, features, out, sizes, session, around)


def _parted(
    dims: list[int],
    features: Features,
    out: Tensor,
    sizes: list[Any],
    session: Any,
    around: dict[str, tuple[int, bool]],
) -> None:
    """Place the features at the dimensions ``dims`` of ``out``."""
    sections = features.sections
    while len(dims) > 1 and type(sizes[dims[0]]) is int and sizes[dims[0]] == 1:  # as unsqueeze would
        dims = dims[1:]
    if len(dims) == 1:
        place_features(out, Features(dims[0], sections, features.whole, features.layer))
        return
    if len(sections) > 1:
        if len(set(sections)) > 1 or out.shape[dims[0]] != len(sections):
            raise WrongHeads(
                f"{features.layer} packs {len(sections)} sections, of which this rank holds {list(sections)} features; "
                f"a view of them as {[int(out.shape[d]) for d in dims]} mixes them"
            )
        if len(dims) == 2:
            place_features(out, Features(dims[1], sections[:1], features.whole // len(sections), features.layer))
            return
        dims = dims[1:]
        features = Features(dims[0], sections[:1], features.whole // len(sections), features.layer)
    _check_heads([sizes[d] for d in dims], [int(out.shape[d]) for d in dims], features, session, around)
    count = int(out.shape[dims[0]])
    rows = Rows(count, _product(out.shape[dims[0] + 1 :]))
    place_heads(out, Heads(rows, count * features.whole // features.size, features.layer))


def _check_heads(
    written: list[Any],
    got: list[int],
    features: Features,
    session: Any,
    around: dict[str, tuple[int, bool]],
) -> None:
    """Check that the first size counts what is cut, and the others are as in the whole model."""
    count, inner = written[0], written[1:]
    heads = known(count, session)
    divided = {value for value, cut in around.values() if cut}
    scaled = [size for size in inner if size == -1 or _scales(size, session)]
    local = count == -1 or (heads is not None and heads.features == 1) or (heads is None and int(count) in divided)
    if local and not [size for size in scaled if size != -1]:
        return
    if not local and not scaled:
        if heads is not None and not heads.origin and heads.features == 0:
            heads = None
        whole = [a for a, (value, cut) in around.items() if not cut and value == got[0]]
        fixed = {value for value, cut in around.values() if not cut} - {got[0]}
        if (heads is None and not whole) or any(int(size) in fixed for size in inner):
            return  # written for this rank
    origin = heads.origin if heads is not None and heads.features == 0 else ""
    if local:
        origin = next((s.origin for s in scaled if isinstance(s, Count) and s.origin), "")
    if not origin:
        origin = next((a for a, (value, cut) in around.items() if not cut and value == got[0]), "")
    raise WrongHeads(
        f"this rank holds {features.size} of the {features.whole} features of {features.layer}, and makes {got[0]} "
        f"parts of {_product(got[1:])} of them: as many parts as all ranks have together, each smaller than in the "
        "whole model",
        origin,
    )


def _scales(size: Any, session: Any) -> bool:
    found = known(size, session)
    return found is not None and found.features != 0


# --- splits ----------------------------------------------------------------------------------------------------


def _split(
    name: str,
    source: Tensor,
    features: Features,
    out: Any,
    args: Any,
    kwargs: Any,
    session: Any,
    around: dict[str, tuple[int, bool]],
) -> None:
    pieces = [out] if isinstance(out, Tensor) else [leaf for leaf in out if isinstance(leaf, Tensor)]
    if _by_heads(name, features, pieces, args, kwargs, session):
        return
    from_right = source.dim() - features.dim
    bounds = {0}
    for section in features.sections:
        bounds.add(max(bounds) + section)
    starts = []
    for piece in pieces:
        dim = piece.dim() - from_right
        if name == "__getitem__" and piece.dim() != source.dim():
            dim = _indexed_dim(source, features, args[1])
        size = int(piece.shape[dim]) if 0 <= dim < piece.dim() else -1
        if size == features.size:
            place_features(piece, Features(dim, features.sections, features.whole, features.layer))
            continue
        offset = _offset(source, piece, features)
        if size < 0 or offset is None:
            continue
        starts.append(offset)
        numbers = [n for number in numbers_in(args[1:], kwargs) if (n := known(number, session)) is not None]
        ratio = features.whole // features.size
        a_whole_section = ratio > 1 and size in {section * ratio for section in features.sections}
        held = _between(features.sections, offset, offset + size)
        fixed = name != "chunk" and len(held) > 1 and a_whole_section and not any(n.features == 1 for n in numbers)
        if {offset, offset + size} <= bounds and not fixed:
            whole = features.whole * size // features.size
            place_features(piece, Features(dim, held, whole, features.layer))
            continue
        origin = next((n.origin for n in numbers if n.features == 0 and n.origin), "")
        parts = f"{len(features.sections)} sections of {list(features.sections)}" if len(bounds) > 2 else "one section"
        raise WrongHeads(
            f"{features.layer} holds {features.size} of {features.whole} features on this rank, in {parts}, and it "
            f"takes {offset} to {offset + size} of them: other features than in the whole model. Where several "
            f"projections are packed, 'colwise:3' (their number) or their sizes cut each on its own",
            origin,
        )


def _by_heads(name: str, features: Features, pieces: list[Tensor], args: Any, kwargs: Any, session: Any) -> bool:
    """Mark each piece if all heads were split by their size, or by their number on this rank; returns whether so."""
    given = args[1] if len(args) > 1 else next((kwargs[k] for k in ("split_size", "chunks") if k in kwargs), None)
    cut, counted = features.sections, known(given, session)
    if name not in ("split", "chunk") or not isinstance(given, int) or len(cut) > 1 or len(pieces) < 2:
        return False
    scales = counted is not None and counted.features == 1
    fixed = not _scales(given, session)
    sizes = {int(piece.numel()) for piece in pieces}
    ratio = features.whole // features.size
    if len(sizes) > 1 or not (fixed if name == "split" else scales):
        return False
    if name == "split" and int(given) * len(pieces) != features.size:  # of another dimension
        return False
    for index, piece in enumerate(pieces):
        why = (
            f"head {index} of the {len(pieces)} that this rank holds of {features.layer}, which {statement()} split "
            "off, apart from the others or in another order"
        )
        mark(piece, Piece(why, "", index, len(pieces), len(pieces) * ratio, features.layer))
    return True


def _between(sections: tuple[int, ...], start: int, stop: int) -> tuple[int, ...]:
    held, position = [], 0
    for section in sections:
        if start <= position and position + section <= stop:
            held.append(section)
        position += section
    return tuple(held)


def _offset(source: Tensor, piece: Tensor, features: Features) -> int | None:
    """The first feature of a piece that is a view; None for other pieces."""
    if piece.numel() == 0 or piece.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
        return None
    stride = source.stride(features.dim)
    return (piece.storage_offset() - source.storage_offset()) % (stride * features.size) // stride if stride else None


def _indexed_dim(source: Tensor, features: Features, index: Any) -> int:
    """The dimension of the features after an index; -1 where it is gone or unknown."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, Tensor) for part in parts):
        return -1
    missing = source.dim() - sum(part is not None and part is not Ellipsis for part in parts)
    spread: list[Any] = []
    for part in parts:
        spread += [slice(None)] * missing if part is Ellipsis else [part]
    position = taken = 0
    for part in spread:
        if part is None:
            position += 1
            continue
        if taken == features.dim:
            return position if isinstance(part, slice) else -1
        taken += 1
        position += isinstance(part, slice)
    return position + features.dim - taken


def _product(sizes: Any) -> int:
    product = 1
    for size in sizes:
        product *= int(size)
    return product
