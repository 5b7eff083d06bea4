"""A layer in parts on one device: it is the whole one, and its bytes are those that are counted elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import seqpar_kernels as sp
from bench import layer_loopback
from bench.cli import main
from bench.schema import load

SMALL = ["--rows", "32", "--hidden", "64", "--heads", "4", "--quick", "--seconds", "0.01", "--peers", "eager"]


def test_virtual_ranks_beside_the_whole_layer(tmp_path: Path) -> None:
    assert main(["layer", "--virtual-ranks", "2", "4", *SMALL, "--save", str(tmp_path)]) == 0
    rows = load(tmp_path)
    assert {row.status for row in rows} == {"ok"}
    for kind in ("gpt", "llama"):
        found = {(row.provider, row.ranks): row for row in rows if row.op == f"layer.{kind}" and row.direction == "fwd"}
        assert found.keys() == {("matmul", 1), ("eager", 1), ("ours", 1), ("ours", 2), ("ours", 4)}
        for (provider, ranks), row in found.items():
            if provider != "matmul":
                assert row.metrics["error"] <= 2
                assert row.metrics["kept_bytes"] * ranks == pytest.approx(
                    row.metrics["sbh_over_t"] * 32 * 64, abs=32 * 64 * 0.01 * ranks
                )
        # A rank keeps its share, and next to nothing on top.
        whole = found["ours", 1].metrics["kept_bytes"]
        assert all(whole / t <= found["ours", t].metrics["kept_bytes"] < 1.1 * whole / t + 4096 for t in (2, 4))
        assert found["eager", 1].metrics["kept_bytes"] > 1.5 * whole


def test_a_published_size_wants_one_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layer", "--size", "llama-8b"]) == 2
    assert "--size needs --virtual-ranks" in capsys.readouterr().err


def test_bytes_are_those_that_the_package_counts() -> None:
    layer = sp.TransformerLayer(64, 4, dropout=0.1)
    x = torch.randn(2, 16, 64, requires_grad=True)
    params = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    torch.manual_seed(0)
    y, kept, new = layer_loopback.kept(lambda: layer(x), x, params)
    assert kept == sp.activation_bytes(layer, x).total
    assert kept - x.nbytes <= new <= kept + y.nbytes
    assert layer_loopback.kept(lambda: x.exp(), x, set())[1:] == (x.nbytes, x.nbytes)  # the result is what is kept


def test_published_layers_divide_by_the_ranks_they_are_measured_on() -> None:
    for case in layer_loopback.SIZES.values():
        for ranks in (4, 8):
            assert all(size % ranks == 0 for size in (case.s, case.a, case.kv, case.f))
    llama, gpt = layer_loopback.SIZES["llama-8b"], layer_loopback.SIZES["gpt3-13b"]
    assert (llama.h, llama.a, llama.kv, llama.f, llama.s) == (4096, 32, 8, 14336, 8192)
    assert (gpt.h, gpt.a, gpt.kv, gpt.f, gpt.s) == (5120, 40, 40, 4 * 5120, 8192)
