"""The exceptions a user sees as a message instead of a traceback."""

from __future__ import annotations

import importlib.util


class BenchError(Exception):
    """What is wrong and what to do about it, in one sentence each."""


class NotHere(BenchError):
    """What was asked cannot run on this machine: nobody's fault, and no failure in ``bench all``."""


def missing(package: str, extra: str) -> str | None:
    """What to install, where ``package`` is not: it comes with an extra of this package. None where it is installed."""
    if importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: pip install 'seqpar-kernels[{extra}]'"


def need(package: str, extra: str, command: str) -> None:
    """
    Raises:
        NotHere: ``package``, which ``command`` uses, is not installed; the message names the extra.
    """
    if missing(package, extra) is not None:
        raise NotHere(f"{command} needs {package}: pip install 'seqpar-kernels[{extra}]'")
