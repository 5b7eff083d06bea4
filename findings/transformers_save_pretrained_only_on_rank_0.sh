#!/usr/bin/env bash
# transformers 5.18.0 with torch 2.13.0, gloo, 2 ranks. save_pretrained(is_main_process=True) on rank 1 writes no file.
#
# Once a process group exists, only rank 0 of it writes, whatever is_main_process says. A rank that holds a model of
# its own (another pipeline stage, another replica, its shards in plain tensors) and saves it to a folder of its own
# gets the folder, empty, without an error or a warning.
# Seen: rank 0's folder holds config.json, generation_config.json and model.safetensors, rank 1's holds nothing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy transformers==5.18.0
"$folder/venv/bin/python" - "$folder" <<'PY'
import os
import sys

import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from transformers import GPT2Config, GPT2LMHeadModel


def check(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    sizes = dict(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=1))
    own = f"{folder}/stage{rank}"
    model.save_pretrained(own, is_main_process=True)
    files = sorted(os.listdir(own))
    print("transformers", transformers.__version__, "rank", rank, files)
    if rank == 0:
        assert "model.safetensors" in files and "config.json" in files
    else:
        assert files == [], "changed: rank 1 writes its model now"
    dist.destroy_process_group()


mp.start_processes(check, args=(sys.argv[1],), nprocs=2, start_method="fork")
PY
