"""A transformer layer on a sequence shard that keeps little for its backward. Every fusion is an argument."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_divides, check_eps, check_probability, check_tensor, renamed
from ..functional import (
    NormOptions,
    NormTensors,
    causal_attention,
    checked_all_gather_linear,
    checked_linear_norm,
    checked_linear_reduce_scatter,
    dropout_add,
    replicated,
)
from ..kernels import NormKind
from ..layout import Group
from ..ops import ACTIVATIONS, activate
from .linear import ColumnParallelLinear, RowParallelLinear
from .norm import LayerNorm, RMSNorm
from .region import Region

FUSIONS = ("share_gather", "fuse_dropout_add_norm", "fuse_reduce_norm", "recompute_norm", "recompute_activation")
Vectors = Sequence[Tensor | None]


class TransformerLayer(nn.Module):
    """A pre-norm decoder layer with causal attention, on the shard [..., S/t, ..., H] of the residual stream.

    ``x = x + dropout(attention(norm(x))); x = x + dropout(mlp(norm(x)))``. The defaults are GPT's (LayerNorm, biases,
    GELU); :meth:`llama` sets Llama's (RMSNorm, no biases, SwiGLU, rotary positions, grouped key and value heads).

    With every fusion on, a GPT layer keeps 20 sbh/t bytes for its backward at 16 bit, beside the norms' statistics, the
    attention's logsumexp and the dropout seeds: x 2, q k v 6, attention's result 2, the stream behind it 2, the MLP's
    pre-activation 8. The layer of Korthikanti et al. 2022 (arXiv 2205.05198) keeps 34.

    Args:
        hidden_size: H.
        num_heads: attention heads of all ranks together; a multiple of t.
        num_kv_heads: heads of keys and values; divides ``num_heads``, a multiple of t. Default: ``num_heads``.
        intermediate_size: features inside the MLP, a multiple of t. Default: 4 H.
        norm: "layer" or "rms".
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        gated: the MLP is ``down(activation(gate(y)) * up(y))``.
        bias: biases of the linears and of LayerNorm.
        rope_theta: rotary position embedding with this base; None for none. ``rotary_base`` is its old name.
        dropout: dropout probability of the results of attention and MLP.
        attention_dropout: dropout probability of the attention weights. Neither mask depends on the number of ranks.
        eps: epsilon of the norms.
        group, seq_dim: the ranks over which the sequence, the heads and the MLP's features are split.
        chunks, engine: of the matmuls with their collectives, see :func:`seqpar_kernels.all_gather_linear`.
        share_gather: one all-gather feeds q, k and v, another the gate and up projections.
        fuse_dropout_add_norm: dropout, residual add and the second norm are one kernel.
        fuse_reduce_norm: that kernel also sums the ranks' partial results, and so does the kernel after the MLP
            (:func:`seqpar_kernels.linear_reduce_scatter_dropout_add_norm`); includes the fusion above.
        recompute_norm: the backward recomputes norm results from the residual stream.
        recompute_activation: the backward recomputes the activation.

    The fusions change memory and time, not the numbers.

    Raises:
        ValueError: an argument that does not fit, by name.

    Examples:
        >>> import torch, seqpar_kernels as sp
        >>> layer = sp.TransformerLayer.llama(16, num_heads=4, num_kv_heads=2, intermediate_size=32)
        >>> layer(torch.randn(2, 8, 16)).shape
        torch.Size([2, 8, 16])
    """

    @renamed(rotary_base="rope_theta")
    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        intermediate_size: int | None = None,
        norm: str = "layer",
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        rope_theta: float | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        group: Group = None,
        seq_dim: int = -2,
        chunks: int | None = None,
        engine: str = "auto",
        share_gather: bool = True,
        fuse_dropout_add_norm: bool = True,
        fuse_reduce_norm: bool = True,
        recompute_norm: bool = True,
        recompute_activation: bool = True,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if intermediate_size is None and isinstance(hidden_size, int):
            intermediate_size = 4 * hidden_size
        sizes = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "intermediate_size": intermediate_size,
        }
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected a positive int, got {size!r}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size: expected a multiple of num_heads={num_heads}, got {hidden_size}")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}")
        if norm not in ("layer", "rms"):
            raise ValueError(f"norm: expected 'layer' or 'rms', got {norm!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {ACTIVATIONS}, got {activation!r}")
        check_probability("dropout", dropout)
        check_probability("attention_dropout", attention_dropout)
        check_eps(eps)
        self.region = Region(group, seq_dim)
        ranks = self.region.ranks
        check_divides("num_heads", num_heads, ranks, "the number of heads")
        check_divides("num_kv_heads", num_kv_heads, ranks, "the number of key and value heads")
        self.head_dim = hidden_size // num_heads
        if rope_theta is not None:
            if not isinstance(rope_theta, (int, float)) or rope_theta <= 0:
                raise ValueError(f"rope_theta: expected a positive number or None, got {rope_theta!r}")
            if self.head_dim % 2:
                raise ValueError(f"rope_theta: expected None with heads of an odd size, {self.head_dim}")
        # from_torch builds the same layer on other ranks from these arguments.
        self.config: dict[str, Any] = {
            **sizes,
            "norm": norm,
            "activation": activation,
            "gated": gated,
            "bias": bias,
            "rope_theta": rope_theta,
            "dropout": dropout,
            "attention_dropout": attention_dropout,
            "eps": eps,
            "chunks": chunks,
            "engine": engine,
            "share_gather": share_gather,
            "fuse_dropout_add_norm": fuse_dropout_add_norm,
            "fuse_reduce_norm": fuse_reduce_norm,
            "recompute_norm": recompute_norm,
            "recompute_activation": recompute_activation,
        }
        self.activation, self.rope_theta = activation, rope_theta
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.chunks, self.engine = chunks, engine
        self.share_gather, self.fuse_reduce_norm = share_gather, fuse_reduce_norm
        self.fuse_dropout_add_norm = fuse_dropout_add_norm
        self.recompute_norm, self.recompute_activation = recompute_norm, recompute_activation
        place: dict[str, Any] = {"device": device, "dtype": dtype, "group": group, "seq_dim": seq_dim}
        kv_size = self.head_dim * num_kv_heads
        self.norm1 = _make_norm(norm, hidden_size, eps, bias, place)
        self.q_proj = ColumnParallelLinear(hidden_size, hidden_size, bias, **place)
        self.k_proj = ColumnParallelLinear(hidden_size, kv_size, bias, **place)
        self.v_proj = ColumnParallelLinear(hidden_size, kv_size, bias, **place)
        self.out_proj = RowParallelLinear(hidden_size, hidden_size, bias, **place)
        self.norm2 = _make_norm(norm, hidden_size, eps, bias, place)
        assert intermediate_size is not None
        self.gate_proj = ColumnParallelLinear(hidden_size, intermediate_size, bias, **place) if gated else None
        self.up_proj = ColumnParallelLinear(hidden_size, intermediate_size, bias, **place)
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias, **place)

    @classmethod
    @renamed(rotary_base="rope_theta")
    def llama(cls, hidden_size: int, num_heads: int, **options: Any) -> TransformerLayer:
        """Llama's layer: RMSNorm, SwiGLU, rotary positions, no biases; ``options`` as of the constructor."""
        llama: dict[str, Any] = {
            "norm": "rms",
            "activation": "silu",
            "gated": True,
            "bias": False,
            "rope_theta": 10000.0,
        }
        return cls(hidden_size, num_heads, **{**llama, **options})

    @classmethod
    def from_torch(cls, module: TransformerLayer, group: Group = None, *, seq_dim: int = -2) -> TransformerLayer:
        """This rank's part of a layer that was made for one rank; with one rank it keeps the same parameters.

        Raises:
            ValueError: no TransformerLayer, or one that is split over ranks already.
        """
        if not isinstance(module, TransformerLayer):
            raise ValueError(f"module: expected a seqpar_kernels.nn.TransformerLayer, got {type(module).__name__}")
        if module.region.ranks > 1:
            raise ValueError(f"module: expected a layer on one rank, got one divided over {module.region.ranks}")
        new = cls(**module.config, device="meta", group=group, seq_dim=seq_dim)
        for name, part in module.named_children():
            setattr(new, name, type(part).from_torch(part, group, seq_dim=seq_dim))  # type: ignore[attr-defined]
        return new.train(module.training)

    def forward(self, x: Tensor, *, seq_len: int | None = None) -> Tensor:
        """Run the layer on the residual stream.

        Args:
            x: [..., S/t, ..., H].
            seq_len: S; needed only where it is not a multiple of the number of ranks.

        Returns:
            Tensor: like ``x``.
        """
        check_tensor("x", x)
        first, second, biases = self._replicated()
        y = self.norm1._run(x, None, 0.0, False, seq_len, vectors=first)
        q, k, v = self._column([self.q_proj, self.k_proj, self.v_proj], y, self.norm1, x, seq_len)
        attended = causal_attention(
            q,
            k,
            v,
            head_dim=self.head_dim,
            p=self.attention_dropout,
            training=self.training,
            rope_theta=self.rope_theta,
            group=self.region.group,
            seq_dim=self.region.seq_dim,
        )
        seq_len = q.shape[self.region.seq_dim]
        if self.fuse_reduce_norm:
            y, z = self._row_add_norm(self.out_proj, attended, biases[0], x, self.norm2, second)
        else:
            branch = self._row(self.out_proj, attended)
            if self.fuse_dropout_add_norm:
                y, z = self.norm2._run(branch, x, self.dropout, True, seq_len, vectors=second)
            else:
                z = self._add(branch, x, seq_len)
                y = self.norm2._run(z, None, 0.0, False, seq_len, vectors=second)
        linears = [self.up_proj] if self.gate_proj is None else [self.up_proj, self.gate_proj]
        up, *gates = self._column(linears, y, self.norm2, z, seq_len)  # [..., S, ..., F/t]
        gate = gates[0] if gates else None
        activation: str | None = self.activation
        if not self.recompute_activation:
            up, gate, activation = activate(up, gate, self.activation), None, None
        if self.fuse_reduce_norm:
            return self._row_add_norm(self.down_proj, up, biases[1], z, None, (None, None), activation, gate)[1]
        return self._add(self._row(self.down_proj, up, activation, gate), z, seq_len)

    def _replicated(self) -> tuple[Vectors, Vectors, Vectors]:
        """Weight and bias of either norm, and the row-parallel biases where the norm's kernel adds them.

        Their gradients are summed over the ranks in one exchange.
        """
        vectors = [vector for norm in (self.norm1, self.norm2) for vector in (norm.weight, getattr(norm, "bias", None))]
        if self.fuse_reduce_norm:
            vectors += [self.out_proj.bias, self.down_proj.bias]
        if self.region.group is not None:
            vectors = replicated(vectors, self.region.group)
        return vectors[:2], vectors[2:4], vectors[4:]

    def _column(
        self,
        linears: list[ColumnParallelLinear],
        y: Tensor,
        norm: LayerNorm | RMSNorm,
        z: Tensor,
        seq_len: int | None,
    ) -> list[Tensor]:
        """Linears fed by y = norm(z). [..., S, ..., N/t] each"""
        recipe = norm.recipe(z) if self.recompute_norm else None
        group, seq_dim = self.region.group, self.region.seq_dim
        outs: list[Tensor] = []
        for together in [linears] if self.share_gather else [[linear] for linear in linears]:
            weights, biases = zip(*(linear.operands() for linear in together), strict=True)
            main_grads = [linear._main_grad() for linear in together]
            save = any(linear.save_gathered for linear in together)
            options = (group, seq_dim, self.chunks, self.engine, seq_len)
            call, operands = checked_all_gather_linear(y, weights, biases, *options, main_grads, save, recipe)
            outs += call(*operands)
            for linear in together:
                linear.ran = call.plan
        return outs

    def _row(
        self, linear: RowParallelLinear, x: Tensor, activation: str | None = None, gate: Tensor | None = None
    ) -> Tensor:
        """[..., S, ..., K/t] -> [..., S/t, ..., H]"""
        group, seq_dim = self.region.group, self.region.seq_dim
        options = (group, seq_dim, self.chunks, self.engine)
        call, operands = checked_linear_reduce_scatter(
            x, linear._linear_weight(), linear.bias, *options, activation, gate, linear._main_grad()
        )
        linear.ran = call.plan
        out: Tensor = call(*operands)
        return out

    def _row_add_norm(
        self,
        linear: RowParallelLinear,
        x: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        norm: LayerNorm | RMSNorm | None,
        vectors: Vectors,
        activation: str | None = None,
        gate: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        """[..., S, ..., K/t] -> the norm (None without one) and the stream, [..., S/t, ..., H] each."""
        kind = NormKind.NONE if norm is None else norm.kind
        call, operands = checked_linear_norm(
            NormTensors(x, residual, vectors[0], vectors[1], x_bias=bias),
            linear._linear_weight(),
            NormOptions(kind, self.dropout, self.config["eps"], self.training, seq_dim=self.region.seq_dim),
            self.region.group,
            None,
            self.chunks,
            self.engine,
            activation,
            gate,
            linear._main_grad(),
            sum_gradients=False,
        )
        linear.ran = call.plan
        return call(*operands)

    def _add(self, branch: Tensor, z: Tensor, seq_len: int) -> Tensor:
        region = self.region
        return dropout_add(
            branch,
            z,
            p=self.dropout,
            training=self.training,
            group=region.group,
            seq_dim=region.seq_dim,
            seq_len=seq_len,
        )

    @property
    def head_size(self) -> int:
        """The old name of ``head_dim``."""
        return self.head_dim

    @property
    def rotary_base(self) -> float | None:
        """The old name of ``rope_theta``."""
        return self.rope_theta

    def extra_repr(self) -> str:
        off = [name for name in FUSIONS if not getattr(self, name)]
        return f"dropout={self.dropout}, {self.region!r}" + (f", without {', '.join(off)}" if off else "")


def _make_norm(norm: str, size: int, eps: float, bias: bool, place: dict[str, Any]) -> LayerNorm | RMSNorm:
    if norm == "layer":
        return LayerNorm(size, eps, bias=bias, **place)
    return RMSNorm(size, eps, **place)
