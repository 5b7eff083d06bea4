"""csrc/cuda on the CPU: every template instance against the fp64 oracle, without a GPU."""

import dataclasses
import functools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from seqpar_kernels.kernels import RowMap, native, reference
from seqpar_kernels.kernels.spec import NormGiven, NormKind, NormSpec, NormStores, NormTensors, NormWants

from ..gpu import sanitize
from . import cuda_host
from .cuda_host import HostCuda, PoisonedTorch

pytestmark = pytest.mark.skipif(cuda_host.CXX is None, reason="no C++ compiler to build the host-run CUDA kernels with")

F64, F32, BF16, F16, E4M3 = torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
EPS = {F64: 2.0**-52, F32: 2.0**-23}


@pytest.fixture(scope="session")
def host_cuda() -> HostCuda:
    return HostCuda()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors here are small: waking a pool of threads for each would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def on_host_cuda(host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends native.py's CPU tensors to the host-run CUDA kernels."""
    host_cuda.configure()
    monkeypatch.setattr(native, "_native", host_cuda.module)
    for name in ("_prepared", "_forward_of", "_backward_of"):  # afresh: what is kept belongs to one module
        monkeypatch.setattr(native, name, functools.lru_cache(getattr(native, name).__wrapped__))
    monkeypatch.setattr(native, "_place", lambda device: (True, native.sm_margin, 0))


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int = 5
    cols: int = 256
    kind: NormKind = NormKind.LAYER
    x: torch.dtype = BF16
    z: torch.dtype = BF16
    w: torch.dtype = BF16
    y: torch.dtype | None = None  # None: like x
    p: float | None = 0.1  # None: no seed at all
    x_bias: bool = True
    row_scale: bool = False
    residual: bool = True
    weight: bool = True
    bias: bool = True
    zero_centered: bool = False
    two_norms: bool = False
    shards: int = 1
    dz: bool = True
    dy: bool = True
    stride: int = 0  # input rows are this much longer than cols
    padding: int = 0  # output rows likewise
    shift: int = 0  # elements by which inputs and outputs miss their alignment
    row_map: RowMap | None = None
    multiprocessors: int = 4
    major: int = 9
    reverse: bool = False

    def __str__(self) -> str:
        plain = Case()
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("rows", "cols") or value != getattr(plain, field.name):
                text = str(value).removeprefix("torch.") if not isinstance(value, NormKind) else value.name.lower()
                shown.append(f"{field.name}={text}")
        return " ".join(shown).replace("RowMap", "")


def _random(case: Case, generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Values of order 1 about 0.5; matrices with the case's row stride and shift."""
    if len(shape) == 1:
        return (torch.randn(shape, generator=generator) * 0.5 + 0.5).to(dtype)
    rows, cols = shape
    stride = cols + case.stride
    memory = torch.full((rows * stride + case.shift,), float("nan")).to(dtype)
    matrix = memory[case.shift :].as_strided((rows, cols), (stride, 1))
    matrix.copy_(torch.randn(shape, generator=generator) + 0.5)
    return matrix


def _close(name: str, ours: Tensor | None, same_dtype: Tensor | None, oracle: Tensor | None) -> None:
    """At most twice the error of the same-dtype reference, or a rounding or two where that happens to be tiny."""
    assert (ours is None) == (oracle is None), name
    if ours is None or same_dtype is None or oracle is None or ours.numel() == 0:
        return
    assert ours.dtype == same_dtype.dtype, name
    wrong = ours.isnan() != oracle.to(ours.dtype).isnan()
    assert not wrong.any(), f"{name}: NaN or unwritten at {wrong.nonzero()[:4].tolist()}"
    good = ~ours.isnan()
    error, allowed = (ours.double() - oracle)[good].abs(), (same_dtype.double() - oracle)[good].abs()
    # fp64 has no more precise oracle: there the reference is another way to round, not an error to compare with
    roundings = 64 if ours.dtype == F64 else 1
    slack = roundings * EPS[F64 if ours.dtype == F64 else F32] * oracle[good].abs().max()
    limit = 2 * allowed.max() + 4 * slack
    assert (error <= limit).all(), f"{name}: error {error.max():.3g}, reference {allowed.max():.3g}"


def _up(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.double()


def run(case: Case, host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """Forward and backward of one case against the oracle; returns every output."""
    host_cuda.configure(case.multiprocessors, case.major, case.reverse)
    poisoned = PoisonedTorch(case.padding, case.shift)
    monkeypatch.setattr(native, "torch", poisoned)
    generator = torch.Generator().manual_seed(case.rows * 131 + case.cols)
    rows, cols = case.rows, case.cols

    def matrix(dtype: torch.dtype) -> Tensor:
        return _random(case, generator, rows, cols, dtype=dtype)

    def vector(wanted: bool) -> Tensor | None:
        return _random(case, generator, cols, dtype=case.w) if wanted else None

    normed = case.kind != NormKind.NONE
    y_dtype = case.y or case.x
    row_map = case.row_map or RowMap(max(rows, 1), 0, 0)
    spec = NormSpec(case.kind, case.zero_centered, 1e-5, case.p or 0.0, row_map, case.x, case.z, y_dtype, case.w)
    wide = spec._replace(x_dtype=F64, z_dtype=F64, y_dtype=F64, w_dtype=F64)
    seed = None if case.p is None else torch.tensor(-0x123456789ABCDEF)
    x, residual = matrix(case.x), matrix(case.z) if case.residual else None
    if case.shards > 1:
        x = _random(case, generator, case.shards * rows, cols, dtype=case.x).unflatten(0, (case.shards, rows))
    row_scale = torch.rand(rows, generator=generator) + 0.5 if case.row_scale else None
    x_bias = vector(case.x_bias)
    weight, bias = vector(case.weight and normed), vector(case.bias and normed)
    weight2, bias2 = vector(case.weight and case.two_norms), vector(case.bias and case.two_norms)
    y_scale = torch.tensor(3.5) if y_dtype == E4M3 else None
    tensors = NormTensors(x, residual, weight, bias, weight2, bias2, x_bias, row_scale, y_scale, seed)
    stores, stacked = NormStores(two_norms=case.two_norms and normed), case.shards > 1

    ours = native.norm_forward(tensors, spec, stores, stacked=stacked)
    same = reference.norm_forward(tensors, spec, stores, stacked=stacked)
    oracle = reference.norm_forward(NormTensors(*map(_up, tensors[:-1]), seed), wide, stores, stacked=stacked)
    for name, a, b, c in zip(ours._fields, ours, same, oracle, strict=True):
        _close(name, a, b, c)
    results = list(ours)
    if y_dtype == E4M3:  # no gradient comes back in that
        poisoned.check()
        return results

    dy = matrix(y_dtype) if case.dy and normed else None
    dy2 = matrix(y_dtype) if case.two_norms and normed else None
    dz = matrix(case.z) if case.dz or (dy is None and dy2 is None) else None
    z = ours.z if normed else None
    wants = NormWants(True, True, normed, normed and case.bias, case.two_norms, case.two_norms, case.x_bias)
    given = NormGiven(dy, dy2, dz, z, ours.statistics, row_scale, weight, weight2, seed)
    grads = native.norm_backward(given, spec, wants)
    same_grads = reference.norm_backward(given, spec, wants)
    oracle_grads = reference.norm_backward(NormGiven(*map(_up, given[:-1]), seed), wide, wants)
    for name, a, b, c in zip(grads._fields, grads, same_grads, oracle_grads, strict=True):
        _close(name, a, b, c)
    poisoned.check()
    return results + list(grads)


# Every dtype with columns that end inside a warp, a CTA, a cluster; major 8 has no clusters.
DTYPES = [(F32, F32, F32), (BF16, BF16, BF16), (BF16, BF16, F32), (BF16, F32, BF16), (BF16, F32, F32)]
DTYPES += [(F16, F16, F16), (F16, F16, F32), (F16, F32, F16), (F16, F32, F32)]
SIZES = [(37, 8), (9, 136), (21, 768), (3, 1032), (11, 2560), (2, 4096), (9, 4096), (5, 8192)]
SYSTEMATIC = [
    Case(
        rows, cols, kind=NormKind(1 + (i + j) % 2), x=x, z=z, w=w, p=p, bias=(i + j) % 2 == 0, major=8 + (i + j) % 3 % 2
    )
    for i, (x, z, w) in enumerate(DTYPES)
    for j, (rows, cols) in enumerate(SIZES)
    for p in (None, 0.1)
]
# Odd columns, strides and alignments, fp64, mixtures: the generic kernels
GENERIC = [
    Case(7, 1),
    Case(4, 7, x=F64, z=F64, w=F64),
    Case(6, 129, x=F64, z=F64, w=F64, two_norms=True, row_scale=True, row_map=RowMap(2, 9, 2**33)),
    Case(3, 2056, x=F64, z=F64, w=F64, kind=NormKind.RMS, bias=False),
    Case(5, 1001, x=F32, z=F32, w=F32),
    Case(5, 515, x=F16, z=F32, w=F16, kind=NormKind.RMS, two_norms=True),
    Case(5, 256, shift=1),
    Case(5, 256, stride=3),
    Case(5, 256, padding=5),
    Case(5, 264, x=F32, z=BF16, w=F32),
    Case(5, 264, x=BF16, z=BF16, w=F16),
    Case(5, 264, x=BF16, y=F32),
    Case(2, 40008, major=8),
    Case(2, 60000, major=8, x=F32, z=F32, w=F32),
    Case(3, 33, kind=NormKind.NONE, p=0.5),
    Case(3, 33, kind=NormKind.NONE, p=None, row_scale=True),
    Case(200, 3, p=0.25),
]
# Rows spread over several CTAs, and the longest
CLUSTERS = [
    Case(3, 12288, reverse=True),
    Case(5, 16384, kind=NormKind.RMS, bias=False),
    Case(3, 24576, x=F32, z=F32, w=F32),
    Case(3, 32768, x=F16, z=F32, w=F32, two_norms=True),
    Case(2, 65536),
    Case(1, 131072),
    Case(1, 131072, x=F32, z=F32, w=F32, p=None, x_bias=False),
]
SPECIAL = [
    Case(6, 128, p=0.0),
    Case(6, 128, p=1.0),
    Case(6, 128, p=1e-6),
    Case(6, 96, p=0.5, x=F32, z=F32, w=F32, stride=8, padding=4),
    Case(6, 96, p=0.5, stride=8, padding=16),
    Case(12, 64, row_map=RowMap(3, 1 << 34, (1 << 33) + 5)),
    Case(12, 64, x=F32, z=F32, w=F32, row_map=RowMap(5, (1 << 40) + 3, 1 << 41)),
    Case(12, 24, row_map=RowMap(1, 7, -3 + (1 << 32))),
    Case(12, 24, x=BF16, z=F32, row_map=RowMap(1 << 40, 7, 11)),
    Case(7, 512, kind=NormKind.NONE),
    Case(7, 512, kind=NormKind.NONE, x=F32, z=F32, w=F32, residual=False, x_bias=False),
    Case(7, 512, y=E4M3),
    Case(7, 512, y=E4M3, x=F32, z=F32, w=F32, two_norms=True),
    Case(7, 512, y=E4M3, x=BF16, z=F32, w=F32, kind=NormKind.RMS),
    Case(7, 77, y=E4M3, x=F16, z=F16, w=F16),
    Case(7, 512, weight=False, bias=False, residual=False, x_bias=False, p=None, dz=False),
    Case(7, 512, dy=False),
    Case(7, 512, dy=False, two_norms=True),
]


# Sums of shards: every instance, and what the generic kernel takes
SUMS = [
    Case(rows, cols, kind=NormKind((i + j) % 3), x=x, z=z, w=w, p=p, shards=2 + (i + 3 * j) % 8, major=8 + i % 2)
    for i, (x, z, w) in enumerate(DTYPES)
    for j, (rows, cols) in enumerate([(37, 8), (9, 136), (3, 1032), (9, 4096)])
    for p in (None, 0.1)
]
SUMS += [
    Case(2, 12288, shards=4, major=8),
    Case(2, 12288, shards=8, p=None, x=F16, z=F16, w=F32, major=8),
    Case(2, 12288, shards=3, x=F16, z=F16, w=F16, major=8, row_scale=True),
    Case(2, 12288, shards=3, p=None, major=8),
    Case(3, 32768, shards=5, reverse=True, kind=NormKind.RMS, bias=False),
    Case(3, 16384, shards=2, x=F32, z=F32, w=F32),
    Case(5, 1001, shards=3, x=F32, z=F32, w=F32),
    Case(5, 256, shards=4, shift=1),
    Case(5, 256, shards=4, stride=3, padding=5, residual=False, p=None),
    Case(4, 7, shards=9, x=F64, z=F64, w=F64, row_map=RowMap(2, 9, 2**33)),
    Case(2, 40008, shards=2, major=8, two_norms=True),
    Case(6, 512, shards=4, x_bias=False, residual=False, weight=False, bias=False, p=None, stride=8, padding=16),
    Case(7, 512, shards=4, y=E4M3),
]


def _random_cases(count: int) -> list[Case]:
    """Options mixed at random, the same each time."""
    choose = random.Random(7)

    def flag() -> bool:
        return choose.random() < 0.5

    cases = []
    for _ in range(count):
        x, z, w = choose.choice(DTYPES)
        cases.append(
            Case(
                choose.choice([1, 3, 6, 17, 40]),
                choose.choice([8, 24, 64, 100, 200, 264, 520, 1000, 1536, 2048]),
                choose.choice([NormKind.LAYER, NormKind.RMS, NormKind.RMS, NormKind.LAYER, NormKind.NONE]),
                x, z, w,
                p=choose.choice([None, 0.1, 0.5]),
                x_bias=flag(), row_scale=flag(), residual=flag(), weight=flag() or flag(), bias=flag(),
                zero_centered=flag(), two_norms=choose.random() < 0.3, dz=flag(),
                stride=choose.choice([0, 0, 8, 16]), padding=choose.choice([0, 0, 8]),
                row_map=choose.choice([None, RowMap(2, 50, 1 << 33)]),
                multiprocessors=choose.choice([1, 2, 5]), major=choose.choice([8, 9]), reverse=flag(),
            )
        )  # fmt: skip
    return cases


RANDOM = _random_cases(120)


@pytest.mark.parametrize("case", SYSTEMATIC + GENERIC + CLUSTERS + SPECIAL + SUMS + RANDOM, ids=str)
def test_against_oracle(case: Case, host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    run(case, host_cuda, monkeypatch)


def test_every_instance_has_run(host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases above leave no kernel out (repeated here for those that were deselected)."""
    built = host_cuda.kernels_built()
    if not built.keys() <= host_cuda.kernels_run():
        for case in SYSTEMATIC + GENERIC + CLUSTERS + SPECIAL + SUMS + RANDOM:
            run(case, host_cuda, monkeypatch)
        for shape, dtype, extra in SHARDS:
            _run_shards(shape, dtype, extra, host_cuda, monkeypatch)
    assert len(built) > 30
    ran = host_cuda.kernels_run()
    assert not [name for address, name in built.items() if address not in ran]


def test_the_sanitizer_sees_every_instance(host_cuda: HostCuda) -> None:
    """What ``make gpu`` runs under compute-sanitizer leaves no kernel out; some are for devices without clusters."""
    host_cuda.forget_kernels()
    # Not 108: the kernels ask for a device once, and the shim numbers devices modulo 4. No other test has a third one.
    host_cuda.configure(multiprocessors=107, major=8)
    sanitize.run(torch.device("cpu"))
    ran = host_cuda.kernels_run()
    assert not [name for address, name in host_cuda.kernels_built().items() if address not in ran]


@pytest.mark.parametrize(
    "case",
    [
        Case(9, 512, two_norms=True),
        Case(6, 2048, x=F32, z=F32, w=F32, row_scale=True),
        Case(5, 16384, z=F32),
        Case(11, 100, x=F16, z=F16, w=F32),
        Case(11, 40, x=F64, z=F64, w=F64),
    ],
    ids=str,
)
def test_same_bits_in_any_order(case: Case, host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the same, and the same when the threads of a block take turns the other way: no barrier is missing."""
    first = run(case, host_cuda, monkeypatch)
    for other in (case, dataclasses.replace(case, reverse=True)):
        for a, b in zip(first, run(other, host_cuda, monkeypatch), strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


ROW_MAPS = [
    RowMap(1 << 62, 0, 0),
    RowMap(5, 17, 3),
    RowMap(4, (1 << 33) + 1, (1 << 32) - 2),
    RowMap(1, 1 << 45, 1 << 50),
    RowMap(7, 0, -1),
    RowMap(0, 1, 0),
]


@pytest.mark.parametrize("row_map", ROW_MAPS, ids=str)
@pytest.mark.parametrize("cols", [8, 72, 77, 1032, 4096, 16384])
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (F16, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("seed", [0, -1])
def test_mask_is_the_specification(
    seed: int, dtypes: tuple[torch.dtype, torch.dtype], cols: int, row_map: RowMap, host_cuda: HostCuda
) -> None:
    """Forward and backward keep exactly what reference.dropout_mask keeps."""
    x_dtype, z_dtype = dtypes
    rows, p, at = 13, 0.3, torch.tensor(seed)
    mask = reference.dropout_mask(rows, cols, p, at, row_map)
    spec = NormSpec(NormKind.NONE, False, 0.0, p, row_map, x_dtype, z_dtype, x_dtype, x_dtype)
    ones = torch.ones(rows, cols, dtype=x_dtype)
    z = native.norm_forward(NormTensors(ones, seed=at), spec).z
    assert z is not None and torch.equal(z != 0, mask)
    dx = native.norm_backward(NormGiven(dz=ones.to(z_dtype), seed=at), spec, NormWants()).dx
    assert dx is not None and torch.equal(dx != 0, mask)


@pytest.mark.parametrize("cols", [64, 63])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_no_rows(dtype: torch.dtype, cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched for the rows; gradients of vectors are sums of nothing."""
    monkeypatch.setattr(native, "torch", PoisonedTorch())
    spec = NormSpec(NormKind.LAYER, False, 1e-5, 0.1, RowMap(0, 0, 0), dtype, dtype, dtype, dtype)
    empty, seed, weight = torch.empty(0, cols, dtype=dtype), torch.tensor(3), torch.ones(cols, dtype=dtype)
    out = native.norm_forward(NormTensors(empty, empty, weight, weight, x_bias=weight, seed=seed), spec)
    assert out.y is not None and out.y.shape == (0, cols)
    wants = NormWants(True, True, True, True, True, True, True)
    kept = {"z": empty, "statistics": out.statistics, "weight": weight, "seed": seed}
    grads = native.norm_backward(NormGiven(dy=empty, **kept), spec, wants)
    for grad in grads[2:]:
        assert grad is not None and torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("margin", [0, 1, 3, 100])
def test_sm_margin(margin: int, host_cuda: HostCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer multiprocessors, down to one, and the same results."""
    monkeypatch.setattr(native, "sm_margin", margin)
    run(Case(23, 1024), host_cuda, monkeypatch)
    run(Case(23, 1001), host_cuda, monkeypatch)


# (count, rows, cols), dtype, (part padding in rows, row padding, bias dtype, shift)
SHARDS = [
    ((1, 3, 64), BF16, (0, 0, None, 0)),
    ((8, 5, 256), BF16, (0, 0, BF16, 0)),
    ((9, 5, 264), BF16, (1, 8, F32, 0)),
    ((17, 4, 100), F32, (2, 0, F32, 0)),
    ((3, 4, 101), F32, (0, 3, F32, 0)),
    ((3, 4, 101), F16, (0, 0, F32, 0)),
    ((4, 300, 24), F16, (0, 8, F16, 0)),
    ((4, 3, 64), BF16, (0, 0, None, 1)),
    ((5, 7, 33), F64, (0, 0, F64, 0)),
    ((2, 0, 16), BF16, (0, 0, None, 0)),
    ((2, 1, 70000), BF16, (0, 0, None, 0)),
]


def _run_shards(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    extra: tuple[int, int, torch.dtype | None, int],
    host_cuda: HostCuda,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host_cuda.configure(2)
    count, rows, cols = shape
    part_padding, row_padding, bias_dtype, shift = extra
    generator = torch.Generator().manual_seed(count)
    stride = cols + row_padding
    memory = torch.full((count * (rows + part_padding) * stride + shift,), float("nan")).to(dtype)
    parts = memory[shift:].as_strided(shape, ((rows + part_padding) * stride, stride, 1))
    parts.copy_(torch.randn(shape, generator=generator))
    bias = None if bias_dtype is None else torch.randn(cols, generator=generator).to(bias_dtype)
    poisoned = PoisonedTorch(row_padding, shift)
    out = poisoned.matrix(rows, cols, dtype)
    native.reduce_shards(parts, bias, out)
    poisoned.check()
    expected = reference.reduce_shards(parts, bias)
    assert torch.equal(out, expected)  # the order is specified, so are the bits


@pytest.mark.parametrize(("cols", "x"), [(512, BF16), (512, F32), (77, F16), (7, F64)])
def test_float8_saturates_and_keeps_nan(cols: int, x: torch.dtype) -> None:
    z = torch.randn(5, cols, generator=torch.Generator().manual_seed(cols)).to(x)
    z[1, 3] = float("nan")
    spec = NormSpec(NormKind.RMS, False, 1e-5, 0.0, RowMap(5, 0, 0), x, x, E4M3, x)
    for scale in (1.0, 200.0, 1e4):
        given, no_z = NormTensors(z, y_scale=torch.tensor(scale)), NormStores(store_z=False)
        ours, expected = (m.norm_forward(given, spec, no_z).y.float() for m in (native, reference))
        torch.testing.assert_close(ours, expected, rtol=2**-3, atol=0, equal_nan=True)  # a step apart at most
        assert ours[1].isnan().all() and (ours.nan_to_num().abs() <= 448).all()
    assert (ours[0].abs() == 448).any()


@pytest.mark.parametrize(("shape", "dtype", "extra"), SHARDS, ids=str)
def test_reduce_shards(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    extra: tuple[int, int, torch.dtype | None, int],
    host_cuda: HostCuda,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _run_shards(shape, dtype, extra, host_cuda, monkeypatch)


def test_bad_arguments() -> None:
    """What no kernel can do is an error, not a wrong result."""
    spec = NormSpec(NormKind.LAYER, False, 1e-5, 0.0, RowMap(4, 0, 0), F32, F64, F32, F32)
    x = torch.ones(4, 8)
    with pytest.raises(ValueError, match="no kernel for this combination of dtypes"):
        native.norm_forward(NormTensors(x), spec)
    with pytest.raises(ValueError, match="do not fit together"):
        native.reduce_shards(torch.ones(0, 4, 8), None, x)


def test_archs(host_cuda: HostCuda) -> None:
    assert host_cuda.module.has_cuda and host_cuda.module.cuda_archs() == "host"
