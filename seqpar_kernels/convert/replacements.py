"""Third pass of a conversion: replaces modules and parameters by their parallel twins."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils.stateless import _reparametrize_module

from ..kernels import NormKind
from ..nn import (
    ColumnParallelLinear,
    Dropout,
    Experts,
    LayerNorm,
    Region,
    RMSNorm,
    RowParallelLinear,
    RowsByExpert,
    SharedGather,
    SharedHeadsLinear,
    SplitRMSNorm,
)
from ..nn.norm_detection import norm_form
from ..nn.own_forward import follower
from ..nn.sharding import ShardSpec, local_part
from ..ops.remake import LEVELS
from .conversion import Conversion
from .fused_forwards import fuse_head_norm
from .plans import count_of, divided, matching
from .undo import Undo


def remember_whole(conversion: Conversion) -> None:
    """Keep the model as it is for ``unparallelize``."""
    conversion.undo = Undo(conversion.model)


def set_counts(conversion: Conversion) -> None:
    """Give attributes that count heads or features this rank's counts."""
    model, plan, ranks = conversion.model, conversion.plan, conversion.region.ranks
    for _, module, attribute in divided(model, plan):
        _set_count(module, attribute, count_of(module, attribute) // ranks)
    for pattern, values in plan.assigned.items():
        for _, module in matching(model, pattern):
            for attribute, value in values.items():
                _set_count(module, attribute, value)


def _set_count(module: Any, attribute: str, value: int) -> None:
    """Set ``attribute`` to ``value``. The config belongs to the whole model, so the module gets a copy."""
    owner, _, name = attribute.rpartition(".")
    if owner:
        setattr(module, owner, copy.copy(getattr(module, owner)))
        module = getattr(module, owner)
    setattr(module, name, value)


def cut_parameters(conversion: Conversion) -> None:
    """Keep this rank's heads of the parameters that ``plan.cut`` names."""
    for pattern, names in conversion.plan.cut.items():
        for _, module in matching(conversion.model, pattern):
            _cut_parameters(module, names, conversion.region)


def replace_modules(conversion: Conversion) -> None:
    """Replace every module that has a parallel twin."""
    model = conversion.model
    conversion.originals = dict(model.named_modules())
    holders = _holders(model)
    for name, style in conversion.styles.items():
        old = model.get_submodule(name)
        new = _twin(old, name, style, conversion)
        for parent, child in holders[old] if new is not old else ():
            setattr(parent, child, new)
    unique = {id(param): param for param in conversion.replicated if param is not None}
    conversion.replicated = list(unique.values())
    conversion.own_modules(model)


def _holders(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """module -> every (parent, name) that holds it. One norm may be used twice."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                found.setdefault(module, []).append((parent, child))
    return found


def share_gathers(conversion: Conversion) -> None:
    """Let siblings that are fed the same tensor share one gather."""
    for family in conversion.plan.shared:
        for parent_name, parent in conversion.model.named_modules():
            members = [m for child in family if isinstance(m := getattr(parent, child, None), ColumnParallelLinear)]
            if len(members) < len(family) or any(m.input_is_whole or m.shared_gather is not None for m in members):
                continue
            shared = SharedGather(members)
            for member in members:
                member.shared_gather = shared
            prefix = f"{parent_name}." if parent_name else ""
            conversion.gathers.append(shared)
            conversion.shared.append([prefix + child for child in family])


def converted_norm(module: nn.Module, region: Region | None = None) -> LayerNorm | RMSNorm:
    """The fused norm that computes what ``module`` computes.

    Raises:
        ValueError: no fused norm computes the same.
    """
    group, seq_dim = (region.group, region.seq_dim) if region is not None else (None, -2)
    known = isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    if isinstance(module, nn.LayerNorm) or (not known and norm_form(module).kind == NormKind.LAYER):
        return LayerNorm.from_torch(module, group, seq_dim=seq_dim)
    return RMSNorm.from_torch(module, group, seq_dim=seq_dim)


def _twin(old: Any, name: str, style: str, conversion: Conversion) -> nn.Module:
    """The parallel twin of the module called ``name``, or the module itself."""
    region = conversion.region
    new: Any
    place: dict[str, Any] = {"seq_dim": region.seq_dim, "engine": conversion.engine}
    if style == "colwise":
        new = ColumnParallelLinear.from_torch(old, region.group, sections=conversion.sections[name], **place)
        new.input_is_whole = conversion.inside_gathered(name)
    elif style == "shared_heads":
        heads: Any = conversion.sections[name]
        new = SharedHeadsLinear.from_torch(old, region.group, heads=heads, **place)
        new.input_is_whole = conversion.inside_gathered(name)
        conversion.replicated += new.parameters(recurse=False)
    elif style == "rowwise":
        new = RowParallelLinear.from_torch(old, region.group, **place)
    elif style == "norm":
        new = converted_norm(old, region)
        conversion.replicated += new.parameters(recurse=False)
    elif style == "split_norm":
        new = SplitRMSNorm.from_torch(old, region.group)
    elif style == "dropout":
        new = Dropout.from_torch(old, region.group, seq_dim=region.seq_dim)
    elif style == "experts":
        form, way = conversion.expert_forms[name]
        new = (RowsByExpert if form.by_expert else Experts).from_torch(old, region.group, form=form, experts=way)
    elif style in ("replicated", "conditioning"):
        return old
    else:
        own = style == "own_parameters"
        if style == "tensor_parallel" and conversion.recompute != "none":
            _fuse_if_norm(old)
        conversion.replicated += old.parameters(recurse=not own)
        _sum_gradients_of(old, region, recurse=not own)
        return old
    new.region = region
    if isinstance(new, (ColumnParallelLinear, RowParallelLinear)):
        new.remake_input = LEVELS[conversion.recompute]
    return new


def _fuse_if_norm(module: nn.Module) -> None:
    """Let a norm of heads run as one kernel: one that is a norm in training and in evaluation."""
    if next(module.children(), None) is not None:
        return
    training = module.training
    try:
        for mode in (not training, training):
            module.training = mode
            norm = converted_norm(module)
    except Exception:  # whatever cannot be tried is no norm
        return
    finally:
        module.training = training
    fuse_head_norm(module, norm)


def _sum_gradients_of(module: nn.Module, region: Region, recurse: bool) -> None:
    """Make ``module`` compute with parameters whose gradients are summed over the ranks."""
    forward = module.forward

    def summed_forward(*args: Any, **kwargs: Any) -> Any:
        params = {
            # Indexing gives the plain parameter, listing a DTensor.
            f"{prefix}.{name}" if prefix else name: owner._parameters[name]
            for prefix, owner in (module.named_modules() if recurse else [("", module)])
            for name in owner._parameters
            if owner._parameters[name] is not None
        }
        tensors = dict(zip(params, region.summing(*params.values()), strict=True))
        following = follower()
        with _reparametrize_module(module, tensors):
            if following is not None:
                return following.summed(module, forward, args, kwargs, tensors)
            return forward(*args, **kwargs)

    module.forward = summed_forward


def _cut_parameters(module: nn.Module, names: Iterable[str], region: Region) -> None:
    """Keep this rank's heads of parameters that hold an entry for each head [heads, ...]."""
    if region.ranks == 1:
        return
    sharded = dict(getattr(module, "sharded", {}))
    for name in names:
        full = getattr(module, name)
        sharded[name] = ShardSpec(0)
        setattr(module, name, nn.Parameter(local_part(full, sharded[name], region.group), full.requires_grad))
    vars(module)["sharded"] = sharded
