"""Dropout seeds: 0-d int64 tensors from PyTorch's default generators, the same on all ranks of a group."""

import contextlib
import operator
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .checks import check_tensor
from .environment import flag

_SEED_LIMIT = 2**63 - 1


_thread = threading.local()


@contextlib.contextmanager
def own_generator(generator: torch.Generator) -> Iterator[None]:
    """Seeds that this thread draws for ``generator.device`` come from ``generator``: for ranks that are threads."""
    before = getattr(_thread, "generator", None)
    _thread.generator = generator
    try:
        yield
    finally:
        _thread.generator = before


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed from the default generator of ``device``. 0-d int64.

    Being an ordinary random tensor it follows ``torch.manual_seed``, is replayed by activation checkpointing, and is
    new at every replay of a CUDA graph.
    """
    generator = None if torch.compiler.is_compiling() else getattr(_thread, "generator", None)
    if generator is None or generator.device.type != device.type:
        return torch.randint(_SEED_LIMIT, (), dtype=torch.int64, device=device)
    return torch.randint(_SEED_LIMIT, (), dtype=torch.int64, device=device, generator=generator)


def as_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """``seed`` as a 0-d int64 tensor on ``device``; drawn when None.

    Raises:
        ValueError: a tensor that is not 0-d int64, an int outside [-2**63, 2**64), or neither of them.
    """
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        check_tensor("seed", seed)
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed: expected a 0-d int64 tensor, got {tuple(seed.shape)} {seed.dtype}")
        return seed if seed.device == device else seed.to(device)
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ValueError(f"seed: expected an int, a 0-d int64 tensor or None, got {type(seed).__name__}")
    seed = operator.index(seed)  # numpy integers are integers
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an int of 64 bits, got {seed}")
    return torch.tensor(seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=device)


def debug_enabled() -> bool:
    """Whether SEQPAR_DEBUG asks for checks that cost communication."""
    return flag("SEQPAR_DEBUG")


def check_seeds_alike(seed: Tensor, group: ProcessGroup) -> None:
    """Raise on every rank when the ranks of ``group`` hold different seeds (a debug check: one small all-gather).

    Raises:
        RuntimeError: naming the seed of each rank.
    """
    seeds = [torch.empty_like(seed) for _ in range(group.size())]
    dist.all_gather(seeds, seed.contiguous(), group=group)
    values = [int(s) for s in seeds]
    if len(set(values)) > 1:
        raise RuntimeError(
            f"seed: the ranks of a group must draw the same dropout seeds, got {values} on ranks 0..{len(values) - 1}; "
            "call torch.manual_seed with one value on all of them, and draw the same random numbers since"
        )
