"""The record of one conversion: the call of ``parallelize``, and what the passes found and did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..layout import Group
from ..nn import ExpertForm, Region, SharedGather
from .alike import Alike
from .changes import Watch
from .cut import Cut
from .plans import ParallelPlan
from .shard_check import ShardCheck
from .structure import Structure
from .undo import Undo


class LossWithoutLogits(Protocol):
    """Computes the loss from a hidden state that stays a shard."""

    active: bool  # whether the current forward computes it

    @property
    def hides(self) -> bool:
        """Whether the current forward has a stand-in for the hidden state."""

    def hide(self, shard: Tensor) -> Tensor:
        """Keep ``shard`` and return a stand-in of the whole shape."""


class Conversion:
    """What :func:`parallelize` is asked to do with a model, and what it has done; ``model._seqpar``.

    The passes of :mod:`seqpar_kernels.convert.parallelize` each take a conversion and add to it.
    """

    plan: ParallelPlan

    def __init__(
        self,
        model: nn.Module,
        device_mesh: ProcessGroup | DeviceMesh | None,
        plan: ParallelPlan | Mapping[str, str] | None,
        seq_dim: int | None,
        engine: str,
        loss_parallel: bool,
        experts: str,
        sharing: Group,
        context_parallel: str | None,
        input_is_sharded: bool | str,
        recompute: str,
    ):
        """As :func:`parallelize`. Ranks of ``device_mesh`` share heads, those of ``sharing`` the sequence."""
        # The call.
        self.model = model
        self.device_mesh = device_mesh
        self.given_plan, self.given_seq_dim = plan, seq_dim
        self.engine = engine
        self.loss_parallel = loss_parallel
        self.experts = experts
        self.sharing, self.context_parallel, self.input_is_sharded = sharing, context_parallel, input_is_sharded
        self.recompute = recompute
        self.region = Region(device_mesh, -2 if seq_dim is None else seq_dim)
        # What the passes found and did.
        self.styles: dict[str, str] = {}  # module name -> handling style
        self.owned: dict[nn.Module, tuple[str, str]] = {}  # module -> (name, its style for the check)
        self.sections: dict[str, int | tuple[int, ...]] = {}  # module name -> packed sections, or heads that are shared
        self.expert_forms: dict[str, tuple[ExpertForm, str]] = {}  # module name -> its form, "ep" or "tp"
        self.edges: dict[str, set[str]] = {}  # module name -> styles at its edges
        self.shared: list[list[str]] = []  # names of siblings with one gather
        self.gathers: list[SharedGather] = []
        self.vocabulary_ends: tuple[str, str] | None = None  # embedding and head that are cut by vocabulary
        self.loss: LossWithoutLogits | None = None
        self.mesh: DeviceMesh | None = None  # of the listed parameters
        self.originals: dict[str, nn.Module] = {}  # name -> the module before the conversion
        self.cuts: dict[str, Cut] = {}  # name in the state_dict -> how the tensor is cut
        self.undo: Undo | None = None
        self.before_check: list[Callable[[Conversion], None]] = []  # called before a forward is checked
        self.trusted = False  # the plan is proven for this architecture
        self.batch: tuple[int, ...] = ()  # sizes ahead of the rows of the stream, in this forward
        self.running = False  # inside a forward of the whole model
        self.compiled = False  # torch.compile traces the whole model
        self.crossing = False  # deferred sums may leave their block
        self.replicated: list[nn.Parameter] = []
        self.alike: Alike | None = None  # compares forwards between the ranks
        self.structure: Structure | None = None  # as converted, or as checked last
        self.harmless_hooks: tuple[str, ...] = ()  # prefixes of __module__
        self.check: ShardCheck | None = None
        self.watch: Watch | None = None  # with several ranks
        self.context: Any = None  # a ContextParallel, where ranks share the sequence of a Transformers model
        self.checked: set[bool] = set()  # module.training of checked forwards

    @property
    def batch_ranks(self) -> int:
        """How many ranks are given the same batch: those that share heads, times those that share the sequence."""
        return self.region.ranks * (1 if self.context is None else self.context.ranks)

    def release(self, param: nn.Parameter) -> None:
        """Forget a parameter that fully_shard has replaced. Its module sums the gradients of the new one."""
        self.replicated = [other for other in self.replicated if other is not param]

    def inside_gathered(self, name: str) -> bool:
        """Whether a module around ``name`` has the style 'gather_input'."""
        gathered = (other for other, edges in self.edges.items() if "gather_input" in edges)
        return any(name.startswith(other + ".") for other in gathered)

    def own_modules(self, model: nn.Module) -> None:
        """Remember the modules that the conversion made or prepared, and the styles that ShardCheck expects there."""
        inner = {"colwise": "gathered_colwise", "shared_heads": "gathered_colwise"}
        for name, style in self.styles.items():
            found = inner.get(style, style) if self.inside_gathered(name) else style
            self.owned[model.get_submodule(name)] = name, found

    def edges_at(self, *styles: str) -> list[list[str]]:
        """For each of ``styles``, the names of the modules that have it at their edges."""
        return [[name for name, edges in self.edges.items() if style in edges] for style in styles]

    def planned_parameters(self, model: nn.Module) -> frozenset[str]:
        """Names of parameters that may meet shards or heads though no style covers the whole module."""
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
