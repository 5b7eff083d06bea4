"""``parallelize(model, mesh)``: an existing model, made sequence-parallel in place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from ..functional import gather_sequence, replicated, scatter_sequence
from ..layout import Group
from ..nn import ColumnParallelLinear, Dropout, LayerNorm, Region, RMSNorm, RowParallelLinear, SharedGather
from ..nn.linear import _linear_features
from ..nn.region import show_whole
from ..nn.sharding import ShardSpec, check_shardable
from ..overlap.agreement import agreement_of, checked_together
from ..overlap.planner import check_engine
from .plans import ParallelPlan, matches, parse_style, plan_for
from .shard_check import ShardCheck, is_shard, mark

ModelT = TypeVar("ModelT", bound=nn.Module)

#: Styles that say what becomes of a module; the others say what happens at its edges.
_HANDLING = ("colwise", "rowwise", "norm", "dropout", "sequence", "tensor_parallel")


class Conversion:
    """What :func:`parallelize` did to a model; ``model._seqpar``."""

    def __init__(self, region: Region, styles: dict[str, str], sections: dict[str, int], edges: dict[str, set[str]]):
        self.region = region
        self.styles = styles  # module name -> handling style
        self.sections = sections
        self.edges = edges  # module name -> subset of {"scatter_input", "whole_input", "gather_output"}
        self.shared: list[list[str]] = []
        self.gathers: list[SharedGather] = []
        self.trusted = False  # a built-in plan: known to miss nothing
        self.replicated: list[nn.Parameter] = []
        self.check: ShardCheck | None = None
        self.checked: set[bool] = set()  # module.training of forwards that have been followed

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


def parallelize(
    model: ModelT,
    group_or_mesh: Group,
    plan: ParallelPlan | Mapping[str, str] | None = None,
    *,
    seq_dim: int | None = None,
    engine: str = "auto",
    loss_parallel: bool = False,
) -> ModelT:
    """Make ``model`` tensor- and sequence-parallel over ``group_or_mesh``, in place.

    Every rank passes the same whole model (same weights) and keeps its part. Afterwards the model is called as before,
    with the whole batch on every rank, and returns what the whole model returns; ``backward`` leaves complete gradients
    in every parameter.

    Args:
        model: a Hugging Face GPT-2 or Llama model as it is, or any module with a ``plan``.
        group_or_mesh: ProcessGroup or 1-D DeviceMesh; None converts to the same kernels without communication.
        plan: name pattern -> style (:mod:`seqpar_kernels.convert.plans`), or a ParallelPlan; None: the built-in one.
        seq_dim: sequence dimension of the residual stream; default -2, [B, S, H].
        engine: how matmuls and collectives run, see :func:`seqpar_kernels.all_gather_linear`.
        loss_parallel: vocabulary-parallel head and loss; not available yet.

    Returns:
        ``model``.

    Raises:
        ValueError: no plan, a pattern that matches nothing, sizes or head counts that do not divide, tied weights that
            would be torn apart. Nothing has been changed then.
        RuntimeError: the ranks hold different models or weights.
    """
    region = Region(group_or_mesh, -2 if seq_dim is None else seq_dim)
    agreement = None if region.group is None else agreement_of(region.group)
    if agreement is not None:
        agreement.conversions += 1
    with checked_together(region.group):
        if loss_parallel:
            raise ValueError("loss_parallel: expected False, a vocabulary-parallel loss is not there in this version")
        check_engine(engine)
        if getattr(model, "_seqpar", None) is not None:
            raise ValueError(f"model: {type(model).__name__} has been parallelized already")
        settled = plan_for(model, plan)
        conversion = _resolve(model, settled, region)
        _check_sizes(model, settled, conversion)
        _check_ties(model, conversion)
        if agreement is not None:
            call = f"parallelize number {agreement.conversions} of {type(model).__name__}"
            agreement.require(f"{call} with {_digest(model)}")
    conversion.trusted = plan is None
    for _, module, attribute in _divided(model, settled):
        setattr(module, attribute, getattr(module, attribute) // region.ranks)
    for name, style in conversion.styles.items():
        _convert(model, name, style, conversion, engine)
    _share_gathers(model, settled, conversion)
    _install_hooks(model, conversion)
    model._seqpar = conversion  # type: ignore[assignment]
    return model


def _resolve(model: nn.Module, plan: ParallelPlan, region: Region) -> Conversion:
    """Patterns to modules."""
    styles: dict[str, str] = {}
    sections: dict[str, int] = {}
    edges: dict[str, set[str]] = {}
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
                if kind not in _HANDLING:
                    edges.setdefault(name, set()).add(kind)
                elif styles.setdefault(name, kind) != kind:
                    raise ValueError(f"plan[{pattern!r}]: {name} is {kind!r} here and {styles[name]!r} elsewhere")
                else:
                    sections[name] = count
    for name, style in styles.items():
        inside = [other for other in styles if other.startswith(name + ".")]
        if inside:  # gradients would be summed twice
            raise ValueError(f"plan: {inside[0]} has the style {styles[inside[0]]!r} inside {name}, which is {style!r}")
    return Conversion(region, styles, sections, edges)


def _divided(model: nn.Module, plan: ParallelPlan) -> Iterator[tuple[str, nn.Module, str]]:
    """Every attribute that counts what is cut: (module name, module, attribute)."""
    for pattern, attributes in plan.divided.items():
        for name, module in model.named_modules():
            if matches(pattern, name):
                yield from ((name, module, attribute) for attribute in attributes)


def _check_sizes(model: nn.Module, plan: ParallelPlan, conversion: Conversion) -> None:
    """Everything that must divide does, and every module is of a kind its style can convert."""
    ranks = conversion.region.ranks
    config: Any = getattr(model, "config", None)
    for attribute in plan.heads:
        count = getattr(config, attribute)
        if count % ranks:
            raise ValueError(
                f"model.config.{attribute}: expected a multiple of the {ranks} ranks of the group, got {count}"
            )
    for name, module, attribute in _divided(model, plan):
        got = getattr(module, attribute)
        if got % ranks:
            raise ValueError(f"{name}.{attribute}: expected a multiple of the {ranks} ranks, got {got}")
    for name, style in conversion.styles.items():
        module = model.get_submodule(name)
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if style not in ("sequence", "tensor_parallel") and any(getattr(module, kind) for kind in hooks):
            raise ValueError(f"{name}: has hooks that the conversion would drop; register them after parallelize")
        if style in ("colwise", "rowwise"):
            try:
                features_in, features_out, _ = _linear_features(module)
            except ValueError as error:
                raise ValueError(f"{name}: style {style!r}: {error}") from error
            label, size = ("out_features", features_out) if style == "colwise" else ("in_features", features_in)
            check_shardable(f"{name}.{label}", size, ShardSpec(0, conversion.sections[name]), ranks)
        elif style == "dropout" and not isinstance(module, nn.Dropout):
            raise ValueError(f"{name}: style 'dropout' takes torch.nn.Dropout, got {type(module).__name__}")
        elif style == "norm":
            try:
                _converted_norm(module)
            except ValueError as error:
                raise ValueError(f"{name}: style 'norm': {error}") from error


def _check_ties(model: nn.Module, conversion: Conversion) -> None:
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
def _digest(model: nn.Module) -> str:
    """A text that differs where names, shapes, dtypes or values of the parameters differ."""
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        value = "meta" if param.is_meta else param.double().sum().item()
        digest.update(f"{name} {tuple(param.shape)} {param.dtype} {param.requires_grad} {value!r};".encode())
    return f"weights {digest.hexdigest()[:16]}: seed the ranks alike or load the same checkpoint"


def _converted_norm(module: nn.Module, region: Region | None = None) -> LayerNorm | RMSNorm:
    group, seq_dim = (region.group, region.seq_dim) if region is not None else (None, -2)
    if isinstance(module, nn.LayerNorm):
        return LayerNorm.from_torch(module, group, seq_dim=seq_dim)
    return RMSNorm.from_torch(module, group, seq_dim=seq_dim)


def _convert(model: nn.Module, name: str, style: str, conversion: Conversion, engine: str) -> None:
    """Put the parallel twin in a module's place, with its hooks."""
    region = conversion.region
    old: Any = model.get_submodule(name)
    new: Any
    place: dict[str, Any] = {"seq_dim": region.seq_dim, "engine": engine}
    if style == "colwise":
        new = ColumnParallelLinear.from_torch(old, region.group, sections=conversion.sections[name], **place)
    elif style == "rowwise":
        new = RowParallelLinear.from_torch(old, region.group, **place)
    elif style == "norm":
        new = _converted_norm(old, region)
        conversion.replicated += new.parameters(recurse=False)
    elif style == "dropout":
        new = Dropout.from_torch(old, region.group, seq_dim=region.seq_dim)
    else:
        conversion.replicated += old.parameters()
        _sum_gradients_of(old, region)
        return
    new.region = region
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _sum_gradients_of(module: nn.Module, region: Region) -> None:
    """Make ``module`` compute with parameters whose gradients are summed over the ranks."""
    forward = module.forward

    def summed_forward(*args: Any, **kwargs: Any) -> Any:
        params = dict(module.named_parameters())
        tensors, summed = region.parameters(*params.values())
        if not summed and region.group is not None:
            tensors = replicated(tensors, region.group)
        cast = {n: None if t is None else t.to(p.dtype) for (n, p), t in zip(params.items(), tensors, strict=True)}
        with _reparametrize_module(module, cast):  # type: ignore[arg-type]
            return forward(*args, **kwargs)

    module.forward = summed_forward


def _share_gathers(model: nn.Module, plan: ParallelPlan, conversion: Conversion) -> None:
    """Siblings fed the same tensor get one gather."""
    for family in plan.shared:
        for parent_name, parent in model.named_modules():
            members = [getattr(parent, child, None) for child in family]
            if all(isinstance(member, ColumnParallelLinear) for member in members):
                shared = SharedGather(members)  # type: ignore[arg-type]
                for member in members:
                    member.shared_gather = shared  # type: ignore[union-attr]
                prefix = f"{parent_name}." if parent_name else ""
                conversion.gathers.append(shared)
                conversion.shared.append([prefix + child for child in family])


# --- hooks -----------------------------------------------------------------------------------------------------------


def _install_hooks(model: nn.Module, conversion: Conversion) -> None:
    region = conversion.region
    unique = {id(param): param for param in conversion.replicated if param is not None}
    conversion.replicated = list(unique.values())
    for name, edges in conversion.edges.items():
        module = model.get_submodule(name)
        if "scatter_input" in edges:
            module.register_forward_pre_hook(_scatter_hook(name, conversion), with_kwargs=True, prepend=True)
        if "whole_input" in edges:
            module.register_forward_pre_hook(_whole_hook(name, conversion), with_kwargs=True, prepend=True)
        if "gather_output" in edges:
            module.register_forward_hook(_gather_hook(name, conversion))
    if region.group is None:
        return

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        cleanup(module)  # what an interrupted forward may have left
        region.seq_len = None
        config = getattr(module, "config", None)
        if kwargs.get("output_hidden_states", getattr(config, "output_hidden_states", False)):
            raise ValueError(
                "output_hidden_states: expected False, the hidden states of a sequence-parallel model are shards"
            )
        if torch.is_grad_enabled():
            trained = [param for param in conversion.replicated if param.requires_grad]
            tensors = replicated(trained, region.group) if trained else []  # type: ignore[arg-type]
            region.summed = dict(zip(trained, tensors, strict=True))  # type: ignore[arg-type]
            region.summed.update((p, p) for p in conversion.replicated if not p.requires_grad)
        if module.training in conversion.checked:
            return
        if torch.compiler.is_compiling():
            if not conversion.trusted:
                raise RuntimeError(
                    "a plan is checked by the first forward, which must be an eager one: call the model once before "
                    "torch.compile"
                )
            return
        gathers = frozenset(name for name, edges in conversion.edges.items() if "gather_output" in edges)
        conversion.check = ShardCheck(model, conversion.styles, gathers)
        conversion.check.start()

    def finished(module: nn.Module, args: Any, output: Any) -> None:
        if conversion.check is not None:
            conversion.check.stop()
            conversion.check.check_output(output)
            conversion.checked.add(module.training)

    def cleanup(module: nn.Module, *_: Any) -> None:
        region.summed = {}  # seq_len stays: a recomputation in the backward needs it
        for gather in conversion.gathers:
            gather.clear()
        check, conversion.check = conversion.check, None
        if check is not None:
            check.stop()

    model.register_forward_pre_hook(before, with_kwargs=True)
    model.register_forward_hook(finished)
    model.register_forward_hook(cleanup, always_call=True)


def _residual_stream(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor at a module's entrance, and (args, kwargs) with another in its place."""
    if args and isinstance(args[0], Tensor):
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    key = next((key for key in ("hidden_states", "x", "input") if isinstance(kwargs.get(key), Tensor)), None)
    if key is not None:
        return kwargs[key], lambda x: (args, {**kwargs, key: x})
    raise RuntimeError(
        f"{name}: the plan found no tensor at its entrance: no first argument, hidden_states=, x= or input="
    )


def _scatter_hook(name: str, conversion: Conversion) -> Callable[..., Any]:
    region = conversion.region

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if region.group is None:
            return None
        x, rebuilt = _residual_stream(name, args, kwargs)
        if is_shard(x) and conversion.check is not None:
            raise RuntimeError(f"{name}: 'scatter_input' was given a sequence shard: the plan scatters twice")
        length = x.shape[region.seq_dim]
        # Only where it is needed: a recomputation during backward must not find the length of a later forward.
        region.seq_len = length if length % region.ranks else None
        shard = scatter_sequence(x, region.group, region.seq_dim)
        if conversion.check is not None:
            mark(shard, True)
        return rebuilt(shard)

    return hook


def _whole_hook(name: str, conversion: Conversion) -> Callable[..., Any]:
    region = conversion.region

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if region.group is None:
            return None
        x, rebuilt = _residual_stream(name, args, kwargs)
        stand_in = show_whole(x, region)
        if conversion.check is not None:
            mark(stand_in, True)
        return rebuilt(stand_in)

    return hook


def _gather_hook(name: str, conversion: Conversion) -> Callable[..., Any]:
    region = conversion.region

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if region.group is None:
            return None
        first = output[0] if isinstance(output, tuple) and output else output
        if not isinstance(first, Tensor):
            raise RuntimeError(
                f"{name}: 'gather_output' takes a module that returns a tensor or a tuple that begins with one, "
                f"got {type(first).__name__}"
            )
        # What follows runs alike on every rank, so each has the whole gradient: the backward splits.
        whole = gather_sequence(
            first, region.group, region.seq_dim, seq_len=region.seq_len, tensor_parallel_output_grad=False
        )
        if conversion.check is not None:
            mark(whole, False)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return hook
