"""The fused norm as operations of PyTorch, so that a compiler can fuse it with its neighbours.

``seqpar::dropout_add_norm`` is opaque to torch.compile, which calls its kernel. With :data:`decompositions`, or with
``torch.compile(model, backend=inductor_fusion)``, a compiler gets PyTorch operations in its place. The random bits of
dropout stay one op, ``seqpar::dropout_kept``, with the bits of the fused op: written as integer operations they would
be some hundred for each element, and inductor would repeat them wherever it reads the mask.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import NormKind, NormSpec, NormWants, RowMap, select
from ..kernels.reference import norm_backward, norm_forward
from ..tensors import rows_of
from .norm import NormScalars, dropout_add_norm, dropout_add_norm_backward
from .registry import register


def _kept_kernel(
    seed: Tensor, rows: int, cols: int, p: float, block: int, stride: int, offset: int, backend: str, again: bool
) -> Tensor:
    bf16 = torch.bfloat16
    spec = NormSpec(NormKind.NONE, False, 0.0, p, RowMap(block, stride, offset), bf16, bf16, bf16, bf16)
    ones = torch.ones(1, cols, dtype=bf16, device=seed.device).expand(rows, cols)
    out = select(backend, seed.device).norm_forward(ones, *[None] * 7, seed, spec, store_z=True)
    return out.z.reshape(rows, cols)


def _kept_fake(seed: Tensor, rows: int, cols: int, *_: Any) -> Tensor:
    return seed.new_empty((rows, cols), dtype=torch.bfloat16)


#: bfloat16 [rows, cols], not zero where dropout keeps an element. ``again`` is True in the backward's call: a compiler
#: that merged it with the forward's call would store the mask between them.
dropout_kept = register(
    "dropout_kept(Tensor seed, SymInt rows, SymInt cols, float p, SymInt block, SymInt stride, SymInt offset, "
    "str backend, bool again) -> Tensor",
    _kept_kernel,
    _kept_fake,
    None,
)


def _mask(backend: str, again: bool, rows: int, cols: int, p: float, seed: Tensor, row_map: RowMap) -> Tensor:
    """:func:`seqpar_kernels.kernels.reference.dropout_mask`. bool [rows, cols]."""
    return dropout_kept(seed, rows, cols, p, *row_map, backend, again) != 0


def _spec(x_dtype: torch.dtype, scalars: NormScalars) -> NormSpec:
    rows = RowMap(scalars.block, scalars.stride, scalars.offset)
    dtypes = (x_dtype, scalars.z_dtype, scalars.y_dtype, scalars.w_dtype)
    return NormSpec(NormKind(scalars.kind), scalars.zero_centered, scalars.eps, scalars.p, rows, *dtypes)


def _rows(t: Tensor | None) -> Tensor | None:
    return None if t is None else rows_of(t)


def _forward(
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
    *args: Any,
) -> list[Tensor]:
    scalars = NormScalars(*args)
    vectors = (weight, bias, weight2, bias2)
    out = norm_forward(
        rows_of(x),
        x_bias,
        row_scale,
        _rows(residual),
        *vectors,
        seed,
        _spec(x.dtype, scalars),
        store_z=scalars.store_z,
        two_norms=scalars.two_norms,
        y_scale=y_scale,
        mask=functools.partial(_mask, scalars.backend, False),
    )
    full = [t.view(x.shape) for t in out[:3] if t is not None]
    return full if out.statistics is None else [*full, out.statistics]


def _backward(
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
    *args: Any,
) -> list[Tensor]:
    scalars = NormScalars(True, True, *args)
    given = (_rows(dy), _rows(dy2), _rows(dz), _rows(z), statistics, row_scale, weight, weight2, seed)
    mask = functools.partial(_mask, scalars.backend, True)
    grads = norm_backward(*given, _spec(x_dtype, scalars), NormWants(*wants), mask=mask)
    shape = next(t.shape for t in (dy, dy2, dz) if t is not None)
    return [t.view(shape) if i < 2 else t for i, t in enumerate(grads) if t is not None]


#: For ``decompositions=`` of AOTAutograd (``aot_autograd``, ``aot_module``) and of ``make_fx``.
decompositions: dict[Any, Callable[..., Any]] = {
    dropout_add_norm.overload: _forward,
    dropout_add_norm_backward.overload: _backward,
}


def inductor_fusion(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor], *, options: dict[str, Any] | None = None
) -> Any:
    """For ``torch.compile(model, backend=inductor_fusion)``: inductor, which fuses the norm with its neighbours.

    Bias, residual add, row scale, norm and casts become inductor's own; an activation before them or a cast after them
    joins their kernels, forward and backward. The dropout mask is that of the fused op. Roundings between the steps are
    inductor's: z may enter the norm before it is rounded, and sums run in inductor's order, so that two devices or
    shardings may differ in bits. The dropout bits, 2 bytes an element, are written to memory and read again. The fused
    kernel, which torch.compile uses by default, does neither: measure which of the two takes less time.

    Args:
        graph, inputs: the arguments that torch.compile passes to a backend.
        options: inductor's, as in ``torch.compile(options=...)``.

    Raises:
        RuntimeError: an option that inductor does not know.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> norm = sp.LayerNorm(16)
        >>> compiled = torch.compile(norm, backend=sp.inductor_fusion)
        >>> x = torch.randn(2, 8, 16)
        >>> torch.allclose(compiled(x), norm(x), atol=1e-5)
        True
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table = {**select_decomp_table(), **decompositions}
    return compile_fx(graph, inputs, config_patches=options, decompositions=table)
