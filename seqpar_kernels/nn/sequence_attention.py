"""Attention over a sequence that the ranks of a group share, as a module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..functional import sequence_parallel_attention
from ..layout import Group
from ..sequence_layout import check_layout
from .region import Region


class SequenceParallelAttention(nn.Module):
    """:func:`seqpar_kernels.sequence_parallel_attention` between the projections of a model.

    It holds no parameter but ``sinks``, where these are asked for. Dropout acts in training only.

    Args:
        group: the ranks that share the sequence: a ProcessGroup, a 1-D DeviceMesh or None.
        is_causal: as there.
        window_size: as there.
        dropout_p: as there, in training; none in evaluation.
        scale: as there.
        softcap: as there.
        sinks: number of query heads that have a sink, all of them: makes the parameter ``sinks``, zeros at first.
        layout: as there.
        engine: as there.
        ulysses_degree: as there.
        ring_degree: as there.
        save_kv: as there.
        device: of the parameter.
        dtype: of the parameter.

    Raises:
        ValueError: an argument that does not fit, by name.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> attention = sp.SequenceParallelAttention(None, is_causal=True, sinks=4)
        >>> q, k, v = torch.randn(3, 1, 8, 4, 16).unbind(0)
        >>> attention(q, k, v).shape
        torch.Size([1, 8, 4, 16])
    """

    def __init__(
        self,
        group: Group = None,
        *,
        is_causal: bool = False,
        window_size: Sequence[int] = (-1, -1),
        dropout_p: float = 0.0,
        scale: float | None = None,
        softcap: float = 0.0,
        sinks: int | None = None,
        layout: str = "contiguous",
        engine: str = "auto",
        ulysses_degree: int | None = None,
        ring_degree: int | None = None,
        save_kv: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_layout(layout)
        if sinks is not None and (type(sinks) is not int or sinks < 1):
            raise ValueError(f"sinks: expected the number of query heads or None, got {sinks!r}")
        self.region = Region(group)
        self.is_causal, self.window_size, self.dropout_p = is_causal, tuple(window_size), dropout_p
        self.scale, self.softcap, self.layout, self.engine = scale, softcap, layout, engine
        self.ulysses_degree, self.ring_degree, self.save_kv = ulysses_degree, ring_degree, save_kv
        self.sinks = None if sinks is None else nn.Parameter(torch.zeros(sinks, device=device, dtype=dtype))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attn_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_len: int | None = None,
        kv_seq_len: int | None = None,
        return_lse: bool = False,
        seed: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, S/t, Hq, D], [B, S/t, Hkv, D], [B, S/t, Hkv, Dv] -> [B, S/t, Hq, Dv]; arguments as in the function."""
        return sequence_parallel_attention(
            q,
            k,
            v,
            group=self.region.group,
            is_causal=self.is_causal,
            window_size=self.window_size,
            dropout_p=self.dropout_p if self.training else 0.0,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            attn_bias=attn_bias,
            cu_seqlens=cu_seqlens,
            seq_len=seq_len,
            kv_seq_len=kv_seq_len,
            layout=self.layout,
            engine=self.engine,
            ulysses_degree=self.ulysses_degree,
            ring_degree=self.ring_degree,
            save_kv=self.save_kv,
            return_lse=return_lse,
            seed=seed,
        )

    def extra_repr(self) -> str:
        shown = f"ranks={self.region.ranks}, is_causal={self.is_causal}, layout={self.layout!r}"
        shown += f", engine={self.engine!r}"
        if self.window_size != (-1, -1):
            shown += f", window_size={self.window_size}"
        if self.dropout_p:
            shown += f", dropout_p={self.dropout_p}"
        return shown
