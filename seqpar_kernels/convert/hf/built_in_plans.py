"""Plans of Hugging Face models that carry none of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..plans import ParallelPlan

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

#: Built-in plans by the ``model_type`` of a Hugging Face config.
BUILT_IN: dict[str, ParallelPlan] = {"gpt2": GPT2}


def built_in_plan(model: nn.Module) -> ParallelPlan | None:
    """The built-in plan for ``model.config.model_type``, if there is one."""
    plan = BUILT_IN.get(getattr(getattr(model, "config", None), "model_type", None) or "")
    prefix: Any = getattr(model, "base_model_prefix", "")
    if plan is not None and prefix and not hasattr(model, prefix):  # the bare backbone: the same names without prefix
        strip = len(prefix) + 1
        plan = ParallelPlan(
            {name[strip:]: style for name, style in plan.styles.items()},
            {name[strip:]: names for name, names in plan.divided.items()},
            plan.shared,
            plan.heads,
        )
    return plan
