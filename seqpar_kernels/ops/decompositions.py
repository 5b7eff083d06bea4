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

from ..kernels import NormGiven, NormKind, NormSpec, NormTensors, RowMap, select
from ..kernels.reference import norm_backward, norm_forward
from ..tensors import rows_of
from .norm import dropout_add_norm, dropout_add_norm_backward, existing, packed, packed_backward
from .registry import register


def _kept_kernel(
    seed: Tensor, rows: int, cols: int, p: float, block: int, stride: int, offset: int, backend: str, again: bool
) -> Tensor:
    bf16 = torch.bfloat16
    spec = NormSpec(NormKind.NONE, False, 0.0, p, RowMap(block, stride, offset), bf16, bf16, bf16, bf16)
    ones = torch.ones(1, cols, dtype=bf16, device=seed.device).expand(rows, cols)
    z = select(backend, seed.device).norm_forward(NormTensors(ones, seed=seed), spec).z
    assert z is not None
    return z.reshape(rows, cols)


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


def _forward(*args: Any) -> list[Tensor]:
    tensors, (stores, spec, backend) = packed(args)
    x, residual, *rest = tensors
    rows = NormTensors(rows_of(x), None if residual is None else rows_of(residual), *rest)
    out = norm_forward(rows, spec, stores, mask=functools.partial(_mask, backend, False))
    return existing([*(None if t is None else t.view(x.shape) for t in out[:3]), out.statistics])


def _backward(*args: Any) -> list[Tensor]:
    tensors, wants, spec, backend = packed_backward(args)
    rows = [None if t is None else rows_of(t) for t in tensors[:4]]
    given = NormGiven._make((*rows, *tensors[4:]))
    grads = norm_backward(given, spec, wants, mask=functools.partial(_mask, backend, True))
    shape = tensors.like().shape
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
