"""Cases of the Triton kernels against the reference, run under TRITON_INTERPRET=1 in a process of their own.

``python triton_norm_cases.py`` runs all of them and prints one JSON line a case: name, and the failure or null. The
names are importable without Triton.
"""

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from interpreted import main

from seqpar_kernels.kernels import NormOutputs, RowMap, reference
from seqpar_kernels.kernels.spec import NormGiven, NormKind, NormSpec, NormStores, NormTensors, NormWants, dropout_scale

F32, BF16, F16, F64, E4M3 = torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn
LAYER, RMS, NONE = NormKind.LAYER, NormKind.RMS, NormKind.NONE
UNSHARDED = RowMap(1 << 40, 0, 0)
FAR = RowMap(3, 2**33 + 7, 2**34 + 5)
VECTORS = ("dweight", "dbias", "dweight2", "dbias2", "dx_bias")
CASES: dict[str, Callable[[], None]] = {}
Inputs = dict[str, Any]  # tensors, or None for what is not there


class Problem(NamedTuple):
    """One call. The terms named in ``on`` are there, the others None."""

    rows: int
    cols: int
    kind: NormKind = LAYER
    dtype: torch.dtype = F32
    z_dtype: torch.dtype | None = None
    w_dtype: torch.dtype | None = None
    on: str = "residual weight bias"
    p: float | None = None
    row_map: RowMap = UNSHARDED
    zero_centered: bool = False
    store_z: bool = True
    shards: int = 1  # x is the sum of so many
    pad: int = 0  # unused columns between rows of every input
    tile: tuple[int, int] | None = None  # rows and columns of a chunked tile, in place of the table's
    y_dtype: torch.dtype | None = None


def _poisoned(*size: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
    """Stands in for torch.empty, so that whatever a kernel leaves unwritten shows."""
    size = size[0] if isinstance(size[0], tuple) else size
    return torch.full(size, float("nan"), dtype=F32, device=device).to(dtype)


def _inputs(problem: Problem) -> Inputs:
    """x, residual, dy, dy2, dz: [rows, cols] with padded strides; vectors [cols]; row_scale [rows]; in their dtypes."""
    generator = torch.Generator().manual_seed(problem.rows * 131071 + problem.cols)
    z_dtype, w_dtype = problem.z_dtype or problem.dtype, problem.w_dtype or problem.dtype
    on = problem.on.split()

    def matrix(dtype: torch.dtype) -> Tensor:
        whole = torch.randn(problem.rows, problem.cols + problem.pad, generator=generator, dtype=F64)
        return whole.to(dtype)[:, : problem.cols]

    def vector(name: str, mean: float = 0.0) -> Tensor | None:
        drawn = (torch.randn(problem.cols, generator=generator, dtype=F64) + mean).to(w_dtype)
        return drawn if name in on else None

    x = matrix(problem.dtype)
    if problem.shards > 1:
        x = torch.stack([x, *(matrix(problem.dtype) for _ in range(problem.shards - 1))])
    return {
        "x": x,
        "residual": matrix(z_dtype) if "residual" in on else None,
        "dy": matrix(problem.dtype) if "no_dy" not in on else None,
        "dy2": matrix(problem.dtype) if "norm2" in on else None,
        "dz": matrix(z_dtype) if "dz" in on or problem.kind == NONE else None,
        "x_bias": vector("x_bias"),
        "weight": vector("weight", 1.0),
        "bias": vector("bias"),
        "weight2": vector("weight2", 1.0),
        "bias2": vector("bias2"),
        "row_scale": torch.rand(problem.rows, generator=generator) if "row_scale" in on else None,
        "seed": None if problem.p is None else torch.tensor(-(2**62) + 12345 * problem.cols),
    }


def _plain(problem: Problem, inputs: Inputs, keep: Tensor | None, dtype: torch.dtype | None) -> dict:
    """The same in plain torch and autograd: in fp64 the oracle, in the inputs' dtypes (None) what one would write."""
    leaves = {
        name: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_(t.is_floating_point())
        for name, t in inputs.items()
        if name not in ("seed", "dy", "dy2", "dz")
    }
    z_dtype = dtype or problem.z_dtype or problem.dtype
    z = leaves["x"] if problem.shards == 1 else leaves["x"].sum(0)
    if leaves["x_bias"] is not None:
        z = z + leaves["x_bias"]
    if keep is not None:
        z = torch.where(keep, z * dropout_scale(problem.p or 0.0), torch.zeros_like(z))
    if leaves["row_scale"] is not None:
        z = z * leaves["row_scale"].to(z.dtype)[:, None]
    z = z.to(z_dtype)
    if leaves["residual"] is not None:
        z = z + leaves["residual"]
    results: dict[str, Any] = {"z": z}
    roots, grads = [], []
    if problem.kind != NONE:
        compute = dtype or problem.dtype
        centred = z - z.mean(-1, keepdim=True) if problem.kind == LAYER else z
        xhat = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)).to(compute)
        for suffix in ("", "2") if "norm2" in problem.on else ("",):
            weight, bias = leaves["weight" + suffix], leaves["bias" + suffix]
            y = xhat
            if weight is not None:
                y = y * (1 + weight if problem.zero_centered else weight).to(compute)
            if bias is not None:
                y = y + bias.to(compute)
            results["y" + suffix] = y
            if inputs["dy" + suffix] is not None:
                roots.append(y)
                grads.append(inputs["dy" + suffix].to(y.dtype))
    if inputs["dz"] is not None:
        roots.append(z)
        grads.append(inputs["dz"].to(z.dtype))
    torch.autograd.backward(roots, grads)
    for name, leaf in leaves.items():
        if leaf is not None and leaf.grad is not None:
            results["d" + name] = leaf.grad if name != "x" or problem.shards == 1 else leaf.grad[0]
    return {name: t.detach() for name, t in results.items()}


def _within(name: str, ours: Tensor, plain: Tensor, oracle: Tensor) -> None:
    """At most twice plain torch's error in the same dtypes, plus the rounding of our own store."""
    assert ours.shape == oracle.shape, f"{name}: {tuple(ours.shape)}, expected {tuple(oracle.shape)}"
    if not oracle.numel():
        return
    error = (ours.double() - oracle).abs()
    assert not error.isnan().any(), f"{name}: {int(error.isnan().sum())} of {error.numel()} elements never written"
    allowed = 2 * (plain.double() - oracle).abs().max() + torch.finfo(ours.dtype).eps * oracle.abs()
    if oracle.dtype == ours.dtype:  # the oracle rounds as we do
        allowed = allowed + 64 * torch.finfo(F64).eps * oracle.abs().max()
    worst = (error - allowed).max()
    assert worst <= 0, f"{name}: error {error.max():.3e}, allowed {allowed.max():.3e}"


def _forward(problem: Problem, inputs: Inputs, y_scale: Tensor | None = None) -> tuple[NormSpec, NormOutputs]:
    from seqpar_kernels.kernels import triton_norm

    given = {name: inputs[name] for name in NormTensors._fields if name != "y_scale"}
    z_dtype, w_dtype = problem.z_dtype or problem.dtype, problem.w_dtype or problem.dtype
    spec = NormSpec(
        problem.kind, problem.zero_centered, 1e-5, problem.p or 0.0, problem.row_map,
        problem.dtype, z_dtype, problem.y_dtype or problem.dtype, w_dtype,
    )  # fmt: skip
    stores = NormStores(problem.store_z, "norm2" in problem.on.split())
    tensors = NormTensors(**given, y_scale=y_scale)
    outputs = triton_norm.norm_forward(tensors, spec, stores, stacked=problem.shards > 1)
    return spec, outputs


def _backward(spec: NormSpec, inputs: Inputs, outputs: NormOutputs) -> dict[str, Tensor]:
    from seqpar_kernels.kernels import triton_norm

    wants = NormWants(True, inputs["residual"] is not None, *(inputs[name[1:]] is not None for name in VECTORS))
    given = {name: inputs[name] for name in NormGiven._fields if name not in ("z", "statistics")}
    z = None if spec.kind == NONE else outputs.z
    tensors = NormGiven(**given, z=z, statistics=outputs.statistics)
    grads, again = (triton_norm.norm_backward(tensors, spec, wants) for _ in range(2))
    for name, first, second in zip(grads._fields, grads, again, strict=True):
        assert first is None or torch.equal(first.nan_to_num(), second.nan_to_num()), f"{name} differs from run to run"
    return {name: t for name, t in grads._asdict().items() if t is not None}


def check(problem: Problem, inputs: Inputs | None = None) -> None:
    """Forward and backward against autograd in fp64, dropping what the reference drops."""
    from seqpar_kernels.kernels import triton_norm
    from seqpar_kernels.kernels.triton_config import Tile

    if problem.tile is not None:
        tile = Tile(*problem.tile, warps=4, held=False, programs=1)
        triton_norm.forward_tile = triton_norm.backward_tile = lambda *_: tile
    inputs = inputs or _inputs(problem)
    if problem.kind == NONE:
        inputs["dy"] = None
    spec, outputs = _forward(problem, inputs)
    ours = {name: t for name, t in outputs._asdict().items() if t is not None and name != "statistics"}
    ours |= _backward(spec, inputs, outputs)
    keep = None
    if inputs["seed"] is not None and problem.rows:
        keep = reference.dropout_mask(problem.rows, problem.cols, spec.p, inputs["seed"], spec.rows)
    plain, oracle = _plain(problem, inputs, keep, None), _plain(problem, inputs, keep, F64)
    for name, t in ours.items():
        expected = oracle.get(name)
        if expected is None:  # a vector no gradient reaches
            assert name in VECTORS and not t.any(), name
        else:
            _within(name, t, plain[name], expected)


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


ALL = "x_bias row_scale residual weight bias weight2 bias2 norm2 dz"
for _name, _problem in {
    "layer f32": Problem(13, 67),
    "layer bf16": Problem(9, 131, dtype=BF16, p=0.1),
    "layer f16, prime sizes, padded rows": Problem(
        31, 257, dtype=F16, p=0.5, pad=3, on="residual weight bias x_bias dz"
    ),
    "layer f32, everything": Problem(7, 67, on=ALL, p=0.3, row_map=FAR, pad=5, zero_centered=True),
    "layer bf16, everything, residual in f32": Problem(11, 96, dtype=BF16, z_dtype=F32, on=ALL, p=0.25, row_map=FAR),
    "layer f64, everything": Problem(5, 43, dtype=F64, on=ALL, p=0.1, row_map=FAR),
    "layer bf16, weights in f32": Problem(8, 64, dtype=BF16, w_dtype=F32, zero_centered=True),
    "layer, no weight and no bias": Problem(3, 50, on="residual"),
    "layer, bias alone": Problem(3, 50, on="bias", pad=14),
    "layer, one column": Problem(5, 1, on="residual bias dz"),
    "layer, one row": Problem(1, 2053, p=0.2),
    "rms bf16": Problem(17, 72, RMS, BF16, on="residual weight", p=0.1, pad=8),
    "rms f32, zero-centred": Problem(6, 129, RMS, zero_centered=True, on="residual weight dz x_bias", p=0.7),
    "rms f16, residual in f32, two norms": Problem(6, 80, RMS, F16, F32, on="residual weight norm2 weight2 dz", p=0.1),
    "rms f64": Problem(4, 33, RMS, F64, on="residual weight", p=0.5),
    "second norm alone has a gradient": Problem(6, 40, on="residual weight bias norm2 weight2 bias2 no_dy"),
    "no norm f32": Problem(10, 45, NONE, on="x_bias row_scale residual", p=0.4, row_map=FAR, pad=1),
    "no norm bf16": Problem(10, 48, NONE, BF16, F32, on="residual", p=0.4),
    "chunked layer f32, everything": Problem(7, 67, on=ALL, p=0.3, row_map=FAR, pad=5, tile=(2, 16)),
    "chunked layer bf16, everything": Problem(11, 100, dtype=BF16, z_dtype=F32, on=ALL, p=0.25, tile=(4, 32)),
    "chunked layer f64": Problem(5, 96, dtype=F64, on="residual weight bias x_bias", p=0.5, tile=(1, 32)),
    "chunked rms f16": Problem(9, 97, RMS, F16, on="residual weight x_bias dz", p=0.1, tile=(2, 32)),
    "chunked no norm": Problem(10, 45, NONE, on="x_bias row_scale residual", p=0.4, tile=(2, 16)),
    "chunked second norm alone": Problem(6, 40, on="residual weight bias norm2 weight2 bias2 no_dy", tile=(4, 16)),
    "sum of shards, layer f32, everything": Problem(7, 67, on=ALL, p=0.3, row_map=FAR, shards=3),
    "sum of shards, rms bf16": Problem(9, 72, RMS, BF16, F32, on="residual weight x_bias dz", p=0.1, shards=8),
    "sum of shards, no norm f16": Problem(5, 45, NONE, F16, on="x_bias", shards=4),
    "sum of shards, layer f64": Problem(4, 33, dtype=F64, on="residual weight bias", p=0.5, shards=2),
    "chunked sum of shards, layer bf16": Problem(6, 100, dtype=BF16, on=ALL, p=0.25, shards=4, tile=(2, 32)),
    "no rows, layer": Problem(0, 24, on=ALL, p=0.1),
    "no rows, no norm": Problem(0, 24, NONE, on="x_bias residual", p=0.1),
}.items():
    CASES[_name] = lambda problem=_problem: check(problem)


@case("masks are the reference's, bit for bit")
def _masks() -> None:
    from seqpar_kernels.kernels import triton_norm
    from seqpar_kernels.kernels.triton_config import Tile

    table = triton_norm.forward_tile
    seeds = (0, 1, -1, 2**63 - 1, 0x9E3779B97F4A7C15 - 2**64)
    maps = (UNSHARDED, FAR, RowMap(1, 2**40, 2**62), RowMap(5, 12, 3), RowMap(0, 9, 2))
    for i, (seed, row_map) in enumerate(zip(seeds, maps, strict=True)):
        for p in (0.0, 1e-5, 0.1, 0.5, 0.99999, 1.0):
            rows, cols = 7, (1, 8, 61, 129, 200)[i]
            problem = Problem(rows, cols, NONE, (F32, BF16, F16, F64, F32)[i], on="", p=p, row_map=row_map)
            inputs = dict.fromkeys(_inputs(problem)) | {"x": torch.ones(rows, cols, dtype=problem.dtype)}
            inputs["seed"] = torch.tensor(seed)
            keep = reference.dropout_mask(rows, cols, p, inputs["seed"], row_map)
            for tile in (None, Tile(4, 64, 4, held=False)) if p in (0.1, 1.0) else (None,):
                triton_norm.forward_tile = table if tile is None else lambda *_, tile=tile: tile
                _, outputs = _forward(problem, inputs)
                assert torch.equal(outputs.z != 0, keep), f"seed {seed}, {row_map}, p {p}, tile {tile}"


@case("an element whose bits equal the threshold is kept")
def _boundary() -> None:
    seed = torch.tensor(77)
    words = reference.philox_words(seed, torch.tensor([0]), torch.tensor([0]))
    for column in range(8):
        bits = int(words[column // 2]) >> 16 * (column % 2) & 0xFFFF
        problem = Problem(2, 24, NONE, on="", p=bits / 65536)
        inputs = dict.fromkeys(_inputs(problem)) | {"x": torch.ones(2, 24), "seed": seed}
        _, outputs = _forward(problem, inputs)
        assert outputs.z[0, column] != 0, f"column {column}"


@case("at p = 1 infinities and NaN become exact zeros")
def _dropped() -> None:
    problem = Problem(2, 24, NONE, BF16, on="residual", p=1.0)
    inputs = _inputs(problem)
    inputs["x"][:, ::2], inputs["x"][:, 1::2] = float("inf"), float("nan")
    spec, outputs = _forward(problem, inputs)
    assert torch.equal(outputs.z, inputs["residual"])
    inputs["dy"], inputs["dz"] = None, inputs["x"]
    assert not _backward(spec, inputs, outputs)["dx"].any()


@case("statistics are those of z as stored, far from zero too")
def _statistics() -> None:
    for tile in (None, (2, 32)):
        problem = Problem(6, 250, dtype=F32, z_dtype=BF16, tile=tile)
        inputs = _inputs(problem)
        inputs["x"] += 1000
        from seqpar_kernels.kernels import triton_norm
        from seqpar_kernels.kernels.triton_config import Tile

        if tile is not None:
            triton_norm.forward_tile = lambda *_, tile=tile: Tile(*tile, warps=4, held=False)
        _, outputs = _forward(problem, inputs)
        assert outputs.z is not None
        z = outputs.z.double()
        plain = torch.native_layer_norm(z.float(), [250], None, None, 1e-5)
        mean, rstd = z.mean(-1), torch.rsqrt(z.var(-1, correction=0) + 1e-5)
        _within("mean", outputs.statistics[0], plain[1][:, 0], mean)
        _within("rstd", outputs.statistics[1], plain[2][:, 0], rstd)


@case("rows further apart than 32-bit offsets reach")
def _far_apart() -> None:
    problem = Problem(4, 40, dtype=F16, on="residual weight bias dz", p=0.1)
    inputs = _inputs(problem)
    stride = 2**30  # four rows of two-byte elements: 6 GiB of addresses, of which four pages are touched
    for name in ("x", "dy"):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, unnamed before Python 3.11
        pages = torch.frombuffer(mmap.mmap(-1, 2 * (3 * stride + 4096), flags=flags), dtype=F16)
        far = pages.as_strided((4, 40), (stride, 1))
        inputs[name] = far.copy_(inputs[name])
    check(problem, inputs)


@case("y alone, nothing stored beside it")
def _no_z() -> None:
    problem = Problem(5, 70, on="weight", store_z=False)
    inputs = _inputs(problem)
    _, outputs = _forward(problem, inputs)
    assert outputs.z is None and outputs.y2 is None
    oracle = _plain(problem, inputs, None, F64)
    _within("y", outputs.y, _plain(problem, inputs, None, None)["y"], oracle["y"])


@case("fp8 output, scaled")
def _fp8() -> None:
    for tile in (None, (2, 32)):
        problem = Problem(
            6, 77, dtype=BF16, z_dtype=F32, y_dtype=E4M3, tile=tile, on="residual weight bias norm2 weight2 bias2"
        )
        inputs = _inputs(problem)
        _, outputs = _forward(problem, inputs, y_scale=torch.tensor([3.5]))
        oracle = _plain(problem, inputs, None, F64)
        for name in ("y", "y2"):
            exact = getattr(outputs, name).double() - oracle[name] * 3.5
            # half a step of three mantissa bits; subnormals
            allowed = oracle[name].abs() * 3.5 * 2**-4 * 1.0001 + 2**-10
            assert (exact.abs() <= allowed).all(), f"{name}: {(exact.abs() - allowed).max()}"


@case("fp8 output saturates, NaN stays NaN")
def _fp8_range() -> None:
    from seqpar_kernels.kernels import triton_norm

    x = torch.randn(4, 48)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    spec = NormSpec(RMS, False, 1e-5, 0.0, RowMap(4, 0, 0), F32, F32, E4M3, F32)
    for scale in (1.0, 200.0, 1e4, 1e38):
        given = (NormTensors(x, y_scale=torch.tensor(scale)), spec, NormStores(store_z=False))
        ours, expected = (m.norm_forward(*given).y.float() for m in (triton_norm, reference))
        torch.testing.assert_close(ours, expected, rtol=2**-3, atol=0, equal_nan=True)  # a step apart at most
        assert ours[1].isnan().all() and ours[2, 7].isnan() and (ours.nan_to_num().abs() <= 448).all()
    assert (ours[0].abs() == 448).all()


@case("shards are summed in order, rounded once")
def _shards() -> None:
    from seqpar_kernels.kernels import triton_norm

    for count, rows, cols, dtype, bias, pad in (
        (1, 3, 17, F32, False, 0), (2, 5, 64, BF16, True, 8), (5, 7, 1031, F16, True, 1), (4, 2, 40, F64, True, 3),
        (8, 1, 2500, BF16, False, 0), (3, 0, 16, F32, True, 0), (2, 6, 1, F32, True, 2),
    ):  # fmt: skip
        parts = torch.randn(count, rows + 1, cols + pad).to(dtype)[:, :rows, :cols]
        vector = torch.randn(cols).to(F32 if dtype == BF16 else dtype) if bias else None
        expected = reference.reduce_shards(parts, vector)
        assert torch.equal(triton_norm.reduce_shards(parts, vector), expected), (count, rows, cols, dtype)
        out = _poisoned(rows, cols + pad, dtype=dtype)[:, :cols]
        assert triton_norm.reduce_shards(parts, vector, out) is out
        assert torch.equal(out, expected)


def _poisoning(run: Callable[[], None]) -> Callable[[], None]:
    """With torch.empty poisoned, and the tables put back afterwards."""

    def poisoned() -> None:
        from seqpar_kernels.kernels import triton_norm

        empty, tables = torch.empty, (triton_norm.forward_tile, triton_norm.backward_tile)
        try:
            torch.empty = _poisoned
            run()
        finally:
            torch.empty = empty
            triton_norm.forward_tile, triton_norm.backward_tile = tables

    return poisoned


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    from seqpar_kernels.kernels import triton_norm

    assert triton_norm.unavailable(torch.device("cpu")) is None
    main({name: _poisoning(run) for name, run in CASES.items()})
