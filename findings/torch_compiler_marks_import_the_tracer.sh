#!/usr/bin/env bash
# torch 2.13.0. A decorator of torch.compiler imports all of torch._dynamo where it decorates, DTensor and FSDP with it.
#
# A library that marks a function for users who compile (`torch.compiler.disable`, `assume_constant_result`,
# `allow_in_graph`) makes everyone else wait for the tracer when they import it. The mark itself is one attribute or one
# wrapper. `torch.compiler.is_compiling` and `torch.compile` without a call import nothing.
# Seen: `import torch` alone loads none of them; one `@torch.compiler.disable` brings 823 more modules, torch._dynamo,
# torch.distributed.tensor, torch.distributed.fsdp and sympy among them, and takes about as long as `import torch`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
for mark in disable assume_constant_result allow_in_graph; do
    "$folder/venv/bin/python" - "$mark" <<'PY'
import sys
import time

import torch

SLOW = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy")
assert not torch.compiler.is_compiling()
before = set(sys.modules)
assert not before & set(SLOW), "changed: import torch brings them along"
began = time.process_time()
mark = getattr(torch.compiler, sys.argv[1])
marked = mark(lambda x: x)
seconds = time.process_time() - began
found = [name for name in SLOW if name in sys.modules]
more = len(set(sys.modules) - before)
print(f"torch {torch.__version__}: {sys.argv[1]} imported {more} modules in {seconds:.2f} s, {', '.join(found)} among them")
assert found == list(SLOW), "changed: the decorator no longer imports them"
PY
done
