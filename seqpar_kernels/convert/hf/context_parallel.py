"""A whole Transformers model over a sequence that the ranks of a group share.

The batch comes whole on every rank, or in shards. Before the forward the model's arguments are cut along the sequence;
every layer runs on this rank's rows; attention goes over the rows of all ranks, by the functions of
:mod:`.attention_interface`; the loss is that of the whole batch on every rank; and gradients are summed at the end of
the backward (:mod:`.gradient_sum`).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig

from ...comm.coordination import checked_together, coordination_of
from ...functional import unshard_sequence
from ...functional.sequence_attention import attention_choice
from ...layout import Group, group_rank, group_size, resolve_group
from ...ops.registry import in_backward
from ...overlap.attention_choice import ENGINES, Choice
from ...random import draw_seed
from ...sequence_layout import LAYOUTS
from ..alike import Alike, comparison_enabled
from ..attention_dropout import default_generator
from . import attention_interface
from .attention_interface import Asked, Whole
from .context_batch import Signature, check_arguments, cut_batch
from .context_loss import ContextLoss
from .context_probe import is_proven, try_out
from .context_refusals import refuse_unfit
from .gradient_sum import GradientSum


class ContextParallel:
    """How a model shares its sequence; ``conversion.context``."""

    def __init__(self, model: Any, group: Group, engine: str, input_is_sharded: bool | str):
        if engine not in ENGINES:
            raise ValueError(
                f"context_parallel: expected None or one of {', '.join(map(repr, ENGINES))}, got {engine!r}"
            )
        if not isinstance(input_is_sharded, bool) and input_is_sharded not in LAYOUTS:
            raise ValueError(
                f"input_is_sharded: expected a bool, or the layout, 'contiguous' or 'zigzag', got {input_is_sharded!r}"
            )
        refuse_unfit(model)
        loss = getattr(getattr(model, "loss_function", None), "__name__", "")
        self._has_loss = loss == "ForCausalLMLoss" and "labels" in Signature(model).names
        self.input_is_sharded = bool(input_is_sharded)
        self.asked = Asked(resolve_group(group), _layout(model, engine, input_is_sharded), engine)
        self.last: Whole | None = None  # what explain tells
        self._configs: list[tuple[Any, Any]] = []
        self._random: tuple[torch.Generator, Tensor] | None = None
        self._running = False
        self._tried, self._aside = is_proven(model), False

    @property
    def group(self) -> ProcessGroup | None:
        return self.asked.group

    @property
    def layout(self) -> str:
        return self.asked.layout

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    def describe(self) -> str:
        """For agreement between the ranks."""
        return f"context_parallel={self.asked.engine!r}, layout {self.layout}, input_is_sharded={self.input_is_sharded}"

    def install(self, model: Any, tensor_rank: int) -> None:
        """Register attention, loss and hooks. ``tensor_rank`` is this rank's place among those that share heads."""
        attention_interface.register()
        for config in _configs(model):
            self._configs.append((config, config._attn_implementation_internal))
            config._attn_implementation_internal = attention_interface.NAME
        self._signature, self._tensor_rank = Signature(model), tensor_rank
        self._loss = ContextLoss(self.group)
        if self._has_loss:
            model.loss_function = self._loss
        self._gradients = GradientSum(self.group)
        self._alike = None
        if self.group is not None and comparison_enabled():
            self._alike = Alike(self.group, lambda: next(model.parameters()).device)
        for module in model.modules():
            if _grows(getattr(module, "rope_type", None)):
                module.register_forward_pre_hook(self._last_position, with_kwargs=True)
                module.register_forward_hook(self._without_last)
        model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        model.register_forward_hook(self._finished)
        model.register_forward_hook(self._always, always_call=True)

    def undo(self) -> None:
        """Give the configs their attention back; what lies in modules is for the conversion's undo."""
        for config, name in self._configs:
            config._attn_implementation_internal = name

    def whole(self, x: Tensor, seq_dim: int = 1) -> Tensor:
        """The rows of all ranks, of a result of the last forward."""
        if self.last is None:
            raise RuntimeError("context_parallel: there was no forward yet")
        return unshard_sequence(x, self.group, seq_dim, layout=self.layout, seq_len=self.last.length)

    def explained(self) -> str:
        """A line for ``explain``."""
        return (
            f"attention over {self.ranks} ranks, context_parallel={self.asked.engine!r}, layout {self.layout!r}; "
            "gradients are summed over them at the end of a backward"
        )

    def explained_calls(self) -> Iterator[tuple[str, Choice]]:
        """How attention ran in the last forward, by kind of mask."""
        for kind, call in self.last.ran.items() if self.last is not None else ():
            q, k, v = (torch.empty(shape, dtype=call.dtype, device="meta") for shape in call.shapes)
            options = {"is_causal": call.is_causal, "window_size": call.window, "seq_len": self.last.length}  # type: ignore[union-attr]
            asked: Any = {"group": self.group, "layout": self.layout, "engine": self.asked.engine, **options}
            yield kind, attention_choice(q, k, v, **asked)

    # Hooks ---------------------------------------------------------------------------------------------------------

    def _before(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._aside:
            return None
        if not self._tried and not torch.compiler.is_compiling():
            self._tried = True
            try_out(model, self.ranks, lambda **given: self._unsharded(model, given), self.whole)
        self._end()
        again = in_backward()  # recomputed
        with checked_together(self.group):
            given = self._signature.bind(args, kwargs)
            least = 1 if self.input_is_sharded else self.ranks
            check_arguments(given, model.config.get_text_config(), least)
            asks_loss = given.get("labels") is not None or given.get("shift_labels") is not None
            if asks_loss and not self._has_loss:
                raise ValueError(
                    f"labels: expected None, {type(model).__name__} has no next-token loss that context_parallel knows"
                )
            if torch.is_grad_enabled():
                self._gradients.watch(model)
        self._running = True
        if self._alike is not None and not again and not torch.compiler.is_compiling():
            whole = {} if self.input_is_sharded else given
            compared = {name: value for name, value in whole.items() if isinstance(value, Tensor)}
            self._alike.begin(type(model).__name__, compared, model.training)
        batch = cut_batch(given, self.asked, self.input_is_sharded)
        self.last, self._loss.count = batch.whole, batch.labels
        if model.training and _drops(model):
            self._own_randomness(batch.whole, next(model.parameters()).device)
        attention_interface.enter(batch.whole)
        return (), batch.kwargs

    def _unsharded(self, model: Any, given: dict[str, Tensor]) -> Any:
        """The model on this rank alone. Eager attention: SDPA drops caps and sinks."""
        names = [config._attn_implementation_internal for config, _ in self._configs]
        for config, _ in self._configs:
            config._attn_implementation_internal = "eager"
        self._aside = True
        try:
            return model(**given)
        finally:
            self._aside = False
            for (config, _), name in zip(self._configs, names, strict=True):
                config._attn_implementation_internal = name

    def _finished(self, model: Any, args: Any, output: Any) -> None:
        if self._alike is not None and not self._aside and not torch.compiler.is_compiling():
            self._restore_random()
            if not in_backward():
                self._alike.end()
        self._running = False

    def _always(self, model: Any, *_: Any) -> None:
        if self._aside:
            return
        failed = self._running
        self._end()
        error = sys.exc_info()[1] if failed and not torch.compiler.is_compiling() else None
        if error is not None and self.group is not None:
            coordination_of(self.group).stop(error)

    def _end(self) -> None:
        attention_interface.enter(None)
        self._restore_random()
        self._loss.count, self._running = None, False

    def _own_randomness(self, whole: Whole, device: torch.device) -> None:
        """Each rank drops entries of its own rows; in attention, by position, all drop what one rank would."""
        seed = int(draw_seed(device))
        generator = default_generator(device)
        self._random = generator, generator.get_state()
        generator.manual_seed((seed + group_rank(self.group)) % (1 << 63))
        whole.seed = (seed + 0x632BE59BD9B4E019 * self._tensor_rank) % (1 << 63)

    def _restore_random(self) -> None:
        if self._random is not None:
            generator, state = self._random
            self._random = None
            generator.set_state(state)

    def _last_position(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Rotary embeddings whose frequencies follow from the largest position: that of all ranks."""
        whole = attention_interface.current() or self.last
        if self._aside or whole is None:
            return None
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        positions: Tensor = call.arguments["position_ids"]
        largest = positions.new_full((*positions.shape[:-1], 1), whole.largest)
        call.arguments["position_ids"] = torch.cat([positions, largest], -1)
        return call.args, call.kwargs

    def _without_last(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._aside or self.last is None:
            return None
        return tuple(t[..., :-1, :] for t in output) if isinstance(output, tuple) else output[..., :-1, :]


def _grows(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def _configs(model: nn.Module) -> Iterator[Any]:
    """Each config that a module of ``model`` asks for its attention."""
    seen = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in seen:
            seen.add(id(config))
            yield config
            text = config.get_text_config()
            if id(text) not in seen:
                seen.add(id(text))
                yield text


def _drops(model: Any) -> bool:
    """Whether a forward in training draws random numbers."""
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return True
    held = vars(model.config.get_text_config()).items()
    return any(isinstance(v, float) and v > 0 for name, v in held if "drop" in name or "jitter" in name)


def _layout(model: Any, engine: str, input_is_sharded: bool | str) -> str:
    if isinstance(input_is_sharded, str):
        return input_is_sharded
    if input_is_sharded or engine == "ulysses":
        return "contiguous"
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = kinds <= {"sliding_attention"} if kinds else getattr(config, "sliding_window", None) is not None
    return "contiguous" if windowed else "zigzag"
