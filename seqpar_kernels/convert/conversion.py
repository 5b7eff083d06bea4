"""What ``parallelize`` did to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..nn import Region, SharedGather
from .alike import Alike
from .compiled import Seen
from .cut import Cut
from .loss import LossParallel
from .plans import ParallelPlan
from .shard_check import ShardCheck
from .undo import Snapshot

if TYPE_CHECKING:
    from .changes import Watch


class Conversion:
    """What :func:`parallelize` did to a model; ``model._seqpar``."""

    def __init__(self, region: Region, plan: ParallelPlan):
        self.region = region
        self.plan = plan
        self.styles: dict[str, str] = {}  # module name -> handling style
        self.owned: dict[nn.Module, tuple[str, str]] = {}  # the module itself -> (name, what the check expects there)
        self.sections: dict[str, int | tuple[int, ...]] = {}
        self.edges: dict[str, set[str]] = {}  # module name -> subset of the styles that are no handling
        self.shared: list[list[str]] = []
        self.gathers: list[SharedGather] = []
        self.loss: LossParallel | None = None
        self.cuts: dict[str, Cut] = {}  # by name in the state_dict
        self.snapshot: Snapshot | None = None
        self.trusted = False  # no plan of the user's: known to miss nothing
        self.running = False  # a forward of the whole model is under way
        self.compiled = False  # by torch.compile as a whole; modules inside may be compiled by themselves
        self.crossing = False  # deferred sums may leave their block
        self.replicated: list[nn.Parameter] = []
        self.alike: Alike | None = None  # compares forwards between the ranks
        self.seen: Seen | None = None  # what the last check has seen, or parallelize has left
        self.check: ShardCheck | None = None
        self.watch: Watch | None = None  # of a model on several ranks
        self.context: Any = None  # a ContextParallel, of a model whose sequence is shared by ranks
        self.checked: set[bool] = set()  # module.training of forwards that have been followed

    @property
    def batch_ranks(self) -> int:
        """How many ranks are given the same batch: those that share heads, times those that share the sequence."""
        return self.region.ranks * (1 if self.context is None else self.context.ranks)

    def release(self, param: nn.Parameter) -> None:
        """Forget a parameter that fully_shard has replaced: its module sums the gradients of what came instead."""
        self.replicated = [other for other in self.replicated if other is not param]

    def inside_gathered(self, name: str) -> bool:
        """Whether the sequence has been gathered at the entrance of a module around ``name``."""
        gathered = (other for other, edges in self.edges.items() if "gather_input" in edges)
        return any(name.startswith(other + ".") for other in gathered)

    def own_modules(self, model: nn.Module) -> None:
        """Remember the modules that have been made or prepared, and what :class:`ShardCheck` expects there."""
        inner = {"colwise": "gathered_colwise", "shared_heads": "gathered_colwise"}
        for name, style in self.styles.items():
            found = inner.get(style, style) if self.inside_gathered(name) else style
            self.owned[model.get_submodule(name)] = name, found

    def edges_at(self, *styles: str) -> list[list[str]]:
        """The modules at whose edges each of ``styles`` takes place."""
        return [[name for name, edges in self.edges.items() if style in edges] for style in styles]

    def planned_parameters(self, model: nn.Module) -> frozenset[str]:
        """Names of parameters that meet shards or heads inside modules with an entry of no other style."""
        names = [f"{name}.{p}" for name, module in model.named_modules() for p in getattr(module, "sharded", {})]
        for name, module in model.named_modules():
            if self.owned.get(module, ("", ""))[1] == "own_parameters":
                names += [f"{name}.{p}" for p, _ in module.named_parameters(recurse=False)]
        return frozenset(names)

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        raise RuntimeError("a parallelized model cannot be deep-copied; copy the model first, then parallelize")


def conversion_of(model: nn.Module) -> Conversion:
    """The record of a parallelized model.

    Raises:
        ValueError: the model has not been parallelized.
    """
    found = getattr(model, "_seqpar", None)
    if not isinstance(found, Conversion):
        raise ValueError(f"model: {type(model).__name__} has not been parallelized")
    return found
