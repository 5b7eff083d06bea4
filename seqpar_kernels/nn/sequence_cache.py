"""Keys and values of earlier tokens, shared by the ranks of a group: position p on rank p mod t."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..checks import check_float, check_tensor
from ..comm.coordination import checked_together
from ..compiling import not_traced
from ..functional.decode_attention import check_no_gradient, decode_scalars, keys_to_owners
from ..functional.sequence_attention import cast_as_autocast, check_attention_bias, check_attention_tensors
from ..layout import Group, group_rank, group_size, resolve_group, shard_of
from ..ops.registry import group_name
from ..overlap.key_owners import Held, Source, heads_of, keys_of
from ..sequence_layout import Interval, Intervals, check_layout, count, rows_of
from .cache_layer import CacheLayer


class SequenceShardedCache:
    """Keys and values of earlier tokens for decoding, each position on one rank only: p on rank p mod t.

    A rank holds 1/t of them, even where there are fewer key heads than ranks. In a step each rank attends over its own
    keys and sends its partial result to every peer in one message. All ranks sum the partial results in rank order in
    fp32 (fp64 for fp64), so that all get the same bits. The bytes sent depend on the new tokens, not on the cached
    ones.

    All ranks must make the same calls. There is no gradient. This is no ``transformers.Cache``, which returns all keys
    to the model: here no rank has all of them. :meth:`decode` replaces ``update`` and the attention after it.

    Args:
        group: the ranks that share the cache: a ProcessGroup, a 1-D DeviceMesh or None for this rank alone.
        num_heads: query heads of the model, a multiple of the ranks, where q, k and v come as this rank's heads
            (tensor parallelism over ``group``). None: every rank passes all heads of all tokens.
        num_kv_heads: key heads of the model, beside ``num_heads``; a multiple or a divisor of the ranks. With a divisor
            ranks / num_kv_heads neighbours have each key head.
        capacity: positions of the whole sequence for which memory is allocated at once. Beyond it buffers grow by a
            quarter at a time.

    Raises:
        ValueError: an argument that does not fit, by name, on every rank.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> cache = sp.SequenceShardedCache(None)
        >>> k, v = torch.randn(2, 1, 8, 2, 16).unbind(0)
        >>> cache.prefill(k, v)
        >>> q = torch.randn(1, 1, 4, 16)
        >>> cache.decode(q, k[:, :1], v[:, :1]).shape
        torch.Size([1, 1, 4, 16])
        >>> cache.get_seq_length()
        9
    """

    def __init__(
        self,
        group: Group = None,
        *,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        capacity: int = 0,
    ):
        self.group = resolve_group(group)
        self.ranks, self.rank = group_size(self.group), group_rank(self.group)
        with checked_together(self.group, step=False):
            _check_heads(num_heads, num_kv_heads, self.ranks)
            if type(capacity) is not int or capacity < 0:
                raise ValueError(f"capacity: expected a number of positions, got {capacity!r}")
        self.num_heads, self.num_kv_heads, self.capacity = num_heads, num_kv_heads, capacity
        self._layers: dict[int, CacheLayer] = {}

    # --- filling -----------------------------------------------------------------------------------------------------

    @not_traced
    def prefill(
        self, k: Tensor, v: Tensor, layer_idx: int = 0, *, layout: str | None = None, seq_len: int | None = None
    ) -> None:
        """Append keys and values of many tokens, whose attention is computed elsewhere.

        Args:
            k: [B, S, Hkv, D], the same on every rank; with ``layout`` [B, S/t, Hkv, D], this rank's rows of them; with
                ``num_heads`` [B, S, heads, D], this rank's heads.
            v: the same with Dv.
            layer_idx: the index of the layer in the model.
            layout: ``"contiguous"`` or ``"zigzag"``: k and v have the rows at :func:`sequence_positions`, and one
                exchange sends them to the ranks that cache them. None: k and v have all rows.
            seq_len: the unsharded length, for a layout where it is not a multiple of the number of ranks.

        Raises:
            ValueError: an argument that does not fit, or wants a gradient, by name, on every rank.
            RuntimeError: ranks that call with unlike sizes or lengths.
        """
        with checked_together(self.group, step=self.group is not None and (layout is not None or self._by_heads)):
            layer = self._layer(layer_idx)
            check_tensor("k", k)
            check_float("k", k)
            if k.dim() != 4:
                raise ValueError(f"k: expected [B, S, Hkv, D], got {tuple(k.shape)}")
            _, k, v, _ = cast_as_autocast(k, k, v, None)
            self._check_new(k, k, v, layer)
            check_no_gradient(k=k, v=v)
            source = self._source(k, layer.length, layout, seq_len)
            added = max(i.stop for held in source.held for i in (*held.rows, Interval(0, 0)))
            self._make_room(layer, added, k, v)
        keys_to_owners(self.group, source, k, v, layer.store)
        layer.length += added

    @not_traced
    def decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer_idx: int = 0,
        *,
        window_size: Sequence[int] = (-1, -1),
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
        attn_bias: Tensor | None = None,
    ) -> Tensor:
        """Append the keys and values of new tokens, and attend from the new tokens over all cached keys, causally.

        Args:
            q: [B, n, Hq, D], n new tokens, the same on every rank; with ``num_heads`` this rank's heads of them. Rotary
                embeddings are in q and k already; the first new token has the position :meth:`get_seq_length`.
            k: [B, n, Hkv, D].
            v: [B, n, Hkv, Dv].
            layer_idx: the index of the layer in the model.
            window_size: as in :func:`decode_attention`; a token sees no later key. Keys outside of all later windows
                stay cached.
            scale: as there.
            softcap: as there.
            sinks: a logit of each head of q.
            attn_bias: as there, over :meth:`get_seq_length` + n keys; heads, where it has them, are all heads.

        Returns:
            Tensor: [B, n, Hq, Dv], with ``num_heads`` this rank's heads.

        Raises:
            ValueError: an argument that does not fit or requires a gradient, by name, on every rank, before anything is
                sent. The cache is unchanged then.
            RuntimeError: ranks that call with unlike sizes or lengths, or no kernel for the device.
        """
        with checked_together(self.group):
            layer = self._layer(layer_idx)
            q, k, v, attn_bias = cast_as_autocast(q, k, v, attn_bias)
            self._check_new(q, k, v, layer, sinks)
            check_no_gradient(q=q, k=k, v=v, sinks=sinks, attn_bias=attn_bias)
            if q.shape[1] != k.shape[1] or q.shape[1] < 1:
                raise ValueError(
                    f"q: expected as many new tokens as k, {k.shape[1]}, one or more, got {tuple(q.shape)}"
                )
            length = layer.length + q.shape[1]
            scalars = decode_scalars(q, length, True, window_size, scale, softcap)
            all_heads = q[:, :, :1].expand(-1, -1, self.num_heads, -1) if self._by_heads and self.num_heads else q
            bias, mask = check_attention_bias(attn_bias, all_heads, length)
            source = self._source(k, layer.length, None, None)
            self._make_room(layer, q.shape[1], k, v)
        queries = keys_to_owners(self.group, source, k, v, layer.store, q)
        keys, values = layer.rows(keys_of(length, self.ranks, self.rank))
        own = self._by_heads
        out, _ = ops.decode_attention(queries, keys, values, sinks, bias, mask, *scalars, own, group_name(self.group))
        layer.length = length
        return out

    # --- what is there -----------------------------------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of cached positions of all ranks together."""
        return self._layers[layer_idx].length if layer_idx in self._layers else 0

    def shard(self, layer_idx: int = 0) -> tuple[Tensor, Tensor]:
        """This rank's keys [B, Sr, Hkv, D] and values [B, Sr, Hkv, Dv], at positions r, r + t ...; views.

        Raises:
            ValueError: nothing is cached for this layer.
        """
        if not self.get_seq_length(layer_idx):
            raise ValueError(f"layer_idx: expected a layer that has keys, got {layer_idx!r}")
        layer = self._layers[layer_idx]
        return layer.rows(keys_of(layer.length, self.ranks, self.rank))

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's buffers, with their unused part."""
        return sum(t.nbytes for layer in self._layers.values() for t in (layer.k, layer.v))

    def crop(self, max_length: int) -> None:
        """Forget all positions after the first ``max_length``; a negative number forgets that many.

        Raises:
            ValueError: not an int.
        """
        with checked_together(self.group, step=False):
            if type(max_length) is not int:
                raise ValueError(f"max_length: expected an int, got {max_length!r}")
        for layer in self._layers.values():
            kept = max(0, layer.length + max_length) if max_length < 0 else max_length
            layer.length = min(layer.length, kept)

    def reset(self) -> None:
        """Forget all positions. The buffers are kept for the next sequence with as many batch entries."""
        self.crop(0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace batch entry i by entry ``beam_idx[i]``, for beam search; the same on every rank.

        Raises:
            ValueError: not integers [B].
        """
        with checked_together(self.group, step=False):
            check_tensor("beam_idx", beam_idx)
            if beam_idx.dim() != 1 or beam_idx.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"beam_idx: expected integers [B], got {beam_idx.dtype} {tuple(beam_idx.shape)}")
        for layer in self._layers.values():
            if layer.length:
                layer.k, layer.v = (t.index_select(0, beam_idx.to(t.device)) for t in (layer.k, layer.v))

    def __repr__(self) -> str:
        heads = f", num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}" if self._by_heads else ""
        lengths = sorted({layer.length for layer in self._layers.values()})
        return f"SequenceShardedCache(ranks={self.ranks}, layers={len(self._layers)}, lengths={lengths}{heads})"

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _by_heads(self) -> bool:
        return self.num_heads is not None and self.group is not None

    def _layer(self, layer_idx: int) -> CacheLayer:
        if type(layer_idx) is not int or layer_idx < 0:
            raise ValueError(f"layer_idx: expected an int, 0 or more, got {layer_idx!r}")
        return self._layers.setdefault(layer_idx, CacheLayer())

    def _make_room(self, layer: CacheLayer, added: int, k: Tensor, v: Tensor) -> None:
        rows = keys_of(max(layer.length + added, self.capacity), self.ranks, 0)  # the same on all ranks
        heads = self.num_kv_heads if self._by_heads and self.num_kv_heads else k.shape[2]
        layer.make_room(rows, keys_of(layer.length, self.ranks, self.rank), heads, k, v)

    def _source(self, k: Tensor, first: int, layout: str | None, seq_len: int | None) -> Source:
        """The parts of the new keys that the ranks have."""
        if layout is None:
            if seq_len is not None:
                raise ValueError(f"seq_len: expected None without a layout, got {seq_len!r}")
            rows: tuple[Intervals, ...] = ((Interval(0, k.shape[1]),),) * self.ranks
        else:
            check_layout(layout)
            if self._by_heads:
                raise ValueError(f"layout: expected None where ranks have heads of their own, got {layout!r}")
            length = shard_of("k", k.shape[1], self.group, seq_len).length
            rows = tuple(rows_of(layout, length, self.ranks, rank) for rank in range(self.ranks))
            assert count(rows[self.rank]) == k.shape[1]
        if self._by_heads and self.num_kv_heads:
            heads = [heads_of(self.num_kv_heads, self.ranks, rank) for rank in range(self.ranks)]
        else:
            heads = [range(k.shape[2])] * self.ranks
        return Source(tuple(map(Held, rows, heads)), self._by_heads, first)

    def _check_new(self, q: Tensor, k: Tensor, v: Tensor, layer: CacheLayer, sinks: Tensor | None = None) -> None:
        """Check that keys and values fit the cached ones; with ``num_heads`` they have this rank's heads."""
        check_attention_tensors(q, k, v, sinks)
        if self.num_heads is not None and self.num_kv_heads is not None:
            for name, t, heads in (("q", q, self.num_heads), ("k", k, self.num_kv_heads)):
                own = len(heads_of(heads, self.ranks, self.rank))
                if t.shape[2] != own and not (name == "q" and q is k):
                    raise ValueError(
                        f"{name}: expected {own} of {heads} heads, those of rank {self.rank} of {self.ranks}, got "
                        f"{tuple(t.shape)}"
                    )
        if not layer.length:
            return
        for name, t, cached in (("k", k, layer.k), ("v", v, layer.v)):
            heads = t.shape[2] if self._by_heads else cached.shape[1]
            expected = (cached.shape[0], heads, cached.shape[3])
            if (t.shape[0], *t.shape[2:]) != expected or t.dtype != cached.dtype or t.device != cached.device:
                raise ValueError(
                    f"{name}: expected [{expected[0]}, n, {expected[1]}, {expected[2]}] {cached.dtype} on "
                    f"{cached.device} like what is cached, got {tuple(t.shape)} {t.dtype} on {t.device}"
                )


def _check_heads(num_heads: int | None, num_kv_heads: int | None, ranks: int) -> None:
    if (num_heads is None) != (num_kv_heads is None):
        raise ValueError(f"num_kv_heads: expected beside num_heads={num_heads!r}, or neither, got {num_kv_heads!r}")
    if num_heads is None or num_kv_heads is None:
        return
    if type(num_heads) is not int or num_heads < 1 or num_heads % ranks:
        raise ValueError(f"num_heads: expected a multiple of the {ranks} ranks of the group, got {num_heads!r}")
    if type(num_kv_heads) is not int or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads!r}")
    if num_kv_heads % ranks and ranks % num_kv_heads:
        raise ValueError(
            f"num_kv_heads: expected a multiple or a divisor of the {ranks} ranks of the group, got {num_kv_heads}"
        )
