#!/usr/bin/env bash
# megatron-core 0.16.1. The label-smoothed vocab_parallel_cross_entropy depends on the tensor-parallel size.
#
# Label smoothing s gives the target 1 - s and each other class s / (V - 1). The function takes the length of the rank's
# own part of the vocabulary for V, and averages the log-probabilities of that part only: the sum over ranks that the rest
# of the loss has is missing. So the same logits have another loss at another tensor-parallel size, and the ranks of one
# group have different losses for the same token. Without smoothing all of them agree with PyTorch.
# Seen on gloo, V = 8, s = 0.2, logits 0 to 7: 1 rank has the formula's loss; of 2 ranks the first is off by up to 0.63,
# and the two are up to 1.07 apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy packaging
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps megatron-core==0.16.1
cat >"$folder/check.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

VOCAB, S = 8, 0.2


def expected(logits, target, smoothing):
    logs = logits.log_softmax(-1)
    own = logs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -(1 - smoothing) * own - smoothing / (VOCAB - 1) * (logs.sum(-1) - own)


def check(rank, ranks, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    logits = torch.arange(VOCAB, dtype=torch.float32).expand(3, 1, VOCAB).contiguous()  # [S, B, V]
    target = torch.tensor([[0], [3], [6]])
    mine = logits.chunk(ranks, -1)[rank].contiguous()
    off = {}
    for smoothing in (0.0, S):
        loss = vocab_parallel_cross_entropy(mine.clone(), target, smoothing)
        off[smoothing] = (loss - expected(logits, target, smoothing)).abs().max().item()
        losses = [torch.empty_like(loss) for _ in range(ranks)]
        dist.all_gather(losses, loss)
        off[smoothing, "apart"] = (losses[0] - losses[-1]).abs().max().item()
    if rank == 0:
        for key, value in off.items():
            print(f"{ranks} ranks, label_smoothing {key}: {value:.5f}")
        assert off[0.0] < 1e-5 and off[0.0, "apart"] < 1e-5
        if ranks == 1:
            assert off[S] < 1e-5
        else:
            assert off[S] > 0.1 and off[S, "apart"] > 0.1
    dist.destroy_process_group()


if __name__ == "__main__":
    for ranks in (1, 2):
        mp.spawn(check, (ranks, f"{sys.argv[1]}/store{ranks}"), nprocs=ranks)
    print("as described")
PY
"$folder/venv/bin/python" -W ignore "$folder/check.py" "$folder"
