#!/usr/bin/env bash
# torch 2.13.0, gloo, 1 rank. An in-place update of a DTensor is not counted on its local tensor: no error, wrong gradients.
#
# autograd refuses a backward whose saved weight was written to since ("modified by an inplace operation"): it compares
# version counters. An update through the DTensor (an optimizer's step, mul_) writes the memory of the local tensor, but
# counts on the outer tensor alone. A forward that computes with param.to_local(), as custom kernels do, saves the local
# tensor: a step between forward and backward then gives gradients of the new weights, in silence.
# Seen, sum((x w)^2) of x = 2, w = 1 and 3 after the forward: the plain parameter and the DTensor as an operand are
# refused; with to_local() the gradient is 12, where 4 is right.
# torch.autograd.graph.increment_version(param._local_tensor) after the update makes it the error again.
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
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


def gradient(weight, x, operand, inner, tell=False):
    """Of x in sum((x w)^2), with w times three between forward and backward; None: torch refuses."""
    loss = (operand * inner).square().sum()
    with torch.no_grad():
        weight.mul_(3)
        if tell:
            torch.autograd.graph.increment_version(weight._local_tensor)
    try:
        loss.backward()
    except RuntimeError as error:
        print("refused:", str(error)[:90])
        return None
    return x.grad


def sharded():
    return nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Replicate()]))


def leaf():
    return torch.full((2, 2), 2.0, requires_grad=True)


w, x = nn.Parameter(torch.ones(2, 2)), leaf()
plain = gradient(w, x, x, w)
w, x = sharded(), leaf()
whole = gradient(w, x, DTensor.from_local(x, mesh, [Replicate()]), w)
w, x = sharded(), leaf()
local = gradient(w, x, x, w.to_local())
w, x = sharded(), leaf()
told = gradient(w, x, x, w.to_local(), tell=True)
print(f"torch {torch.__version__} plain {plain}, DTensor {whole}, to_local() {local}, told {told}")
assert plain is None and whole is None and told is None
assert local is not None, "changed: the update is counted on the local tensor, and refused"
# 2 (x w) w: 4 is right; here x w = 2 is that of the forward, and the factor w = 3 that of the step
assert torch.equal(local, torch.full((2, 2), 12.0)), "changed: another gradient"
dist.destroy_process_group()
PY
