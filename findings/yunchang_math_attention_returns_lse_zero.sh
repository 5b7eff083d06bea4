#!/usr/bin/env bash
# yunchang 0.6.4 with torch 2.13.0, CPU. pytorch_attn_forward(op_type="math") returns a log-sum-exp of zeros.
#
# The function is the one whose result the package's ring attention merges block by block. With op_type "math" (and
# "cudnn") the output is right and the log-sum-exp is a tensor of zeros, so the package's own update_out_and_lse gives
# every block the same weight. No error, no warning.
# Seen: the largest |lse| is 0.0; two merged key blocks are off by 6.5 where the values reach 8.1.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy yunchang==0.6.4
"$folder/venv/bin/python" - <<'PY'
import torch
from yunchang.kernels.attention import pytorch_attn_forward
from yunchang.ring.utils import update_out_and_lse

torch.manual_seed(0)
q, k, v = (3 * torch.randn(1, 16, 2, 8) for _ in range(3))  # [B, S, H, D]
whole = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
out = lse = None
for keys in (slice(0, 8), slice(8, 16)):
    block_out, block_lse = pytorch_attn_forward(q, k[:, keys], v[:, keys], causal=False, op_type="math")
    print("block lse, largest magnitude:", block_lse.abs().max().item())
    assert block_lse.eq(0).all(), "changed: the log-sum-exp is no longer zeros"
    out, lse = update_out_and_lse(out, lse, block_out, block_lse)
right, _ = pytorch_attn_forward(q, k, v, causal=False, op_type="math")
torch.testing.assert_close(right, whole)
error = (out - whole).abs().max().item()
print("two merged blocks, largest error:", error, "of", whole.abs().max().item())
assert error > 0.1 * whole.abs().max().item()
PY
