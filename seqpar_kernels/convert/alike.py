"""Compares between the ranks what must be the same on all: batches, random states, replicated parameters.

Tensor parallelism takes the same batch on every rank. A rank may get another one: data parallelism gives each rank its
own, a loader may be shuffled with another seed, a token may be sampled differently. The model then computes with
features of one batch and rows of another, and nothing fails. So every forward folds a fingerprint of each argument into
one number, without communication. The ranks compare these numbers in the first forwards, then in every
:data:`EVERY`-th one. A difference in any forward is found by the next comparison.

Integers are compared exactly. Floating-point tensors may differ by rounding between machines. Where their fingerprints
differ, the ranks compare the rows; a tensor that is equal but for rounding is not compared again.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ..caches import per_group
from ..comm.coordination import coordination_of
from ..overlap import pipeline
from .attention_dropout import default_generator
from .fingerprint import fingerprint, is_plain, row_sketch

#: Forwards between two comparisons, after those of the 1st, 2nd, 3rd, 5th and 9th forward. A comparison is one small
#: all-gather: at this rate less than a hundredth of the collectives of a model of two layers.
EVERY = 16
_VARIABLE = "SEQPAR_COMPARE_RANKS"
_OP = "comparison of the ranks"
_SLOTS = 16  # numbers that a rank sends: one for all that is no tensor, and one for each tensor argument
_MIX = 6364136223846793005  # folds a new fingerprint into those of earlier forwards
#: Part of the sum of magnitudes of a row by which sketches may differ. Rounding stays far below, another row does not.
_ROUNDING = 1e-3
RANDOM = "the random generator"

REMEDY = (
    "All ranks of a tensor-parallel group take the same batch and the same seeds: give a sampler or loader the number "
    "of data-parallel ranks (Accelerate: parallelism_config(model) of seqpar_kernels.convert.hf.accelerate), and call "
    f"torch.manual_seed with one value on all ranks of the group. {_VARIABLE}=0 switches this comparison off"
)


def comparison_enabled() -> bool:
    """Whether models are converted with the comparison; SEQPAR_COMPARE_RANKS=0 on all ranks switches it off."""
    return os.environ.get(_VARIABLE) != "0"


@per_group
def _exchanges_of(group: ProcessGroup) -> Iterator[int]:
    """Count the exchanges of all models on ``group``, so that no rank reads an earlier exchange from the store."""
    return itertools.count()


class Alike:
    """The comparison of one converted model's forwards between the ranks of ``group``.

    ``device`` returns the device of the model. ``parameters`` compares parameters: it is called on all ranks in the
    first comparisons, in every second one after, and after a jump. ``jumped`` tells at the beginning of a forward
    whether parameters have been written in a way that training does not explain; that forward is compared.
    """

    def __init__(
        self,
        group: ProcessGroup,
        device: Callable[[], torch.device],
        parameters: Callable[[Callable[[Tensor], Tensor]], None] | None = None,
        jumped: Callable[[], bool] = lambda: False,
    ):
        self._group, self._device, self._parameters, self._jumped = group, device, parameters, jumped
        self._ranks = group.size()
        self._coordination = coordination_of(group)
        self._epoch = self._coordination.epoch
        self._where = ""
        #: Names of tensors that are equal but for rounding, and of those whose rows are to be compared.
        self._rounded: set[str] = set()
        self._suspects: set[str] = set()
        self._training: bool | None = None
        self._drawing: Tensor | None = None  # inside while_drawing: the state of the generator in the last forward
        self._drawn = False
        self._start_again()

    def _start_again(self) -> None:
        """The next forward is compared as the first one is."""
        self._forwards = 0
        self._due = self._first = False
        self._sums: dict[str, Tensor] = {}
        self._exact: set[str] = set()
        self._said: dict[str, int] = {}
        self._described: dict[str, str] = {}
        self._later: tuple[torch.cuda.Event, Tensor, dict[str, Tensor], dict[str, int], dict[str, str]] | None = None
        self._random: tuple[torch.Generator, Tensor] | None = None
        self._suspects.clear()

    # Collecting -------------------------------------------------------------------------------------------------

    def begin(self, where: str, arguments: Mapping[str, Any], training: bool) -> None:
        """Begin a forward with ``arguments``. The first one after a change of mode or of the called module is compared.

        Raises:
            RuntimeError: on every rank, where ranks differ in what they were given since the last comparison.
        """
        if self._coordination.epoch != self._epoch:
            self._start_again()  # after an error the ranks may have counted different forwards
        self._judge_later()
        count = self._forwards
        self._first = count == 0
        if self._drawing is not None and not self._drawn:
            self._drawn = not torch.equal(default_generator(self._device()).get_state(), self._drawing)
        turned = (where, training) != (self._where, self._training)
        self._where, self._training = where, training
        jumped, early = self._jumped(), count in (0, 1, 2, 4, 8)
        self._due = self._drawn or turned or jumped or early or count % EVERY == 0
        self._forwards += 1
        present = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                self.fold(name, value)
                present[name] = value
            else:
                self.say(name, repr(value))
        if self._due:
            self.compare(present)
            if self._parameters is not None and (jumped or early or count % (2 * EVERY) == 0):
                self._parameters(self.gathered)
            generator = default_generator(self._device())
            self._random = generator, generator.get_state()

    def stream(self, name: str, x: Tensor) -> None:
        """Fold ``x``, which is about to be cut along the sequence in the current forward."""
        self.fold(name, x)
        if self._first:
            self.compare({name: x})

    def end(self) -> None:
        """End the forward. If it drew random numbers, the ranks must have begun it with the same random state."""
        random, self._random = self._random, None
        if random is None:
            return
        generator, before = random
        if not torch.equal(generator.get_state(), before):
            self.say(RANDOM, str(zlib.crc32(before.numpy().tobytes())))
            if self._first:
                self.compare({})

    def fold(self, name: str, x: Tensor) -> None:
        """Add ``x``, which must be the same on all ranks, to the next comparison."""
        self.say(name, f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}")
        if not is_plain(x):
            return
        with torch.no_grad(), torch._C.DisableTorchFunction():
            x = x.detach()
            if not (x.is_floating_point() or x.is_complex()):
                self._exact.add(name)
            elif name in self._suspects or (name in self._rounded and self._due):
                self._look_at(name, x)
            if name in self._rounded:
                return
            number, before = fingerprint(x), self._sums.get(name)
            self._sums[name] = number if before is None else torch.add(number, before, alpha=_MIX)

    def say(self, name: str, text: str) -> None:
        """Add ``text``, which must be the same on all ranks, to the next comparison."""
        self._said[name] = zlib.crc32(text.encode(), self._said.get(name, 0))
        self._described[name] = text

    @contextlib.contextmanager
    def while_drawing(self) -> Iterator[None]:
        """Inside, compare every forward once random numbers were drawn between two of them (sampled tokens)."""
        self._start_again()
        self._drawing, self._drawn = default_generator(self._device()).get_state(), False
        try:
            yield
        finally:
            self._drawing, self._drawn = None, False

    def result(self, where: str, values: Mapping[str, Tensor]) -> None:
        """Compare results at once. A collective call."""
        self._where, self._first = where, True
        for name, value in values.items():
            self.fold(name, value)
        self.compare(values)
        self._start_again()

    # Comparing -----------------------------------------------------------------------------------------------------

    def gathered(self, mine: Tensor) -> Tensor:
        """[n] -> [ranks, n], on every rank."""
        with torch.no_grad(), torch._C.DisableTorchFunction():
            whole = pipeline.gather(mine.unsqueeze(-1), 0, mine.numel() * self._ranks, self._group, _OP)
            return whole.view(self._ranks, mine.numel())

    def compare(self, present: Mapping[str, Tensor]) -> None:
        """Compare all that was folded and said since the last comparison with the other ranks. A collective call.

        ``present`` holds the tensors of this forward, whose rows can be compared.
        """
        device, names = self._device(), sorted(self._sums)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            said = zlib.crc32(json.dumps(self._said, sort_keys=True).encode())
            first = torch.tensor([said, *[0] * max(0, _SLOTS - 1 - len(names))])
            if device.type == "cuda":  # a copy from pinned memory does not block the host
                first = first.pin_memory().to(device, non_blocking=True)
            sums = [self._sums[name].to(device, non_blocking=True) for name in names]
            while len(sums) >= _SLOTS:
                sums[-2:] = [sums[-1] + sums[-2] * 3]
            whole = self.gathered(torch.cat([first, torch.stack(sums)]) if sums else first)
        self._epoch = self._coordination.epoch
        sums_now, said_now, described = self._sums, self._said, self._described
        self._said, self._described, self._sums = {}, {}, {}
        if device.type == "cuda" and not (self._first or self._drawn):
            host = torch.empty(whole.shape, dtype=whole.dtype, pin_memory=True)
            host.copy_(whole, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._later = event, host, sums_now, said_now, described
            return
        self._judge(whole, sums_now, said_now, described, present)

    def _judge_later(self) -> None:
        """Judge the last comparison of a device, which the host did not wait for."""
        if self._later is not None:
            (event, whole, sums, said, described), self._later = self._later, None
            event.synchronize()
            self._judge(whole, sums, said, described, {})

    def _judge(
        self,
        whole: Tensor,
        sums: dict[str, Tensor],
        said: dict[str, int],
        described: dict[str, str],
        present: Mapping[str, Tensor],
    ) -> None:
        rows = whole.tolist()
        if all(row == rows[0] for row in rows):
            return
        mine = {name: [said[name], described[name], int(sums[name]) if name in sums else 0] for name in said}
        every = [json.loads(text) for text in self._exchanged(json.dumps(mine))]
        apart = [name for name in dict.fromkeys(name for one in every for name in one) if _differs(name, every)]
        certain = [name for name in apart if name in self._exact or _differs(name, every, of=2)]
        if certain:
            self._fail("; ".join(_difference(name, every) for name in certain))
        for name in apart:
            self._suspects.add(name)
            if name in present:
                self._look_at(name, present[name].detach())

    def _look_at(self, name: str, x: Tensor) -> None:
        """Fail if the rows of ``x`` differ between the ranks by more than rounding."""
        self._suspects.discard(name)
        with torch.no_grad(), torch._C.DisableTorchFunction():
            mine = row_sketch(torch.view_as_real(x) if x.is_complex() else x).to(self._device())
            found = self.gathered(mine.reshape(-1)).view(self._ranks, -1, 2).double().cpu()
        products, sizes = found.unbind(-1)
        finite = products.isfinite()
        bound = _ROUNDING * torch.maximum(sizes, sizes[:1])
        far = ((products - products[:1]).abs() > bound) | (finite != finite[:1])
        if bool(far.any()):
            ranks = [rank for rank in range(self._ranks) if bool(far[rank].any())]
            self._fail(f"{name}: other values on {_ranks_text(ranks)} than on rank 0")
        self._rounded.add(name)

    def _exchanged(self, text: str) -> list[str]:
        """Exchange texts over the store. All ranks call this, because all have seen the same difference."""
        coordination = self._coordination
        key = f"compared/{coordination.epoch}/{next(_exchanges_of(self._group))}"
        coordination.publish(key, text)
        end = time.monotonic() + coordination.timeout.total_seconds()
        found = [""] * self._ranks
        while not all(found):
            found = [said or coordination.read(key, rank) for rank, said in enumerate(found)]
            if time.monotonic() > end:
                self._fail(f"what they were given (rank {found.index('')} did not say what)")
            time.sleep(0.001)
        return found

    def _fail(self, what: str) -> NoReturn:
        when = "in this forward" if self._first else f"in one of the last forwards (at most {EVERY})"
        where = self._where
        self._start_again()
        raise RuntimeError(f"{where}: the ranks of the group differ {when}: {what}. {REMEDY}")


def _differs(name: str, every: list[dict[str, Any]], of: int = 3) -> bool:
    found = [None if one.get(name) is None else (one[name][0], one[name][2])[: of - 1] for one in every]
    return any(one != found[0] for one in found)


def _difference(name: str, every: list[dict[str, Any]]) -> str:
    """Describe how ``name`` differs between the ranks."""
    given = [rank for rank, one in enumerate(every) if name in one]
    if len(given) < len(every):
        return f"{name}: given on {_ranks_text(given)} alone"
    texts = [one[name][1] for one in every]
    other = [rank for rank, one in enumerate(every) if one[name] != every[0][name]]
    if name == RANDOM:
        return (
            f"{RANDOM}, from which this forward draws (dropout): another state on {_ranks_text(other)} than on rank 0"
        )
    if any(text != texts[0] for text in texts):
        return f"{name}: " + ", ".join(f"{text} on rank {rank}" for rank, text in enumerate(texts))
    return f"{name}: other values on {_ranks_text(other)} than on rank 0 ({texts[0]})"


def _ranks_text(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
