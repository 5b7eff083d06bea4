"""Fused dropout + residual + norm, and dropout + residual alone."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

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
from ..kernels import BACKENDS, NormKind
from ..kernels.spec import accumulation_dtype
from ..layout import Group, WrongTypeError, check_shard, resolve_group, row_map
from ..ops.registry import PLAIN_TYPES, eager, group_name
from ..random import as_seed, check_seeds_alike, debug_enabled, draw_seed


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None = None,
    *,
    p: float = 0.0,
    eps: float = 1e-5,
    training: bool = True,
    prenorm: bool = False,
    x_bias: Tensor | None = None,
    zero_centered_weight: bool = False,
    residual_dtype: torch.dtype | None = None,
    group: Group = None,
    seq_dim: int = -2,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    seq_len: int | None = None,
    row_scale: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> Any:
    """``z = dropout(x + x_bias) + residual; y = layer_norm(z) * weight + bias``, in one pass.

    Args:
        x: [..., S/t, ..., H], float32, bfloat16, float16 or float64; this rank's shard where ``group`` has t ranks.
        residual: like ``x``, in ``x``'s dtype or ``residual_dtype``; None adds nothing.
        weight, bias: [H]; None for none. With ``group``, their gradients are summed over its ranks.
        p: dropout probability. The mask is a function of (seed, global row, column) alone, so it does not change with
            the number of ranks, the device or the backend (docs/numerics.md).
        eps: added to the variance.
        training: dropout only where True.
        prenorm: return ``(y, z)``, z being the residual of the next block.
        x_bias: [H], the bias of the linear layer that made ``x``, added first.
        zero_centered_weight: scale by ``1 + weight``.
        residual_dtype: dtype of z: ``x``'s or float32. Default: residual's, or ``x``'s without a residual.
        group: ProcessGroup, 1-D DeviceMesh or None over which the sequence is sharded.
        seq_dim: the sequence dimension of ``x``.
        seed: an int or a 0-d int64 tensor; default: drawn from the default generator of ``x.device``.
        backend: force "native", "cpu", "cuda", "triton" or "reference".
        seq_len: unsharded length; needed only where it is not a multiple of the number of ranks.
        row_scale: float32 of ``x.shape[:-1]``; multiplies the dropout's result row by row (stochastic depth).
        weight2, bias2: [H]; a second norm of the same z (parallel attention and MLP blocks), returned after ``y``.
        y_scale: float32, one element. Norms come out in float8_e4m3fn, multiplied by it and saturated to +-448, for a
            matmul in 8 bits: its other factor is ``1 / y_scale``. Such an output carries no gradient.

    Returns:
        ``y``, or ``(y, z)`` with ``prenorm``; with a second norm ``(y, y2)`` or ``(y, y2, z)``. y has the dtype of
        ``x`` (float8_e4m3fn with ``y_scale``), z has ``residual_dtype``.

    Raises:
        ValueError: an argument that does not fit, by name.
        RuntimeError: the forced backend cannot run here, with the reason.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, residual = torch.randn(2, 2, 8, 16).unbind(0)
        >>> weight, bias = torch.ones(16), torch.zeros(16)
        >>> y, z = sp.dropout_add_layer_norm(x, residual, weight, bias, p=0.1, prenorm=True)
        >>> torch.allclose(y, torch.nn.functional.layer_norm(z, (16,), weight, bias), atol=1e-5)
        True
    """
    return run_norm(
        NormTensors(x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale),
        NormOptions(
            NormKind.LAYER, p, eps, training, prenorm, zero_centered_weight, residual_dtype, seq_dim, seq_len, backend
        ),
        group,
        seed,
    )


def dropout_add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    *,
    p: float = 0.0,
    eps: float = 1e-5,
    training: bool = True,
    prenorm: bool = False,
    x_bias: Tensor | None = None,
    zero_centered_weight: bool = False,
    residual_dtype: torch.dtype | None = None,
    group: Group = None,
    seq_dim: int = -2,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    seq_len: int | None = None,
    row_scale: Tensor | None = None,
    weight2: Tensor | None = None,
    y_scale: Tensor | None = None,
) -> Any:
    """``z = dropout(x + x_bias) + residual; y = rms_norm(z) * weight``: see :func:`dropout_add_layer_norm`.

    RMSNorm (Zhang and Sennrich 2019) subtracts no mean and has no bias.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, residual = torch.randn(2, 2, 8, 16).unbind(0)
        >>> y = sp.dropout_add_rms_norm(x, residual, torch.ones(16), eps=1e-6)
        >>> torch.allclose(y, torch.nn.functional.rms_norm(x + residual, (16,), eps=1e-6), atol=1e-5)
        True
    """
    return run_norm(
        NormTensors(x, residual, weight, None, weight2, None, x_bias, row_scale, y_scale),
        NormOptions(
            NormKind.RMS, p, eps, training, prenorm, zero_centered_weight, residual_dtype, seq_dim, seq_len, backend
        ),
        group,
        seed,
    )


def dropout_add(
    x: Tensor,
    residual: Tensor | None = None,
    *,
    p: float = 0.0,
    training: bool = True,
    x_bias: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    group: Group = None,
    seq_dim: int = -2,
    seed: int | Tensor | None = None,
    backend: str | None = None,
    seq_len: int | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """``dropout(x + x_bias) + residual`` with the mask of :func:`dropout_add_layer_norm`, and no norm after it.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> x, residual = torch.ones(2, 8, 16), torch.zeros(2, 8, 16)
        >>> z = sp.dropout_add(x, residual, p=0.5, seed=1)
        >>> z.unique()
        tensor([0., 2.])
        >>> torch.equal(z, sp.dropout_add(x, residual, p=0.5, seed=1))
        True
    """
    tensors = NormTensors(x, residual, x_bias=x_bias, row_scale=row_scale)
    options = NormOptions(
        NormKind.NONE,
        p,
        training=training,
        residual_dtype=residual_dtype,
        seq_dim=seq_dim,
        seq_len=seq_len,
        backend=backend,
    )
    out: Tensor = run_norm(tensors, options, group, seed)
    return out


class NormTensors(NamedTuple):
    """The tensors of a call, in the order of the op's arguments."""

    x: Tensor
    residual: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    weight2: Tensor | None = None
    bias2: Tensor | None = None
    x_bias: Tensor | None = None
    row_scale: Tensor | None = None
    y_scale: Tensor | None = None


VECTORS = ("weight", "bias", "weight2", "bias2", "x_bias")  # [H]


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

    scalars: ops.NormScalars
    drop: bool
    returned: int  # how many of the op's outputs the caller gets
    length: int  # of the unsharded sequence
    vector_dtype: torch.dtype | None  # what the [H] vectors must be cast to first; None: they are fine
    converts: bool  # whether any tensor must be cast or reshaped first
    passes_x: bool  # whether z, which is x then, goes out behind the op's outputs


class Ready(NamedTuple):
    """A call that has been checked."""

    settled: Settled
    call: ops.PreparedNorm | None  # None: the dispatcher must see it


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
                x, residual, *vectors, row_scale, y_scale = tensors
                tensors = NormTensors(x, residual, *replicated(vectors, pg), row_scale, y_scale)  # type: ignore[call-arg]
            ready, seed_tensor = _checked(tensors, options, pg, seed)
        if seed_tensor is not None and not torch.compiler.is_compiling():
            # Shards of different lengths would drop different rows without anybody noticing.
            dropped = f"dropout over S={ready.settled.length} at dim {options.seq_dim} of {tensors.x.dim()}"
            if debug_enabled():
                compare_seeds(seed_tensor, pg, dropped)
            else:
                coordination_of(pg).require(dropped)
    settled, call = ready
    if settled.returned == 0:
        return tensors.x  # nothing is dropped, added or normalised
    if settled.converts:
        tensors = _converted(tensors, settled)
    if call is not None:
        returned = call(*tensors, seed_tensor)
    else:
        outs = ops.dropout_add_norm(*tensors, seed_tensor, *settled.scalars)
        returned = outs[0] if settled.returned == 1 else tuple(outs[: settled.returned])
    if settled.passes_x:
        return (returned, tensors.x) if settled.returned == 1 else (*returned, tensors.x)
    return returned


def _converted(tensors: NormTensors, settled: Settled) -> NormTensors:
    """In the dtypes and shapes that the op takes."""
    x, residual, *vectors, row_scale, y_scale = tensors
    if residual is not None:
        residual = residual.to(settled.scalars.z_dtype)
    if row_scale is not None:
        row_scale = row_scale.reshape(-1)
    if settled.vector_dtype is not None:
        vectors = [None if v is None else v.to(settled.vector_dtype) for v in vectors]
    return NormTensors(x, residual, *vectors, row_scale, y_scale)  # type: ignore[call-arg]


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
        metas = metas_of(tensors)
        if eager():
            ready = _prepare(options, ranks, rank, *metas)
        else:
            ready = Ready(settle(options, ranks, rank, *metas), None)
    except (AttributeError, WrongTypeError):
        for name, t in tensors._asdict().items():
            if t is not None:
                check_tensor(name, t)  # which sees the tensors themselves
        raise
    if tensors.row_scale is not None and tensors.row_scale.requires_grad:
        raise ValueError("row_scale: expected a tensor without gradient, got requires_grad=True")
    if (
        tensors.y_scale is not None
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
    ):
        raise ValueError("y_scale: a float8 output carries no gradient; call under torch.no_grad()")
    drop = ready.settled.drop
    if seed is None and not drop:
        return ready, None
    seed = draw_seed(tensors.x.device) if seed is None else as_seed(seed, tensors.x.device)
    return ready, seed if drop else None  # a wrong seed is wrong in evaluation too


def metas_of(tensors: Iterable[Tensor | None]) -> list[tuple[Any, ...] | None]:
    """The :class:`Meta` of each, as bare tuples: they are keys only, mostly."""
    return [None if t is None else (t.shape, t.dtype, t.device, type(t)) for t in tensors]


@functools.lru_cache(maxsize=MOST)
def _prepare(options: NormOptions, ranks: int, rank: int, *metas: tuple[Any, ...] | None) -> Ready:
    """:func:`settle` and the call itself, in eager mode; once for each kind of call."""
    settled = settle(options, ranks, rank, *metas)
    x = Meta(*metas[0])  # type: ignore[misc]
    types = {meta[-1] for meta in metas if meta is not None}
    if settled.returned == 0 or x.device.type == "meta" or not types <= set(PLAIN_TYPES):
        return Ready(settled, None)
    return Ready(settled, ops.PreparedNorm(settled.scalars, x.shape, x.dtype, x.device, settled.returned))


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
        if issubclass(meta.type, DTensor):
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
    block, stride, offset = row_map(x.shape, seq_dim, shard)
    scalars = ops.NormScalars(
        store_z=not same,
        two_norms=two_norms,
        kind=int(options.kind),
        zero_centered=options.zero_centered,
        eps=float(options.eps),
        p=float(options.p),
        block=block,
        stride=stride,
        offset=offset,
        z_dtype=z_dtype,
        y_dtype=torch.float8_e4m3fn if "y_scale" in given else x.dtype,
        w_dtype=next(iter(dtypes), x.dtype) if fine else wide,
        backend=options.backend or "",
    )
    norms = 0 if options.kind == NormKind.NONE else 2 if two_norms else 1
    returned = norms + (not same and (options.prenorm or norms == 0))
    converts = not fine or "row_scale" in given or (residual is not None and residual.dtype != z_dtype)
    passes_x = options.prenorm and same
    return Settled(scalars, drop, returned, shard.length, None if fine else wide, converts, passes_x)


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
