"""``parallelize(model, mesh)``: an existing model, made sequence-parallel in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from ..checks import renamed
from ..comm.coordination import checked_together, coordination_of
from ..layout import Group, check_launched, resolve_group
from . import edge_hooks, fused_forwards, grad_scaler, hooks, optimizers, register, replacements, resolve, validate
from .conversion import Conversion
from .explain import refuse_unfused
from .hf import adapters, context_passes, generation, plan_from_config, pretrained, storage_writer, vocabulary_ends
from .hf import experts as expert_modules
from .plans import ParallelPlan
from .verify_offer import offering_verify

ModelT = TypeVar("ModelT", bound=nn.Module)
Step = Callable[[Conversion], None]

#: A conversion is these passes, in this order. Each pass is a tuple of steps. A step takes the Conversion and adds to
#: it. The passes of CHECKS do not change the model. They end on all ranks before any rank begins the passes of CHANGES.
CHECKS: dict[str, tuple[Step, ...]] = {
    "resolve": (
        resolve.check_call,
        adapters.refuse_adapters,
        context_passes.find_context,
        resolve.take_given_plan,
        plan_from_config.plan_from_model,
        resolve.find_modules,
        expert_modules.find_forms,
    ),
    "validate": (
        validate.check_fields,
        validate.check_sizes,
        validate.check_ties,
        vocabulary_ends.find_ends,
        grad_scaler.agree_on_overflow,
        storage_writer.refuse_lost_shards,
        optimizers.refuse_unfit_optimizers,
        validate.compare_calls,
        context_passes.compare_contexts,
    ),
}
CHANGES: dict[str, tuple[Step, ...]] = {
    "replace": (
        replacements.remember_whole,
        replacements.set_counts,
        replacements.cut_parameters,
        replacements.replace_modules,
        replacements.share_gathers,
        fused_forwards.fuse_activations,
    ),
    "attach": (
        pretrained.let_accelerate_hook,
        edge_hooks.install_edge_hooks,
        hooks.install_forward_hooks,
        expert_modules.gather_router_logits,
        vocabulary_ends.cut_ends,
    ),
    "register": (
        register.record,
        register.list_parameters,
        register.compare_forwards,
        register.initialise_whole_tensors,
        register.take_whole_checkpoints,
        pretrained.answer_for_ranks,
        generation.generate_alike,
        context_passes.install_context,
        fused_forwards.refuse_compiling,
        register.remember_structure,
        refuse_unfused,
    ),
}


@renamed(group_or_mesh="device_mesh")
def parallelize(
    model: ModelT,
    device_mesh: Group,
    plan: ParallelPlan | Mapping[str, str] | None = None,
    *,
    seq_dim: int | None = None,
    engine: str = "auto",
    loss_parallel: bool = False,
    experts: str = "auto",
    context_parallel: str | None = None,
    input_is_sharded: bool | str = False,
    recompute: str = "auto",
) -> ModelT:
    """Make ``model`` tensor- and sequence-parallel over ``device_mesh``, in place.

    Every rank passes the same whole model (same weights) and keeps its part. Afterwards the model is called as before,
    with the whole batch on every rank, and returns what the whole model returns (``loss_parallel`` and
    ``context_parallel``: see there); ``backward`` leaves complete gradients in every parameter.

    Args:
        model: a Hugging Face decoder that carries a tensor-parallel plan (docs/models.md), GPT-2, or any module with a
            ``plan``.
        device_mesh: 1-D DeviceMesh or ProcessGroup; None converts to the same kernels without communication. With
            ``context_parallel`` also a DeviceMesh of "cp" and "tp". Not before ``init_process_group`` in one of several
            processes of a launcher (WORLD_SIZE). Also taken under its old name, ``group_or_mesh``.
        plan: name pattern -> style (:mod:`seqpar_kernels.convert.plans`), or a ParallelPlan; None: the built-in one,
            else the one that follows from the model's own (:func:`seqpar_kernels.convert.derive_plan`).
        seq_dim: sequence dimension of the residual stream; default -2, [B, S, H].
        engine: how matmuls and collectives run, see :func:`seqpar_kernels.all_gather_linear`.
        loss_parallel: cut the embedding and the head of a Hugging Face causal language model by vocabulary. A forward
            with labels then returns the loss and no logits (``output.logits`` is None): they are never computed. A
            forward without labels returns whole logits, as before.
        experts: how the experts of a mixture are divided. ``"ep"``: whole ones, cut by number as
            ``torch.tensor_split`` cuts, tokens travel to the ranks that have theirs. ``"tp"``: every rank has a part of
            each, every token travels to all. ``"auto"``: ``"ep"`` where there is an expert for every rank.
        context_parallel: share the sequence of a Transformers model between the ranks of a mesh or group, or of the
            dimension "cp" of a mesh of "cp" and "tp": "auto", "ulysses", "ring" or "all_gather", the engine of
            :func:`seqpar_kernels.sequence_parallel_attention`. Logits are then those of this rank's rows, the loss is
            that of the whole batch (docs/long-context.md).
        input_is_sharded: the batch comes as this rank's rows: True in layout "contiguous", or the layout.
        recompute: what is not kept for the backward but computed again there, without a matmul or a collective.
            ``"auto"``: results of norms, activations and gated products, one pass each; norms of heads and activations
            run as one kernel. ``"max"``: also queries and keys that a norm of heads made. ``"none"``: nothing, all as
            the model's own statements keep it. torch.compile chooses by itself (docs/convert.md).

    Returns:
        ``model``.

    Raises:
        ValueError: no plan, a pattern that matches nothing, sizes or head counts that do not divide, or tied weights
            of which one place would be cut. The model has not been changed then.
        RuntimeError: the ranks hold different models or weights, torch is older than 2.12 with several ranks, or there
            is no process group though a launcher has started several processes.

    Examples:
        Under ``torchrun --nproc-per-node 2`` pass ``torch.distributed.group.WORLD`` in place of None.

        >>> import torch, seqpar_kernels as sp
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        >>> model = sp.parallelize(model, None, loss_parallel=True)
        >>> ids = torch.tensor([[3, 1, 4, 1]])
        >>> model(ids, labels=ids).loss.backward()
    """
    check_launched(device_mesh)
    sharing, tensor = context_passes.axes(device_mesh, context_parallel)
    shared = sharing, context_parallel, input_is_sharded, recompute
    conversion = Conversion(model, tensor, plan, seq_dim, engine, loss_parallel, experts, *shared)
    group = conversion.region.group
    if group is not None:
        coordination_of(group).conversions += 1
    with offering_verify(), checked_together(resolve_group(sharing)), checked_together(group):
        _run(CHECKS, conversion)
    _run(CHANGES, conversion)
    return model


def _run(passes: Mapping[str, tuple[Step, ...]], conversion: Conversion) -> None:
    for steps in passes.values():
        for step in steps:
            step(conversion)
