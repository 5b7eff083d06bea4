"""Vocabulary-parallel embedding and cross-entropy on real gloo ranks, against torch.nn.functional on whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqpar_kernels as sp
from seqpar_kernels.layout import vocabulary_range
from seqpar_kernels.ops import vocab as vocab_ops

from ..oracle import assert_within_budget
from ..world import RankError, World

H = 6


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def mine(vocab: int, g: dist.ProcessGroup | None) -> slice:
    return slice(*vocabulary_range(vocab, g.size() if g else 1, g.rank() if g else 0))


def indices(vocab: int, length: int, seq_dim: int) -> Tensor:
    ids = torch.randint(vocab, (length, 3) if seq_dim == 0 else (3, length))
    return ids.t().contiguous().t() if length % 2 else ids  # odd lengths: not contiguous


def embedding_case(vocab: int, length: int, seq_dim: int, whole: bool) -> None:
    g = group()
    ids, weight = indices(vocab, length, seq_dim), leaf(torch.randn(vocab, H, dtype=torch.float64))
    padding = 1 - vocab
    expected = F.embedding(ids, weight, padding_idx=padding)
    grad = torch.randn_like(expected)
    (dw,) = torch.autograd.grad(expected, weight, grad)
    local = leaf(weight[mine(vocab, g)])
    out = sp.vocab_parallel_embedding(
        ids, local, group=g, seq_dim=seq_dim, vocab_size=vocab, padding_idx=padding, whole_output=whole
    )
    cut = [t if whole else t.tensor_split(g.size(), seq_dim)[g.rank()] for t in (expected, grad)]
    torch.testing.assert_close(out, cut[0], rtol=0, atol=0)
    got = torch.autograd.grad(out, local, cut[1])
    torch.testing.assert_close(got[0], dw[mine(vocab, g)])


@pytest.mark.parametrize("whole", [False, True], ids=["shard", "whole"])
@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
@pytest.mark.parametrize(("vocab", "length"), [(12, 8), (7, 5), (5, 1), (3, 7)])
def test_embedding_equals_the_unsharded_one(world: World, vocab: int, length: int, seq_dim: int, whole: bool) -> None:
    world.run(embedding_case, vocab, length, seq_dim, whole)


def test_gradients_of_a_frequent_token_are_added_up_in_fp32() -> None:
    """In 16 bits a sum of ones would stop growing at 256."""
    weight = torch.zeros(3, 2, dtype=torch.bfloat16, requires_grad=True)
    sp.vocab_parallel_embedding(torch.ones(1024, dtype=torch.int64), weight, group=None).sum().backward()
    assert weight.grad is not None and weight.grad[:, 0].tolist() == [0.0, 1024.0, 0.0]


def test_gradients_of_many_pieces_are_added_up_in_fp32() -> None:
    """Each row adds one half, which 16 bits would not see beside 128."""
    x, target = torch.ones(512, 1, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.int64)
    weight, bias = (torch.zeros(*size, dtype=torch.bfloat16, requires_grad=True) for size in ((2, 1), (2,)))
    options = {"group": None, "logit_rows": 1, "reduction": "sum"}
    sp.vocab_parallel_linear_cross_entropy(x, weight, target, bias, **options).backward()  # type: ignore[arg-type]
    for grad in (weight.grad, bias.grad):
        assert grad is not None and grad.flatten().tolist() == [-256.0, 256.0]


def reference_loss(logits: Tensor, target: Tensor, reduction: str, options: dict[str, Any]) -> Tensor:
    """torch's cross_entropy in fp64 or fp32, of changed logits, plus z-loss."""
    classes, flat, vocab = target.reshape(-1), logits.reshape(-1, logits.shape[-1]), logits.shape[-1]
    flat = flat * options.get("logit_scale", 1.0)
    cap = options.get("softcap", 0.0)
    flat = cap * (flat / cap).tanh() if cap else flat
    smoothing, ignored = options.get("label_smoothing", 0.0), options.get("ignore_index", -100)
    weight = options.get("class_weight")
    losses = F.cross_entropy(flat, classes, weight, label_smoothing=smoothing, ignore_index=ignored, reduction="none")
    if options.get("label_smoothing_over") == "others":
        logs = flat.log_softmax(-1)
        at = classes.clamp(min=0).unsqueeze(-1)
        own = logs.gather(-1, at).squeeze(-1)
        losses = -(1 - smoothing) * own - smoothing / (vocab - 1) * (logs.sum(-1) - own)
        losses = losses.masked_fill(classes == ignored, 0)
    counted = classes != ignored
    losses = losses + options.get("z_loss", 0.0) * flat.logsumexp(-1).square() * counted
    if reduction == "none":
        return losses.view(target.shape)
    count = counted.sum() if weight is None else weight[classes[counted]].sum()
    return losses.sum() if reduction == "sum" else losses.sum() / count


OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.2},
    {"z_loss": 0.3, "ignore_index": 1},
    {"label_smoothing": 0.1, "z_loss": 0.1, "ignore_index": -1},
    {"logit_scale": 0.25},
    {"softcap": 2.0, "z_loss": 0.1, "logit_scale": -1.5},
    {"label_smoothing": 0.1, "label_smoothing_over": "others"},
    {"class_weight": None},
    {"class_weight": None, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0, "ignore_index": 0},
]


def made(options: dict[str, Any], vocab: int) -> dict[str, Any]:
    """``options`` with class weights of the size of the vocabulary where they have any."""
    return {**options, "class_weight": torch.rand(vocab).double()} if "class_weight" in options else options


def targets(vocab: int, shape: Any, options: dict[str, Any]) -> Tensor:
    target = torch.randint(vocab, shape)
    target.view(-1)[::3] = options.get("ignore_index", -100)
    return target


def logits_case(vocab: int, options: dict[str, Any], reduction: str) -> Tensor:
    g = group()
    logits = leaf(torch.randn(2, 5, vocab, dtype=torch.float64) * 3)
    options = made(options, vocab)
    target = targets(vocab, (2, 5), options)
    expected = reference_loss(logits, target, reduction, options)
    grad = torch.randn_like(expected)
    (d,) = torch.autograd.grad(expected, logits, grad)
    local = leaf(logits[..., mine(vocab, g)].mT.contiguous().mT)  # strided
    loss = sp.vocab_parallel_cross_entropy(local, target, group=g, vocab_size=vocab, reduction=reduction, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, local, grad)[0], d[..., mine(vocab, g)])
    return loss.detach()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("vocab", [12, 7, 3])
def test_cross_entropy_of_logits(world: World, vocab: int, options: dict[str, Any], reduction: str) -> None:
    losses = world.run(logits_case, vocab, options, reduction)
    assert all(torch.equal(loss, losses[0]) for loss in losses), "the ranks differ"


def head_case(
    vocab: int, length: int, seq_dim: int, options: dict[str, Any], reduction: str, place: dict[str, Any]
) -> Tensor:
    g = group()
    t, rank = g.size(), g.rank()
    shape = [2, 2, H]
    shape[seq_dim] = length
    x, w, b = (leaf(torch.randn(s, dtype=torch.float64)) for s in (shape, (vocab, H), (vocab,)))
    options = made(options, vocab)
    target = targets(vocab, shape[:-1], options)
    expected = reference_loss(F.linear(x, w, b), target, reduction, options)
    grad = torch.randn_like(expected)
    dx, dw, db = torch.autograd.grad(expected, [x, w, b], grad)
    cut = mine(vocab, g)
    x_local = x.detach().tensor_split(t, seq_dim)[rank].requires_grad_()
    w_local, b_local = leaf(w[cut].t().contiguous().t()), leaf(b[cut])
    loss = sp.vocab_parallel_linear_cross_entropy(
        x_local, w_local, target, b_local, group=g, seq_dim=seq_dim, vocab_size=vocab, reduction=reduction,
        **options, **place,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(loss, [x_local, w_local, b_local], grad)
    torch.testing.assert_close(got[0], dx.tensor_split(t, seq_dim)[rank])
    torch.testing.assert_close(got[1:], (dw[cut], db[cut]))
    return loss.detach()


@pytest.mark.parametrize("place", [{}, {"chunks": 2, "logit_rows": 1}, {"engine": "single", "logit_rows": 3}], ids=str)
@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
@pytest.mark.parametrize(("vocab", "length"), [(12, 8), (7, 13), (3, 3), (9, 1)])
def test_head_and_loss_in_one(world: World, vocab: int, length: int, seq_dim: int, place: dict[str, Any]) -> None:
    losses = world.run(head_case, vocab, length, seq_dim, OPTIONS[3], "mean", place)
    assert all(torch.equal(loss, losses[0]) for loss in losses), "the ranks differ"


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_head_and_loss_options(world2: World, options: dict[str, Any], reduction: str) -> None:
    world2.run(head_case, 10, 5, 1, options, reduction, {"chunks": 2, "logit_rows": 2})


def precision_case(dtype: torch.dtype) -> None:
    """Against fp64, at most twice the error of the unsharded computation in the same dtype."""
    g = group()
    t, rank = g.size(), g.rank()
    vocab, length, hidden = 301, 128, 64
    x, w = torch.randn(2, length, hidden).to(dtype), (torch.randn(vocab, hidden) / 4).to(dtype)
    target = targets(vocab, (2, length), {})
    runs = []
    for wide in (torch.float64, dtype):
        tensors = [leaf(v.to(wide)) for v in (x, w)]
        logits = F.linear(*tensors)
        loss = F.cross_entropy((logits if wide == torch.float64 else logits.float()).flatten(0, 1), target.view(-1))
        runs.append((loss.detach(), *torch.autograd.grad(loss, tensors)))
    cut = mine(vocab, g)
    x_local, w_local = leaf(x.tensor_split(t, 1)[rank]), leaf(w[cut])
    loss = sp.vocab_parallel_linear_cross_entropy(
        x_local, w_local, target, group=g, vocab_size=vocab, chunks=2, logit_rows=32
    )
    assert loss.dtype == torch.float32
    dx, dw = torch.autograd.grad(loss, [x_local, w_local])
    assert_within_budget(loss.detach(), runs[1][0], runs[0][0], "loss")
    assert_within_budget(dx, runs[1][1].tensor_split(t, 1)[rank], runs[0][1].tensor_split(t, 1)[rank], "dx")
    assert_within_budget(dw, runs[1][2][cut], runs[0][2][cut], "dw")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision(world2: World, dtype: torch.dtype) -> None:
    world2.run(precision_case, dtype)


class Largest(TorchDispatchMode):
    """The largest number of elements any op returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and func._schema.name != "aten::t":
                self.elements = max(self.elements, t.numel())
        return out


def memory_case() -> None:
    """The kernels themselves: a dispatch mode sees what they call, not what a registered op calls."""
    g = group()
    t, vocab, length, rows = g.size(), 4000, 64, 8
    x, w = torch.randn(2, length // t, H), torch.randn(vocab // t, H)
    target = torch.randint(vocab, (2, length))
    place = (None, g.group_name, vocab, -100, 0.1, 0.1, 0.5, 3.0, 1, length, 2, "p2p", rows)
    with Largest() as seen:
        _, lse, _ = vocab_ops._head_kernel(x, w, None, target, *place)
        vocab_ops._head_backward_kernel(torch.ones_like(lse), x, w, None, target, lse, True, True, False, *place)
    assert seen.elements == max(rows * w.shape[0], w.numel()) < 2 * length * w.shape[0] / 4


def parts_case(reduction: str) -> None:
    g = group()
    x, w = torch.randn(2, 3 * g.size(), H).double(), torch.randn(7, H).double()
    target = targets(7, x.shape[:-1], {})
    logits = 0.5 * F.linear(x, w)
    options = {"z_loss": 0.3, "logit_scale": 0.5, "reduction": reduction}
    counted = target != -100
    z = 0.3 * logits.logsumexp(-1).square() * counted
    right = (logits.argmax(-1) == target) & counted
    expected = {
        "none": (z, right),
        "sum": (z.sum(), right.sum() / counted.sum()),
        "mean": (z.sum() / counted.sum(), right.sum() / counted.sum()),
    }[reduction]
    local = leaf(x.tensor_split(g.size(), 1)[g.rank()]), leaf(w[mine(7, g)])
    parts = sp.vocab_parallel_linear_cross_entropy(
        *local, target, group=g, vocab_size=7, with_parts=True, **options,
    )  # fmt: skip
    alone = sp.vocab_parallel_cross_entropy(2 * logits, target, group=None, with_parts=True, **options)
    for got in (parts, alone):
        torch.testing.assert_close(got.loss, reference_loss(2 * logits, target, reduction, options))
        torch.testing.assert_close(got.z_loss, expected[0])
        assert torch.equal(got.accuracy.double(), expected[1].double())
        assert got.loss.requires_grad == (got is parts) and not got.z_loss.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_parts_of_the_loss(world2: World, reduction: str) -> None:
    world2.run(parts_case, reduction)


def bounded_case() -> None:
    """Logits stay below the bound, and the bits of the loss are those of the same rows a slice."""
    g = group()
    t, vocab, length = g.size(), 4000, 64
    x, w = torch.randn(2, length // t, H), torch.randn(vocab // t, H)
    target = torch.randint(vocab, (2, length))
    place = (None, g.group_name, vocab, -100, 0.0, 0.0, 1.0, 0.0, 1, length, 2, "p2p", 0)
    sp.set_max_workspace_bytes(4 * 16 * 4 * w.shape[0])
    try:
        with Largest() as seen:
            losses, lse, _ = vocab_ops._head_kernel(x, w, None, target, *place)
            vocab_ops._head_backward_kernel(torch.ones_like(lse), x, w, None, target, lse, True, True, False, *place)
    finally:
        sp.set_max_workspace_bytes(None)
    assert seen.elements <= max(16 * w.shape[0], w.numel(), x.numel() * t)
    slices = vocab_ops._head_kernel(x, w, None, target, *place[:-1], 16)[0]
    assert torch.equal(losses, slices)


def test_the_bound_covers_the_logits(world2: World) -> None:
    world2.run(bounded_case)


def test_logits_are_never_whole(world2: World) -> None:
    world2.run(memory_case)


def masked_case() -> None:
    """Columns at -inf on a whole rank, and rows that are ignored though they hold NaN."""
    g = group()
    logits = torch.randn(3, 8, dtype=torch.float64)
    logits[:, 4:] = -torch.inf
    target = torch.tensor([1, 2, -100])
    expected = F.cross_entropy(leaf(logits), target)
    logits[2] = torch.nan
    local = leaf(logits[:, mine(8, g)])
    loss = sp.vocab_parallel_cross_entropy(local, target, group=g)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert torch.isfinite(local.grad).all()
    nothing = sp.vocab_parallel_cross_entropy(local, torch.full((3,), -100), group=g)
    assert torch.isnan(nothing), "as torch: the mean over no rows"


def test_masked_columns_and_ignored_rows(world2: World) -> None:
    world2.run(masked_case)


def gradcheck_case() -> None:
    g = group()
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 3, 2), (5, 2), (5,)))
    ids = torch.tensor([[1, 4, 0]])
    t = g.size()

    def model(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        """Embedding tied to the head, everything replicated in and out."""
        padded = [F.pad(v, (0,) * (2 * v.dim() - 1) + (-len(v) % t,)) for v in (w, b)]
        cut = mine(5, g)
        w_local, b_local = (sp.scatter_tensor_parallel(v, g, 0)[: cut.stop - cut.start] for v in padded)
        shard = sp.scatter_sequence(x, g) + sp.vocab_parallel_embedding(ids, w_local, group=g, vocab_size=5)
        return sp.vocab_parallel_linear_cross_entropy(
            shard, w_local, ids, b_local, group=g, vocab_size=5, label_smoothing=0.1, z_loss=0.1, logit_rows=2,
            softcap=1.5, logit_scale=0.7, class_weight=torch.arange(1.0, 6.0).double(),
        )  # fmt: skip

    assert torch.autograd.gradcheck(model, (x, w, b))


def test_gradcheck_of_tied_ends(world: World) -> None:
    world.run(gradcheck_case)


def test_gradcheck_without_a_group() -> None:
    x, w = torch.randn(2, 3, 4, dtype=torch.float64)[..., ::2].requires_grad_(), torch.randn(5, 2).double()
    target = torch.tensor([[0, 4, -100], [2, 1, 1]])
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda x, w, r=reduction: sp.vocab_parallel_linear_cross_entropy(
                x, w, target, group=None, z_loss=0.1, label_smoothing=0.2, reduction=r
            ),
            (x, w.requires_grad_()),
        )
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sp.vocab_parallel_cross_entropy(x, target, group=None), logits)
    ids = target.clamp(min=0)
    assert torch.autograd.gradcheck(lambda w: sp.vocab_parallel_embedding(ids, w, group=None), w)


def compile_case() -> None:
    g = group()
    x, w = torch.randn(2, 4, H, requires_grad=True), torch.randn(5, H, requires_grad=True)
    ids = torch.randint(5 * g.size(), (2, 4 * g.size()))

    def fn(x: Tensor, w: Tensor) -> Tensor:
        x = x + sp.vocab_parallel_embedding(ids, w, group=g)
        fused = sp.vocab_parallel_linear_cross_entropy(x, w, ids, group=g, label_smoothing=0.1, softcap=2.0)
        return fused + sp.vocab_parallel_cross_entropy(sp.all_gather_linear(x, w, group=g), ids, group=g)

    expected = torch.autograd.grad(fn(x, w), (x, w))
    for backend in ("eager", "aot_eager"):
        got = torch.autograd.grad(torch.compile(fn, fullgraph=True, backend=backend)(x, w), (x, w))
        torch.testing.assert_close(got, expected)


def test_compiles_without_graph_breaks(world2: World) -> None:
    world2.run(compile_case)


def opcheck_case() -> None:
    name, t = group().group_name, group().size()
    ops, check = torch.ops.seqpar, torch.library.opcheck
    vocab, length = 5 * t, 4 * t
    ids = torch.randint(vocab, (2, length))
    w, b, x = (torch.randn(s, requires_grad=True) for s in ((5, H), (5,), (2, 4, H)))
    check(ops.vocab_embedding.default, (ids, w, name, vocab, -1, 1, False))
    check(ops.vocab_embedding.default, (ids, w, name, vocab, 2, 1, True))
    check(ops.vocab_embedding_backward.default, (torch.randn(2, 4, H), ids, name, vocab, 2, 1, False))
    loss = (torch.rand(vocab), name, vocab, -100, 0.1, 0.1, 0.5, 3.0)
    logits = torch.randn(2, length, 5, requires_grad=True)
    check(ops.vocab_cross_entropy.default, (logits, ids, *loss))
    lse = torch.ops.seqpar.vocab_cross_entropy(logits.detach(), ids, *loss)[1]
    dloss = torch.randn(2, length)
    check(ops.vocab_cross_entropy_backward.default, (dloss, logits.detach(), ids, lse, *loss))
    place = (*loss, 1, length, 2, "p2p", 3)
    check(ops.linear_cross_entropy.default, (x, w, b, ids, *place))
    for wants in ((True, True, True), (False, True, False)):
        args = (dloss, x.detach(), w.detach(), b.detach(), ids, lse, *wants, *place)
        check(ops.linear_cross_entropy_backward.default, args)


def test_opcheck(world2: World) -> None:
    world2.run(opcheck_case)


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "rows": ("embedding", {"vocab_size": 11}, r"weight: rank \d of 2 holds 5 entries, but its part of vocab_size=11"),
    "ids dtype": ("embedding", {"ids": torch.zeros(2, 4)}, "ids: expected int64 or int32, got torch.float32"),
    "weight dims": ("embedding", {"weight": torch.zeros(5)}, r"weight: expected \[V/t, H\]"),
    "padding": ("embedding", {"padding_idx": 10}, "padding_idx: expected an index into the 10 entries or None, got 10"),
    "outside": ("embedding", {"ids": torch.full((2, 4), 10)}, r"ids: expected indices in 0\.\.9"),
    "seq_dim": ("embedding", {"seq_dim": 2}, "seq_dim: expected a dimension of x"),
    "target shape": ("logits", {"target": torch.zeros(4, dtype=torch.int64)}, "target: expected shape"),
    "class": (
        "logits",
        {"target": torch.full((2, 4), 10)},
        r"target: expected class indices in 0\.\.9 or ignore_index",
    ),
    "smoothing": ("logits", {"label_smoothing": 1.0}, r"label_smoothing: expected a number in \[0, 1\), got 1.0"),
    "z": ("logits", {"z_loss": -1.0}, "z_loss: expected a finite number of at least 0, got -1.0"),
    "scale": ("logits", {"logit_scale": 0.0}, "logit_scale: expected a finite number other than 0, got 0.0"),
    "cap": ("head", {"softcap": -1.0}, "softcap: expected a finite number of at least 0, got -1.0"),
    "over": ("head", {"label_smoothing_over": "some"}, "label_smoothing_over: expected one of"),
    "most": (
        "logits",
        {"label_smoothing_over": "others", "label_smoothing": 0.95},
        r"label_smoothing: expected less than 9/10 over the other classes, got 0.95",
    ),
    "weights": ("head", {"class_weight": torch.ones(5)}, r"class_weight: expected \[V\] = \[10\], got shape \(5,\)"),
    "weights dtype": ("logits", {"class_weight": torch.ones(10).double()}, "class_weight: expected torch.float32 or"),
    "weights grad": (
        "logits",
        {"class_weight": torch.ones(10, requires_grad=True)},
        "class_weight: expected a tensor without gradient",
    ),
    "parts": ("logits", {"with_parts": 1}, "with_parts: expected True or False, got 1"),
    "reduction": ("logits", {"reduction": "max"}, "reduction: expected one of"),
    "columns": ("logits", {"vocab_size": 8}, "logits: rank . of 2 holds 5 entries"),
    "head": ("head", {"weight": torch.zeros(5, 4)}, "weight: expected in_features = 6"),
    "length": ("head", {"target": torch.zeros(2, 7, dtype=torch.int64)}, "x: rank 1 of 2 holds 4 rows"),
    "batch": ("head", {"target": torch.zeros(3, 8, dtype=torch.int64)}, r"target: expected shape \(2, 8\)"),
    "logit_rows": ("head", {"logit_rows": 0}, "logit_rows: expected a positive int or None, got 0"),
    "head class": ("head", {"target": torch.full((2, 8), -1)}, r"target: expected class indices in 0\.\.9"),
}


def refusal_case(name: str) -> None:
    which, changes, _ = BAD[name]
    ids = torch.zeros(2, 4, dtype=torch.int64)
    calls: dict[str, tuple[Any, dict[str, Any]]] = {
        "embedding": (sp.vocab_parallel_embedding, {"ids": ids, "weight": torch.zeros(5, H)}),
        "logits": (sp.vocab_parallel_cross_entropy, {"logits": torch.zeros(2, 4, 5), "target": ids}),
        "head": (
            sp.vocab_parallel_linear_cross_entropy,
            {"x": torch.zeros(2, 4, H), "weight": torch.zeros(5, H), "target": torch.zeros(2, 8, dtype=torch.int64)},
        ),
    }
    fn, arguments = calls[which]
    fn(**{**arguments, **changes}, group=group())


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused(world2: World, name: str) -> None:
    with pytest.raises(RankError, match=BAD[name][2]) as caught:
        world2.run(refusal_case, name)
    assert not any(ok for ok, _ in caught.value.outcomes)
