"""Checkpoints of Transformers' ``Trainer`` that a training on several ranks goes on from.

Not imported by the package: needs Transformers and Accelerate. All else that Trainer asks for, a parallelized model
answers by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from transformers import TrainerCallback

from .conversion import conversion_of
from .state import load_sharded_optimizer_state_dict, sharded_optimizer_state_dict

_FOLDER = "sequence_parallel"


class SaveOptimizer(TrainerCallback):  # type: ignore[misc]
    """Adds optimizer, schedule and random state to each checkpoint, and takes them up when training is resumed.

    Trainer saves the optimizer of rank 0 and so refuses to save any for a model on several ranks. Give it
    ``save_only_model=True`` and this callback instead. What is written may be resumed on another number of ranks.

    Args:
        resume_from: the checkpoint that ``train(resume_from_checkpoint=...)`` is given, where that is not the one of
            its step in ``output_dir``.

    Raises:
        FileNotFoundError: training is resumed from a checkpoint that this callback had no part in.
    """

    def __init__(self, resume_from: str | Path | None = None):
        self.resume_from = resume_from
        self._random: torch.Tensor | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}", _FOLDER)
        dcp.save(self._state(**kwargs), checkpoint_id=folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        folder = Path(self.resume_from or Path(args.output_dir, f"checkpoint-{state.global_step}"), _FOLDER)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no optimizer state, which SaveOptimizer writes, for step {state.global_step}"
            )
        found = self._state(**kwargs)
        dcp.load(found, checkpoint_id=folder)
        load_sharded_optimizer_state_dict(kwargs["model"], _inner(kwargs["optimizer"]), found["optimizer"])
        kwargs["lr_scheduler"].load_state_dict(found["schedule"])
        self._random = found["random"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._random is not None:  # only now: going to the right batch has drawn numbers
            torch.set_rng_state(self._random)
            self._random = None

    @staticmethod
    def _state(model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> dict[str, Any]:
        conversion_of(model)
        return {
            "optimizer": sharded_optimizer_state_dict(model, _inner(optimizer)),
            "schedule": lr_scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """What Accelerate has wrapped."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found
