"""Messages of the first forward's check: a trained tensor meets a shard, or this rank's heads."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import nn

from .culprit import statement
from .marks import Kind

_FITTING = {
    Kind.SHARD: "'norm', 'colwise', 'rowwise', or 'sequence' for a module that treats rows one by one",
    Kind.PARTS: "'tensor_parallel' where every rank uses it for its own heads, or 'rowwise'",
    Kind.COPIED: "'conditioning' for what computes the tensor",
}


def called(source: str) -> str:
    return source if " " in source else f"parameter {source!r}"


def replaced(name: str, style: str, forward: Any) -> str:
    """The error: ``forward`` has taken the place of that of the module called ``name``."""
    function = getattr(forward, "__func__", forward)
    what = f"{getattr(function, '__qualname__', function)} of {getattr(function, '__module__', '?')}"
    return (
        f"{name}: its forward has been replaced by {what} since parallelize, which does not do what the style "
        f"{style!r} needs: gradients would be a different part of the sum on every rank. Leave this module out of "
        "the patch (of use_liger_kernel, liger_kernel_config={'rms_norm': False}, say), or patch before parallelize"
    )


def missed(
    kind: Kind,
    source: str,
    as_it_is: bool,
    where: str,
    model: str,
    owned: Mapping[nn.Module, tuple[str, str]],
    ran: Container[nn.Module],
) -> str:
    """The error: in ``where`` of ``model`` a tensor of ``kind`` meets ``source``.

    ``source`` is a parameter's name or, with blanks, the description of a tensor; ``as_it_is``: the parameter itself is
    met, not what was computed from it. ``owned``: as of ShardCheck; ``ran``: those of them that have run.
    """
    at = statement()
    apart = "its gradient would be a different part of the sum on every rank"
    otherwise = "Otherwise freeze it (requires_grad_(False)), or merge it into the weights before parallelize"
    if " " in source:
        return (
            f"{where}: {kind.value} meets {source} ({at}): {apart}. Hold it as a parameter of a module that the "
            f"plan gives a style that fits before parallelize: {_FITTING[kind]}; or use it where the sequence is "
            f"whole (prompt tuning in place of prefix tuning, say). {otherwise}"
        )
    module, _, child = source.rpartition(".")
    if kind is Kind.COPIED:
        return (
            f"{where}: {kind.value} ('conditioning', or copy_to_tensor_parallel) meets {source!r} in {at}, and no "
            "shard: what is whole on every rank would count once for every rank. The style is for modules whose "
            "output meets the shard, and that alone"
        )
    elsewhere = not f"{where}.".startswith(f"{module}.") and where != model
    if elsewhere and not as_it_is:
        block = where if where not in {name for name, _ in owned.values()} else where.rpartition(".")[0]
        return (
            f"{block}: {kind.value} meets a tensor that is whole on every rank and was computed from parameters "
            f"({source!r} among them) in {at}: their gradients would be a different part of the sum on every rank. "
            "Where a module of the block computes it (adaLN_modulation, say), give that module the style "
            "'conditioning', which sums the gradient of its output over the ranks; by hand, "
            "seqpar_kernels.copy_to_tensor_parallel(tensor, group) does so; or give the whole block the style "
            f"'replicated'. A parameter that is used there alone: add {module!r} to the plan with a style that "
            f"fits: {_FITTING[kind]}"
        )
    owner = next((m for m, (name, _) in owned.items() if name == module), None)
    if owner is not None and child in ("weight", "bias") and owner not in ran and "forward" in vars(owner):
        return replaced(*owned[owner], vars(owner)["forward"])
    add = f"Add {module!r} to the plan with a style that fits: {_FITTING[kind]}"
    if owner is not None:
        add = f"It is none of the parameters that {owned[owner][1]!r} handles: put it into a module of its own"
        add += f", and that into the plan before parallelize: {_FITTING[kind]}"
    return (
        f"{module or model}: {kind.value} reaches parameter {source!r}, which the plan does "
        f"not cover ({at}): {apart}. {add}. {otherwise}"
    )
