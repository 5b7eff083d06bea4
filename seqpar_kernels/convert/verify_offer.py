"""Adds a hint to every refusal of a conversion: ``verify`` checks the changed plan or model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

HINT = (
    "Once it runs: seqpar_kernels.verify(model, reference, batch) compares loss, outputs and every gradient with the "
    "unsharded model."
)


def offer_verify(error: BaseException | None) -> None:
    """Add HINT to ``error`` if it is a refusal by this package. It is a note, so the message stays."""
    if not isinstance(error, (ValueError, RuntimeError)) or not raised_in(error, "seqpar_kernels.convert."):
        return
    if not hasattr(error, "add_note"):  # Python 3.10 has no notes
        if error.args and HINT not in str(error):
            error.args = (f"{error.args[0]}\n{HINT}", *error.args[1:])
    elif HINT not in getattr(error, "__notes__", ()):
        error.add_note(HINT)


@contextlib.contextmanager
def offering_verify() -> Iterator[None]:
    """Inside, refusals get the hint."""
    try:
        yield
    except Exception as error:
        offer_verify(error)
        raise


def raised_in(error: BaseException, package: str) -> bool:
    """Whether a Python module whose name begins with ``package`` raised ``error``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(package)
