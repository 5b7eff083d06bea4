"""``parallelize(model, mesh)``: an existing model, made sequence-parallel in place."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from ..comm.coordination import agreement_of, checked_together
from ..layout import Group, check_launched, resolve_group
from ..nn import ColumnParallelLinear, Region, SharedGather
from ..overlap.engines import check_engine
from ..strict import strict_enabled
from .alike import comparison_enabled
from .checks import (
    check_arguments,
    check_fields,
    check_sizes,
    check_ties,
    check_torch,
    count_of,
    digest,
    divided,
    matching,
    short_hash,
)
from .comparison import compare_ranks
from .conversion import Conversion, conversion_of
from .derive import PROVEN, derive_plan
from .dtensor_params import cut_whole_tensors, cuts_of, present_parameters, shard_specs
from .generation import generate_alike
from .grad_scaler import agree_on_overflow
from .hf_storage import refuse_lost_shards
from .hooks import install_hooks
from .initialising import initialise_whole
from .loss_ends import ends_of, install
from .optimizers import refuse_unfit_optimizers
from .plans import HANDLING, ParallelPlan, built_in_plan, checked_plan, matches, parse_style
from .pretrained import answer_for_ranks, refuse_adapters
from .refusal import refuse_unfused
from .replacements import converted, cut_parameters
from .undo import Snapshot
from .verify_offer import offering_verify

__all__ = ["Conversion", "conversion_of", "parallelize"]

ModelT = TypeVar("ModelT", bound=nn.Module)


def parallelize(
    model: ModelT,
    group_or_mesh: Group,
    plan: ParallelPlan | Mapping[str, str] | None = None,
    *,
    seq_dim: int | None = None,
    engine: str = "auto",
    loss_parallel: bool = False,
    context_parallel: str | None = None,
    input_is_sharded: bool | str = False,
) -> ModelT:
    """Make ``model`` tensor- and sequence-parallel over ``group_or_mesh``, in place.

    Every rank passes the same whole model (same weights) and keeps its part. Afterwards the model is called as before,
    with the whole batch on every rank, and returns what the whole model returns; ``backward`` leaves complete gradients
    in every parameter.

    Args:
        model: a Hugging Face decoder that carries a tensor-parallel plan (docs/models.md), GPT-2, or any module with a
            ``plan``.
        group_or_mesh: ProcessGroup or 1-D DeviceMesh; None converts to the same kernels without communication.
            Not before ``init_process_group`` in one of several processes of a launcher (WORLD_SIZE).
        plan: name pattern -> style (:mod:`seqpar_kernels.convert.plans`), or a ParallelPlan; None: the built-in one,
            else the one that follows from the model's own (:func:`derive_plan`).
        seq_dim: sequence dimension of the residual stream; default -2, [B, S, H].
        engine: how matmuls and collectives run, see :func:`seqpar_kernels.all_gather_linear`.
        loss_parallel: cut the embedding and the head of a Hugging Face causal language model by vocabulary. A forward
            with labels then gives the loss and no logits (``output.logits`` is None): they never exist. One without
            labels gives whole logits, as before.
        context_parallel: share the sequence of a Transformers model between the ranks of a mesh or group, or of the
            dimension "cp" of a mesh of "cp" and "tp": "auto", "ulysses", "ring" or "all_gather", the engine of
            :func:`seqpar_kernels.sequence_parallel_attention`. Logits are then those of this rank's rows, the loss is
            that of the whole batch (docs/long-context.md).
        input_is_sharded: the batch comes as this rank's rows: True in layout "contiguous", or the layout.

    Returns:
        ``model``.

    Raises:
        ValueError: no plan, a pattern that matches nothing, sizes or head counts that do not divide, tied weights that
            would be torn apart. Nothing has been changed then.
        RuntimeError: the ranks hold different models or weights, a torch older than 2.12 with several ranks, or no
            process group where a launcher has started several.
    """
    check_launched(group_or_mesh)
    shared: Group = None  # the ranks of context_parallel
    if context_parallel is not None:
        from .hf.context_parallel import ContextParallel, axes

        shared, group_or_mesh = axes(group_or_mesh)
    context, sharing = None, resolve_group(shared)
    region = Region(group_or_mesh, -2 if seq_dim is None else seq_dim)
    agreement = None if region.group is None else agreement_of(region.group)
    if agreement is not None:
        agreement.conversions += 1
    with offering_verify(), checked_together(sharing), checked_together(region.group):
        check_torch(region.ranks)
        if region.ranks > 1:
            agree_on_overflow()
            refuse_lost_shards()
            refuse_unfit_optimizers()
        check_engine(engine)
        check_arguments(model, seq_dim, loss_parallel)
        if getattr(model, "_seqpar", None) is not None:
            raise ValueError(f"model: {type(model).__name__} has been parallelized already")
        refuse_adapters(model)
        if context_parallel is not None:
            if loss_parallel:
                raise ValueError("loss_parallel: expected False with context_parallel, got True")
            context = ContextParallel(model, shared, context_parallel, input_is_sharded)
        elif input_is_sharded:
            raise ValueError(f"input_is_sharded: expected False without context_parallel, got {input_is_sharded!r}")
        if context is not None and group_or_mesh is None and plan is None:
            plan = {}  # modules stay as they are
        settled = checked_plan(plan) if plan is not None else _own_plan(model, region.ranks)
        conversion = _resolve(model, settled, region)
        check_fields(model, settled, region.ranks)
        check_sizes(model, settled, conversion)
        check_ties(model, conversion)
        ends = ends_of(model, conversion) if loss_parallel else None
        if agreement is not None:
            how = f"seq_dim={region.seq_dim}, engine={engine!r}, loss_parallel={loss_parallel}"
            how += "" if comparison_enabled() else ", SEQPAR_COMPARE_RANKS=0"
            call = f"parallelize number {agreement.conversions} of {type(model).__name__}"
            agreement.require(f"{call}, {how}, plan {short_hash(repr(settled))}, with {digest(model)}")
        if context is not None and sharing is not None:
            agreement_of(sharing).require(f"parallelize {type(model).__name__}, {context.describe()}, {digest(model)}")
    conversion.trusted = plan is None and getattr(getattr(model, "config", None), "model_type", None) in PROVEN
    conversion.snapshot = Snapshot(model)
    for _, module, attribute in divided(model, settled):
        _set_count(module, attribute, count_of(module, attribute) // region.ranks)
    for pattern, values in settled.assigned.items():
        for _, module in matching(model, pattern):
            for attribute, value in values.items():
                _set_count(module, attribute, value)
    for pattern, names in settled.cut.items():
        for _, module in matching(model, pattern):
            cut_parameters(module, names, region)
    originals, places = dict(model.named_modules()), _places(model)
    for name, style in conversion.styles.items():
        old = model.get_submodule(name)
        new = converted(old, name, style, conversion, engine)
        for parent, child in places[old] if new is not old else ():
            setattr(parent, child, new)
    conversion.own_modules(model)
    _share_gathers(model, settled, conversion)
    install_hooks(model, conversion)
    if ends is not None:
        install(model, conversion, ends, engine)
    model._seqpar = conversion  # type: ignore[assignment]
    conversion.snapshot.release(model)
    if region.group is not None:
        mesh = _mesh_of(group_or_mesh, region.group, model)
        present_parameters(model, mesh, shard_specs(model), conversion.release)
        conversion.cuts = cuts_of(model)
        conversion.alike = compare_ranks(model, conversion)
        initialise_whole(model, originals, conversion)
        model.register_load_state_dict_pre_hook(cut_whole_tensors)
        answer_for_ranks(model, mesh)
        generate_alike(model, conversion)
    if context is not None:
        conversion.context = context
        context.install(model, region.rank)
        if sharing is not None and region.group is None:
            answer_for_ranks(model, _mesh_of(shared, sharing, model))
        elif sharing is not None and hasattr(model, "_tp_size"):
            setattr(model, "_tp_size", conversion.batch_ranks)  # noqa: B010 (mypy takes it for a module)
    if conversion.seen is not None:
        conversion.seen.remember()
    if strict_enabled():
        refuse_unfused(model)
    return model


def _mesh_of(group_or_mesh: Group, group: ProcessGroup, model: nn.Module) -> DeviceMesh:
    device = next((param.device.type for param in model.parameters()), "cpu")
    return group_or_mesh if isinstance(group_or_mesh, DeviceMesh) else DeviceMesh.from_group(group, device)


def _own_plan(model: nn.Module, ranks: int) -> ParallelPlan:
    return built_in_plan(model) or derive_plan(model, ranks)


def _resolve(model: nn.Module, plan: ParallelPlan, region: Region) -> Conversion:
    """Patterns to modules."""
    conversion = Conversion(region, plan)
    styles = conversion.styles
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
    for name, style in styles.items():
        if style == "own_parameters":
            continue
        inside = [other for other in styles if other.startswith(name + ".")]
        if inside:  # gradients would be summed twice
            raise ValueError(f"plan: {inside[0]} has the style {styles[inside[0]]!r} inside {name}, which is {style!r}")
    for pattern in (*plan.divided, *plan.assigned, *plan.cut):
        for name, _ in matching(model, pattern):
            around = [
                other for other, style in styles.items() if style == "replicated" and f"{name}.".startswith(other + ".")
            ]
            if around:
                raise ValueError(f"plan[{pattern!r}]: {name} is divided, but {around[0]} is 'replicated'")
    return conversion


def _places(model: nn.Module) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
    """module -> every (parent, name) that holds it: one norm may serve twice."""
    found: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            if module is not None:
                found.setdefault(module, []).append((parent, child))
    return found


def _set_count(module: Any, attribute: str, value: int) -> None:
    """The config is the whole model's: the module gets a copy of its own."""
    owner, _, name = attribute.rpartition(".")
    if owner:
        setattr(module, owner, copy.copy(getattr(module, owner)))
        module = getattr(module, owner)
    setattr(module, name, value)


def _share_gathers(model: nn.Module, plan: ParallelPlan, conversion: Conversion) -> None:
    """Siblings fed the same tensor get one gather."""
    for family in plan.shared:
        for parent_name, parent in model.named_modules():
            members = [getattr(parent, child, None) for child in family]
            alone = (
                isinstance(m, ColumnParallelLinear) and not m.input_is_whole and m.shared_gather is None
                for m in members
            )
            if all(alone):
                shared = SharedGather(members)  # type: ignore[arg-type]
                for member in members:
                    member.shared_gather = shared  # type: ignore[union-attr]
                prefix = f"{parent_name}." if parent_name else ""
                conversion.gathers.append(shared)
                conversion.shared.append([prefix + child for child in family])
