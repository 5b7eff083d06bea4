"""The compiled kernels (csrc/) on torch tensors: CPU and CUDA, chosen by where ``x`` lives.

Same functions, same arguments as :mod:`.reference`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .spec import (
    NormGrads,
    NormKind,
    NormOutputs,
    NormSpec,
    NormWants,
    accumulation_dtype,
    dropout_scale,
    dropout_threshold,
)

try:
    from .. import _native
except ImportError as error:  # an unbuilt checkout: the reason is kept and shown where somebody needs the kernels
    _native = None  # type: ignore[assignment]
    build_error: str | None = str(error)
else:
    build_error = None

DTYPE_CODE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.float8_e4m3fn: 4,
}
_NO_DROPOUT = (0, 0, 1.0)

#: CUDA multiprocessors the kernels leave free for communication running beside them.
sm_margin = 0


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on ``device``; None when they can."""
    if _native is None:
        return f"the compiled extension is missing ({build_error})"
    if device.type == "cuda":
        return None if _native.has_cuda else "the extension was built without nvcc"
    return None if device.type == "cpu" else f"there are compiled kernels for cpu and cuda, not for {device.type}"


def _place(device: torch.device) -> tuple[bool, int, int]:
    if device.type == "cuda":
        return True, sm_margin, torch.cuda.current_stream(device).cuda_stream
    return False, torch.get_num_threads(), 0


def _launch(kernel: Callable[..., None], device: torch.device, *args: object) -> None:
    """Call a kernel where its tensors are: a launch goes to the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel(*_place(device), *args)
    else:
        kernel(*_place(device), *args)


def _matrix(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.data_ptr(), t.stride(0))


def _vector(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _dropout(seed: Tensor | None, p: float) -> tuple[int, int, float]:
    if seed is None:
        return _NO_DROPOUT
    return seed.data_ptr(), dropout_threshold(p), dropout_scale(p)


def norm_forward(
    x: Tensor,
    x_bias: Tensor | None,
    row_scale: Tensor | None,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    seed: Tensor | None,
    spec: NormSpec,
    *,
    store_z: bool,
    two_norms: bool = False,
    y_scale: Tensor | None = None,
) -> NormOutputs:
    """See :func:`.reference.norm_forward`."""
    rows, cols = x.shape
    device = x.device
    y = y2 = z = mean = rstd = None
    if spec.kind != NormKind.NONE:
        stats_dtype = accumulation_dtype(x.dtype)
        y = torch.empty((rows, cols), dtype=spec.y_dtype, device=device)
        rstd = torch.empty(rows, dtype=stats_dtype, device=device)
        if spec.kind == NormKind.LAYER:
            mean = torch.empty(rows, dtype=stats_dtype, device=device)
        if two_norms:
            y2 = torch.empty((rows, cols), dtype=spec.y_dtype, device=device)
    if store_z:
        z = torch.empty((rows, cols), dtype=spec.z_dtype, device=device)
    _launch(
        _native.norm_forward,
        device,
        rows,
        cols,
        spec.kind,
        spec.zero_centered,
        spec.eps,
        DTYPE_CODE[x.dtype],
        DTYPE_CODE[spec.z_dtype],
        DTYPE_CODE[spec.y_dtype],
        DTYPE_CODE[spec.w_dtype],
        *_matrix(x),
        _vector(x_bias),
        _vector(row_scale),
        *_matrix(residual),
        *_dropout(seed, spec.p),
        *spec.rows,
        _vector(weight),
        _vector(bias),
        _vector(weight2),
        _vector(bias2),
        *_matrix(z),
        *_matrix(y),
        *_matrix(y2),
        _vector(y_scale),
        _vector(mean),
        _vector(rstd),
    )
    return NormOutputs(y, y2, z, mean, rstd)


def norm_backward(
    dy: Tensor | None,
    dy2: Tensor | None,
    dz: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    seed: Tensor | None,
    spec: NormSpec,
    wants: NormWants,
) -> NormGrads:
    """See :func:`.reference.norm_backward`."""
    like = next(t for t in (dz, dy, dy2) if t is not None)
    rows, cols = like.shape
    device = like.device
    dx = torch.empty((rows, cols), dtype=spec.x_dtype, device=device) if wants.dx else None
    dresidual = torch.empty((rows, cols), dtype=spec.z_dtype, device=device) if wants.dresidual else None
    vectors = [torch.empty(cols, dtype=spec.w_dtype, device=device) if wanted else None for wanted in wants[2:]]
    codes = tuple(DTYPE_CODE[t] for t in (spec.x_dtype, spec.z_dtype, spec.y_dtype, spec.w_dtype))
    place = _place(device)
    wanted_bits = sum(1 << i for i, vector in enumerate(vectors) if vector is not None)
    size = _native.norm_backward_workspace(place[0], place[1], rows, cols, spec.kind, *codes, wanted_bits)
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    _launch(
        _native.norm_backward,
        device,
        rows,
        cols,
        spec.kind,
        spec.zero_centered,
        *codes,
        *_matrix(dy),
        *_matrix(dy2),
        *_matrix(dz),
        *_matrix(z),
        _vector(mean),
        _vector(rstd),
        _vector(row_scale),
        *_dropout(seed, spec.p),
        *spec.rows,
        _vector(weight),
        _vector(weight2),
        *_matrix(dx),
        *_matrix(dresidual),
        *(_vector(vector) for vector in vectors),
        _vector(workspace),
    )
    return NormGrads(dx, dresidual, *vectors)


def reduce_shards(parts: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """See :func:`.reference.reduce_shards`."""
    count, rows, cols = parts.shape
    if out is None:
        out = torch.empty((rows, cols), dtype=parts.dtype, device=parts.device)
    _launch(
        _native.reduce_shards,
        parts.device,
        rows,
        cols,
        count,
        DTYPE_CODE[parts.dtype],
        DTYPE_CODE[parts.dtype if bias is None else bias.dtype],
        parts.data_ptr(),
        parts.stride(0),
        parts.stride(1),
        _vector(bias),
        *_matrix(out),
    )
    return out
