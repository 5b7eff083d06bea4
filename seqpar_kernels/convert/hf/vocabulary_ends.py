"""Cuts the embedding and the head of a causal language model by vocabulary, for ``loss_parallel``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ...nn import VocabParallelEmbedding, VocabParallelHead
from ...nn.embedding import check_embedding, check_head
from ..conversion import Conversion
from .loss_parallel import LossParallel
from .stand_in_logits import UNCHANGED, LogitChange

#: Attributes of a config by which a model changes its logits before the loss -> that change.
_LOGIT_CHANGES: dict[str, Callable[[LogitChange, float], LogitChange]] = {
    "logits_scaling": lambda change, value: change.multiplied(1 / value),
    "logit_scale": lambda change, value: change.multiplied(value),
    "lm_head_multiplier": lambda change, value: change.multiplied(value),
    "final_logit_softcapping": lambda change, value: LogitChange(change.logit_scale, value),
    "logits_soft_cap": lambda change, value: LogitChange(change.logit_scale, value),
}


def configured_change(config: Any) -> LogitChange:
    """How a model with this config scales and caps its logits, if it reads what its config says."""
    change = UNCHANGED
    for attribute, apply in _LOGIT_CHANGES.items():
        value = getattr(config, attribute, None)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
            change = apply(change, float(value))
    return change


class Ends(NamedTuple):
    """Module names of the embedding and the head of a causal language model."""

    embedding: str
    head: str


def find_ends(conversion: Conversion) -> None:
    """Find the embedding and the head that ``loss_parallel`` cuts.

    Raises:
        ValueError: not a Hugging Face causal language model with the standard loss, or its ends cannot be cut.
    """
    if not conversion.loss_parallel:
        return
    model: Any = conversion.model
    kind = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    loss = getattr(model, "loss_function", None)
    if head is None or getattr(loss, "__name__", "") != "ForCausalLMLoss":
        raise ValueError(
            f"loss_parallel: expected a Hugging Face model with a head and the loss ForCausalLMLoss, got {kind} with "
            f"{getattr(loss, '__name__', loss)!r}; elsewhere use seqpar_kernels.vocab_parallel_linear_cross_entropy"
        )
    names = {module: name for name, module in model.named_modules()}
    ends = Ends(names[model.get_input_embeddings()], names[head])
    for label, check in (("embedding", check_embedding), ("head", check_head)):
        name = getattr(ends, label)
        try:
            check(model.get_submodule(name))
        except ValueError as error:
            raise ValueError(f"loss_parallel: {name}: {error}") from error
        weight = model.get_submodule(name).weight
        tied = [other for other, param in model.named_parameters(remove_duplicate=False) if param is weight]
        extra = [other for other in tied if other not in (f"{ends.embedding}.weight", f"{ends.head}.weight")]
        if extra or name in conversion.styles:
            what = f"its weight is tied to {extra}" if extra else f"the plan says {conversion.styles[name]!r}"
            raise ValueError(f"loss_parallel: {name} is cut by vocabulary, but {what}")
    gathers = [name for name, edges in conversion.edges.items() if "gather_output" in edges]
    if len(gathers) != 1:
        raise ValueError(f"loss_parallel: expected one module with 'gather_output' in the plan, got {gathers}")
    conversion.vocabulary_ends = ends


def cut_ends(conversion: Conversion) -> None:
    """Replace both ends by modules cut by vocabulary, and hook the model for forwards with labels."""
    if conversion.vocabulary_ends is None:
        return
    model: Any = conversion.model
    ends, region = Ends(*conversion.vocabulary_ends), conversion.region
    old_embedding, old_head = (model.get_submodule(name) for name in ends)
    tied = old_embedding.weight is old_head.weight
    embedding = VocabParallelEmbedding.from_torch(
        old_embedding, region.group, seq_dim=region.seq_dim, whole_output=True
    )
    embedding.whole_needed = _between(model, ends.embedding, conversion)
    head = VocabParallelHead.from_torch(old_head, region.group, seq_dim=region.seq_dim, engine=conversion.engine)
    if tied:
        head.weight = embedding.weight
    for name, new in ((ends.embedding, embedding), (ends.head, head)):
        new.region = region
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    configured = configured_change(model.config.get_text_config())
    ((gathers,),) = conversion.edges_at("gather_output")
    shown = conversion.styles.get(gathers) != "norm"
    loss = conversion.loss = LossParallel(head, region, model.loss_function, configured, shown)
    vars(head)["forward"] = loss.head
    model.loss_function = loss.loss
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    position = names.index("labels") if "labels" in names else len(names)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels = args[position] if len(args) > position else kwargs.get("labels")
        loss.begin(labels is not None or kwargs.get("shift_labels") is not None)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return loss.finish(output)

    def always(module: nn.Module, *_: Any) -> None:
        loss.begin(False)

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(after)
    model.register_forward_hook(always, always_call=True)


def _between(model: nn.Module, embedding: str, conversion: Conversion) -> Callable[[], str | None]:
    """Returns a function that says why a module before the cut needs the whole embedding; None if none does."""
    cuts = [name for name, edges in conversion.edges.items() if "scatter_input" in edges]
    paths = {".".join(name.split(".")[: depth + 1]) for name in cuts for depth in range(name.count(".") + 1)}
    names = sorted(path for path in paths if not f"{embedding}.".startswith(f"{path}."))
    originals = [model.get_submodule(name) for name in names]

    def reason() -> str | None:
        for name, original in zip(names, originals, strict=True):
            module: Any = model.get_submodule(name)
            if module is not original or isinstance(module, FSDPModule):
                return f"what {name} has been wrapped in"
            if getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled():
                options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
                if options.get("use_reentrant", True):
                    return f"the reentrant checkpoint of {name}"
        return None if cuts else "a plan without 'scatter_input'"

    return reason
