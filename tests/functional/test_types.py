"""What a type checker makes of the public functions, seen from a program of a user's own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import seqpar_kernels

PROGRAM = """
import torch
import seqpar_kernels as sp

x = torch.randn(4, 8)
flag = bool(x.sum() > 0)
reveal_type(sp.dropout_add_layer_norm(x, None, None))
reveal_type(sp.dropout_add_layer_norm(x, None, None, p=0.1, prenorm=True))
reveal_type(sp.dropout_add_layer_norm(x, None, x[0], weight2=x[0]))
reveal_type(sp.dropout_add_layer_norm(x, None, x[0], weight2=x[0], prenorm=True))
reveal_type(sp.dropout_add_layer_norm(x, None, None, prenorm=flag))
reveal_type(sp.dropout_add_rms_norm(x, None, None, group=None))
reveal_type(sp.dropout_add_rms_norm(x, None, None, prenorm=True))
reveal_type(sp.dropout_add_rms_norm(x, None, x[0], weight2=x[0]))
reveal_type(sp.dropout_add_rms_norm(x, None, x[0], weight2=x[0], prenorm=True))
reveal_type(sp.dropout_add(x))
reveal_type(sp.linear_reduce_scatter_dropout_add_norm(x, x, group=None))
reveal_type(sp.linear_reduce_scatter_dropout_add_norm(x, x, norm=None, group=None))
reveal_type(sp.all_gather_linear(x, x, group=None))
reveal_type(sp.all_gather_linear(x, [x, x], group=None))
reveal_type(sp.parallelize(torch.nn.Linear(2, 2), None, {}))
"""
T = "Tensor"
REVEALED = [
    T,
    f"tuple[{T}, {T}]",
    f"tuple[{T}, {T}]",
    f"tuple[{T}, {T}, {T}]",
    f"{T} | tuple[{T}, ...]",
    T,
    f"tuple[{T}, {T}]",
    f"tuple[{T}, {T}]",
    f"tuple[{T}, {T}, {T}]",
    T,
    f"tuple[{T}, {T}]",
    f"tuple[None, {T}]",
    T,
    f"tuple[{T}, ...]",
    "Linear",
]


#: What no call takes, and what no result has.
WRONG = [
    "sp.dropout_add_layer_norm(x, None, None, prenorm=1)",
    "sp.dropout_add_rms_norm(x, None, None, bias=x)",
    "sp.dropout_add_layer_norm(x, None, None, sequence=3)",
    "sp.dropout_add_layer_norm(x, None, None, prenorm=True).sum()",
]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> str:
    """By mypy, from a folder in which nothing of this repository lies. Once: it reads all of PyTorch."""
    pytest.importorskip("mypy")
    folder = tmp_path_factory.mktemp("user")
    (folder / "program.py").write_text("\n".join([PROGRAM.strip(), *WRONG, ""]))
    root = str(Path(seqpar_kernels.__file__).parents[1])
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache"), "program.py"]
    environment = {**os.environ, "MYPYPATH": root}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False, text=True)
    return done.stdout + done.stderr


def test_overloads_say_what_is_returned(said: str) -> None:
    found = re.findall(r'Revealed type is "(.*)"', said)
    plain = [re.sub(r"torch\._tensor\.|torch\.nn\.modules\.linear\.|builtins\.", "", kind) for kind in found]
    union = re.compile(r"Union\[(.*?), (tuple\[.*\])\]")  # as older versions of mypy write it
    assert [union.sub(r"\1 | \2", kind) for kind in plain] == REVEALED, said


@pytest.mark.parametrize("wrong", WRONG)
def test_what_no_call_takes_is_refused(wrong: str, said: str) -> None:
    line = len(PROGRAM.strip().splitlines()) + 1 + WRONG.index(wrong)
    assert f"program.py:{line}: error" in said, said
