"""``explain(model)``: what every module of a parallelized model runs as, and why not faster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..kernels import choice
from ..nn import ColumnParallelLinear, RowParallelLinear
from .parallelize import Conversion, conversion_of


@dataclass(frozen=True)
class Row:
    """One module of the table."""

    module: str
    style: str
    engine: str
    chunks: str
    fused: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """The table; ``str()`` lays it out, ``rows`` holds it."""

    title: str
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        header = Row("module", "style", "engine", "chunks", "fused", "why")
        table = [tuple(vars(row).values()) for row in (header, *self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[5]]) for line in table
        ]
        lines.insert(1, "  ".join("-" * w for w in [*widths, len(header.why)]))
        return "\n".join([self.title, *(line.rstrip() for line in lines)])


def explain(model: nn.Module) -> Explanation:
    """Style, engine, chunk count, fused or not and why, for every converted module of ``model``.

    Engines and chunk counts are those of the last forward.

    Raises:
        ValueError: the model has not been parallelized.
    """
    conversion = conversion_of(model)
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    names = [name for name, _ in model.named_modules() if name in conversion.styles or name in conversion.edges]
    rows = tuple(_row(name, model.get_submodule(name), conversion, device) for name in names)
    region = conversion.region
    backend = "no group" if region.group is None else f"group of {region.ranks} ranks"
    count = len(conversion.replicated)
    title = f"{type(model).__name__}: {backend}, sequence at dim {region.seq_dim}; "
    title += f"gradients of {count} replicated parameters "
    title += "need no sum" if region.group is None else "are summed in one exchange a backward"
    return Explanation(title, rows)


def _row(name: str, module: nn.Module, conversion: Conversion, device: torch.device) -> Row:
    style = conversion.styles.get(name, "")
    if conversion.sections.get(name, 1) > 1:
        style += f":{conversion.sections[name]}"
    style = "+".join([*filter(None, [style]), *sorted(conversion.edges.get(name, ()), reverse=True)])
    if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
        ran = module.ran
        engine, chunks = ("not run yet", "") if ran is None else (ran.engine, str(ran.chunks))
        why = "" if ran is None else ran.reason
        family = next((f for f in conversion.shared if name in f), None)
        if family is not None:
            why += "; one gather with " + ", ".join(n.rpartition(".")[2] for n in family if n != name)
        pipelined = ran is not None and ran.engine != "single"
        fused = "yes" if pipelined or conversion.region.group is None else "no"
        return Row(name, style, engine, chunks, fused, why)
    handling = conversion.styles.get(name)
    if handling in ("norm", "dropout"):
        backend, kernel = _kernel(device)
    if handling == "norm":
        why = "one kernel for the norm; the residual add and dropout before it are the model's own statements"
        return Row(name, style, backend, "", "norm only", why + kernel)
    if handling == "dropout":
        return Row(
            name, style, backend, "", "no", "the model's forward drops and adds in statements of its own" + kernel
        )
    why = "left as it is" if handling else "edge of the sharded residual stream"
    return Row(name, style, "", "", "", why)


def _kernel(device: torch.device) -> tuple[str, str]:
    """The kernel backend, and a remark where it is not the preferred one."""
    backend, passed_over = choice(device)
    remarks = "".join(f"; not {name}: {reason}" for name, reason in passed_over.items())
    return backend or "none", remarks
