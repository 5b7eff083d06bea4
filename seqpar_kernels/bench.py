"""``seqpar_kernels.bench`` in a checkout: the folder bench/ beside this package.

An installed package has that folder here, and Python prefers it to this file.
"""

import sys
from importlib import import_module
from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "bench")]

if __name__ == "__main__":  # python -m seqpar_kernels.bench
    sys.exit(import_module("seqpar_kernels.bench.__main__").run())
