#!/usr/bin/env bash
# deepspeed 0.19.8 with transformers 5.18.0, torch 2.13.0, gloo, 2 ranks. Ulysses over sdpa ignores a sliding window.
#
# Transformers tells sdpa about the window, and about packed documents, only through the mask. The Ulysses wrapper
# drops every mask of the sdpa path and leaves plain causal attention over the gathered sequence. A Mistral with
# sliding_window=3 therefore computes what it computes without a window, and documents packed into one row see each
# other. No error, no warning.
# Seen: without window and packing the sharded logits equal the unsharded ones. With the window they are off by up to
# 6.0, with packed position ids by up to 6.1, where the largest logit is 5.1 (values depend on the seed).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 numpy transformers==5.18.0 deepspeed==0.19.8
DS_ACCELERATOR=cpu "$folder/venv/bin/python" - "$folder/store" <<'PY'
import sys

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from transformers import MistralConfig, MistralForCausalLM

LENGTH = 16


def logits(window, position_ids, part=slice(None)):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, sliding_window=window, initializer_range=0.3, attn_implementation="sdpa",
    )  # fmt: skip
    model = MistralForCausalLM(config).train()
    if part == slice(None, 0):
        return model
    ids = torch.arange(LENGTH)[None, part]
    return model(input_ids=ids, position_ids=position_ids[:, part], use_cache=False).logits.detach()


def check(rank, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an optional operator that would be compiled here
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    plain = torch.arange(LENGTH)[None]
    packed = plain % (LENGTH // 2)
    cases = {"plain": (None, plain), "window": (3, plain), "packed": (None, packed)}
    whole = {name: logits(*case) for name, case in cases.items()}
    UlyssesSPAttentionHF.register_with_transformers(
        logits(None, None, slice(None, 0)), "sdpa", sequence_parallel_size=2, micro_batch_size=1
    )
    part = slice(rank * LENGTH // 2, (rank + 1) * LENGTH // 2)
    errors = {name: (logits(*case, part) - whole[name][:, part]).abs().max().item() for name, case in cases.items()}
    no_window = (logits(*cases["window"], part) - whole["plain"][:, part]).abs().max().item()
    largest = whole["plain"].abs().max().item()
    print("deepspeed", deepspeed.__version__, "rank", rank, "largest errors", errors, "of", largest)
    assert errors["plain"] < 1e-4
    assert errors["window"] > 0.1 and no_window < 1e-4, "changed: the window is kept now"
    assert rank == 0 or errors["packed"] > 0.1, "changed: packed documents are kept apart now"
    dist.destroy_process_group()


mp.start_processes(check, args=(sys.argv[1],), nprocs=2, start_method="fork")
PY
