"""A trial of an architecture that is not known to be right with its sequence in shards: a few tokens, sharded and not.

What mixes rows elsewhere than in attention, counts them, or makes positions out of a mask gives other logits for a
shard. Before the first forward both are computed, without gradients, and compared on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: Architectures (model_type) that ``tests/convert/test_context_architectures.py`` finds right: they are not tried.
PROVEN = frozenset({
    "apertus", "arcee", "aria_text", "axk1", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "cwm",
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo",
    "gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4",
    "glm4_moe", "glm4_moe_lite", "gpt2", "gpt_neox", "gpt_oss", "granite", "granite_swa", "granitemoe_swa",
    "helium", "hrm_text", "hy_v3", "hyperclovax", "jais2", "laguna", "llama", "mellum", "mimo_v2_flash",
    "minicpm3", "minimax_m2", "ministral", "ministral3", "mistral", "mixtral", "nanochat",
    "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss",
    "smollm3", "solar_open", "starcoder2", "vaultgemma", "youtu",
})  # fmt: skip

_BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-3}
_ROUGH = 5e-2  # 16 bit: a mixture of rows is off by its whole size


def is_proven(model: Any) -> bool:
    return getattr(model.config, "model_type", None) in PROVEN


@torch.no_grad()
def try_out(model: Any, ranks: int, unsharded: Callable[..., Any], whole: Callable[[Tensor], Tensor]) -> None:
    """
    Args:
        unsharded: calls the model with the whole sequence on this rank.
        whole: gives the rows of all ranks of a result.

    Raises:
        RuntimeError: on every rank, where the sharded model computes something else.
    """
    device = next(model.parameters()).device
    length = 4 * ranks + 1
    config = model.config.get_text_config()
    ids = torch.arange(2 * length, device=device).view(2, length) * 7 % config.vocab_size
    mask = torch.ones_like(ids)
    if "chunked_attention" not in (getattr(config, "layer_types", None) or ()):  # whose chunks would begin behind it
        mask[0, :2] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    training = model.training
    model.eval()
    try:
        expected = _first(unsharded(**given, use_cache=False))
        got = whole(_first(model(**given)))
    finally:
        model.train(training)
    seen = mask.bool()
    one, other = got[seen].double(), expected[seen].double()
    error = ((one - other).abs().max() / other.abs().max().clamp(min=1e-9)).item()
    if not error <= _BOUNDS.get(expected.dtype, _ROUGH):
        raise RuntimeError(
            f"context_parallel: {type(model).__name__} computes something else from shards of a sequence (off by "
            f"{error:.1e} of the largest logit on {length} tokens): its rows meet elsewhere than in attention, or it "
            "counts them"
        )


def _first(output: Any) -> Tensor:
    """The logits, or the hidden states of a backbone."""
    found = output.logits if hasattr(output, "logits") else output[0]
    if not isinstance(found, Tensor):
        raise RuntimeError(f"context_parallel: expected logits or hidden states, got {type(found).__name__}")
    return found
