"""The parameters of a converted model, listed as DTensors to everyone but the modules that compute with them.

A module computes with plain parameters, this rank's parts: a DTensor would cost tens of microseconds of host time at
every use. Optimizers, ``clip_grad_norm_``, ``fully_shard``, ``state_dict`` and ``torch.distributed.checkpoint`` never
take a parameter by its name in a module, they list parameters (``parameters()``, ``named_parameters()``,
``state_dict()``, through whatever wraps the model). So listing gives DTensors, which share memory and gradient with the
parts, and taking gives the parts. Norms, row statistics and whole-matrix optimizers (clip_grad_norm_, Muon) are then
right by construction, and a computation costs one dictionary look-up more.
"""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Sequence, ValuesView
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.utils._pytree import tree_leaves

from ..layout import Group
from ..nn.sharding import ShardSpec
from .computed import Whole, autograd_backward, autograd_grad, compute, computes, names
from .culprit import name_of
from .cut import Cut
from .cut_tensor import CutTensor, cut_tensor, drawn_like, dtensor_spec, first_row_of
from .drawn import draw_whole, draws_like, listed_to_draw


class ListedParameter(CutTensor):
    """A parameter as it is listed: a DTensor that has memory and gradient in common with ``part``.

    ``part`` is the plain parameter that the modules compute with, and autograd knows: what is computed from a listed
    parameter (a penalty on its norm, say) is computed from a DTensor that autograd derives from ``part``.
    """

    part: nn.Parameter
    _group: ProcessGroup
    _shown: DTensor | None
    _guarded = False  # against autograd functions that would take it for a leaf

    @staticmethod
    def of(part: nn.Parameter, cut: Cut, mesh: DeviceMesh) -> ListedParameter:
        data = part.detach()
        spec = dtensor_spec(data, cut, mesh)
        new: ListedParameter = ListedParameter(data, spec, requires_grad=False)
        new._is_param = True
        new.part, new.cut, new._group, new._shown = part, cut, mesh.get_group(), None
        new._chunks = cut.chunks(data)
        new.requires_grad = part.requires_grad
        part._seqpar_listed = new  # type: ignore[attr-defined]
        return new

    def _derived(self) -> DTensor | None:
        """What autograd knows this parameter as; None where it needs not."""
        if not (torch.is_grad_enabled() and self.part.requires_grad):
            return None
        spec = self._spec
        place: Any = {"run_check": False, "shape": spec.shape, "stride": spec.stride}
        return DTensor.from_local(self.part, spec.mesh, spec.placements, **place)

    @property
    def data(self) -> Tensor:
        return cut_tensor(self.part.data, self.cut, self.device_mesh)  # autograd does not count what is written to it

    @data.setter
    def data(self, value: Tensor) -> None:
        want = (self.shape, self.dtype, self.device)
        got = (value.shape, value.dtype, value.device)
        if got != want:
            raise ValueError(
                f"data: expected a DTensor like the parameter, or a whole tensor, {tuple(self.shape)} {self.dtype} on "
                f"{self.device}, got {type(value).__name__} {tuple(value.shape)} {value.dtype} on {value.device}; "
                "change dtype and device with model.to"
            )
        self.part.data = self._part_of(value)
        self._local_tensor = self.part.detach()
        self._chunks = self.cut.chunks(self._local_tensor)

    @property
    def grad(self) -> Tensor | None:
        if self.part._seqpar_listed is not self:  # type: ignore[attr-defined]
            raise RuntimeError(
                "this parameter has been moved or cast since it was listed (model.to); build the optimizer afterwards"
            )
        grad = self.part.grad
        if grad is None:
            self._shown = None
        elif self._shown is None or self._shown._local_tensor is not grad:
            if self.cut.unequal or self.cut.empty_somewhere:
                self._shown = cut_tensor(grad, self.cut, self.device_mesh)
            else:
                self._shown = DTensor(grad, self._spec, requires_grad=False)
        return self._shown

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None and not isinstance(value, DTensor):
            raise ValueError(f"grad: expected a DTensor like the parameter, or None, got {type(value).__name__}")
        if isinstance(value, DTensor) and value.placements == self.placements:
            self.part.grad = value._local_tensor  # the very tensor: what was taken away can be put back
        else:
            self.part.grad = None if value is None else self._part_of(value)

    @torch.no_grad()
    def _part_of(self, value: Tensor) -> Tensor:
        """This rank's part of what is to take the place of the parameter or of its gradient."""
        if isinstance(value, DTensor) and value.placements == self.placements:
            return value._local_tensor.detach()
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.detach() if self.cut.spec is None else self.cut.part(whole.detach())

    @property
    def requires_grad(self) -> bool:
        return self.part.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.part.requires_grad = value
        with torch._C.DisableTorchFunctionSubclass():
            torch._C.TensorBase.requires_grad.__set__(self, value)  # type: ignore[attr-defined]
            if value and not self._guarded:
                Tensor.register_hook(self, _lost)
                self._guarded = True

    def requires_grad_(self, requires_grad: bool = True) -> ListedParameter:
        self.requires_grad = requires_grad
        return self

    def detach(self) -> CutTensor:
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
        return Whole.apply(self.part, self.cut, self._group)

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

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> ListedParameter:
        raise RuntimeError("a parallelized model cannot be deep-copied; copy the model first, then parallelize")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return autograd_grad(*args, **kwargs)
        if func is torch.autograd.backward:
            return autograd_backward(*args, **kwargs)
        drawn = listed_to_draw(func, args, kwargs)
        if isinstance(drawn, ListedParameter):
            return draw_whole(func, drawn, args, kwargs)
        if draws_like(func):
            return drawn_like(func, args, kwargs)
        if computes(func) and (torch.is_grad_enabled() or _reads_places(func, args, kwargs)):
            return compute(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


#: Functions whose result depends on where an element lies.
_OF_PLACES = names(
    """__getitem__ view view_as reshape reshape_as flatten ravel cat concat concatenate select narrow split chunk
    tensor_split index_select gather take unbind matmul mm mv dot inner outer einsum __matmul__ __rmatmul__ linear
    flip roll cumsum argmax argmin topk sort"""
)


def _reads_places(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether DTensor would take elements from the wrong places, or refuse: of packed or unequal parts."""
    if name_of(func) not in _OF_PLACES:
        return False
    listed = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, ListedParameter)]
    return any(type(leaf.cut.placement()) is not Shard or not leaf.cut.even for leaf in listed if leaf.cut.spec)


def _lost(grad: Tensor) -> None:
    """A torch.autograd.Function asks no tensor subclass: it takes a listed parameter for a leaf of autograd's."""
    raise RuntimeError(
        "a custom autograd function was given a listed parameter of a parallelized model, and its gradient would be "
        "lost: give it param.to_local(), or the parameter as its module has it"
    )


def part_of(param: Any) -> Any:
    """The plain tensor to compute with behind a listed parameter."""
    if isinstance(param, ListedParameter):
        return param.part
    # fully_shard puts DTensors of its own in place; on the tensor-parallel mesh alone while they are gathered.
    return param.to_local() if isinstance(param, DTensor) and param.device_mesh.ndim == 1 else param


def mesh_of(given: Group, group: ProcessGroup, model: nn.Module) -> DeviceMesh:
    """The mesh of listed parameters: ``given`` where it is one, else a mesh of the ranks of ``group``."""
    device = next((param.device.type for param in model.parameters()), "cpu")
    return given if isinstance(given, DeviceMesh) else DeviceMesh.from_group(group, device)


def _as_listed(param: Any) -> Any:
    return getattr(param, "_seqpar_listed", param)


class Parameters(dict[str, Any]):
    """``module._parameters``: taken by name, plain; listed, as DTensors.

    ``released`` is told of a plain parameter that fully_shard has put DTensors of its own in place of.
    """

    def __init__(
        self,
        params: dict[str, Any],
        released: Callable[[nn.Parameter], None],
        accessed: Callable[[str, Any], Any] | None = None,
    ):
        super().__init__(params)
        self.released = released
        self.accessed = accessed

    def __setitem__(self, name: str, param: Any) -> None:
        old = self.get(name)
        super().__setitem__(name, param)
        if isinstance(param, DTensor) and type(old) is nn.Parameter:
            self.released(old)

    def __getitem__(self, name: str) -> Any:
        param = super().__getitem__(name)
        if self.accessed is not None and param is not None:
            param = self.accessed(name, param)
        return param if type(param) is nn.Parameter else part_of(param)

    def items(self) -> ItemsView[str, Any]:  # type: ignore[override]
        return {name: _as_listed(param) for name, param in super().items()}.items()

    def values(self) -> ValuesView[Any]:  # type: ignore[override]
        return dict(self.items()).values()

    def plain(self) -> dict[str, Any]:
        """What is really there."""
        return dict(super().items())


def cuts_of(model: nn.Module) -> dict[str, Cut]:
    """Name in ``state_dict`` -> how it is cut, of all parameters listed now."""
    listed = model.named_parameters(remove_duplicate=False)
    return {name: param.cut for name, param in listed if isinstance(param, ListedParameter)}


def shard_specs(model: nn.Module) -> dict[int, ShardSpec]:
    """id(plain parameter) -> how it is cut, of those that are."""
    specs = {}
    for module in model.modules():
        for name, spec in getattr(module, "sharded", {}).items():
            param = getattr(module, name)
            if param is not None:
                specs[id(param)] = spec
    return specs


def list_as_dtensors(
    model: nn.Module, mesh: DeviceMesh, specs: dict[int, ShardSpec], released: Callable[[nn.Parameter], None]
) -> None:
    """List the parameters of ``model`` as DTensors on ``mesh`` from now on.

    ``specs``: id(part) -> how it is cut. ``released`` is called with parts that fully_shard takes out of their modules.
    """
    ranks, rank = mesh.size(), mesh.get_local_rank()
    for module in model.modules():
        if not module._parameters or isinstance(module._parameters, Parameters):
            continue
        for param in module._parameters.values():
            if param is not None and not hasattr(param, "_seqpar_listed"):
                spec = specs.get(id(param))
                ListedParameter.of(param, Cut.of(param, spec, ranks, rank), mesh)
        module.__dict__["_parameters"] = Parameters(module._parameters, released)
        module.__dict__["_apply"] = _applier(module)


def _applier(module: nn.Module) -> Callable[..., nn.Module]:
    """``module._apply`` (``to``, ``half``, ``cuda``) works on what is really there; what changed is listed anew."""

    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        held = module._parameters
        assert isinstance(held, Parameters)
        module.__dict__["_parameters"] = plain = held.plain()
        try:
            type(module)._apply(module, fn, recurse)
        finally:
            for name, old in held.plain().items():
                new, shown = plain[name], getattr(old, "_seqpar_listed", None)
                if shown is not None and (new is not old or new.data_ptr() != shown._local_tensor.data_ptr()):
                    ListedParameter.of(new, shown.cut, shown.device_mesh)
            module.__dict__["_parameters"] = Parameters(plain, held.released, held.accessed)
        return module

    return apply


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
            part = DTensor(part.to(param.device), param._spec, requires_grad=False)
        state_dict[prefix + name] = part
