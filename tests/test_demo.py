"""``make demo`` on models of a second: it agrees with itself, leaves what it promises, and fails when it should."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run_demo(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, EXAMPLES / "demo.py", "--tiny", "--device", "cpu", *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=280)


def test_runs_agree_and_leave_table_picture_and_numbers(tmp_path: Path) -> None:
    done = run_demo("--ranks", "2", "--steps", "3", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The runs agree." in done.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "c_proj" in (tmp_path / "explain.txt").read_text()
    models = json.loads((tmp_path / "demo.json").read_text())["models"]
    assert [model["model"] for model in models] == ["GPT-2", "Llama"]
    for model in models:
        assert len(model["losses"]) == len(model["sharded_losses"]) == 3
        assert model["largest_loss_difference"] == max(model["loss_differences"]) <= 1e-5
        assert max(model["sharded_activation_bytes"]) < 0.6 * model["activation_bytes"]


def test_a_rank_that_fails_ends_the_demo_with_its_traceback(tmp_path: Path) -> None:
    """Four ranks cannot share the tiny models' six heads."""
    done = run_demo("--ranks", "4", "--steps", "2", "--out", tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "expected a multiple of the 4 ranks" in done.stderr


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    return demo


def outcome(loss: float = 2.0, gradient: float = 1.0, plain_gradient: float = 1.0) -> dict[str, Any]:
    """What a rank reports; the plain fp32 gradient is 1e-7 off the fp64 one, so 2e-7 is the limit."""

    def part(loss: float, gradient: float) -> dict[str, Any]:
        gradients = {"weight": torch.full((4,), gradient, dtype=torch.float64)}
        return {"losses": [3.0, loss], "gradients": gradients, "step_ms": 1.0}

    return {
        "fp32": part(2.0, 1.0 + 1e-7),
        "fp64": part(2.0, 1.0),
        "check": part(2.0, plain_gradient),
        "train": part(loss, gradient),
        "parameters": 4,
        "activation_bytes": 8,
    }


@pytest.mark.parametrize(
    ("theirs", "complaint"),
    [
        (outcome(), None),
        (outcome(loss=2.0 * (1 + 0.9e-5), gradient=1 + 1.9e-7), None),
        (outcome(loss=2.0 * (1 + 1.1e-5)), "the losses of the two runs differ"),
        (outcome(loss=float("nan")), "the losses of the two runs differ"),
        (outcome(gradient=1 + 2.1e-7), "the gradients of the two runs differ"),
        (outcome(plain_gradient=1 + 2.1e-7), "a gradient differs from plain Hugging Face's"),
    ],
)
def test_verdict(demo: ModuleType, theirs: dict[str, Any], complaint: str | None) -> None:
    failures = demo.compare("GPT-2", outcome(), [theirs]).failures
    if complaint is None:
        assert failures == []
    else:
        assert complaint in failures[0]


def test_nan_is_never_the_smaller_number(demo: ModuleType) -> None:
    nan = float("nan")
    assert all(value != value for value in (demo.worst([1.0, nan]), demo.worst([nan, 1.0])))
    a, b = {"x": torch.ones(1), "y": torch.tensor([nan]), "z": torch.ones(1)}, dict.fromkeys("xyz", torch.zeros(1))
    difference, name = demo.relative_difference(a, b)
    assert difference != difference
    assert name == "y"


def test_ranks_that_report_different_losses_fail(demo: ModuleType) -> None:
    failures = demo.compare("GPT-2", outcome(), [outcome(), outcome(loss=2.0000001)]).failures
    assert failures == ["GPT-2: the ranks report different losses"]
