"""``bench moe`` at tiny sizes: that it measures, counts, checks and reports; never how fast anything is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bench import cli, links, moe, moe_grouped, moe_providers, moe_rank
from bench.cli import main
from bench.moe_providers import MoeCase, Provider
from bench.schema import Row, load
from bench.session import Session
from tests.world import World

BRIEF = ["--quick", "--seconds", "0.001", "--dtype", "fp32"]
SIZES = ["--tokens", "64", "--experts", "4x2", "--hidden", "16", "--inner", "24"]
OURS = {"ours", "ours/ep", "ours/tp"}
HEADERS = 4096  # of gloo's messages, in all of a call


def rows_of(folder: Path, op: str = "moe.experts") -> dict[tuple[str, str], Row]:
    return {(r.provider, r.direction): r for r in load(folder) if r.op == op}


def test_it_is_registered() -> None:
    args = cli.build_parser().parse_args(["moe", "--tokens", "64", "--experts", "8x2", "64x6", "--ranks", "2", "4"])
    assert args.command == "moe" and args.ranks == [2, 4] and "moe" in cli.COMMANDS
    assert (*moe_providers.PEERS, moe_grouped.TORCH) == moe.PEERS
    cli.check_peers(moe.PEERS)
    found = moe.cases(args, False)
    assert found[4] == [MoeCase(64, 8, 2, 512, 1792), MoeCase(64, 64, 6, 512, 352)]


def test_smoke(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everybody is right, timed and counted, or absent for a reason."""
    assert main(["moe", *BRIEF, *SIZES, "--save", str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert {name for name, _ in rows} == {"unsharded", "ours/unsharded", *OURS, *moe_providers.PEERS}
    absent = {name for (name, _), row in rows.items() if row.status == "absent"}
    assert all(row.reason for row in rows.values() if row.status == "absent") and absent <= {"transformers"}
    for (name, direction), row in rows.items():
        if row.status == "absent":
            continue
        assert row.status == "ok" and row.p20_ms <= row.p50_ms <= row.p80_ms, row
        assert {"x_ideal", "ideal_ms", "x_ideal_cpu", "cpu_ms"} <= row.metrics.keys()
        flops = 6 * 64 * 2 * 16 * 24 * (1 if direction == "fwd" else 3)
        if name.endswith("unsharded"):
            assert row.flops == flops
        else:
            assert row.flops == flops // 2 and row.metrics["error"] > 0 and row.metrics["kept_bytes"] > 0
            assert row.percent > 0 and row.metrics["x_floor"] > 0
        if name in OURS and row.bytes is not None:
            assert 0 <= row.bytes - row.metrics["planned_bytes"] < HEADERS
    assert rows["ours", "fwd"].metrics["experts"] == rows["ours/ep", "fwd"].metrics["experts"] == "ep"
    if rows["all-gather", "fwd"].bytes is not None:
        assert rows["all-gather", "fwd"].bytes >= 2 * 32 * 16 * 4  # rows of a rank there, their sums back
        assert rows["unsharded", "fwd+bwd"].bytes == 0
    kept = {name: row.metrics.get("kept_bytes") for (name, _), row in rows.items()}
    if kept["transformers"] is not None:
        assert kept["ours"] <= 0.6 * kept["transformers"]
    grouped = rows_of(tmp_path, "moe.grouped_matmul")
    assert {row.status for row in grouped.values()} == {"ok"} and len(grouped) == 4
    assert grouped["ours", "fwd+bwd"].flops == 3 * 2 * 128 * 16 * 48
    out = capsys.readouterr().out
    assert "KiB sent" in out and "KiB kept" in out and "experts by tp" in out


def test_shaped_links(tmp_path: Path) -> None:
    reason = links.why_not()
    if reason is not None:
        pytest.skip(reason)
    options = ["--wire", "ratio:1", "--peers", "by-hand", "--save", str(tmp_path)]
    assert main(["moe", *BRIEF, *SIZES, *options]) == 0
    (link,) = [row for row in load(tmp_path) if row.op == "ceiling.link"]
    assert link.params["link"] == "ratio:1" and link.metrics["rate_mbit"] > 0
    rows = rows_of(tmp_path)
    assert {name for name, _ in rows} == {"unsharded", "ours/unsharded", *OURS, "by-hand"}
    if rows["ours", "fwd"].bytes is not None:  # the wire's time is that of the rate that was set
        wire = 8e-3 * rows["ours", "fwd"].bytes / link.metrics["rate_mbit"]
        assert rows["ours", "fwd"].metrics["wire_ms"] == pytest.approx(wire, rel=0.01, abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "1"], "at least 2 ranks"),
        (["--tokens", "33"], "--tokens 33: expected a multiple of --ranks 2"),
        (["--experts", "7x2"], "--experts 7: expected a multiple of --ranks 2"),
        (["--experts", "8x9"], "--experts 8x9: expected experts x experts of a token"),
        (["--hidden", "12"], "expected multiples of 8"),
        (["--wire", "fast"], "expected a rate such as 1gbit"),
        (["--peers", "nobody"], "--peers nobody: unknown"),
    ],
)
def test_bad_input_says_what_to_do(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["moe", "--quick", *options]) == 2
    assert message in capsys.readouterr().err


CASE = MoeCase(24, 4, 2, 16, 8)


def _rank_of_oracle(case: MoeCase) -> list[Tensor]:
    return moe_rank.oracle(moe_rank.Inputs(case, torch.float32, dist.group.WORLD))


def test_the_oracle_is_each_token_by_itself_in_fp64(world2: World) -> None:
    got = world2.run(_rank_of_oracle, CASE)[0]
    inputs = moe_rank.Inputs(CASE, torch.float32, None)
    x, weights, w1, w2 = leaves = [
        getattr(inputs, name).double().requires_grad_() for name in ("x", "weights", "w1", "w2")
    ]
    rows = []
    for token, (chosen, share) in enumerate(zip(inputs.index.tolist(), weights, strict=True)):
        halves = [(w1[e] @ x[token]).chunk(2) for e in chosen]
        made = [w2[e] @ (F.silu(gate) * up) for e, (gate, up) in zip(chosen, halves, strict=True)]
        rows.append(sum(part * y for part, y in zip(share, made, strict=True)))
    out = torch.stack(rows)
    want = [out.detach(), *torch.autograd.grad(out, leaves, inputs.grad.double())]
    for mine, expected in zip(got, want, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)


def _spoilt(name: str) -> moe_providers.Build:
    """Ours, done wrong in the way of that name."""

    def build(case: MoeCase, group: dist.ProcessGroup) -> Provider:
        if name == "raises":
            raise RuntimeError("no such kernel")
        right = moe_providers.ours(case, group)

        def run(x: Tensor, index: Tensor, weights: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
            if name == "no routing gradient":
                weights = weights + 0 * weights.sum() - 0.5 * (weights - weights.detach())
            if name == "half the experts' gradient":
                w1 = 0.5 * w1 + 0.5 * w1.detach()
            y = right.run(x, index, weights, w1, w2)
            return y + 0.01 * y.detach() if name == "value" or (name == "one rank" and group.rank() == 1) else y

        return dataclasses.replace(right, run=run)

    return build


SPOILT = {"value": "out", "one rank": "out", "no routing gradient": "dweights", "half the experts' gradient": "dw1"}


def _rank_of_wrong_ones(job: dict[str, Any]) -> dict[str, Any]:
    before = dict(moe_providers.PEERS)
    moe_providers.PEERS.update({name: _spoilt(name) for name in (*SPOILT, "raises")})
    try:
        return moe_rank.run(job, dist.group.WORLD, lambda text: None)
    finally:
        moe_providers.PEERS.clear()
        moe_providers.PEERS.update(before)


def test_wrong_providers_are_found_out_and_not_timed(world2: World) -> None:
    effort = {"seconds": 0.001, "warmup": 0.001, "least": 2, "most": 2}
    job = {"case": dataclasses.asdict(CASE), "dtype": "fp32", "effort": effort, "calibrate": False, "link_bytes": 64,
           "peers": [*SPOILT, "raises", "by-hand", "all-gather"]}  # fmt: skip
    answers = world2.run(_rank_of_wrong_ones, job)
    session = Session("moe")
    moe.report(session, CASE, "fp32", answers, "loopback", None, 64)
    rows = {row.provider: row for row in session.rows if row.direction == "fwd+bwd"}
    for name, what in SPOILT.items():
        assert rows[name].status == "wrong" and f"{what} errs" in rows[name].reason, rows[name]
        assert rows[name].p50_ms is None
    assert rows["raises"].status == "failed" and rows["raises"].reason == "RuntimeError: no such kernel"
    for name in ("unsharded", "ours/unsharded", *OURS, "by-hand", "all-gather"):
        assert rows[name].status == "ok" and rows[name].samples == 2
    fastest = min(rows[name].p50_ms or 0.0 for name in ("unsharded", "ours/unsharded"))
    assert rows["ours"].metrics["ideal_ms"] == pytest.approx(fastest / 2, abs=1e-3)
    moe.show(session.rows, 2)


def _rank_of_kept(case: MoeCase) -> dict[str, int]:
    group = dist.group.WORLD
    inputs = moe_rank.Inputs(case, torch.bfloat16, group)
    builds = {"ours": moe_providers.ours, "transformers": moe_providers.transformers}
    return {name: moe_rank.kept_by(build(case, group), inputs) for name, build in builds.items()}


def test_ours_keeps_less_than_transformers(world2: World) -> None:
    """A layer of Mixtral's proportions; Transformers' expert parallelism, 60 % of it at most."""
    pytest.importorskip("transformers.distributed.tensor_parallel")
    for kept in world2.run(_rank_of_kept, MoeCase(128, 8, 2, 32, 112)):
        assert kept["ours"] <= 0.6 * kept["transformers"], kept


def test_a_wrong_grouped_matmul_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> list[Tensor]:
        y, *rest = moe_grouped.torchs(*args)
        return [1.01 * y, *rest]

    monkeypatch.setitem(moe_grouped.PROVIDERS, moe_grouped.TORCH, wrong)
    session = Session("moe")
    session.effort = dataclasses.replace(session.effort, seconds=0.001, warmup=0.001, least=2, most=2)
    rows = {row.provider: row for row in moe_grouped.run(session, [CASE], ["fp32"])}
    assert rows["ours"].status == "ok"
    assert rows[moe_grouped.TORCH].status == "wrong" and "y errs" in rows[moe_grouped.TORCH].reason
