"""The compiled kernels (csrc/) on torch tensors: CPU and CUDA, chosen by where ``x`` lives.

Same functions, same arguments as :mod:`.reference`.
"""

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..caches import MOST
from . import NormGiven, NormGrads, NormKind, NormOutputs, NormSpec, NormStores, NormTensors, NormWants
from .spec import ONLY_Z, accumulation_dtype, as_matrix, as_parts, dropout_scale, dropout_threshold

_INTERFACE = 3


def _why_missing(error: ImportError) -> str:
    """An unbuilt source tree has no such file; else the file is there and does not load."""
    if importlib.util.find_spec("._native", __package__) is not None:
        return str(error)
    return (
        f"there is no {__package__}._native in {Path(__file__).parent}, sources that were not built for this Python: "
        "run pip install -e . in their folder, or pip install . and import the package from another folder"
    )


try:
    from . import _native
except ImportError as error:  # the reason is kept and shown where somebody needs the kernels
    _native = None  # type: ignore[assignment]
    build_error: str | None = _why_missing(error)
else:
    build_error = None
    if getattr(_native, "interface", None) != _INTERFACE:  # an editable install whose Python has moved on
        _native = None  # type: ignore[assignment]
        build_error = "it was built from older sources: build it again with pip install -e ."

DTYPE_CODE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.float8_e4m3fn: 4,
}

_CPU = torch.device("cpu")  # comparing costs less than the name of a device's type

#: CUDA multiprocessors the kernels leave free for communication running beside them.
sm_margin = 0


def unavailable(device: torch.device) -> str | None:
    """Why these kernels cannot run on ``device``; None when they can."""
    if _native is None:
        return f"the compiled extension is missing ({build_error})"
    if device.type == "cuda":
        return None if _native.has_cuda else "the extension was built without nvcc"
    if device.type == "cpu":
        isa: str = _native.cpu_isa()
        return isa.removeprefix("invalid: ") if isa.startswith("invalid") else None
    return f"there are compiled kernels for cpu and cuda, not for {device.type}"


def _place(device: torch.device) -> tuple[bool, int, int]:
    if device == _CPU:
        return False, torch.get_num_threads(), 0
    return True, sm_margin, torch._C._cuda_getCurrentRawStream(device.index)


def _at(device: torch.device, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``kernel`` where its tensors are: a launch goes to the current device."""
    if device == _CPU or device.index == torch._C._cuda_getDevice():
        return kernel

    def elsewhere(*args: object) -> Any:
        with torch.cuda.device(device):
            return kernel(*args)

    return elsewhere


@lru_cache(maxsize=MOST)
def _prepared(spec: NormSpec) -> Any:
    """``spec`` as the kernels take it."""
    codes = (DTYPE_CODE[t] for t in (spec.x_dtype, spec.z_dtype, spec.y_dtype, spec.w_dtype))
    dropout = (dropout_threshold(spec.p), dropout_scale(spec.p))
    return _native.NormSpec(int(spec.kind), spec.zero_centered, spec.eps, *codes, *dropout, *spec.rows)


class NormForward:
    """:func:`norm_forward` for tensors of one kind: what spec, shape and device decide is settled when it is made.

    Tensors may lie as they like: one that the kernels cannot read as it lies is copied.
    """

    def __init__(
        self,
        spec: NormSpec,
        shape: torch.Size,
        device: torch.device,
        stores: NormStores,
        *,
        stacked: bool = False,
    ):
        self._spec, self._device, self._on_cpu = _prepared(spec), device, device == _CPU
        self._stacked = stacked
        self._y_dtype, self._z_dtype = spec.y_dtype, spec.z_dtype
        self._store_y, self._store_z = spec.kind != NormKind.NONE, stores.store_z
        self._store_y2 = stores.two_norms and self._store_y
        self._statistics = 2 if spec.kind == NormKind.LAYER else 1
        self._wide = accumulation_dtype(spec.x_dtype)
        self._cols = shape[-1]
        self._rows = shape[stacked:-1].numel()

    def __call__(self, tensors: NormTensors) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """y, y2, z and statistics, as in :class:`.spec.NormOutputs`."""
        x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale, seed = tensors
        shards, shard_stride = 1, 0
        if self._stacked:
            x = x if x.stride(2) == 1 else x.contiguous()
            shards, shard_stride, x = x.shape[0], x.stride(0), x[0]
        device = self._device
        y = y2 = z = statistics = None
        if self._store_y:
            y = torch.empty_like(x, dtype=self._y_dtype, memory_format=torch.contiguous_format)
            statistics = torch.empty(self._statistics, self._rows, dtype=self._wide, device=device)
            if self._store_y2:
                y2 = torch.empty_like(x, dtype=self._y_dtype, memory_format=torch.contiguous_format)
        if self._store_z:
            z = torch.empty_like(x, dtype=self._z_dtype, memory_format=torch.contiguous_format)
        kernel = _native.norm_forward if self._on_cpu else _at(device, _native.norm_forward)
        is_cuda, threads, stream = _place(device)
        while not kernel(
            is_cuda,
            threads,
            stream,
            self._spec,
            self._rows,
            self._cols,
            x,
            shards,
            shard_stride,
            x_bias,
            row_scale,
            residual,
            weight,
            bias,
            weight2,
            bias2,
            seed,
            z,
            y,
            y2,
            y_scale,
            statistics,
        ):
            x = as_matrix(x)
            _, residual, weight, bias, weight2, bias2, x_bias, row_scale, _, _ = tensors._replace(x=x).readable()
        return y, y2, z, statistics


_forward_of = lru_cache(maxsize=MOST)(NormForward)


def norm_forward(
    tensors: NormTensors, spec: NormSpec, stores: NormStores = ONLY_Z, *, stacked: bool = False
) -> NormOutputs:
    """See :func:`.reference.norm_forward`."""
    run = _forward_of(spec, tensors.x.shape, tensors.x.device, stores, stacked=stacked)
    return NormOutputs(*run(tensors))


class NormBackward:
    """:func:`norm_backward` for tensors of one kind, as :class:`NormForward`."""

    def __init__(self, spec: NormSpec, shape: torch.Size, device: torch.device, wants: NormWants):
        self._spec, self._device, self._on_cpu = _prepared(spec), device, device == _CPU
        self._dx, self._dresidual, *self._vectors = wants
        self._x_dtype, self._z_dtype, self._w_dtype = spec.x_dtype, spec.z_dtype, spec.w_dtype
        self._rows, self._cols = shape[:-1].numel(), shape[-1]
        self._wanted = sum(1 << i for i, wanted in enumerate(self._vectors) if wanted)
        self._workspaces: dict[int, int] = {}  # bytes, by threads or margin

    def _workspace(self, is_cuda: bool, threads_or_margin: int) -> int:
        """Bytes for the partial sums of the vectors' gradients."""
        size = self._workspaces.get(threads_or_margin)
        if size is None:
            size = self._workspaces[threads_or_margin] = _native.norm_backward_workspace(
                is_cuda, threads_or_margin, self._spec, self._rows, self._cols, self._wanted
            )
        return size

    def __call__(self, tensors: NormGiven) -> list[Tensor | None]:
        """Gradients in the order of :class:`.spec.NormGrads`."""
        dy, dy2, dz, z, statistics, row_scale, weight, weight2, seed = tensors
        like = dz if dz is not None else dy if dy is not None else dy2
        assert like is not None
        device = self._device
        dx = dresidual = workspace = None
        if self._dx:
            dx = torch.empty_like(like, dtype=self._x_dtype, memory_format=torch.contiguous_format)
        if self._dresidual:
            dresidual = torch.empty_like(like, dtype=self._z_dtype, memory_format=torch.contiguous_format)
        vectors = [
            torch.empty(self._cols, dtype=self._w_dtype, device=device) if wanted else None for wanted in self._vectors
        ]
        kernel = _native.norm_backward if self._on_cpu else _at(device, _native.norm_backward)
        is_cuda, threads, stream = _place(device)
        size = self._workspace(is_cuda, threads)
        if size:
            workspace = torch.empty(size, dtype=torch.uint8, device=device)
        while not kernel(
            is_cuda,
            threads,
            stream,
            self._spec,
            self._rows,
            self._cols,
            dy,
            dy2,
            dz,
            z,
            statistics,
            row_scale,
            weight,
            weight2,
            seed,
            dx,
            dresidual,
            *vectors,
            workspace,
        ):
            dy, dy2, dz, z, statistics, row_scale, weight, weight2, _ = tensors.readable()
        return [dx, dresidual, *vectors]


_backward_of = lru_cache(maxsize=MOST)(NormBackward)


def norm_backward(tensors: NormGiven, spec: NormSpec, wants: NormWants) -> NormGrads:
    """See :func:`.reference.norm_backward`."""
    like = tensors.like()
    run = _backward_of(spec, like.shape, like.device, wants)
    return NormGrads(*run(tensors))


def reduce_shards(parts: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """See :func:`.reference.reduce_shards`."""
    count, rows, cols = parts.shape
    parts = as_parts(parts)
    if out is None:
        out = torch.empty((rows, cols), dtype=parts.dtype, device=parts.device)
    elif out.stride(1) != 1 and cols > 1:
        raise ValueError(f"out: expected columns side by side, got strides {out.stride()}")
    _at(parts.device, _native.reduce_shards)(
        *_place(parts.device),
        rows,
        cols,
        count,
        DTYPE_CODE[parts.dtype],
        DTYPE_CODE[parts.dtype if bias is None else bias.dtype],
        parts,
        parts.stride(0),
        parts.stride(1),
        bias,
        out,
    )
    return out
