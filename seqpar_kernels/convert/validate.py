"""Second pass of a conversion: checks that the plan fits the model, and that all ranks convert the same.

It does not change the model. Errors name the module or attribute.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..checks import check_divides
from ..comm.coordination import coordination_of
from ..nn import SplitRMSNorm
from ..nn.linear import _linear_features
from ..nn.sharding import ShardSpec, check_shardable
from .alike import comparison_enabled
from .conversion import Conversion
from .plans import count_of, divided, matching
from .replacements import converted_norm


def check_fields(conversion: Conversion) -> None:
    """Check that the attributes, parameters and arguments that the plan names exist."""
    model, plan, ranks = conversion.model, conversion.plan, conversion.region.ranks
    for field in ("divided", "assigned", "cut", "scattered"):
        names: Iterable[str]
        for pattern, names in getattr(plan, field).items():
            found = list(matching(model, pattern))
            if not found:
                raise ValueError(f"plan.{field}[{pattern!r}]: matches no module of {type(model).__name__}")
            for name, module in found:
                for wanted in names:
                    _check_field(f"plan.{field}[{pattern!r}]", name, module, wanted, field, ranks)
    for attribute in plan.heads:
        if not isinstance(getattr(getattr(model, "config", None), attribute, None), int):
            raise ValueError(f"plan.heads: expected integer attributes of model.config, it has no {attribute!r}")


def _check_field(where: str, name: str, module: nn.Module, wanted: str, field: str, ranks: int) -> None:
    if field == "scattered":
        if wanted not in inspect.signature(module.forward).parameters:
            raise ValueError(f"{where}: {name}.forward has no argument {wanted!r}")
    elif field == "cut":
        param = module._parameters.get(wanted)
        if param is None or param.dim() == 0:
            raise ValueError(f"{where}: {name} has no parameter {wanted!r} with an entry for each head")
        check_divides(f"{name}.{wanted}", param.shape[0], ranks, "its first dimension")
    else:
        try:
            found = isinstance(count_of(module, wanted), int)
        except AttributeError:
            found = False
        if not found:
            raise ValueError(f"{where}: {name} has no integer attribute {wanted!r}")


def check_sizes(conversion: Conversion) -> None:
    """Check that sizes and counts divide, and that the style of each module can convert it."""
    model, plan, ranks = conversion.model, conversion.plan, conversion.region.ranks
    config: Any = getattr(model, "config", None)
    for attribute in plan.heads:
        count = getattr(config, attribute)
        if count % ranks:
            raise ValueError(
                f"model.config.{attribute}: expected a multiple of the {ranks} ranks of the group, got {count}"
            )
    for name, module, attribute in divided(model, plan):
        got = count_of(module, attribute)
        if got % ranks:
            raise ValueError(f"{name}.{attribute}: expected a multiple of the {ranks} ranks, got {got}")
    for name, style in conversion.styles.items():
        module = model.get_submodule(name)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        kept = ("sequence", "tensor_parallel", "own_parameters", "replicated", "conditioning")
        if style not in kept and any(getattr(module, kind) for kind in hooks):
            raise ValueError(f"{name}: has hooks that the conversion would drop; register them after parallelize")
        if style in ("colwise", "rowwise", "shared_heads"):
            try:
                features_in, features_out, _ = _linear_features(module)
            except ValueError as error:
                raise ValueError(f"{name}: style {style!r}: {error}") from error
            if style == "shared_heads":
                heads: Any = conversion.sections[name]
                if ranks % heads or features_out % heads:
                    raise ValueError(
                        f"{name}: style 'shared_heads:{heads}' takes a divisor of the {ranks} ranks and of the "
                        f"{features_out} output features"
                    )
                continue
            label, size = ("out_features", features_out) if style == "colwise" else ("in_features", features_in)
            check_shardable(f"{name}.{label}", size, ShardSpec(0, conversion.sections[name]), ranks)
        elif style == "dropout" and not isinstance(module, nn.Dropout):
            raise ValueError(f"{name}: style 'dropout' takes torch.nn.Dropout, got {type(module).__name__}")
        elif style in ("norm", "split_norm"):
            try:
                converted_norm(module) if style == "norm" else SplitRMSNorm.from_torch(module)
            except ValueError as error:
                raise ValueError(f"{name}: style {style!r}: {error}") from error


def check_ties(conversion: Conversion) -> None:
    """Check that no weight is cut in one place and whole in another."""
    model = conversion.model
    if conversion.region.ranks == 1:
        return
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(name)
    for name, style in conversion.styles.items():
        if style in ("colwise", "rowwise"):
            weight = model.get_submodule(name).weight
            others = [other for other in owners[id(weight)] if other != name]
            if others:
                raise ValueError(f"{name}: its weight is tied to {others}, and cannot be cut in one place only")


def compare_calls(conversion: Conversion) -> None:
    """Compare call, plan and weights with those of the other ranks. A collective call.

    Raises:
        RuntimeError: on every rank, where they differ.
    """
    region = conversion.region
    if region.group is None:
        return
    coordination = coordination_of(region.group)
    how = f"seq_dim={region.seq_dim}, engine={conversion.engine!r}, loss_parallel={conversion.loss_parallel}"
    how += f", recompute={conversion.recompute!r}" if conversion.recompute != "auto" else ""
    how += f", experts={conversion.experts!r}" if conversion.expert_forms else ""
    how += "" if comparison_enabled() else ", SEQPAR_COMPARE_RANKS=0"
    call = f"parallelize number {coordination.conversions} of {type(conversion.model).__name__}"
    plan = _short_hash(repr(conversion.plan))
    coordination.require(f"{call}, {how}, plan {plan}, with {digest(conversion.model)}")


@torch.no_grad()
def digest(model: nn.Module) -> str:
    """A text that depends on names, shapes, dtypes and values of parameters and floating-point buffers."""
    found = []
    for name, param in model.named_parameters():
        value = param.double().sum().item()
        found.append(f"{name} {tuple(param.shape)} {param.dtype} {param.requires_grad} {value!r};")
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta:
            # Not a sum: that of a mask is -inf, and does not change if parts of a table are permuted.
            held = buffer.double().nan_to_num(0.0, 1.0, -1.0).flatten()
            places = torch.linspace(1, 2, held.numel(), dtype=held.dtype, device=held.device)
            found.append(f"{name} {tuple(buffer.shape)} {buffer.dtype} {held.dot(places).item()!r};")
    return f"weights and buffers {_short_hash(''.join(found))}: seed the ranks alike or load the same checkpoint"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
