"""Small modules of a model that keep much: norms of heads and activations, written in several statements.

A query or key norm of Transformers keeps a float32 copy of its input and two more tensors; ``gelu_new`` keeps four.
Both are found by trying them, and run as one kernel that keeps its input alone. The result is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import NormOptions, NormTensors, run_norm
from ..nn import LayerNorm, RMSNorm
from ..nn.own_forward import follower
from .conversion import Conversion
from .hooks import inside_compile

Forward = Callable[..., Any]


def fuse_head_norm(module: nn.Module, norm: LayerNorm | RMSNorm) -> None:
    """Let ``module``, which computes what ``norm`` computes over the last dimension, run as one kernel."""
    plain: Forward = module.forward

    def fused_forward(x: Any, *args: Any, **kwargs: Any) -> Any:
        # A compiler fuses the statements itself.
        if args or kwargs or torch.compiler.is_compiling() or not isinstance(x, Tensor) or not x.is_floating_point():
            return plain(x, *args, **kwargs)
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        options = NormOptions(norm.kind, 0.0, norm._epsilon(x.dtype), zero_centered=norm.zero_centered_weight)
        out = _as_laid_out(x, weight, bias, options)
        if follower() is not None:  # the check of a first forward follows statements, and knows none of a kernel
            for name, note in vars(plain(x)).items():
                if name.startswith("_seqpar"):
                    setattr(out, name, note)
        return out

    module.forward = fused_forward


def _as_laid_out(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: NormOptions) -> Tensor:
    """The norm of rows in the order in which they lie: heads are a transposed view. [B, heads, S, head_dim]"""
    if x.is_contiguous():
        y: Tensor = run_norm(NormTensors(x, weight=weight, bias=bias), options)
        return y
    order = sorted(range(x.dim() - 1), key=x.stride, reverse=True)
    back = [order.index(i) for i in range(len(order))]
    rows = x.permute(*order, -1)
    y = run_norm(NormTensors(rows, weight=weight, bias=bias), options)
    return y.permute(*back, -1)


# --- activations -----------------------------------------------------------------------------------------------------


def _gelu_tanh(input: Tensor) -> Tensor:
    return F.gelu(input, approximate="tanh")


def _gelu(input: Tensor) -> Tensor:
    return F.gelu(input)


def _silu(input: Tensor) -> Tensor:
    return F.silu(input)


#: Activations that PyTorch has one kernel for, which keeps the input alone.
_KERNELS: tuple[Callable[[Tensor], Tensor], ...] = (_gelu_tanh, _gelu, _silu)
_ALIKE = 1e-6  # constants of GELU are written with few digits; two different activations differ by 1e-4 and more


def fuse_activations(conversion: Conversion) -> None:
    """Let activations that are written in several statements run as PyTorch's kernel for them."""
    if conversion.recompute == "none":
        return
    for module in conversion.model.modules():
        if next(module.children(), None) is not None or module._parameters or module._buffers:
            continue
        if "forward" in vars(module) or type(module).__module__.startswith(("torch.", "seqpar_kernels.")):
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            continue
        kernel = _kernel_of(module)
        if kernel is not None:
            module.forward = kernel


def refuse_compiling(conversion: Conversion) -> None:
    """Let a trace of ``recompute="max"`` be an error: a compiler keeps what its partitioner chooses."""
    if conversion.recompute != "max":
        return

    def before(module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or inside_compile():
            raise RuntimeError(
                "recompute: expected 'auto' or 'none' for a model that is compiled, got 'max': torch.compile decides "
                "what is kept for the backward (docs/convert.md)"
            )

    conversion.model.register_forward_pre_hook(before)


def _kernel_of(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The kernel that computes what ``module`` computes; None where it is one node already, or something else."""
    random, training = torch.get_rng_state(), module.training
    try:
        with torch.enable_grad(), torch.device("cpu"):
            x = _trial_values().requires_grad_()
            results = []
            for mode in (not training, training, training):  # twice alike: it draws nothing
                module.training = mode
                results.append(module(x))
            return _kernel_for(x, *results)
    except Exception:  # whatever it is, it is no activation of one tensor
        return None
    finally:
        module.training = training
        torch.set_rng_state(random)


def _trial_values() -> Tensor:
    """Where activations bend, and far out, where some are cut off. [9, 143] float64"""
    far = torch.logspace(1, 4, 143, dtype=torch.float64)
    near = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    return torch.cat([near, far, -far]).view(9, 143)


def _kernel_for(x: Tensor, other: Any, again: Any, y: Any) -> Callable[[Tensor], Tensor] | None:
    """The kernel with these results for x: in the other mode, and twice in the present one."""
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype or y.grad_fn is None:
        return None
    if not (torch.equal(y, again) and torch.equal(y, other)):
        return None
    before = y.grad_fn.next_functions
    if len(before) == 1 and before[0][0] is not None and before[0][0].name().endswith("AccumulateGrad"):
        return None
    with torch.no_grad():
        alike = (kernel for kernel in _KERNELS if torch.allclose(kernel(x), y, rtol=_ALIKE, atol=_ALIKE))
        return next(alike, None)
