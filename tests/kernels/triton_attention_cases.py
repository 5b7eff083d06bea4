"""Cases of the Triton attention kernels, run under TRITON_INTERPRET=1 in a process of their own; the names need no
Triton.

Every kernel runs with small tiles, so that small tensors have several: whole ones, masked ones, and some to be skipped.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from interpreted import main, multiply_as_a_gpu_does

from seqpar_kernels.kernels import attention_reference as reference
from seqpar_kernels.kernels.attention_spec import AttentionGrads
from tests.kernels.attention_cases import BF16, F16, F32, F64, SEED, Case, check, finite, zigzag
from tests.kernels.test_attention_cpu import BLOCKS, MASKS, parts_of_keys

CASES: dict[str, Callable[[], None]] = {}
CPU = torch.device("cpu")
#: Masks that concern two batch entries.
_BATCHES = ("documents of each", "documents, mixed", "documents in disorder", "mask", "padding", "bias")
_IN_BF16 = ("causal", "window", "documents, mixed", "bias", "cap, bias, window, documents", "dropout, causal", "lse")
_IN_F16 = ("two-sided window", "alibi", "negative scale")


def kernels(rows: int = 32, keys: int = 32, dk_rows: int = 16) -> Any:
    """The module, with such tiles in place of the table's."""
    from seqpar_kernels.kernels import triton_attention
    from seqpar_kernels.kernels.triton_attention_config import AttentionTile, AttentionTiles

    forward, queries = AttentionTile(rows, keys, 4, 1), AttentionTile(rows // 2, keys, 4, 1)
    triton_attention.attention_tiles = lambda *_: AttentionTiles(forward, queries, AttentionTile(dk_rows, keys, 4, 1))
    return triton_attention


def equal(some: Any, others: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def case(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(function: Callable[[], None]) -> Callable[[], None]:
        assert name not in CASES, name
        CASES[name] = function
        return function

    return register


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory handed to a kernel is full of NaN: whatever is left unwritten shows."""
    empty = torch.empty
    torch.empty = lambda *a, **o: empty(*a, **o).fill_(math.nan if o.get("dtype", F32).is_floating_point else -1)
    try:
        yield
    finally:
        torch.empty = empty


def masks(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    options = MASKS[name](37, 53)
    if "bias" in options:
        options["bias"] = options["bias"].to(dtype)
    batch = 2 if name in _BATCHES else 1
    check(Case((37, 53), (4, 2), (16, 12), dtype, batch=batch, **options), kernels())


for _name in MASKS:
    for _dtype, _some in ((F32, MASKS), (BF16, _IN_BF16), (F16, _IN_F16)):
        if _name in _some:
            CASES[f"{_name}, {str(_dtype)[6:]}"] = lambda name=_name, dtype=_dtype: masks(name, dtype)


@case("head dimensions")
def head_dimensions() -> None:
    """In one part and in two, masked or not; one query head a key head, and all of them."""
    for dims, heads, dtype in (
        ((1, 1), (1, 1), F32),
        ((16, 64), (2, 2), BF16),
        ((24, 7), (3, 1), F32),
        ((40, 32), (2, 1), F16),
        ((48, 40), (2, 2), F32),  # 32 and 16, no column masked
        ((80, 80), (1, 1), BF16),
    ):
        check(Case((21, 40), heads, dims, dtype, batch=1, right=0, q_offset=19), kernels())


@case("lengths")
def lengths() -> None:
    for i, (q_rows, k_rows) in enumerate([(1, 1), (1, 70), (2, 3), (32, 32), (33, 65), (65, 31)]):
        causal = dict(right=0, q_offset=max(0, k_rows - q_rows)) if i % 2 else {}
        check(Case((q_rows, k_rows), (2, 2), (16, 16), batch=1, **causal), kernels())


@case("layouts")
def layouts() -> None:
    backend = kernels()
    rows = Case((37, 45), (2, 1), (24, 16), right=0, q_offset=8)
    out, lse, _ = rows.forward(backend)
    grads = rows.backward(backend, out, lse)
    for layout in ("heads", "wide"):
        other = Case((37, 45), (2, 1), (24, 16), layout=layout, right=0, q_offset=8)
        found = check(other, backend)
        assert equal((out, lse), found[:2]) and equal(grads, found[2]), layout
        if layout == "heads":
            assert found[0].transpose(1, 2).is_contiguous() and found[2].dk.transpose(1, 2).is_contiguous()
    apart = Case((37, 45), (2, 1), (24, 16), right=0, q_offset=8)
    apart.q, apart.k, apart.v = (t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (rows.q, rows.k, rows.v))
    assert apart.q.stride(-1) != 1
    assert equal((out, lse), apart.forward(backend)[:2])


@case("heads that are expanded")
def expanded() -> None:
    backend = kernels()
    full, few = Case((20, 30), (4, 4), (16, 16), batch=1), Case((20, 30), (4, 1), (16, 16), batch=1)
    few.q, few.dout = full.q, full.dout
    full.k, full.v = (t.expand(-1, -1, 4, -1) for t in (few.k, few.v))
    assert equal(full.forward(backend)[:2], few.forward(backend)[:2])


@case("empty blocks")
def empty_blocks() -> None:
    backend = kernels()
    keyless = Case((5, 0), (2, 1), (16, 8))
    out, lse, state = keyless.forward(backend, keep_state=True)
    assert not out.any() and (lse == -math.inf).all() and not state.sums.any() and not state.acc.any()
    dq, dk, dv = keyless.backward(backend, out, lse)
    assert not dq.any() and dk.shape == keyless.k.shape and dv.shape == keyless.v.shape
    rowless = Case((0, 5), (2, 1), (16, 8), right=0)
    out, lse, _ = rowless.forward(backend)
    assert out.shape == (2, 0, 2, 8) and lse.shape == (2, 2, 0)
    dq, dk, dv = rowless.backward(backend, out, lse)
    assert dq.shape == rowless.q.shape and not dk.any() and not dv.any()
    nobody = Case((3, 5), (2, 1), (16, 8), batch=0)
    nobody.backward(backend, *nobody.forward(backend)[:2])


def blocks(name: str, dtype: torch.dtype) -> None:
    """Blocks of keys that are multiples of the tile, in order: the bits of a single call, gradients as well."""
    backend = kernels(keys=16)
    options = dict(BLOCKS[name])
    if "bias" in options:
        options |= dict(bias=options["bias"][:1, :2, :41, :70], mask=options["mask"][:41, :70])
    if "q_documents" in options:
        options |= dict(q_documents=torch.arange(41) // 23, k_documents=torch.arange(70) // 23)
    whole_case = Case((41, 70), (2, 1), (16, 24), dtype, batch=1, **options)
    out, lse, _ = whole_case.forward(backend)
    whole = (out, lse, *whole_case.backward(backend, out, lse, grad_dtype=F32))
    for cuts in ([32], [16, 16, 64]):
        assert equal(parts_of_keys(whole_case, cuts, backend), whole), cuts


for _name in ("causal", "window", "documents", "bias", "dropout", "cap"):
    _dtype = BF16 if _name in ("window", "dropout") else F32
    CASES[f"keys in blocks, {_name}"] = lambda name=_name, dtype=_dtype: blocks(name, dtype)


@case("keys cut anywhere")
def cut_anywhere() -> None:
    backend = kernels()
    some = Case((41, 70), (2, 1), (16, 24), batch=1, right=0, dlse=True)
    whole = some.forward(backend)[:2]
    whole = (*whole, *some.backward(backend, *whole))
    for got, want in zip(parts_of_keys(some, [3, 41, 50], backend), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


@case("rows in blocks")
def rows_in_blocks() -> None:
    """A row's result and dq are its own, whatever rows are beside it."""
    backend = kernels(keys=16)
    some = Case((50, 60), (2, 1), (16, 16), BF16, batch=1, left=30, right=0, q_offset=10, p=0.2, seed=SEED)
    out, lse, _ = some.forward(backend)
    dq = some.backward(backend, out, lse).dq
    q, dout, spec = some.q, some.dout, some.spec
    for begin, end in itertools.pairwise([0, 1, 21, 50]):
        some.q, some.dout = q[:, begin:end], dout[:, begin:end]
        some.spec = spec._replace(q_offset=spec.q_offset + begin)
        assert equal(some.forward(backend)[:2], (out[:, begin:end], lse[..., begin:end]))
        wants = dict(wants=(True, False, False))
        grads = some.backward(backend, out[:, begin:end], lse[..., begin:end], **wants)
        assert torch.equal(grads.dq, dq[:, begin:end]) and grads.dk is None and grads.dv is None


@case("dropout drops what the reference drops")
def dropped() -> None:
    """v is the identity, so that out holds the weights; positions in any order, offsets that are no multiple of 8."""
    backend = kernels()
    for options in (
        dict(q_offset=5, k_offset=16),
        dict(q_offset=5, k_offset=3),
        dict(q_positions=zigzag(1, 2, 16), k_positions=zigzag(0, 2, 20)),
    ):
        some = Case((32, 40), (2, 2), (8, 40), batch=1, p=0.4, seed=SEED, first_head=7, all_heads=1 << 33, **options)
        some.v = torch.eye(40)[None, :, None].expand(1, 40, 2, 40)
        out, _, _ = some.forward(backend)
        kept = reference.kept(some.spec, some.masks, (1, 2, 32, 40), CPU)
        assert torch.equal(out.transpose(1, 2) != 0, kept), options


@case("merge")
def merge() -> None:
    backend = kernels()
    some = Case((20, 60), (2, 1), (16, 24), BF16, layout="heads", right=0)
    whole, whole_lse, _ = some.as_fp64().forward(reference)
    outs, lses, k, v = [], [], some.k, some.v
    for begin, end in ((0, 30), (30, 60)):
        some.k, some.v, some.spec = k[:, begin:end], v[:, begin:end], some.spec._replace(k_offset=begin)
        out, lse, _ = some.forward(backend)
        outs.append(out)
        lses.append(lse)
    assert (lses[1] == -math.inf).all()
    out, lse = backend.merge_attention(outs, lses)
    assert out.dtype == BF16 and out.stride() == outs[0].stride()
    torch.testing.assert_close(out.double(), whole, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(finite(lse).double(), finite(whole_lse), rtol=1e-6, atol=1e-6)


@case("delta may be given")
def given_delta() -> None:
    backend = kernels()
    some = Case((20, 30), (2, 1), (16, 24), right=0, dlse=True, batch=1)
    out, lse, _ = some.forward(backend)
    whole = some.backward(backend, out, lse)
    delta = (some.dout * out).sum(-1).transpose(1, 2)
    for got, want in zip(some.backward(backend, None, lse, delta=delta), whole, strict=True):
        torch.testing.assert_close(got, want)
    into = AttentionGrads(None, torch.ones_like(some.k), None)
    added = some.backward(backend, out, lse, into=into)
    torch.testing.assert_close(added.dk, whole.dk + 1)
    assert added.dk is into.dk and added.dq is None and added.dv is None


@case("blocks that no row sees are not read")
def not_read() -> None:
    """Keys in the future and beyond the window are skipped tile by tile, forward and backward; by spans too."""
    backend = kernels(keys=16)
    for options in (
        dict(left=20, right=0, q_offset=64),
        dict(left=20, right=0, q_positions=torch.arange(64, 104)),
        dict(q_documents=torch.ones(40), k_documents=(torch.arange(144) // 48)),
    ):
        some = Case((40, 144), (2, 1), (16, 16), batch=1, **options)
        out, lse, _ = some.forward(backend)
        whole = (out, lse, some.backward(backend, out, lse).dq)
        low, high = (48, 96) if "q_documents" in options else (32, 112)
        for t in (some.k, some.v):
            t[:, :low] = t[:, high:] = math.nan
        out, lse, _ = some.forward(backend)
        grads = some.backward(backend, out, lse)
        assert equal((out, lse, grads.dq), whole)
        assert not any(grads[i][:, span].any() for i in (1, 2) for span in (slice(0, low), slice(high, None)))


@case("rows that see no key are not read")
def rows_not_read() -> None:
    """By the kernel of dk and dv: a NaN in a row that comes before a tile of keys reaches none of them."""
    backend = kernels(keys=16)
    some = Case((64, 64), (2, 1), (16, 16), batch=1, right=0, left=16)
    out, lse, _ = some.forward(backend)
    clean = some.backward(backend, out, lse)
    some.q[:, :16] = some.q[:, 48:] = math.nan
    for spec, masked in (
        (some.spec, some.masks),
        (some.spec, some.masks._replace(q_positions=torch.arange(64))),
    ):
        grads = backend.attention_backward(some.dout, some.q, some.k, some.v, out, lse, spec, masked)
        some_keys = slice(16, 32)
        assert torch.equal(grads.dk[:, some_keys], clean.dk[:, some_keys])
        assert torch.equal(grads.dv[:, some_keys], clean.dv[:, some_keys])
        assert grads.dk[:, :16].isnan().any()


@case("what is not a number stays in its row")
def nan_in_a_row() -> None:
    backend = kernels()
    some = Case((33, 40), (2, 2), (16, 16), right=0, q_offset=7, batch=1)
    clean = some.forward(backend)[0]
    some.q[0, 7, 1, 3] = math.nan
    out, lse, _ = some.forward(backend)
    assert out[0, 7, 1].isnan().all() and lse[0, 1, 7].isnan()
    out[0, 7, 1] = clean[0, 7, 1]
    assert torch.equal(out, clean)


@case("huge scores")
def huge_scores() -> None:
    """One key takes all: no overflow, no NaN."""
    backend = kernels()
    for dtype in (F32, BF16):
        some = Case((20, 40), (2, 2), (16, 16), dtype, batch=1, scale=3e4)
        out, lse, _ = some.forward(backend)
        _, true_lse, _ = some.as_fp64().forward(reference)
        torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=0)
        assert not any(t.isnan().any() for t in (out, *some.backward(backend, out, lse)))


@case("what does not fit is refused")
def refused() -> None:
    from seqpar_kernels.kernels import triton_attention
    from seqpar_kernels.kernels.triton_attention_config import attention_tiles

    triton_attention.attention_tiles = attention_tiles
    with pytest.raises(ValueError, match="attention: sizes: expected"):
        Case((5, 6), (3, 2), (16, 16)).forward(triton_attention)
    with pytest.raises(ValueError, match=r"q: expected float16, bfloat16 or float32 on cpu, got torch\.float64"):
        Case((5, 6), (2, 2), (16, 16), F64).forward(triton_attention)
    with pytest.raises(ValueError, match=r"capability 9.0, got 576 for queries and keys and 600 for values"):
        Case((5, 6), (2, 2), (576, 600), BF16).forward(triton_attention)
    some = Case((5, 6), (2, 2), (16, 16), BF16)
    with pytest.raises(ValueError, match=r"grad_dtype: expected .* as q, or torch\.float32, got torch\.float16"):
        some.backward(triton_attention, *some.forward(triton_attention)[:2], grad_dtype=F16)


_RING = 68  # rows


def over_ranks(ranks: int, **options: Any) -> list[tuple[Tensor, ...]]:
    """out, dq, dk, dv of each virtual rank, by the interpreted kernels."""
    import seqpar_kernels as sp
    from seqpar_kernels.comm.loopback import Loopback
    from seqpar_kernels.kernels import attention

    backend, lock = kernels(keys=16), threading.Lock()

    class Serial:
        """The interpreter serves one thread."""

        @staticmethod
        def attention_forward(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return backend.attention_forward(*args, **kwargs)

        @staticmethod
        def attention_backward(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return backend.attention_backward(*args, **kwargs)

    select, keys = attention.select_attention, attention.canonical_keys
    attention.select_attention, attention.canonical_keys = lambda _: Serial, lambda _: 16
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(1, _RING, heads, 16, generator=generator) for heads in (2, 1, 1, 2)]

    def on_rank(group: Any) -> tuple[Tensor, ...]:
        q, k, v, dout = (sp.shard_sequence(t, group, 1, layout="zigzag") for t in whole)
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
        out = sp.sequence_parallel_attention(
            *leaves, group=group, is_causal=True, layout="zigzag", seq_len=_RING, dropout_p=0.2, seed=5, **options
        )
        grads = torch.autograd.grad(out, leaves, dout)
        return out.detach(), *(sp.unshard_sequence(t, group, 1, layout="zigzag", seq_len=_RING) for t in grads)

    try:
        with Loopback(ranks, timeout=600.0) as loopback:
            return loopback.run(on_rank)
    finally:
        attention.select_attention, attention.canonical_keys = select, keys


@case("a ring of virtual ranks")
def ring() -> None:
    """Its bits do not depend on the messages; its gradients are those of one rank."""
    (one,) = over_ranks(1)
    runs = [over_ranks(2, engine="ring", chunks=chunks, save_kv=chunks == 1) for chunks in (1, 3)]
    for first, second in zip(*runs, strict=True):
        assert equal(first, second)
        for got, want in zip(first[1:], one[1:], strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
    multiply_as_a_gpu_does()
    with poisoned():
        main(CASES)
