"""The rules for shards and this rank's heads outside of planned modules. ShardCheck asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..nn import ColumnParallelLinear, Region, SharedHeadsLinear
from ..nn.region import shard_behind
from . import row_mixing
from .counts import Count, Counts
from .culprit import in_hook, name_of, statement
from .explained import explained, is_about_shapes
from .head_rules import FINITE, LOGIC, HeadRules, size_of_parts
from .marks import (
    Features,
    Kind,
    Local,
    Mixed,
    Piece,
    Rows,
    features_of,
    heads_of,
    is_finite,
    kind_of,
    mark,
    mark_of,
    note_finite,
    place_features,
    place_heads,
    place_rows,
    rows_of,
    usual_rows,
)
from .row_mixing import inner_size
from .side_effects import buffers_kept, random_state, restore

#: Functions that return values of a tensor to Python.
_READS = frozenset({"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "equal", "allclose"})
#: Styles whose modules depend on where the sequence is, or send rows.
_PLACED = ("colwise", "shared_heads", "dropout", "replicated")
REMEDY = (
    "Give the module that does it the style 'replicated', which runs it on the whole sequence, or end the sharded "
    "region before it ('gather_output'); several statements that together treat rows one by one are right in a module "
    "of their own with the style 'sequence'"
)


class Rules(HeadRules):
    """The rules of one checked forward. ``styles``: module -> style. ``divided``: as :func:`.plans.counted` returns."""

    row_remedy = REMEDY

    def __init__(
        self, model: nn.Module, region: Region, styles: dict[str, str], divided: Mapping[tuple[str, str], bool]
    ):
        self._region, self._model = region, model
        self.conclusive = True  # whether this rank held enough rows to judge by
        leaves = (n for n, style in styles.items() if style != "tensor_parallel")
        self._counts = Counts(model, self, divided, leaves, region.ranks)
        self.active = False
        self.stack: list[str] = []
        self.length: int | None = None  # length of the whole sequence
        self._rows_behind: dict[str, list[Rows | bool | None]] = {}  # 'sequence' module -> rows of each output
        self.failed_in = ""  # innermost module that raised

    def start(self) -> None:
        self._counts.lend()
        self.active = True

    def stop(self) -> None:
        self._counts.take_back()
        self.active = False

    @property
    def where(self) -> str:
        return self.stack[-1] if self.stack else type(self._model).__name__

    def note_on(self, error: BaseException) -> None:
        """Add a note to an error of the model's: what this rank holds (Python 3.11 and newer)."""
        if self.length is not None and not isinstance(error, RuntimeError) and hasattr(error, "add_note"):
            error.add_note(
                f"seqpar_kernels: in the first forward of a converted model, in {self.failed_in or self.where}. A rank "
                f"holds 1/{self._region.ranks} of the heads or features between colwise and rowwise layers, elsewhere "
                f"{self.held()}. The plan may lack 'whole_input' for a module that reads the shape of its input, or an "
                "attribute that counts heads or features in `divided`"
            )

    # --- functions -------------------------------------------------------------------------------------------------

    def call(
        self,
        func: Callable[..., Any],
        args: Any,
        kwargs: Any,
        tensors: list[Tensor],
        kind: Kind | None,
        trained: bool = False,
    ) -> Any:
        """Call a function on marked tensors, and mark the result.

        Raises:
            RuntimeError: the result, or an argument, would not be that of the whole model.
        """
        name = name_of(func)
        mixed = _mixed(tensors)
        local = min((m for t in tensors if isinstance(m := mark_of(t), Local)), key=_gravity, default=None)
        if name in _READS and (kind is Kind.SHARD or mixed is not None):
            self._read(name, tensors, mixed)
        if mixed is not None:
            joined = self._joined(func, name, args, kwargs) if kind is None else None
            if joined is not None:
                return joined
            written = row_mixing.changes_in_place(name, kwargs) and args and mark_of(args[0]) is mixed
            if kind is not None or (written and not isinstance(mixed, Piece)) or trained:
                raise RuntimeError(f"{self.where}: {statement()} takes {mixed.why}. {mixed.remedy or REMEDY}")
            out = func(*args, **kwargs)
            if name == "__setitem__" and not isinstance(mixed, Piece) and not isinstance(args[0], nn.Parameter):
                mark(args[0], mixed)
            return self._marked(out, mixed)
        if kind is Kind.PARTS and local is not None and local.of == "rows":
            raise RuntimeError(self._of_length(f"{statement()} puts a tensor made from it", local.statement))
        if kind in (Kind.PARTS, Kind.SHARD) and local is not None and local.of == "number" and not in_hook():
            raise RuntimeError(self._of_number(local))
        if kind is None:
            out = func(*args, **kwargs)
            made = self.made_of_counts(name, args, kwargs)
            found = min((m for m in (local, made) if m is not None), key=_gravity, default=None)
            return self._marked(out, found)
        self._refuse_numbers(name, args, kwargs)
        drawing = [] if kind is Kind.COPIED else random_state(tensors)
        try:
            out = func(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            if not is_about_shapes(error):
                raise
            region = self._region
            place = (self.length, region.ranks, region.rank, region.seq_dim)
            raise RuntimeError(
                explained(self.where, error, args, kwargs, tensors, *place, self, self._around())
            ) from error
        if name in ("size", "shape", "numel", "nelement", "__len__"):
            return self._sizes(name, out, args, kwargs)
        drawn = any(not torch.equal(a, b) for a, b in zip(drawing, random_state(tensors), strict=False))
        if drawn and kind is Kind.SHARD:
            raise RuntimeError(
                f"{self.where}: {statement()} draws random numbers for a sequence shard: they would depend on how the "
                "sequence is cut. Draw them where the sequence is whole, or use nn.Dropout with the style 'dropout'"
            )
        if kind is Kind.SHARD:
            return self._on_rows(func, name, args, kwargs, tensors, out)
        if kind is Kind.PARTS:
            return self._on_parts(func, name, args, kwargs, tensors, out, drawn)
        return self._marked(out, kind)

    def inside(self, func: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Call a function in a module of style 'tensor_parallel', which may use parameters."""
        if any(kind_of(t) is Kind.PARTS for t in tensors):
            return self.call(func, args, kwargs, tensors, Kind.PARTS)
        if any(isinstance(mark_of(t), (Mixed, Local)) for t in tensors):
            return self.call(func, args, kwargs, tensors, None)
        out = func(*args, **kwargs)
        made = self.made_of_counts(name_of(func), args, kwargs)
        return out if made is None else self._marked(out, made)

    def _marked(self, out: Any, found: Any) -> Any:
        if isinstance(out, (Tensor, tuple, list)):
            mark(out, found)
        return out

    def _read(self, name: str, tensors: list[Tensor], mixed: Mixed | None) -> None:
        finite = all(map(is_finite, tensors))
        if finite or in_hook():
            return
        what = mixed.why if mixed is not None else f"values of a sequence shard, {self.held()}"
        raise RuntimeError(
            f"{self.where}: {statement()} reads {what}: every rank would go on with another number. "
            f"{REMEDY}; to look at values only, use a forward hook"
        )

    def _on_rows(
        self, func: Callable[..., Any], name: str, args: Any, kwargs: Any, tensors: list[Tensor], out: Any
    ) -> Any:
        seq_dim, writes = self._region.seq_dim, row_mixing.changes_in_place(name, kwargs)
        result = args[0] if writes and args else out
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not leaves:
            return out
        shards = [(t, rows_of(t, seq_dim)) for t in tensors if kind_of(t) is Kind.SHARD]
        if any(shard_behind(shard) is not shard for shard, _ in shards):
            return self._on_stand_in(result, leaves, out)
        others = [t for t in tensors if kind_of(t) is not Kind.SHARD]
        found: list[Rows | bool | None]
        simple = row_mixing.elementwise(name, shards, others, result)
        if simple is not None:
            found = [simple]
        else:
            self.conclusive &= max(rows.count for _, rows in shards) > 1
            found = self._tried(func, args, kwargs, shards, name)
        if len(found) != len(leaves):
            found = [None] * len(leaves)
        finite = name in FINITE or (name in LOGIC and all(map(is_finite, tensors)))
        why = ""
        for leaf, rows in zip(leaves, found, strict=True):
            if isinstance(leaf, nn.Parameter):
                continue
            if rows is False:
                made = self.made_of_counts(name, args, kwargs)
                mark(leaf, made)
            elif isinstance(rows, Rows):
                mark(leaf, Kind.SHARD)
                place_rows(leaf, rows)
            else:
                why = why or self._why(others)
                mark(leaf, Mixed(why))
            if finite:
                note_finite(leaf)
        return out

    def _on_stand_in(self, result: Any, leaves: list[Tensor], out: Any) -> Any:
        """Judge results of a stand-in of 'whole_input', which has a shape and no values."""
        for leaf in leaves:
            if shard_behind(leaf) is leaf:
                if leaf.is_floating_point() and leaf.numel() and bool(leaf.isnan().any()) and not in_hook():
                    raise RuntimeError(
                        f"{self.where}: {statement()} computes with the input of a module of style 'whole_input', "
                        "which shows its shape only; the style 'gather_input' gives such a module the values"
                    )
                mark(leaf, Kind.SHARD)
        return out

    def _tried(
        self, func: Callable[..., Any], args: Any, kwargs: Any, shards: list[tuple[Tensor, Rows]], name: str
    ) -> list[Rows | bool | None]:
        try:
            return row_mixing.tried(func, args, kwargs, shards, name, self._region.seq_dim)
        except row_mixing.Undecided as reason:
            raise RuntimeError(
                f"{self.where}: {statement()} works on a sequence shard, and whether it treats rows one by one could "
                f"not be tried ({reason}). {REMEDY}"
            ) from reason

    def _why(self, others: list[Tensor]) -> str:
        made = next((m.statement for t in others if isinstance(m := mark_of(t), Local) and m.of == "rows"), None)
        of_length = f", with a tensor made from the length of the shard by {made}" if made else ""
        return (
            f"what {statement()} in {self.where} made of a sequence shard{of_length}: it does not treat rows one by "
            f"one and alike, and has {self.held()} only"
        )

    def of_positions(self, parameter: str, local: Local) -> str:
        return (
            f"what {statement()} in {self.where} made of {parameter!r} and of what {local.statement} counts: the "
            f"rows of a shard, {self.held()}, from 0 on"
        )

    def _sizes(self, name: str, out: Any, args: Any, kwargs: Any) -> Any:
        """The sizes of a tensor, as Counts where they scale with the ranks."""
        tensor = args[0] if args else None
        if not isinstance(tensor, Tensor) or shard_behind(tensor) is not tensor:
            return out
        place: int | None = None
        count: Count | None = None
        if kind_of(tensor) is Kind.SHARD:
            rows, length = rows_of(tensor, self._region.seq_dim), self.length or 0
            place = self._row_dim(tensor, rows)
            size = int(tensor.shape[place]) if place is not None else 0
            if rows.count and size and size % rows.count == 0:  # the batch may be merged into it
                whole = size // rows.count * length if length else size
                count = Count.of(size, self, rows=True, whole=whole)
        else:
            place, count = size_of_parts(tensor, self)
        if place is None or count is None:
            return out
        if name in ("numel", "nelement"):
            whole = int(out) // int(count) * count.whole if count else int(out)
            return Count.of(out, self, count.features, count.rows, whole=whole)
        if name == "__len__":
            self._refuse_len(place, count)
            return out
        if isinstance(out, torch.Size):
            return torch.Size([*out[:place], count, *out[place + 1 :]])
        asked = args[1] if len(args) > 1 else kwargs.get("dim")
        return count if isinstance(asked, int) and asked % tensor.dim() == place and out == int(count) else out

    def _row_dim(self, shard: Tensor, rows: Rows) -> int | None:
        places = [d for d in range(shard.dim()) if inner_size(shard, d) == rows.inner]
        places = [d for d in places if shard.shape[d] == rows.count] or places
        usual = self._region.seq_dim % max(shard.dim(), 1)
        return usual if usual in places else places[-1] if places else None

    # --- planned modules -------------------------------------------------------------------------------------------

    def entering(self, name: str, style: str, gathers: bool, value: Tensor) -> None:
        """Check the input of a planned module."""
        found = mark_of(value)
        if isinstance(found, Mixed):
            raise RuntimeError(f"{name}: its input is {found.why}. {found.remedy or REMEDY}")
        if kind_of(value) is Kind.SHARD and (style in _PLACED or gathers):
            self.placed(name, value)

    def placed(self, name: str, shard: Tensor) -> None:
        """Check that a shard has its rows where the plan says, before a module depends on it."""
        if shard_behind(shard) is not shard:
            return
        rows, usual = rows_of(shard, self._region.seq_dim), usual_rows(shard, self._region.seq_dim)
        if rows != usual and rows.count > 1:
            raise RuntimeError(
                f"{name}: takes a sequence shard with its {rows.count} rows at dimension {self._region.seq_dim}, but "
                f"its input {list(shard.shape)} has been transposed or reshaped and holds them elsewhere; "
                "parallelize(..., seq_dim=) says where they are"
            )

    def leaves_region(self, name: str, value: Tensor) -> None:
        """Check a tensor that is gathered behind a module."""
        found = mark_of(value)
        if isinstance(found, Mixed):
            raise RuntimeError(f"{name}: 'gather_output' is to gather {found.why}. {found.remedy or REMEDY}")
        if kind_of(value) is Kind.SHARD:
            self.placed(name, value)

    def leaving(self, name: str, style: str, module: nn.Module, args: Any, output: Any) -> None:
        """Note where the rows or features of a planned module's output are."""
        first = next((leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        behind = self._rows_behind.get(name, [])
        for i, leaf in enumerate(leaves):
            known = behind[i] if len(behind) == len(leaves) else None
            if isinstance(known, Rows) and kind_of(leaf) is Kind.SHARD:
                place_rows(leaf, known)
            elif isinstance(module, ColumnParallelLinear) and leaf.dim():
                if isinstance(module, SharedHeadsLinear):
                    sections: tuple[int, ...] = (int(leaf.shape[-1]),)
                else:
                    sizes = module.sharded["weight"].sizes(module.out_features)
                    sections = tuple(size // self._region.ranks for size in sizes)
                if sum(sections) == leaf.shape[-1]:
                    place_features(leaf, Features(leaf.dim() - 1, sections, module.out_features, name))
            elif first is not None and leaf.shape == first.shape:
                if kind_of(leaf) is Kind.SHARD and kind_of(first) is Kind.SHARD and shard_behind(first) is first:
                    place_rows(leaf, rows_of(first, self._region.seq_dim))
                elif kind_of(leaf) is Kind.PARTS and features_of(leaf) is None and heads_of(leaf) is None:
                    if (features := features_of(first)) is not None:
                        place_features(leaf, features)
                    elif (heads := heads_of(first)) is not None:
                        place_heads(leaf, heads)

    def row_by_row(self, name: str, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Try ``forward`` of a module that the plan calls 'sequence'.

        Raises:
            RuntimeError: the module mixes the rows of its input, or draws random numbers.
        """
        seq_dim = self._region.seq_dim
        leaves = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and kind_of(t) is Kind.SHARD}
        shards = [(t, rows_of(t, seq_dim)) for t in leaves.values()]
        if not shards or any(shard_behind(t) is not t for t, _ in shards):
            return
        self.conclusive &= max(rows.count for _, rows in shards) > 1
        states = random_state([t for t, _ in shards])
        with buffers_kept(module):
            try:
                found = row_mixing.tried(forward, args, kwargs, shards, "forward", seq_dim)
                alike = None in found or row_mixing.of_any_length(forward, args, kwargs, shards, found)
            except row_mixing.Undecided as reason:
                raise RuntimeError(
                    f"{name}: the plan says 'sequence', for modules that treat rows one by one; whether "
                    f"{type(module).__name__} does could not be tried ({reason}). {REMEDY}"
                ) from reason
        now = random_state([t for t, _ in shards])
        if any(not torch.equal(a, b) for a, b in zip(states, now, strict=True)):
            restore(states, shards[0][0])
            raise RuntimeError(
                f"{name}: the plan says 'sequence', but {type(module).__name__} draws random numbers (a dropout, say): "
                "they would depend on how the sequence is cut. Give an nn.Dropout in it the style 'dropout' and what "
                "has parameters 'sequence', or set its probability to 0"
            )
        self._rows_behind[name] = found
        if None in found:
            raise RuntimeError(
                f"{name}: the plan says 'sequence', for modules that treat the rows of their input one by one, but "
                f"{type(module).__name__} mixes them: on a shard it would see {self.held()} only. Give it the style "
                "'replicated', which runs it on the whole sequence"
            )
        if not alike:
            raise RuntimeError(
                f"{name}: the plan says 'sequence', for modules that treat the rows of their input one by one, but "
                f"what {type(module).__name__} makes of a row depends on how many there are: on a shard it would count "
                f"{self.held()} only. Give it the style 'replicated', which runs it on the whole sequence"
            )


def _mixed(tensors: list[Tensor]) -> Mixed | None:
    """The mark of a result of mixed ``tensors``: a Piece if all are of one head."""
    found = [m for t in tensors if isinstance(m := mark_of(t), Mixed)]
    if not found:
        return None
    first = found[0]
    if all(isinstance(m, Piece) and isinstance(first, Piece) and m.index == first.index for m in found):
        return first
    return next((m for m in found if not isinstance(m, Piece)), Mixed(first.why, first.remedy))


def _gravity(local: Local) -> int:
    return ("rows", "number", "heads").index(local.of)
