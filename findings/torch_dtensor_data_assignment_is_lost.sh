#!/usr/bin/env bash
# torch 2.13.0, gloo, 1 rank. `param.data = value` of a DTensor changes neither its values nor its local tensor.
#
# The assignment is the usual way to swap in averaged weights, or weights of another dtype. On a DTensor it raises
# nothing, and to_local(), full_tensor() and every operator go on with the old values: the setter replaces what lies
# behind the outer tensor, and a DTensor computes with the local tensor that it holds beside it. With another dtype
# the two disagree: `param.dtype` is the new one, that of the local tensor and of all results the old one.
# Seen: ones stay ones after `param.data = fives`; float64 outside, float32 inside after `param.data = value.double()`.
# param.copy_(value) under no_grad works, and so does a new nn.Parameter. pytorch/pytorch#157391 asks to document it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - "$folder/store" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
plain = nn.Parameter(torch.ones(4, 3))
plain.data = torch.full((4, 3), 5.0)
assert plain.eq(5).all()

fives = distribute_tensor(torch.full((4, 3), 5.0), mesh, [Shard(0)])
param = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
param.data = fives
whole, local, computed = param.full_tensor(), param.to_local(), (param.detach() * 1).full_tensor()
print(f"torch {torch.__version__} after param.data = fives: {whole[0, 0].item()} {local[0, 0].item()}")
assert whole.eq(1).all() and local.eq(1).all() and computed.eq(1).all(), "changed: the assignment takes effect"
param.data = fives.double()
print(f"after param.data = fives.double(): {param.dtype} outside, {param.to_local().dtype} inside")
assert param.dtype == torch.float64 and (param * 1).dtype == torch.float32, "changed: the dtypes agree"
with torch.no_grad():
    other = nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))
    other.copy_(fives)
assert other.full_tensor().eq(5).all()
dist.destroy_process_group()
PY
