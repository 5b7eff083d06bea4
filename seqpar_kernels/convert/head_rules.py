"""What may be done with this rank's heads and features: a part of :class:`.rules.Rules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..nn import Region
from . import head_mixing, row_mixing
from .counts import Count, Counts, LocalNumber, known, numbers_in
from .culprit import in_hook, statement
from .explained import rows_text
from .head_mixing import Found, Held
from .heads import WrongHeads, follow
from .marks import (
    Features,
    Heads,
    Kind,
    Local,
    Mixed,
    Piece,
    Rows,
    features_of,
    heads_of,
    is_finite,
    mark,
    mark_of,
    note_finite,
    place_features,
    place_heads,
)

FINITE = frozenset({"isnan", "isinf", "isfinite"})
LOGIC = frozenset({"any", "all", "logical_not", "logical_or", "logical_and", "__or__", "__and__", "__invert__"})
_SIZES = frozenset({"view", "reshape", "expand", "unflatten", "repeat", "split", "narrow", "tile", "__getitem__"})
_FOLLOWED = frozenset(
    {"__getitem__", "view", "reshape", "unflatten", "split", "chunk", "tensor_split", "split_with_sizes", "narrow"}
) | {"unbind", "__get__", "unsafe_split", "unsafe_chunk", "view_as", "reshape_as"}
_LIKE = frozenset({"zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty"})
_JOINS = frozenset({"stack", "cat", "concat", "concatenate"})
_FILLS = frozenset({"full", "tensor", "as_tensor", "scalar_tensor", "full_like", "new_full", "new_tensor", "fill_"})
_NUMBERING = frozenset({"arange", "range", "linspace", "logspace", "eye", "__getitem__", "narrow", "tril_indices"})
REMEDY = (
    "Give the module that does it the style 'replicated', which runs it whole on every rank. A norm over all heads as "
    "a module of its own takes 'split_norm'; what differs from head to head (slopes, scales) is to be a parameter with "
    "an entry for each head, named in the plan's `cut`"
)


class HeadRules:
    """The methods of Rules that judge tensor-parallel tensors, and numbers that count."""

    _region: Region
    _counts: Counts
    length: int | None
    stack: list[str]
    active: bool
    where: Any

    def held(self) -> str:
        """The rows of this rank."""
        return rows_text(self.length, self._region.ranks, self._region.rank)

    def _around(self) -> dict[str, tuple[int, bool]]:
        return self._counts.around(self.stack)

    # --- functions -------------------------------------------------------------------------------------------------

    def _on_parts(
        self,
        func: Callable[..., Any],
        name: str,
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        out: Any,
        drawn: bool,
    ) -> Any:
        """Mark what a function made of tensor-parallel tensors."""
        if name in _SIZES and isinstance(out, (Tensor, tuple, list)):
            numbers = [n for i in numbers_in(args[1:], kwargs) if (n := known(i, self)) is not None and n.rows]
            if numbers:
                raise RuntimeError(self._of_length(f"{statement()} uses it", f"the length {int(numbers[0])}"))
        writes = row_mixing.changes_in_place(name, kwargs) and bool(args) and isinstance(args[0], Tensor)
        result = args[0] if writes else out
        tracked = [(t, features_of(t), heads_of(t)) for t in tensors]
        tracked = [(t, features, heads) for t, features, heads in tracked if features or heads]
        by_heads = [(t, heads) for t, _, heads in tracked if heads]
        local = next((m for t in tensors if isinstance(m := mark_of(t), Local)), None)
        if isinstance(result, (Tensor, tuple, list)) and (not writes or (mark_of(result) is not None)):
            mark(result, Kind.PARTS)
        if not tracked:
            return out
        if not by_heads:
            try:
                follow(name, args, kwargs, out, tensors, self, self._around())
            except WrongHeads as wrong:
                raise RuntimeError(self._wrong_heads(wrong)) from wrong
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        pending = [leaf for leaf in leaves if not isinstance(mark_of(leaf), Piece)]
        if not pending or (not by_heads and name in _FOLLOWED):
            return out
        held = [_held(t, features, heads) for t, features, heads in tracked]
        if local is None and not by_heads and name in row_mixing.ELEMENTWISE:
            return out
        if drawn or name in _LIKE:
            _place_alike(leaves, by_heads)
            return out
        if len({h.rows.count for h in held}) > 1 and (not by_heads or name in _JOINS):
            return out  # several projections put together
        rest = [t for t in tensors if all(t is not h.tensor for h in held)]
        others = [t for t in rest if not isinstance(mark_of(t), Local)]
        simple = None
        if all(h.group == 1 for h in held):
            simple = row_mixing.elementwise(name, [(h.tensor, h.rows) for h in held], rest, result)
        if local is not None and local.numbered and all(h.rows.count == 1 for h in held):
            raise RuntimeError(self._numbered(local))  # of a single head a trial would not show it
        try:
            found = (
                [Found(simple)]
                if simple is not None
                else head_mixing.tried(func, args, kwargs, held, others, name, self._doubled)
            )
        except row_mixing.Undecided:
            _place_alike(leaves, by_heads)
            return out
        finite = name in FINITE or (name in LOGIC and all(map(is_finite, tensors)))
        if len(found) == len(leaves):
            for leaf, is_ in zip(leaves, found, strict=True):
                self._placed_parts(leaf, is_, tracked, local)
                if finite:
                    note_finite(leaf)
        return out

    def _placed_parts(
        self,
        leaf: Tensor,
        found: Found,
        tracked: list[tuple[Tensor, Features | None, Heads | None]],
        local: Local | None,
    ) -> None:
        """Mark one result of a trial."""
        if isinstance(leaf, nn.Parameter):
            return
        _, features, heads = next((entry for entry in tracked if entry[2] is not None), tracked[0])
        if found.rows is not None:
            if heads is not None:
                whole = found.rows.count * max(heads.whole // max(heads.rows.count, 1), 1)
                place_heads(leaf, Heads(found.rows, whole, heads.layer, found.group))
            elif features is not None and features_of(leaf) is None:
                _place_section(leaf, found.rows, features)
        elif found.constant:
            if local is not None:
                mark(leaf, local)
        elif found.picked is not None and heads is not None:
            why = self._made(f"head {found.picked} of the {heads.rows.count} of {heads.whole} heads", heads.layer)
            mark(leaf, Piece(why, REMEDY, found.picked, heads.rows.count, heads.whole, heads.layer))
        elif local is not None:
            raise RuntimeError(self._numbered(local))
        elif heads is not None:
            what = f"the {heads.rows.count} of {heads.whole} heads"
            mark(leaf, Mixed(f"{self._made(what, heads.layer)}: it mixes them, or picks some", REMEDY))
        elif features is not None:
            what = f"the {features.size} of {features.whole} features"
            mark(leaf, Mixed(f"{self._made(what, features.layer)}: it mixes them", REMEDY))

    def _numbered(self, local: Local) -> str:
        return (
            f"{self.where}: {statement()} uses what {local.statement} made: its entries are numbered by this rank's "
            f"heads or features, from 0 on, and would be those of the first rank everywhere. {REMEDY}"
        )

    def _made(self, what: str, layer: str) -> str:
        return f"what {statement()} in {self.where} made of {what} that this rank holds of {layer}"

    def _joined(self, func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
        """All heads of this rank put together again; None where it is something else."""
        parts = args[0] if args else kwargs.get("tensors")
        if name not in _JOINS or not isinstance(parts, (list, tuple)) or not parts:
            return None
        pieces = [m for t in parts if isinstance(m := mark_of(t), Piece)]
        if len(pieces) != len(parts) or [p.index for p in pieces] != list(range(pieces[0].count)):
            return None
        if len({(p.count, p.whole) for p in pieces}) > 1:
            return None
        out = func(*args, **kwargs)
        mark(out, Kind.PARTS)
        dim = int(kwargs.get("dim", args[1] if len(args) > 1 else 0)) % out.dim()
        inner = row_mixing.inner_size(out, dim)
        if name != "stack":
            inner *= int(out.shape[dim]) // len(parts)
        place_heads(out, Heads(Rows(len(parts), inner), pieces[0].whole, pieces[0].layer))
        return out

    def _doubled(self, leaf: Any) -> Any:
        """An argument for a trial with twice as many heads."""
        if isinstance(leaf, slice):
            return slice(self._doubled(leaf.start), self._doubled(leaf.stop), leaf.step)
        number = known(leaf, self)
        return leaf if number is None or number.features != 1 else int(number) * 2

    # --- numbers ---------------------------------------------------------------------------------------------------

    def made_of_counts(self, name: str, args: Any, kwargs: Any) -> Local | None:
        """The mark of a tensor made with a count of this rank; None where none is among the arguments."""
        leaves = tree_leaves((args, kwargs))
        counts = [n for number in numbers_in(args, kwargs) if (n := known(number, self)) is not None]
        apart = [n for n in counts if n.rows or (n.features != 0 and int(n) != n.whole)]
        computed = any(isinstance(leaf, LocalNumber) and known(leaf.count, self) is not None for leaf in leaves)
        if name in row_mixing.ELEMENTWISE and name not in ("to", "type"):
            computed |= any(int(n) != n.whole for n in apart)
        elif name in _FILLS:
            values = args if name in ("tensor", "as_tensor", "scalar_tensor") else (args[1:], kwargs.get("fill_value"))
            computed |= any((n := known(leaf, self)) is not None and int(n) != n.whole for leaf in tree_leaves(values))
        if computed:
            return Local(statement(), "number")
        if not apart:
            return None
        return Local(statement(), "rows" if any(n.rows for n in apart) else "heads", name in _NUMBERING)

    def _refuse_numbers(self, name: str, args: Any, kwargs: Any) -> None:
        """A count of this rank as a factor or summand."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, LocalNumber):
                self.number_of(leaf.count)
            elif name in row_mixing.ELEMENTWISE and name not in ("to", "type"):
                number = known(leaf, self)
                if number is not None and int(number) != number.whole:
                    self.number_of(number)

    def number_of(self, count: Count) -> None:
        """
        Raises:
            RuntimeError: a forward computes with a count of this rank as a number.
        """
        if self.active and not in_hook():
            raise RuntimeError(f"{self.where}: {statement()} computes with {self._counted(count)}")

    def branches(self, counts: list[Count]) -> None:
        """
        Raises:
            RuntimeError: a comparison of ``counts`` has another result than in the unsharded model.
        """
        if self.active and not in_hook():
            what = self._counted(next((c for c in counts if c.rows), counts[0]))
            raise RuntimeError(
                f"{self.where}: {statement()} compares, with another result than in the whole model, {what}"
            )

    def _counted(self, count: Count) -> str:
        if count.rows:
            return (
                f"the length of a sequence shard, {self.held()}: every rank would use another number than the whole "
                f"model. {self.row_remedy}; between colwise and rowwise layers 'whole_input' shows the whole length"
            )
        source = f" (from {count.origin})" if count.origin else ""
        return (
            f"{int(count)}{source}, which counts this rank's heads or features: {count.whole} in the whole model. Hold "
            "that number in an attribute of its own, which `divided` does not name"
        )

    row_remedy: str

    def _refuse_len(self, place: int | None, count: Count | None) -> None:
        if place == 0 and count is not None and int(count) != count.whole and self.active and not in_hook():
            raise RuntimeError(
                f"{self.where}: {statement()} takes len() of {self._counted(count)}. Where the number serves as a size "
                "only, .shape[0] gives it"
            )

    def _of_number(self, local: Local) -> str:
        return (
            f"{self.where}: {statement()} uses what {local.statement} computed from a count of this rank (of rows, "
            "heads or features): every rank would use another number than the whole model. Hold the number of the "
            "whole model in an attribute that `divided` does not name, or compute where the sequence is whole"
        )

    def _of_length(self, what: str, source: str) -> str:
        return (
            f"{self.where}: {what} together with a tensor-parallel tensor, which has all rows; {source} counts only "
            f"{self.held()}. A module that reads the shape of its input before its colwise layers needs "
            "'whole_input' in the plan; positions and masks are to be made where the sequence is whole"
        )

    def _wrong_heads(self, wrong: WrongHeads) -> str:
        module, _, attribute = wrong.attribute.rpartition(".")
        if attribute and wrong.attribute in self._around():
            module, attribute = self.where, wrong.attribute
        elif module.endswith(".config") or module == "config":
            module, attribute = module[: -len(".config")], f"config.{attribute}"
        help_ = (
            f"Divide the attribute that counts heads or features: ParallelPlan(..., divided={{{module!r}: "
            f"({attribute!r},)}})"
            if attribute
            else "Where an attribute counts heads or features, name it in the plan's `divided` "
            "(ParallelPlan(..., divided={module: (attribute,)})); a number in the code is to be written as -1"
        )
        return f"{self.where}: {statement()}: {wrong}. {help_}"


def size_of_parts(tensor: Tensor, session: Any) -> tuple[int | None, Count | None]:
    """Which dimension of a tensor-parallel tensor scales with the ranks, and its size."""
    features, heads = features_of(tensor), heads_of(tensor)
    if features is not None:
        return features.dim, Count.of(features.size, session, features=1, whole=features.whole)
    if heads is None or not heads.rows.count:
        return None, None
    rows, sizes = heads.rows, [int(size) for size in tensor.shape]
    inner = [row_mixing.inner_size(tensor, dim) for dim in range(tensor.dim())]
    own = [d for d, size in enumerate(sizes) if size == rows.count and inner[d] == rows.inner]
    merged = [
        d for d, size in enumerate(sizes) if inner[d] <= rows.inner and size * inner[d] >= rows.count * rows.inner
    ]
    if not own and not merged:
        return None, None
    place = (own or merged)[-1]
    return place, Count.of(sizes[place], session, features=1, whole=sizes[place] * heads.whole // rows.count)


def _held(tensor: Tensor, features: Features | None, heads: Heads | None) -> Held:
    if heads is not None:
        return Held(tensor, heads.rows, heads.group)
    assert features is not None
    # Packed sections of one size hold the same heads or features of each: what moves, moves in all of them.
    count = features.sections[0] if len(set(features.sections)) == 1 else features.size
    return Held(tensor, Rows(count, row_mixing.inner_size(tensor, features.dim)))


def _place_alike(leaves: list[Tensor], by_heads: list[tuple[Tensor, Heads]]) -> None:
    """What was not tried holds its heads where a tensor of the same shape does."""
    for leaf in leaves:
        heads = next((heads for t, heads in by_heads if t.shape == leaf.shape), None)
        if heads is not None and not isinstance(leaf, nn.Parameter):
            place_heads(leaf, heads)


def _place_section(leaf: Tensor, rows: Rows, features: Features) -> None:
    """A result with one feature for one of each section."""
    for dim in range(leaf.dim()):
        if leaf.shape[dim] == rows.count and row_mixing.inner_size(leaf, dim) == rows.inner:
            whole = features.whole * rows.count // features.size
            place_features(leaf, Features(dim, (rows.count,), whole, features.layer))
            return
