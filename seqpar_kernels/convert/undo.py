"""A model as it was before its conversion, to go back to."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

_CHANGED = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "training"}


class _Before(NamedTuple):
    """One module as it was: everything but its parameters, of which the names and a mark of identity are kept.

    ``inner`` is what lay in those dictionaries of torch's (children, hooks) that a conversion may change. Buffers are
    not among them: what became of them since, on another device or in another dtype, holds.
    """

    module: nn.Module
    name: str
    held: dict[str, Any]
    inner: dict[str, dict[Any, Any]]
    params: dict[str, int | None]


class Snapshot:
    """A model before its conversion. Keeps no parameter alive."""

    def __init__(self, model: nn.Module):
        self._modules: list[_Before] = []
        for name, module in model.named_modules():
            held = dict(vars(module))
            del held["_parameters"]
            inner = {k: dict(v) for k, v in held.items() if k in _CHANGED and isinstance(v, dict)}
            params = {n: None if p is None else id(p) for n, p in module._parameters.items()}
            self._modules.append(_Before(module, name, held, inner, params))

    def release(self, model: nn.Module) -> None:
        """After the conversion: modules that were replaced let their parameters go."""
        live = set(model.modules())
        for before in self._modules:
            if before.module not in live:
                before.module._parameters.update(dict.fromkeys(before.params))

    def restore(self, model: nn.Module, full: dict[str, Tensor]) -> None:
        """Put everything back, with parameters out of ``full``; tied ones are one again."""
        now: dict[str, nn.Module] = dict(model.named_modules())
        listed = dict(model.named_parameters(remove_duplicate=False))
        made: dict[int, nn.Parameter] = {}
        for before in self._modules:
            module, prefix = before.module, before.name + "." if before.name else ""
            held = vars(module)
            training = now[before.name].training if before.name in now else model.training
            held.clear()
            held.update(before.held)
            for key, content in before.inner.items():  # the very dictionary: a hook's handle takes it out of that one
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
