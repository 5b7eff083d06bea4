"""The fused norm as users call it: numbers, gradients, masks, torch.compile, opcheck; on a GPU too with `make gpu`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import RowMap
from seqpar_kernels.kernels.reference import dropout_mask

from ..oracle import assert_within_budget

NORMS = {"layer": sp.dropout_add_layer_norm, "rms": sp.dropout_add_rms_norm}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # float64 has gradcheck
ON_CPU_ALONE = pytest.mark.parametrize("device", ["cpu"], indirect=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test makes its tensors."""
    found = torch.device(request.param)
    if found.type != "cpu":
        torch.set_default_device(found)
    yield found
    torch.set_default_device(None)


def plain(
    kind: str,
    x: Tensor,
    residual: Tensor | None,
    w: Tensor | None,
    b: Tensor | None,
    mask: Tensor,
    p: float,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch statements, in the dtype of the inputs."""
    z = x if x_bias is None else x + x_bias
    z = torch.where(mask, z / (1 - p) if p < 1 else z * 0, 0)
    z = z if residual is None else z + residual
    size = (z.shape[-1],)
    zn = z.to(x.dtype)
    y = F.layer_norm(zn, size, w, b) if kind == "layer" else F.rms_norm(zn, size, w, 1e-5)
    return y, z


def tensors(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    hidden = shape[-1]
    made: dict[str, Tensor | None] = {
        "x": torch.randn(shape),
        "residual": torch.randn(shape),
        "w": torch.randn(hidden),
        "b": torch.randn(hidden),
        "x_bias": torch.randn(hidden),
    }
    if kind == "rms":
        made["b"] = None
    return {k: None if v is None else v.to(dtype).requires_grad_() for k, v in made.items()}


def run(kind: str, t: dict[str, Tensor | None], **options: Any) -> tuple[Tensor, Tensor]:
    args = [t["x"], t["residual"], t["w"]] + ([t["b"]] if kind == "layer" else [])
    out: tuple[Tensor, Tensor] = NORMS[kind](*args, prenorm=True, x_bias=t["x_bias"], **options)
    return out


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 7, 127), (1, 1, 1), (11, 1000)])
@pytest.mark.parametrize("kind", NORMS)
def test_error_is_within_twice_that_of_pytorch(kind: str, shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    ours = tensors(shape, dtype, kind)
    rows = torch.Size(shape[:-1]).numel()
    mask = dropout_mask(rows, shape[-1], p, torch.tensor(3), RowMap(rows, 0, 0)).view(shape)
    reference = {k: None if v is None else v.detach().clone().requires_grad_() for k, v in ours.items()}
    oracle = {k: None if v is None else v.detach().double().requires_grad_() for k, v in ours.items()}
    grads = [torch.randn(shape).to(dtype) for _ in range(2)]
    results = []
    for t, out in (
        (ours, run(kind, ours, p=p, seed=3)),
        (reference, plain(kind, *(reference[k] for k in ("x", "residual", "w", "b")), mask, p, reference["x_bias"])),
        (oracle, plain(kind, *(oracle[k] for k in ("x", "residual", "w", "b")), mask, p, oracle["x_bias"])),
    ):
        leaves = [v for v in t.values() if v is not None]
        got = torch.autograd.grad(out, leaves, [g.to(o.dtype) for g, o in zip(grads, out, strict=True)])
        results.append(dict(zip(["y", "z", *(k for k, v in t.items() if v is not None)], [*out, *got], strict=True)))
    magnitude = max(float(v.detach().abs().max()) for v in oracle.values() if v is not None)
    for name in results[0]:
        assert results[0][name].dtype == dtype
        assert_within_budget(results[0][name], results[1][name], results[2][name], name, magnitude)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", NORMS)
def test_gradcheck(kind: str, backend: str) -> None:
    t = {
        k: None if v is None else v.detach().double().requires_grad_()
        for k, v in tensors((2, 3, 9), torch.float64, kind).items()
    }
    leaves = [k for k, v in t.items() if v is not None]

    def fn(*values: Tensor) -> tuple[Tensor, Tensor]:
        return run(kind, {**t, **dict(zip(leaves, values, strict=True))}, p=0.3, seed=11, backend=backend)

    assert torch.autograd.gradcheck(fn, [t[k] for k in leaves])


@pytest.mark.parametrize("prenorm", [False, True])
def test_gradcheck_of_a_norm_alone(prenorm: bool) -> None:
    """z is x then, saved once, and its gradient joins that of the norm."""
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: sp.dropout_add_rms_norm(x, None, w, prenorm=prenorm), (x, w))


def test_gradcheck_of_every_other_option() -> None:
    x, r = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w, b, w2, b2 = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(4))
    scale = torch.tensor([0.0, 1.0, 2.0, 0.5])

    def fn(x: Tensor, r: Tensor, w: Tensor, b: Tensor, w2: Tensor, b2: Tensor) -> Any:
        return sp.dropout_add_layer_norm(
            x, r, w, b, p=0.5, seed=1, row_scale=scale, weight2=w2, bias2=b2, prenorm=True, zero_centered_weight=True
        )

    assert torch.autograd.gradcheck(fn, (x, r, w, b, w2, b2))
    assert torch.autograd.gradcheck(lambda x, r: sp.dropout_add(x, r, p=0.5, seed=1), (x, r))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_residual_is_kept_in_fp32(dtype: torch.dtype) -> None:
    x, w = torch.randn(4, 32).to(dtype).requires_grad_(), torch.ones(32)
    residual = torch.randn(4, 32, requires_grad=True)
    y, z = sp.dropout_add_rms_norm(x, residual, w, prenorm=True)
    assert (y.dtype, z.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(z, x.float() + residual, rtol=0, atol=0)
    dx, dr = torch.autograd.grad(z.sum() + y.float().sum(), (x, residual))
    assert (dx.dtype, dr.dtype) == (dtype, torch.float32)
    first = sp.dropout_add_rms_norm(x, None, w, prenorm=True, residual_dtype=torch.float32)[1]
    assert first.dtype == torch.float32


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_mask_is_the_specified_one_and_scaled_right(p: float) -> None:
    x = torch.ones(3, 5, 77)
    got = sp.dropout_add(x, p=p, seed=2**40 + 17, training=True)
    mask = dropout_mask(15, 77, p, torch.tensor(2**40 + 17), RowMap(15, 0, 0)).view(3, 5, 77)
    expected = mask / (1 - p) if p < 1 else torch.zeros_like(x)
    torch.testing.assert_close(got, expected.float(), rtol=1e-7, atol=0)
    assert torch.equal(got != 0, mask if p < 1 else torch.zeros_like(mask))


def test_mask_does_not_depend_on_the_sharding() -> None:
    """Without a process group: the row map alone."""
    from seqpar_kernels.kernels.reference import global_rows
    from seqpar_kernels.layout import SequenceShard, row_map

    seed, whole = torch.tensor(5), torch.Size((2, 7, 24))
    full = dropout_mask(14, 24, 0.4, seed, RowMap(14, 0, 0)).view(whole)
    for ranks in (2, 3, 4):
        for rank, part in enumerate(full.tensor_split(ranks, 1)):
            rows = RowMap(*row_map(part.shape, 1, SequenceShard(7, ranks, rank)))
            assert global_rows(part.shape[0] * part.shape[1], rows).numel() == part[..., 0].numel()
            assert torch.equal(dropout_mask(part[..., 0].numel(), 24, 0.4, seed, rows).view(part.shape), part)


def test_evaluation_drops_nothing_and_draws_no_seed() -> None:
    x, w = torch.randn(4, 8), torch.ones(8)
    state = torch.get_rng_state()
    y = sp.dropout_add_layer_norm(x, x, w, p=0.9, training=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(y, F.layer_norm(2 * x, (8,)))


def test_noncontiguous_inputs_and_gradients() -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 4, 40, dtype=torch.float64)
    variants = [base.transpose(0, 1), base[::2, :, 3:29], base[..., ::2], base[:, :1].expand(6, 4, 40)]
    for x in variants:
        x = x.detach().requires_grad_()
        w = torch.randn(x.shape[-1], dtype=torch.float64)
        y = sp.dropout_add_layer_norm(x, x, w, p=0.2, seed=4)
        dense = x.detach().contiguous().requires_grad_()
        expected = sp.dropout_add_layer_norm(dense, dense, w, p=0.2, seed=4, backend="reference")
        torch.testing.assert_close(y, expected)
        for dy in (
            torch.ones((), dtype=torch.float64).expand(y.shape),
            torch.randn(*y.shape[::-1]).double().permute(2, 1, 0),
        ):
            torch.testing.assert_close(
                torch.autograd.grad(y, x, dy, True)[0], torch.autograd.grad(expected, dense, dy, True)[0]
            )


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    w = torch.ones(8, requires_grad=True)
    y, z = sp.dropout_add_layer_norm(x, x.detach(), w, p=0.1, prenorm=True)
    assert y.shape == z.shape == shape
    dx, dw = torch.autograd.grad(y.sum() + z.sum(), (x, w))
    assert dx.shape == shape and torch.equal(dw, torch.zeros(8))


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (torch.empty, torch.empty_like):

        def poisoned(*args: Any, make: Any = make, **kwargs: Any) -> Any:
            out = make(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(255)

        monkeypatch.setattr(torch, make.__name__, poisoned)
    for kind in NORMS:
        t = tensors((3, 5, 33), torch.float32, kind)
        y, z = run(kind, t, p=0.2, seed=1)
        grads = torch.autograd.grad(y.sum() + z.sum(), [v for v in t.values() if v is not None])
        assert all(torch.isfinite(g).all() for g in (y, z, *grads))


@pytest.mark.parametrize("prenorm", [False, True])
def test_one_kind_of_call_serves_any_choice_of_gradients(prenorm: bool) -> None:
    """All calls share shapes, dtypes and options; what they want of autograd differs, interleaved as it comes."""
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(2)]
    values += [torch.randn(8, dtype=torch.float64) for _ in range(2)]
    grads = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(2)]
    choices = [c for n in range(1, 5) for c in itertools.combinations(range(4), n)]
    for choice in choices + choices[::-1]:
        x, r, w, b = leaves = [v.clone().requires_grad_(i in choice) for i, v in enumerate(values)]
        out = sp.dropout_add_layer_norm(x, r, w, b, prenorm=prenorm)
        wanted = [leaves[i] for i in choice]
        expected = (F.layer_norm(x + r, (8,), w, b), x + r)
        carried = 1 + (prenorm and min(choice) < 2)  # z carries a gradient where x or residual does
        out, expected = (out if prenorm else (out,))[:carried], expected[:carried]
        torch.testing.assert_close(out, expected)
        for given in ([0], [1], [0, 1]) if carried == 2 else ([0],):
            got, want = (
                torch.autograd.grad(
                    [o[i] for i in given], wanted, [grads[i] for i in given], True, materialize_grads=True
                )
                for o in (out, expected)
            )
            torch.testing.assert_close(got, want)


def test_without_gradients_nothing_is_recorded() -> None:
    x, w = torch.randn(4, 8), torch.ones(8, requires_grad=True)
    expected = sp.dropout_add_rms_norm(x, x, w, prenorm=True)
    assert expected[0].requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = sp.dropout_add_rms_norm(x, x, w, prenorm=True)
        assert not any(t.requires_grad for t in got) and got[0].is_inference() == (mode is torch.inference_mode)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not sp.dropout_add_rms_norm(x, x, w.detach()).requires_grad


def test_a_mode_sees_forward_and_backward() -> None:
    """Also one that is entered between the two."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 8, requires_grad=True)
    w = torch.ones(8, requires_grad=True)
    whole = ["seqpar.dropout_add_norm.default", "seqpar.dropout_add_norm_backward.default"]
    (expected,) = torch.autograd.grad(sp.dropout_add_rms_norm(x, x.detach(), w).sin().sum(), x)
    for inside in (2, 1):
        seen = Seen()
        with seen if inside == 2 else contextlib.nullcontext():
            y = sp.dropout_add_rms_norm(x, x.detach(), w)
        with Seen() as later:
            (dx,) = torch.autograd.grad(y.sin().sum(), x)
        names = [name for name in seen.names + later.names if "seqpar" in name]
        assert names == whole[-inside:]
        torch.testing.assert_close(dx, expected, rtol=0, atol=0)


def test_a_subclass_behind_the_first_tensor_is_asked() -> None:
    """The kernels know plain memory only: DTensor and its like must meet the op, not lose their data_ptr()."""

    class Tagged(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(str(func))
            plain = [a.inner if isinstance(a, Tagged) else a for a in args]
            return func(*plain, **(kwargs or {}))

    x, residual = torch.randn(4, 8), torch.randn(4, 8)
    tagged = Tensor._make_wrapper_subclass(Tagged, residual.shape)  # type: ignore[attr-defined]
    tagged.inner = residual
    expected = sp.dropout_add_rms_norm(x, residual, None)
    torch.testing.assert_close(sp.dropout_add_rms_norm(x, tagged, None), expected, rtol=0, atol=0)
    assert "seqpar.dropout_add_norm.default" in Tagged.seen


def test_what_equals_a_probability_is_none() -> None:
    """Calls are looked up by their arguments, and True equals 1.0."""
    x = torch.ones(2, 8)
    for p, equal in ((1.0, True), (0.0, False)):
        sp.dropout_add(x, p=p, residual=x)
        with pytest.raises(ValueError, match="p: expected a probability"):
            sp.dropout_add(x, p=equal, residual=x)


def test_double_backward_is_refused() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    (dx,) = torch.autograd.grad(sp.dropout_add_rms_norm(x, None, None).square().sum(), x, create_graph=False)
    assert dx is not None
    with pytest.raises(RuntimeError, match="no derivative"):
        torch.autograd.grad(sp.dropout_add_rms_norm(x, None, None).square().sum(), x, create_graph=True)


def test_checkpointing_replays_the_mask() -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(4, 16, requires_grad=True)
    w = torch.ones(16, requires_grad=True)

    def block(x: Tensor) -> Tensor:
        return sp.dropout_add_layer_norm(x.tanh(), x, w, p=0.5).sin()  # type: ignore[no-any-return]

    for reentrant in (False, True):
        torch.manual_seed(1)
        expected = torch.autograd.grad(block(x).sum(), (x, w))
        torch.manual_seed(1)
        x.grad = w.grad = None
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        torch.testing.assert_close((x.grad, w.grad), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend: str) -> None:
    t = tensors((2, 5, 32), torch.float32, "layer")
    leaves = [v for v in t.values() if v is not None]

    def fn(*values: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(t, values, strict=True))
        y, z = run("layer", named, p=0.2, seed=9)
        return y, z, sp.dropout_add_rms_norm(y, None, None), sp.dropout_add(y, p=0.1, seed=3)

    expected, got = fn(*leaves), torch.compile(fn, fullgraph=True, backend=backend)(*leaves)
    torch.testing.assert_close(got, expected)
    grads = [torch.randn_like(e) for e in expected]
    torch.testing.assert_close(torch.autograd.grad(got, leaves, grads), torch.autograd.grad(expected, leaves, grads))


def test_compiled_seed_changes_from_call_to_call() -> None:
    fn = torch.compile(lambda x: sp.dropout_add(x, p=0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(8, 64)
    assert not torch.equal(fn(x), fn(x))


@pytest.mark.parametrize("dynamic", ["x", "all"])
def test_opcheck(dynamic: str) -> None:
    x, r = (torch.randn(2, 5, 16, requires_grad=True) for _ in range(2))
    w, b = (torch.randn(16, requires_grad=True) for _ in range(2))
    seed = torch.tensor(5)
    rest = (1, False, 1e-5, 0.3, 10, 0, 0, *[torch.float32] * 4, "")
    if dynamic == "x":
        args: tuple[Any, ...] = (x, None, w, *[None] * 7, False, False, *rest)
    else:
        args = (x, r, w, b, w, b, b, torch.ones(10), None, seed, True, True, *rest)
    torch.library.opcheck(torch.ops.seqpar.dropout_add_norm.default, args)
    dy, stats = torch.randn(2, 5, 16), torch.rand(2, 10)
    torch.library.opcheck(
        torch.ops.seqpar.dropout_add_norm_backward.default,
        (
            dy,
            None,
            dy,
            r.detach(),
            stats,
            None,
            w.detach(),
            None,
            seed,
            [True] * 4 + [False] * 2 + [True],
            *rest,
        ),
    )


def bad_calls() -> dict[str, tuple[dict[str, Any], str]]:
    x = torch.randn(2, 3, 8)
    return {
        "weight shape": ({"weight": torch.ones(7)}, r"weight: expected shape \(8,\), the last size of x, got \(7,\)"),
        "bias shape": ({"bias": torch.ones(8, 1)}, r"bias: expected shape \(8,\)"),
        "residual shape": (
            {"residual": torch.ones(2, 3, 9)},
            r"residual: expected the shape of x \(2, 3, 8\), got \(2, 3, 9\)",
        ),
        "residual dtype": ({"residual": x.half()}, "residual_dtype: expected torch.float32"),
        "p": ({"p": 1.5}, r"p: expected a probability in \[0, 1\], got 1.5"),
        "p none": ({"p": None}, "p: expected a probability"),
        "x none": ({"x": None}, "x: expected a tensor, got NoneType"),
        "weight list": ({"weight": [1.0]}, "weight: expected a tensor, got list"),
        "seq_dim none": ({"seq_dim": None}, "seq_dim: expected an int, got None"),
        "p nan": ({"p": float("nan")}, "p: expected a probability"),
        "eps": ({"eps": 0.0}, "eps: expected a positive finite number, got 0.0"),
        "eps negative": ({"eps": -1e-5}, "eps: expected a positive"),
        "dtype": (
            {"x": torch.ones(2, 3, 8, dtype=torch.int32)},
            "x: expected float32, bfloat16, float16 or float64, got torch.int32",
        ),
        "one dimension": ({"x": torch.ones(8)}, r"x: expected \[..., S, ..., H\]"),
        "seq_dim": ({"seq_dim": -1}, "seq_dim: expected a dimension of x"),
        "seq_dim range": ({"seq_dim": 5}, "seq_dim: expected a dimension of x"),
        "backend": ({"backend": "cutlass"}, "backend: expected one of"),
        "seed": ({"seed": torch.tensor([1]), "p": 0.1}, "seed: expected a 0-d int64 tensor"),
        "seq_len": ({"seq_len": 4}, "x: rank 0 of 1 holds 3 rows, but its shard of seq_len=4"),
        "empty": ({"x": torch.ones(2, 3, 0)}, "x: expected a last size of at least 1"),
        "y_scale": ({"y_scale": torch.ones(2)}, r"y_scale: expected float32 \(\) or \(1,\), got torch.float32 \(2,\)"),
        "row_scale": ({"row_scale": torch.ones(6)}, r"row_scale: expected float32 \(2, 3\)"),
        "weight device": (
            {"weight": torch.ones(8, device="meta")},
            r"weight: expected on (cpu|cuda:\d) like x, got meta",
        ),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_is_named(case: str) -> None:
    changed, message = bad_calls()[case]
    arguments: dict[str, Any] = {
        "x": torch.randn(2, 3, 8),
        "residual": None,
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
    }
    with pytest.raises(ValueError, match=message):
        sp.dropout_add_layer_norm(**{**arguments, **changed})


@ON_CPU_ALONE
def test_forced_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="backend: 'cuda' cannot run here: it runs on cuda tensors"):
        sp.dropout_add(torch.ones(2, 8), p=0.5, backend="cuda")


def test_forward_mode_is_refused_not_dropped() -> None:
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward"):
        sp.dropout_add_rms_norm(forward_ad.make_dual(torch.randn(2, 4), torch.randn(2, 4)), None, None)


@pytest.mark.parametrize("kind", NORMS)
def test_float8_output(kind: str) -> None:
    """y = e4m3(norm * y_scale), saturated; z as ever; two norms share the scale."""
    x, residual, w = torch.randn(3, 5, 40), torch.randn(3, 5, 40), torch.randn(40)
    options: dict[str, Any] = {"prenorm": True, "backend": "reference", "p": 0.2, "seed": 3, "weight2": 2 * w}
    y, y2, z = NORMS[kind](x, residual, w, y_scale=torch.tensor([300.0]), **options)
    plain, plain2, plain_z = NORMS[kind](x, residual, w, **options)
    assert (y.dtype, y2.dtype) == (torch.float8_e4m3fn,) * 2 and torch.equal(z, plain_z)
    for got, expected in ((y, plain), (y2, plain2)):
        assert torch.equal(got.float(), (expected * 300).clamp(-448, 448).to(torch.float8_e4m3fn).float())
        assert (got.float().abs() == 448).any()


def test_float8_output_has_no_gradient_and_says_so() -> None:
    x, w, scale = torch.randn(4, 16), torch.ones(16, requires_grad=True), torch.tensor(2.0)

    def fn(x: Tensor) -> Any:
        return sp.dropout_add_rms_norm(x, None, w, y_scale=scale, backend="reference")

    with pytest.raises(ValueError, match="y_scale: a float8 output carries no gradient"):
        fn(x)
    with torch.no_grad():
        expected = fn(x)
        assert torch.equal(torch.compile(fn, fullgraph=True, backend="aot_eager")(x).float(), expected.float())
        if x.device.type == "cuda":
            return
        with pytest.raises(ValueError, match="y_scale: the CPU kernels store no float8"):
            sp.dropout_add_rms_norm(x, None, w, y_scale=scale)
