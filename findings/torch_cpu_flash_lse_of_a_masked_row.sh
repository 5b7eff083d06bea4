#!/usr/bin/env bash
# torch 2.13.0, CPU. The flash attention op gives log-sum-exp 0 for a row whose keys are all masked, not -inf.
#
# The output of such a row is 0, as expected. Its log-sum-exp is 0.0, where the sum over no key is log(0) = -inf.
# Blocks of a longer sequence are merged with weights exp(lse - max): the empty block then gets weight exp(0 - max)
# instead of 0, and every row that saw some keys elsewhere comes out too small, without an error.
# Seen: lse [1.81, 1.87, 0.0, 2.13] where logsumexp gives [1.81, 1.87, -inf, 2.13] (values depend on the seed).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PY'
import torch

torch.manual_seed(0)
q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))  # [B, H, S, D]
mask = torch.zeros(1, 1, 4, 4)
mask[..., 2, :] = float("-inf")  # row 2 sees no key
out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
right = torch.logsumexp(q @ k.transpose(-1, -2) / 8**0.5 + mask, -1)
print("torch", torch.__version__, "lse", lse.flatten().tolist(), "logsumexp", right.flatten().tolist())
assert right[0, 0, 2] == float("-inf")
assert out[0, 0, 2].eq(0).all()
assert lse.flatten()[2] == 0.0, "changed: the masked row has another log-sum-exp now"
merged = torch.logsumexp(torch.stack([lse.flatten()[2], torch.tensor(1.0)]), 0)
print("merged with a block whose lse is 1.0:", merged.item(), "instead of 1.0")
assert (merged - 1.0).abs() > 0.3
PY
