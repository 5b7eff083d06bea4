"""``python -m bench``: see :mod:`bench.cli`."""

import sys

from .allocator import restart_with_allocator_settings
from .cli import main

if __name__ == "__main__":
    restart_with_allocator_settings()
    sys.exit(main())
