"""Attention of a Transformers model over the ranks of a group: the functions that its attention interface calls.

A model of Transformers asks ``AttentionMaskInterface`` for a mask and hands it to the function that
``AttentionInterface`` names, layer by layer. Here the mask is a :class:`ContextMask`: no tensor, but what
:func:`seqpar_kernels.sequence_parallel_attention` takes. Transformers describes masks by Python functions of two
indices; those that are known are taken apart, and one that is not is refused, because it counts the rows of this rank
where rows of the whole sequence are meant.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ...functional import sequence_parallel_attention
from ...layout import group_size
from .packing import Documents, as_tensors, with_chunks

#: The name under which both functions are registered: a model's ``config._attn_implementation``.
NAME = "seqpar_context_parallel"

_MODULE = "transformers.masking_utils"
#: Arguments that models hand to their attention and that say nothing about what a row sees.
_HARMLESS = frozenset({
    "position_ids", "position_embeddings", "cache_position", "use_cache", "past_key_values", "past_key_value",
    "output_attentions", "output_hidden_states", "return_dict", "labels", "shift_labels", "num_items_in_batch",
    "layer_idx", "logits_to_keep", "output_router_logits", "is_causal", "attention_mask_type", "module",
})  # fmt: skip


class Asked(NamedTuple):
    """How the attention of a model is to run."""

    group: ProcessGroup | None
    layout: str
    engine: str


class Call(NamedTuple):
    """A call of attention, as far as its engine follows from it."""

    shapes: tuple[torch.Size, ...]  # of q, k and v
    dtype: torch.dtype
    is_causal: bool
    window: tuple[int, int]


class Whole:
    """What a forward knows of its whole sequence, alike on all ranks; its mask functions see parts alone."""

    def __init__(self, asked: Asked, length: int, padding: Tensor | None, documents: Documents | None):
        self.asked, self.length = asked, length
        self.padding = padding  # booleans [B, S]: which keys are seen
        self.documents = documents
        self.largest = length - 1  # position
        self.seed: int | None = None  # of attention dropout, alike on all ranks of the group
        self.ran: dict[str, Call] = {}  # by kind of mask: the last


_under_way = threading.local()


def current() -> Whole | None:
    """The forward under way in this thread."""
    return getattr(_under_way, "whole", None)


def enter(whole: Whole | None) -> None:
    """From here on masks are those of ``whole``."""
    _under_way.whole = whole


class ContextMask:
    """Which keys of the whole sequence the rows of this rank see. Stands where a model expects a mask tensor.

    It holds all that a recomputation needs. What a model does with it other than handing it on is an error.
    """

    def __init__(
        self,
        whole: Whole,
        is_causal: bool,
        window: tuple[int, int],
        documents: Documents | None,
        batch: int,
        device: torch.device,
    ):
        self._whole = whole
        self._is_causal, self._window = is_causal, window
        self._bias = None if whole.padding is None else whole.padding[:, None, None, :]
        self._parts = as_tensors(documents, batch, device)
        kind = "causal" if is_causal else "bidirectional"
        self._kind = kind if window == (-1, -1) else f"{kind}, window {max(window) + 1}"

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(
            "context_parallel: the model computes with its attention mask, which is no tensor where the sequence is "
            "shared by ranks; its architecture cannot be run with context_parallel"
        )

    __getitem__ = __add__ = __radd__ = __sub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = _refuse
    __invert__ = __len__ = __iter__ = __bool__ = _refuse

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> NoReturn:
        cls._refuse(cls)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        self._refuse()


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> ContextMask:
    """In Transformers' ``AttentionMaskInterface``: the mask of the forward under way.

    ``attention_mask`` and the positions that ``mask_function`` holds are of this rank's rows: those of the forward are
    taken instead. What ``mask_function`` says besides is honoured.
    """
    whole = current()
    if whole is None:
        raise RuntimeError(
            "context_parallel: attention outside of a forward of the model that parallelize was given, which cuts the "
            "sequence; call that model"
        )
    if q_length != kv_length or q_offset or kv_offset:
        raise RuntimeError(
            f"context_parallel: expected as many keys as queries, got {kv_length} from {kv_offset} and {q_length} from "
            f"{q_offset}: there is no key/value cache and no prefix"
        )
    if mask_function is None:
        raise RuntimeError("context_parallel: expected Transformers' function of a mask, got none")
    is_causal, window, documents = False, (-1, -1), whole.documents
    for part in _parts(mask_function):
        kind, held = _known(part)
        if kind == "causal_mask_function":
            is_causal = True
        elif kind == "sliding_window_overlay":
            window = (int(held["sliding_window"]) - 1, -1)
        elif kind == "sliding_window_bidirectional_overlay":
            window = (int(held["sliding_window"]), int(held["sliding_window"]))
        elif kind == "chunked_overlay":
            if whole.padding is not None and not bool(whole.padding[:, :1].all()):
                raise RuntimeError(
                    "context_parallel: attention in chunks that begin behind left padding is not supported; pad on "
                    "the right"
                )
            documents = with_chunks(documents, int(held["chunk_size"]), batch_size, whole.length)
        elif kind == "blockwise_overlay":
            _refuse_mask("block_sequence_ids")
        elif kind not in ("bidirectional_mask_function", "packed_sequence_mask_function", "padding_mask_function"):
            _refuse_mask(kind)
    return ContextMask(
        whole, is_causal, window, documents if is_causal else None, batch_size, device or torch.device("cpu")
    )


def _parts(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """The functions whose conjunction ``function`` is."""
    if _qualified(function) == "and_masks.<locals>.and_mask":
        for inner in _held(function)["mask_functions"]:
            yield from _parts(inner)
    else:
        yield function


def _known(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """The name of the maker of a mask function of Transformers', and what it was made with."""
    return _qualified(function).partition(".<locals>.")[0], _held(function)


def _qualified(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", repr(function))
    return name if getattr(function, "__module__", "") == _MODULE else f"{getattr(function, '__module__', '')}.{name}"


def _held(function: Callable[..., Any]) -> dict[str, Any]:
    cells = getattr(function, "__closure__", None) or ()
    names = function.__code__.co_freevars if cells else ()
    return dict(zip(names, (cell.cell_contents for cell in cells), strict=True))


def _refuse_mask(kind: str) -> NoReturn:
    raise RuntimeError(
        f"context_parallel: the model adds {kind} to its mask, which counts rows of this rank; known are causal and "
        "bidirectional masks, windows, chunks, padding, and documents by position_ids"
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In Transformers' ``AttentionInterface``: query [B, Hq, S/t, D] over keys and values of all ranks.

    Returns:
        [B, S/t, Hq, Dv], and no weights.
    """
    where = type(module).__name__
    mask = attention_mask
    if not isinstance(mask, ContextMask):
        got = "none" if mask is None else f"a {type(mask).__name__}"
        raise RuntimeError(
            f"context_parallel: {where} was not given the mask of Transformers' create_causal_mask, got {got}: what "
            "its rows see is not known"
        )
    whole, asked = mask._whole, mask._whole.asked
    for name, given in (("position_bias", position_bias), *kwargs.items()):
        if isinstance(given, Tensor) and name not in _HARMLESS:
            raise RuntimeError(f"context_parallel: {where} passes {name} to its attention, which would be dropped")
    for name, present, passed in (
        ("sinks", getattr(module, "sinks", None), s_aux),
        ("attn_logit_softcapping", getattr(module, "attn_logit_softcapping", None), softcap),
    ):
        if present is not None and passed is None:
            raise RuntimeError(f"context_parallel: {where} has {name} and does not pass them to its attention function")
    if kwargs.get("is_causal") not in (None, mask._is_causal):
        raise RuntimeError(f"context_parallel: {where} says is_causal={kwargs['is_causal']}, its mask is {mask._kind}")
    if sliding_window is not None and mask._window != (sliding_window - 1, -1):
        raise RuntimeError(
            f"context_parallel: {where} attends in a window of {sliding_window}, but its mask has {mask._kind}"
        )
    if query.shape[2] != key.shape[2]:
        raise RuntimeError(
            f"context_parallel: {where} has {query.shape[2]} queries and {key.shape[2]} keys: no cross-attention, no "
            "key/value cache"
        )
    outs = []
    heads_behind = [t.transpose(1, 2) for t in (query, key, value)]
    for entries, cu_seqlens in mask._parts:
        q, k, v = (t[entries] for t in heads_behind) if len(mask._parts) > 1 else heads_behind
        bias = mask._bias
        outs.append(
            sequence_parallel_attention(
                q,
                k,
                v,
                group=asked.group,
                is_causal=mask._is_causal,
                window_size=mask._window,
                dropout_p=float(dropout),
                scale=None if scaling is None else float(scaling),
                softcap=float(softcap or 0.0),
                sinks=s_aux,
                attn_bias=bias[entries] if bias is not None and bias.shape[0] > 1 else bias,
                cu_seqlens=cu_seqlens,
                seq_len=whole.length if whole.length % group_size(asked.group) else None,
                layout=asked.layout,
                engine=asked.engine,
                seed=_seed(whole, module, entries.start) if dropout else None,
            )
        )
    whole.ran[mask._kind] = Call(tuple(t.shape for t in heads_behind), query.dtype, mask._is_causal, mask._window)
    out = outs[0] if len(outs) == 1 else torch.cat(outs)  # type: ignore[arg-type, type-var]
    return out, None  # type: ignore[return-value]


def _seed(whole: Whole, module: nn.Module, entry: int) -> int | None:
    """Of one layer and one part of the batch: the same in a recomputation, and on all ranks."""
    if whole.seed is None:
        return None
    layer = int(getattr(module, "layer_idx", None) or 0)
    return (whole.seed + 0x9E3779B97F4A7C15 * (layer + 1) + 0xD1B54A32D192ED03 * entry) % (1 << 63)


def register() -> None:
    """Make both functions known to Transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, make_mask)
