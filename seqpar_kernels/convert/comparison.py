"""Where a converted model is compared between the ranks: what enters it, what comes back to its output, parameters.

Floating-point buffers as well, but for those that may be this rank's own: named like a cache (``_OWN``), in modules of
style 'tensor_parallel', and what a forward itself writes (statistics of this rank's heads, a cache of their keys).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..nn.linear import ColumnParallelLinear, RowParallelLinear
from .alike import REMEDY, Alike, comparison_enabled
from .conversion import Conversion
from .fingerprint import is_plain
from .optimizers import steps_taken
from .plans import STREAM_NAMES
from .shard_check import is_shard

#: Arguments that hold what earlier forwards have left on this rank, of its own heads.
_OWN = re.compile("past|cache|mems|rank", re.IGNORECASE)
_TAKEN = 16  # numbers that are compared of each parameter
#: Of the largest of them: rounding stays below, another initialisation does not.
_DRIFT = 0.25
_JUMPS = 32  # comparisons for parameters written by something else than an optimizer of torch's, which may do it often


def compare_ranks(model: nn.Module, conversion: Conversion) -> Alike | None:
    """From now on the forwards of ``model`` are compared between the ranks; None: they are not.

    Entrances are the model itself and, for those who call a part of it alone, the modules around (and with) those where
    the sequence is cut: the outermost one of a call counts. Under torch.compile, in a recomputation during the backward
    and while a CUDA graph is captured nothing happens.
    """
    group = conversion.region.group
    if group is None or not comparison_enabled():
        return None
    parameters, buffers = list(_parameters(model)), list(_buffers(model, conversion))
    places, written, jump = parameters + buffers, _Written(buffers), _Jump(parameters)
    first = places[0] if places else None

    def device() -> torch.device:
        return torch.device("cpu") if first is None else first.tensor().device

    alike = Alike(group, device, lambda gathered: _compare_parameters(places, written.own, gathered), jump)
    cuts = {name for name, edges in conversion.edges.items() if "scatter_input" in edges}
    paths = {".".join(path[:depth]) for path in (cut.split(".") for cut in cuts) for depth in range(len(path) + 1)}
    under: list[nn.Module] = []  # the entrance of the call that is under way

    def entering(name: str, module: nn.Module) -> Callable[..., None]:
        where, named = name or type(model).__name__, _namer(module)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _not_now():
                return
            if under and under[0] is not module:
                stream = _stream(args, kwargs) if name in cuts else None
                cut = conversion.watch is not None and conversion.watch.stage == "cut"
                if stream is not None and not cut and not is_shard(stream):
                    alike.stream(f"the input of {name}", stream)
                return
            if _captured(device()):
                return
            under[:] = [module]
            alike.begin(where, dict(named(args, kwargs)), module.training)
            written.start()

        return hook

    def left(module: nn.Module, args: Any, output: Any) -> None:
        if under and under[0] is module and not _not_now():
            written.stop()
            alike.end()

    def leaving(module: nn.Module, *_: Any) -> None:
        if not torch.compiler.is_compiling() and under and under[0] is module:
            under.clear()

    for name in {"", *paths}:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(entering(name, module), with_kwargs=True, prepend=True)
        module.register_forward_hook(left)
        module.register_forward_hook(leaving, always_call=True)
    for name, edges in conversion.edges.items():
        if "gather_output" in edges:
            model.get_submodule(name).register_forward_hook(_gradient_hook(name, alike))
    return alike


def _not_now() -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):  # torch.compile sees what this would call
        return True
    # A recomputation in the backward; a transformation of torch.func, in which tensors have no values.
    return torch._C._current_graph_task_id() != -1 or torch._C._functorch.peek_interpreter_stack() is not None


def _captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _namer(module: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Iterator[tuple[str, Any]]]:
    """Gives names and values of those arguments of a call that have to be alike: tensors, numbers, and a batch's."""
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]

    def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        given = [(names[i] if i < len(names) else f"argument {i}", value) for i, value in enumerate(args)]
        for name, value in (*given, *kwargs.items()):
            items = value.items() if isinstance(value, Mapping) else [("", value)]
            for key, item in items:
                label = f"{name}[{key!r}]" if key else name
                plain_number = isinstance(item, (int, float)) and not isinstance(item, bool)
                if (plain_number or isinstance(item, Tensor)) and not _OWN.search(label):
                    yield label, item

    return named


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = args[0] if args else next((kwargs[key] for key in STREAM_NAMES if isinstance(kwargs.get(key), Tensor)), None)
    return x if is_plain(x) else None


def _gradient_hook(name: str, alike: Alike) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if is_plain(first) and first.requires_grad and not _not_now():
            first.register_hook(fold)

    def fold(grad: Tensor) -> None:
        if not torch.compiler.is_compiling() and not _captured(grad.device):
            alike.fold(f"the gradient at the output of {name} (labels and loss are to be alike too)", grad)

    return hook


class _Place(NamedTuple):
    """A parameter that may be replaced (``fully_shard``), or a buffer, where it lies."""

    name: str
    module: nn.Module
    key: str
    buffer: bool = False

    def held(self) -> Any:
        return dict.get(self.module._buffers if self.buffer else self.module._parameters, self.key)

    def tensor(self) -> Tensor:
        """What this rank has of it now; no numbers of one that is gone (parametrized, say)."""
        held = self.held()
        if held is None:
            return torch.empty(0)
        return held._local_tensor if isinstance(held, DTensor) else held.detach()

    @property
    def cut(self) -> bool:
        return self.key in getattr(self.module, "sharded", {})

    @property
    def of_linear(self) -> bool:
        kinds = (ColumnParallelLinear, RowParallelLinear)
        return self.cut and isinstance(self.module, kinds) and self.key == "weight"


def _parameters(model: nn.Module) -> Iterator[_Place]:
    seen = set()
    for name, module in model.named_modules():
        for key, param in dict.items(module._parameters):
            if param is not None and id(param) not in seen and param.is_floating_point():
                seen.add(id(param))
                yield _Place(f"{name}.{key}" if name else key, module, key)


def _buffers(model: nn.Module, conversion: Conversion) -> Iterator[_Place]:
    """Those that are to be alike on all ranks, as far as names and styles tell."""
    heads = [f"{name}." for name, style in conversion.styles.items() if style == "tensor_parallel"]
    for name, module in model.named_modules():
        for key, buffer in module._buffers.items():
            full = f"{name}.{key}" if name else key
            if buffer is None or not buffer.is_floating_point() or _OWN.search(key) or full.startswith(tuple(heads)):
                continue
            yield _Place(full, module, key, buffer=True)


def _version(held: Any) -> int:
    return 0 if held is None or held.is_inference() else held._version


class _Written:
    """Which buffers forwards write: those are this rank's own."""

    def __init__(self, places: list[_Place]):
        self._places = places
        self._before: list[tuple[Any, int]] = []
        self.own: set[str] = set()

    def start(self) -> None:
        """A forward begins."""
        self._before = [(held := place.held(), _version(held)) for place in self._places]

    def stop(self) -> None:
        """It is over."""
        for place, (held, version) in zip(self._places, self._before, strict=False):
            now = place.held()
            if now is not held or _version(now) != version:
                self.own.add(place.name)
        self._before = []


class _Jump:
    """Whether parameters have been written since the last call, and by no optimizer: initialised, loaded."""

    def __init__(self, places: list[_Place]):
        self._places = places
        self._versions, self._steps = self._now(), steps_taken()
        self._left = _JUMPS

    def _now(self) -> int:
        held = [place.held() for place in self._places]
        if any(isinstance(param, DTensor) for param in held):  # of fully_shard, which writes in every forward
            return 0
        return sum(map(_version, held))

    def __call__(self) -> bool:
        versions, steps = self._now(), steps_taken()
        jumped = versions != self._versions and steps == self._steps and self._left > 0
        self._versions, self._steps = versions, steps
        self._left -= jumped
        return jumped


def _compare_parameters(places: list[_Place], own: set[str], gathered: Callable[[Tensor], Tensor]) -> None:
    """Some numbers of each parameter: those of replicated ones agree, and parts of a cut one do not.

    What is called in ``own`` on any rank is not compared.

    Raises:
        RuntimeError: on every rank, naming parameters that came apart, or of which every rank has the same part.
    """
    with torch.no_grad():
        parts = [_some(place, 1) for place in places]
        device = next((part.device for part in parts if part.device.type != "cpu"), torch.device("cpu"))
        for place, part in zip(places, parts, strict=True):
            if place.name in own:
                part.fill_(float("nan"))  # differs from nothing
        mine = torch.cat([part.to(device) for part in parts])
        found = gathered(mine).view(-1, len(places), _TAKEN).cpu()
        largest = found.abs().amax((0, 2))
        apart = ((found - found[:1]).abs() > _DRIFT * largest[:, None]).any(2).any(0)
        same = (found == found[:1]).all(2).all(0) & (found[0].amin(1) != found[0].amax(1))
        wrong = [p.name for p, differs in zip(places, apart.tolist(), strict=True) if differs and not p.cut]
        if wrong:
            raise RuntimeError(
                f"{_listed(wrong)}: the ranks of the group hold other values of parameters or buffers that are to "
                "be alike on all. Initialise or load before parallelize, with the ranks seeded alike, or load with "
                f"load_state_dict afterwards. {REMEDY}"
            )
        doubtful = [p for p, equal in zip(places, same.tolist(), strict=True) if equal and p.of_linear]
        if not doubtful:
            return
        more = gathered(torch.cat([_some(place, 64) for place in doubtful])).view(-1, len(doubtful), 64 * _TAKEN)
        copies = [p.name for p, equal in zip(doubtful, (more == more[:1]).all(2).all(0).tolist(), strict=True) if equal]
        if copies:
            raise RuntimeError(
                f"{_listed(copies)}: every rank of the group holds the same values, where each has to hold its part "
                "of the whole weight: it was initialised after parallelize, with all ranks seeded alike. Initialise "
                "before parallelize, or with reset_parameters() of the module or model.apply, which draw the whole "
                f"weight and cut it. {REMEDY}"
            )


def _some(place: _Place, blocks: int) -> Tensor:
    """[blocks * 16] numbers of a parameter, spread over it; zeros of one that is too small or away."""
    x = place.tensor()
    count = x.numel()
    if count < _TAKEN or not x.is_contiguous() or x.untyped_storage().size() == 0 or x.device.type == "meta":
        padded = torch.zeros(blocks * _TAKEN, device=x.device)
        if x.dim() and 0 < count < _TAKEN and x.untyped_storage().size():
            padded[:count] = x.reshape(-1)
        return padded
    flat = x.view(-1)
    step = (count - _TAKEN) // blocks
    taken = [flat[step * i + step // 2 :][:_TAKEN] for i in range(blocks)]
    return torch.cat(taken).float() if blocks > 1 else taken[0].to(torch.float32, copy=True)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
