"""The CPU attention kernels against the reference run in fp64: at most twice the error of PyTorch in the same dtype;
and what must hold to the bit, however keys, rows, heads and threads are divided."""

import itertools
import math

import pytest
import torch

from seqpar_kernels import ops
from seqpar_kernels.kernels import attention_native as native
from seqpar_kernels.kernels import attention_reference as reference
from seqpar_kernels.kernels.attention_spec import CANONICAL_KEYS, AttentionGrads

from .attention_cases import BF16, DTYPES, F16, F32, F64, SEED, Case, check, finite, zigzag
from .norm_cases import poison, python  # noqa: F401

if native.unavailable(torch.device("cpu")) is not None:
    pytest.skip(str(native.unavailable(torch.device("cpu"))), allow_module_level=True)

DIMS = [1, 7, 16, 40, 64, 80, 96, 128, 192, 256]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors, hundreds of calls: waking threads would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@by_dtype
def test_head_dimensions(dtype):
    for i, dim in enumerate(DIMS):
        check(Case((61, 103), (4, 2), (dim, dim), dtype, right=[None, 0][i % 2], q_offset=42), native)
        check(Case((29, 31), (3, 1), (dim, DIMS[-1 - i]), dtype, batch=4, right=[0, None][i % 2]), native)


@by_dtype
def test_lengths(dtype):
    for i, (q_rows, k_rows) in enumerate(
        [(1, 1), (1, 200), (2, 3), (7, 8), (96, 96), (97, 191), (193, 97), (389, 401)]
    ):
        causal = dict(right=0, q_offset=max(0, k_rows - q_rows)) if i % 2 else {}
        check(Case((q_rows, k_rows), (2, 2), (24, 24), dtype, batch=1, **causal), native)


def documents(rows, batch=None):
    if batch is None:
        return torch.arange(rows) // 23
    return torch.stack([torch.arange(rows) // (17 + 5 * b) for b in range(batch)])


MASKS = {
    "causal": lambda q, k: dict(right=0),
    "bottom right": lambda q, k: dict(right=0, q_offset=k - q),
    "ahead of all keys": lambda q, k: dict(right=0, q_offset=1000),
    "behind all keys": lambda q, k: dict(right=0, k_offset=1000),
    "half behind": lambda q, k: dict(right=0, k_offset=q // 2),
    "window": lambda q, k: dict(left=9, right=0, q_offset=k - q),
    "two-sided window": lambda q, k: dict(left=5, right=3, q_offset=11, k_offset=4),
    "window beyond": lambda q, k: dict(left=9, right=0, q_offset=k - 3),
    "documents": lambda q, k: dict(q_documents=documents(q), k_documents=documents(k), right=0),
    "documents of each": lambda q, k: dict(q_documents=documents(q, 2), k_documents=documents(k, 2)),
    "documents, mixed": lambda q, k: dict(q_documents=documents(q, 2), k_documents=documents(k), left=30, right=0),
    "documents in disorder": lambda q, k: dict(q_documents=documents(q) % 3, k_documents=documents(k, 2) % 2),
    "zigzag": lambda q, k: dict(
        q_positions=zigzag(1, 2, q)[q // 2 :][:q], k_positions=zigzag(0, 2, k)[k // 2 :][:k], right=0
    ),
    "positions in disorder": lambda q, k: dict(
        q_positions=torch.arange(q), k_positions=torch.arange(k) * 7 % k, right=0, left=20
    ),
    "positions of queries": lambda q, k: dict(q_positions=torch.arange(q).flip(0), right=0),
    "mask": lambda q, k: dict(mask=torch.rand(2, 1, q, k) < 0.4),
    "padding": lambda q, k: dict(mask=(torch.arange(k) < torch.tensor([[3], [k // 2]]))[:, None, None], right=0),
    "nothing": lambda q, k: dict(mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool)),
    "bias": lambda q, k: dict(bias=torch.randn(2, 4, q, k)),
    "alibi": lambda q, k: dict(bias=torch.randn(4, 1, k), right=0, mask=torch.rand(q, k) < 0.7),
    "infinite bias": lambda q, k: dict(bias=torch.zeros(q, k).masked_fill(torch.rand(q, k) < 0.5, -math.inf)),
    "cap": lambda q, k: dict(softcap=0.7, right=0, scale=0.5),
    "cap, bias, window, documents": lambda q, k: dict(
        softcap=20.0, bias=torch.randn(4, q, 1), left=40, right=2, q_documents=documents(q), k_documents=documents(k)
    ),
    "negative scale": lambda q, k: dict(scale=-0.3, right=0),
    "no scale": lambda q, k: dict(scale=0.0, left=3),
    "dropout": lambda q, k: dict(seed=SEED, p=0.3),
    "dropout, causal": lambda q, k: dict(
        seed=SEED, p=0.1, right=0, q_offset=40, first_head=3, all_heads=9, first_batch=5
    ),
    "all dropped": lambda q, k: dict(seed=SEED, p=1.0),
    "lse": lambda q, k: dict(dlse=True, left=20, right=0),
}


@by_dtype
@pytest.mark.parametrize("name", MASKS)
def test_masks(dtype, name):
    torch.manual_seed(0)
    for q_rows, k_rows in ((37, 53), (131, 107)):
        options = MASKS[name](q_rows, k_rows)
        if "bias" in options and dtype != F32 and q_rows == 37:
            options["bias"] = options["bias"].to(dtype)
        check(Case((q_rows, k_rows), (4, 2), (16, 12), dtype, **options), native)


@by_dtype
@pytest.mark.parametrize("layout", ["heads", "wide"])
def test_layouts(dtype, layout):
    case, rows = (
        Case((45, 77), (4, 2), (40, 24), dtype, layout=kind, right=0, q_offset=20) for kind in (layout, "rows")
    )
    out, lse, grads = check(case, native)
    other, other_lse, _ = rows.forward(native)
    assert equal((out, lse), (other, other_lse))
    assert equal(grads, rows.backward(native, other, other_lse))


def test_expanded_heads_and_columns_apart():
    case = Case((20, 30), (4, 4), (16, 16))
    few = Case((20, 30), (4, 1), (16, 16))
    few.q, few.dout = case.q, case.dout
    case.k, case.v = (t.expand(-1, -1, 4, -1) for t in (few.k, few.v))
    assert equal(case.forward(native)[:2], few.forward(native)[:2])
    apart = Case((20, 30), (4, 1), (16, 16))
    apart.q, apart.k, apart.v = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (few.q, few.k, few.v))
    assert apart.q.stride(-1) != 1
    assert equal(apart.forward(native)[:2], few.forward(native)[:2])


@by_dtype
def test_empty_blocks(dtype):
    case = Case((5, 0), (2, 1), (16, 8), dtype)
    out, lse, state = case.forward(native, keep_state=True)
    assert out.shape == (2, 5, 2, 8) and not out.any() and (lse == -math.inf).all() and not state.sums.any()
    dq, dk, dv = case.backward(native, out, lse)
    assert not dq.any() and dk.shape == case.k.shape and dv.shape == case.v.shape
    case = Case((0, 5), (2, 1), (16, 8), dtype)
    out, lse, _ = case.forward(native)
    assert out.shape == (2, 0, 2, 8) and lse.shape == (2, 2, 0)
    dq, dk, dv = case.backward(native, out, lse)
    assert dq.shape == case.q.shape and dk.shape == case.k.shape and not dk.any() and not dv.any()
    case = Case((3, 5), (2, 1), (16, 8), dtype, batch=0)
    assert case.forward(native)[0].shape == (0, 3, 2, 8)
    case.backward(native, *case.forward(native)[:2])


def parts_of_keys(case, cuts, backend=native):
    """The forward in several calls, each resuming; then the backward likewise, added up."""
    state, pieces = None, list(itertools.pairwise([0, *cuts, case.k.shape[1]]))
    whole_k, whole_v, masks, spec = case.k, case.v, case.masks, case.spec

    def piece(begin, end):
        case.k, case.v, case.spec = whole_k[:, begin:end], whole_v[:, begin:end], spec._replace(k_offset=begin)
        case.masks = masks._replace(
            **{
                name: t[..., begin:end]
                for name in ("k_positions", "k_documents", "mask", "bias")
                if (t := getattr(masks, name)) is not None
            }
        )

    for begin, end in pieces:
        piece(begin, end)
        out, lse, state = case.forward(backend, state=state, keep_state=True, finish=end == whole_k.shape[1])
    dq, dk, dv = torch.zeros(case.q.shape, dtype=case.wide), [], []
    for begin, end in pieces:
        piece(begin, end)
        into = AttentionGrads(dq, *(torch.zeros(t.shape, dtype=case.wide) for t in (case.k, case.v)))
        grads = case.backward(backend, out, lse, into=into)
        dk.append(grads.dk)
        dv.append(grads.dv)
    case.k, case.v, case.masks, case.spec = whole_k, whole_v, masks, spec
    return out, lse, dq, torch.cat(dk, 1), torch.cat(dv, 1)


BLOCKS = {
    "full": {},
    "causal": dict(right=0),
    "window": dict(left=70, right=0, q_offset=30),
    "documents": dict(right=0, q_documents=documents(230), k_documents=documents(260)),
    "cap": dict(softcap=2.0, right=0),
    "bias": dict(bias=torch.randn(2, 4, 230, 260), mask=torch.rand(230, 260) < 0.6),
    "dropout": dict(seed=SEED, p=0.2, right=0),
    "large": dict(scale=40.0),
}


@by_dtype
@pytest.mark.parametrize("name", BLOCKS)
def test_keys_in_blocks_leave_no_trace(dtype, name):
    """Blocks of keys that are multiples of CANONICAL_KEYS, in order: the bits of a single call, gradients as well."""
    case = Case((230, 260), (4, 2), (24, 40), dtype, dlse=name == "cap", **BLOCKS[name])
    out, lse, _ = case.forward(native)
    whole = (out, lse, *case.backward(native, out, lse, grad_dtype=case.wide))
    for cuts in ([96], [8, 16, 248], [CANONICAL_KEYS * i for i in range(1, 33, 5)], [200, 200], [0]):
        assert equal(parts_of_keys(case, cuts), whole), cuts


def test_keys_cut_anywhere_are_right():
    case = Case((230, 260), (4, 2), (24, 40), right=0, dlse=True)
    whole = case.forward(native)[:2]
    whole = (*whole, *case.backward(native, *whole))
    for got, want in zip(parts_of_keys(case, [3, 101, 111]), whole):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@by_dtype
@pytest.mark.parametrize("name", ["causal", "window", "dropout"])
def test_rows_in_blocks_leave_no_trace(dtype, name):
    """A row's result and dq are its own; dk and dv add up row by row."""
    case = Case((230, 260), (4, 2), (24, 40), dtype, **BLOCKS[name])
    out, lse, _ = case.forward(native)
    dq, dk, dv = case.backward(native, out, lse, grad_dtype=case.wide)
    into = AttentionGrads(None, *(torch.zeros(t.shape, dtype=case.wide) for t in (case.k, case.v)))
    q, dout, spec = case.q, case.dout, case.spec
    # With one head a key head, dk is one chain over its rows; with more, over the rows of one head after the other.
    single = Case((230, 260), (1, 1), (24, 40), dtype, **BLOCKS[name])
    for begin, end in itertools.pairwise([0, 1, 50, 96, 97, 230]):
        case.q, case.dout, case.spec = (
            q[:, begin:end],
            dout[:, begin:end],
            spec._replace(q_offset=spec.q_offset + begin),
        )
        assert equal(case.forward(native)[:2], (out[:, begin:end], lse[..., begin:end]))
        grads = case.backward(native, out[:, begin:end], lse[..., begin:end], grad_dtype=case.wide)
        assert torch.equal(grads.dq, dq[:, begin:end])
    out, lse, _ = single.forward(native)
    _, dk, dv = single.backward(native, out, lse, grad_dtype=single.wide)
    into = AttentionGrads(None, torch.zeros_like(dk), torch.zeros_like(dv))
    q, dout, spec = single.q, single.dout, single.spec
    for begin, end in itertools.pairwise([0, 1, 50, 96, 97, 230]):
        single.q, single.dout = q[:, begin:end], dout[:, begin:end]
        single.spec = spec._replace(q_offset=spec.q_offset + begin)
        single.backward(native, out[:, begin:end], lse[..., begin:end], into=into)
    assert equal(into[1:], (dk, dv))


@by_dtype
def test_heads_and_batch_entries_are_on_their_own(dtype):
    case = Case((150, 170), (6, 3), (32, 32), dtype, right=0, p=0.2, seed=SEED)
    out, lse, _ = case.forward(native)
    dq, dk, dv = case.backward(native, out, lse)
    for b, h in itertools.product(range(2), range(3)):
        part = Case((150, 170), (2, 1), (32, 32), dtype, batch=1)
        part.spec, part.masks = case.spec._replace(first_batch=b, first_head=2 * h), case.masks
        part.q, part.dout = (t[b : b + 1, :, 2 * h : 2 * h + 2] for t in (case.q, case.dout))
        part.k, part.v = (t[b : b + 1, :, h : h + 1] for t in (case.k, case.v))
        own = part.forward(native)[:2]
        assert equal(own, (out[b : b + 1, :, 2 * h : 2 * h + 2], lse[b : b + 1, 2 * h : 2 * h + 2]))
        grads = part.backward(native, *own)
        assert equal(grads, (dq[b : b + 1, :, 2 * h : 2 * h + 2], *(t[b : b + 1, :, h : h + 1] for t in (dk, dv))))


@by_dtype
def test_threads_leave_no_trace(dtype):
    for heads, batch in (((4, 1), 1), ((3, 3), 1), ((4, 2), 2)):
        case = Case((400, 700), heads, (40, 40), dtype, batch=batch, right=0, q_offset=300)
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            out, lse, _ = case.forward(native)
            results.append((out, lse, *case.backward(native, out, lse)))
        assert all(equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_dropout_drops_what_the_reference_drops(dtype):
    """v is the identity, so that out holds the weights; positions in any order."""
    for options in (dict(q_offset=5, k_offset=3), dict(q_positions=zigzag(1, 2, 16), k_positions=zigzag(0, 2, 20))):
        masks = {name: t for name, t in options.items() if "positions" in name}
        case = Case((32, 40), (2, 2), (8, 40), dtype, p=0.4, seed=SEED, first_head=7, all_heads=1 << 33, **options)
        case.v = torch.eye(40, dtype=dtype)[None, :, None].expand(2, 40, 2, 40)
        out, _, _ = case.forward(native)
        kept = reference.kept(case.spec, case.masks, (2, 2, 32, 40), torch.device("cpu"))
        assert torch.equal(out.transpose(1, 2) != 0, kept), masks
        assert 0.5 < kept.double().mean() < 0.7


def test_dropout_is_that_of_the_dropout_attention_op():
    case = Case((50, 50), (3, 3), (16, 16), p=0.25, seed=SEED, right=0)
    case.spec = case.spec._replace(all_rows=50)
    heads = [t.transpose(1, 2) for t in (case.q, case.k, case.v)]
    there = ops.dropout_attention(*heads, SEED, 0.25, 0.25, True, 3, 0)
    torch.testing.assert_close(case.forward(native)[0].transpose(1, 2), there)


@by_dtype
def test_merge(dtype):
    case = Case((50, 90), (4, 2), (16, 130), dtype, right=0)
    whole, whole_lse, _ = case.as_fp64().forward(reference)
    outs, lses = [], []
    k, v = case.k, case.v
    for begin, end in ((0, 30), (30, 30), (30, 65), (65, 90)):
        case.k, case.v, case.spec = k[:, begin:end], v[:, begin:end], case.spec._replace(k_offset=begin)
        out, lse, _ = case.forward(native)
        outs.append(out)
        lses.append(lse)
    lses[1], outs[1] = lses[1].clone(), torch.full_like(outs[1], float("nan"))  # counts for nothing
    out, lse = native.merge_attention(outs, lses, case.wide)
    true, true_lse = reference.merge_attention([t.double().nan_to_num(0) for t in outs], [t.double() for t in lses])
    torch.testing.assert_close(out.double(), true, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(finite(lse).double(), finite(whole_lse), rtol=1e-6, atol=1e-6)
    rough = {F32: 1e-6, BF16: 2**-7, F16: 2**-10, F64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), whole, rtol=rough, atol=rough)
    rounded, _ = native.merge_attention(outs, lses)
    assert rounded.dtype == dtype and torch.equal(rounded, out.to(dtype))
    nothing, none = native.merge_attention([outs[1]] * 2, [lses[1]] * 2)
    assert not nothing.any() and (none == -math.inf).all()


@by_dtype
def test_a_sink_enters_after_the_merge(dtype):
    """Softmax with one more logit a head: out and lse corrected, then the backward of the block needs no change."""
    case, exact = Case((40, 40), (4, 2), (16, 16), dtype, right=0), Case((40, 40), (4, 2), (16, 16), F64, right=0)
    for name in ("q", "k", "v", "dout"):
        setattr(exact, name, getattr(case, name).double())
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=F64)

    def with_sinks(q, k, v):
        out, lse, _ = reference.attention_forward(q, k, v, exact.spec)
        return out * torch.sigmoid(lse - sinks[:, None]).transpose(1, 2)[..., None], torch.logaddexp(
            lse, sinks[:, None]
        )

    inputs = [t.detach().clone().requires_grad_() for t in (exact.q, exact.k, exact.v)]
    true, _ = with_sinks(*inputs)
    grads = torch.autograd.grad(true, inputs, exact.dout)
    out, lse, _ = case.forward(native)
    out = (out.double() * torch.sigmoid(lse.double() - sinks[:, None]).transpose(1, 2)[..., None]).to(dtype)
    lse = torch.logaddexp(lse.double(), sinks[:, None])
    rough = {F32: 2e-6, BF16: 2**-5, F16: 2**-8, F64: 1e-12}[dtype]
    for got, want in zip(case.backward(native, out, lse), grads):
        torch.testing.assert_close(got.double(), want, rtol=rough, atol=rough)


def test_delta_may_be_given_and_gradients_left_out():
    case = Case((45, 77), (4, 2), (40, 24), right=0, q_offset=20, dlse=True)
    out, lse, _ = case.forward(native)
    whole = case.backward(native, out, lse)
    delta = (case.dout * out).sum(-1).transpose(1, 2)
    for got, want in zip(case.backward(native, None, lse, delta=delta), whole):
        torch.testing.assert_close(got, want)
    for wants in itertools.product([True, False], repeat=3):
        some = case.backward(native, out, lse, wants=wants)
        for want, got, full in zip(wants, some, whole):
            assert (got is None) != want and (got is None or torch.equal(got, full))


def test_blocks_that_no_row_sees_are_not_read():
    """Keys in the future and beyond the window are skipped tile by tile, forward and backward."""
    case = Case((100, 900), (2, 2), (16, 16), left=50, right=0, q_offset=400)
    out, lse, _ = case.forward(native)
    whole = (out, lse, case.backward(native, out, lse).dq)
    case.k[:, :192] = case.v[:, :192] = case.k[:, 672:] = case.v[:, 672:] = float("nan")
    out, lse, _ = case.forward(native)
    grads = case.backward(native, out, lse)
    assert equal((out, lse, grads.dq), whole)
    assert not any(grads[i][:, span].any() for i in (1, 2) for span in (slice(0, 192), slice(672, None)))


@by_dtype
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_that_see_no_key_keep_what_they_had(dtype, threads, monkeypatch):
    """A state and a dq that are added to: neither read nor written where no row of a tile sees a key."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case = Case((500, 120), (2, 1), (16, 24), dtype, right=0)
    out, lse, state = case.forward(native, keep_state=True)
    before = [t.clone() for t in state]
    into = [
        torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(case.wide) for t in (case.q, case.k, case.v)
    ]
    dq = into[0].clone()
    case.spec = case.spec._replace(k_offset=300)  # later keys: rows 0 to 299 see none
    _, _, state = case.forward(native, state=state, keep_state=True, finish=False)
    assert not torch.equal(before[0], state[0])
    for old, new, rows in zip(before, state, (1, 2, 2)):
        assert torch.equal(old.narrow(rows, 0, 300), new.narrow(rows, 0, 300))
    grads = case.backward(native, out, lse, into=AttentionGrads(*into))
    added = case.backward(native, out, lse, into=AttentionGrads(*(torch.zeros_like(t) for t in into))).dq
    assert torch.equal(grads.dq[:, :300], dq[:, :300]) and not added[:, :300].any() and added[:, 300:].any()


def test_what_is_not_a_number_stays_in_its_row():
    case = Case((50, 60), (2, 2), (16, 16), right=0, q_offset=10)
    clean = case.forward(native)[0]
    case.q[0, 7, 1, 3] = float("nan")
    out, lse, _ = case.forward(native)
    assert out[0, 7, 1].isnan().all() and lse[0, 1, 7].isnan()
    out[0, 7, 1] = clean[0, 7, 1]
    assert torch.equal(out, clean)


def test_huge_scores():
    """One key takes all: no overflow, no NaN."""
    for dtype in (F32, BF16):
        case = Case((50, 60), (2, 2), (16, 16), dtype, scale=3e4)
        out, lse, _ = case.forward(native)
        true, true_lse, _ = case.as_fp64().forward(reference)
        sure = (
            torch.topk(case.as_fp64().q.transpose(1, 2) @ case.k.double().transpose(1, 2).mT, 2)[0].diff().abs() > 0.1
        )
        torch.testing.assert_close(out.transpose(1, 2)[sure[..., 0]].double(), true.transpose(1, 2)[sure[..., 0]])
        torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=0)
        assert not any(t.isnan().any() for t in case.backward(native, out, lse))


def test_what_does_not_fit_is_refused():
    case = Case((5, 6), (3, 2), (16, 16))
    with pytest.raises(ValueError, match="attention_forward: sizes"):
        case.forward(native)
    case = Case((5, 6), (2, 2), (16, 16), BF16)
    out, lse, _ = case.forward(native)
    with pytest.raises(ValueError, match="attention_backward: no kernel"):
        case.backward(native, out, lse, grad_dtype=F16)
    assert "cuda" in native.unavailable(torch.device("cuda"))


CHECK_THIS_ISA = """
import torch
from tests.kernels import test_attention_cpu as t
torch.set_num_threads(1)
print(t.native.native._native.cpu_isa())
for dtype in t.DTYPES:
    for dim in (1, 40, 64, 80):
        t.check(t.Case((61, 130), (4, 2), (dim, 72), dtype, right=0, q_offset=42), t.native)
    for name in ("cap, bias, window, documents", "dropout, causal", "infinite bias", "documents in disorder", "lse"):
        t.test_masks(dtype, name)
    for name in ("causal", "dropout", "cap"):
        t.test_keys_in_blocks_leave_no_trace(dtype, name)
    t.test_merge(dtype)
    t.test_empty_blocks(dtype)
t.test_huge_scores()
t.test_what_is_not_a_number_stays_in_its_row()
"""


@pytest.mark.parametrize("isa", ["avx512", "avx2", "baseline", "neon"])
def test_every_instruction_set(isa):
    probe = python("from seqpar_kernels.kernels import native; print(native._native.cpu_isa())", SEQPAR_CPU_ISA=isa)
    if probe.stdout.strip() != isa:
        pytest.skip(probe.stdout.strip())
    done = python(CHECK_THIS_ISA, SEQPAR_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == isa
