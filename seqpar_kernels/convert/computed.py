"""Functions of listed parameters (a penalty on weights, say), with the gradient that the whole model has.

Some operators of DTensor have another gradient when a tensor is cut: ``mse_loss`` divides by the size of a part, so
that the gradient is too large by the number of ranks, and nothing fails. And no placement describes unequal packed
sections. So this module replaces DTensor's functions for listed parameters. Elementwise functions run on the parts.
Sums over all elements are summed over the ranks. Every other function gets the whole tensors, gathered.

===============  ====================================  ===========  ==================================================
Function         forward                               result       backward
===============  ====================================  ===========  ==================================================
``Whole``        all-gather of the parts               whole shape  this rank's part of the gradient, no communication
``_Sum``         all-reduce of the parts' sums         []           the gradient as it is, no communication
``_Everywhere``  a scalar as it is, no communication   []           all-reduce of the scalar's gradient
``_Norm``        all-reduce of the sum of squares      []           part / norm * gradient, no communication
===============  ====================================  ===========  ==================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..nn.sharding import full_tensor
from .culprit import name_of
from .cut import Cut
from .cut_tensor import cut_tensor


def names(text: str) -> frozenset[str]:
    """The set of words in a text."""
    return frozenset(text.split())


#: Names of elementwise functions.
_BY_ELEMENT = names(
    """abs absolute neg negative positive exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square pow float_power
    reciprocal sign sgn sin cos tan tanh sigmoid relu softplus gelu silu erf clamp clamp_min clamp_max clip
    mul multiply add sub subtract rsub div divide true_divide maximum minimum lerp addcmul addcdiv
    clone detach contiguous to cpu cuda float double half bfloat16 nan_to_num
    isfinite isnan isinf gt lt ge le eq ne logical_not logical_and logical_or where"""
) | names(
    "__abs__ __neg__ __pos__ __pow__ __rpow__ __mul__ __rmul__ __add__ __radd__ __sub__ __rsub__ __truediv__ "
    "__rtruediv__ __div__ __rdiv__ __gt__ __lt__ __ge__ __le__ __eq__ __ne__"
)
_AS = frozenset({"view_as", "reshape_as", "expand_as"})
_NORMS = frozenset({"norm", "vector_norm", "linalg_vector_norm", "linalg_norm"})
#: Names of functions of a tensor's shape, not of its values: DTensor's own are right.
_LIKE = frozenset({"zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like"})
#: Names of attributes that are computed from the tensor and have gradients.
VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
#: Names of functions that describe or change a tensor, and have no gradient.
_NOT_COMPUTED = _LIKE | names(
    """__set__ __delete__ __setitem__ __reduce_ex__ __reduce__ __repr__ __format__ __hash__ __deepcopy__ __dir__ size
    dim ndimension numel nelement stride storage_offset __len__ element_size is_floating_point is_complex
    is_signed is_contiguous is_neg is_conj _is_view result_type is_shared is_pinned is_inference is_same_size
    is_set_to get_device data_ptr storage untyped_storage type retain_grad register_hook
    register_post_accumulate_grad_hook share_memory_ has_names new new_zeros new_ones new_empty new_full
    new_tensor"""
)


def is_in_place(func: Callable[..., Any]) -> bool:
    name = str(getattr(func, "__name__", ""))
    return (name.endswith("_") and not name.endswith("__")) or (name.startswith("__i") and name != "__invert__")


def computes(func: Callable[..., Any]) -> bool:
    """Whether the result of ``func`` may have a gradient, and ``func`` leaves its arguments as they are."""
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":
        return name_of(func) in VIEWS
    return not is_in_place(func) and name not in _NOT_COMPUTED


class Layout(NamedTuple):
    """How a tensor lies on the ranks of ``mesh``. With ``cut`` None every rank has all of it."""

    cut: Cut | None
    mesh: DeviceMesh

    @property
    def group(self) -> ProcessGroup:
        return self.mesh.get_group()

    def placements(self) -> list[Placement]:
        return [Replicate() if self.cut is None else self.cut.placement()]


class ComputedTensor(DTensor):
    """A DTensor that was computed from listed parameters.

    ``local`` is the plain tensor that autograd knows: this rank's part, or the whole.

    Functions take a ComputedTensor together with listed parameters, DTensors, numbers, and tensors of one element that
    are the same on every rank.
    """

    local: Tensor
    place: Layout

    @staticmethod
    def of(local: Tensor, layout: Layout) -> ComputedTensor:
        if layout.cut is not None and layout.cut.spec is None:
            layout = Layout(None, layout.mesh)
        size: dict[str, Any] = {}
        if layout.cut is not None:
            stride = torch.empty(layout.cut.shape, device="meta").stride()
            size = {"shape": layout.cut.shape, "stride": stride}
        facade = DTensor.from_local(local, layout.mesh, layout.placements(), run_check=False, **size)
        facade.__class__ = ComputedTensor
        assert isinstance(facade, ComputedTensor)
        facade.local, facade.place = local, layout
        return facade

    def whole(self) -> Tensor:
        """The whole tensor on every rank (a collective call where it is cut)."""
        return self.local if self.place.cut is None else Whole.apply(self.local, self.place.cut, self.place.group)

    def full_tensor(self, *, grad_placements: Any = None) -> Tensor:
        if grad_placements is not None and not all(isinstance(p, Replicate) for p in grad_placements):
            raise NotImplementedError(f"grad_placements: expected None or Replicate, got {grad_placements}")
        return self.whole()

    def to_local(self, *, grad_placements: Any = None) -> Tensor:
        if grad_placements is not None and list(grad_placements) != self.place.placements():
            raise NotImplementedError(
                f"grad_placements: expected None or {self.place.placements()}, got {grad_placements}"
            )
        return self.local

    def redistribute(
        self, device_mesh: DeviceMesh | None = None, placements: Sequence[Placement] | None = None, **options: Any
    ) -> DTensor:
        if placements is None or list(placements) == self.place.placements():
            return self
        whole = ComputedTensor.of(self.whole(), Layout(None, self.place.mesh))
        if all(isinstance(placement, Replicate) for placement in placements):
            return whole
        with torch._C.DisableTorchFunctionSubclass():
            return DTensor.redistribute(whole, device_mesh, placements, **options)

    def register_hook(self, hook: Callable[[Tensor], Any]) -> Any:
        """Register ``hook``, which gets the gradient of ``local``."""
        return self.local.register_hook(hook)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return autograd_grad(*args, **kwargs)
        if func is torch.autograd.backward:
            return autograd_backward(*args, **kwargs)
        if func is Tensor.backward:
            return Tensor.backward(*tree_map(plain, args), **tree_map(plain, kwargs))
        if is_in_place(func) and args and isinstance(args[0], ComputedTensor):
            return _in_place(func, args, kwargs)
        if is_in_place(func) and args and not isinstance(args[0], DTensor):  # loss += penalty
            return func(*tree_map(plain, args), **tree_map(plain, kwargs))
        if name_of(func) == "data":
            return ComputedTensor.of(args[0].local.detach(), args[0].place)
        if computes(func):
            return compute(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def plain(value: Any) -> Any:
    """The whole tensor of a ComputedTensor, with its gradient; other values as they are."""
    return value.whole() if isinstance(value, ComputedTensor) else value


def compute(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Call ``func``, whose arguments include listed parameters or ComputedTensors."""
    name = name_of(func)
    if name in _AS and len(args) == 2:  # only the shape of the second is used
        return getattr(Tensor, name.removesuffix("_as"))(args[0], args[1].shape)
    leaves, spec = tree_flatten((args, kwargs))
    values = [_computed(leaf) if isinstance(leaf, DTensor) else leaf for leaf in leaves]
    mesh = next(value.place.mesh for value in values if isinstance(value, ComputedTensor))
    _check_plain(func, values)
    found_cuts = [value.place.cut for value in values if isinstance(value, ComputedTensor)]
    cuts = [cut for cut in dict.fromkeys(found_cuts) if cut is not None]
    values = [_like_a_part(value, cuts) for value in values]
    if len(cuts) == 1 and kwargs.get("out") is None:
        cut = cuts[0]
        layout = Layout(cut, mesh)
        if name in _BY_ELEMENT and all(_fits(value, cut) for value in values):
            parts = [_part(value, layout) for value in values]
            args, kwargs = tree_unflatten(parts, spec)
            return ComputedTensor.of(func(*args, **kwargs), layout)
        found = _over_all(name, values, args, kwargs, layout)
        if found is not None:
            return ComputedTensor.of(found, Layout(None, mesh))
    args, kwargs = tree_unflatten([plain(value) for value in values], spec)
    out = func(*args, **kwargs)
    return tree_map(lambda t: ComputedTensor.of(t, Layout(None, mesh)) if isinstance(t, Tensor) else t, out)


def _computed(value: DTensor) -> ComputedTensor:
    """The ComputedTensor for a listed parameter or any other DTensor."""
    if isinstance(value, ComputedTensor):
        return value
    cut, mesh = getattr(value, "cut", None), value.device_mesh
    if mesh.ndim > 1:
        raise NotImplementedError(
            f"a function of parameters of a parallelized model was given a DTensor on a mesh of {mesh.ndim} "
            "dimensions: give it full_tensor() of each"
        )
    if cut is not None:
        return ComputedTensor.of(getattr(value, "part", value._local_tensor), Layout(cut, mesh))
    if all(isinstance(placement, Replicate) for placement in value.placements):
        return ComputedTensor.of(value.to_local(), Layout(None, mesh))
    return _Other.of(value)


class _Other(ComputedTensor):
    """A DTensor of the user's, or one made like a parameter (``zeros_like``): its cut is unknown.

    Beside a part of the same shape and placements it is taken for such a part (:func:`_like_a_part`). Else it is
    gathered.
    """

    source: DTensor

    @staticmethod
    def of(value: DTensor) -> _Other:  # type: ignore[override]
        out = value.view_as(value)
        out.__class__ = _Other
        assert isinstance(out, _Other)
        out.source, out.local, out.place = value, value.to_local(), Layout(None, value.device_mesh)
        return out

    def whole(self) -> Tensor:
        return self.source.full_tensor()


def _check_plain(func: Callable[..., Any], values: list[Any]) -> None:
    for value in values:
        if isinstance(value, Tensor) and not isinstance(value, DTensor) and value.numel() != 1:
            raise ValueError(
                f"{name_of(func)}: a function of parameters of a parallelized model takes DTensors, numbers and "
                f"tensors of one element, got a plain tensor {tuple(value.shape)}: make it a "
                "DTensor (torch.zeros_like(param), DTensor.from_local(tensor, param.device_mesh, [Replicate()])), or "
                "give the function param.full_tensor(), which a plain tensor may meet"
            )


def _like_a_part(value: Any, cuts: list[Cut]) -> Any:
    """Take a DTensor of a part's shape and placement for a part that is cut alike, as ``zeros_like`` makes it."""
    if isinstance(value, _Other):
        for cut in cuts:
            if value.shape == cut.shape and list(value.source.placements) == [cut.placement()]:
                return ComputedTensor.of(value.local, Layout(cut, value.device_mesh))
    return value


def _fits(value: Any, cut: Cut) -> bool:
    """Whether an argument of an elementwise function is a part cut as ``cut``, or a scalar."""
    if not isinstance(value, Tensor):
        return True
    if isinstance(value, ComputedTensor) and value.place.cut is not None:
        return value.place.cut == cut
    return value.dim() == 0 and not isinstance(value, _Other)


def _part(value: Any, layout: Layout) -> Any:
    if isinstance(value, ComputedTensor):
        return _Everywhere.apply(value.local, layout.group) if value.place.cut is None else value.local
    return value


def _over_all(name: str, values: list[Any], args: Any, kwargs: dict[str, Any], layout: Layout) -> Tensor | None:
    """The sum, average or norm over all elements of one part; None for any other function."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) != 1 or isinstance(tensors[0], _Other) or not tensors[0].is_floating_point():
        return None
    assert isinstance(tensors[0], ComputedTensor)
    x, cut = tensors[0].local, layout.cut
    assert cut is not None
    rest = dict(kwargs)
    for key in ("dim", "axis", "keepdim"):
        if rest.get(key) is None or rest[key] is False:
            rest.pop(key, None)
    rest.pop("input", None)
    rest.pop("self", None)
    rest.pop("x", None)
    more = [arg for arg in args if not isinstance(arg, Tensor)]
    if name in ("sum", "mean") and not more and set(rest) <= {"dtype"}:
        total = _Sum.apply(x.sum(**rest), layout.group)
        return total if name == "sum" else total / cut.shape.numel()
    if name in _NORMS and len(more) <= 1 and set(rest) <= {"p", "ord", "dtype"}:
        order = more[0] if more else rest.get("p", rest.get("ord"))
        if order in (None, 2, "fro") and not (name == "linalg_norm" and order == 2) and "dtype" not in rest:
            return _Norm.apply(x, layout.group)
    return None


def _in_place(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> ComputedTensor:
    """``total += penalty``: let the tensor on the left stand for the result."""
    target = args[0]
    name = str(func.__name__)
    twin = getattr(Tensor, f"__{name[3:]}" if name.startswith("__i") else name[:-1])
    result = compute(twin, args, kwargs)
    target.local, target.place = result.local, result.place
    return result


class Whole(torch.autograd.Function):
    """Gathers a part to the whole tensor. Its gradient is taken to be whole on every rank."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, cut: Cut, group: ProcessGroup) -> Tensor:
        ctx.cut = cut
        return part.detach().clone() if cut.spec is None else full_tensor(part, cut.spec, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad if ctx.cut.spec is None else ctx.cut.part(grad), None, None


class _Sum(torch.autograd.Function):
    """Sums over the ranks. The gradient of the sum is whole on every rank, and is that of each summand."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        total = part.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None


class _Everywhere(torch.autograd.Function):
    """Passes a scalar on for use beside parts. Each rank has a part of its gradient; they are summed."""

    @staticmethod
    def forward(ctx: Any, scalar: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return scalar.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Sum.apply(grad, ctx.group), None


class _Norm(torch.autograd.Function):
    """The 2-norm of parts over all ranks. Its gradient at zero is zero, as torch's."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: ProcessGroup) -> Tensor:
        total = torch.linalg.vector_norm(part.detach(), dtype=torch.promote_types(part.dtype, torch.float32)).square()
        dist.all_reduce(total, group=group)
        norm = total.sqrt().to(part.dtype)
        ctx.save_for_backward(part, norm)
        return norm

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        part, norm = ctx.saved_tensors
        return part * torch.where(norm == 0, torch.zeros_like(norm), grad / norm), None


def _known(tensor: Any) -> Any:
    """What autograd knows a listed parameter as, or a tensor that was computed from one."""
    return tensor.local if isinstance(tensor, ComputedTensor) else getattr(tensor, "part", tensor)


def autograd_backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """``torch.autograd.backward`` with listed parameters among ``inputs``: autograd knows the parts."""
    tensors, grad_tensors, grad_variables = tree_map(plain, (tensors, grad_tensors, grad_variables))
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    known = None if inputs is None else tuple(_known(t) for t in inputs)
    torch.autograd.backward(tensors, grad_tensors, retain_graph, create_graph, grad_variables, known)


def autograd_grad(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` with listed parameters and ComputedTensors, replaced by the tensors autograd knows."""
    outputs, args, kwargs = tree_map(plain, (outputs, args, kwargs))
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    grads = torch.autograd.grad(outputs, [_known(t) for t in inputs], *args, **kwargs)
    found: list[Tensor | None] = []
    for grad, t in zip(grads, inputs, strict=True):
        if grad is None or not isinstance(t, DTensor) or not hasattr(t, "cut"):
            found.append(
                ComputedTensor.of(grad, t.place) if isinstance(t, ComputedTensor) and grad is not None else grad
            )
        elif grad.requires_grad:  # create_graph
            found.append(ComputedTensor.of(grad, Layout(t.cut, t.device_mesh)))
        else:
            found.append(cut_tensor(grad, t.cut, t.device_mesh))
    return tuple(found)
