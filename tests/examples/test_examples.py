"""The training examples on two gloo ranks give the losses of one, resumed or not, and a checkpoint of plain models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT = 1e-5


def run(name: str, ranks: int, out: Path) -> dict[str, list[float]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launch, str(EXAMPLES / f"train_{name}.py"), "--out", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, list[float]] = json.loads((out / "losses.json").read_text())
    return found


def on_one_and_two(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda ranks: run(name, ranks, folder / str(ranks)), (1, 2))
    assert one.keys() == two.keys()
    for key, losses in one.items():
        assert len(losses) > 1 and len(set(losses)) > 1, f"{key}: {losses}"
        torch.testing.assert_close(torch.tensor(two[key]), torch.tensor(losses), rtol=LIMIT, atol=0, msg=key)
    return one, two


def assert_same_checkpoints(folder: Path) -> None:
    """Those that one and two ranks wrote, as a model without any of this loads them."""
    from transformers import AutoModelForCausalLM

    one, two = (AutoModelForCausalLM.from_pretrained(folder / ranks / "final") for ranks in "12")
    assert [(name, p.shape) for name, p in one.named_parameters()] == [(n, p.shape) for n, p in two.named_parameters()]
    ids = torch.randint(64, (8, 24), generator=torch.Generator().manual_seed(9))
    # Of what they compute: AdamW moves a weight whose gradient is nothing but rounding by a whole step.
    expected, got = (model.eval()(input_ids=ids, labels=ids).loss.item() for model in (one, two))
    assert abs(got - expected) <= 2 * LIMIT * expected, (got, expected)


def test_loop(tmp_path: Path) -> None:
    for result in on_one_and_two("loop", tmp_path):
        assert result["resumed_loss"] == result["loss"]
    assert_same_checkpoints(tmp_path)


def test_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate")
    for result in on_one_and_two("trainer", tmp_path):
        assert result["resumed_loss"] == result["loss"]
        assert len(result["eval_loss"]) == 2
    assert_same_checkpoints(tmp_path)


def test_accelerate(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    on_one_and_two("accelerate", tmp_path)
    assert_same_checkpoints(tmp_path)


def test_megatron(tmp_path: Path) -> None:
    on_one_and_two("megatron", tmp_path)
