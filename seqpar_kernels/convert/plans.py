"""Plans: which module of a model takes part in which way.

A plan maps name patterns (``*`` stands for one name component) to styles joined by "+":

====================  ==================================================================================================
``colwise``           nn.Linear / Conv1D fed by the shard: gathers it, keeps this rank's output features. ``colwise:3``
                      cuts each of 3 packed projections (q|k|v) on its own
``rowwise``           nn.Linear / Conv1D that ends the tensor-parallel part: reduce-scatters back to the shard
``norm``              LayerNorm or any RMSNorm on the shard: becomes the fused kernel, gradients summed over ranks
``dropout``           nn.Dropout on the shard: becomes the sharding-invariant one
``sequence``          any other module that treats rows one by one, left as it is: parameter gradients summed over ranks
``tensor_parallel``   any other module between colwise and rowwise whose parameters every rank uses for its own heads:
                      left as it is, parameter gradients summed over ranks
``whole_input``       a module that reads the shape of its input before its colwise children gather it (the attention of
                      most Hugging Face decoders): it is shown the whole shape, the children are handed the shard
``scatter_input``     the residual stream is cut into shards at this module's entrance
``gather_output``     and is put together again behind this one
====================  ==================================================================================================

Modules that only ever see whole tensors (embeddings, heads) need no entry. One that a shard reaches without an entry is
an error at the first forward.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

STYLES = (
    "colwise",
    "rowwise",
    "norm",
    "dropout",
    "sequence",
    "tensor_parallel",
    "whole_input",
    "scatter_input",
    "gather_output",
)


@dataclass(frozen=True)
class ParallelPlan:
    """A plan with what a mapping of patterns cannot say.

    Attributes:
        styles: pattern -> styles.
        divided: pattern -> integer attributes of matching modules that count what is cut (heads, split sizes) and are
            divided by the number of ranks.
        shared: groups of sibling names that are fed the same tensor and share one gather.
        heads: attributes of ``model.config`` that must be multiples of the number of ranks.
    """

    styles: Mapping[str, str]
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    heads: tuple[str, ...] = ()


GPT2 = ParallelPlan(
    styles={
        "transformer.drop": "scatter_input+dropout",
        "transformer.h.*.ln_1": "norm",
        "transformer.h.*.attn.c_attn": "colwise:3",
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.attn.resid_dropout": "dropout",
        "transformer.h.*.ln_2": "norm",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
        "transformer.h.*.mlp.dropout": "dropout",
        "transformer.ln_f": "norm+gather_output",
    },
    divided={"transformer.h.*.attn": ("num_heads", "split_size")},
    heads=("num_attention_heads",),
)

LLAMA = ParallelPlan(
    styles={
        "model.layers.0": "scatter_input",
        "model.layers.*.input_layernorm": "norm",
        "model.layers.*.self_attn": "whole_input",
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.self_attn.k_proj": "colwise",
        "model.layers.*.self_attn.v_proj": "colwise",
        "model.layers.*.self_attn.o_proj": "rowwise",
        "model.layers.*.post_attention_layernorm": "norm",
        "model.layers.*.mlp.gate_proj": "colwise",
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.down_proj": "rowwise",
        "model.norm": "norm+gather_output",
    },
    shared=(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
    heads=("num_attention_heads", "num_key_value_heads"),
)

#: Built-in plans by the ``model_type`` of a Hugging Face config.
BUILT_IN: dict[str, ParallelPlan] = {"gpt2": GPT2, "llama": LLAMA}


def plan_for(model: nn.Module, plan: ParallelPlan | Mapping[str, str] | None) -> ParallelPlan:
    """The plan given, or the built-in one for this model.

    Raises:
        ValueError: no plan was given and none is known; an unknown style.
    """
    if plan is None:
        return _built_in(model)
    if not isinstance(plan, ParallelPlan):
        if not isinstance(plan, Mapping):
            raise ValueError(f"plan: expected a mapping of name patterns to styles, got {type(plan).__name__}")
        plan = ParallelPlan(dict(plan))
    for pattern, styles in plan.styles.items():
        for style in styles.split("+"):
            parse_style(pattern, style)
    return plan


def _built_in(model: nn.Module) -> ParallelPlan:
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in BUILT_IN:
        raise ValueError(
            f"plan: there is no built-in plan for {type(model).__name__} (model_type {kind!r}; built in: "
            f"{sorted(BUILT_IN)}); pass one: {{name pattern: style}}, see seqpar_kernels.convert.plans"
        )
    plan = BUILT_IN[kind]
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and not hasattr(model, prefix):  # the bare backbone: the same names without the prefix
        strip = len(prefix) + 1
        plan = ParallelPlan(
            {name[strip:]: style for name, style in plan.styles.items()},
            {name[strip:]: names for name, names in plan.divided.items()},
            plan.shared,
            plan.heads,
        )
    return plan


def parse_style(pattern: str, style: str) -> tuple[str, int]:
    """("colwise", 3) from "colwise:3"; other styles come with 1.

    Raises:
        ValueError: an unknown style.
    """
    name, _, sections = style.strip().partition(":")
    if name not in STYLES or (sections and (name != "colwise" or not sections.isdigit() or int(sections) < 1)):
        raise ValueError(f"plan[{pattern!r}]: expected styles out of {STYLES} joined by '+', got {style!r}")
    return name, int(sections) if sections else 1


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module; ``*`` stands for exactly one component."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), name) is not None
