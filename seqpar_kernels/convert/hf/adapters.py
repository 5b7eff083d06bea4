"""peft's adapters: refused where they would be trained wrongly."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..conversion import Conversion


def refuse_adapters(conversion: Conversion) -> None:
    """Refuse a model with adapters now, and an adapter that peft adds to a module of the plan later.

    Raises:
        ValueError: the model has an adapter.
    """
    _refuse(conversion.model)
    conversion.before_check.append(_refuse_later)


def _refuse_later(conversion: Conversion) -> None:
    if "peft_config" in vars(conversion.model):
        _refuse(conversion.model, conversion.styles)


def _refuse(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Refuse peft's adapters on the modules called ``names`` and inside them; None: anywhere.

    A module of the plan is fed shards or computes this rank's features: an adapter there would get a part of its
    gradient, other on every rank. Embeddings and heads that are whole, and prompts, may be adapted.

    Raises:
        ValueError: there is one.
    """
    for name, module in model.named_modules():
        of_peft = any(kind.__module__.startswith("peft.") for kind in type(module).__mro__)
        if of_peft and (names is None or any(f"{name}.".startswith(f"{other}.") for other in names)):
            raise ValueError(
                f"{name or 'model'}: is a {type(module).__name__} of peft, and an adapter on what parallelize cuts "
                "would be trained wrongly: merge it first (merge_and_unload), or train it without parallelize"
            )
