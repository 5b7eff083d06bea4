"""The models that ``bench guards`` trains: the demo's, whose file no wheel carries. A test holds the two alike."""

from __future__ import annotations

import sysconfig
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SEED = 20220510
VOCAB = 256  # bytes
DROPOUT = 0.1
LEARNING_RATE = 3e-4


class Sizes(NamedTuple):
    batch: int
    sequence: int
    hidden: int
    layers: int


@cache
def corpus() -> Tensor:
    """The sources of the Python standard library's own modules as one string of bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(path.read_bytes() for path in files)), dtype=torch.uint8)


def batch(sizes: Sizes, device: str) -> Tensor:
    """The same for every rank and every run. int64 [batch, sequence]."""
    text = corpus()
    starts = torch.randint(text.numel() - sizes.sequence, (sizes.batch,), generator=torch.Generator().manual_seed(0))
    return torch.stack([text[i : i + sizes.sequence] for i in starts.tolist()]).long().to(device)


def build_model(name: str, sizes: Sizes, device: str) -> nn.Module:
    """A Hugging Face model with random weights, in fp32 and in training mode."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    heads = sizes.hidden // 32
    config: Any
    if name == "GPT-2":
        config = GPT2Config(
            vocab_size=VOCAB,
            n_positions=sizes.sequence,
            n_embd=sizes.hidden,
            n_layer=sizes.layers,
            n_head=heads,
            resid_pdrop=DROPOUT,
            embd_pdrop=DROPOUT,
            attn_pdrop=0.0,  # that mask lives in PyTorch's own attention kernel
            bos_token_id=0,
            eos_token_id=0,
        )
    else:
        config = LlamaConfig(
            vocab_size=VOCAB,
            max_position_embeddings=sizes.sequence,
            hidden_size=sizes.hidden,
            intermediate_size=sizes.hidden * 8 // 3,
            num_hidden_layers=sizes.layers,
            num_attention_heads=heads,
            num_key_value_heads=max(heads // 3, 1),
            attention_dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    config.use_cache = False
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config).to(device, torch.float32).train()


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss
