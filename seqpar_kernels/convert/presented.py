"""The parameters of a converted model, presented as DTensors to everyone but the modules that compute with them.

A module computes with plain parameters, this rank's parts: a DTensor would cost tens of microseconds of host time at
every use. Optimizers, ``clip_grad_norm_``, ``fully_shard``, ``state_dict`` and ``torch.distributed.checkpoint`` never
take a parameter by its name in a module, they list parameters (``parameters()``, ``named_parameters()``,
``state_dict()``, through whatever wraps the model). So listing gives DTensors, which share memory and gradient with the
parts, and taking gives the parts. Norms, row statistics and whole-matrix optimizers (clip_grad_norm_, Muon) are then
right by construction, and a computation costs one dictionary look-up more.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Sequence, ValuesView
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.utils._pytree import tree_map

from ..layout import vocabulary_range
from ..nn.sharding import ShardSpec, full_tensor
from .drawn import draw_whole, listed_to_draw


class Piece(NamedTuple):
    """``length`` entries along a dimension: where they lie in this rank's part, and where in the whole tensor."""

    local: int
    whole: int
    length: int


class Cut(NamedTuple):
    """How a whole tensor of ``shape`` lies on this rank of ``ranks``; ``spec`` None: every rank has all of it."""

    spec: ShardSpec | None
    shape: torch.Size
    ranks: int
    rank: int

    @staticmethod
    def of(part: Tensor, spec: ShardSpec | None, ranks: int, rank: int) -> Cut:
        shape = list(part.shape)
        if spec is not None:
            shape[spec.dim] = shape[spec.dim] * ranks if spec.size is None else spec.size
        return Cut(spec, torch.Size(shape), ranks, rank)

    def placement(self) -> Placement:
        if self.spec is None:
            return Replicate()
        sections = len(self.spec.sizes(self.shape[self.spec.dim]))
        if sections > 1 and not self.unequal:
            return _StridedShard(self.spec.dim, split_factor=sections)
        return Shard(self.spec.dim)

    @property
    def unequal(self) -> bool:
        """Whether no placement of torch's says how the sections lie: ``Shard`` stands for it, in sizes alone right."""
        return self.spec is not None and isinstance(self.spec.sections, tuple) and len(set(self.spec.sections)) > 1

    def pieces(self) -> list[Piece]:
        """Along ``spec.dim``."""
        assert self.spec is not None
        size = self.shape[self.spec.dim]
        if self.spec.size is not None:
            start, stop = vocabulary_range(size, self.ranks, self.rank)
            return [Piece(0, start, stop - start)]
        out, local, whole = [], 0, 0
        for section in self.spec.sizes(size):
            part = section // self.ranks
            out.append(Piece(local, whole + self.rank * part, part))
            local, whole = local + part, whole + section
        return out

    def part_shape(self) -> torch.Size:
        """Of what this rank holds."""
        shape = list(self.shape)
        if self.spec is not None:
            shape[self.spec.dim] = sum(piece.length for piece in self.pieces())
        return torch.Size(shape)

    def part(self, whole: Tensor) -> Tensor:
        """What this rank holds of ``whole``."""
        assert self.spec is not None
        dim = self.spec.dim
        return torch.cat([whole.narrow(dim, p.whole, p.length) for p in self.pieces()], dim)

    def chunks(self, part: Tensor, first_row: int = 0) -> list[tuple[ChunkStorageMetadata, Tensor]]:
        """Rectangles of the whole tensor and the views of ``part`` that hold them.

        ``part`` may be rows ``first_row`` and on of this rank's part: what FSDP leaves of it.
        """
        dim = 0 if self.spec is None else self.spec.dim
        pieces = [Piece(0, 0, self.shape[0])] if self.spec is None and self.shape else []
        pieces = self.pieces() if self.spec is not None else pieces
        if not pieces:  # a scalar
            return [(ChunkStorageMetadata(torch.Size(), torch.Size()), part)]
        found = []
        for piece in pieces:
            offset = [0] * part.dim()
            if dim == 0:
                start = max(piece.local, first_row)
                stop = min(piece.local + piece.length, first_row + part.shape[0])
                offset[0] = piece.whole + start - piece.local
                if start >= stop:
                    continue
                view = part.narrow(0, start - first_row, stop - start)
            else:
                offset[0], offset[dim] = first_row, piece.whole
                view = part.narrow(dim, piece.local, piece.length)
            if view.numel():
                found.append((ChunkStorageMetadata(torch.Size(offset), view.shape), view))
        return found


class CutTensor(DTensor):
    """A DTensor that tells torch.distributed.checkpoint of every rectangle it holds; a DTensor knows of one only."""

    cut: Cut
    _chunks: list[tuple[ChunkStorageMetadata, Tensor]]

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
        """As DTensor's, and right where sections are unequal: from there to the whole only, as ``full_tensor`` does."""
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

    def __deepcopy__(self, memo: dict[int, Any]) -> CutTensor:
        memo[id(self)] = copy = for_checkpoint(self, self.cut, self._local_tensor.detach().clone())
        return copy


def cut_tensor(part: Tensor, cut: Cut, mesh: DeviceMesh, first_row: int = 0) -> CutTensor:
    """``part`` as the piece of a whole tensor that it is, for checkpoints."""
    out: CutTensor = CutTensor(part.detach(), _dtensor_spec(part, cut, mesh), requires_grad=False)  # type: ignore[call-arg]
    out.cut, out._chunks = cut, cut.chunks(part.detach(), first_row)
    return out


def _dtensor_spec(part: Tensor, cut: Cut, mesh: DeviceMesh) -> Any:
    stride = torch.empty(cut.shape, device="meta").stride()
    placements = [cut.placement()]
    return DTensor.from_local(part.detach(), mesh, placements, run_check=False, shape=cut.shape, stride=stride)._spec


class _Whole(torch.autograd.Function):
    """A part to the whole tensor, of which every rank is taken to have the whole gradient."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, cut: Cut, group: ProcessGroup) -> Tensor:
        ctx.cut = cut
        return part.detach().clone() if cut.spec is None else full_tensor(part, cut.spec, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad if ctx.cut.spec is None else ctx.cut.part(grad), None, None


#: Attributes of tensors that are computed from them, and have gradients.
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_BOOKKEEPING = frozenset({"__set__", "__delete__", "__setitem__", "__reduce_ex__", "__repr__", "__format__"})


def _computes(func: Callable[..., Any]) -> bool:
    """Whether what ``func`` returns may have a gradient with respect to its arguments, which stay as they are."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(func.__self__, "__name__", "") in _VIEWS  # type: ignore[attr-defined]
    in_place = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
    return not in_place and name not in _BOOKKEEPING


class PresentedParameter(CutTensor):
    """A parameter as it is listed: a DTensor that has memory and gradient in common with ``part``.

    ``part`` is the plain parameter that the modules compute with, and autograd knows: what is computed from a listed
    parameter (a penalty on its norm, say) is computed from a DTensor that autograd derives from ``part``.
    """

    part: nn.Parameter
    _group: ProcessGroup
    _shown: DTensor | None
    _guarded = False  # against autograd functions that would take it for a leaf

    @staticmethod
    def of(part: nn.Parameter, cut: Cut, mesh: DeviceMesh) -> PresentedParameter:
        data = part.detach()
        spec = _dtensor_spec(data, cut, mesh)
        new: PresentedParameter = PresentedParameter(data, spec, requires_grad=False)  # type: ignore[call-arg]
        new._is_param = True  # type: ignore[attr-defined]
        new.part, new.cut, new._group, new._shown = part, cut, mesh.get_group(), None
        new._chunks = cut.chunks(data)
        new.requires_grad = part.requires_grad
        part._seqpar_presented = new  # type: ignore[attr-defined]
        return new

    def _derived(self) -> DTensor | None:
        """What autograd knows this parameter as; None where it needs not."""
        if not (torch.is_grad_enabled() and self.part.requires_grad):
            return None
        spec = self._spec
        place: Any = {"run_check": False, "shape": spec.shape, "stride": spec.stride}
        return DTensor.from_local(self.part, spec.mesh, spec.placements, **place)

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        want = (self.shape, self.dtype, self.device)
        got = (value.shape, value.dtype, value.device)
        if not isinstance(value, DTensor) or got != want:
            raise ValueError(
                f"data: expected a DTensor like the parameter, {tuple(self.shape)} {self.dtype} on {self.device}, got "
                f"{type(value).__name__} {tuple(value.shape)} {value.dtype} on {value.device}; change dtype and device "
                "with model.to"
            )
        if value.placements != self.placements:
            value = value.redistribute(placements=self.placements)
        self.part.data = value._local_tensor.detach()
        self._local_tensor = self.part.detach()
        self._chunks = self.cut.chunks(self._local_tensor)

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        if self.part._seqpar_presented is not self:  # type: ignore[attr-defined]
            raise RuntimeError(
                "this parameter has been moved or cast since it was listed (model.to); build the optimizer afterwards"
            )
        grad = self.part.grad
        if grad is None:
            self._shown = None
        elif self._shown is None or self._shown._local_tensor is not grad:
            if self.cut.unequal:
                self._shown = cut_tensor(grad, self.cut, self.device_mesh)
            else:
                self._shown = DTensor(grad, self._spec, requires_grad=False)  # type: ignore[call-arg]
        return self._shown

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None and not isinstance(value, DTensor):
            raise ValueError(f"grad: expected a DTensor like the parameter, or None, got {type(value).__name__}")
        if value is not None and value.placements != self.placements:
            value = value.redistribute(placements=self.placements)
        self.part.grad = None if value is None else value._local_tensor

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        return self.part.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.part.requires_grad = value
        with torch._C.DisableTorchFunctionSubclass():
            torch._C.TensorBase.requires_grad.__set__(self, value)  # type: ignore[attr-defined]
            if value and not self._guarded:
                Tensor.register_hook(self, _lost)
                self._guarded = True

    def requires_grad_(self, requires_grad: bool = True) -> PresentedParameter:  # type: ignore[override]
        self.requires_grad = requires_grad
        return self

    def detach(self) -> CutTensor:  # type: ignore[override]
        """What ``state_dict()`` holds."""
        return cut_tensor(self.part, self.cut, self.device_mesh)

    def data_ptr(self) -> int:
        """Where the part lies: Accelerate tells parameters apart by it."""
        return self.part.data_ptr()

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        """The whole parameter on every rank (a collective call)."""
        derived = self._derived()
        if derived is not None and grad_placements is not None and not self.cut.unequal:
            return derived.full_tensor(grad_placements=grad_placements)
        return _Whole.apply(self.part, self.cut, self._group)  # type: ignore[no-any-return, no-untyped-call]

    def to_local(self, *, grad_placements: Any = None) -> Tensor:
        """This rank's part."""
        derived = self._derived()
        if derived is None:
            return super().to_local(grad_placements=grad_placements)
        return derived.to_local(grad_placements=grad_placements)

    def redistribute(
        self, device_mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None, **options: Any
    ) -> DTensor:
        derived = self._derived()
        if derived is None:
            return super().redistribute(device_mesh, placements, **options)
        if not self.cut.unequal or placements is None or tuple(placements) == self.placements:
            return derived.redistribute(device_mesh, placements, **options)
        with torch.no_grad():
            whole = super().redistribute(device_mesh, placements, **options)  # refuses all but Replicate
        return DTensor.from_local(self.full_tensor(), whole.device_mesh, whole.placements, run_check=False)

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """``hook`` is given this rank's part of the gradient."""
        return self.part.register_hook(hook)

    def register_post_accumulate_grad_hook(self, hook: Callable[[Tensor], None]) -> Any:
        return self.part.register_post_accumulate_grad_hook(lambda _: hook(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> PresentedParameter:
        raise RuntimeError("a parallelized model cannot be deep-copied; copy the model first, then parallelize")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return _autograd_grad(*args, **kwargs)
        drawn = listed_to_draw(func, args, kwargs)
        if isinstance(drawn, PresentedParameter):
            return draw_whole(func, drawn, args, kwargs)
        if torch.is_grad_enabled() and _computes(func):
            args, kwargs = tree_map(_for_autograd, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def _for_autograd(value: Any) -> Any:
    if not isinstance(value, PresentedParameter):
        return value
    derived = value._derived()
    return value.detach() if derived is None else derived


def _lost(grad: Tensor) -> None:
    """A torch.autograd.Function asks no tensor subclass: it takes a listed parameter for a leaf of autograd's."""
    raise RuntimeError(
        "a custom autograd function was given a listed parameter of a parallelized model, and its gradient would be "
        "lost: give it param.to_local(), or the parameter as its module has it"
    )


def _autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with respect to listed parameters: autograd knows their parts."""
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    grads = torch.autograd.grad(outputs, [part_of(t) for t in inputs], *args, **kwargs)
    return tuple(
        DTensor(g, t._spec, requires_grad=False) if isinstance(t, PresentedParameter) and g is not None else g  # type: ignore[call-arg]
        for g, t in zip(grads, inputs, strict=True)
    )


def part_of(param: Any) -> Any:
    """The plain tensor to compute with behind a listed parameter."""
    if isinstance(param, PresentedParameter):
        return param.part
    # fully_shard puts DTensors of its own in place; on the tensor-parallel mesh alone while they are gathered.
    return param.to_local() if isinstance(param, DTensor) and param.device_mesh.ndim == 1 else param


def _presented(param: Any) -> Any:
    return getattr(param, "_seqpar_presented", param)


class _Parameters(dict[str, Any]):
    """``module._parameters``: taken by name, plain; listed, presented.

    ``released`` is told of a plain parameter that fully_shard has put DTensors of its own in place of.
    """

    def __init__(self, params: dict[str, Any], released: Callable[[nn.Parameter], None]):
        super().__init__(params)
        self.released = released

    def __setitem__(self, name: str, param: Any) -> None:
        old = self.get(name)
        super().__setitem__(name, param)
        if isinstance(param, DTensor) and type(old) is nn.Parameter:
            self.released(old)

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        return param if type(param) is nn.Parameter else part_of(param)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return {name: _presented(param) for name, param in super().items()}.items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return dict(self.items()).values()

    def plain(self) -> dict[str, Any]:
        """What is really there."""
        return dict(super().items())


def cuts_of(model: nn.Module) -> dict[str, Cut]:
    """Name in ``state_dict`` -> how it is cut, of all parameters listed now."""
    listed = model.named_parameters(remove_duplicate=False)
    return {name: param.cut for name, param in listed if isinstance(param, PresentedParameter)}


def shard_specs(model: nn.Module) -> dict[int, ShardSpec]:
    """id(plain parameter) -> how it is cut, of those that are."""
    specs = {}
    for module in model.modules():
        for name, spec in getattr(module, "sharded", {}).items():
            param = getattr(module, name)
            if param is not None:
                specs[id(param)] = spec
    return specs


def present_parameters(
    model: nn.Module, mesh: DeviceMesh, specs: dict[int, ShardSpec], released: Callable[[nn.Parameter], None]
) -> None:
    """List the parameters of ``model`` as DTensors on ``mesh`` from now on.

    ``specs``: id(part) -> how it is cut. ``released`` is called with parts that fully_shard takes out of their modules.
    """
    ranks, rank = mesh.size(), mesh.get_local_rank()
    for module in model.modules():
        if not module._parameters or isinstance(module._parameters, _Parameters):
            continue
        for param in module._parameters.values():
            if param is not None and not hasattr(param, "_seqpar_presented"):
                spec = specs.get(id(param))
                PresentedParameter.of(param, Cut.of(param, spec, ranks, rank), mesh)
        module.__dict__["_parameters"] = _Parameters(module._parameters, released)
        module.__dict__["_apply"] = _applier(module)


def _applier(module: nn.Module) -> Callable[..., nn.Module]:
    """``module._apply`` (``to``, ``half``, ``cuda``) works on what is really there; what changed is presented anew."""

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        held = module._parameters
        assert isinstance(held, _Parameters)
        module.__dict__["_parameters"] = plain = held.plain()
        try:
            type(module)._apply(module, fn, recurse)
        finally:
            for name, old in held.plain().items():
                new, shown = plain[name], getattr(old, "_seqpar_presented", None)
                if shown is not None and (new is not old or new.data_ptr() != shown._local_tensor.data_ptr()):
                    PresentedParameter.of(new, shown.cut, shown.device_mesh)
            module.__dict__["_parameters"] = _Parameters(plain, held.released)
        return module

    return apply


def first_row_of(param: DTensor, part_rows: int) -> int:
    """Where the rows that FSDP left on this rank begin, in this rank's part of ``part_rows`` rows."""
    mesh = param.device_mesh
    if mesh.ndim != 2:
        return 0
    ranks, rank = mesh.size(0), mesh.get_local_rank(0)
    return vocabulary_range(part_rows, ranks, rank)[0]


def for_checkpoint(tensor: DTensor, cut: Cut, part: Tensor | None = None) -> CutTensor:
    """A parameter, or optimizer state like it, as the rectangles of the whole tensor that this rank holds.

    ``part`` may hold the values in place of the local tensor of ``tensor``.
    """
    part = tensor._local_tensor.detach() if part is None else part
    rows = cut.part_shape()[0] if cut.shape else 0
    out: CutTensor = CutTensor(part, tensor._spec, requires_grad=False)  # type: ignore[call-arg]
    out.cut, out._chunks = cut, cut.chunks(part, first_row_of(tensor, rows))
    return out


def cut_whole_tensors(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
    """Before ``load_state_dict``: whole tensors, of a plain checkpoint, become this rank's parts."""
    if metadata.get("assign_to_params_buffers", False):
        raise ValueError("assign: expected False, the parameters of a parallelized model cannot be replaced")
    conversion: Any = model._seqpar
    for name, param in model.named_parameters(remove_duplicate=False):
        value = state_dict.get(prefix + name)
        cut = conversion.cuts.get(name)
        if cut is None or not isinstance(value, Tensor) or isinstance(value, DTensor) or value.shape != cut.shape:
            continue
        part = value.detach() if cut.spec is None else cut.part(value)
        if isinstance(param, DTensor):
            if param.device_mesh.ndim == 2:
                start = first_row_of(param, part.shape[0])
                part = part[start : start + param._local_tensor.shape[0]]
            part = DTensor(part.to(param.device), param._spec, requires_grad=False)  # type: ignore[call-arg]
        state_dict[prefix + name] = part
