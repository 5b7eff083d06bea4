"""TransformerLayer on gloo ranks against a plain torch layer on whole tensors: outputs, every gradient, bytes kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import RowMap
from seqpar_kernels.kernels.reference import dropout_mask
from seqpar_kernels.nn import local_part
from seqpar_kernels.nn.transformer import FUSIONS
from seqpar_kernels.random import draw_seed

from ..oracle import assert_within_budget
from ..world import World

H, HEADS, SEED = 32, 4, 11
FLAVOURS: dict[str, dict[str, Any]] = {
    "gpt": {"dropout": 0.2, "attention_dropout": 0.1, "activation": "gelu_tanh", "intermediate_size": 40},
    "llama": {"num_kv_heads": 4, "intermediate_size": 24},
    "grouped": {"num_heads": 8, "num_kv_heads": 4, "intermediate_size": 24, "dropout": 0.1, "attention_dropout": 0.2},
}


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def build(flavour: str, **options: Any) -> sp.TransformerLayer:
    """A layer on one rank, no parameter at its initial value."""
    given = {"num_heads": HEADS, **FLAVOURS[flavour], **options}
    make = sp.TransformerLayer if flavour == "gpt" else sp.TransformerLayer.llama
    torch.manual_seed(5)
    layer = make(H, **given)
    for name, param in layer.named_parameters():
        if "norm" in name or name.endswith("bias"):
            with torch.no_grad():
                param.add_(torch.randn_like(param) / 4)
    return layer


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Dropout of [..., columns], row by row in memory order."""
    flat = x.reshape(-1, x.shape[-1])
    keep = dropout_mask(flat.shape[0], flat.shape[1], p, seed, RowMap(flat.shape[0], 0, 0)).view(x.shape)
    return torch.where(keep, x / (1 - p), 0)


def rotated(x: Tensor, base: float) -> Tensor:
    """[B, heads, S, d]"""
    length, size = x.shape[2], x.shape[3]
    inverse = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angles = (torch.arange(length, dtype=torch.float64)[:, None] * inverse).repeat(1, 2)
    turned = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return (wide * angles.cos().to(wide.dtype) + turned * angles.sin().to(wide.dtype)).to(x.dtype)


def plain_layer(params: dict[str, Tensor], x: Tensor, config: dict[str, Any], seq_dim: int, ranks: int) -> Tensor:
    """The layer on whole tensors in plain torch; a row-parallel linear rounds each rank's part, as it must."""
    seeds = []
    torch.manual_seed(SEED)
    for p in (config["attention_dropout"], config["dropout"], config["dropout"]):
        seeds.append(draw_seed(x.device) if p else torch.zeros((), dtype=torch.int64))

    def norm(z: Tensor, name: str) -> Tensor:
        weight = params[f"{name}.weight"]
        if config["norm"] == "rms":
            return F.rms_norm(z, weight.shape, weight, config["eps"])
        return F.layer_norm(z, weight.shape, weight, params.get(f"{name}.bias"), config["eps"])

    def column(y: Tensor, name: str) -> Tensor:
        return F.linear(y, params[f"{name}.weight"], params.get(f"{name}.bias"))

    def row(y: Tensor, name: str) -> Tensor:
        weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
        wide = torch.promote_types(y.dtype, torch.float32)
        pairs = zip(y.chunk(ranks, -1), weight.chunk(ranks, 1), strict=True)
        total = sum(F.linear(a, w).to(wide) for a, w in pairs)
        return (total if bias is None else total + bias).to(y.dtype)  # type: ignore[return-value, union-attr]

    def heads(t: Tensor, count: int) -> Tensor:
        t = t.unflatten(-1, (count, -1))  # [B, S, heads, d] or [S, B, heads, d]
        return t.permute(1, 2, 0, 3) if seq_dim == 0 else t.transpose(1, 2)

    y = norm(x, "norm1")
    q = heads(column(y, "q_proj"), config["num_heads"])
    k, v = (heads(column(y, name), config["num_kv_heads"]) for name in ("k_proj", "v_proj"))
    if config["rope_theta"] is not None:
        q, k = (rotated(t, config["rope_theta"]) for t in (q, k))
    wide = torch.promote_types(x.dtype, torch.float32)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.to(wide) @ k.to(wide).transpose(2, 3) / math.sqrt(q.shape[3])
    ahead = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -math.inf).softmax(-1)
    out = (drop(weights, config["attention_dropout"], seeds[0]) @ v.to(wide)).to(x.dtype)
    out = (out.permute(2, 0, 1, 3) if seq_dim == 0 else out.transpose(1, 2)).flatten(2)
    z = x + drop(row(out, "out_proj"), config["dropout"], seeds[1])
    y = norm(z, "norm2")
    act = {
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "gelu": F.gelu,
        "silu": F.silu,
        "relu": F.relu,
    }[config["activation"]]
    up = column(y, "up_proj")
    hidden = act(column(y, "gate_proj")) * up if config["gated"] else act(up)
    return z + drop(row(hidden, "down_proj"), config["dropout"], seeds[2])


def plain_run(
    layer: sp.TransformerLayer, x: Tensor, dy: Tensor, dtype: torch.dtype, seq_dim: int, ranks: int
) -> dict[str, Tensor]:
    """Output and all gradients on whole tensors."""
    params = {name: p.detach().to(dtype).requires_grad_() for name, p in layer.named_parameters()}
    x = x.to(dtype).requires_grad_()
    y = plain_layer(params, x, layer.config, seq_dim, ranks)
    grads = torch.autograd.grad(y, [x, *params.values()], dy.to(dtype))
    return {"y": y.detach(), "dx": grads[0], **dict(zip(params, grads[1:], strict=True))}


def our_run(layer: sp.TransformerLayer, x: Tensor, dy: Tensor, seq_len: int | None = None) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(SEED)
    y = layer(x, seq_len=seq_len)
    names, params = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, [x, *params], dy)
    return {"y": y.detach(), "dx": grads[0], **dict(zip(names, grads[1:], strict=True))}


def whole_inputs(length: int, seq_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (length, 2, H) if seq_dim == 0 else (2, length, H)
    torch.manual_seed(6)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def cut(layer: sp.TransformerLayer, whole: dict[str, Tensor], seq_dim: int) -> dict[str, Tensor]:
    """What of the whole output and gradients this rank has."""
    g = group()
    found = {}
    for name, tensor in whole.items():
        if name in ("y", "dx"):
            found[name] = tensor.tensor_split(g.size(), seq_dim)[g.rank()]
            continue
        module, _, leaf = name.rpartition(".")
        spec = getattr(layer.get_submodule(module), "sharded", {}).get(leaf)
        found[name] = tensor if spec is None else local_part(tensor, spec, g)
    return found


def layer_case(flavour: str, dtype: torch.dtype, length: int, seq_dim: int, off: tuple[str, ...]) -> None:
    g = group()
    t, rank = g.size(), g.rank()
    whole = build(flavour, **dict.fromkeys(off, False)).to(dtype)
    layer = sp.TransformerLayer.from_torch(whole, g, seq_dim=seq_dim)
    assert all(p.numel() * t == whole.get_parameter(n).numel() for n, p in layer.named_parameters() if "up_proj" in n)
    x, dy = whole_inputs(length, seq_dim, dtype)
    shards = (full.tensor_split(t, seq_dim)[rank] for full in (x, dy))
    got = our_run(layer, *shards, seq_len=length if length % t else None)
    oracle = cut(layer, plain_run(whole, x, dy, torch.float64, seq_dim, t), seq_dim)
    if dtype == torch.float64:
        torch.testing.assert_close(got, oracle)
        return
    reference = cut(layer, plain_run(whole, x, dy, dtype, seq_dim, t), seq_dim)
    for name, value in got.items():
        assert_within_budget(value, reference[name], oracle[name], name)


@pytest.mark.parametrize("off", [(), FUSIONS, *((name,) for name in FUSIONS)], ids=lambda off: "-".join(off) or "all")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_is_the_unsharded_layer_whatever_is_fused(world2: World, flavour: str, off: tuple[str, ...]) -> None:
    world2.run(layer_case, flavour, torch.float64, 6, 1, off)


@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_uneven_sequences_in_both_layouts(world: World, flavour: str, seq_dim: int) -> None:
    world.run(layer_case, flavour, torch.float64, 7, seq_dim, ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_error_is_within_budget(world2: World, flavour: str, dtype: torch.dtype) -> None:
    world2.run(layer_case, flavour, dtype, 16, 1, ())


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_one_rank_is_the_same_layer(flavour: str) -> None:
    whole = build(flavour).double()
    layer = sp.TransformerLayer.from_torch(whole)
    assert layer.q_proj.weight is whole.q_proj.weight and layer.norm1.weight is whole.norm1.weight
    x, dy = whole_inputs(5, 1, torch.float64)
    torch.testing.assert_close(our_run(layer, x, dy), plain_run(whole, x, dy, torch.float64, 1, 1))
    layer.eval()
    calm = build(flavour, dropout=0.0, attention_dropout=0.0).double()
    torch.testing.assert_close(layer(x), calm(x))


def kept(layer: sp.TransformerLayer, x: Tensor) -> int:
    return sp.activation_bytes(layer, x).total


def bytes_case(seq_dim: int) -> None:
    """Bytes a rank keeps at 16 bit, less the logsumexp, the statistics, the norms' vectors in fp32 and the seeds."""
    g = group()
    t, s, b, h, heads = g.size(), 32, 2, 64, 4
    shape = (s // t, b, h) if seq_dim == 0 else (b, s // t, h)
    x = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True)
    unit = s * b * h // t
    small = 4 * s * b * heads // t + 2 * 2 * 4 * s * b // t + 2 * 2 * 4 * h + 2 * 8
    options = {"dropout": 0.1, "dtype": torch.bfloat16, "group": g, "seq_dim": seq_dim}
    assert kept(sp.TransformerLayer(h, heads, **options), x) - small <= 20 * unit
    more = {"recompute_norm": 4, "recompute_activation": 8}
    for name in FUSIONS:
        got = kept(sp.TransformerLayer(h, heads, **options, **{name: False}), x) - small
        assert got == (20 + more.get(name, 0)) * unit, name
    wide = 96  # 2 + 6 + 2 + 2, and two tensors of 1.5 h each
    llama = sp.TransformerLayer.llama(h, heads, intermediate_size=wide, **options)
    assert kept(llama, x) - small <= (12 + 2 * 2 * wide / h) * unit
    # With dropout on the attention weights nothing of the size of the scores is kept, nor the attention's result twice.
    dropping = sp.TransformerLayer(h, heads, attention_dropout=0.1, **options)
    assert kept(dropping, x) <= 20 * unit + small


@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
def test_a_gpt_layer_keeps_20_sbh_over_t(world2: World, seq_dim: int) -> None:
    world2.run(bytes_case, seq_dim)


def compile_case(flavour: str) -> None:
    for g in (group(), None):
        layer = sp.TransformerLayer.from_torch(build(flavour), g)
        x, dy = torch.randn(2, 3, H), torch.randn(2, 3, H)
        expected = our_run(layer, x, dy)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        names = [name.removeprefix("_orig_mod.") for name, _ in compiled.named_parameters()]
        assert names == [name for name, _ in layer.named_parameters()]
        got = {name.removeprefix("_orig_mod."): grad for name, grad in our_run(compiled, x, dy).items()}
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("flavour", ["gpt", "grouped"])
def test_compiles_without_graph_breaks(world2: World, flavour: str) -> None:
    world2.run(compile_case, flavour)


def state_case() -> None:
    g = group()
    first = sp.TransformerLayer.from_torch(build("grouped"), g)
    torch.manual_seed(100)
    second = sp.TransformerLayer.llama(H, **FLAVOURS["grouped"], group=g)
    x = torch.randn(1, 3, H)
    first.eval(), second.eval()
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))
    torch.manual_seed(3)
    whole = sp.TransformerLayer(H, HEADS)
    torch.manual_seed(3)
    born_divided = sp.TransformerLayer(H, HEADS, group=g)
    divided = sp.TransformerLayer.from_torch(whole, g)
    for name, param in born_divided.named_parameters():
        assert torch.equal(param, divided.get_parameter(name)), name
    with pytest.raises(ValueError, match="got one divided over 2"):
        sp.TransformerLayer.from_torch(divided)


def test_state_dict_and_initialisation(world2: World) -> None:
    world2.run(state_case)
    gpt = set(sp.TransformerLayer(8, 2).state_dict())
    linears = ("q_proj", "k_proj", "v_proj", "out_proj", "up_proj", "down_proj")
    assert gpt == {f"{name}.{leaf}" for name in ("norm1", "norm2", *linears) for leaf in ("weight", "bias")}
    llama = set(sp.TransformerLayer.llama(8, 2).state_dict())
    assert llama == {f"{name}.weight" for name in ("norm1", "norm2", *linears, "gate_proj")}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sp.TransformerLayer(30, 4), "hidden_size: expected a multiple of num_heads=4, got 30"),
        (lambda: sp.TransformerLayer(32, 0), "num_heads: expected a positive int, got 0"),
        (lambda: sp.TransformerLayer(32, 4, num_kv_heads=3), "num_kv_heads: expected a divisor of num_heads=4, got 3"),
        (lambda: sp.TransformerLayer(32, 4, intermediate_size=1.5), "intermediate_size: expected a positive int"),
        (lambda: sp.TransformerLayer("32", 4), "hidden_size: expected a positive int, got '32'"),
        (lambda: sp.TransformerLayer(32, 4, norm="batch"), "norm: expected 'layer' or 'rms', got 'batch'"),
        (lambda: sp.TransformerLayer(32, 4, activation="tanh"), "activation: expected one of"),
        (lambda: sp.TransformerLayer(32, 4, dropout=2), "dropout: expected a probability"),
        (lambda: sp.TransformerLayer(32, 4, attention_dropout=-1), "attention_dropout: expected a probability"),
        (lambda: sp.TransformerLayer(32, 4, eps=0), "eps: expected a positive"),
        (lambda: sp.TransformerLayer(32, 4, rope_theta=0), "rope_theta: expected a positive number or None"),
        (lambda: sp.TransformerLayer(12, 4, rope_theta=1e4), "rope_theta: expected None with heads of an odd size"),
        (lambda: sp.TransformerLayer.from_torch(torch.nn.Linear(2, 2)), "module: expected a seqpar_kernels.nn.Trans"),
        (lambda: sp.TransformerLayer(32, 4)(None), "x: expected a tensor, got NoneType"),
        (lambda: sp.TransformerLayer(32, 4)(torch.ones(1, 2, 31)), r"weight: expected shape \(31,\)"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def indivisible_case() -> None:
    with pytest.raises(ValueError, match="num_heads: expected the number of heads to be a multiple of the 4 ranks"):
        sp.TransformerLayer(36, 6, group=group())
    with pytest.raises(ValueError, match=r"num_kv_heads: expected .* of the 4 ranks of the group, got 2"):
        sp.TransformerLayer(32, 8, num_kv_heads=2, group=group())
    with pytest.raises(ValueError, match="out_features: expected its size to be a multiple of the 4 ranks"):
        sp.TransformerLayer(32, 4, intermediate_size=42, group=group())


def test_sizes_that_do_not_divide(world4: World) -> None:
    world4.run(indivisible_case)


def test_old_names_are_taken() -> None:
    old, new = (
        sp.TransformerLayer.llama(32, 4, intermediate_size=48, **{name: 5e5}) for name in ("rotary_base", "rope_theta")
    )
    assert old.rope_theta == new.rope_theta == old.rotary_base == 5e5 and old.head_size == old.head_dim == 8
    q = torch.randn(2, 6, 8)
    given: dict[str, Any] = {"head_size": 4, "rotary_base": 10.0}
    expected = sp.functional.causal_attention(q, q, q, head_dim=4, rope_theta=10.0)
    assert torch.equal(sp.functional.causal_attention(q, q, q, **given), expected)
    with pytest.raises(ValueError, match="head_size: expected head_dim alone, got both"):
        sp.functional.causal_attention(q, q, q, head_dim=4, **given)
