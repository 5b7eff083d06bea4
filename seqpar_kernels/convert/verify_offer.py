"""What every refusal of a conversion offers: ``verify``, for the plan or model that was changed because of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

HINT = (
    "Once it runs: seqpar_kernels.verify(model, reference, batch) compares loss, outputs and every gradient with the "
    "unsharded model."
)


def offer_verify(error: BaseException | None) -> None:
    """Add HINT below ``error`` where it is a refusal of this package's: as a note, its message stays as it is."""
    if not isinstance(error, (ValueError, RuntimeError)) or not raised_in(error, "seqpar_kernels.convert."):
        return
    if not hasattr(error, "add_note"):  # Python 3.10 has no notes
        if error.args and HINT not in str(error):
            error.args = (f"{error.args[0]}\n{HINT}", *error.args[1:])
    elif HINT not in getattr(error, "__notes__", ()):
        error.add_note(HINT)


@contextlib.contextmanager
def offering_verify() -> Iterator[None]:
    """Around what may refuse."""
    try:
        yield
    except Exception as error:
        offer_verify(error)
        raise


def raised_in(error: BaseException, package: str) -> bool:
    """Whether a module whose name begins so raised ``error``."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith(package)
