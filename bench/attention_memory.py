"""What one call of attention takes of memory on a rank: what autograd keeps, and the peak of forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def kept_and_peak(attend: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor) -> tuple[int, int]:
    """(bytes that autograd keeps beyond ``leaves``, most bytes at one time in forward and backward beyond them).

    The peak is that of PyTorch's allocator, so that buffers of sockets and of other libraries are not in it. Gradients
    of the leaves are.
    """
    found: dict[int, int] = {}
    given = {t.untyped_storage().data_ptr() for t in leaves}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in given:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = attend(*leaves)
    kept = sum(found.values())
    del y
    return kept, peak_of(lambda: torch.autograd.grad(attend(*leaves), list(leaves), grad))


def peak_of(call: Callable[[], object]) -> int:
    """The most bytes that ``call`` has allocated at one time on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
        del result
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
