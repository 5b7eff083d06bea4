"""``SEQPAR_STRICT=1``: what would be slower than this package can do raises instead of showing up in ``explain`` alone.

Refused, with the op or module, the sizes or names, and the reason:

- a fused kernel from a backend that stands in for a preferred one (Triton's where the compiled one is missing), unless
  it was asked for by ``backend=``;
- an all-gather repeated for a layer that was to share it with its siblings (q, k, v);
- at the end of the first forward of a model converted by ``parallelize``, in training and in evaluation: norms,
  dropouts and residual adds that run as statements of the model's own.

Not refused: what is best as it is or was asked for. A call below the planner's size floor runs as one matmul and one
exchange because that is faster there; ``engine="single"``, ``backend="reference"`` and ``chunks=1`` do as they say. An
engine or a backend that is asked for and cannot run is an error with or without this.
"""

from __future__ import annotations

from .environment import flag


def strict_enabled() -> bool:
    """Whether SEQPAR_STRICT asks for it."""
    return flag("SEQPAR_STRICT")


def refuse(what: str, reason: str) -> None:
    """
    Raises:
        RuntimeError: SEQPAR_STRICT is set.
    """
    if strict_enabled():
        raise RuntimeError(f"SEQPAR_STRICT=1: {what}: {reason}")
