"""``seqpar::dropout_add_norm``: schema, fake and autograd of the fused dropout + residual + norm."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..caches import MOST
from ..kernels import NormKind, NormSpec, NormWants, RowMap, select
from ..kernels.spec import accumulation_dtype, as_matrix, as_vector
from ..tensors import reshaped
from .registry import PLAIN_TYPES, apply, eager, register

_TENSORS = 10  # leading arguments of the forward that are tensors
SCALARS = (
    "int kind, bool zero_centered, float eps, float p, SymInt block, SymInt stride, SymInt offset, "
    "ScalarType z_dtype, ScalarType y_dtype, ScalarType w_dtype, str backend"
)


class NormScalars(NamedTuple):
    """The forward's arguments after its tensors, in the order of its schema; from ``kind`` on the backward's too."""

    store_z: bool
    two_norms: bool
    kind: int
    zero_centered: bool
    eps: float
    p: float
    block: int
    stride: int
    offset: int
    z_dtype: torch.dtype  # that of x where z is x
    y_dtype: torch.dtype
    w_dtype: torch.dtype
    backend: str


@functools.lru_cache(maxsize=MOST)
def prepared(device: torch.device, x_dtype: torch.dtype, scalars: tuple[Any, ...]) -> tuple[ModuleType, NormSpec]:
    """Who computes, and what; ``scalars`` from ``kind`` on."""
    kind, zero_centered, eps, p, block, stride, offset, z_dtype, y_dtype, w_dtype, backend = scalars
    rows = RowMap(int(block), int(stride), int(offset))
    spec = NormSpec(NormKind(kind), zero_centered, eps, p, rows, x_dtype, z_dtype, y_dtype, w_dtype)
    return select(backend, device), spec


def _in_shape(t: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Kernels that saw another shape return another shape."""
    return t if t is None or t.shape == shape else reshaped(t, shape)


def shaped(results: Iterable[Tensor | None], shape: torch.Size) -> list[Tensor]:
    """Those there are, in ``shape``."""
    return [t if t.shape == shape else reshaped(t, shape) for t in results if t is not None]


# --- kernels ---------------------------------------------------------------------------------------------------------

Results = Sequence[Tensor | None]


@functools.lru_cache(maxsize=MOST)
def forward_of(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, scalars: tuple[Any, ...]
) -> Callable[..., Results]:
    """The forward on plain tensors of one kind: the op's tensors -> y, y2, z, statistics, None where there is none."""
    store_z, two_norms = scalars[:2]
    backend, spec = prepared(device, dtype, scalars[2:])
    if hasattr(backend, "NormForward"):  # a backend whose host time counts brings its own
        return backend.NormForward(spec, shape, device, store_z=store_z, two_norms=two_norms)  # type: ignore[no-any-return]

    def run(
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        weight2: Tensor | None,
        bias2: Tensor | None,
        x_bias: Tensor | None,
        row_scale: Tensor | None,
        y_scale: Tensor | None,
        seed: Tensor | None,
    ) -> Results:
        y, y2, z, statistics = backend.norm_forward(
            as_matrix(x),
            as_vector(x_bias),
            as_vector(row_scale),
            as_matrix(residual),
            *map(as_vector, (weight, bias, weight2, bias2)),
            seed,
            spec,
            store_z=store_z,
            two_norms=two_norms,
            y_scale=y_scale,
        )
        return *(_in_shape(t, shape) for t in (y, y2, z)), statistics

    return run


@functools.lru_cache(maxsize=MOST)
def backward_of(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, scalars: tuple[Any, ...], wants: NormWants
) -> Callable[..., Results]:
    """The backward likewise: what the op takes up to ``seed`` -> the fields of NormGrads; ``scalars`` from ``kind``."""
    backend, spec = prepared(device, dtype, scalars)
    if hasattr(backend, "NormBackward"):
        return backend.NormBackward(spec, shape, device, wants)  # type: ignore[no-any-return]

    def run(
        dy: Tensor | None,
        dy2: Tensor | None,
        dz: Tensor | None,
        z: Tensor | None,
        statistics: Tensor | None,
        row_scale: Tensor | None,
        weight: Tensor | None,
        weight2: Tensor | None,
        seed: Tensor | None,
    ) -> Results:
        vectors = map(as_vector, (row_scale, weight, weight2))
        dx, dresidual, *grads = backend.norm_backward(
            *map(as_matrix, (dy, dy2, dz, z)), statistics, *vectors, seed, spec, wants
        )
        return [_in_shape(dx, shape), _in_shape(dresidual, shape), *grads]

    return run


# --- forward ---------------------------------------------------------------------------------------------------------


def _forward_kernel(*args: Any) -> list[Tensor]:
    x, tensors, scalars = args[0], args[:_TENSORS], args[_TENSORS:]
    return [t for t in forward_of(x.shape, x.dtype, x.device, scalars)(*tensors) if t is not None]


def _forward_fake(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    y_scale: Tensor | None,
    seed: Tensor | None,
    store_z: bool,
    two_norms: bool,
    kind: int,
    *scalars: Any,
) -> list[Tensor]:
    z_dtype, y_dtype = scalars[-4:-2]
    rows = x.numel() // x.shape[-1]
    out = []
    if kind != NormKind.NONE:
        out += [x.new_empty(x.shape, dtype=y_dtype) for _ in range(2 if two_norms else 1)]
    if store_z:
        out.append(x.new_empty(x.shape, dtype=z_dtype))
    if kind != NormKind.NONE:
        out.append(x.new_empty((2 if kind == NormKind.LAYER else 1, rows), dtype=accumulation_dtype(x.dtype)))
    return out


# --- autograd --------------------------------------------------------------------------------------------------------


class DispatchedNorm:
    """One kind of call as autograd needs it, its forward and backward left to the dispatcher.

    Every result of the op goes out.
    """

    def __init__(self, scalars: NormScalars, x_dtype: torch.dtype):
        self.scalars, self.x_dtype = scalars, x_dtype
        norm = scalars.kind != NormKind.NONE
        self._stored = (norm, norm and scalars.two_norms, scalars.store_z, norm)  # of y, y2, z, statistics
        self._hand_out([i for i, stored in enumerate(self._stored) if stored])

    def _hand_out(self, picked: list[int]) -> None:
        """Which of y, y2, z and statistics go out."""
        self.results = operator.itemgetter(*picked)
        self.returns_statistics = 3 in picked
        # Where their gradients come in, behind which a None stands for those that have none.
        self.gradients = operator.itemgetter(*(picked.index(i) if i in picked else -1 for i in range(3)))

    def forward(self, *tensors: Tensor | None) -> Results:
        """y, y2, z, statistics: None where there is none."""
        found = iter(dropout_add_norm.below_autograd(*tensors, *self.scalars))
        return [next(found) if stored else None for stored in self._stored]

    def backward(self, wants: NormWants, *tensors: Tensor | None) -> Results:
        """The gradients of NormGrads: None where not wanted. ``tensors``: the backward's, up to the seed."""
        found = iter(dropout_add_norm_backward(*tensors, list(wants), self.x_dtype, *self.scalars[2:]))
        return [next(found) if want else None for want in wants]


class PreparedNorm(DispatchedNorm):
    """One kind of call on plain tensors in eager mode, ready to run.

    Shape, dtype, device, scalars and how many results are returned make a kind. What follows from them (backend,
    kernels, their arguments, which results go out) is worked out once, so that a call costs little more than its
    allocations, ``autograd.Function`` and the launch: small calls live and die by host time.
    """

    def __init__(
        self, scalars: NormScalars, shape: torch.Size, x_dtype: torch.dtype, device: torch.device, returned: int
    ):
        super().__init__(scalars, x_dtype)
        self._hand_out([i for i, stored in enumerate(self._stored) if stored][:returned])
        self._kind = shape, x_dtype, device
        self._backwards: dict[NormWants, Callable[..., Results]] = {}

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        weight2: Tensor | None,
        bias2: Tensor | None,
        x_bias: Tensor | None,
        row_scale: Tensor | None,
        y_scale: Tensor | None,
        seed: Tensor | None,
    ) -> Any:
        """The results that are returned: a tuple, or the only one."""
        if torch.is_grad_enabled():
            for t in (x, residual, weight, bias, weight2, bias2, x_bias):
                if t is not None and t.requires_grad:
                    return _apply(self, x, residual, weight, bias, weight2, bias2, x_bias, (row_scale, y_scale, seed))
        return self.results(self.forward(x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale, seed))

    @functools.cached_property
    def forward(self) -> Callable[..., Results]:  # type: ignore[override]
        return forward_of(*self._kind, self.scalars)

    def backward(self, wants: NormWants, *tensors: Tensor | None) -> Results:
        if torch.is_grad_enabled() or not eager():  # create_graph, a mode that looks on
            return super().backward(wants, *tensors)
        for t in tensors[:3]:
            if t is not None and type(t) not in PLAIN_TYPES:
                return super().backward(wants, *tensors)
        run = self._backwards.get(wants)
        if run is None:
            run = self._backwards[wants] = backward_of(*self._kind, self.scalars[2:], wants)
        return run(*tensors)


class _DropoutAddNorm(torch.autograd.Function):
    """Keeps z (or x, when they are the same), the statistics and the seed; no mask, no norm output."""

    @staticmethod
    def forward(
        ctx: Any,
        call: DispatchedNorm,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        weight2: Tensor | None,
        bias2: Tensor | None,
        x_bias: Tensor | None,
        rest: tuple[Tensor | None, ...],
    ) -> Any:
        """``rest``: row_scale, y_scale and seed, at which autograd need not look."""
        row_scale, y_scale, seed = rest
        out = call.forward(x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale, seed)
        z, statistics = out[2], out[3]
        if statistics is None:
            z = None  # nothing was normalised
        elif z is None:
            z = x
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, statistics, row_scale, weight, weight2, seed)
        ctx.call = call
        if call.returns_statistics:
            ctx.mark_non_differentiable(statistics)
        return call.results(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        call: DispatchedNorm = ctx.call
        dy, dy2, dz = call.gradients((*grads, None))
        if dy is None and dy2 is None and dz is None:
            return (None,) * 9
        _, need_x, need_residual, need_weight, need_bias, need_weight2, need_bias2, need_x_bias, _ = (
            ctx.needs_input_grad
        )
        z, statistics, row_scale, weight, weight2, seed = ctx.saved_tensors
        # g and dx are one tensor where nothing stands between them: then one is computed and handed out twice.
        same = seed is None and row_scale is None and call.scalars.z_dtype == call.x_dtype
        wants = NormWants(
            need_x or (same and need_residual),
            need_residual and not same,
            need_weight,
            need_bias,
            need_weight2,
            need_bias2,
            need_x_bias,
        )
        dx, dresidual, *vectors = call.backward(wants, dy, dy2, dz, z, statistics, row_scale, weight, weight2, seed)
        if same and need_residual:
            dresidual = dx
        return (None, dx if need_x else None, dresidual, *vectors, None)


#: ``Function.apply`` without its care for functorch, whose transforms take :func:`_forward_autograd`.
_apply = super(torch.autograd.Function, _DropoutAddNorm).apply  # type: ignore[misc]


def _forward_autograd(*args: Any) -> list[Tensor]:
    tensors, scalars = args[:_TENSORS], NormScalars(*args[_TENSORS:])
    out = apply(_DropoutAddNorm, DispatchedNorm(scalars, tensors[0].dtype), *tensors[:7], tensors[7:])
    return [out] if isinstance(out, Tensor) else list(out)


# --- backward --------------------------------------------------------------------------------------------------------


def _like(*grads: Tensor | None) -> Tensor:
    """The first gradient that came: all have the shape of x."""
    return next(grad for grad in grads if grad is not None)


def _backward_kernel(
    dy: Tensor | None,
    dy2: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    statistics: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    seed: Tensor | None,
    wants: list[bool],
    x_dtype: torch.dtype,
    *scalars: Any,
) -> list[Tensor]:
    like = _like(dy, dy2, dz)
    run = backward_of(like.shape, x_dtype, like.device, scalars, NormWants(*wants))
    grads = run(dy, dy2, dz, z, statistics, row_scale, weight, weight2, seed)
    return [t for t in grads if t is not None]


def _backward_fake(
    dy: Tensor | None,
    dy2: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    statistics: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    seed: Tensor | None,
    wants: list[bool],
    x_dtype: torch.dtype,
    *scalars: Any,
) -> list[Tensor]:
    z_dtype, w_dtype = scalars[-4], scalars[-2]
    like = _like(dy, dy2, dz)
    out = [
        like.new_empty(like.shape, dtype=dtype) for dtype, want in zip((x_dtype, z_dtype), wants, strict=False) if want
    ]
    return out + [like.new_empty(like.shape[-1], dtype=w_dtype) for want in wants[2:] if want]


#: Returns, in this order and only where they exist: y, y2, z, statistics.
dropout_add_norm = register(
    "dropout_add_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? weight2, Tensor? bias2, "
    "Tensor? x_bias, Tensor? row_scale, Tensor? y_scale, Tensor? seed, bool store_z, bool two_norms, "
    f"{SCALARS}) -> Tensor[]",
    _forward_kernel,
    _forward_fake,
    _forward_autograd,
)

#: Returns the wanted ones among dx, dresidual, dweight, dbias, dweight2, dbias2, dx_bias.
dropout_add_norm_backward = register(
    "dropout_add_norm_backward(Tensor? dy, Tensor? dy2, Tensor? dz, Tensor? z, Tensor? statistics, "
    "Tensor? row_scale, Tensor? weight, Tensor? weight2, Tensor? seed, bool[] wants, ScalarType x_dtype, "
    f"{SCALARS}) -> Tensor[]",
    _backward_kernel,
    _backward_fake,
    None,
)
