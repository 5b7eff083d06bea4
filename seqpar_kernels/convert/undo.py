"""Keeps a model as it was before its conversion, for ``unparallelize``."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

_CHANGED = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "training"}


class _Before(NamedTuple):
    """One module as it was, without its parameters, of which names and ids are kept.

    ``inner`` is the content of torch's dictionaries (children, hooks) that a conversion may change. Buffers are not
    among them: they may have moved to another device or dtype since, and stay there.
    """

    module: nn.Module
    name: str
    held: dict[str, Any]
    inner: dict[str, dict[Any, Any]]
    params: dict[str, int | None]


class Undo:
    """A model before its conversion. Holds no parameter."""

    def __init__(self, model: nn.Module):
        self._modules: list[_Before] = []
        for name, module in model.named_modules():
            held = dict(vars(module))
            del held["_parameters"]
            inner = {k: dict(v) for k, v in held.items() if k in _CHANGED and isinstance(v, dict)}
            params = {n: None if p is None else id(p) for n, p in module._parameters.items()}
            self._modules.append(_Before(module, name, held, inner, params))

    def release(self, model: nn.Module) -> None:
        """After the conversion, release the parameters of modules that were replaced."""
        live = set(model.modules())
        for before in self._modules:
            if before.module not in live:
                before.module._parameters.update(dict.fromkeys(before.params))

    def restore(self, model: nn.Module, full: dict[str, Tensor]) -> None:
        """Restore every module, with parameters from ``full``. Tied parameters are tied again."""
        now: dict[str, nn.Module] = dict(model.named_modules())
        listed = dict(model.named_parameters(remove_duplicate=False))
        made: dict[int, nn.Parameter] = {}
        for before in self._modules:
            module, prefix = before.module, before.name + "." if before.name else ""
            held = vars(module)
            training = now[before.name].training if before.name in now else model.training
            held.clear()
            held.update(before.held)
            for key, content in before.inner.items():  # keep the dictionary: handles of hooks refer to it
                held[key].clear()
                held[key].update(content)
            held["training"] = training
            held["_parameters"] = params = dict.fromkeys(before.params)
            for name, mark in before.params.items():
                if mark is not None:
                    if mark not in made:
                        wanted = listed[prefix + name].requires_grad
                        made[mark] = nn.Parameter(full[prefix + name], requires_grad=wanted)
                    params[name] = made[mark]
