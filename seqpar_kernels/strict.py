"""``SEQPAR_STRICT=1``: code that runs slower than this package could run it raises; without it only ``explain`` tells.

Refused, with the op or module, the sizes or names, and the reason:

- a fused kernel from a backend that stands in for a preferred one (Triton's where the compiled one is missing), unless
  it was asked for by ``backend=``;
- an all-gather repeated for a layer that was to share it with its siblings (q, k, v);
- at the end of the first forward of a model converted by ``parallelize``, in training and in evaluation: norms,
  dropouts and residual adds that run as statements of the model's own.

Not refused: code that runs as well as it can, and choices of the caller. A call below the planner's size floor runs as
one matmul and one exchange because that takes less time; ``engine="single"``, ``backend="reference"`` and ``chunks=1``
are the caller's choices. An engine or a backend that the caller names and that cannot run is always an error.
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
