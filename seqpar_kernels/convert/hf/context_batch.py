"""The batch of a forward in context parallelism: checked, cut along the sequence, and what is known of it whole."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...functional import next_token_labels, sequence_positions, shard_sequence, unshard_sequence
from ...layout import group_size
from .attention_interface import Asked, Whole
from .packing import Documents, documents_of, documents_of_lengths

#: Arguments that hold nothing of the sequence.
_PLAIN = frozenset({
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_router_logits",
    "logits_to_keep", "num_items_in_batch", "past_key_values", "cache_position",
})  # fmt: skip
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_ROWS = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "labels", "shift_labels")


class Batch(NamedTuple):
    """What :func:`cut_batch` makes of the arguments of a forward."""

    kwargs: dict[str, Any]  # for the model
    whole: Whole
    labels: int | None  # how many there are in the whole batch; None: no loss is asked for


class Signature:
    """The arguments of a model's forward by name, however they were passed."""

    def __init__(self, model: nn.Module):
        parameters = inspect.signature(type(model).forward).parameters.values()
        usual = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [p.name for p in parameters if p.kind in usual][1:]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.names):
            raise ValueError(f"forward: expected at most {len(self.names)} positional arguments, got {len(args)}")
        return dict(zip(self.names, args, strict=False)) | dict(kwargs)


def check_arguments(given: Mapping[str, Any], config: Any, least: int) -> None:
    """Refuse what context parallelism cannot honour, by name, before anything is sent. ``least``: rows there must be.

    Raises:
        ValueError: see the messages.
    """
    for name, value in given.items():
        if name in (*_ROWS, *_LENGTHS, *_PLAIN) or value is None or isinstance(value, bool | int | float | str):
            continue
        raise ValueError(
            f"{name}: expected None with context_parallel, which shares {', '.join(_ROWS)} along the sequence, got a "
            f"{type(value).__name__}"
        )
    if (given.get("input_ids") is None) == (given.get("inputs_embeds") is None):
        raise ValueError("input_ids: expected these or inputs_embeds")
    stream = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
    dims = 2 if given.get("input_ids") is not None else 3
    if not isinstance(stream, Tensor) or stream.dim() != dims:
        raise ValueError(f"input_ids: expected [B, S], inputs_embeds [B, S, H], got {_described(stream)}")
    batch, length = stream.shape[:2]
    if length < least:
        raise ValueError(
            f"input_ids: expected {least} rows or more with context_parallel, one for each rank, got "
            f"{_described(stream)}"
        )
    for name in ("position_ids", "attention_mask", "labels", "shift_labels"):
        value = given.get(name)
        if value is None:
            continue
        first = (1, batch) if name == "position_ids" else (batch,)
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[0] not in first or value.shape[1] != length:
            raise ValueError(
                f"{name}: expected [{batch}, {length}] like the input with context_parallel, got {_described(value)}"
            )
    if given.get("use_cache") or given.get("past_key_values") is not None:
        name = "use_cache" if given.get("use_cache") else "past_key_values"
        raise ValueError(
            f"{name}: expected none with context_parallel, whose ranks hold parts of the sequence; for generation call "
            "unparallelize(model), or decode with SequenceShardedCache (docs/long-context.md)"
        )
    keep = given.get("logits_to_keep")
    if not (keep is None or (isinstance(keep, int) and keep == 0)):
        raise ValueError(
            f"logits_to_keep: expected 0 with context_parallel, whose ranks keep their own rows, got {keep}"
        )
    for name, why in (
        ("output_attentions", "no rank has all weights"),
        ("output_router_logits", "the auxiliary loss of a mixture of experts counts the tokens of all ranks"),
    ):
        value = given.get(name)
        if getattr(config, name, False) if value is None else value:
            raise ValueError(f"{name}: expected False with context_parallel, {why}")
    if (given.get("cu_seq_lens_q") is None) != (given.get("cu_seq_lens_k") is None):
        raise ValueError("cu_seq_lens_k: expected it with cu_seq_lens_q, or neither")


def cut_batch(given: dict[str, Any], asked: Asked, input_is_sharded: bool, ignore_index: int = -100) -> Batch:
    """This rank's rows of the batch. Checked already, by :func:`check_arguments`."""
    group, layout = asked.group, asked.layout
    kwargs = {name: value for name, value in given.items() if name not in _LENGTHS}
    name = "input_ids" if given.get("input_ids") is not None else "inputs_embeds"
    stream: Tensor = given[name]
    batch, device = stream.shape[0], stream.device
    length = stream.shape[1] * (group_size(group) if input_is_sharded else 1)

    def whole_of(x: Tensor) -> Tensor:
        return unshard_sequence(x, group, -1, layout=layout) if input_is_sharded else x

    def cut(x: Tensor) -> Tensor:
        return shard_sequence(x, group, -1, layout=layout)

    documents: Documents | None = None
    largest = length - 1
    positions, padding = given.get("position_ids"), given.get("attention_mask")
    if positions is None:
        kwargs["position_ids"] = sequence_positions(length, group, layout, device=device)[None]
    else:
        positions = whole_of(positions)
        kwargs["position_ids"] = cut(positions)
        largest = int(positions.max()) if positions.numel() else 0
        if padding is None:  # else Transformers takes them for what they are too
            documents = documents_of(positions.expand(batch, -1))
    if given.get("cu_seq_lens_q") is not None:
        if not torch.equal(given["cu_seq_lens_q"], given["cu_seq_lens_k"]):
            raise ValueError("cu_seq_lens_k: expected the same as cu_seq_lens_q")
        documents = documents_of_lengths(given["cu_seq_lens_q"], batch, length)
    if padding is not None:
        padding = whole_of(padding)
        kwargs["attention_mask"] = cut(padding)
        padding = padding.to(device=device, dtype=torch.bool)
        if bool(padding.all()):
            padding = None
    if not input_is_sharded:
        kwargs[name] = cut(stream) if stream.dim() == 2 else shard_sequence(stream, group, -2, layout=layout)
    kwargs["use_cache"] = False
    labels, count = given.get("labels"), None
    shifted = given.get("shift_labels")
    if shifted is not None:
        shifted = whole_of(shifted)
    elif labels is not None:
        shifted = next_token_labels(whole_of(labels), None, ignore_index=ignore_index)
    if shifted is not None:
        count = int((shifted != ignore_index).sum())
        kwargs["labels"] = cut(shifted)
    kwargs.pop("shift_labels", None)
    whole = Whole(asked, length, padding, documents)
    whole.largest = largest
    return Batch(kwargs, whole, count)


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
