"""Reads the variables SEQPAR_*; a value that is not allowed is an error that names the variable.

Unset and empty mean the same.
"""

from __future__ import annotations

import os

_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def flag(name: str, default: bool = False) -> bool:
    """
    Raises:
        ValueError: neither on nor off.
    """
    text = os.environ.get(name, "").strip().lower()
    if text == "":
        return default
    if text not in (*_ON, *_OFF):
        raise ValueError(f"{name}: expected 1 or 0 (or true, yes, on, false, no, off), got {os.environ[name]!r}")
    return text in _ON


def positive_int(name: str, what: str) -> int | None:
    """The number, None where there is none.

    Args:
        name: of the variable.
        what: it counts, for the error.

    Raises:
        ValueError: not a positive int in decimal digits.
    """
    text = os.environ.get(name, "").strip()
    if text == "":
        return None
    # More digits than a count can have: int() refuses thousands of them with an error of its own.
    if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) > 0):
        shown = text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"
        raise ValueError(f"{name}: expected a positive number of {what}, got {shown!r}")
    return int(text)
