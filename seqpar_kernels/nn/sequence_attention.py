"""Attention over a sequence that the ranks of a group share, as a module, with projections or between a model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import (
    attention_choice,
    self_attention_choice,
    sequence_parallel_attention,
    sequence_parallel_self_attention,
    sequence_positions,
)
from ..layout import Group
from ..overlap.attention_choice import Choice
from ..overlap.head_groups import HeadGroups
from ..sequence_layout import check_layout
from .region import Region


class SequenceParallelAttention(nn.Module):
    """:func:`seqpar_kernels.sequence_parallel_attention` between the projections of a model, or with its own.

    With ``embed_dim`` it has projections ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, is called with hidden
    states, and runs :func:`seqpar_kernels.sequence_parallel_self_attention`: groups of heads travel while others are
    projected and attended with. Without, it is called with q, k and v, and holds no parameter but ``sinks``. Dropout
    acts in training only. Gradients of parameters are this rank's part of a sum over the ranks.

    Args:
        group: the ranks that share the sequence: a ProcessGroup, a 1-D DeviceMesh or None.
        embed_dim: features of the hidden states; None: no projections.
        num_heads: of queries, with ``embed_dim``.
        num_kv_heads: of keys and values; None: as many.
        head_dim: features of a head of q and k; None: embed_dim / num_heads.
        value_dim: features of a head of v; None: as many.
        bias: whether the projections have biases.
        rope_theta: the base of a rotary embedding of q and k by position; None: none.
        head_groups: as in :func:`seqpar_kernels.sequence_parallel_self_attention`.
        is_causal: as in :func:`seqpar_kernels.sequence_parallel_attention`.
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
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: an argument that does not fit, by name.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> attention = sp.SequenceParallelAttention(None, is_causal=True, sinks=4)
        >>> q, k, v = torch.randn(3, 1, 8, 4, 16).unbind(0)
        >>> attention(q, k, v).shape
        torch.Size([1, 8, 4, 16])
        >>> attention = sp.SequenceParallelAttention(None, embed_dim=64, num_heads=4, num_kv_heads=2, rope_theta=1e4)
        >>> attention(torch.randn(1, 8, 64)).shape
        torch.Size([1, 8, 64])
    """

    def __init__(
        self,
        group: Group = None,
        *,
        embed_dim: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        value_dim: int | None = None,
        bias: bool = False,
        rope_theta: float | None = None,
        head_groups: int | None = None,
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
        self.embed_dim, self.rope_theta, self.head_groups = embed_dim, rope_theta, head_groups
        self._ran: tuple[tuple[Any, ...], dict[str, Any]] | None = None  # shapes and options of the last forward
        if embed_dim is None:
            given = (num_heads, num_kv_heads, head_dim, value_dim, rope_theta, head_groups)
            if any(value is not None for value in given) or bias:
                raise ValueError(
                    "embed_dim: expected an int where num_heads, num_kv_heads, head_dim, value_dim, bias, rope_theta "
                    "or head_groups is given, got None"
                )
            return
        if type(num_heads) is not int or num_heads < 1:
            raise ValueError(f"num_heads: expected a positive int with embed_dim, got {num_heads!r}")
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}; or give head_dim"
            )
        self.num_heads, self.num_kv_heads = num_heads, num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}")
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        if rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"rope_theta: expected None for heads of an odd number of features, {self.head_dim}")
        made: Any = dict(bias=bias, device=device, dtype=dtype)
        self.q_proj = nn.Linear(embed_dim, num_heads * self.head_dim, **made)
        self.k_proj = nn.Linear(embed_dim, self.num_kv_heads * self.head_dim, **made)
        self.v_proj = nn.Linear(embed_dim, self.num_kv_heads * self.value_dim, **made)
        self.o_proj = nn.Linear(num_heads * self.value_dim, embed_dim, **made)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        *,
        attn_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seq_len: int | None = None,
        kv_seq_len: int | None = None,
        return_lse: bool = False,
        seed: int | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, S/t, Hq, D], [B, S/t, Hkv, D], [B, S/t, Hkv, Dv] -> [B, S/t, Hq, Dv]; arguments as in the function.

        With projections: ``q`` alone, the hidden states, [B, S/t, E] -> [B, S/t, E].
        """
        plan: dict[str, Any] = dict(
            group=self.region.group,
            is_causal=self.is_causal,
            window_size=self.window_size,
            seq_len=seq_len,
            layout=self.layout,
            engine=self.engine,
            ulysses_degree=self.ulysses_degree,
            ring_degree=self.ring_degree,
            save_kv=self.save_kv,
        )
        options: dict[str, Any] = dict(
            plan,
            dropout_p=self.dropout_p if self.training else 0.0,
            scale=self.scale,
            softcap=self.softcap,
            sinks=self.sinks,
            attn_bias=attn_bias,
            cu_seqlens=cu_seqlens,
            seed=seed,
        )
        if (self.embed_dim is None) != (k is not None and v is not None):
            wanted = "q, k and v: it has no projections" if self.embed_dim is None else "the hidden states alone"
            raise ValueError(f"k, v: SequenceParallelAttention expected {wanted}")
        tensors = (q,) if k is None or v is None else (q, k, v)
        if not torch.compiler.is_compiling():
            shown = dict(plan, kv_seq_len=kv_seq_len, bias=attn_bias is not None)
            del shown["group"]  # it cannot be copied with the module
            self._ran = tuple((t.shape, t.dtype) for t in tensors), shown
        if k is not None and v is not None:
            return sequence_parallel_attention(q, k, v, kv_seq_len=kv_seq_len, return_lse=return_lse, **options)
        if return_lse or kv_seq_len is not None:
            raise ValueError("return_lse, kv_seq_len: expected neither with projections")
        four = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        q_weight, k_weight, v_weight, out_weight = (p.weight for p in four)
        return sequence_parallel_self_attention(
            q,
            q_weight,
            k_weight,
            v_weight,
            out_weight,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            rotary=self._rotary(q, seq_len),
            head_groups=self.head_groups,
            q_bias=self.q_proj.bias,
            k_bias=self.k_proj.bias,
            v_bias=self.v_proj.bias,
            out_bias=self.o_proj.bias,
            **options,
        )

    def _rotary(self, x: Tensor, seq_len: int | None) -> tuple[Tensor, Tensor] | None:
        """cos and sin of this rank's positions, [S/t, D]."""
        if self.rope_theta is None:
            return None
        length = x.shape[1] * self.region.ranks if seq_len is None else seq_len
        positions = sequence_positions(length, self.region.group, self.layout).to(x.device)
        exponent = torch.arange(0, self.head_dim, 2, device=x.device, dtype=torch.float64) / self.head_dim
        angles = (positions[:, None] * self.rope_theta**-exponent).repeat(1, 2)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return angles.cos().to(wide), angles.sin().to(wide)

    def planned(self) -> tuple[Choice, HeadGroups | None] | None:
        """How the last forward ran, None before it; the second is None where heads did not go in groups."""
        if self._ran is None:
            return None
        (shapes, options), device = self._ran, "meta"
        has_bias, kv_seq_len = options["bias"], options["kv_seq_len"]
        asked: dict[str, Any] = {n: value for n, value in options.items() if n not in ("bias", "kv_seq_len")}
        asked["group"] = self.region.group
        if len(shapes) == 3:
            q, k, v = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in shapes)
            return attention_choice(q, k, v, kv_seq_len=kv_seq_len, **asked), None
        (shape, dtype) = shapes[0]
        x = torch.empty(1, dtype=dtype, device=self.q_proj.weight.device).expand(shape)
        return self_attention_choice(
            x,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            head_groups=self.head_groups,
            has_attn_bias=has_bias,
            **asked,
        )

    def extra_repr(self) -> str:
        shown = f"ranks={self.region.ranks}, is_causal={self.is_causal}, layout={self.layout!r}"
        shown += f", engine={self.engine!r}"
        if self.embed_dim is not None:
            shown += f", num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}"
        if self.rope_theta is not None:
            shown += f", rope_theta={self.rope_theta}"
        if self.window_size != (-1, -1):
            shown += f", window_size={self.window_size}"
        if self.dropout_p:
            shown += f", dropout_p={self.dropout_p}"
        return shown
