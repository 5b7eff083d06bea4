#!/usr/bin/env bash
# torch 2.13.0. A TorchFunctionMode sees no call of autograd.Function.apply, only the operators inside its forward.
#
# The same holds for __torch_function__ of a tensor subclass. A mode that watches or replaces the arguments of every
# torch call gets a library operator (torch.library.custom_op) as one call with its arguments, but for an
# autograd.Function it first hears of what forward does, under other names and with other arguments.
# Seen: [mul] for Function.apply, [double] for the custom operator.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
cat > "$folder/check.py" <<'PY'
import torch
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(getattr(func, "__name__", func)))
        return func(*args, **(kwargs or {}))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


@torch.library.custom_op("example::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def seen_in(call):
    x = torch.ones(3, requires_grad=True)
    with Watch() as watch:
        call(x)
    return watch.seen


function, operator = seen_in(Double.apply), seen_in(torch.ops.example.double)
print("torch", torch.__version__, "Function.apply:", function, "custom operator:", operator)
assert len(operator) == 1 and "double" in operator[0]
assert function == ["mul"], "changed: a mode sees Function.apply now"
PY
"$folder/venv/bin/python" "$folder/check.py"
