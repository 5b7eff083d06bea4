"""What ``parallelize`` makes sure of before it changes anything."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..checks import check_divides
from ..nn import SplitRMSNorm
from ..nn.linear import _linear_features
from ..nn.sharding import ShardSpec, check_shardable
from .conversion import Conversion
from .plans import ParallelPlan, matches
from .replacements import converted_norm

#: The DTensors of 2.11 refuse parameters that are cut in several sections; with those of 2.9 the gradients of penalties
#: on listed parameters come out wrong, and nobody notices.
LEAST_TORCH = (2, 12)


def why_not_convert() -> str | None:
    """Why this torch cannot run converted models on several ranks; None if it can."""
    # By numbers: what NVIDIA's containers call 2.12.0a0 has the DTensors of 2.12.
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release >= LEAST_TORCH:
        return None
    wanted = ".".join(map(str, LEAST_TORCH))
    return f"parallelize needs the DTensors of torch {wanted} or newer, this is {torch.__version__}"


def check_torch(ranks: int) -> None:
    reason = why_not_convert() if ranks > 1 else None
    if reason is not None:
        raise RuntimeError(f"torch: {reason}; functions and modules run with 2.9 or newer")


def check_arguments(model: Any, seq_dim: Any, loss_parallel: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {model!r}")
    if seq_dim is not None and (isinstance(seq_dim, bool) or not isinstance(seq_dim, int) or seq_dim == -1):
        raise ValueError(f"seq_dim: expected a dimension other than the last, or None, got {seq_dim!r}")
    if not isinstance(loss_parallel, bool):
        raise ValueError(f"loss_parallel: expected True or False, got {loss_parallel!r}")
    meta = next((name for name, param in model.named_parameters() if param.is_meta), None)
    if meta is not None:
        raise ValueError(
            f"model: expected parameters with values, for norms are tried and ranks compared, {meta} is on the meta "
            "device; materialise it first"
        )


def check_fields(model: nn.Module, plan: ParallelPlan, ranks: int) -> None:
    """What the plan says besides styles is there: an attribute that is missed stays that of all heads."""
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
            count = count_of(module, wanted)
        except AttributeError:
            count = None  # type: ignore[assignment]
        if not isinstance(count, int):
            raise ValueError(f"{where}: {name} has no integer attribute {wanted!r}")


def check_sizes(model: nn.Module, plan: ParallelPlan, conversion: Conversion) -> None:
    """Everything that must divide does, and every module is of a kind its style can convert."""
    ranks = conversion.region.ranks
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


def check_ties(model: nn.Module, conversion: Conversion) -> None:
    """A weight that is cut in one place must not be whole in another."""
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


@torch.no_grad()
def digest(model: nn.Module) -> str:
    """A text that differs where names, shapes, dtypes or values of parameters or floating-point buffers differ."""
    found = []
    for name, param in model.named_parameters():
        value = param.double().sum().item()
        found.append(f"{name} {tuple(param.shape)} {param.dtype} {param.requires_grad} {value!r};")
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta:
            # Not the sum: that of a mask is -inf. By place: parts of a table may be permuted.
            held = buffer.double().nan_to_num(0.0, 1.0, -1.0).flatten()
            places = torch.linspace(1, 2, held.numel(), dtype=held.dtype, device=held.device)
            found.append(f"{name} {tuple(buffer.shape)} {buffer.dtype} {held.dot(places).item()!r};")
    return f"weights and buffers {short_hash(''.join(found))}: seed the ranks alike or load the same checkpoint"


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def matching(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if matches(pattern, name))


def divided(model: nn.Module, plan: ParallelPlan) -> Iterator[tuple[str, nn.Module, str]]:
    """Every attribute that counts what is cut: (module name, module, attribute)."""
    for pattern, attributes in plan.divided.items():
        for name, module in matching(model, pattern):
            yield from ((name, module, attribute) for attribute in attributes)


def counted(model: nn.Module, plan: ParallelPlan) -> dict[tuple[str, str], bool]:
    """(module, attribute) of all that counts what a rank has -> whether by division; else by assignment."""
    found = {(name, attribute): True for name, _, attribute in divided(model, plan)}
    for pattern, values in plan.assigned.items():
        found |= {(name, attribute): False for name, _ in matching(model, pattern) for attribute in values}
    return found


def count_of(module: Any, attribute: str) -> int:
    """``attribute`` of the module, or of its config where it is "config.name"."""
    owner, _, name = attribute.rpartition(".")
    count: int = getattr(getattr(module, owner) if owner else module, name)
    return count
