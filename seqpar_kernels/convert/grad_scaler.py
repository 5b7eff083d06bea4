"""``GradScaler`` on gradients that are cut: an overflow on one rank is one on all.

torch reduces what one rank found over the mesh dimensions over which the *first* gradient of the list is cut. Where
that one is replicated nothing is reduced: the rank with the overflow skips its step and lowers its scale, the others
step, and from then on replicated weights differ between ranks. Here the reduction covers every dimension of every mesh
that a gradient of the list lies on, for DTensors of every origin (``fully_shard``'s too): torch's handler of the
operator is replaced by this one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .conversion import Conversion

_CHECK = torch.ops.aten._amp_foreach_non_finite_check_and_unscale_.default


def agree_on_overflow(conversion: Conversion) -> None:
    """Make all ranks find what one of them found, from here on; may be called often.

    Raises:
        RuntimeError: this torch keeps the handler elsewhere.
    """
    if conversion.region.ranks == 1:
        return
    handlers = getattr(getattr(DTensor, "_op_dispatcher", None), "_custom_op_handlers", None)
    if not isinstance(handlers, dict) or _CHECK not in handlers:
        raise RuntimeError(
            f"torch {torch.__version__}: expected DTensor's handler of {_CHECK}, by which GradScaler is made to skip a "
            "step on all ranks alike, and found none; convert with a release that seqpar_kernels is tested with"
        )
    handlers[_CHECK] = _unscale


def _unscale(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """(gradients, found_inf, inverse scale), as the operator: all but ``inverse scale`` in place."""
    grads, found_inf, scale = args
    op([_local(grad) for grad in grads], _local(found_inf), _local(scale), **kwargs)
    groups = {}  # by name, in the order of the list, which is that of all ranks
    for grad in grads:
        if isinstance(grad, DTensor):
            for dim in range(grad.device_mesh.ndim):
                group = grad.device_mesh.get_group(dim)
                groups[group.group_name] = group
    for group in groups.values():
        dist.all_reduce(_local(found_inf), dist.ReduceOp.MAX, group)


def _local(tensor: Any) -> Any:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
