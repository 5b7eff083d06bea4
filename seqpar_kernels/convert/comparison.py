"""Hooks a converted model so that its inputs, the gradient of its output, and its parameters are compared.

Floating-point buffers are compared too. Excluded are buffers that may be this rank's own: those named like a cache
(``_OWN``), those in modules of style 'tensor_parallel', and those that a forward writes (statistics of this rank's
heads, say).
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
from ..ops.registry import in_backward
from .alike import REMEDY, Alike, comparison_enabled
from .conversion import Conversion
from .fingerprint import is_plain
from .optimizers import steps_taken
from .plans import STREAM_NAMES
from .shard_check import is_shard

#: Names of arguments that hold this rank's own heads of earlier forwards.
_OWN = re.compile("past|cache|mems|rank", re.IGNORECASE)
_TAKEN = 16  # numbers of each parameter that are compared
#: Part of the largest of them by which they may differ. Rounding stays below, another initialisation does not.
_DRIFT = 0.25
_JUMPS = 32  # most comparisons caused by writes of something else than an optimizer of torch's


def compare_ranks(model: nn.Module, conversion: Conversion) -> Alike | None:
    """Compare the forwards of ``model`` between the ranks from now on. Returns None where they are not compared.

    A call is compared at its outermost entrance. Entrances are the model itself and, because a part may be called
    alone, the modules where the sequence is cut and all that hold them. Nothing is compared under torch.compile, in a
    recomputation during the backward, and while a CUDA graph is captured.
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
    under: list[nn.Module] = []  # the entrance of the current call

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
    if callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):  # torch.compile would trace the comparison
        return True
    # A recomputation in the backward; a transformation of torch.func, in which tensors have no values.
    return in_backward() or torch._C._functorch.peek_interpreter_stack() is not None


def _captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _namer(module: nn.Module) -> Callable[[tuple[Any, ...], dict[str, Any]], Iterator[tuple[str, Any]]]:
    """Returns a function that yields (name, value) of a call's arguments that must be alike: tensors and numbers."""
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
            alike.fold(f"the gradient at the output of {name} (labels and loss must be the same too)", grad)

    return hook


class _Place(NamedTuple):
    """The place of a buffer, or of a parameter that ``fully_shard`` may replace."""

    name: str
    module: nn.Module
    key: str
    buffer: bool = False

    def held(self) -> Any:
        return dict.get(self.module._buffers if self.buffer else self.module._parameters, self.key)

    def tensor(self) -> Tensor:
        """This rank's part of the present tensor; an empty one where it is gone (parametrized, say)."""
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
    """Yield the buffers that must be alike on all ranks, as far as names and styles tell."""
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
    """Finds the buffers that forwards write. They are this rank's own."""

    def __init__(self, places: list[_Place]):
        self._places = places
        self._before: list[tuple[Any, int]] = []
        self.own: set[str] = set()

    def start(self) -> None:
        """Begin a forward."""
        self._before = [(held := place.held(), _version(held)) for place in self._places]

    def stop(self) -> None:
        """End the forward."""
        for place, (held, version) in zip(self._places, self._before, strict=False):
            now = place.held()
            if now is not held or _version(now) != version:
                self.own.add(place.name)
        self._before = []


class _Jump:
    """Tells whether parameters were written since the last call by something else than an optimizer (loaded, say)."""

    def __init__(self, places: list[_Place]):
        self._places = places
        self._versions, self._steps = self._now(), steps_taken()
        self._left = _JUMPS

    def _now(self) -> int:
        held = [place.held() for place in self._places]
        # Parameters of fully_shard, which writes them in every forward.
        if any(isinstance(param, DTensor) for param in held):
            return 0
        return sum(map(_version, held))

    def __call__(self) -> bool:
        versions, steps = self._now(), steps_taken()
        jumped = versions != self._versions and steps == self._steps and self._left > 0
        self._versions, self._steps = versions, steps
        self._left -= jumped
        return jumped


def _compare_parameters(places: list[_Place], own: set[str], gathered: Callable[[Tensor], Tensor]) -> None:
    """Compare some numbers of each parameter. Replicated ones must agree, parts of a cut one must differ.

    Names that are in ``own`` on any rank are left out.

    Raises:
        RuntimeError: on every rank, naming replicated parameters that differ, or cut ones of which all ranks hold
            the same part.
    """
    with torch.no_grad():
        parts = [_some(place, 1) for place in places]
        device = next((part.device for part in parts if part.device.type != "cpu"), torch.device("cpu"))
        for place, part in zip(places, parts, strict=True):
            if place.name in own:
                part.fill_(float("nan"))  # NaN is never found to differ
        mine = torch.cat([part.to(device) for part in parts])
        found = gathered(mine).view(-1, len(places), _TAKEN).cpu()
        largest = found.abs().amax((0, 2))
        apart = ((found - found[:1]).abs() > _DRIFT * largest[:, None]).any(2).any(0)
        same = (found == found[:1]).all(2).all(0) & (found[0].amin(1) != found[0].amax(1))
        wrong = [p.name for p, differs in zip(places, apart.tolist(), strict=True) if differs and not p.cut]
        if wrong:
            raise RuntimeError(
                f"{_listed(wrong)}: the ranks of the group hold different values of parameters or buffers that "
                "must be the same on all. Initialise or load before parallelize, with the ranks seeded alike, or load "
                f"with load_state_dict afterwards. {REMEDY}"
            )
        doubtful = [p for p, equal in zip(places, same.tolist(), strict=True) if equal and p.of_linear]
        if not doubtful:
            return
        more = gathered(torch.cat([_some(place, 64) for place in doubtful])).view(-1, len(doubtful), 64 * _TAKEN)
        copies = [p.name for p, equal in zip(doubtful, (more == more[:1]).all(2).all(0).tolist(), strict=True) if equal]
        if copies:
            raise RuntimeError(
                f"{_listed(copies)}: every rank of the group holds the same values, but each must hold its part of "
                "the whole weight. It was initialised after parallelize, with all ranks seeded alike. Initialise "
                "before parallelize, or with reset_parameters() of the module or model.apply, which draw the whole "
                f"weight and cut it. {REMEDY}"
            )


def _some(place: _Place, blocks: int) -> Tensor:
    """[blocks * 16] numbers spread over a parameter; zeros where it is too small or absent."""
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
