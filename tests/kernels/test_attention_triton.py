"""The Triton attention kernels without a GPU: interpreted against the reference, and compiled for the GPUs they are
meant for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton_attention_cases as cases
from interpreted import Interpreted

from seqpar_kernels.kernels.attention_spec import AttentionGrads, AttentionMasks, AttentionSpec, new_state

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module", autouse=True)
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Interpreted]:
    """Started before the first test here, so that the cases run while the compiler does."""
    runner = Interpreted("triton_attention_cases.py", tmp_path_factory.mktemp("interpreted"))
    yield runner
    runner.end()


class Variant(NamedTuple):
    """One launch of a call. ``what``: forward, keys (dk and dv) or queries (dq). ``on``: options of the call."""

    what: str
    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = BF16
    on: str = "causal"
    tf32: bool = False
    spilled: int = 0
    product: str | None = None  # instruction, where it is not the newest


def _launch(variant: Variant, sm: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    from triton_ahead_of_time import record

    from seqpar_kernels.kernels import triton_attention

    monkeypatch.setattr(triton_attention, "unavailable", lambda _: None)
    monkeypatch.setattr(triton_attention, "_capability", lambda _: (sm // 10, sm % 10))
    monkeypatch.setattr(triton_attention, "_tf32", lambda _: variant.tf32)
    on, (head_dim, value_dim), dtype = variant.on.split(), variant.dims, variant.dtype
    rows, heads, kv_heads = 512, 8, 2
    q, dout = torch.empty(1, rows, heads, head_dim, dtype=dtype), torch.empty(1, rows, heads, value_dim, dtype=dtype)
    k, v = torch.empty(1, rows, kv_heads, head_dim, dtype=dtype), torch.empty(1, rows, kv_heads, value_dim, dtype=dtype)
    lse, documents = torch.empty(1, heads, rows), torch.arange(rows) // 100
    spec = AttentionSpec(
        head_dim**-0.5,
        20.0 if "cap" in on else 0.0,
        left=99 if "window" in on else None,
        right=0 if "causal" in on else None,
        p=0.1,
        all_heads=heads,
        all_rows=rows,
    )
    masks = AttentionMasks(
        q_documents=documents if "documents" in on else None,
        k_documents=documents if "documents" in on else None,
        mask=torch.ones(rows, rows, dtype=torch.bool) if "mask" in on else None,
        bias=torch.empty(heads, rows, rows, dtype=dtype) if "bias" in on else None,
        seed=torch.tensor(1) if "dropout" in on else None,
    )
    if variant.what == "forward":
        state = new_state(q, value_dim) if "resume" in on else None
        return record(triton_attention.attention_forward, q, k, v, spec, masks, state=state)[0]
    into = AttentionGrads(*(torch.empty(t.shape) for t in (q, k, v))) if "resume" in on else None
    launches = record(triton_attention.attention_backward, dout, q, k, v, None, lse, spec, masks, delta=lse, into=into)
    return launches[0 if variant.what == "keys" else 1]


KERNELS = ("forward", "keys", "queries")
#: Of accumulators on their way to tensor memory and back.
ON_100 = Variant("keys", spilled=16)
COMPILED = [
    *((sm, Variant(what)) for sm in (80, 90, 100) for what in KERNELS if (sm, what) != (100, "keys")),
    (100, ON_100),
    *((sm, Variant(what, (64, 64))) for sm, what in ((80, "keys"), (80, "forward"), (90, "keys"), (90, "forward"))),
    *(
        (90, Variant(what, (64, 64), on="causal window documents mask bias cap dropout resume", spilled=1024))
        for what in KERNELS
    ),
    (90, Variant("keys", (192, 128))),
    (90, Variant("forward", (576, 512), on="", product="HMMA")),  # 32 rows are too few for a warp group
    (80, Variant("keys", (64, 64), F32, spilled=24)),
    (80, Variant("forward", (128, 128), F32)),
    (80, Variant("forward", (64, 64), F32, tf32=True)),
]


def _name(variant: Variant) -> str:
    kind = str(variant.dtype)[6:] + ("-tf32" if variant.tf32 else "")
    return "-".join([variant.what, *map(str, variant.dims), kind, *variant.on.split()])


@pytest.mark.parametrize(("sm", "variant"), COMPILED, ids=[f"sm{sm}-{_name(variant)}" for sm, variant in COMPILED])
def test_compiles_without_spilling_to_tensor_cores(sm: int, variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton_ahead_of_time import compile_launch

    from seqpar_kernels.kernels import triton_attention

    if not isinstance(triton_attention.attention_forward_kernel, triton.runtime.JITFunction):
        pytest.skip("TRITON_INTERPRET is set: nothing can be compiled in this process")
    launch = _launch(variant, sm, monkeypatch)
    binary = compile_launch(launch, sm)
    assert binary.spilled <= variant.spilled, f"{binary.spilled} bytes of stack"
    assert binary.shared <= (99 if sm == 80 else 227) * 1024, f"{binary.shared} bytes of shared memory"
    assert binary.tensor_memory <= 512, f"{binary.tensor_memory} columns of tensor memory"
    products = {op.split(".")[0] for op in binary.sass} & {"HMMA", "HGMMA", "UTCHMMA"}
    if variant.dtype == F32 and not variant.tf32:
        assert not products, "fp32 rounded to TF32"
    else:
        assert products == {variant.product or {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[sm]}
    if launch.options["num_stages"] > 1:
        assert "LDGSTS" in {op.split(".")[0] for op in binary.sass}, "tiles are waited for"
    assert binary.widths("LDG")[128] >= 2


@pytest.mark.parametrize("name", cases.CASES)
def test_interpreted(interpreted: Interpreted, name: str) -> None:
    failure = interpreted.failure(name)
    assert failure is None, failure


def test_the_table_divides_what_calls_are_cut_at() -> None:
    from seqpar_kernels.kernels import attention, triton_attention
    from seqpar_kernels.kernels.triton_attention_config import attention_tiles, widths

    assert attention.canonical_keys("cuda") == triton_attention.CANONICAL_KEYS
    for dtype, tf32, capability in ((BF16, False, (8, 0)), (F16, False, (8, 9)), (BF16, False, (9, 0)),
                                    (BF16, False, (10, 0)), (BF16, False, (12, 0)), (F32, False, (9, 0)),
                                    (F32, True, (8, 0))):  # fmt: skip
        for dim in (1, 16, 40, 64, 80, 128, 192, 256):
            tiles = attention_tiles(widths(dim, dim), dtype, tf32, capability)
            assert tiles is not None
            for tile in tiles:
                assert triton_attention.CANONICAL_KEYS % tile.keys == 0 and tile.rows >= 16 and tile.keys >= 16
    for dim in range(1, 600):
        wide = widths(dim, 16)
        assert dim <= wide.first + wide.second < 2 * max(dim, 16)


def test_a_device_that_has_no_kernel_says_why() -> None:
    from seqpar_kernels.kernels import attention, triton_attention

    if os.environ.get("TRITON_INTERPRET") != "1":
        assert "TRITON_INTERPRET=1" in str(triton_attention.unavailable(torch.device("cpu")))
    assert "meta" in str(triton_attention.unavailable(torch.device("meta")))
    with pytest.raises(RuntimeError, match="no attention kernel can run on meta: the compiled attention kernels"):
        attention.select_attention(torch.device("meta"))


def test_heads_without_a_kernel_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from seqpar_kernels.kernels import attention, triton_attention

    device = torch.device("cuda")
    monkeypatch.setattr(attention, "select_attention", lambda _: triton_attention)
    monkeypatch.setattr(triton_attention, "_capability", lambda _: (8, 6))
    attention.require_kernels(device, BF16, 192, 128)
    with pytest.raises(ValueError, match=r"q: expected float16, bfloat16 or float32 on cuda, got torch\.float64"):
        attention.require_kernels(device, torch.float64, 64, 64)
    with pytest.raises(
        ValueError, match=r"capability 8\.6, got 576 for queries and keys and 512 for values in torch\.bf"
    ):
        attention.require_kernels(device, BF16, 576, 512)
    monkeypatch.setattr(triton_attention, "_capability", lambda _: (9, 0))
    attention.require_kernels(device, BF16, 576, 512)
