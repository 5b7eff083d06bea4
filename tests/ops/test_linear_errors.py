"""What the two linears refuse, on every rank, and ranks that disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import seqpar_kernels as sp

from ..world import RankError, World
from .test_linear import K, group, leaf


def bad_calls() -> dict[str, tuple[str, dict[str, Any], str]]:
    x, w = torch.randn(2, 4, K), torch.randn(3, K)
    return {
        "in_features": ("ag", {"weight": torch.randn(3, K + 1)}, "weight: expected in_features = 6"),
        "weight dims": ("ag", {"weight": torch.randn(K)}, r"weight: expected \[out_features, in_features\]"),
        "weight dtype": (
            "ag",
            {"weight": w.double()},
            "weight: expected the dtype of x, torch.float32, got torch.float64",
        ),
        "bias size": ("ag", {"bias": torch.randn(4)}, r"bias: expected shape \(3,\), the out_features of its weight"),
        "bias alone": ("ag", {"weight": [w, w], "bias": torch.randn(3)}, "bias: expected a sequence of 2 entries"),
        "bias count": (
            "ag",
            {"weight": [w, w], "bias": [None]},
            "bias: expected a sequence of 2 entries, .* got 1 entries",
        ),
        "no weight": ("ag", {"weight": []}, "weight: expected at least one weight"),
        "second weight": ("ag", {"weight": [w, w.half()]}, r"weight\[1\]: expected the dtype of x"),
        "chunks": ("ag", {"chunks": 0}, "chunks: expected a positive int or None, got 0"),
        "engine": ("ag", {"engine": "magic"}, "engine: expected one of"),
        "x dims": ("ag", {"x": torch.randn(K)}, r"x: expected \[..., S, ..., H\]"),
        "x dtype": ("rs", {"x": x.long()}, "x: expected float32"),
        "rs weight": ("rs", {"weight": torch.randn(3, 5)}, "weight: expected in_features = 6"),
        "bias dtype": (
            "ag",
            {"bias": torch.randn(3).double()},
            "bias: expected the dtype of its weight, torch.float32",
        ),
        "no tensor": ("ag", {"x": None}, "x: expected a tensor, got NoneType"),
        "no weight tensor": ("rs", {"weight": None}, "weight: expected a tensor, got NoneType"),
        "rs bias": ("rs", {"bias": torch.randn(1)}, "bias: expected shape"),
        "rs seq_dim": ("rs", {"seq_dim": 2}, "seq_dim: expected a dimension of x"),
    }


def bad_case(case: str) -> None:
    which, changed, message = bad_calls()[case]
    arguments: dict[str, Any] = {"x": torch.randn(2, 4, K), "weight": torch.randn(3, K), "group": group()}
    fn = sp.all_gather_linear if which == "ag" else sp.linear_reduce_scatter
    with pytest.raises(ValueError, match=message):
        fn(**{**arguments, **changed})


@pytest.mark.parametrize("op", [sp.all_gather_linear, sp.linear_reduce_scatter])
def test_a_call_like_one_that_was_right_is_checked_all_the_same(op: Callable[..., Tensor]) -> None:
    """What has been met before is looked up: by everything that the checks look at."""
    x, weight = torch.randn(1, 4, 8), torch.randn(6, 8)
    op(x, weight, group=None, main_grad=torch.zeros(6, 8), chunks=1, seq_dim=1)
    for wrong in (
        {"main_grad": torch.zeros(6, 8, requires_grad=True)},
        {"main_grad": torch.zeros(6, 8, dtype=torch.float64)},
        {"chunks": True},
        {"seq_dim": 1.0},
        {"engine": "none"},
    ):
        good = {"main_grad": torch.zeros(6, 8), "chunks": 1, "seq_dim": 1, "group": None}
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            op(x, weight, **{**good, **wrong})  # type: ignore[arg-type]
        op(x, weight, **good)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", bad_calls())
def test_bad_input_is_named_on_every_rank(world2: World, case: str) -> None:
    world2.run(bad_case, case)
    world2.run(compile_free_call)  # the group still works


def compile_free_call() -> None:
    sp.all_gather_linear(torch.randn(2, 4, K), torch.randn(3, K), group=group())


def uneven_without_length() -> None:
    x = torch.randn(2, 7, 11).tensor_split(2, 1)[group().rank()]
    sp.all_gather_linear(x, torch.randn(3, 11), group=group())


def test_uneven_shards_without_seq_len_raise_on_every_rank(world2: World) -> None:
    outcomes = world2.outcomes(uneven_without_length)
    assert [ok for ok, _ in outcomes] == [False, False]
    assert all("the ranks disagree, nothing was sent" in text for _, text in outcomes), outcomes
    world2.run(compile_free_call)


def disagreeing(what: str) -> None:
    rank = group().rank()
    x, w = torch.randn(2, 4, K), torch.randn(3, K)
    if what == "features":
        x, w = (torch.randn(2, 4, K + rank), torch.randn(3, K + rank))
    elif what == "dtype" and rank:
        x, w = x.double(), w.double()
    elif what == "batch":
        x = torch.randn(2 + rank, 4, K)
    elif what == "chunks":
        sp.all_gather_linear(x, w, group=group(), chunks=1 + rank)
    elif what == "op" and rank:
        sp.linear_reduce_scatter(x, w, group=group(), chunks=3)
    elif what == "refused" and rank:
        w = torch.randn(3, K + 1)
    sp.all_gather_linear(x, w, group=group(), chunks=3)


@pytest.mark.parametrize("what", ["features", "dtype", "batch", "chunks", "op", "refused"])
def test_ranks_that_disagree_all_raise_before_anything_is_sent(world2: World, what: str) -> None:
    with pytest.raises(RankError) as caught:
        world2.run(disagreeing, what)
    texts = [text for ok, text in caught.value.outcomes if not ok]
    assert len(texts) == 2, "one rank did not raise"
    if what == "refused":
        assert "rank 1 refused its arguments" in texts[0] and "weight: expected in_features = 6" in texts[0]
    else:
        assert all("rank 0: " in text and "rank 1: " in text and "nothing was sent" in text for text in texts)
    world2.run(compile_free_call)


def in_place_case() -> None:
    """Results are nobody's views: drop-in modules may be followed by in-place activations."""
    for g in (None, group()):
        x, w = leaf(torch.randn(2, 4, K)), leaf(torch.randn(K, K))
        results = [
            sp.all_gather_linear(x, w, group=g),
            sp.linear_reduce_scatter(x, w, group=g),
            sp.dropout_add_rms_norm(x, x, None, group=g),
            sp.dropout_add(x, p=0.5, group=g),
        ]
        if g is not None:
            results += [sp.gather_sequence(x, g), sp.reduce_scatter_sequence(x, g)]
            results.append(sp.reduce_from_tensor_parallel(x, g))
        for y in results:
            y.relu_().sum().backward()


def test_results_may_be_modified_in_place(world2: World) -> None:
    world2.run(in_place_case)


def one_sided_case() -> None:
    """A rank that fails alone and goes on does not spoil the group."""
    g = group()
    if g.rank() == 0:
        with pytest.raises(ValueError, match="weight: expected shape"):
            sp.dropout_add_layer_norm(torch.randn(2, 4, K), None, torch.ones(K + 1), group=g)
    for features in (17, 18, 19):
        sp.all_gather_linear(torch.randn(2, 4, features), torch.randn(3, features), group=g)


def test_a_handled_error_on_one_rank_does_not_spoil_the_group(world2: World) -> None:
    world2.run(one_sided_case)


def uneven_dropout_case() -> None:
    x = torch.randn(2, 7, 3, 23).tensor_split(2, 1)[group().rank()]
    sp.dropout_add(x, p=0.5, group=group(), seq_dim=1)


def test_uneven_dropout_without_seq_len_raises_on_every_rank(world2: World) -> None:
    outcomes = world2.outcomes(uneven_dropout_case)
    assert all(not ok and "the ranks disagree" in text for ok, text in outcomes), outcomes


def refused_alone_case() -> None:
    x = torch.ones(2, 4, 29, dtype=torch.int32 if group().rank() == 0 else torch.float32)
    sp.gather_sequence(x, group())


def test_a_refusal_by_one_rank_reaches_the_other(world2: World) -> None:
    (_, first), (ok, second) = world2.outcomes(refused_alone_case)
    assert "x: expected float32" in first
    assert not ok and ("rank 0 refused its arguments" in second), second
