"""explain says what ran and why; SEQPAR_STRICT turns what runs slower than it could into an error."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

import seqpar_kernels as sp
from seqpar_kernels import kernels
from seqpar_kernels.overlap.planner import Work, estimate
from seqpar_kernels.overlap.tuning import profile_of

from ..world import World
from .test_parallelize import MODELS


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def explained(kind: str) -> sp.convert.Explanation:
    """The demo's models, after a training step."""
    torch.manual_seed(0)
    model = sp.parallelize(MODELS[kind](), group())
    ids = torch.randint(50, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    return sp.explain(model)


@pytest.mark.parametrize("kind", MODELS)
def test_no_layer_is_unfused_without_a_reason(world2: World, kind: str) -> None:
    tables = world2.run(explained, kind)
    assert tables[0].rows == tables[1].rows
    for row in tables[0].rows:
        assert row.why, row
        assert row.fused in ("yes", "no", "norm only", ""), row
        if row.style.startswith(("colwise", "rowwise")):
            assert row.engine == "single" and "size floor" in row.why and not row.slower, row
    assert "planned with " in str(tables[0])


def columns_case() -> tuple[Any, str, Any]:
    model = sp.parallelize(MODELS["llama"](), group(), engine="p2p")
    ids = torch.randint(50, (2, 16))
    model(input_ids=ids, labels=ids)
    table = sp.explain(model)
    # q, k and v: [32, 32], [16, 32] and [16, 32] of the whole layer, half of each here
    work = Work(2, 8, 2 * 2 * 16 * 32 * 32, 32 * 32 * 4, 2 * 8 * 32 * 4, torch.float32, 2)
    chunks = int(next(row for row in table.rows if row.module == "model.layers.0.self_attn.q_proj").chunks)
    return {row.module: row for row in table.rows}, str(table), estimate(chunks, work, profile_of(group())["cpu"])


def test_bytes_and_estimate_of_every_call_site(world2: World) -> None:
    for rows, text, expected in world2.run(columns_case):
        q, k, o = (rows[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj", "o_proj"))
        assert (q.engine, q.fused, q.wire) == ("p2p", "yes", "2.0 KiB")  # [2, 8, 32] fp32 to one peer
        assert (k.wire, k.model) == ("", "")  # the gather is q's
        assert o.wire == "2.0 KiB"
        assert q.model == str(expected)
        assert q.model in " ".join(text.split()) and "wire/forward" in text


# --- the table -------------------------------------------------------------------------------------------------------


def row(module: str, **cells: Any) -> sp.convert.Row:
    return sp.convert.Row(module, "colwise", "single", "1", "no", cells.pop("why", "below the size floor"), **cells)


def names_of(*modules: str) -> list[str]:
    return [r.module for r in sp.convert.Explanation("", tuple(map(row, modules))).grouped()]


def test_equal_layers_are_one_row() -> None:
    assert names_of("h.0.q", "h.0.k", "h.1.q", "h.1.k", "h.2.q", "h.2.k") == ["h.0..2.q", "h.0..2.k"]
    assert names_of("h.0.q", "h.2.q", "h.4.q", "h.5.q", "h.6.q") == ["h.0,2,4..6.q"]
    experts = [f"layers.{layer}.experts.{e}.up" for layer in range(3) for e in range(12)]
    assert names_of(*experts) == ["layers.0..2.experts.0..11.up"]
    assert names_of(*experts[:-1]) == experts[:-1]  # not all combinations
    assert names_of("0.q", "1.q", "w2.q", "head") == ["0,1.q", "w2.q", "head"]
    assert names_of("h.0.q") == ["h.0.q"]


def test_layers_that_differ_are_rows_of_their_own() -> None:
    rows = (row("h.0.q"), row("h.1.q", wire="2 KiB"), row("h.2.q"), row("h.3.q", why="another"))
    table = sp.convert.Explanation("", rows)
    assert [r.module for r in table.grouped()] == ["h.0,2.q", "h.1.q", "h.3.q"]
    assert table.rows == rows


def test_text_has_120_columns() -> None:
    names = ["model.a_long_name_" * 5 + f".layers.{i}.attention.{'q' * 40}" for i in range(3)]
    rows = tuple(row(name, why="a reason that goes on " * 20, model="matmul 1") for name in names)
    text = str(sp.convert.Explanation("Title " * 40 + "\nsecond line", rows))
    assert max(map(len, text.splitlines())) <= 120
    assert "layers.0..2.attention" in text.replace(" ", "").replace("\n", "")
    assert text.count("a reason that goes on") >= 15 and "; model: matmul 1" in " ".join(text.split())


def test_plain_values_and_html() -> None:
    table = sp.convert.Explanation(
        "a < b\nplanned", (row("h.0.q", why="x & y"), row("h.1.q", why="x & y", slower=True))
    )
    values = json.loads(json.dumps(table.to_dict()))
    assert values["title"] == "a < b\nplanned" and [r["module"] for r in values["rows"]] == ["h.0.q", "h.1.q"]
    assert values["rows"][1]["slower"] is True and values["rows"][0]["why"] == "x & y"
    page = table._repr_html_()
    assert page.startswith("<table><caption>a &lt; b<br>planned</caption>") and "<td>x &amp; y</td>" in page


# --- strict ----------------------------------------------------------------------------------------------------------


def strict_model(kind: str, multiplied: bool) -> str:
    os.environ["SEQPAR_STRICT"] = "1"
    try:
        model = sp.parallelize(MODELS[kind](), group())
        ids = torch.randint(50, (2, 16))
        if multiplied:  # a sum that is multiplied does not wait for the norm
            model.get_submodule("transformer.h.0.mlp").register_forward_hook(lambda module, args, output: output * 1.0)
        else:  # whatever has something before it goes into one kernel with it
            model(input_ids=ids, labels=ids).loss.backward()
            model.eval()(input_ids=ids)
            assert not any(row.slower for row in sp.explain(model).rows)
            return ""
        with pytest.raises(RuntimeError, match=r"SEQPAR_STRICT=1: .* modules that run unfused") as e:
            model(input_ids=ids, labels=ids)
        slower = [row.module for row in sp.explain(model).rows if row.slower]
        assert slower == ["transformer.h.0.mlp.dropout", "transformer.h.1.ln_1"]
        assert all(f"\n  {name} (" in str(e.value) for name in slower) and f"has {len(slower)} modules" in str(e.value)
        model(input_ids=ids, labels=ids).loss.backward()  # said once
        with pytest.raises(RuntimeError, match="SEQPAR_STRICT=1"):
            model.eval()(input_ids=ids)
        return str(e.value)
    finally:
        del os.environ["SEQPAR_STRICT"]


@pytest.mark.parametrize(("kind", "multiplied"), [("gpt2", False), ("llama", False), ("gpt2", True)])
def test_strict_refuses_what_explain_marks_on_every_rank_alike(world2: World, kind: str, multiplied: bool) -> None:
    first, second = world2.run(strict_model, kind, multiplied)
    assert first == second and bool(first) == multiplied


def strict_call() -> None:
    """Below the size floor, asked-for engines, asked-for backends: all fine."""
    os.environ["SEQPAR_STRICT"] = "1"
    try:
        x, w = torch.randn(2, 4, 6), torch.randn(3, 6)
        sp.all_gather_linear(x, w, group=group())
        sp.all_gather_linear(x, w, group=group(), engine="single")
        sp.linear_reduce_scatter(x, w, group=group(), chunks=2)
        sp.dropout_add_rms_norm(x, x, torch.ones(6), group=group())
        sp.dropout_add_rms_norm(x, x, torch.ones(6), group=group(), backend="reference")
    finally:
        del os.environ["SEQPAR_STRICT"]


def test_strict_lets_pass_what_is_best_or_asked_for(world2: World) -> None:
    world2.run(strict_call)


def split_gather() -> None:
    """q and k share a gather, and get different tensors."""
    from seqpar_kernels.nn.linear import SharedGather

    q, k = (sp.ColumnParallelLinear(6, 4, group=group()) for _ in range(2))
    q.shared_gather = k.shared_gather = SharedGather([q, k])
    x = torch.randn(2, 4, 6)
    q(x), k(x)
    q(x), k(x.clone())  # allowed, seen by nobody
    q.shared_gather.clear()
    os.environ["SEQPAR_STRICT"] = "1"
    try:
        q(x), k(x)
        q(x)
        with pytest.raises(RuntimeError, match=r"SEQPAR_STRICT=1: all_gather_linear on \(2, 4, 6\): .* another tensor"):
            k(x.clone())
    finally:
        del os.environ["SEQPAR_STRICT"]


def test_strict_refuses_a_gather_that_is_not_shared(world2: World) -> None:
    world2.run(split_gather)


def test_strict_refuses_a_backend_that_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(kernels, "choice", lambda device: ("reference", {"native": "it was not built"}))
    kernels._select.cache_clear()
    assert kernels.select(None, cpu) is kernels.select("reference", cpu)
    kernels._select.cache_clear()
    monkeypatch.setenv("SEQPAR_STRICT", "1")
    try:
        with pytest.raises(RuntimeError, match="kernels on cpu are reference's: not native: it was not built"):
            kernels.select(None, cpu)
        assert kernels.select("reference", cpu)
    finally:
        kernels._select.cache_clear()
