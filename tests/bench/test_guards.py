"""``bench guards``: every guard beside its absence, on the same ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import guards, guards_models
from bench.cli import main
from bench.schema import load
from examples import demo_run

HERE = guards.here()


def test_the_cost_is_that_of_a_round() -> None:
    """Half of the rounds met a machine twice as slow: the difference within a round is what counts."""
    without = [100.0] * 6 + [200.0] * 5
    every = [time + 3.0 for time in without]
    assert guards._cost(every, without) == (3.0, 3.0, 3.0)
    assert guards._cost([99.0], [100.0]) == (-1.0, -1.0, -1.0)


@pytest.mark.parametrize("name", list(guards.MODELS.values()))
def test_the_models_are_those_of_the_demo(name: str) -> None:
    sizes = guards_models.Sizes(2, 16, 96, 1)
    job = demo_run.Job(1, 0, *sizes, device="cpu", folder="")
    ids = guards_models.batch(sizes, "cpu")
    assert torch.equal(ids, demo_run.batch(job, 0))
    ours = guards_models.build_model(name, sizes, "cpu")
    theirs = demo_run.build_model(name, job, demo_run.DROPOUT)
    assert ours.config.to_dict() == theirs.config.to_dict()
    for (key, got), (_, expected) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(got, expected), key
    assert (guards_models.SEED, guards_models.LEARNING_RATE) == (demo_run.SEED, demo_run.LEARNING_RATE)


def test_unknown_models_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["guards", "--model", "t5"])
    assert "invalid choice: 't5'" in capsys.readouterr().err


@pytest.mark.skipif(bool(HERE), reason="this version has guards")
def test_without_a_guard_there_is_nothing_to_measure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guards", "--quick"]) == 2
    assert "has no guard" in capsys.readouterr().err


@pytest.mark.skipif(not HERE, reason="this version has no guard that can be switched off")
def test_every_guard_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["guards", "--quick", "--seconds", "0.01", "--model", "llama", "--save", str(tmp_path)]) == 0
    rows = {row.provider: row for row in load(tmp_path)}
    assert len(rows) == 1 + len(HERE) + (len(HERE) > 1) and all(row.status == "ok" for row in rows.values())
    for name, row in rows.items():
        assert (row.op, row.direction, row.ranks, row.samples) == ("guards.llama", "step", 2, rows["ours"].samples)
        assert ("cpu_percent" in row.metrics) == (name != "ours") and not row.is_peer()
    printed = capsys.readouterr().out
    assert printed.count("% of a step") == len(rows) - 1
