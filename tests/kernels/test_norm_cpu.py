"""The CPU kernels against the reference run in fp64, at every dtype, option and awkward size.

The error allowed is twice that of plain PyTorch operations in the same dtype, plus one rounding of the output.
"""

import contextlib
import itertools

import pytest
import torch

from seqpar_kernels.kernels import RowMap, native, reference
from seqpar_kernels.kernels.spec import NormGiven, NormKind, NormSpec, NormStores, NormTensors, NormWants

from .norm_cases import BF16, DTYPES, F16, F32, F64, MAPS, SIZES, Case, check, poison, python, two_threads  # noqa: F401


def test_memory_is_poisoned():
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()
    assert torch.get_num_threads() == 2


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


CHECK_THIS_ISA = """
import torch
from tests.kernels import test_norm_cpu as t
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
