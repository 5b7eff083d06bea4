"""``seqpar::dropout_add_norm``: schema, fake and autograd of the fused dropout + residual + norm.

=========  =====================================================  ============  =============
pass       computes                                               result        communication
=========  =====================================================  ============  =============
forward    z = row_scale * dropout(x + x_bias) + residual         [..., H]      none
forward    y = norm(z) * weight + bias, y2 likewise               [..., H]      none
dresidual  dz + norm'(dy * weight + dy2 * weight2)                [..., H]      none
dx         row_scale * dropout'(dresidual)                        [..., H]      none
dweight    sum of dy * norm(z) over this rank's rows              [H]           none
dbias      sum of dy over this rank's rows                        [H]           none
dx_bias    sum of dx over this rank's rows                        [H]           none
=========  =====================================================  ============  =============

Rows are those of this rank's shard. Gradients of vectors are summed over the ranks by :class:`.mappings.SumGradients`,
through which a public function passes the vectors.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..caches import MOST
from ..kernels import NormGiven, NormKind, NormOutputs, NormSpec, NormStores, NormTensors, NormWants, RowMap, select
from ..kernels.spec import accumulation_dtype
from ..tensors import reshaped
from .registry import PLAIN_TYPES, apply, eager, plain_apply, register
from .remake import readable, require_memory

# --- what the ops take -----------------------------------------------------------------------------------------------

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    str: "str",
    NormKind: "int",
    int: "SymInt",
    torch.dtype: "ScalarType",
}


def declared(value: type[NamedTuple]) -> str:
    """The fields of a value as an op's schema lists them, one by one."""
    hints = get_type_hints(value)
    fields = ((name, hints[name]) for name in value._fields)
    return ", ".join(declared(hint) if hint is RowMap else f"{_SCHEMA_TYPES[hint]} {name}" for name, hint in fields)


class NormCall(NamedTuple):
    """One kind of call but for shapes and device; its fields are the forward's arguments after the tensors."""

    stores: NormStores
    spec: NormSpec
    backend: str

    def flat(self) -> tuple[Any, ...]:
        """As the op takes them."""
        return (*self.stores, *self.spec.flat(), self.backend)


SPEC = f"{declared(NormSpec)}, str backend"
_TENSORS, _STORES, _BACKWARD_TENSORS = (len(value._fields) for value in (NormTensors, NormStores, NormGiven))


def packed(args: Sequence[Any]) -> tuple[NormTensors, NormCall]:
    """The forward's arguments as the values that they are."""
    *scalars, backend = args[_TENSORS:]
    stores, spec = NormStores(*scalars[:_STORES]), NormSpec.from_flat(scalars[_STORES:])
    return NormTensors(*args[:_TENSORS]), NormCall(stores, spec, backend)


def packed_backward(args: Sequence[Any]) -> tuple[NormGiven, NormWants, NormSpec, str]:
    """The backward's arguments as the values that they are."""
    wants, *scalars, backend = args[_BACKWARD_TENSORS:]
    return NormGiven(*args[:_BACKWARD_TENSORS]), NormWants(*wants), NormSpec.from_flat(scalars), backend


# --- kernels ---------------------------------------------------------------------------------------------------------

Results = Sequence[Tensor | None]


def _in_shape(t: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Kernels that saw another shape return another shape."""
    return t if t is None or t.shape == shape else reshaped(t, shape)


def shaped(results: NormOutputs, shape: torch.Size) -> list[Tensor | None]:
    """y, y2 and z in ``shape``, statistics as they are."""
    *rows, statistics = results
    return [*(_in_shape(t, shape) for t in rows), statistics]


def existing(results: Results) -> list[Tensor]:
    """What an op returns: the results that there are, in their order."""
    return [t for t in results if t is not None]


@functools.lru_cache(maxsize=MOST)
def forward_of(shape: torch.Size, device: torch.device, call: NormCall) -> Callable[[NormTensors], Results]:
    """The forward on plain tensors of one kind: y, y2, z, statistics, None where there is none."""
    backend = select(call.backend, device)
    if hasattr(backend, "NormForward"):  # a backend whose host time counts brings its own
        prepared: Callable[[NormTensors], Results] = backend.NormForward(call.spec, shape, device, call.stores)
        return prepared

    def run(tensors: NormTensors) -> Results:
        return shaped(backend.norm_forward(tensors.readable(), call.spec, call.stores), shape)

    return run


@functools.lru_cache(maxsize=MOST)
def backward_of(
    shape: torch.Size, device: torch.device, spec: NormSpec, backend: str, wants: NormWants
) -> Callable[[NormGiven], Results]:
    """The backward, likewise; gradients as in ``NormGrads``."""
    kernels = select(backend, device)
    if hasattr(kernels, "NormBackward"):
        prepared: Callable[[NormGiven], Results] = kernels.NormBackward(spec, shape, device, wants)
        return prepared

    def run(tensors: NormGiven) -> Results:
        dx, dresidual, *grads = kernels.norm_backward(tensors.readable(), spec, wants)
        return [_in_shape(dx, shape), _in_shape(dresidual, shape), *grads]

    return run


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward_kernel(*args: Any) -> list[Tensor]:
    tensors, call = packed(args)
    return existing(forward_of(tensors.x.shape, tensors.x.device, call)(tensors))


def _forward_fake(*args: Any) -> list[Tensor]:
    (x, *_), (stores, spec, _) = packed(args)
    normed = spec.kind != NormKind.NONE
    y, y2, z = (normed, spec.y_dtype), (normed and stores.two_norms, spec.y_dtype), (stores.store_z, spec.z_dtype)
    out = [x.new_empty(x.shape, dtype=dtype) for stored, dtype in (y, y2, z) if stored]
    if normed:
        out.append(x.new_empty(statistics_shape(spec.kind, x.shape), dtype=accumulation_dtype(x.dtype)))
    return out


def statistics_shape(kind: NormKind, shape: Sequence[int]) -> tuple[int, int]:
    """Of the statistics of a norm over the last dimension of ``shape``."""
    return 2 if kind == NormKind.LAYER else 1, math.prod(shape[:-1])


# --- autograd --------------------------------------------------------------------------------------------------------


class DispatchedNorm:
    """One kind of call as autograd needs it, its forward and backward left to the dispatcher.

    Every result of the op goes out.
    """

    def __init__(self, call: NormCall):
        self.call = call
        self.one_dtype = call.spec.z_dtype == call.spec.x_dtype
        normed = call.spec.kind != NormKind.NONE
        self._stored = (normed, normed and call.stores.two_norms, call.stores.store_z, normed)  # y, y2, z, statistics
        self._hand_out([i for i, stored in enumerate(self._stored) if stored])
        #: The tensors -> y, y2, z, statistics: None where there is none.
        self.forward: Callable[[NormTensors], Results] = self._dispatched

    def _hand_out(self, picked: list[int]) -> None:
        """Which of y, y2, z and statistics go out."""
        self.results = operator.itemgetter(*picked)
        self.returns_statistics = 3 in picked
        # Where their gradients come in, behind which a None stands for those that have none.
        self.gradients = operator.itemgetter(*(picked.index(i) if i in picked else -1 for i in range(3)))

    def _dispatched(self, tensors: NormTensors) -> Results:
        found = iter(dropout_add_norm.below_autograd(*tensors, *self.call.flat()))
        return [next(found) if stored else None for stored in self._stored]

    def backward(self, tensors: NormGiven, wants: NormWants) -> Results:
        """The gradients of NormGrads: None where not wanted."""
        _, spec, backend = self.call
        found = iter(dropout_add_norm_backward(*tensors, list(wants), *spec.flat(), backend))
        return [next(found) if want else None for want in wants]


class PreparedNorm(DispatchedNorm):
    """One kind of call on plain tensors in eager mode, ready to run.

    Shape, dtype, device, scalars and how many results are returned make a kind. What follows from them (backend,
    kernels, their arguments, which results go out) is worked out once, so that a call costs little more than its
    allocations, ``autograd.Function`` and the launch: small calls live and die by host time.
    """

    def __init__(self, call: NormCall, shape: torch.Size, device: torch.device, returned: int):
        super().__init__(call)
        self._hand_out([i for i, stored in enumerate(self._stored) if stored][:returned])
        self.forward = forward_of(shape, device, call)
        self._shape, self._device = shape, device
        self._backwards: dict[NormWants, Callable[[NormGiven], Results]] = {}

    def __call__(self, tensors: NormTensors) -> Any:
        """The results that are returned: a tuple, or the only one."""
        if torch.is_grad_enabled():
            differentiable = tensors[:_DIFFERENTIABLE]
            for t in differentiable:
                if t is not None and t.requires_grad:
                    return _apply(self, tensors, *differentiable)
        return self.results(self.forward(tensors))

    def backward(self, tensors: NormGiven, wants: NormWants) -> Results:
        if torch.is_grad_enabled() or not eager():  # create_graph, a mode that looks on
            return super().backward(tensors, wants)
        for t in tensors[:3]:
            if t is not None and type(t) not in PLAIN_TYPES:
                return super().backward(tensors, wants)
        run = self._backwards.get(wants)
        if run is None:
            _, spec, backend = self.call
            run = self._backwards[wants] = backward_of(self._shape, self._device, spec, backend, wants)
        return run(tensors)


_DIFFERENTIABLE = NormTensors._fields.index("row_scale")  # the fields before it may have gradients


class _DropoutAddNorm(torch.autograd.Function):
    """Keeps z (or x, when they are the same), the statistics and the seed; no mask, no norm output."""

    @staticmethod
    def forward(ctx: Any, norm: DispatchedNorm, tensors: NormTensors, *differentiable: Tensor | None) -> Any:
        """``differentiable``: those among ``tensors`` that may have gradients, for autograd, which sees no others."""
        out = norm.forward(tensors)
        x, _, weight, bias, weight2, _, _, row_scale, _, seed = tensors
        _, _, z, statistics = out
        if statistics is None:
            z = None  # nothing was normalised
        elif z is None:
            z = x
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, statistics, row_scale, weight, weight2, seed, bias)
        ctx.norm = norm
        if norm.returns_statistics:
            ctx.mark_non_differentiable(statistics)
        return norm.results(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        norm: DispatchedNorm = ctx.norm
        dy, dy2, dz = norm.gradients((*grads, None))
        if dy is None and dy2 is None and dz is None:
            return (None,) * (2 + _DIFFERENTIABLE)
        _, _, need_x, need_residual, *need_vectors = ctx.needs_input_grad
        tensors = tuple.__new__(NormGiven, (dy, dy2, dz, *ctx.saved_tensors[:-1]))  # half the time of the class
        # g and dx are one tensor where nothing stands between them: then one is computed and handed out twice.
        same = norm.one_dtype and tensors.seed is None and tensors.row_scale is None
        wants = NormWants(need_x or (same and need_residual), need_residual and not same, *need_vectors)
        dx, dresidual, *vectors = norm.backward(tensors, wants)
        if same and need_residual:
            dresidual = dx
        return (None, None, dx if need_x else None, dresidual, *vectors)

    @staticmethod
    def made_again(ctx: Any, number: int, out: Tensor | None) -> Callable[[], Tensor] | None:
        """How y = norm(z) is made again, see :mod:`.remake`; None for other results."""
        call = ctx.norm.call
        if number or not can_make_again(call.spec) or not readable(*ctx._raw_saved_tensors):
            return None
        return functools.partial(y_again, ctx, call.spec, call.backend)


def can_make_again(spec: NormSpec) -> bool:
    """Whether y follows from z alone: there is a norm, and one dtype throughout."""
    return spec.kind != NormKind.NONE and spec.x_dtype == spec.z_dtype == spec.y_dtype


def y_again(ctx: Any, spec: NormSpec, backend: str) -> Tensor:
    """y of a forward that saved these tensors first."""
    z, _, _, weight, _, _, bias = ctx.saved_tensors[:KEPT_OF_NORM]
    require_memory(weight, bias)
    spec = spec._replace(p=0.0, rows=RowMap(0, 0, 0), x_dtype=z.dtype, z_dtype=z.dtype)
    run = forward_of(z.shape, z.device, NormCall(NormStores(store_z=False), spec, backend))
    y = run(NormTensors(z, weight=weight, bias=bias))[0]
    assert y is not None
    return y


KEPT_OF_NORM = 7  # z, statistics, row_scale, weight, weight2, seed, bias

#: ``Function.apply`` without its care for functorch, whose transforms take :func:`_forward_autograd`.
_apply = plain_apply(_DropoutAddNorm)


def _forward_autograd(*args: Any) -> list[Tensor]:
    tensors, call = packed(args)
    out = apply(_DropoutAddNorm, DispatchedNorm(call), tensors, *tensors[:_DIFFERENTIABLE])
    return [out] if isinstance(out, Tensor) else list(out)


# --- backward --------------------------------------------------------------------------------------------------------


def _backward_kernel(*args: Any) -> list[Tensor]:
    tensors, wants, spec, backend = packed_backward(args)
    like = tensors.like()
    return existing(backward_of(like.shape, like.device, spec, backend, wants)(tensors))


def _backward_fake(*args: Any) -> list[Tensor]:
    tensors, wants, spec, _ = packed_backward(args)
    like = tensors.like()
    rows = [(wants.dx, spec.x_dtype), (wants.dresidual, spec.z_dtype)]
    out = [like.new_empty(like.shape, dtype=dtype) for wanted, dtype in rows if wanted]
    return out + [like.new_empty(like.shape[-1], dtype=spec.w_dtype) for wanted in wants[len(rows) :] if wanted]


#: Returns, in this order and only where they exist: y, y2, z, statistics.
dropout_add_norm = register(
    f"dropout_add_norm({declared(NormTensors)}, {declared(NormStores)}, {SPEC}) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
    _forward_autograd,
)

#: Returns the wanted ones among dx, dresidual, dweight, dbias, dweight2, dbias2, dx_bias.
dropout_add_norm_backward = register(
    f"dropout_add_norm_backward({declared(NormGiven)}, bool[] wants, {SPEC}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    None,
)
