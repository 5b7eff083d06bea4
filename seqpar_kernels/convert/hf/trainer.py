"""Transformers' ``Trainer`` on a model that several ranks share: its configuration, and checkpoints to resume from.

The package does not import this module, because it needs Transformers and Accelerate.
"""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import TrainerCallback

from ..conversion import conversion_of
from ..state import load_sharded_optimizer_state_dict, sharded_optimizer_state_dict
from .accelerate import parallelism_config

__all__ = ["SaveOptimizer", "parallelism_config"]

_FOLDER = "sequence_parallel"
_RANDOM = "random"


class SaveOptimizer(TrainerCallback):
    """Adds optimizer, schedule and random state to each checkpoint, and loads them when training is resumed.

    Trainer saves the optimizer of rank 0 only, so it refuses to save one for a model on several ranks. Give it
    ``save_only_model=True`` and this callback instead. Training may be resumed on another number of ranks.

    Args:
        resume_from: the checkpoint given to ``train(resume_from_checkpoint=...)``, if it is not the one of its step in
            ``output_dir``.

    Raises:
        FileNotFoundError: training is resumed from a checkpoint that this callback did not write.
    """

    def __init__(self, resume_from: str | Path | None = None):
        self.resume_from = resume_from
        self._random: bytes | None = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}", _FOLDER)
        found = self._state(**kwargs)
        # One state for each data-parallel rank: the ranks of one batch have the same.
        found[_RANDOM] = {str(_data_parallel_rank(kwargs["model"])): _random_state(args.device)}
        dcp.save(found, checkpoint_id=folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            return
        folder = Path(self.resume_from or Path(args.output_dir, f"checkpoint-{state.global_step}"), _FOLDER)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no optimizer state, which SaveOptimizer writes, for step {state.global_step}"
            )
        found = self._state(**kwargs)
        saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        sources = sum(name.startswith(f"{_RANDOM}.") for name in saved)
        source = str(_data_parallel_rank(kwargs["model"]) % sources)
        found[_RANDOM] = {source: b""}
        dcp.load(found, checkpoint_id=folder)
        load_sharded_optimizer_state_dict(kwargs["model"], _inner(kwargs["optimizer"]), found["optimizer"])
        kwargs["lr_scheduler"].load_state_dict(found["schedule"])
        self._random = found[_RANDOM][source]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if float(state.epoch).is_integer():  # inside an epoch, skipping to the right batch draws first
            self._restore_random(args.device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._restore_random(args.device)

    def _restore_random(self, device: torch.device) -> None:
        if self._random is not None:
            _set_random_state(self._random, device)
            self._random = None

    @staticmethod
    def _state(model: Any, optimizer: Any, lr_scheduler: Any, **_: Any) -> dict[str, Any]:
        conversion_of(model)
        return {
            "optimizer": sharded_optimizer_state_dict(model, _inner(optimizer)),
            "schedule": lr_scheduler.state_dict(),
        }


def _data_parallel_rank(model: Any) -> int:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return rank // conversion_of(model).batch_ranks


def _random_state(device: torch.device) -> bytes:
    states = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return pickle.dumps(states)


def _set_random_state(saved: bytes, device: torch.device) -> None:
    states = pickle.loads(saved)
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"], device)


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that Accelerate has wrapped."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found
