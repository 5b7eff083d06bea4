"""The CPU kernels against the reference run in fp64, at every dtype, option and awkward size.

The error allowed is twice that of plain PyTorch operations in the same dtype, plus one rounding of the output.
"""

import contextlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seqpar_kernels.kernels import NormOutputs, RowMap, native, reference
from seqpar_kernels.kernels.spec import NormGiven, NormKind, NormSpec, NormStores, NormTensors, NormWants, dropout_scale

CPU = torch.device("cpu")
if native.unavailable(CPU) is not None:
    pytest.skip(str(native.unavailable(CPU)), allow_module_level=True)

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: (x, z, w) as they may be combined.
DTYPES = [
    (F32, F32, F32),
    (BF16, BF16, BF16),
    (BF16, BF16, F32),
    (BF16, F32, BF16),
    (BF16, F32, F32),
    (F16, F16, F16),
    (F16, F16, F32),
    (F16, F32, F16),
    (F16, F32, F32),
    (F64, F64, F64),
]
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 1000, 1024, 1031, 4097]
ALL_GRADS = NormWants(*[True] * 7)
EPS = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24, F64: 2.0**-53}  # half a unit in the last place of 1
TINY = {BF16: 0.0, F16: 2.0**-25, F32: 0.0, F64: 0.0}  # half of the smallest number, where sums can get that small
MAPS = {
    "unsharded": lambda rows: RowMap(max(rows, 1), 0, 0),
    "sequence": lambda rows: RowMap(3, 11, 5),
    "offset": lambda rows: RowMap(max(rows, 1), 0, (1 << 32) - 2),
    "far": lambda rows: RowMap(2, (1 << 33) + 7, (7 << 40) + 3),
    "repeated": lambda rows: RowMap(1, 0, 9),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Memory handed to a kernel is full of NaN: whatever is left unwritten shows."""
    for make in (torch.empty, torch.empty_like):

        def poisoned(*args, make=make, **options):
            t = make(*args, **options)
            return t.fill_(float("nan")) if t.is_floating_point() else t.fill_(-1)

        monkeypatch.setattr(torch, make.__name__, poisoned)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def matrix(rows, cols, dtype, generator, stride=None, mean=0.0):
    """[rows, cols] with the given row stride (None: contiguous, 0: one row expanded)."""
    if stride == 0:
        row = torch.randn(1, cols, generator=generator, dtype=F64) + mean
        return row.to(dtype).expand(rows, cols)
    wide = torch.full((rows, cols + (stride or 0)), float("nan"), dtype=dtype)
    wide[:, :cols] = (torch.randn(rows, cols, generator=generator, dtype=F64) + mean).to(dtype)
    return wide[:, :cols]


class Case:
    """Inputs of one call, forward and backward, with every option given by name."""

    def __init__(self, rows, cols, dtypes=(F32, F32, F32), kind=NormKind.LAYER, p=0.1, row_map="unsharded", **options):
        self.rows, self.cols, self.kind, self.p = rows, cols, kind, p
        self.x_dtype, self.z_dtype, self.w_dtype = dtypes
        have = {
            "residual": True,
            "x_bias": False,
            "row_scale": False,
            "weight": True,
            "bias": True,
            "two": False,
            "zero_centered": False,
        }
        have.update(stride=None, mean=0.0, dy=True, dy2=None, dz=True, dropout=True, shards=1)
        have.update(options)
        self.two = have["two"] and kind != NormKind.NONE
        generator = torch.Generator().manual_seed(rows * 131 + cols)
        self.spec = NormSpec(
            kind,
            have["zero_centered"],
            1e-5,
            p,
            MAPS[row_map](rows),
            self.x_dtype,
            self.z_dtype,
            self.x_dtype,
            self.w_dtype,
        )

        def full(dtype, wanted=True, mean=0.0, stride=have["stride"]):
            return matrix(rows, cols, dtype, generator, stride, mean) if wanted else None

        def vector(wanted):
            return torch.randn(cols, generator=generator, dtype=F64).to(self.w_dtype) if wanted else None

        self.x = full(self.x_dtype, mean=have["mean"])
        if have["shards"] > 1:
            wide = matrix(have["shards"] * rows, cols, self.x_dtype, generator, have["stride"], have["mean"])
            self.x = wide.unflatten(0, (have["shards"], rows))
        self.residual = full(self.z_dtype, have["residual"], mean=have["mean"])
        self.x_bias = vector(have["x_bias"])
        self.row_scale = torch.rand(rows, generator=generator) + 0.5 if have["row_scale"] else None
        self.weight, self.bias = (vector(have["weight"]), vector(have["bias"] and kind == NormKind.LAYER))
        self.weight2, self.bias2 = (vector(self.two and have["weight"]), vector(self.two and have["bias"]))
        self.seed = torch.tensor(-0x123456789ABCDEF) if have["dropout"] else None
        normed = kind != NormKind.NONE
        self.dy = full(self.x_dtype, have["dy"] and normed)
        self.dy2 = full(self.x_dtype, (self.two if have["dy2"] is None else have["dy2"]) and normed)
        self.dz = full(self.z_dtype, have["dz"] or not (have["dy"] and normed))

    def forward(self, backend, cast=None):
        def to(t):
            return t if cast is None or t is None else t.to(cast)

        names = NormTensors._fields[:-2]  # the last are y_scale and seed
        tensors = NormTensors(*(to(getattr(self, name)) for name in names), seed=self.seed)
        stores = NormStores(two_norms=self.two)
        return backend.norm_forward(tensors, self.cast_spec(cast), stores, stacked=self.x.dim() == 3)

    def cast_spec(self, cast):
        if cast is None:
            return self.spec
        return self.spec._replace(x_dtype=cast, z_dtype=cast, y_dtype=cast, w_dtype=cast)

    def backward(self, backend, outputs, cast=None, wants=ALL_GRADS):
        """Both see the z that was stored and the statistics that belong to it."""

        def to(t):
            return t if cast is None or t is None else t.to(cast)

        normed = self.kind != NormKind.NONE
        z = outputs.z if normed else None
        tensors = (self.dy, self.dy2, self.dz, z, outputs.statistics, self.row_scale, self.weight, self.weight2)
        return backend.norm_backward(NormGiven(*map(to, tensors), self.seed), self.cast_spec(cast), wants)

    # The same in plain operations of the input dtype, the mask being given: what an eager model computes.

    def plain_forward(self):
        x = self.x if self.x.dim() == 2 else reference.reduce_shards(self.x, None)
        x = x if self.x_bias is None else x + self.x_bias.to(self.x.dtype)
        if self.seed is not None:
            keep = reference.dropout_mask(self.rows, self.cols, self.p, self.seed, self.spec.rows)
            x = torch.where(keep, x * dropout_scale(self.p), 0)
        if self.row_scale is not None:
            x = x * self.row_scale.to(x.dtype)[:, None]
        z = x.to(self.z_dtype) if self.residual is None else x.to(self.z_dtype) + self.residual
        return (z, self.plain_norm(z, self.weight, self.bias), self.plain_norm(z, self.weight2, self.bias2))

    def plain_norm(self, z, weight, bias):
        if self.kind == NormKind.NONE:
            return None
        z = z.to(self.x_dtype)
        if weight is not None:
            weight = weight.to(z.dtype) + (1 if self.spec.zero_centered else 0)
        if self.kind == NormKind.RMS:
            y = F.rms_norm(z, (self.cols,), weight, self.spec.eps)
            return y if bias is None else y + bias.to(y.dtype)
        return F.layer_norm(z, (self.cols,), weight, None if bias is None else bias.to(z.dtype), self.spec.eps)

    def statistics_of(self, z):
        """The outputs of a forward that stored ``z``."""
        z = z.double()
        mean = [z.mean(-1)] if self.kind == NormKind.LAYER else []
        centred = z - mean[0][:, None] if mean else z
        rstd = torch.rsqrt(centred.square().mean(-1) + self.spec.eps)
        return NormOutputs(None, None, z, torch.stack([*mean, rstd]))

    @property
    def spread(self):
        """The largest number that enters: what rounding errors of cancelling sums are measured by."""
        tensors = (self.x, self.x_bias, self.residual, self.dy, self.dy2, self.dz, self.weight, self.weight2)
        return max((float(t.abs().max()) for t in tensors if t is not None and t.numel()), default=0.0)

    def plain_backward(self, outputs):
        z = outputs.z.to(self.x_dtype).detach().requires_grad_()
        grads = {}
        total = torch.zeros(self.rows, self.cols, dtype=self.z_dtype) if self.dz is None else self.dz
        for dy, weight, suffix in ((self.dy, self.weight, ""), (self.dy2, self.weight2, "2")):
            if dy is None:
                continue
            one = torch.ones(self.cols, dtype=z.dtype)
            scale = one if weight is None else weight.to(z.dtype) + (1 if self.spec.zero_centered else 0)
            scale = scale.detach().requires_grad_()
            shift = torch.zeros_like(one).requires_grad_()
            if self.kind == NormKind.RMS:
                y = F.rms_norm(z, (self.cols,), scale, self.spec.eps) + shift
            else:
                y = F.layer_norm(z, (self.cols,), scale, shift, self.spec.eps)
            dnorm, grads["dweight" + suffix], grads["dbias" + suffix] = torch.autograd.grad(y, (z, scale, shift), dy)
            total = total + dnorm
        dx = total.to(self.x_dtype)
        if self.row_scale is not None:
            dx = dx * self.row_scale.to(dx.dtype)[:, None]
        if self.seed is not None:
            keep = reference.dropout_mask(self.rows, self.cols, self.p, self.seed, self.spec.rows)
            dx = torch.where(keep, dx * dropout_scale(self.p), 0)
        grads.update(dresidual=total, dx=dx, dx_bias=dx.sum(0))
        return grads


def within(name, got, oracle, plain_error, dtype, magnitude=0.0):
    """Largest and root-mean-square error: at most twice those of plain operations, plus one rounding.

    Beside that rounding stands the accumulation's own, of the largest number met on the way (``magnitude``): where few
    elements are, plain operations may be exact by chance.
    """
    assert got.shape == oracle.shape and got.dtype == dtype, name
    if oracle.numel() == 0:
        return
    got, oracle = got.double(), oracle.double()
    assert not got.isnan().any(), f"{name}: elements left unwritten or NaN"
    error = (got - oracle).abs()
    arithmetic = 4 * EPS[F64 if dtype == F64 else F32] * max(float(oracle.abs().max()), magnitude)
    floor = EPS[dtype] * oracle.abs() + TINY[dtype] + arithmetic
    plain_error = torch.zeros_like(oracle) if plain_error is None else plain_error
    budget = 2 * plain_error.abs().max()
    assert (error <= floor + budget).all(), f"{name}: error {error.max():.3g}, allowed {budget:.3g} + {floor.max():.3g}"
    rms, allowed = (t.square().mean().sqrt() for t in (error, 2 * plain_error.abs() + floor))
    assert rms <= allowed, f"{name}: rms error {rms:.3g}, allowed {allowed:.3g}"


def check(case):
    ours, oracle = case.forward(native), case.forward(reference, cast=F64)
    plain_z, plain_y, plain_y2 = case.plain_forward()
    magnitude = 4 * case.spread
    within("z", ours.z, oracle.z, plain_z.double() - oracle.z, case.z_dtype, magnitude)
    stats = F64 if case.x_dtype == F64 else F32
    if case.kind != NormKind.NONE:
        within("y", ours.y, oracle.y, plain_y.double() - oracle.y, case.x_dtype)
        kept = case.statistics_of(ours.z)
        torch.testing.assert_close(ours.statistics[-1].double(), kept.statistics[-1], rtol=4e-6, atol=0)
        assert ours.statistics.dtype == stats
    if case.kind == NormKind.LAYER:
        scale = oracle.z.abs().amax(-1)
        assert ((ours.statistics[0].double() - kept.statistics[0]).abs() <= 4 * EPS[stats] * scale).all()
    if case.two:
        within("y2", ours.y2, oracle.y2, plain_y2.double() - oracle.y2, case.x_dtype)
    check_backward(case, ours)


def check_backward(case, ours):
    """Ours and its oracle start from what the forward kept; plain operations take their statistics from the stored z,
    and are measured against an oracle that does the same."""
    grads, oracle = case.backward(native, ours), case.backward(reference, ours, F64)
    plain, plain_oracle = (case.plain_backward(ours), case.backward(reference, case.statistics_of(ours.z), F64))
    magnitude = float(ours.statistics[-1].abs().max()) * case.spread if case.kind != NormKind.NONE else 0.0
    for name, got, want, plain_want in zip(grads._fields, grads, oracle, plain_oracle):
        dtype = {"dx": case.x_dtype, "dresidual": case.z_dtype}.get(name, case.w_dtype)
        error = plain[name].double() - plain_want if name in plain else None
        within(name, got, want, error, dtype, 0.0 if name.startswith(("dweight", "dbias")) else magnitude)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("kind", [NormKind.LAYER, NormKind.RMS])
def test_sizes(dtypes, kind):
    for cols in SIZES:
        check(Case(5, cols, dtypes, kind, x_bias=True))


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_options(dtypes):
    """Every pair of options that the kernels tell apart, on a size with a tail."""
    options = list(
        itertools.product(
            [NormKind.LAYER, NormKind.RMS, NormKind.NONE], [True, False], [True, False], [True, False], [True, False]
        )
    )
    for i, (kind, residual, x_bias, row_scale, two) in enumerate(options):
        check(
            Case(
                9,
                75,
                dtypes,
                kind,
                p=[0.1, 0.5, 0.0, 1.0][i % 4],
                row_map=list(MAPS)[i % 5],
                residual=residual,
                x_bias=x_bias,
                row_scale=row_scale,
                two=two,
                weight=i % 3 != 0,
                bias=i % 5 != 0,
                zero_centered=i % 2 == 0,
                stride=[None, 5, 0][i % 3],
                dropout=i % 7 != 0,
                dz=i % 4 != 1,
            )
        )


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_sum_of_shards(dtypes):
    """x as a stack of partial results: the end of a reduce-scatter in the same pass."""
    for i, (shards, cols) in enumerate([(2, 1), (3, 33), (4, 75), (8, 257), (17, 1031)]):
        kind = NormKind((i + DTYPES.index(dtypes)) % 3)
        check(Case(5, cols, dtypes, kind, shards=shards, x_bias=i % 2 == 0, stride=[None, 5][i % 2], two=i == 3))
    check(Case(9, 130, dtypes, shards=4, dropout=False, residual=False, weight=False, bias=False))


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_sum_of_shards_is_the_reduction(dtype):
    """Taken in the order of the shards and rounded once: the bits of reduce_shards, where nothing else is added."""
    parts = torch.randn(7, 6, 1031, generator=torch.Generator().manual_seed(0)).to(dtype)
    spec = NormSpec(NormKind.NONE, False, 1e-5, 0.0, RowMap(6, 0, 0), dtype, dtype, dtype, dtype)
    z = native.norm_forward(NormTensors(parts), spec, stacked=True).z
    assert torch.equal(z, native.reduce_shards(parts, None))


def test_no_rows():
    """Nothing to read or write, and vector gradients that are sums of nothing."""
    for dtypes, kind in itertools.product(DTYPES, NormKind):
        case = Case(0, 40, dtypes, kind, x_bias=True, two=True)
        outputs = case.forward(native)
        assert outputs.z.shape == (0, 40)
        dx, dresidual, *vectors = case.backward(native, outputs)
        assert dx.shape == dresidual.shape == (0, 40)
        assert all(v.dtype == case.w_dtype and torch.equal(v, torch.zeros_like(v)) for v in vectors)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 66])
def test_rows(rows):
    for dtypes in ((F32, F32, F32), (BF16, BF16, BF16)):
        check(Case(rows, 40, dtypes, x_bias=True, two=True))
        check(Case(rows, 1030, dtypes, NormKind.RMS, stride=3))


def test_wide_rows():
    check(Case(2, 16384, (BF16, BF16, BF16), mean=3.0))
    check(Case(1, 131072, (BF16, F32, F32), NormKind.RMS))
    check(Case(2, 131075, (F32, F32, F32), mean=30.0, dropout=False))


def test_many_rows():
    """Several runs of rows, several threads, and a last run that is not full."""
    check(Case(1037, 257, (BF16, BF16, BF16), x_bias=True))
    check(Case(2053, 130, (F32, F32, F32), x_bias=True, two=True))


@pytest.mark.parametrize("kind", [NormKind.LAYER, NormKind.RMS])
def test_missing_gradients(kind):
    for dtypes in ((F32, F32, F32), (BF16, F32, F32)):
        check(Case(6, 70, dtypes, kind, dy=False))
        check(Case(6, 70, dtypes, kind, two=True, dy=False, dy2=True))
        check(Case(6, 70, dtypes, kind, two=True, dy=True, dy2=False))


def test_only_what_is_wanted():
    case = Case(9, 100, x_bias=True, two=True)
    outputs = case.forward(native)
    everything = case.backward(native, outputs)
    for field in NormWants._fields:
        got = case.backward(
            native, outputs, wants=NormWants(**{**dict.fromkeys(NormWants._fields, False), field: True})
        )
        assert torch.equal(getattr(got, field), getattr(everything, field))
        assert all(t is None for name, t in zip(got._fields, got) if name != field)


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("row_map", MAPS)
def test_mask_is_the_reference_mask(dtype, p, row_map):
    for rows, cols in ((7, 1), (7, 129), (5, 1000), (1, 4096)):
        spec = NormSpec(NormKind.NONE, False, 1e-5, p, MAPS[row_map](rows), dtype, dtype, dtype, dtype)
        for seed in (torch.tensor(0), torch.tensor(-1), torch.tensor(0x0123456789ABCDEF)):
            ones = torch.ones(rows, cols, dtype=dtype)
            keep = reference.dropout_mask(rows, cols, p, seed, spec.rows)
            z = native.norm_forward(NormTensors(ones, seed=seed), spec).z
            assert torch.equal(z != 0, keep)
            dx = native.norm_backward(NormGiven(dz=ones, seed=seed), spec, NormWants()).dx
            assert torch.equal(dx != 0, keep)


def test_dropped_is_zero_whatever_was_there():
    """Selected, not multiplied: infinities and NaN go too, forward and backward."""
    for dtype in (F32, BF16, F16, F64):
        spec = NormSpec(NormKind.NONE, False, 1e-5, 1.0, RowMap(4, 0, 0), dtype, dtype, dtype, dtype)
        bad = torch.tensor([float("inf"), float("nan"), -float("inf")], dtype=dtype).repeat(50).expand(4, 150)
        seed = torch.tensor(3)
        assert (native.norm_forward(NormTensors(bad, seed=seed), spec).z == 0).all()
        assert (native.norm_backward(NormGiven(dz=bad, seed=seed), spec, NormWants()).dx == 0).all()
        half = spec._replace(p=0.5)
        keep = reference.dropout_mask(4, 150, 0.5, seed, spec.rows)
        z = native.norm_forward(NormTensors(bad, seed=seed), half).z
        assert torch.equal(z == 0, ~keep)


def test_rounding_of_every_16_bit_value_and_its_neighbours():
    """Sums of two 16-bit numbers, which reduce_shards takes in fp32 and rounds once: ties, carries, subnormals, NaN."""
    bits = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
    for dtype in (BF16, F16):
        values = bits.view(dtype)
        for other in (values.flip(0), values.roll(1), values.roll(129), torch.zeros_like(values)):
            parts = torch.stack([values, other])[:, None, :]
            got, want = (native.reduce_shards(parts, None), reference.reduce_shards(parts, None))
            assert torch.equal(got.isnan(), want.isnan())
            assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))


def test_payload_of_a_nan_survives_rounding():
    nan = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(F32).repeat(40)[None]
    spec = NormSpec(NormKind.RMS, False, 1e-5, 0.0, RowMap(1, 0, 0), BF16, F32, BF16, F32)
    out = native.norm_forward(NormTensors(torch.zeros(1, 80, dtype=BF16), nan), spec)
    assert out.y.isnan().all() and out.z.isnan().all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_reduce_shards_is_exact(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 5), (2, 7, 33), (3, 1, 4097), (8, 16, 100), (4, 0, 8), (5, 3, 40000)]
    for (count, rows, cols), bias_dtype in itertools.product(shapes, {dtype, F32 if dtype != F64 else F64}):
        parts = torch.randn(count, rows, cols + 3, generator=generator).to(dtype)[:, :, :cols]
        bias = torch.randn(cols, generator=generator).to(bias_dtype)
        for b in (None, bias):
            assert torch.equal(native.reduce_shards(parts, b), reference.reduce_shards(parts, b))
        out = torch.full((rows, cols + 9), 5.0, dtype=dtype)
        native.reduce_shards(parts, bias, out[:, :cols])
        assert torch.equal(out[:, :cols], reference.reduce_shards(parts, bias)) and (out[:, cols:] == 5).all()


@contextlib.contextmanager
def stored_past_the_cache():
    """Results of any size."""
    bound = native._native.cpu_stream_beyond(0)
    assert bound >= 1 << 20  # of some last-level cache; and put back by whoever came before
    try:
        yield
    finally:
        assert native._native.cpu_stream_beyond(bound) == 0


def everything(case):
    outputs = case.forward(native)
    return [t for t in (*outputs, *case.backward(native, outputs)) if t is not None]


@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, BF16, BF16), (F64, F64, F64)])
def test_same_bits_for_any_number_of_threads_and_every_run(dtypes):
    case = Case(301, 999, dtypes, x_bias=True, two=True)
    torch.set_num_threads(1)
    want = everything(case)
    for threads in (1, 2, 3, 7, 2, 2):
        torch.set_num_threads(threads)
        for got, expected in zip(everything(case), want):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
def test_stores_past_the_cache_change_nothing(dtypes):
    """The way of large results: rows that begin on a vector's boundary, with a tail and without; rows that do not; more
    than one chunk of dropout; rows of several threads."""
    for rows, cols in ((7, 1), (7, 64), (7, 192), (8, 1031), (9, 304), (9, 672), (130, 336)):
        for kind in NormKind:
            case = Case(rows, cols, dtypes, kind, x_bias=True, two=kind != NormKind.NONE)
            want = everything(case)
            with stored_past_the_cache():
                got = everything(case)
            for ours, expected in zip(got, want, strict=True):
                assert torch.equal(ours, expected)


@pytest.mark.parametrize("way", [contextlib.nullcontext, stored_past_the_cache], ids=["plain", "past the cache"])
def test_outputs_end_where_they_should(monkeypatch, way):
    """Every output is a window of a larger buffer whose margins must keep their contents."""
    buffers = []

    def windowed(*size, dtype=F32, device=None):
        size = size[0] if isinstance(size[0], tuple) else size
        count = 1
        for n in size:
            count *= n
        buffer = torch.full((count + 128,), 77, dtype=dtype)
        buffers.append(buffer)
        return buffer[64 : 64 + count].view(size)

    for dtypes, cols in itertools.product(DTYPES, (1, 5, 31, 33, 67, 200, 304)):
        case = Case(3, cols, dtypes, x_bias=True, two=True)
        with monkeypatch.context() as patch, way():
            patch.setattr(torch, "empty", windowed)
            patch.setattr(torch, "empty_like", lambda like, dtype, memory_format: windowed(*like.shape, dtype=dtype))
            everything(case)
        assert all((b[:64] == 77).all() and (b[-64:] == 77).all() for b in buffers)
        buffers.clear()


def test_what_cannot_be_done_is_refused():
    x = torch.zeros(4, 8)
    spec = NormSpec(NormKind.LAYER, False, 1e-5, 0.0, RowMap(4, 0, 0), F32, F32, F32, F32)

    def forward(x=x, spec=spec):
        return native.norm_forward(NormTensors(x), spec)

    with pytest.raises(ValueError, match="y_scale: the CPU kernels store no float8"):
        forward(spec=spec._replace(y_dtype=torch.float8_e4m3fn))
    for wrong in ({"y_dtype": BF16}, {"z_dtype": BF16}, {"w_dtype": F64}):
        with pytest.raises(ValueError, match="dtypes"):
            forward(spec=spec._replace(**wrong))
    with pytest.raises(IndexError):
        native.norm_forward(NormTensors(torch.zeros(0, 4, 8)), spec, stacked=True)
    for stride in ((4, 1), (0, 1), (1, 4)):  # what is read may overlap, what is written may not
        with pytest.raises(ValueError, match="strides"):
            native.reduce_shards(torch.zeros(2, 4, 8), None, torch.zeros(40).as_strided((4, 8), stride))
    with pytest.raises(ValueError, match="sizes"):
        forward(torch.zeros(4, 0))


def test_layouts_that_kernels_do_not_read_are_copied():
    """Columns apart, rows unevenly apart, vectors with gaps, a stack of shards read across its columns."""
    spec = NormSpec(NormKind.LAYER, False, 1e-5, 0.0, RowMap(6, 0, 0), *[F64] * 4)
    torch.manual_seed(0)
    x, residual, dy = (torch.randn(4, 3, 2, 16, dtype=F64)[:3, :2, 0, ::2] for _ in range(3))
    vectors = [torch.randn(16, dtype=F64)[::2] for _ in range(5)]
    row_scale = torch.randn(12)[::2]

    def both(change):
        given = NormTensors(*(change(t) for t in (x, residual, *vectors, row_scale)))
        out = native.norm_forward(given, spec, NormStores(two_norms=True))
        saved = (dy, dy, dy, out.z, out.statistics, row_scale, given.weight, given.weight2)
        return *out, *native.norm_backward(NormGiven(*map(change, saved)), spec, NormWants(*[True] * 7))

    for got, expected in zip(both(lambda t: t), both(lambda t: t.contiguous()), strict=True):
        assert torch.equal(got, expected)
    parts = torch.randn(3, 8, 5).mT
    only_z = spec._replace(kind=NormKind.NONE, x_dtype=F32, z_dtype=F32, y_dtype=F32, w_dtype=F32)
    z = native.norm_forward(NormTensors(parts), only_z, stacked=True).z
    assert torch.equal(z, native.reduce_shards(parts.contiguous(), None))


def test_a_launch_on_another_device_reports_back(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert native._at(torch.device("cuda", 1), lambda *args: args)(1, 2) == (1, 2)


def test_philox_known_answers():
    """kat_vectors of Random123, through the reference that every mask is compared with."""
    ones = 0xFFFFFFFF
    answers = [(0, 0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8))]
    for seed, row, block, words in answers:
        got = reference.philox_words(torch.tensor(seed), torch.tensor(row), torch.tensor(block))
        assert tuple(int(word) & ones for word in got) == words


def python(code, **environment):
    root = str(Path(native.__file__).parents[2])
    path = os.pathsep.join([root, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False, text=True, timeout=120
    )


CHECK_THIS_ISA = """
import torch
import test_norm_cpu as t
torch.set_num_threads(2)
print(t.native._native.cpu_isa())
for i, dtypes in enumerate(t.DTYPES):
    for cols in (1, 17, 64, 127, 130, 1031):
        t.check(t.Case(6, cols, dtypes, list(t.NormKind)[(cols + i) % 2 + 1], x_bias=True, stride=2))
    t.check(t.Case(5, 200, dtypes, t.NormKind.RMS, p=0.5, two=True, row_map="far", zero_centered=True))
    t.check(t.Case(5, 45, dtypes, t.NormKind.NONE, p=1.0, row_scale=True))
    t.test_sum_of_shards(dtypes)
    t.test_reduce_shards_is_exact(dtypes[0])
    t.test_stores_past_the_cache_change_nothing(dtypes)
for dtype in (t.F32, t.BF16, t.F16, t.F64):
    t.test_mask_is_the_reference_mask(dtype, 0.1, "far")
    t.test_mask_is_the_reference_mask(dtype, 1.0, "unsharded")
t.test_rounding_of_every_16_bit_value_and_its_neighbours()
t.test_payload_of_a_nan_survives_rounding()
t.test_dropped_is_zero_whatever_was_there()
t.check(t.Case(301, 257, (t.BF16, t.BF16, t.BF16), x_bias=True))
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline", "neon"])
def test_every_instruction_set(isa):
    probe = python("from seqpar_kernels.kernels import native; print(native._native.cpu_isa())", SEQPAR_CPU_ISA=isa)
    if probe.stdout.strip() != isa:
        assert probe.stdout.startswith("invalid: SEQPAR_CPU_ISA=" + isa), probe.stderr
        pytest.skip(probe.stdout.strip())
    done = python(CHECK_THIS_ISA, SEQPAR_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == isa


def test_an_unknown_instruction_set_is_refused():
    done = python(
        "import torch\nfrom seqpar_kernels.kernels import native\nprint(native._native.cpu_isa())\n"
        "native.reduce_shards(torch.zeros(2, 3, 4), None)",
        SEQPAR_CPU_ISA="sse9",
    )
    assert done.stdout.startswith("invalid: SEQPAR_CPU_ISA=sse9 is not one of")
    assert done.returncode != 0 and "ValueError" in done.stderr


def test_threads_are_those_of_torch_and_survive_a_fork():
    assert native._native.cpu_threading() in ("openmp", "std::thread")
    done = python(
        "import os, torch\nfrom seqpar_kernels.kernels import native\ntorch.set_num_threads(2)\n"
        "parts = torch.ones(4, 512, 512)\nprint(native._native.cpu_threading(), flush=True)\n"
        "native.reduce_shards(parts, None)\npid = os.fork()\n"
        "got = native.reduce_shards(parts, None)\n"
        "assert all((row == 4).all() for row in got)\n"  # small enough for torch to stay on this thread
        "if pid == 0:\n    print(native._native.cpu_threading(), flush=True)\n    os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "std::thread"
