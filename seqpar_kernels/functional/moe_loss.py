"""Losses of a router whose tokens the ranks of a group share: equal to those over all tokens on one rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_float, check_tensor
from ..comm.coordination import checked_together
from ..kernels.spec import accumulation_dtype
from ..layout import Group, resolve_group
from .mappings import reduce_from_tensor_parallel


def load_balancing_loss(
    router_logits: Tensor | Sequence[Tensor], top_k: int, *, group: Group, attention_mask: Tensor | None = None
) -> Tensor:
    """The auxiliary loss of Switch Transformers (Fedus et al. 2021, equations 4 to 6), over the tokens of all ranks.

    ``E * sum over experts of (share of tokens that chose it) * (mean of its probability)``, shares summed over the K
    choices. Several layers count as more tokens, as in Transformers. Only 2 E + 1 numbers travel.

    Every rank returns the loss of all tokens, and its backward gives each rank the gradient of its own logits: call it
    on every rank, and add it to a loss that every rank has whole.

    Args:
        router_logits: [..., E] of this rank's tokens, or one such for each layer.
        top_k: K, the experts that a token chooses.
        group: ProcessGroup or 1-D DeviceMesh whose ranks share the tokens; None for this one alone.
        attention_mask: [...], 0 or False for tokens that do not count (padding); the same for each layer.

    Returns:
        A number in fp32 (fp64 for fp64); 0 where no token counts.

    Raises:
        ValueError: an argument that does not fit, by name, on every rank, before anything is sent.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> sp.load_balancing_loss(torch.zeros(10, 8), 2, group=None)  # even probabilities: K
        tensor(2.)
    """
    layers = _checked(router_logits, group, attention_mask, top_k)
    logits, counted = _flat(layers, attention_mask)
    probabilities = logits.softmax(-1)
    experts = logits.shape[-1]
    chosen = probabilities.detach().topk(top_k, dim=-1).indices
    share = torch.zeros(experts, dtype=logits.dtype, device=logits.device)
    share.index_add_(0, chosen.reshape(-1), counted[:, None].expand(-1, top_k).reshape(-1))
    sums = torch.cat([share, counted @ probabilities, counted.sum()[None]])
    sums = reduce_from_tensor_parallel(sums, group)
    tokens = sums[-1].clamp(min=1)
    return experts * (sums[:experts] * sums[experts:-1]).sum() / tokens.square()


def router_z_loss(
    router_logits: Tensor | Sequence[Tensor], *, group: Group, attention_mask: Tensor | None = None
) -> Tensor:
    """The mean of ``logsumexp(logits) ** 2`` over the tokens of all ranks (Zoph et al. 2022, ST-MoE, equation 5).

    Arguments, result and gradients as in :func:`load_balancing_loss`.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> sp.router_z_loss(torch.zeros(10, 1), group=None)
        tensor(0.)
    """
    layers = _checked(router_logits, group, attention_mask, 1)
    logits, counted = _flat(layers, attention_mask)
    sums = torch.stack([counted @ logits.logsumexp(-1).square(), counted.sum()])
    total, tokens = reduce_from_tensor_parallel(sums, group).unbind()
    return total / tokens.clamp(min=1)


def _checked(
    router_logits: Tensor | Sequence[Tensor], group: Group, attention_mask: Tensor | None, top_k: int
) -> list[Tensor]:
    layers = [router_logits] if isinstance(router_logits, Tensor) else list(router_logits)
    with checked_together(resolve_group(group)):
        if not layers:
            raise ValueError("router_logits: expected a tensor for each layer, got none")
        for i, logits in enumerate(layers):
            name = "router_logits" if len(layers) == 1 else f"router_logits[{i}]"
            check_tensor(name, logits)
            check_float(name, logits)
            if logits.dim() < 2 or logits.shape[-1] != layers[0].shape[-1]:
                raise ValueError(f"{name}: expected [..., experts], alike in every layer, got {tuple(logits.shape)}")
            if attention_mask is not None and attention_mask.numel() != logits.shape[:-1].numel():
                raise ValueError(
                    f"attention_mask: expected a number for each token of {name} {tuple(logits.shape)}, got "
                    f"{tuple(attention_mask.shape)}"
                )
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= layers[0].shape[-1]:
            raise ValueError(f"top_k: expected 1 .. {layers[0].shape[-1]}, the number of experts, got {top_k!r}")
    return layers


def _flat(layers: list[Tensor], attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """All logits, [layers * T, E], and how much each counts, in the accumulation dtype."""
    wide = accumulation_dtype(layers[0].dtype)
    logits = torch.cat([layer.reshape(-1, layer.shape[-1]).to(wide) for layer in layers])
    if attention_mask is None:
        return logits, logits.new_ones(logits.shape[0])
    return logits, attention_mask.reshape(-1).to(logits.device, wide).repeat(len(layers))
