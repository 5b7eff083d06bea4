"""Whether a provider computes the right thing, before anybody times it.

The oracle is fp64; the error may be twice that of PyTorch in the same dtype, plus one rounding (the package's own rule,
docs/numerics.md). Ours must keep to that. A peer may sum its weight gradients in the plainest way, one running fp32
total over the rows, which is less precise but not wrong; what it errs is reported either way. A dropout mask is
recovered from the provider itself, which must drop the same elements again when the generator is seeded again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .providers import NormFunction, eager_norm

SEED = 1234


class WrongResult(Exception):
    """What is wrong with it."""


def running_sum_error(rows: int) -> float:
    """Expected error of a running fp32 sum of ``rows`` random terms, relative to the largest of many such sums.

    Step i rounds a partial sum of size sqrt(i): together eps / 2 * rows / sqrt(2), beside sums of up to 4 sqrt(rows).
    """
    return rows**0.5 / 8 * torch.finfo(torch.float32).eps


def error_ratio(
    got: Tensor, reference: Tensor, oracle: Tensor, relative: float = 0.0, part: Tensor | None = None
) -> float:
    """The error in units of what PyTorch in the same dtype, or one rounding of the result, would make.

    ``relative`` is granted on top of the rounding. ``part`` is what of ``oracle`` to compare with; None: all of it.
    """
    want = oracle if part is None else part
    if got.shape != want.shape:
        raise WrongResult(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not torch.isfinite(got).all():
        raise WrongResult("not finite")
    rounding = (torch.finfo(got.dtype).eps + relative) * oracle.abs().amax()
    unit = (reference.double() - oracle).abs().amax() + rounding
    return float((got.double() - want).abs().amax() / unit.clamp(min=1e-300))


def kept_elements(fn: NormFunction, inputs: Sequence[Tensor | None], p: float) -> Tensor:
    """The dropout mask ``fn`` draws under :data:`SEED`: ones go in, what comes out was kept."""
    x, residual, weight, bias = inputs
    assert x is not None and residual is not None and weight is not None
    torch.manual_seed(SEED)
    _, z = fn(torch.ones_like(x).requires_grad_(), torch.zeros_like(residual).requires_grad_(), weight, bias, p)
    kept = z.detach() != 0
    count, share = kept.numel(), kept.float().mean().item()
    sigma = (p * (1 - p) / count) ** 0.5
    if abs(share - (1 - p)) > 6 * sigma + 2**-16:  # probabilities may be 16-bit numbers
        raise WrongResult(f"keeps {share:.5f} of the elements, expected {1 - p:.5f}")
    return kept


def run_backward(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], grads: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(list(outputs), [t for t in inputs if t is not None], list(grads))


def check_norm(
    fn: NormFunction, kind: str, p: float, inputs: Sequence[Tensor | None], grads: Sequence[Tensor], strict: bool = True
) -> float:
    """Outputs and all gradients of ``fn`` against the fp64 oracle; not ``strict`` for peers.

    Returns:
        float: the largest error, in units of PyTorch's in the same dtype.

    Raises:
        WrongResult: it computes something else.
    """
    kept = kept_elements(fn, inputs, p) if p else None

    def plain(dtype: torch.dtype) -> list[Tensor]:
        x, residual, weight, bias = (
            None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in inputs
        )
        assert x is not None and residual is not None and weight is not None
        if kept is None:
            z = x + residual
        else:  # as torch's dropout: scaled in fp32 at least, rounded once
            exact = torch.promote_types(dtype, torch.float32)
            z = (x.to(exact) * (kept.to(exact) / (1 - p))).to(dtype) + residual
        y = eager_norm(kind, z, weight, bias)
        found = run_backward((y, z), (x, residual, weight, bias), [g.to(dtype) for g in grads])
        return [y.detach(), z.detach(), *found]

    reference, oracle = plain(grads[0].dtype), plain(torch.float64)
    torch.manual_seed(SEED)
    y, z = fn(*inputs, p)  # type: ignore[arg-type]
    got = [y.detach(), z.detach(), *run_backward((y, z), inputs, grads)]
    worst = 0.0
    for name, g, r, o in zip(("y", "z", "dx", "dresidual", "dweight", "dbias"), got, reference, oracle, strict=False):
        ratio = error_ratio(g, r, o)
        worst = max(worst, ratio)
        if not strict and name in ("dweight", "dbias"):
            ratio = error_ratio(g, r, o, running_sum_error(grads[0].shape[0]))
        if ratio > 2:
            raise WrongResult(f"{name} errs {ratio:.1f} times as much as PyTorch in the same dtype (2 allowed)")
    return worst
