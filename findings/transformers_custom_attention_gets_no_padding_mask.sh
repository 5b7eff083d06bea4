#!/usr/bin/env bash
# transformers 5.18.0, torch 2.13.0. A custom attention function is given no mask, so padding is attended to.
#
# AttentionInterface.register takes a function by name. Unless a mask function is registered under the same name with
# AttentionMaskInterface, the model hands attention_mask=None to it, though the caller passed one: no error, no warning.
# Causality survives where the function asks for it by itself; the left padding of a batch does not.
# Seen: the same function registered under another name gets None, and the real tokens' logits are off by 0.087;
# with a mask function registered too it gets [2, 1, 6, 6], and they agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.18.0 numpy
"$folder/venv/bin/python" - <<'PY'
import warnings

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

seen = []


def attention(module, query, key, value, attention_mask, **kwargs):
    seen.append(None if attention_mask is None else tuple(attention_mask.shape))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("own", attention)
AttentionInterface.register("own_masked", attention)
AttentionMaskInterface.register("own_masked", sdpa_mask)


def logits(implementation):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, attn_implementation=implementation,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(12).view(2, 6)
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])  # the first two tokens of row 0 are padding
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=padding).logits[0, 2:]


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    expected, own, masked = logits("sdpa"), logits("own"), logits("own_masked")
print("transformers", transformers.__version__, "masks given:", seen)
print("logits of real tokens off by", (own - expected).abs().max().item(), (masked - expected).abs().max().item())
assert seen == [None, (2, 1, 6, 6)], "changed: another mask is given"
assert (own - expected).abs().max() > 1e-3, "changed: padding is honoured"
assert torch.equal(masked, expected)
assert not [w for w in caught if "mask" in str(w.message).lower()], "changed: there is a warning"
PY
