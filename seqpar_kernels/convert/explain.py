"""``explain(model)``: how every module of a parallelized model runs, and what keeps it from running faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..kernels import choice
from ..nn import (
    ColumnParallelLinear,
    Experts,
    RowParallelLinear,
    SequenceParallelAttention,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from ..overlap import engines
from ..overlap.attention_choice import Choice
from ..overlap.tuning import profile_of
from ..strict import refuse, strict_enabled
from .conversion import Conversion, conversion_of
from .explanation import Explanation, Row
from .plans import matches

_RANKS_LISTED = 8
_VOCABULARY = (VocabParallelEmbedding, VocabParallelHead)
_LISTED = (*_VOCABULARY, SequenceParallelAttention)  # whatever the plan says


def explain(model: nn.Module) -> Explanation:
    """Show style, engine, chunk count, and whether and why it is fused, of every converted module of ``model``.

    Engines, chunk counts, bytes and estimates are those of the last forward. :func:`seqpar_kernels.activation_bytes`
    counts what all modules keep, those that are not converted too.

    Raises:
        ValueError: the model has not been parallelized.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 32))
        >>> model = sp.parallelize(model, None, {"0": "scatter_input+norm", "1": "colwise"})
        >>> [(row.module, row.style) for row in sp.explain(model).rows]
        [('0', 'norm+scatter_input'), ('1', 'colwise')]
    """
    conversion = conversion_of(model)
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    names = [
        name
        for name, module in model.named_modules()
        if name in conversion.styles or name in conversion.edges or isinstance(module, _LISTED)
    ]
    rows = tuple(_row(name, model.get_submodule(name), conversion, device) for name in names)
    region = conversion.region
    backend = "no group" if region.group is None else f"group of {region.ranks} ranks"
    count = len(conversion.replicated)
    title = f"{type(model).__name__}: {backend}, sequence at dim {region.seq_dim}; "
    title += f"gradients of {count} replicated parameters "
    title += "need no sum" if region.group is None else "are summed in one exchange a backward"
    if region.group is not None:
        title += f"\nplanned with {profile_of(region.group)['cpu' if device.type == 'cpu' else 'cuda'].source}"
    if conversion.context is not None:
        title += f"\n{conversion.context.explained()}"
        rows += tuple(
            Row(
                f"attention: {kind}",
                "context_parallel",
                choice.engine,
                "",
                "",
                _why(choice),
                _bytes(choice.wire.forward),
            )
            for kind, choice in conversion.context.explained_calls()
        )
    return Explanation(title, rows)


def refuse_unfused(conversion: Conversion) -> None:
    """With SEQPAR_STRICT: let the first forward in each mode raise a RuntimeError where a module runs unfused."""
    if not strict_enabled():
        return
    seen: set[bool] = set()

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if module.training in seen:
            return
        seen.add(module.training)
        slower = [row for row in explain(module).rows if row.slower]
        if slower:
            listing = "".join(f"\n  {row.module} ({row.style}): {row.why}" for row in slower)
            refuse(f"{type(module).__name__} has {len(slower)} modules that run unfused", listing)

    conversion.model.register_forward_hook(after)


def _row(name: str, module: nn.Module, conversion: Conversion, device: torch.device) -> Row:
    style = conversion.styles.get(name, "")
    sections = conversion.sections.get(name, 1)
    if sections != 1:
        style += ":" + ",".join(map(str, sections if isinstance(sections, tuple) else (sections,)))
    style = "+".join([*filter(None, [style]), *sorted(conversion.edges.get(name, ()), reverse=True)])
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
        ran = module.ran
        engine, chunks = ("not run yet", "") if ran is None else (ran.engine, str(ran.chunks))
        why = "" if ran is None else ran.reason
        family = next((f for f in conversion.shared if name in f), None)
        if family is not None:
            why += "; one gather with " + ", ".join(n.rpartition(".")[2] for n in family if n != name)
        pipelined = ran is not None and engines.named(ran.engine).chunked
        fused = "yes" if pipelined or conversion.region.group is None else "no"
        wire, model = ("", "") if ran is None or ran.estimate is None else (_bytes(ran.wire_bytes), str(ran.estimate))
        if family is not None and name != family[0]:
            wire = model = ""  # the first of the family has them
        kept = ""
        if module.kept is not None:
            kept, why = _bytes(module.kept.bytes), f"{why}; {module.kept.why()}"
        return Row(name, style, engine, chunks, fused, why, wire, model, kept)
    if isinstance(module, Experts):
        return _experts_row(name, style, module)
    if isinstance(module, _VOCABULARY):
        if isinstance(module, VocabParallelHead):
            why = "head and loss in one, logits never exist; whole logits without labels"
            return Row(name, "vocabulary", "", "", "yes", why)
        if module.scattered is None:
            return Row(name, "vocabulary", "", "", "", "not run yet")
        why = "partial rows reduce-scattered straight into the sequence shard"
        if not module.scattered:
            why = f"summed over the ranks, then cut: {module.taken_whole_by} takes it whole"
        return Row(name, "vocabulary", "", "", "yes" if module.scattered else "no", why)
    if isinstance(module, SequenceParallelAttention):
        return _attention_row(name, module)
    handling = conversion.styles.get(name)
    if handling in ("norm", "dropout"):
        backend, kernel = _kernel(device)
    if getattr(module, "fused", False):
        why = "one kernel with the sum over ranks, the residual add and what lies between"
        return Row(name, style, backend, "", "yes", why + kernel)
    if getattr(module, "first", False):
        return Row(name, style, backend, "", "yes", f"one kernel for the {handling}; nothing comes before it" + kernel)
    if handling == "dropout" and not (module.training and module.p):
        return Row(name, style, backend, "", "", "drops nothing" + kernel)
    if handling == "norm":
        why = "one kernel for the norm; the residual add and dropout before it are the model's own statements"
        return Row(name, style, backend, "", "norm only", why + kernel, slower=True)
    if handling == "dropout":
        why = "the model's forward drops and adds in statements of its own"
        return Row(name, style, backend, "", "no", why + kernel, slower=True)
    remark = next((why for pattern, why in conversion.plan.remarks.items() if matches(pattern, name)), "left as it is")
    why = remark if handling else "edge of the sharded residual stream"
    return Row(name, style, "", "", "", why)


def _experts_row(name: str, style: str, module: Experts) -> Row:
    ran, ranks = module.ran, module.region.ranks
    how = "whole experts, tokens travel to theirs" if module.experts == "ep" else "a part of each expert on every rank"
    if ranks == 1:
        return Row(name, style, "", "", "yes", "all experts are here")
    if ran is None:
        return Row(name, style, module.experts, "", "", f"{how}; not run yet")
    sent = ran.sent()
    listed = ", ".join(map(str, sent)) if ranks <= _RANKS_LISTED else f"{min(sent)} to {max(sent)}"
    why = (
        f"{how}; tokens sent by the ranks: {listed}; the fullest rank has {ran.fullest():.2f} x the mean of their work"
    )
    return Row(name, style, module.experts, "", "yes", why, _bytes(ran.wire_bytes()))


def _why(choice: Choice) -> str:
    return f"{choice.reason}; the busiest rank has {choice.imbalance:.2f} x the mean work"


def _attention_row(name: str, module: SequenceParallelAttention) -> Row:
    """Chunks are the groups of heads, where those travel while others are computed with."""
    planned = module.planned()
    if planned is None:
        return Row(name, "attention", "not run yet", "", "", "")
    choice, groups = planned
    why, wire = _why(choice), _bytes(choice.wire.forward)
    if groups is None:
        return Row(name, "attention", choice.engine, "", "", why, wire)
    why = f"groups of heads: {groups.reason}; {why}"
    return Row(name, "attention", choice.engine, str(len(groups.groups)), "yes", why, wire)


def _bytes(count: int) -> str:
    """``count`` with the largest unit that gives at least 1."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _kernel(device: torch.device) -> tuple[str, str]:
    """(kernel backend, remark where it is not the preferred one)."""
    backend, passed_over = choice(device)
    remarks = "".join(f"; not {name}: {reason}" for name, reason in passed_over.items())
    return backend or "none", remarks
