"""How a call of the norm is checked, settled once for each kind, and run: what the public functions share."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .. import ops
from ..caches import MOST
from ..checks import (
    check_eps,
    check_probability,
    check_same_device,
    check_same_shape,
    check_sequence,
    check_tensor,
    check_vector,
)
from ..comm.coordination import checked_together, coordination_of
from ..kernels import BACKENDS, NormKind, NormSpec, NormStores, NormTensors, RowMap
from ..kernels.spec import accumulation_dtype
from ..layout import Group, WrongTypeError, check_shard, resolve_group, row_map
from ..ops.registry import PLAIN_TYPES, eager, group_name
from ..random import as_seed, check_seeds_alike, debug_enabled, draw_seed
from ..tensors import is_dtensor

_FIRST, _LAST = NormTensors._fields.index("weight"), NormTensors._fields.index("row_scale")
VECTORS = NormTensors._fields[_FIRST:_LAST]  # [H]


class NormOptions(NamedTuple):
    """What else decides how a call is done; hashable, since all that follows from it is worked out once."""

    kind: NormKind
    p: float = 0.0
    eps: float = 1e-5
    training: bool = True
    prenorm: bool = False
    zero_centered: bool = False
    residual_dtype: torch.dtype | None = None
    seq_dim: int = -2
    seq_len: int | None = None
    backend: str | None = None


class Meta(NamedTuple):
    """What the checks look at: a tensor without its values."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    type: type


class Settled(NamedTuple):
    """A call whose arguments fit together."""

    call: ops.NormCall
    drop: bool
    returned: int  # how many of the op's outputs the caller gets
    length: int  # of the unsharded sequence
    vector_dtype: torch.dtype | None  # what the [H] vectors must be cast to first; None: they are fine
    converts: bool  # whether any tensor must be cast or reshaped first
    passes_x: bool  # whether z, which is x then, goes out behind the op's outputs
    scaled: bool  # whether there is a row_scale or y_scale


class Ready(NamedTuple):
    """A call that has been checked."""

    settled: Settled
    prepared: ops.PreparedNorm | None  # None: the dispatcher must see it


def run_norm(
    tensors: NormTensors,
    options: NormOptions,
    group: Group = None,
    seed: int | Tensor | None = None,
    *,
    sum_gradients: bool = True,
) -> Any:
    """All three public functions. ``sum_gradients=False``: the caller sums those of the vectors over the ranks."""
    pg = None if group is None else resolve_group(group)
    if pg is None:
        ready, seed_tensor = _checked(tensors, options, None, seed)
    else:
        with checked_together(pg, step=False):
            if sum_gradients:
                tensors = _with_vectors(tensors, replicated(tensors[_FIRST:_LAST], pg))
            ready, seed_tensor = _checked(tensors, options, pg, seed)
        if seed_tensor is not None and not torch.compiler.is_compiling():
            # Shards of different lengths would drop different rows without anybody noticing.
            dropped = f"dropout over S={ready.settled.length} at dim {options.seq_dim} of {tensors.x.dim()}"
            if debug_enabled():
                compare_seeds(seed_tensor, pg, dropped)
            else:
                coordination_of(pg).require(dropped)
    settled, prepared = ready
    if settled.returned == 0:
        return tensors.x  # nothing is dropped, added or normalised
    if settled.converts:
        tensors = converted(tensors, settled)
    if seed_tensor is not None:
        tensors = tuple.__new__(NormTensors, (*tensors[:-1], seed_tensor))  # _replace takes longer
    if prepared is not None:
        returned = prepared(tensors)
    else:
        outs = ops.dropout_add_norm(*tensors, *settled.call.flat())
        returned = outs[0] if settled.returned == 1 else tuple(outs[: settled.returned])
    if settled.passes_x:
        return (returned, tensors.x) if settled.returned == 1 else (*returned, tensors.x)
    return returned


def converted(tensors: NormTensors, settled: Settled) -> NormTensors:
    """In the dtypes and shapes that the op takes."""
    if tensors.residual is not None:
        tensors = tensors._replace(residual=tensors.residual.to(settled.call.spec.z_dtype))
    if tensors.row_scale is not None:
        tensors = tensors._replace(row_scale=tensors.row_scale.reshape(-1))
    if settled.vector_dtype is not None:
        vectors = [None if v is None else v.to(settled.vector_dtype) for v in tensors[_FIRST:_LAST]]
        tensors = _with_vectors(tensors, vectors)
    return tensors


def _with_vectors(tensors: NormTensors, vectors: Sequence[Tensor | None]) -> NormTensors:
    return NormTensors._make([*tensors[:_FIRST], *vectors, *tensors[_LAST:]])


def compare_seeds(seed: Tensor, group: ProcessGroup, where: str) -> None:
    """:func:`check_seeds_alike` among ranks that all do so: SEQPAR_DEBUG on some of them alone is an error."""
    coordination_of(group).require(f"{where}, seeds compared: SEQPAR_DEBUG=1")
    check_seeds_alike(seed, group)


def _checked(
    tensors: NormTensors, options: NormOptions, pg: ProcessGroup | None, seed: int | Tensor | None
) -> tuple[Ready, Tensor | None]:
    """What follows from the arguments, and the dropout seed if anything is dropped."""
    if type(options.p) is not float:  # True equals 1.0, and would be found where that has been looked up
        check_probability("p", options.p)
    ranks, rank = (1, 0) if pg is None else (pg.size(), pg.rank())
    try:
        metas = [None if t is None else (t.shape, t.dtype, t.device, type(t)) for t in tensors]  # metas_of, inlined
        if eager():
            ready = _prepare(options, ranks, rank, *metas)
        else:
            ready = Ready(settle(options, ranks, rank, *metas), None)
    except (AttributeError, WrongTypeError):
        for name, t in tensors._asdict().items():
            if t is not None:
                check_tensor(name, t)  # which sees the tensors themselves
        raise
    if ready.settled.scaled:
        _check_gradients(tensors)
    drop = ready.settled.drop
    if seed is None and not drop:
        return ready, None
    seed = draw_seed(tensors.x.device) if seed is None else as_seed(seed, tensors.x.device)
    return ready, seed if drop else None  # a wrong seed is wrong in evaluation too


def _check_gradients(tensors: NormTensors) -> None:
    """Of a row_scale there is none, through a y_scale there is none."""
    if tensors.row_scale is not None and tensors.row_scale.requires_grad:
        raise ValueError("row_scale: expected a tensor without gradient, got requires_grad=True")
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if tensors.y_scale is not None and wanted:
        raise ValueError("y_scale: a float8 output carries no gradient; call under torch.no_grad()")


def metas_of(tensors: Iterable[Tensor | None]) -> list[tuple[Any, ...] | None]:
    """The :class:`Meta` of each, as bare tuples: they are keys only, mostly."""
    return [None if t is None else (t.shape, t.dtype, t.device, type(t)) for t in tensors]


@functools.lru_cache(maxsize=MOST)
def _prepare(options: NormOptions, ranks: int, rank: int, *metas: tuple[Any, ...] | None) -> Ready:
    """:func:`settle` and the call itself, in eager mode; once for each kind of call."""
    settled = settle(options, ranks, rank, *metas)
    assert metas[0] is not None
    x = Meta(*metas[0])
    types = {meta[-1] for meta in metas if meta is not None}
    if settled.returned == 0 or x.device.type == "meta" or not types <= set(PLAIN_TYPES):
        return Ready(settled, None)
    return Ready(settled, ops.PreparedNorm(settled.call, x.shape, x.device, settled.returned))


def settle(*args: Any) -> Settled:
    """Everything that can be wrong with a call, and what follows from its shapes; once for each kind of call."""
    # Symbolic shapes cannot be looked up; there nothing is called twice anyway.
    symbolic = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return (_settle.__wrapped__ if symbolic else _settle)(*args)


@functools.lru_cache(maxsize=MOST)
def _settle(
    options: NormOptions,
    ranks: int,
    rank: int,
    *metas: tuple[Any, ...] | None,
) -> Settled:
    """Everything that can be wrong with a call, and what follows from its shapes; once for each kind of call."""
    given = {name: Meta(*meta) for name, meta in zip(NormTensors._fields, metas, strict=True) if meta is not None}
    for name, meta in given.items():
        if not issubclass(meta.type, Tensor):
            raise ValueError(f"{name}: expected a tensor, got {meta.type.__name__}")
        if is_dtensor(meta.type):
            raise WrongTypeError(f"{name}: expected a plain tensor, got a DTensor; pass {name}.to_local()")
    if "x" not in given:
        check_tensor("x", None)
    check_probability("p", options.p)
    x, residual = given["x"], given.get("residual")
    seq_dim = check_sequence("x", x, options.seq_dim)
    shard = check_shard("x", x.shape[seq_dim], ranks, rank, options.seq_len)
    hidden = x.shape[-1]
    if hidden == 0:
        raise ValueError(f"x: expected a last size of at least 1, got shape {tuple(x.shape)}")
    check_eps(options.eps)
    if options.backend is not None and options.backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {sorted(BACKENDS)} or None, got {options.backend!r}")
    vectors = [name for name in VECTORS if name in given]
    for name in vectors:
        check_vector(name, given[name], hidden, x)
    wide = accumulation_dtype(x.dtype)
    z_dtype = options.residual_dtype
    if z_dtype is None:
        z_dtype = x.dtype if residual is None else residual.dtype
    if z_dtype not in (x.dtype, wide):
        wanted = f"{x.dtype}, the dtype of x" + ("" if x.dtype == wide else f", or {wide}")
        raise ValueError(f"residual_dtype: expected {wanted}, got {z_dtype}")
    if residual is not None:
        check_same_shape("residual", residual, "x", x)
        check_same_device("residual", residual, "x", x)
        if residual.dtype not in (x.dtype, z_dtype):
            raise ValueError(f"residual: expected {x.dtype} or {z_dtype}, got {residual.dtype}")
    for name, shapes in (("row_scale", [tuple(x.shape[:-1])]), ("y_scale", [(), (1,)])):
        scale = given.get(name)
        if scale is None:
            continue
        if tuple(scale.shape) not in shapes or scale.dtype != torch.float32:
            expected = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected float32 {expected}, got {scale.dtype} {tuple(scale.shape)}")
        check_same_device(name, scale, "x", x)
    # The kernels take [H] vectors in one dtype, x's or the wide one; anything else is cast, and gradients flow back.
    dtypes = {given[name].dtype for name in vectors}
    fine = len(dtypes) == 0 or (len(dtypes) == 1 and dtypes <= {x.dtype, wide})
    drop = options.training and options.p > 0.0
    same = not drop and z_dtype == x.dtype and not given.keys() & {"residual", "x_bias", "row_scale"}
    two_norms = "weight2" in given or "bias2" in given
    spec = NormSpec(
        kind=options.kind,
        zero_centered=options.zero_centered,
        eps=float(options.eps),
        p=float(options.p),
        rows=RowMap(*row_map(x.shape, seq_dim, shard)),
        x_dtype=x.dtype,
        z_dtype=z_dtype,
        y_dtype=torch.float8_e4m3fn if "y_scale" in given else x.dtype,
        w_dtype=next(iter(dtypes), x.dtype) if fine else wide,
    )
    call = ops.NormCall(NormStores(store_z=not same, two_norms=two_norms), spec, options.backend or "")
    norms = 0 if options.kind == NormKind.NONE else 2 if two_norms else 1
    returned = norms + (not same and (options.prenorm or norms == 0))
    converts = not fine or "row_scale" in given or (residual is not None and residual.dtype != z_dtype)
    passes_x = options.prenorm and same
    scaled = "row_scale" in given or "y_scale" in given
    return Settled(call, drop, returned, shard.length, None if fine else wide, converts, passes_x, scaled)


def replicated(params: Sequence[Tensor | None], group: ProcessGroup) -> list[Tensor | None]:
    """Parameters as they must enter a computation on a sequence shard: their gradients are summed over the ranks.

    16-bit ones come back in float32, so that the sum over ranks is rounded once.
    """
    if not torch.is_grad_enabled():
        return list(params)
    picked = [i for i, t in enumerate(params) if isinstance(t, Tensor) and t.requires_grad]
    if not picked:
        return list(params)
    out = list(params)
    wrapped = ops.SumGradients.apply(group_name(group), *(params[i] for i in picked))
    for i, tensor in zip(picked, wrapped, strict=True):
        out[i] = tensor
    return out
