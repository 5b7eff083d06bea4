"""First pass of a conversion: turns the arguments of ``parallelize`` into a style for every module of the plan.

It does not change the model. Errors name the argument.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..overlap.engines import check_engine
from .conversion import Conversion
from .plans import HANDLING, checked_plan, matches, matching, parse_style

#: The DTensors of 2.11 refuse parameters that are cut in several sections. With those of 2.9 the gradients of penalties
#: on listed parameters are wrong, without an error.
LEAST_TORCH = (2, 12)


def why_not_convert() -> str | None:
    """Why this torch cannot run converted models on several ranks; None if it can."""
    # Compare numbers only: 2.12.0a0 of NVIDIA's containers has the DTensors of 2.12.
    release = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if release >= LEAST_TORCH:
        return None
    wanted = ".".join(map(str, LEAST_TORCH))
    return f"parallelize needs the DTensors of torch {wanted} or newer, this is {torch.__version__}"


def check_call(conversion: Conversion) -> None:
    """Check the arguments of ``parallelize`` except the plan."""
    reason = why_not_convert() if conversion.region.ranks > 1 else None
    if reason is not None:
        raise RuntimeError(f"torch: {reason}; functions and modules run with 2.9 or newer")
    check_engine(conversion.engine)
    _check_arguments(conversion.model, conversion.given_seq_dim, conversion.loss_parallel)
    if conversion.experts not in ("auto", "ep", "tp"):
        raise ValueError(f"experts: expected 'auto', 'ep' or 'tp', got {conversion.experts!r}")
    if conversion.recompute not in ("auto", "none", "max"):
        raise ValueError(f"recompute: expected 'auto', 'none' or 'max', got {conversion.recompute!r}")
    if getattr(conversion.model, "_seqpar", None) is not None:
        raise ValueError(f"model: {type(conversion.model).__name__} has been parallelized already")


def _check_arguments(model: Any, seq_dim: Any, loss_parallel: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {model!r}")
    if seq_dim is not None and (isinstance(seq_dim, bool) or not isinstance(seq_dim, int) or seq_dim == -1):
        raise ValueError(f"seq_dim: expected a dimension other than the last, or None, got {seq_dim!r}")
    if not isinstance(loss_parallel, bool):
        raise ValueError(f"loss_parallel: expected True or False, got {loss_parallel!r}")
    meta = next((name for name, param in model.named_parameters() if param.is_meta), None)
    if meta is not None:
        raise ValueError(
            f"model: expected parameters with values, got {meta} on the meta device; materialise it first: norms are "
            "tried, and ranks compared"
        )


def take_given_plan(conversion: Conversion) -> None:
    """Take the plan that ``parallelize`` was given, if any."""
    if conversion.given_plan is not None:
        conversion.plan = checked_plan(conversion.given_plan)


def find_modules(conversion: Conversion) -> None:
    """Turn the plan's patterns into styles of modules.

    Raises:
        ValueError: a pattern matches nothing, or two styles of the plan exclude each other.
    """
    model, plan, styles = conversion.model, conversion.plan, conversion.styles
    names = [name for name, _ in model.named_modules() if name]
    for pattern, joined in plan.styles.items():
        found = [name for name in names if matches(pattern, name)]
        if not found:
            near = ", ".join(n for n in names if n.rpartition(".")[2] == pattern.rpartition(".")[2]) or ", ".join(
                names[:8]
            )
            raise ValueError(f"plan[{pattern!r}]: matches no module of {type(model).__name__}; it has {near}")
        for style in joined.split("+"):
            kind, count = parse_style(pattern, style)
            for name in found:
                if kind not in HANDLING:
                    conversion.edges.setdefault(name, set()).add(kind)
                elif styles.setdefault(name, kind) != kind:
                    raise ValueError(f"plan[{pattern!r}]: {name} is {kind!r} here and {styles[name]!r} elsewhere")
                else:
                    conversion.sections[name] = count
    _check_nesting(conversion)


def _check_nesting(conversion: Conversion) -> None:
    """Refuse a module with a style inside one whose style covers its children."""
    plan, styles = conversion.plan, conversion.styles
    for name, style in styles.items():
        if style == "own_parameters":
            continue
        inside = [other for other in styles if other.startswith(name + ".")]
        if inside:  # gradients would be summed twice
            raise ValueError(f"plan: {inside[0]} has the style {styles[inside[0]]!r} inside {name}, which is {style!r}")
    for pattern in (*plan.divided, *plan.assigned, *plan.cut):
        for name, _ in matching(conversion.model, pattern):
            around = [
                other for other, style in styles.items() if style == "replicated" and f"{name}.".startswith(other + ".")
            ]
            if around:
                raise ValueError(f"plan[{pattern!r}]: {name} is divided, but {around[0]} is 'replicated'")
