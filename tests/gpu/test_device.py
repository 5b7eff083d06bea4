"""On a CUDA device: the fused norm of every backend there is, against the CPU and the fp64 oracle; `make gpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import why_not

from ..oracle import assert_within_budget

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
BACKENDS = ["native", "triton"]
SHAPES = [(1, 1, 1), (3, 7, 127), (2, 33, 1000), (4, 64, 4096), (2, 3, 12289), (1, 2, 65536)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = why_not(request.param, DEVICE)
    if reason is not None:
        pytest.skip(reason)
    return str(request.param)


def case(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The same numbers on any device."""
    generator = torch.Generator().manual_seed(sum(shape))
    made = {"x": shape, "residual": shape, "weight": shape[-1:], "x_bias": shape[-1:]}
    made |= {"bias": shape[-1:]} if kind == "layer" else {}
    return {
        name: torch.randn(size, generator=generator).to(device, dtype).requires_grad_() for name, size in made.items()
    }


def run(kind: str, tensors: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """y, the second y if there is one, z and every gradient."""
    norm = sp.dropout_add_layer_norm if kind == "layer" else sp.dropout_add_rms_norm
    outs = norm(**tensors, prenorm=True, seed=77, **options)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outs]
    got = torch.autograd.grad(outs, list(tensors.values()), grads)
    named = dict(zip(("y", "y2", "z") if len(outs) == 3 else ("y", "z"), outs, strict=True))
    return {**named, **{"d" + name: g for name, g in zip(tensors, got, strict=True)}}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_error_is_within_budget(backend: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    ours = run(kind, case(kind, shape, dtype, DEVICE), p=p, backend=backend)
    reference = run(kind, case(kind, shape, dtype, DEVICE), p=p, backend="reference")
    doubles = {k: v.detach().double().requires_grad_() for k, v in case(kind, shape, dtype, DEVICE).items()}
    oracle = run(kind, doubles, p=p, backend="reference")
    magnitude = max(float(v.detach().abs().max()) for v in doubles.values())
    for name in ours:
        assert_within_budget(ours[name], reference[name], oracle[name], name, magnitude)


def feature(name: str, x: Tensor) -> tuple[dict[str, Tensor | None], dict[str, Any]]:
    """Tensors that differ from those of :func:`case`, and options, of one feature."""

    def vector(i: int) -> Tensor:
        generator = torch.Generator().manual_seed(i)
        return torch.randn(x.shape[-1], generator=generator).to(x.device, x.dtype).requires_grad_()

    features: dict[str, tuple[dict[str, Tensor | None], dict[str, Any]]] = {
        "zero-centred": ({}, {"zero_centered_weight": True}),
        "row scale": ({}, {"row_scale": torch.linspace(0, 2, x.shape[0] * x.shape[1]).view(x.shape[:2]).to(x.device)}),
        "two norms": ({"weight2": vector(1)}, {}),
        "no weight": ({"weight": None, "bias": None}, {}),
        "no residual": ({"residual": None, "x_bias": None}, {}),
        "sequence first": ({}, {"seq_dim": 0}),
        "residual in fp32": ({"residual": x.detach().to(torch.promote_types(x.dtype, torch.float32))}, {}),
    }
    return features[name]


FEATURES = ["zero-centred", "row scale", "two norms", "no weight", "no residual", "sequence first", "residual in fp32"]


@pytest.mark.parametrize("shape", [(3, 7, 127), (4, 33, 4096)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("name", FEATURES)
def test_every_feature_is_within_budget(backend: str, name: str, kind: str, shape: tuple[int, ...]) -> None:
    results = []
    for dtype, by in ((torch.bfloat16, backend), (torch.bfloat16, "reference"), (torch.float64, "reference")):
        rounded = case(kind, shape, torch.bfloat16, DEVICE)
        tensors, options = feature(name, rounded["x"])
        merged = {k: v for k, v in {**rounded, **tensors}.items() if v is not None and (k != "bias" or kind == "layer")}
        if dtype == torch.float64:
            merged = {k: v.double() for k, v in merged.items()}
        merged = {k: v.detach().requires_grad_() for k, v in merged.items()}
        absent = {k: None for k in ("residual", "weight") if k not in merged}
        results.append((run(kind, merged, p=0.2, backend=by, **absent, **options), merged))
    (ours, _), (reference, _), (oracle, doubles) = results
    magnitude = 2 * max(float(v.detach().abs().max()) for v in doubles.values())
    assert ours.keys() == oracle.keys()
    for what in ours:
        assert_within_budget(ours[what], reference[what], oracle[what], what, magnitude)


@pytest.mark.parametrize("cols", [77, 4096])
def test_float8_outputs(backend: str, cols: int) -> None:
    """At most one step of e4m3 beside the reference, where a tie is broken the other way."""
    x, w, scale = torch.randn(9, cols, device=DEVICE), torch.ones(cols, device=DEVICE), torch.tensor(8.0, device=DEVICE)
    with torch.no_grad():
        y, expected = (
            sp.dropout_add_rms_norm(x, x, w, p=0.1, seed=2, y_scale=scale, backend=by) for by in (backend, "reference")
        )
    assert y.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.13, atol=2**-8)
    assert (y.float() != expected.float()).float().mean() < 0.01


def test_no_rows(backend: str) -> None:
    x, w = torch.empty(2, 0, 64, device=DEVICE, requires_grad=True), torch.ones(64, device=DEVICE, requires_grad=True)
    y = sp.dropout_add_rms_norm(x, x, w, p=0.1, backend=backend)
    dx, dw = torch.autograd.grad(y.sum(), (x, w))
    assert y.shape == dx.shape == x.shape and not dw.any()


def test_masks_are_those_of_the_cpu(backend: str) -> None:
    for shape in SHAPES:
        x = torch.ones(shape)
        expected = sp.dropout_add(x, p=0.3, seed=2**40 + 3)
        got = sp.dropout_add(x.to(DEVICE), p=0.3, seed=2**40 + 3, backend=backend)
        assert torch.equal(got.cpu(), expected)


def test_two_runs_give_the_same_bits(backend: str) -> None:
    first, second = (
        run("layer", case("layer", (4, 257, 1111), torch.bfloat16, DEVICE), p=0.1, backend=backend) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


VIEWS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t[..., :256],
    lambda t: t[::2, :, 3:259],
    lambda t: t[..., ::2][..., :256],
    lambda t: t[:, :1, :256].expand(6, 9, 256),
]


@pytest.mark.parametrize("view", range(len(VIEWS)))
def test_strides_and_streams(backend: str, view: int) -> None:
    """Forward and backward run on the caller's stream: behind what that stream still has to do."""
    base, w = torch.randn(6, 9, 520, device=DEVICE), torch.randn(256, device=DEVICE, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    results = []
    with torch.cuda.stream(stream):
        for by in (backend, "reference"):
            torch.cuda._sleep(5_000_000)  # cycles: whoever is on another stream reads what is not there yet
            x = VIEWS[view](base * 1).requires_grad_()
            y = sp.dropout_add_rms_norm(x, x, w, p=0.2, seed=4, backend=by)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, w))))
    torch.cuda.current_stream().wait_stream(stream)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def captured(step: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """``step`` in a graph, run once before as PyTorch asks for; the tensors that a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


def test_graph_replay_draws_new_masks(backend: str) -> None:
    x = torch.ones(64, 512, device=DEVICE)
    graph, (z,) = captured(lambda: (sp.dropout_add(x, p=0.5, backend=backend),))
    graph.replay()
    first = z.clone()
    graph.replay()
    assert not torch.equal(first, z)


def test_graph_replay_on_new_inputs(backend: str) -> None:
    """The bits of eager, forward and backward."""
    x, w = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((64, 520), (520,)))
    seed = torch.tensor(3, device=DEVICE)

    def step() -> tuple[Tensor, ...]:
        y, z = sp.dropout_add_layer_norm(x, x, w, p=0.2, seed=seed, prenorm=True, backend=backend)
        return (y, z, *torch.autograd.grad((y, z), (x, w), (y.detach(), z.detach())))

    graph, replayed = captured(step)
    for number in (4, 5):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            seed.fill_(number)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@pytest.mark.alone
def test_offsets_beyond_2_to_the_31(backend: str) -> None:
    """The last rows of a tensor of 2**31 elements and more, forward and backward, are those of a small one."""
    rows, cols, last = 2**31 // 8192 + 3, 8192, 2
    if torch.cuda.mem_get_info()[0] < 8 * rows * cols * 2:
        pytest.skip("not enough free device memory")
    from seqpar_kernels.kernels import NormGiven, NormKind, NormSpec, NormTensors, NormWants, RowMap, select

    kernels, seed = select(backend, DEVICE), torch.tensor(9, device=DEVICE)
    x, dz = (torch.zeros(rows, cols, device=DEVICE, dtype=torch.bfloat16) for _ in "xd")
    for t in (x, dz):
        t[-last:] = torch.randn(last, cols, device=DEVICE).bfloat16()
    bf16 = [torch.bfloat16] * 4
    whole = NormSpec(NormKind.RMS, False, 1e-5, 0.1, RowMap(rows, 0, 0), *bf16)

    def both(x: Tensor, dz: Tensor, spec: NormSpec) -> list[Tensor | None]:
        out = kernels.norm_forward(NormTensors(x, seed=seed), spec)
        given = NormGiven(dz, None, dz, out.z, out.statistics, seed=seed)
        grads = kernels.norm_backward(given, spec, NormWants(True, True))
        return [out.y, out.z, grads.dx, grads.dresidual]

    few = whole._replace(rows=RowMap(last, 0, rows - last))
    for ours, expected in zip(both(x, dz, whole), both(x[-last:].clone(), dz[-last:].clone(), few), strict=True):
        assert ours is not None and expected is not None
        torch.testing.assert_close(ours[-last:], expected, rtol=2**-7, atol=2**-7)
        assert not ours[:-last].any()
    parts = x.view(rows, 1, cols).expand(rows, 2, cols).transpose(0, 1)
    assert torch.equal(kernels.reduce_shards(parts, None)[-last:], (2 * x[-last:].float()).bfloat16())


def test_compile(backend: str) -> None:
    x = torch.randn(4, 9, 256, device=DEVICE, requires_grad=True)
    w = torch.randn(256, device=DEVICE, requires_grad=True)

    def fn(x: Tensor, w: Tensor) -> Tensor:
        return sp.dropout_add_rms_norm(x, x, w, p=0.2, seed=3, backend=backend)  # type: ignore[no-any-return]

    expected, got = fn(x, w), torch.compile(fn, fullgraph=True)(x, w)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), (x, w)), torch.autograd.grad(expected.sum(), (x, w)), rtol=1e-4, atol=1e-4
    )


def test_linear_without_a_group() -> None:
    x, w = torch.randn(2, 8, 64, device=DEVICE), torch.randn(32, 64, device=DEVICE)
    torch.testing.assert_close(sp.all_gather_linear(x, w, group=None), torch.nn.functional.linear(x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_weight_gradients_go_into_main_grad(dtype: torch.dtype, transposed: bool) -> None:
    """Exact products, float32 sums, in place; three micro-batches."""
    from seqpar_kernels.ops.main_grad import add_weight_gradient

    main_grad = torch.zeros(512, 256, device=DEVICE).t() if transposed else torch.zeros(256, 512, device=DEVICE)
    address, oracle = main_grad.data_ptr(), torch.zeros(256, 512, dtype=torch.float64, device=DEVICE)
    for i in range(3):
        dy, x = (torch.randn(1027, n, device=DEVICE).to(dtype) * 4.0**-i for n in (256, 512))
        add_weight_gradient(main_grad, dy, x)
        oracle += dy.double().t() @ x.double()
    assert main_grad.data_ptr() == address and main_grad.dtype == torch.float32
    assert (main_grad.double() - oracle).abs().max() <= 1e-5 * oracle.abs().max()
    w, x = torch.randn(32, 64, device=DEVICE, dtype=dtype, requires_grad=True), torch.randn(2, 8, 64, device=DEVICE)
    sent = torch.zeros(32, 64, device=DEVICE)
    sp.linear_reduce_scatter(x.to(dtype), w, group=None, main_grad=sent).sum().backward()
    torch.testing.assert_close(sent, x.to(dtype).float().sum((0, 1)).expand(32, 64), rtol=1e-5, atol=1e-4)
    assert w.grad is None


def test_reduction_in_rank_order(backend: str) -> None:
    from seqpar_kernels.kernels import select

    parts = torch.randn(5, 33, 129, device=DEVICE).bfloat16()
    bias = torch.randn(129, device=DEVICE).bfloat16()
    expected = parts[0].float()
    for part in parts[1:]:
        expected = expected + part.float()
    expected = (expected + bias.float()).bfloat16()
    assert torch.equal(select(backend, DEVICE).reduce_shards(parts, bias), expected)


@pytest.mark.parametrize("shape", [(4, 33, 1024), (8, 257, 4096), (9, 3, 12288), (2, 2, 65536), (3, 7, 1001)], ids=str)
@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_norm_of_a_sum_of_shards(backend: str, shape: tuple[int, int, int], dtypes: tuple[str, str], p: float) -> None:
    """The sum is that of the shards in their order, unrounded; z has its bits where nothing is dropped."""
    from seqpar_kernels.kernels import NormKind, NormSpec, NormTensors, RowMap, select

    dtype, z_dtype = (getattr(torch, name) for name in dtypes)
    _, rows, cols = shape
    parts = torch.randn(shape, device=DEVICE).to(dtype)
    x_bias, weight, bias = (torch.randn(cols, device=DEVICE).to(dtype) for _ in range(3))
    residual = torch.randn(rows, cols, device=DEVICE).to(z_dtype)
    seed = torch.tensor(5, device=DEVICE) if p else None
    spec = NormSpec(NormKind.LAYER, False, 1e-5, p, RowMap(rows, 0, 0), dtype, z_dtype, dtype, dtype)

    def run(module: Any, convert: Any = lambda t: t, spec: NormSpec = spec) -> Any:
        vectors = [convert(v) for v in (weight, bias)]
        x, first, stream = convert(parts), convert(x_bias), convert(residual)
        return module.norm_forward(NormTensors(x, stream, *vectors, x_bias=first, seed=seed), spec, stacked=True)

    reference = select("reference", DEVICE)
    ours, plain = run(select(backend, DEVICE)), run(reference)
    wide = torch.float64
    oracle = run(reference, Tensor.double, spec._replace(x_dtype=wide, z_dtype=wide, y_dtype=wide, w_dtype=wide))
    for name in ("y", "z", "statistics"):
        assert_within_budget(getattr(ours, name), getattr(plain, name), getattr(oracle, name), name, float(shape[0]))
    if not p:
        none = spec._replace(kind=NormKind.NONE, z_dtype=dtype)
        z = select(backend, DEVICE).norm_forward(NormTensors(parts), none, stacked=True).z
        assert torch.equal(z, select(backend, DEVICE).reduce_shards(parts, None))
