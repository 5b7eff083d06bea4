"""DTensors that know every rectangle of the whole that they hold, for checkpoints, files and gathering."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement
from torch.utils._pytree import tree_map

from ..layout import vocabulary_range
from ..nn.sharding import ShardSpec, full_tensor
from .cut import Cut
from .drawn import draw_whole, draws_like, listed_to_draw

#: Elementwise optimizer steps for which DTensor has no rule.
_FUSED = frozenset(
    getattr(step, form)
    for step in (torch.ops.aten._fused_sgd_, torch.ops.aten._fused_adagrad_)
    for form in step.overloads()
    if form != "out"
)
_NORMS = frozenset({torch.ops.aten.linalg_vector_norm.default, torch.ops.aten._foreach_norm.Scalar})


@functools.cache
def _written(func: Any) -> tuple[int, ...]:
    """Which arguments an operator writes to."""
    found = enumerate(func._schema.arguments)
    return tuple(i for i, arg in found if arg.alias_info is not None and arg.alias_info.is_write)


def _count_writes(func: Any, args: Any) -> None:
    """Let autograd know: DTensor writes below it, and a weight saved for the backward would be taken for unchanged."""
    for i in _written(func):
        for tensor in args[i] if i < len(args) and isinstance(args[i], (list, tuple)) else args[i : i + 1]:
            if isinstance(tensor, CutTensor) and not tensor._local_tensor.is_inference():
                torch.autograd.graph.increment_version(tensor._local_tensor)


def _local(value: Any) -> Any:
    return value._local_tensor if isinstance(value, DTensor) else value


def _never_empty(tensor: Any, value: float) -> Any:
    """``value`` in place of a part without elements, of which torch takes no maximum."""
    if not isinstance(tensor, DTensor):
        return tensor
    part = tensor._local_tensor
    part = part if part.numel() else part.new_full((1,) * part.dim(), value)
    return DTensor(part, tensor._spec, requires_grad=False)


#: Functions of all elements whose results over the parts torch combines without counting elements.
_REDUCTIONS = frozenset(
    {"sum", "linalg_vector_norm", "_foreach_norm", "max", "amax", "min", "amin", "all", "any", "prod"}
)
#: Functions that make a tensor like another, beside those that torch tags as pointwise.
_LIKE = frozenset({
    "_local_scalar_dense", "_to_copy", "alias", "clone", "copy_", "detach", "empty_like", "fill_", "full_like",
    "is_same_size", "lift_fresh", "ones_like", "zero_", "zeros_like",
})  # fmt: skip


def _balanced(args: Any) -> list[Any]:
    """Arguments that are cut as tensor_split cuts, which torch takes for parts as chunk cuts."""
    found = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(t, CutTensor)]
    return [t for t in found if t.cut.spec is not None and t.cut.spec.balanced and t.device_mesh.ndim == 1]


def _runs_on_parts(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether what torch makes of the parts is right whatever their sizes."""
    name = func._schema.name.partition("::")[2]
    if torch.Tag.pointwise in func.tags or name in _LIKE:
        return True
    if name in _REDUCTIONS:
        dims = {"dim", "dims"} & {argument.name for argument in func._schema.arguments}
        given = any((kwargs or {}).get(dim) is not None for dim in dims)
        return not given and (name in ("linalg_vector_norm", "_foreach_norm") or len(args) == 1) and len(args) < 3
    return name.startswith("_foreach_")


def _with_cuts(out: Any, args: Any, balanced: list[Any]) -> Any:
    """``out`` as CutTensors, where its parts are as those of the arguments."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple))]
    if isinstance(out, (list, tuple)):
        likes = [next(iter(_balanced(some)), None) for some in zip(*lists, strict=False)] if lists else []
        return [_with_cut(one, like) for one, like in zip(out, likes, strict=True)] if len(likes) == len(out) else out
    return _with_cut(out, balanced[0])


def _with_cut(out: Any, like: Any) -> Any:
    if like is None or type(out) is not DTensor or out.shape != like.shape or out.placements != like.placements:
        return out
    return for_checkpoint(out, like.cut)


def _gathered(value: Any) -> Any:
    if isinstance(value, CutTensor) and value.cut.spec is not None:
        return CutTensor.redistribute(value, placements=[Replicate()])
    return value


class CutTensor(DTensor):
    """A DTensor that gives torch.distributed.checkpoint every rectangle it holds; a plain DTensor knows one only."""

    cut: Cut
    _chunks: list[tuple[ChunkStorageMetadata, Tensor]]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """DTensor's, but random numbers are drawn for the whole tensor and cut."""
        kwargs = kwargs or {}
        drawn = listed_to_draw(func, args, kwargs)
        if isinstance(drawn, CutTensor):
            if drawn.device_mesh.ndim > 1:
                raise RuntimeError(
                    f"{func.__name__}: takes no tensor that fully_shard has cut further, of shape "
                    f"{tuple(drawn.shape)}: initialise before, or draw a whole tensor that load_state_dict then cuts"
                )
            return draw_whole(func, drawn, args, kwargs)
        if draws_like(func):
            return drawn_like(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if not torch.compiler.is_compiling():
            _count_writes(func, args)
        if func in _FUSED:
            return func(*tree_map(_local, args), **tree_map(_local, kwargs or {}))
        if func in _NORMS and len(args) > 1 and args[1] in (math.inf, -math.inf):
            args = tree_map(functools.partial(_never_empty, value=0.0 if args[1] > 0 else math.inf), args)
            return func(*args, **(kwargs or {}))
        balanced = _balanced(args)
        if not balanced:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if _runs_on_parts(func, args, kwargs):
            return _with_cuts(super().__torch_dispatch__(func, types, args, kwargs), args, balanced)
        if _written(func):
            raise NotImplementedError(
                f"{func}: not possible on a tensor of shape {tuple(balanced[0].shape)} that is cut as tensor_split "
                "cuts (experts that ranks do not divide); work on full_tensor() or to_local()"
            )
        return super().__torch_dispatch__(func, types, *tree_map(_gathered, (args, kwargs or {})))

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self._local_tensor)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk, _ in self._chunks
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._chunks]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for chunk, view in self._chunks if chunk.offsets == index.offset)

    def redistribute(
        self, device_mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None, **options: Any
    ) -> DTensor:
        """DTensor's. Where sections are unequal, only to Replicate, as ``full_tensor`` does."""
        if not self.cut.unequal or placements is None or tuple(placements) == self.placements:
            return super().redistribute(device_mesh, placements, **options)
        if self.device_mesh.ndim > 1 or not all(isinstance(p, Replicate) for p in placements):
            raise NotImplementedError(
                f"redistribute: expected Replicate on the tensor-parallel mesh, of packed sections {self.cut.spec}, "
                f"got {placements}; use full_state_dict"
            )
        assert self.cut.spec is not None
        whole = full_tensor(self._local_tensor, self.cut.spec, self.device_mesh.get_group())
        return DTensor.from_local(whole, self.device_mesh, placements, run_check=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as a plain DTensor, which ``torch.load`` takes by default, where that loses nothing."""
        if self.cut.unequal:
            return super().__reduce_ex__(protocol)
        return DTensor(self._local_tensor.detach(), self._spec, requires_grad=False).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> CutTensor:
        memo[id(self)] = copy = for_checkpoint(self, self.cut, self._local_tensor.detach().clone())
        return copy


# Names in a file of a state_dict. torch.load reads it by default (weights_only=True) because they are allowed.
torch.serialization.add_safe_globals([CutTensor, Cut, ShardSpec, ChunkStorageMetadata])


def cut_tensor(part: Tensor, cut: Cut, mesh: DeviceMesh, first_row: int = 0) -> CutTensor:
    """The CutTensor of ``part``, for checkpoints."""
    out: CutTensor = CutTensor(part.detach(), dtensor_spec(part, cut, mesh), requires_grad=False)
    out.cut, out._chunks = cut, cut.chunks(part.detach(), first_row)
    return out


@torch.no_grad()
def drawn_like(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> CutTensor:
    """rand_like, randn_like or randint_like of a CutTensor: this rank's part of the numbers drawn for the whole.

    On CPU ranks DTensor's own draw the same part on every rank.

    Raises:
        RuntimeError: fully_shard has cut it further.
    """
    like = args[0] if args else kwargs["input"]
    if like.device_mesh.ndim > 1:
        raise RuntimeError(
            f"{func.__name__}: takes no tensor that fully_shard has cut further, of shape {tuple(like.shape)}: draw "
            "the whole tensor, or this rank's part (to_local())"
        )
    whole = torch.empty(like.cut.shape, dtype=like.dtype, device=like.device)
    whole = func(whole, *args[1:], **kwargs) if args else func(**{**kwargs, "input": whole})
    return cut_tensor(whole if like.cut.spec is None else like.cut.part(whole), like.cut, like.device_mesh)


def dtensor_spec(part: Tensor, cut: Cut, mesh: DeviceMesh) -> Any:
    stride = torch.empty(cut.shape, device="meta").stride()
    placements = [cut.placement()]
    return DTensor.from_local(part.detach(), mesh, placements, run_check=False, shape=cut.shape, stride=stride)._spec


def first_row_of(param: DTensor, part_rows: int) -> int:
    """The first of the rows that FSDP left on this rank, in this rank's part of ``part_rows`` rows."""
    mesh = param.device_mesh
    if mesh.ndim != 2:
        return 0
    ranks, rank = mesh.size(0), mesh.get_local_rank(0)
    return vocabulary_range(part_rows, ranks, rank)[0]


def for_checkpoint(tensor: DTensor, cut: Cut, part: Tensor | None = None) -> CutTensor:
    """The CutTensor of a parameter, or of optimizer state of its shape.

    ``part`` takes the place of the local tensor of ``tensor``.
    """
    part = tensor._local_tensor.detach() if part is None else part
    rows = cut.part_shape()[0] if cut.shape else 0
    out: CutTensor = CutTensor(part, tensor._spec, requires_grad=False)
    out.cut, out._chunks = cut, cut.chunks(part, first_row_of(tensor, rows))
    return out
