"""Cases of a norm, and the error that passes: of the CPU kernels, and of all others that are compared with fp64."""

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


def python(code, **environment):
    root = str(Path(native.__file__).parents[2])
    path = os.pathsep.join([root, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=False, text=True, timeout=120
    )
