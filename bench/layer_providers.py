"""Who is timed in ``bench layer`` on one rank of t: ours with each fusion off, by hand, DTensor, megatron-core."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.nn.transformer import FUSIONS

from .check import WrongResult, error_ratio
from .facts import DTYPES
from .layer_plain import EPS, LayerCase, PlainLayer, part_of, whole_weights
from .providers import Absent

Group = dist.ProcessGroup | None


@dataclass
class Provider:
    """A layer on this rank.

    Attributes:
        call: x -> y, [B, S/t, H] each; [B, S, H] where ``whole``.
        params: by the names of ``seqpar_kernels.nn.TransformerLayer``.
    """

    call: Callable[[Tensor], Tensor]
    params: dict[str, Tensor]
    whole: bool = False


Builder = Callable[[LayerCase, str, Group], Provider]


def ours(*off: str) -> Builder:
    """With these fusions switched off."""

    def build(case: LayerCase, device: str, group: Group) -> Provider:
        options: dict[str, Any] = {"intermediate_size": case.f, "dropout": case.p, "eps": EPS}
        options.update(dict.fromkeys(off, False))
        make = sp.TransformerLayer
        if case.llama:
            make = sp.TransformerLayer.llama
            options["num_kv_heads"] = case.kv
        whole = make(case.h, case.a, **options, device=device, dtype=DTYPES[case.dtype])
        whole.load_state_dict(whole_weights(case, device))
        layer = sp.TransformerLayer.from_torch(whole, group)
        return Provider(layer, dict(layer.named_parameters()))

    return build


def eager(case: LayerCase, device: str, group: Group) -> Provider:
    layer = PlainLayer(case, DTYPES[case.dtype], device)
    return Provider(layer, layer.parameters_by_name(), whole=True)


def compiled(case: LayerCase, device: str, group: Group) -> Provider:
    torch._dynamo.reset()
    layer = PlainLayer(case, DTYPES[case.dtype], device)
    return Provider(torch.compile(layer, dynamic=False, fullgraph=True), layer.parameters_by_name(), whole=True)


def by_hand(mode: str) -> Builder:
    def build(case: LayerCase, device: str, group: Group) -> Provider:
        layer = PlainLayer(case, DTYPES[case.dtype], device, mode, group)
        return Provider(layer, layer.parameters_by_name(), whole=mode == "tp")

    return build


def dtensor(case: LayerCase, device: str, group: Group) -> Provider:
    """PyTorch's own plan for a sequence-parallel layer, as torchtitan writes it: one gather for q, k and v."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    assert group is not None
    mesh = init_device_mesh(device, (group.size(),))
    layer = PlainLayer(case, DTYPES[case.dtype], device)
    whole = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    plan: dict[str, Any] = {"norm1": SequenceParallel(), "norm2": SequenceParallel(), "attention": whole, "mlp": whole}
    for name in case.linears():
        row = name in ("out_proj", "down_proj")
        style = RowwiseParallel(output_layouts=Shard(1)) if row else ColwiseParallel()
        inside = "attention" if name in ("q_proj", "k_proj", "v_proj", "out_proj") else "mlp"
        plan[f"{inside}.{name}"] = style
    module = parallelize_module(layer, mesh, plan)

    def forward(x: Tensor) -> Tensor:
        y = module(x)
        return y.wait() if hasattr(y, "wait") else y

    return Provider(forward, layer.parameters_by_name())


def megatron(case: LayerCase, device: str, group: Group) -> Provider:
    """megatron-core's TransformerLayer with sequence_parallel, its local (not Transformer Engine) modules."""
    if importlib.util.find_spec("megatron") is None:
        raise Absent("megatron-core is not installed")
    if device == "cpu":
        raise Absent("megatron-core's attention has no CPU path; its linears run in `bench linear`")
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import build_module

    assert group is not None
    if case.llama:
        raise Absent("its Llama layer takes its rotation from the model around it")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=group.size())
        model_parallel_cuda_manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=case.h,
        num_attention_heads=case.a,
        ffn_hidden_size=case.f,
        hidden_dropout=case.p,
        attention_dropout=0.0,
        layernorm_epsilon=EPS,
        tensor_model_parallel_size=group.size(),
        sequence_parallel=True,
        params_dtype=DTYPES[case.dtype],
    )
    layer = build_module(get_gpt_layer_local_spec(), config=config, layer_number=1).cuda()
    params = _megatron_weights(layer, case, group)
    return Provider(lambda x: layer(x.transpose(0, 1), attention_mask=None)[0].transpose(0, 1), params)


@torch.no_grad()
def _megatron_weights(layer: nn.Module, case: LayerCase, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Fills it with ours; q, k and v of a head lie together there, so their gradients are not compared."""
    weights = whole_weights(case, "cuda")
    size = case.h // case.a
    names = {
        "norm1": "input_layernorm",
        "norm2": "pre_mlp_layernorm",
        "out_proj": "self_attention.linear_proj",
        "up_proj": "mlp.linear_fc1",
        "down_proj": "mlp.linear_fc2",
    }
    found = {}
    for ours, theirs in names.items():
        for leaf in ("weight", "bias"):
            param = found[f"{ours}.{leaf}"] = layer.get_parameter(f"{theirs}.{leaf}")
            param.copy_(part_of(f"{ours}.{leaf}", weights[f"{ours}.{leaf}"], group.size(), group.rank()))
    for leaf in ("weight", "bias"):
        heads = [weights[f"{name}.{leaf}"].unflatten(0, (case.a, size)) for name in ("q_proj", "k_proj", "v_proj")]
        packed = torch.stack(heads, 1).flatten(0, 2)
        layer.get_parameter(f"self_attention.linear_qkv.{leaf}").copy_(packed.chunk(group.size(), 0)[group.rank()])
    return found


OURS: dict[str, Builder] = {"ours": ours(), **{f"ours without {name}": ours(name) for name in FUSIONS}}
#: On one rank, and on several.
SINGLE: dict[str, Builder] = {"eager": eager, "compile": compiled}
PEERS: dict[str, Builder] = {"by-hand": by_hand("sp"), "dtensor": dtensor, "megatron": megatron}


def inputs(case: LayerCase, device: str) -> tuple[Tensor, Tensor]:
    """x and dy of the whole layer. [B, S, H]"""
    generator = torch.Generator().manual_seed(1)
    shape = (case.b, case.s, case.h)
    x, dy = (torch.randn(shape, generator=generator).to(device, DTYPES[case.dtype]) for _ in range(2))
    return x, dy


def check(build: Builder, case: LayerCase, device: str, group: Group) -> float:
    """Result and gradients without dropout against fp64; returns the largest error in units of PyTorch's.

    The reference is the plain layer in the same dtype, its row-parallel sums in as many parts as there are ranks.

    Raises:
        WrongResult: it computes something else.
    """
    calm = replace(case, p=0.0)
    t, rank = (1, 0) if group is None else (group.size(), group.rank())
    provider = build(calm, device, group)
    x, dy = inputs(calm, device)
    reference_of, oracle_of = _plain_results(calm, device, t)
    local = [whole if provider.whole else whole.chunk(t, 1)[rank] for whole in (x, dy)]
    worst = 0.0
    for name, got in _results(provider, *local).items():
        reference, oracle = reference_of[name], oracle_of[name]
        if name in ("y", "dx"):
            if not provider.whole:
                reference, oracle = (whole.chunk(t, 1)[rank] for whole in (reference, oracle))
        elif got.shape != oracle.shape:
            reference, oracle = (part_of(name, whole, t, rank) for whole in (reference, oracle))
        ratio = error_ratio(got, reference, oracle)
        worst = max(worst, ratio)
        if ratio > 2:
            raise WrongResult(f"{name} errs {ratio:.1f} times as much as PyTorch in the same dtype (2 allowed)")
    return worst


@functools.lru_cache(maxsize=1)
def _plain_results(case: LayerCase, device: str, ranks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same for everybody who is checked: in the case's dtype, and in fp64."""
    found = []
    for dtype, parts in ((DTYPES[case.dtype], ranks), (torch.float64, 1)):
        layer = PlainLayer(case, dtype, device, partial_sums=parts)
        x, dy = (whole.to(dtype) for whole in inputs(case, device))
        found.append(_results(Provider(layer, layer.parameters_by_name()), x, dy))
    return found[0], found[1]


def _results(provider: Provider, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    y = provider.call(x)
    grads = torch.autograd.grad(y, [x, *provider.params.values()], dy)
    found = {"y": y.detach(), "dx": grads[0], **dict(zip(provider.params, grads[1:], strict=True))}
    return {name: _local(tensor) for name, tensor in found.items()}


def _local(tensor: Tensor) -> Tensor:
    """Of a DTensor: what this rank has; of one that is whole or a sum everywhere, the whole."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor
    return tensor.to_local() if placements[0].is_shard() else tensor.full_tensor()
