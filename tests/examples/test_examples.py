"""The training examples on gloo ranks give the losses of one, resumed or not, and a checkpoint of plain models.

On two ranks, and on four as two data-parallel times two tensor-parallel ones.
"""

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


def run(name: str, ranks: int, out: Path, *options: str) -> dict[str, list[float]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    environment["PYTHONFAULTHANDLER"] = "1"  # a process that aborts at its end says in which thread
    environment["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launch, str(EXAMPLES / f"train_{name}.py"), "--out", str(out), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, list[float]] = json.loads((out / "losses.json").read_text())
    return found


def on_one_and(ranks: int, name: str, folder: Path, *options: str) -> tuple[dict[str, Any], ...]:
    """What one rank and ``ranks`` give: the same losses, and the same checkpoint where they write one."""
    with ThreadPoolExecutor(2) as pool:
        one, several = pool.map(lambda n: run(name, n, folder / str(n), *options), (1, ranks))
    assert one.keys() == several.keys()
    for key, losses in one.items():
        assert len(losses) > 1 and len(set(losses)) > 1, f"{key}: {losses}"
        torch.testing.assert_close(torch.tensor(several[key]), torch.tensor(losses), rtol=LIMIT, atol=0, msg=key)
    if name != "megatron":
        assert_same_checkpoints(folder / "1", folder / str(ranks))
    return one, several


def assert_same_checkpoints(*folders: Path) -> None:
    """As a model without any of this loads them."""
    from transformers import AutoModelForCausalLM

    one, other = (AutoModelForCausalLM.from_pretrained(folder / "final") for folder in folders)
    assert type(one) is type(other)
    shapes, others = ({name: param.shape for name, param in model.named_parameters()} for model in (one, other))
    assert shapes == others
    ids = torch.randint(64, (8, 24), generator=torch.Generator().manual_seed(9))
    # Of what they compute: AdamW moves a weight whose gradient is nothing but rounding by a whole step.
    expected, got = (model.eval()(input_ids=ids, labels=ids).loss.item() for model in (one, other))
    assert abs(got - expected) <= 2 * LIMIT * expected, (got, expected)


def test_loop(tmp_path: Path) -> None:
    for result in on_one_and(2, "loop", tmp_path):
        assert result["resumed_loss"] == result["loss"]


TWO_BY_TWO = ("--tensor-parallel", "2")


@pytest.mark.parametrize("ranks", [2, 4])
def test_trainer(tmp_path: Path, ranks: int) -> None:
    pytest.importorskip("accelerate", reason="Transformers' Trainer needs accelerate")
    options = (*TWO_BY_TWO, "--dropout", "0") if ranks == 4 else ()
    for result in on_one_and(ranks, "trainer", tmp_path, *options):
        assert result["resumed_loss"] == result["loss"]
        assert len(result["eval_loss"]) == 2


@pytest.mark.parametrize("ranks", [2, 4])
def test_accelerate(tmp_path: Path, ranks: int) -> None:
    pytest.importorskip("accelerate")
    on_one_and(ranks, "accelerate", tmp_path, *(TWO_BY_TWO if ranks == 4 else ()))


def test_megatron(tmp_path: Path) -> None:
    on_one_and(2, "megatron", tmp_path)
