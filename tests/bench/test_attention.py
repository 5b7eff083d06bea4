"""``bench attention`` at tiny sizes: that it measures, counts, checks and reports; never how fast anything is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench import attention, attention_loopback, attention_memory, attention_providers, attention_rank, cli, links
from bench.attention_providers import AttentionCase, Provider
from bench.cli import main
from bench.schema import Row, load
from bench.session import Session
from bench.timing import Effort
from tests.world import World

BRIEF = ["--quick", "--seconds", "0.001", "--dtype", "fp32"]
SIZES = ["--seq", "32", "--heads", "4", "--head-dim", "8"]
VIRTUAL = {"ours", "ours/ring", "ours/ulysses", "ours/all_gather"}
ENGINES = {*VIRTUAL, "ours/refetch"}
HEADERS = 2048  # of gloo's messages, in all of a call


def rows_of(folder: Path) -> dict[tuple[str, str], Row]:
    return {(r.provider, r.direction): r for r in load(folder) if r.op == "attention.causal"}


def test_it_is_registered() -> None:
    args = cli.build_parser().parse_args(["attention", "--seq", "64", "128", "--window", "8"])
    assert args.command == "attention" and args.seq == [64, 128] and "attention" in cli.COMMANDS
    assert tuple(attention_providers.PEERS) == attention.PEERS
    cli.check_peers(attention.PEERS)


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Grouped heads: everybody is right, timed and counted, or absent for a reason."""
    assert main(["attention", *BRIEF, *SIZES, "--kv-heads", "2", "--save", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert {name for name, _ in rows} == {"unsharded", *ENGINES, *attention.PEERS}
    absent = {name for (name, _), row in rows.items() if row.status == "absent"}
    assert all(row.reason for row in rows.values() if row.status == "absent")
    assert not absent & {"unsharded", *ENGINES, "by-hand"} and "ring-flash-attn" in absent
    pairs = 32 * 33 // 2 * 4 * 8  # of a row and a key, by heads and features
    for (name, direction), row in rows.items():
        if row.status == "absent":
            continue
        assert row.status == "ok" and row.p20_ms <= row.p50_ms <= row.p80_ms, row
        assert {"x_ideal", "ideal_ms", "x_ideal_cpu", "cpu_ms"} <= row.metrics.keys()
        assert row.flops == pairs * (4 if direction == "fwd" else 14) // (1 if name == "unsharded" else 2)
        if name == "unsharded":
            assert row.metrics["x_ideal"] == 2
        else:
            assert row.metrics["error"] <= 2 and row.percent > 0
        if name in ENGINES and direction == "fwd+bwd":
            result, lse = 16 * 4 * 8 * 4, 16 * 4 * 4  # of a rank
            kept = row.metrics["kept_bytes"]
            assert kept == result + lse if name == "ours/refetch" else kept > result + lse
            assert row.metrics["peak_bytes"] >= row.metrics["kept_bytes"] + 2 * result  # dq, dk and dv
        if name in ENGINES and row.bytes is not None:
            assert 0 <= row.bytes - row.metrics["planned_bytes"] < HEADERS
    if rows["by-hand", "fwd"].bytes is not None:
        kv = 16 * 2 * 2 * 8 * 4  # rows of a rank, K and V, heads, features, bytes
        assert 0 <= rows["by-hand", "fwd"].bytes - kv < HEADERS
        assert rows["unsharded", "fwd+bwd"].bytes == 0
    out = capsys.readouterr().out
    assert "KiB sent" in out and "absent: ring-flash-attn in attention" in out


def test_shaped_links(tmp_path: Path) -> None:
    """With a window, whose ratio is to the faster of two ways to have no ranks."""
    reason = links.why_not()
    if reason is not None:
        pytest.skip(reason)
    options = ["--window", "5", "--layout", "contiguous", "--wire", "ratio:1", "--peers", "none"]
    assert main(["attention", *BRIEF, *SIZES, *options, "--save", str(tmp_path)]) == 0
    (link,) = [row for row in load(tmp_path) if row.op == "ceiling.link"]
    assert link.params["link"] == "ratio:1" and link.metrics["rate_mbit"] > 0
    rows = rows_of(tmp_path)
    assert {name for name, _ in rows} == {"unsharded", "ours/unsharded", *ENGINES}
    assert rows["ours", "fwd"].params["window"] == 5
    if rows["ours", "fwd"].bytes is not None:  # the wire's time is that of the rate that was set
        wire = 8e-3 * rows["ours", "fwd"].bytes / link.metrics["rate_mbit"]
        assert rows["ours", "fwd"].metrics["wire_ms"] == pytest.approx(wire, rel=0.01, abs=1e-3)


def test_packed_documents(tmp_path: Path) -> None:
    options = ["--documents", "3", "--peers", "by-hand", "torch-ring"]
    assert main(["attention", *BRIEF, *SIZES, *options, "--save", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert {name for (name, _), row in rows.items() if row.status == "ok"} == {
        "unsharded", "ours/unsharded", *ENGINES, "by-hand",
    }  # fmt: skip
    assert rows["torch-ring", "fwd"].reason == "torch's ring has no window and no documents"
    row = rows["ours", "fwd"]
    assert row.params["documents"] == 3 and row.flops == (5 * 6 + 11 * 12 + 16 * 17) // 2 * 4 * 8 * 4 // 2


@pytest.mark.parametrize("options", [[], ["--window", "7"], ["--documents", "3"]])
def test_virtual_ranks(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a GPU machine runs, on the CPU's kernels."""
    options = ["--virtual-ranks", "2", "4", "--kv-heads", "2", *options]
    assert main(["attention", *BRIEF, *SIZES, *options, "--save", str(tmp_path)]) == 0
    rows = {(r.provider, r.direction, r.ranks): r for r in load(tmp_path) if r.op == "attention.loopback"}
    names = {"unsharded", "ours/unsharded", *VIRTUAL}
    assert rows.keys() == {(n, d, t) for n in names for d in ("fwd", "fwd+bwd") for t in (2, 4)}
    for (name, _, ranks), row in rows.items():
        assert row.status == "ok", row.reason
        assert name == "unsharded" or row.metrics["error"] <= 2
        alone = name in ("unsharded", "ours/unsharded")
        assert (row.bytes is None) == alone and (row.ceiling == "matmul of squares") == alone and row.percent > 0
        if name == "ours/ulysses":
            assert row.metrics["grid"] == f"{ranks}x1" and row.metrics["engine"] == "ulysses"
    assert "attention over virtual ranks" in capsys.readouterr().out


def test_an_engine_that_is_wrong_over_virtual_ranks_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention_loopback.ours

    def spoilt(case: AttentionCase, group: Any, engine: str = "auto") -> Provider:
        made = right(case, group, engine)
        factor = 1.01 if engine == "ring" else 1.0
        return Provider(lambda *tensors: made.attend(*tensors) * factor, made.layout)

    monkeypatch.setattr(attention_loopback, "ours", spoilt)
    session = Session("attention")
    session.effort = Effort(seconds=0.001, warmup=0.001, least=2, most=2)
    attention_loopback.run(session, [CASE], ["fp32"], [2], links.parse_link("ratio:1"))
    status = {row.provider: row.status for row in session.rows}
    assert status.pop("ours/ring") == "wrong" and set(status.values()) <= {"ok", "wrong"}
    assert status["ours/ulysses"] == status["ours/all_gather"] == "ok"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--virtual-ranks", "9"], "--virtual-ranks: expected 2 or more, no more than --heads 8"),
        (["--virtual-ranks", "3", "--seq", "32"], "--seq 32: expected a multiple of 6, twice --virtual-ranks"),
        (["--ranks", "1"], "at least 2 ranks"),
        (["--seq", "34"], "--seq 34: expected a multiple of 4"),
        (["--heads", "4", "--kv-heads", "3"], "--kv-heads 3: expected a divisor of --heads 4"),
        (["--wire", "fast"], "expected a rate such as 1gbit"),
        (["--peers", "nobody"], "--peers nobody: unknown"),
    ],
)
def test_bad_input_says_what_to_do(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attention", "--quick", *options]) == 2
    assert message in capsys.readouterr().err


CASE = AttentionCase(24, 2, 1, 8, None, "zigzag")


@pytest.mark.parametrize(("window", "documents"), [(None, 1), (1, 1), (7, 1), (100, 1), (None, 3), (4, 3)])
def test_the_oracle_is_autograd_in_fp64(window: int | None, documents: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_rank, "_BLOCK", 5)
    case = dataclasses.replace(CASE, window=window, documents=documents)
    q, k, v, grad = (torch.randn(1, 24, h, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1, 2))
    mask = case.mask(torch.arange(24), torch.arange(24))
    assert mask.sum() == case.pairs()
    scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) * 8**-0.5
    y = torch.einsum("bhqk,bkd->bqhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v[:, :, 0])
    want = [y, *torch.autograd.grad(y, [q, k, v], grad)]
    for got, expected in zip(attention_rank.oracle(case, *(t.detach() for t in (q, k, v, grad))), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_memory_is_what_is_kept_and_the_most_at_one_time() -> None:
    q, k, v = (torch.randn(1, 512, 4, 16, requires_grad=True) for _ in range(3))
    size = q.nbytes

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * k).exp() + v

    # exp keeps its result; a product keeps its factors, which are given.
    kept, peak = attention_memory.kept_and_peak(attend, [q, k, v], torch.ones_like(q))
    assert kept == size and 3 * size <= peak <= 6 * size
    assert attention_memory.peak_of(lambda: torch.empty(1000, dtype=torch.uint8).add(1)) in range(2000, 2200)


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k):  # type: ignore[no-untyped-def,override]
        return k.view_as(k)

    @staticmethod
    def backward(ctx, dk):  # type: ignore[no-untyped-def,override]
        return 1.01 * dk


def _spoilt(name: str) -> attention_providers.Build:
    """Ours, done wrong in the way of that name."""

    def build(case: AttentionCase, group: dist.ProcessGroup) -> Provider:
        right = attention_providers.ours(case, group)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if name == "gradient":
                k = _WrongBackward.apply(k)
            y = right.attend(q, k, v)
            return y + 0.01 * y.detach() if name == "value" or (name == "one rank" and group.rank() == 1) else y

        if name == "layout":  # attends as if its zigzag rows were contiguous
            return Provider(attention_providers.ours(dataclasses.replace(case, layout="contiguous"), group).attend,
                            "zigzag")  # fmt: skip
        if name == "window":
            return attention_providers.ours(dataclasses.replace(case, window=None), group)
        if name == "raises":
            raise RuntimeError("no such kernel")
        return Provider(attend, case.layout)

    return build


SPOILT = {"value": "out", "gradient": "dk", "one rank": "out", "layout": "out", "window": "out"}


def _rank_of_wrong_ones(job: dict[str, Any]) -> dict[str, Any]:
    before = dict(attention_providers.PEERS)
    attention_providers.PEERS.update({name: _spoilt(name) for name in (*SPOILT, "raises")})
    try:
        return attention_rank.run(job, dist.group.WORLD, lambda text: None)
    finally:
        attention_providers.PEERS.clear()
        attention_providers.PEERS.update(before)


def test_wrong_providers_are_found_out_and_not_timed(world2: World) -> None:
    case = dataclasses.replace(CASE, window=7)
    effort = {"seconds": 0.001, "warmup": 0.001, "least": 2, "most": 2}
    job = {"case": dataclasses.asdict(case), "dtype": "fp32", "effort": effort, "calibrate": False, "link_bytes": 64,
           "peers": [*SPOILT, "raises", "by-hand", "torch-ring"]}  # fmt: skip
    answers = world2.run(_rank_of_wrong_ones, job)
    session = Session("attention")
    attention.report(session, case, "fp32", answers, "loopback", None, 64)
    rows = {row.provider: row for row in session.rows if row.direction == "fwd+bwd"}
    for name, what in SPOILT.items():
        assert rows[name].status == "wrong" and f"{what} errs" in rows[name].reason, rows[name]
        assert rows[name].p50_ms is None
    assert rows["raises"].status == "failed" and rows["raises"].reason == "RuntimeError: no such kernel"
    for name in ("unsharded", "ours/unsharded", *ENGINES, "by-hand"):
        assert rows[name].status == "ok" and rows[name].samples == 2
    # SDPA pays for a window's mask in full: the ideal is the faster of the two that need no ranks.
    fastest = min(rows[name].p50_ms or 0.0 for name in ("unsharded", "ours/unsharded"))
    assert rows["ours"].metrics["ideal_ms"] == pytest.approx(fastest / 2, abs=1e-3)
    assert rows["unsharded"].flops == 2 * rows["ours"].flops == 14 * (7 * 8 // 2 + 17 * 7) * 2 * 8
    assert rows["torch-ring"].reason == "torch's ring has no window and no documents"
    attention.show(session.rows, 2)


def _rank_that_sends(size: int) -> int | None:
    group = dist.group.WORLD
    message = torch.zeros(size, dtype=torch.uint8)

    def call() -> None:
        (dist.send if group.rank() == 0 else dist.recv)(message, 1 - group.rank())

    return attention_rank.sent_by(call, group)


def test_bytes_are_those_that_the_connections_sent(world2: World) -> None:
    if attention_rank.tcp_bytes_sent() is None and not Path("/proc/self/fd").is_dir():
        pytest.skip("no counters of connections here")
    sent = world2.run(_rank_that_sends, 100_000)
    if None in sent:
        pytest.skip("no counters of connections here")
    assert 0 <= sent[0] - 100_000 < HEADERS and sent[1] < HEADERS
