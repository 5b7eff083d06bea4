"""Recognises dropout that is called as a function."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_DROPOUTS = frozenset(
    {
        nn.functional.dropout,
        nn.functional.dropout1d,
        nn.functional.dropout2d,
        nn.functional.dropout3d,
        nn.functional.alpha_dropout,
        nn.functional.feature_alpha_dropout,
        torch.dropout,
        torch.native_dropout,
    }
)


def drops(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether ``func`` is a dropout, and these arguments let it drop."""
    if func not in _DROPOUTS:
        return False
    p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
    return bool(training) and p > 0
