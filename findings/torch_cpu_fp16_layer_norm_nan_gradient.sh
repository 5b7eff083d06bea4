#!/usr/bin/env bash
# torch 2.13.0, CPU. layer_norm of fp16 with eps=1e-12 gives finite output and NaN gradients for a constant row.
#
# The inverse standard deviation, 1/sqrt(eps) = 1e6 for such a row, is kept for the backward in the input's dtype, and
# fp16 ends at 65504. Forward computes in fp32 and shows nothing. With eps=1e-8 and larger, in bf16, in fp32 and with
# fp32 weights the gradients are finite. The weight's gradient of the whole batch is NaN because of the one row;
# eps=1e-12 is the value BERT checkpoints carry, and a padded row of zeros is a constant row.
# Seen: rstd inf, gradient of the constant row and of the weight NaN, of the other row finite.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch


def run(dtype, eps, weight_dtype=None):
    """Output, saved inverse standard deviation and gradients of x and weight; row 0 is constant."""
    torch.manual_seed(0)
    x = torch.stack([torch.zeros(8), torch.randn(8)]).to(dtype).requires_grad_()
    weight, bias = (t.to(weight_dtype or dtype).requires_grad_() for t in (torch.ones(8), torch.zeros(8)))
    out, _, rstd = torch.native_layer_norm(x, (8,), weight, bias, eps)
    assert torch.equal(out, torch.nn.functional.layer_norm(x, (8,), weight, bias, eps))
    out.backward(1e-3 * torch.randn(2, 8).to(dtype))
    return out, rstd, x.grad, weight.grad


out, rstd, x_grad, weight_grad = run(torch.float16, 1e-12)
print("torch", torch.__version__, "rstd", rstd.flatten().tolist(), rstd.dtype, "gradients", x_grad.tolist())
assert out.isfinite().all()
assert x_grad[1].isfinite().all()
assert x_grad[0].isnan().all() and weight_grad.isnan().all(), "changed: the gradients are no longer NaN"
for dtype, eps, weight_dtype in (
    (torch.float16, 1e-8, None),
    (torch.float16, 1e-12, torch.float32),
    (torch.bfloat16, 1e-12, None),
    (torch.float32, 1e-12, None),
):
    assert all(t.isfinite().all() for t in run(dtype, eps, weight_dtype)), (dtype, eps, weight_dtype)
PY
