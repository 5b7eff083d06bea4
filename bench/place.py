"""Where these benchmarks lie: in a checkout, as ``bench``, or in an installed package, as ``seqpar_kernels.bench``."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The folder of the sources; None where the package was installed without them."""
    root = HERE.parent
    return root if (root / "pyproject.toml").is_file() else None


def of_checkout(*parts: str) -> Path | None:
    """A file of the checkout, which no wheel carries; None where there is no checkout."""
    root = checkout()
    return None if root is None else root.joinpath(*parts)
