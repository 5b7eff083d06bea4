# The compiled extension (csrc/bindings.cpp). kernels/native.py is its only caller and holds the typed signatures.
from typing import Any

def __getattr__(name: str) -> Any: ...
