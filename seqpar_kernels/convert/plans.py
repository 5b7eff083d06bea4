"""Plans: which style each module of a model has.

A plan maps name patterns (``*`` stands for one name component) to styles joined by "+":

====================  ==================================================================================================
``colwise``           nn.Linear / Conv1D fed by the shard: gathers it, keeps this rank's output features. ``colwise:3``
                      cuts each of 3 equal packed projections (q|k|v) on its own, ``colwise:64,32,32`` of unequal ones
``shared_heads:2``    the same for keys or values of 2 heads on more ranks than that: neighbours compute the same head
``rowwise``           nn.Linear / Conv1D that ends the tensor-parallel part: reduce-scatters back to the shard
``norm``              LayerNorm or RMSNorm of any class on the shard: becomes the fused kernel, gradients summed
``split_norm``        RMSNorm over features that colwise has cut (q/k norms across all heads): statistics over all ranks
``dropout``           nn.Dropout on the shard: becomes the sharding-invariant one
``sequence``          any other module that treats rows one by one, left as it is: parameter gradients summed over ranks
``own_parameters``    a block whose own parameters (not those of its children) meet the shard: gradients summed
``tensor_parallel``   any other module between colwise and rowwise whose parameters every rank uses for its own heads:
                      left as it is, parameter gradients summed over ranks
``router``            the module that chooses a token's experts: ``sequence`` by another name
``experts``           the experts of a mixture, written for Transformers' experts interface, or ``nn.Experts``: whole
                      ones or a part of each on a rank (``parallelize(experts=)``)
``replicated``        a module that nothing can cut (linear attention, say): its input is gathered, every rank runs all
                      of it, and keeps its rows of the output. Right, but no faster than without the other ranks
``conditioning``      a module that computes from whole tensors what the shard is scaled, shifted or gated with (adaLN):
                      runs whole on every rank, the gradient of its output is summed over the ranks
``whole_input``       a module that reads the shape of its input before its colwise children gather it (the attention of
                      most Hugging Face decoders): it sees the whole shape, the children get the shard
``gather_input``      a module that computes with its input beside its colwise children (latent attention): the input is
                      gathered at its entrance; what is neither colwise nor rowwise in it is ``tensor_parallel``
``rows``              a module made of colwise and rowwise layers that may be given the shard's rows as [B * S/t, H]
                      (the shared expert of some mixtures): they are put into the shard's shape there, and back
``scatter_input``     the residual stream is cut into shards at this module's entrance
``gather_output``     the residual stream is gathered again behind this module
====================  ==================================================================================================

Modules that see whole tensors only (embeddings, heads) need no entry. A module without an entry that a shard reaches is
an error in the first forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

#: Styles that say how a module is converted. The other styles say what happens at its edges.
HANDLING = (
    "colwise",
    "shared_heads",
    "rowwise",
    "norm",
    "split_norm",
    "dropout",
    "sequence",
    "own_parameters",
    "tensor_parallel",
    "replicated",
    "conditioning",
    "experts",
)
#: Other names of styles.
ALIASES = {"router": "sequence"}
#: Argument names of the residual stream, for a module whose first argument it is not.
STREAM_NAMES = ("hidden_states", "x", "input")
STYLES = (*HANDLING, "whole_input", "gather_input", "rows", "scatter_input", "gather_output")


@dataclass(frozen=True)
class ParallelPlan:
    """A plan with more than the styles.

    Attributes:
        styles: pattern -> styles.
        divided: pattern -> integer attributes of matching modules that count what is cut (heads, split sizes) and are
            divided by the number of ranks.
        shared: groups of sibling names that are fed the same tensor and share one gather.
        heads: attributes of ``model.config`` that must be multiples of the number of ranks.
        assigned: pattern -> {integer attribute: its value on each rank}, where that is not a division.
        cut: pattern -> parameters of matching modules that hold an entry for each head (attention sinks); each rank
            keeps those of its heads.
        scattered: pattern -> arguments of matching modules that hold a row for every position and meet the shard.
        remarks: pattern -> why a module is handled as it is, for :func:`explain`.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(16), torch.nn.Linear(16, 32))
        >>> plan = sp.ParallelPlan({"0": "scatter_input+norm", "1": "colwise"}, remarks={"1": "the head"})
        >>> type(sp.parallelize(model, None, plan)[1]).__name__
        'ColumnParallelLinear'
    """

    styles: Mapping[str, str]
    divided: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    heads: tuple[str, ...] = ()
    assigned: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    cut: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scattered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


def checked_plan(plan: ParallelPlan | Mapping[str, str]) -> ParallelPlan:
    """The user's plan as a ParallelPlan.

    Raises:
        ValueError: no mapping, or an unknown style.
    """
    if not isinstance(plan, ParallelPlan):
        if not isinstance(plan, Mapping):
            raise ValueError(f"plan: expected a mapping of name patterns to styles, got {type(plan).__name__}")
        plan = ParallelPlan(dict(plan))
    for pattern, styles in plan.styles.items():
        if not isinstance(pattern, str) or not isinstance(styles, str):
            raise ValueError(f"plan[{pattern!r}]: expected a name pattern and its styles as text, got {styles!r}")
        for style in styles.split("+"):
            parse_style(pattern, style)
    return plan


def parse_style(pattern: str, style: str) -> tuple[str, int | tuple[int, ...]]:
    """("colwise", 3) of "colwise:3", ("colwise", (64, 32, 32)) of "colwise:64,32,32"; 1 with other styles.

    Raises:
        ValueError: an unknown style.
    """
    name, _, counts = style.strip().partition(":")
    name = ALIASES.get(name, name)
    sizes = tuple(int(c) if c.isdigit() else 0 for c in counts.split(",")) if counts else (1,)
    counted = {"colwise": (True, False), "shared_heads": (True,)}.get(name, (False,))
    if name not in STYLES or 0 in sizes or bool(counts) not in counted:
        raise ValueError(f"plan[{pattern!r}]: expected styles out of {STYLES} joined by '+', got {style!r}")
    return name, sizes if len(sizes) > 1 else sizes[0]


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` names the module; ``*`` stands for exactly one component."""
    if "*" not in pattern:
        return pattern == name
    return re.fullmatch(re.escape(pattern).replace(r"\*", "[^.]+"), name) is not None


def matching(model: nn.Module, pattern: str) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if matches(pattern, name))


def divided(model: nn.Module, plan: ParallelPlan) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (module name, module, attribute) of every attribute that ``plan.divided`` names."""
    for pattern, attributes in plan.divided.items():
        for name, module in matching(model, pattern):
            yield from ((name, module, attribute) for attribute in attributes)


def counted(model: nn.Module, plan: ParallelPlan) -> dict[tuple[str, str], bool]:
    """(module, attribute) of every count of a rank -> whether it is divided (else it is assigned)."""
    found = {(name, attribute): True for name, _, attribute in divided(model, plan)}
    for pattern, values in plan.assigned.items():
        found |= {(name, attribute): False for name, _ in matching(model, pattern) for attribute in values}
    return found


def count_of(module: Any, attribute: str) -> int:
    """``attribute`` of the module, or of its config with "config.name"."""
    owner, _, name = attribute.rpartition(".")
    count: int = getattr(getattr(module, owner) if owner else module, name)
    return count
