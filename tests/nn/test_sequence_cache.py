"""SequenceShardedCache on 1, 2, 3 and 4 ranks: steps against fp64, greedy tokens of one rank, memory, wire, errors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar_kernels as sp
from seqpar_kernels.kernels import attention_native
from seqpar_kernels.overlap import messages

from ..functional.groups import on_ranks
from ..oracle import assert_within_budget
from ..world import World
from .decode_model import HEAD_DIM, Model

if attention_native.unavailable(torch.device("cpu")) is not None:
    pytest.skip(str(attention_native.unavailable(torch.device("cpu"))), allow_module_level=True)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


def size_of(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def alike(t: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether all ranks have the same bits."""
    if group is None:
        return True
    every = [torch.empty_like(t) for _ in range(group.size())]
    dist.all_gather(every, t.contiguous(), group)
    return all(torch.equal(other, t) for other in every)


class Step:
    """The last ``new`` of ``length`` tokens, and the attention of these in plain torch."""

    def __init__(
        self,
        length: int = 23,
        new: int = 1,
        heads: tuple[int, int] = (4, 2),
        dims: tuple[int, int] = (16, 8),
        dtype: torch.dtype = F32,
        batch: int = 2,
        *,
        sinks: bool = False,
        bias: tuple[int, ...] | None = None,
        mask: Tensor | None = None,
        **options: Any,
    ):
        g = torch.Generator().manual_seed(length * 31 + new)

        def made(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=F64).to(dtype)

        self.new, self.length, self.dtype, self.options = new, length, dtype, options
        self.q = made(batch, heads[0], new, dims[0]).transpose(1, 2)
        self.k, self.v = made(batch, length, heads[1], dims[0]), made(batch, length, heads[1], dims[1])
        self.sinks = made(heads[0]) if sinks else None
        self.bias = mask if bias is None else made(*bias).float()

    def plain(self, dtype: torch.dtype) -> Tensor:
        share = self.q.shape[2] // self.k.shape[2]
        q, k, v = (t.to(dtype).transpose(1, 2) for t in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
        rows, keys = torch.arange(self.length - self.new, self.length)[:, None], torch.arange(self.length)
        left, _ = self.options.get("window_size", (-1, -1))
        see = (keys <= rows) & ((keys >= rows - left) if left >= 0 else True)
        scores = q @ k.transpose(-1, -2) * self.options.get("scale", self.q.shape[-1] ** -0.5)
        cap = self.options.get("softcap", 0.0)
        scores = torch.tanh(scores / cap) * cap if cap else scores
        if self.bias is not None and self.bias.dtype == torch.bool:
            see = see & self.bias
        elif self.bias is not None:
            scores = scores + self.bias.to(dtype)
        scores = scores.masked_fill(~see, -math.inf)
        if self.sinks is not None:
            column = self.sinks.to(dtype)[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        return (torch.softmax(scores, -1)[..., : self.length].nan_to_num(0) @ v).transpose(1, 2)

    def run(self, group: dist.ProcessGroup | None, **asked: Any) -> Tensor:
        cache = sp.SequenceShardedCache(group)
        old = self.length - self.new
        if old:
            cache.prefill(self.k[:, :old], self.v[:, :old])
        options = dict(sinks=self.sinks, attn_bias=self.bias, **self.options)
        return cache.decode(self.q, self.k[:, old:], self.v[:, old:], **options, **asked)

    def check(self, group: dist.ProcessGroup | None) -> None:
        out = self.run(group)
        what = f"{self.length}, {self.new}, {self.options}, {self.dtype}, {size_of(group)} ranks"
        assert out.dtype == self.dtype
        assert_within_budget(out, self.plain(self.dtype), self.plain(F64), what, 4.0)
        assert alike(out, group)


def padding(length: int) -> Tensor:
    """Left padding of two batch entries. [2, 1, 1, S]"""
    return (torch.arange(length) >= torch.tensor([[3], [0]]))[:, None, None]


STEPS = {
    "one token": Step(),
    "several tokens": Step(new=5),
    "window": Step(window_size=(6, -1)),
    "window of nobody but one": Step(window_size=(0, 0)),
    "window, several tokens": Step(31, 4, window_size=(6, -1), sinks=True),
    "sinks, multi-query": Step(heads=(4, 1), sinks=True),
    "softcap, scale": Step(softcap=2.0, scale=0.4, new=2),
    "padding": Step(mask=padding(23)),
    "padding, several tokens": Step(new=3, mask=padding(23), sinks=True),
    "bias of heads": Step(new=2, bias=(2, 4, 2, 23)),
    "alibi": Step(bias=(4, 1, 23), sinks=True),
    "bf16": Step(61, dtype=BF16, sinks=True),
    "bf16, all at once": Step(19, 19, dtype=BF16, batch=1),
    "fp16": Step(61, 2, dtype=torch.float16, window_size=(40, -1)),
    "fp64": Step(dtype=F64, new=2),
    "the first token": Step(1, 1, sinks=True),
    "some ranks have no key": Step(2, 1, heads=(4, 4)),
    "no row sees a key": Step(5, 1, mask=torch.zeros(5, dtype=torch.bool)),
    "no batch entry": Step(5, 1, batch=0),
}


def steps_case(group: dist.ProcessGroup | None) -> None:
    for step in STEPS.values():
        step.check(group)


def test_steps_one_rank() -> None:
    steps_case(None)


def test_steps_on_ranks(world4: World) -> None:
    world4.run(on_ranks, steps_case)


# --- whole models ----------------------------------------------------------------------------------------------------


def plain_attention(_: int, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], sinks: Tensor | None) -> Tensor:
    """Causal, in plain torch."""
    share = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    rows, keys = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
    see = (keys <= rows) & ((keys >= rows - window[0]) if window[0] >= 0 else True)
    scores = (q @ k.repeat_interleave(share, 1).transpose(-1, -2) * HEAD_DIM**-0.5).masked_fill(~see, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(*scores.shape[:3], 1)], -1)
    return (torch.softmax(scores, -1)[..., : q.shape[2]] @ v.repeat_interleave(share, 1)).transpose(1, 2)


def greedy_plain(model: Model, ids: Tensor, count: int) -> Tensor:
    for _ in range(count):
        logits = model(ids, torch.arange(ids.shape[1]), plain_attention)
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids


def greedy_sharded(
    model: Model, ids: Tensor, count: int, group: dist.ProcessGroup | None, layout: str | None
) -> Tensor:
    """The prompt in shards of ``layout``, or whole; then token by token."""
    cache = sp.SequenceShardedCache(group)
    length = ids.shape[1]

    def read(i: int, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], sinks: Tensor | None) -> Tensor:
        if layout is None:
            return cache.decode(q, k, v, i, window_size=window, sinks=sinks)
        cache.prefill(k, v, i, layout=layout, seq_len=length)
        options = dict(group=group, is_causal=True, layout=layout, seq_len=length, window_size=window, sinks=sinks)
        return sp.sequence_parallel_attention(q, k, v, **options)  # type: ignore[return-value]

    def step(i: int, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], sinks: Tensor | None) -> Tensor:
        return cache.decode(q, k, v, i, window_size=window, sinks=sinks)

    if layout is None:
        logits = model(ids, torch.arange(length), read)
    else:
        own = sp.shard_sequence(ids, group, -1, layout=layout)
        logits = model(own, sp.sequence_positions(length, group, layout), read)
        logits = sp.unshard_sequence(logits, group, 1, layout=layout, seq_len=length)
    for _ in range(count):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        logits = model(ids[:, -1:], torch.tensor([cache.get_seq_length()]), step)
    assert cache.get_seq_length(1) == length + count
    return ids


@torch.no_grad()
def greedy_case(group: dist.ProcessGroup | None) -> None:
    for heads, length, layouts in (((4, 2), 13, ("zigzag", None)), ((6, 1), 3, ("contiguous", "zigzag"))):
        torch.manual_seed(1)
        model = Model(*heads)
        ids = torch.randint(61, (2, length))
        expected = greedy_plain(model, ids, 8)
        assert len(set(expected[0, length:].tolist())) > 2
        for layout in layouts:
            assert torch.equal(greedy_sharded(model, ids, 8, group, layout), expected)


def test_greedy_one_rank() -> None:
    greedy_case(None)


def test_greedy_on_ranks(world4: World) -> None:
    world4.run(on_ranks, greedy_case)


@torch.no_grad()
def transformers_case() -> None:
    """A Llama of Transformers writes what its own generate does on one rank."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, _: Any, scaling: float, cache: Any, **__: Any) -> Any:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return cache.decode(q, k, v, module.layer_idx, scale=scaling), None

    AttentionInterface.register("sequence_sharded", attend)
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    sizes = dict(vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=2, initializer_range=0.3)
    model = LlamaForCausalLM(LlamaConfig(**heads, **sizes)).eval()
    ids = new = torch.randint(61, (2, 7))
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    model.set_attn_implementation("sequence_sharded")
    cache = sp.SequenceShardedCache(dist.group.WORLD)
    for _ in range(8):
        positions = cache.get_seq_length() + torch.arange(new.shape[1])
        logits = model(new, position_ids=positions[None], use_cache=False, cache=cache).logits
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    assert torch.equal(ids, expected)


def test_greedy_of_transformers(world2: World) -> None:
    world2.run(transformers_case)


# --- filling, and the heads of tensor parallelism --------------------------------------------------------------------


def prefill_case(group: dist.ProcessGroup | None) -> None:
    """Every way to fill the cache gives the same, in any pieces."""
    t, rank = size_of(group), 0 if group is None else group.rank()
    for length, kv_heads in ((17, 2), (2, 1)):
        k, v = torch.randn(2, length + 8, kv_heads, 8), torch.randn(2, length + 8, kv_heads, 4)
        for layout in ("contiguous", "zigzag", None):
            cache = sp.SequenceShardedCache(group, capacity=5)
            for piece in (slice(0, length), slice(length, length + 7), slice(length + 7, length + 8)):
                keys, values = k[:, piece], v[:, piece]
                whole = keys.shape[1]
                if layout is not None:
                    keys, values = (sp.shard_sequence(x, group, 1, layout=layout) for x in (keys, values))
                cache.prefill(keys, values, layout=layout, seq_len=None if layout is None else whole)
            assert cache.get_seq_length() == length + 8
            found = cache.shard()
            assert torch.equal(found[0], k[:, rank::t]) and torch.equal(found[1], v[:, rank::t])


def heads_case(group: dist.ProcessGroup) -> None:
    """Ranks with heads of their own: the bits of ranks that have all of them, and the same cache."""
    t, rank = group.size(), group.rank()
    for kv_heads in {1, t, 2 * t, 2} if t != 3 else {1, 3}:
        heads = 4 * max(t, kv_heads) if t != 3 else 6
        sinks = torch.randn(heads)

        def own(x: Tensor) -> Tensor:
            each = max(1, x.shape[2] // t)
            return x[:, :, rank * x.shape[2] // t :][:, :, :each]

        whole = sp.SequenceShardedCache(group)
        cut = sp.SequenceShardedCache(group, num_heads=heads, num_kv_heads=kv_heads)
        k, v = torch.randn(2, 7, kv_heads, 8), torch.randn(2, 7, kv_heads, 4)
        whole.prefill(k, v)
        cut.prefill(own(k), own(v))
        for new in (1, 3, 1, 1):
            q, k, v = torch.randn(2, new, heads, 8), torch.randn(2, new, kv_heads, 8), torch.randn(2, new, kv_heads, 4)
            bias = torch.randn(heads, 1, whole.get_seq_length() + new)
            expected = whole.decode(q, k, v, sinks=sinks, attn_bias=bias, window_size=(9, -1))
            some = own(sinks[None, None])[0, 0]
            found = cut.decode(own(q), own(k), own(v), sinks=some, attn_bias=bias, window_size=(9, -1))
            assert torch.equal(found, own(expected))
        assert all(torch.equal(a, b) for a, b in zip(cut.shard(), whole.shard()))
        assert cut.nbytes == whole.nbytes


def changes_case(group: dist.ProcessGroup | None) -> None:
    """Token by token over growing buffers; cropped, the same bits again; reset; batch entries reordered."""
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 61, 4, 8), torch.randn(3, 61, 2, 8), torch.randn(3, 61, 2, 4)
    cache = sp.SequenceShardedCache(group)

    def tokens(start: int, stop: int) -> Tensor:
        steps = (slice(i, i + 1) for i in range(start, stop))
        return torch.cat([cache.decode(q[:, i], k[:, i], v[:, i], 3) for i in steps], 1)

    first = tokens(0, 61)
    rows = -(-61 // size_of(group))
    assert cache.nbytes <= 3 * 2 * 12 * 4 * max(rows * 5 // 4, rows + 16)
    assert (cache.get_seq_length(3), cache.get_seq_length(0)) == (61, 0)
    cache.crop(-60)
    assert torch.equal(tokens(1, 20), first[:, 1:20])
    cache.crop(7)
    cache.crop(9)
    assert cache.get_seq_length(3) == 7
    assert torch.equal(tokens(7, 30), first[:, 7:30])
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    q, k, v = q[order], k[order], v[order]
    assert torch.equal(tokens(30, 40), first[order, 30:40])
    before = cache.nbytes
    cache.reset()
    assert cache.get_seq_length(3) == 0 and cache.nbytes == before
    assert torch.equal(tokens(0, 3), first[order, :3])
    cache.reset()
    assert cache.decode(q[:1, :2], k[:1, :2], v[:1, :2], 3).shape == (1, 2, 4, 4)


@contextmanager
def sent_bytes() -> Iterator[list[int]]:
    """Bytes of each message that this rank sends."""
    sent: list[int] = []
    original = messages.Messages.post

    def counted(self: Any, sends: Any, receives: Any) -> None:
        sent.extend(buffer.nbytes for _, _, buffer in sends)
        original(self, sends, receives)

    messages.Messages.post = counted  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        messages.Messages.post = original  # type: ignore[method-assign]


def cost_case(group: dist.ProcessGroup) -> None:
    """1/t of the memory with one key head, one message a peer in a step, of a size that the length leaves alone."""
    t = group.size()
    for kv_heads, by_heads in ((1, False), (1, True), (t, True)):
        counted = []
        heads = 4 * t // (t if by_heads else 1)
        sizes = dict(num_heads=4 * t, num_kv_heads=kv_heads) if by_heads else {}
        own_kv = max(1, kv_heads // t) if by_heads else kv_heads
        for length in (12, 480):
            cache = sp.SequenceShardedCache(group, capacity=length + 12, **sizes)
            k, v = torch.randn(1, length, own_kv, 16).bfloat16(), torch.randn(1, length, own_kv, 32).bfloat16()
            cache.prefill(k, v)
            assert cache.nbytes * t == (length + 12) * kv_heads * (16 + 32) * 2
            with sent_bytes() as sent:
                q = torch.randn(1, 1, heads, 16).bfloat16()
                cache.decode(q, k[:, :1], v[:, :1])
            counted.append(list(sent))
        assert counted[0] == counted[1]
        state = 16 + heads * (32 * 4 + 16)  # a length; acc in fp32, maxima and sums in fp64
        assert counted[0][-(t - 1) :] == [state] * (t - 1)
        assert len(counted[0]) == (t - 1) * (2 if by_heads else 1)


@pytest.mark.parametrize("case", [prefill_case, changes_case], ids=lambda case: case.__name__)
def test_one_rank(case: Any) -> None:
    torch.manual_seed(0)
    case(None)


@pytest.mark.parametrize("case", [prefill_case, heads_case, changes_case, cost_case], ids=lambda case: case.__name__)
def test_on_ranks(world4: World, case: Any) -> None:
    world4.run(on_ranks, case)


# --- errors ----------------------------------------------------------------------------------------------------------


def errors_case(group: dist.ProcessGroup) -> None:
    t, rank = group.size(), group.rank()
    q, k = torch.ones(2, 1, 4, 8), torch.ones(2, 1, 2, 8)
    cache = sp.SequenceShardedCache(group)
    cache.prefill(torch.ones(2, 6, 2, 8), torch.ones(2, 6, 2, 8))
    wrong: list[tuple[str, tuple[Tensor, ...], dict[str, Any]]] = [
        ("k: expected heads of 8 features like q", (q, k[..., :7], k), {}),
        (r"k: expected \[2, n, 2, 8\] torch.float32 on cpu like what is cached", (q, k[:, :, :1], k[:, :, :1]), {}),
        ("k: expected .* like what is cached", (q.double(), k.double(), k.double()), {}),
        ("k: expected .* like what is cached", (q[:1], k[:1], k[:1]), {}),
        ("q: expected as many new tokens as k, 1", (q.expand(-1, 2, -1, -1), k, k), {}),
        (r"sinks: expected \(4,\)", (q, k, k), dict(sinks=torch.ones(3))),
        (r"window_size: expected \(left, right\)", (q, k, k), dict(window_size=4)),
        ("softcap: expected", (q, k, k), dict(softcap=-1.0)),
        (r"attn_bias: expected what can be broadcast to \(2, 4, 1, 7\)", (q, k, k), dict(attn_bias=torch.ones(6))),
        ("q: expected requires_grad=False", (q.clone().requires_grad_(), k, k), {}),
        ("sinks: expected requires_grad=False", (q, k, k), dict(sinks=torch.ones(4, requires_grad=True))),
        ("layer_idx: expected an int", (q, k, k), dict(layer_idx=-1)),
    ]
    for message, tensors, options in wrong:
        with pytest.raises(ValueError, match=message):
            cache.decode(*tensors, **options)
    with pytest.raises(ValueError, match=r"k: rank . of . holds 1 rows, but its shard of seq_len=9"):
        cache.prefill(k, k, layout="zigzag", seq_len=9)
    with pytest.raises(ValueError, match="layout: expected 'contiguous' or 'zigzag', got 'striped'"):
        cache.prefill(k, k, layout="striped")
    with pytest.raises(ValueError, match=r"k: expected \[B, S, Hkv, D\], got \(1, 2, 8\)"):
        cache.prefill(k[0], k[0], layout="zigzag")
    with pytest.raises(ValueError, match=r"v: expected .* like k"):
        cache.prefill(k, k[:, :0])
    with pytest.raises(ValueError, match=r"beam_idx: expected integers \[B\]"):
        cache.reorder_cache(torch.ones(2))
    with pytest.raises(ValueError, match="k: expected requires_grad=False"):
        cache.prefill(k.clone().requires_grad_(), k)
    with pytest.raises(ValueError, match="max_length: expected an int"):
        cache.crop(1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"num_heads: expected a multiple of the {t} ranks"):
        sp.SequenceShardedCache(group, num_heads=t + 1, num_kv_heads=1)
    with pytest.raises(ValueError, match="num_kv_heads: expected beside num_heads=4"):
        sp.SequenceShardedCache(group, num_heads=4)
    with pytest.raises(ValueError, match=f"num_kv_heads: expected a multiple or a divisor of the {t} ranks"):
        sp.SequenceShardedCache(group, num_heads=t * (t + 1), num_kv_heads=t + 1)
    by_heads = sp.SequenceShardedCache(group, num_heads=2 * t, num_kv_heads=1)
    with pytest.raises(ValueError, match=f"q: expected 2 of {2 * t} heads, those of rank {rank}"):
        by_heads.decode(q, k[:, :, :1], k[:, :, :1])
    with pytest.raises(ValueError, match="layout: expected None where ranks have heads of their own"):
        by_heads.prefill(k[:, :, :1], k[:, :, :1], layout="zigzag")
    assert cache.get_seq_length() == 6
    dist.barrier(group)
    # One rank refuses: the others hear of it before anything is sent, and no cache has changed.
    error, message = (ValueError, "k: expected") if rank == 1 else (RuntimeError, "rank 1 refused its arguments.* k: ")
    with pytest.raises(error, match=message):
        cache.decode(q, k[..., : 8 - (rank == 1)], k)
    dist.barrier(group)
    assert cache.get_seq_length() == 6
    cache.decode(q, k, k)
    # A rank that has forgotten a token: all hear of it.
    if rank == 1:
        cache.crop(-1)
    dist.barrier(group)
    with pytest.raises(RuntimeError, match="the ranks disagree on how many keys they share: rank 0: 8, rank 1: 7"):
        cache.decode(q, k, k)
    dist.barrier(group)
    cache.crop(6)
    assert alike(cache.decode(q, k, k), group)
    # The same where keys travel too: messages of other sizes, which the ranks have all met at before.
    q, k = torch.ones(2, 1, 2, 8), torch.ones(2, 1, 1, 8)
    for _ in range(t + 1):
        by_heads.decode(q, k, k)
    if rank == 1:
        by_heads.crop(-1)
    dist.barrier(group)
    with pytest.raises(RuntimeError, match="disagree"):
        by_heads.decode(q, k, k)
    dist.barrier(group)
    by_heads.crop(2)
    by_heads.decode(q, k, k)


def test_errors_on_every_rank(world4: World) -> None:
    world4.run(on_ranks, errors_case)


def test_autocast_and_compiled_models() -> None:
    """Keys are cached in the dtype of autocast, and outlive inference mode; in a compiled model the cache breaks the
    graph."""
    q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8)
    cache, other = sp.SequenceShardedCache(None), sp.SequenceShardedCache(None)
    with torch.autocast("cpu", torch.bfloat16):
        cache.prefill(k, v)
        out = cache.decode(q, k, v)
    assert out.dtype == BF16 and cache.shard()[0].dtype == BF16
    rounded = [t.to(BF16) for t in (q, k, v)]
    with torch.inference_mode():
        other.prefill(*rounded[1:])
    run = torch.compile(lambda *tensors: other.decode(*(t + 0 for t in tensors)) * 2, backend="eager")
    assert torch.equal(run(*rounded), out * 2)
    run(*rounded)
    assert other.get_seq_length() == 9


def test_says_what_it_holds() -> None:
    cache = sp.SequenceShardedCache(None, num_heads=4, num_kv_heads=2)
    assert repr(cache) == "SequenceShardedCache(ranks=1, layers=0, lengths=[])"
    with pytest.raises(ValueError, match="layer_idx: expected a layer that has keys"):
        cache.shard()
    with pytest.raises(ValueError, match="capacity: expected"):
        sp.SequenceShardedCache(None, capacity=-1)
