"""The demo's work on one rank: the text, the two models, the training loop, the check against plain Hugging Face.

Every rank builds the same full model from the same seed, sees the same batches, and calls ``parallelize``; with one
rank (``group=None``) that is the unsharded run, on the same kernels.
"""

import copy
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 20220510
VOCAB = 256  # bytes
DROPOUT = 0.1
# Training amplifies rounding: a 1e-7 change of the weights moves GPT-2's loss by 5e-4 after 60 steps at twice this
# learning rate, and by 2e-7 at this one. So the comparison measures the parallel code, not amplified rounding.
LEARNING_RATE, WARMUP = 3e-4, 10
GROUP_TIMEOUT = timedelta(seconds=90)
MODELS = ("GPT-2", "Llama")


@dataclass(frozen=True)
class Job:
    """The options of one run, the same on every rank."""

    ranks: int
    steps: int
    batch: int
    sequence: int
    hidden: int
    layers: int
    device: str  # "cpu" or "cuda"
    folder: str  # for the store and the ranks' results
    oracle: bool = False  # also run the plain model in fp32 and fp64, in one process


Report = Callable[[tuple[Any, ...]], None]


@cache
def corpus() -> Tensor:
    """The sources of the Python standard library's own modules as one string of bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batch(job: Job, step: int) -> Tensor:
    """A batch, the same for every rank and every run. int64 [batch, sequence]."""
    text = corpus()
    starts = torch.randint(text.numel() - job.sequence, (job.batch,), generator=torch.Generator().manual_seed(step))
    return torch.stack([text[i : i + job.sequence] for i in starts.tolist()]).long().to(job.device)


def build_model(name: str, job: Job, dropout: float) -> nn.Module:
    """A Hugging Face model with random weights: about 10 million parameters at hidden 384 and 6 layers."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    heads = job.hidden // 32
    config: Any
    if name == "GPT-2":
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=job.sequence,
            n_embd=job.hidden,
            n_layer=job.layers,
            n_head=heads,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=0.0,  # that mask lives in PyTorch's own attention kernel
            bos_token_id=0,
            eos_token_id=0,
        )
    else:
        config = LlamaConfig(
            vocab_size=VOCAB,
            max_position_embeddings=job.sequence,
            hidden_size=job.hidden,
            intermediate_size=job.hidden * 8 // 3,
            num_hidden_layers=job.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(heads // 3, 1),
            attention_dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    config.use_cache = False
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config).to(job.device, torch.float32).train()


def double_oracle(model: nn.Module) -> nn.Module:
    """``model`` in fp64. Hugging Face's RMSNorm rounds to fp32 whatever it is given; torch's does not."""
    oracle = copy.deepcopy(model).double()
    for module in list(oracle.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.numel(), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return oracle


def relative_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest ||a - b|| / ||b|| over the tensors, or the first nan, and whose it is."""
    if a.keys() != b.keys():
        raise RuntimeError(f"parameters differ: {sorted(a.keys() ^ b.keys())}")
    worst = (0.0, "")
    for name, theirs in b.items():
        difference = torch.linalg.vector_norm(a[name].double() - theirs.double()).item()
        norm = torch.linalg.vector_norm(theirs.double()).item()
        found = difference / max(norm, 1e-30)
        if math.isnan(found):
            return found, name
        worst = max(worst, (found, name))
    return worst


def full_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Full gradients, on the CPU, by the unconverted model's names."""
    from seqpar_kernels.convert import gather_full_gradients

    return {name: gradient.cpu() for name, gradient in gather_full_gradients(model).items()}


def plain_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def own_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def double_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The same loss in fp64; Hugging Face rounds the logits to fp32 first."""
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(
    model: nn.Module,
    steps: int,
    job: Job,
    *,
    tick: Callable[[int, float], None] = lambda step, loss: None,
    loss_of: Callable[[nn.Module, Tensor], Tensor] = own_loss,
    gradients_of: Callable[[nn.Module], dict[str, Tensor]] = full_gradients,
) -> dict[str, Any]:
    """AdamW for ``steps`` batches: the losses, the milliseconds of a step, the gradients of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    torch.manual_seed(SEED + 1)  # alike on all ranks: the dropout seeds are drawn from this generator
    losses, times, first = [], [], {}
    for step in range(steps):
        ids = batch(job, step)
        for settings in optimizer.param_groups:
            settings["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP)
        start = time.perf_counter()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        times.append((time.perf_counter() - start) * 1e3)
        if step == 0:
            first = gradients_of(model)
        optimizer.zero_grad()
        tick(step, losses[-1])
    return {"losses": losses, "gradients": first, "step_ms": statistics.median(times[1:] or times)}


def run_model(name: str, job: Job, group: Any, tick: Callable[[int, float], None]) -> dict[str, Any]:
    """One model: the check without dropout, what autograd keeps, the training run."""
    from seqpar_kernels import activation_bytes, explain, parallelize

    found: dict[str, Any] = {}
    plain = build_model(name, job, dropout=0.0)
    if job.oracle:
        found["fp32"] = train(copy.deepcopy(plain), 2, job, gradients_of=plain_gradients)
        found["fp64"] = train(double_oracle(plain), 2, job, loss_of=double_loss, gradients_of=plain_gradients)
    found["check"] = train(parallelize(plain, group), 2, job)

    model = build_model(name, job, DROPOUT)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    model = parallelize(model, group)
    found["explain"] = str(explain(model))
    ids = batch(job, 0)
    found["activation_bytes"] = activation_bytes(lambda: model(input_ids=ids, labels=ids).loss).total
    found["train"] = train(model, job.steps, job, tick=tick)
    return found


def run_rank(rank: int, job: Job, send: Report) -> None:
    """The entry point of every process; leaves its results in ``rank{rank}.pt``."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a laptop's host name need not resolve
    from transformers.utils import logging

    logging.set_verbosity_error()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // job.ranks))
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    group = None
    if job.ranks > 1:
        dist.init_process_group(
            "nccl" if job.device == "cuda" else "gloo",
            init_method=f"file://{job.folder}/store",
            rank=rank,
            world_size=job.ranks,
            timeout=GROUP_TIMEOUT,
        )
        group = dist.group.WORLD
    found = {}
    for name in MODELS:
        send((rank, name, None, None))
        found[name] = run_model(name, job, group, lambda step, loss, name=name: send((rank, name, step, loss)))
        if rank > 0:  # the full gradients are the same everywhere; one copy is enough
            for part in ("check", "train"):
                found[name][part].pop("gradients")
    torch.save(found, f"{job.folder}/rank{rank}.pt")
    if group is not None:
        dist.destroy_process_group()
