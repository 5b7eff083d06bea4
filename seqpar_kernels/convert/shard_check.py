"""Follows the sequence shard through the first forward of a converted model.

A shard that reaches a parameter outside the plan gives that parameter a partial gradient on every rank, and a forward
that looks right: the commonest silent bug of sequence parallelism. So tensors are marked at the entrance, every torch
function passes the mark on, and a parameter (or what was computed from one), a dropout or a model output that meets a
mark where none is planned is an error that names it. Costs one slow forward per mode (training, evaluation); later
forwards pay nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

_MARK = "_seqpar_shard"
_DROPOUTS = frozenset(
    {
        nn.functional.dropout,
        nn.functional.dropout1d,
        nn.functional.dropout2d,
        nn.functional.dropout3d,
        nn.functional.alpha_dropout,
        nn.functional.feature_alpha_dropout,
        torch.dropout,
        torch.native_dropout,
    }
)

#: style -> (the input must be a shard, the output is one); None: either.
EXPECTED: dict[str, tuple[bool | None, bool]] = {
    "colwise": (True, False),
    "rowwise": (False, True),
    "norm": (True, True),
    "dropout": (True, True),
    "sequence": (True, True),
    "tensor_parallel": (False, False),
}


def mark(value: Any, shard: bool | str) -> None:
    """Say of every tensor in ``value`` that it is a shard, that it is not, or which parameter it was computed from."""
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            setattr(leaf, _MARK, shard)


def is_shard(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and getattr(leaf, _MARK, False) is True for leaf in tree_leaves(value))


class ShardCheck(TorchFunctionMode):
    """Active during one forward of ``model``.

    ``styles`` maps module names to the style that handles their input; behind the modules in ``gathers`` the sequence
    is whole again.
    """

    def __init__(self, model: nn.Module, styles: dict[str, str], gathers: frozenset[str]):
        super().__init__()
        self._model = model
        self._styles = styles
        self._gathers = gathers
        self._names = {id(param): name for name, param in model.named_parameters(remove_duplicate=False)}
        self._stack: list[str] = []
        self._planned = 0  # depth inside modules the plan handles
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Hook every module and follow torch functions from here on."""
        for name, module in self._model.named_modules():
            if name:
                style = self._styles.get(name)
                self._handles.append(module.register_forward_pre_hook(self._entering(name, style), with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leaving(name, style), always_call=True))
        self.__enter__()

    def stop(self) -> None:
        """Take the hooks off; may be called twice."""
        if self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self.__exit__(None, None, None)

    def check_output(self, output: Any) -> None:
        """Raises RuntimeError where a model output is still a shard."""
        if is_shard(output):
            raise RuntimeError(
                f"{type(self._model).__name__} returns a sequence shard: the plan has no 'gather_output' between the "
                "last sharded module and the output (hidden states and other by-products are shards too)"
            )

    def _entering(self, name: str, style: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._stack.append(name)
            if style is None:
                return
            wanted = EXPECTED[style][0]
            first = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
            if not self._planned and wanted is not None and first is not None and is_shard(first) != wanted:
                kinds = ("the whole sequence", "a sequence shard")
                self._stack.pop()
                raise RuntimeError(
                    f"{name}: the plan says {style!r}, which takes {kinds[wanted]}, "
                    f"but its input is {kinds[not wanted]}"
                )
            self._planned += 1

        return hook

    def _leaving(self, name: str, style: str | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._stack:
                self._stack.pop()
            if style is not None and self._planned:
                self._planned -= 1
                mark(output, EXPECTED[style][1] and name not in self._gathers)

        return hook

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._planned:
            return func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        sources = [name for leaf in leaves if (name := self._source(leaf)) is not None]
        if not any(getattr(leaf, _MARK, False) is True for leaf in leaves):
            out = func(*args, **kwargs)
            if sources and isinstance(out, (Tensor, tuple, list)):
                mark(out, sources[0])
            return out
        if sources:
            raise RuntimeError(self._missed(sources[0]))
        if func in _DROPOUTS and self._drops(args, kwargs):
            where = self._stack[-1] if self._stack else type(self._model).__name__
            raise RuntimeError(
                f"{where}: dropout on a sequence shard that the plan does not know: its mask would depend on how the "
                f"sequence is cut. Give it the style 'dropout', or set its probability to 0"
            )
        out = func(*args, **kwargs)
        if isinstance(out, (Tensor, tuple, list)):
            mark(out, True)  # 0-d results (a mean, say) are partial too
        return out

    def _source(self, leaf: Tensor) -> str | None:
        """The parameter that ``leaf`` is, or was computed from outside the plan."""
        found = getattr(leaf, _MARK, None)
        return found if isinstance(found, str) else self._names.get(id(leaf))

    def _missed(self, parameter: str) -> str:
        module = parameter.rpartition(".")[0] or type(self._model).__name__
        return (
            f"{module}: a sequence shard reaches parameter {parameter!r}, which the plan does not cover: its gradient "
            f"would be a different part of the sum on every rank. Add {module!r} to the plan with a style that fits: "
            f"'norm', 'colwise', 'rowwise', or 'sequence' for a module that treats rows one by one"
        )

    @staticmethod
    def _drops(args: Any, kwargs: Any) -> bool:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return bool(training) and p > 0
