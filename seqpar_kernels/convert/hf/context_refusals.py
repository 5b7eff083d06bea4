"""Which models context parallelism refuses: what mixes rows elsewhere than in the attention interface, and what counts
them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from .context_batch import Signature

_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
_MIXING = (nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)


def refuse_unfit(model: nn.Module) -> None:
    """
    Raises:
        ValueError: ``model`` is none whose rows meet in attention alone, as far as can be seen from outside.
    """
    for why in _reasons(model):
        raise ValueError(f"context_parallel: {type(model).__name__} {why}")


def _reasons(model: nn.Module) -> Iterator[str]:
    if not isinstance(model, PreTrainedModel):
        yield (
            "is no model of Transformers; in one of your own call sequence_parallel_attention in its attention layers "
            "(docs/long-context.md)"
        )
        return
    known = {*_names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *_names(MODEL_MAPPING_NAMES)}
    if not known & {cls.__name__ for cls in type(model).__mro__}:
        yield "is neither a causal language model nor a backbone of Transformers: its head may count rows"
    config: Any = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        yield "has cross-attention, which is not supported"
    if not getattr(model, "_supports_attention_backend", False):
        yield "does not send its attention through Transformers' AttentionInterface"
    if getattr(model, "_is_stateful", False):
        yield "carries a state from row to row, which is not supported"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others:
        yield f"has layers of type {', '.join(others)}, which mix rows elsewhere than in attention"
    for name, module in model.named_modules():
        if isinstance(module, _MIXING):
            yield f"has a {type(module).__name__}, {name}, which mixes rows elsewhere than in attention"
        if name.rpartition(".")[2] == "indexer":
            yield f"chooses keys by an indexer, {name}, which sees those of this rank alone"
        if isinstance(module, nn.Embedding) and module.sparse:
            yield f"has an embedding with sparse gradients, {name}"
    names = Signature(model).names
    missing = [name for name in ("position_ids", "attention_mask") if name not in names]
    if missing:
        yield f"takes no {' and no '.join(missing)}: what it makes of rows would count those of this rank"


def _names(mapping: Any) -> Iterator[str]:
    for value in mapping.values():
        yield from (value,) if isinstance(value, str) else value
