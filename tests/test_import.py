"""What importing the package imports with it: neither the compiler nor DTensor, which are slow to import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import seqpar_kernels as sp
from seqpar_kernels.compiling import constant_when_traced, is_compiled_module, not_traced

SLOW = ("torch._dynamo", "torch.distributed.tensor", "sympy", "triton", "transformers", "numpy.testing")


def loaded(statements: str) -> list[str]:
    """Those of ``SLOW`` that ``statements`` import, in a fresh interpreter."""
    asked = f"import sys, torch; before = set(sys.modules); {statements}; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    return [name for name in SLOW if name in done.stdout.split()]


def test_the_package_imports_nothing_slow() -> None:
    assert loaded("import seqpar_kernels as sp; sp.nn.LayerNorm; sp.all_gather_linear; dir(sp)") == []


def test_conversion_is_imported_where_it_is_first_used() -> None:
    assert "torch.distributed.tensor" in loaded("import seqpar_kernels as sp; sp.parallelize")
    assert "torch.distributed.tensor" in loaded("from seqpar_kernels import explain")


def test_every_name_is_there() -> None:
    assert set(sp.__all__) <= set(dir(sp)) and "convert" in dir(sp)
    assert all(hasattr(sp, name) for name in sp.__all__)
    assert sp.parallelize is sp.convert.parallelize
    with pytest.raises(AttributeError, match="module 'seqpar_kernels' has no attribute 'paralellize'"):
        sp.paralellize  # noqa: B018


def test_a_constant_is_marked_as_torch_marks_it() -> None:
    ours, theirs = (mark(lambda: 3) for mark in (constant_when_traced, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs) != {}
    asked = []

    @constant_when_traced
    def width() -> int:
        asked.append(len(asked))
        return 3 + len(asked)

    run = torch.compile(lambda x: x * width(), backend="eager", fullgraph=True)
    assert run(torch.ones(1)).item() == run(torch.ones(1)).item() == 3 + len(asked)


def test_what_is_not_traced_runs_eagerly() -> None:
    compiling = []

    @not_traced
    def note(x: torch.Tensor) -> torch.Tensor:
        compiling.append(torch.compiler.is_compiling())
        return x + 1

    run = torch.compile(lambda x: note(x * 2) * 3, backend="eager")
    assert [run(torch.ones(1)).item() for _ in range(2)] == [9.0, 9.0] and compiling == [False, False]


def test_compiled_modules_are_recognised() -> None:
    plain, inside = nn.Linear(2, 2), nn.Linear(2, 2)
    inside.compile(backend="eager")
    assert not is_compiled_module(plain)
    assert is_compiled_module(torch.compile(plain, backend="eager")) and is_compiled_module(inside)
