"""Modules: torch.nn's arguments, names and numbers on one rank; the same numbers and gradients on several."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from seqpar_kernels import linear_reduce_scatter_dropout_add_norm
from seqpar_kernels import nn as spnn

from ..world import World


def group() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


class ForeignRMSNorm(nn.Module):
    """As model code writes it; ``offset`` 1 is the zero-centred kind."""

    def __init__(self, size: int, offset: float = 0.0, power: int = 2):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size))
        self.variance_epsilon, self.offset, self.power = 1e-6, offset, power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.float().abs().pow(self.power).mean(-1, keepdim=True)
        return (self.offset + self.weight) * (x * torch.rsqrt(variance + self.variance_epsilon)).to(x.dtype)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_its_twin(affine: bool) -> None:
    twin = nn.LayerNorm(24, eps=1e-4, elementwise_affine=affine)
    ours = spnn.LayerNorm(24, eps=1e-4, elementwise_affine=affine)
    if affine:
        nn.init.normal_(twin.weight)
        nn.init.normal_(twin.bias)
    ours.load_state_dict(twin.state_dict())
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), twin(x))
    assert isinstance(ours, nn.LayerNorm)
    taken = spnn.LayerNorm.from_torch(twin.eval())
    assert taken.weight is twin.weight and taken.bias is twin.bias and not taken.training and taken.eps == twin.eps


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_rms_norm_is_its_twin(eps: float | None) -> None:
    twin = nn.RMSNorm(24, eps=eps)
    nn.init.normal_(twin.weight)
    ours = spnn.RMSNorm(24, eps=eps)
    ours.load_state_dict(twin.state_dict())
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), twin(x))
    torch.testing.assert_close(spnn.RMSNorm.from_torch(twin)(x), twin(x))
    small = (x / 100).bfloat16()  # where epsilon decides
    torch.testing.assert_close(ours.bfloat16()(small), twin.bfloat16()(small))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_foreign_rms_norms_are_recognised_by_what_they_compute(offset: float) -> None:
    foreign = ForeignRMSNorm(16, offset)
    ours = spnn.RMSNorm.from_torch(foreign)
    assert ours.zero_centered_weight == bool(offset) and ours.weight is foreign.weight
    x = torch.randn(3, 4, 16)
    torch.testing.assert_close(ours(x), foreign(x))


class WritesItOut(nn.Module):
    """A LayerNorm without bias, its epsilon a constant of the code."""

    def __init__(self, size: int | None):
        super().__init__()
        self.weight = None if size is None else nn.Parameter(torch.randn(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)
        return y if self.weight is None else y * self.weight


@pytest.mark.parametrize("size", [16, None])
def test_foreign_layer_norms_are_recognised_by_what_they_compute(size: int | None) -> None:
    foreign = WritesItOut(size)
    ours = spnn.LayerNorm.from_torch(foreign)
    assert ours.eps == 1e-6 and ours.weight is foreign.weight and ours.bias is None
    x = torch.randn(3, 4, 16) / 500  # where epsilon decides
    torch.testing.assert_close(ours(x), foreign(x))


class MeanSubtracting(ForeignRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x - x.mean(-1, keepdim=True))


class Biased(ForeignRMSNorm):
    def __init__(self, size: int):
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


class OwnScale(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], 1 + self.weight, self.eps)


class OwnForward(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_foreign_modules_that_are_no_rms_norm_are_refused() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ValueError, match="MeanSubtracting does not compute RMSNorm"):
            spnn.RMSNorm.from_torch(MeanSubtracting(16).to(dtype))
        assert not spnn.RMSNorm.from_torch(ForeignRMSNorm(16).to(dtype)).zero_centered_weight
    with pytest.raises(ValueError, match="Biased computes neither RMSNorm"):
        spnn.RMSNorm.from_torch(Biased(16))
    assert spnn.RMSNorm.from_torch(OwnScale(16, eps=1e-6)).zero_centered_weight
    with pytest.raises(ValueError, match="OwnForward computes neither RMSNorm"):
        spnn.LayerNorm.from_torch(OwnForward(16))
    with pytest.raises(ValueError, match="ForeignRMSNorm computes neither RMSNorm"):
        spnn.RMSNorm.from_torch(ForeignRMSNorm(16, power=3))
    with pytest.raises(ValueError, match="Linear has \\['weight'\\]"):
        spnn.RMSNorm.from_torch(nn.Linear(4, 4, bias=False))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_dropout_add_norm(norm: str) -> None:
    module = spnn.DropoutAddNorm(16, p=0.5, norm=norm)  # type: ignore[arg-type]
    x, residual = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    _, z = module(x, residual)
    dropped = (z - residual) == 0
    assert 0.2 < dropped.float().mean() < 0.8
    torch.testing.assert_close((z - residual)[~dropped], 2 * x[~dropped], rtol=1e-4, atol=1e-5)
    module.eval().prenorm = False
    plain = nn.functional.layer_norm(x, (16,)) if norm == "layer" else nn.functional.rms_norm(x, (16,), eps=1e-5)
    torch.testing.assert_close(module(x), plain)
    twin = nn.LayerNorm(16) if norm == "layer" else nn.RMSNorm(16)
    assert spnn.DropoutAddNorm.from_torch(twin, p=0.1).weight is twin.weight


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: spnn.LayerNorm(8, eps=0), "eps: expected a positive"),
        (lambda: spnn.LayerNorm((4, 8)), "normalized_shape: expected one positive size"),
        (lambda: spnn.DropoutAddNorm(8, p=-0.1), "p: expected a probability"),
        (lambda: spnn.DropoutAddNorm(8, norm="batch"), "norm: expected 'layer' or 'rms'"),  # type: ignore[arg-type]
        (lambda: spnn.ColumnParallelLinear.from_torch(nn.Conv1d(1, 1, 1)), "module: expected torch.nn.Linear"),
        (lambda: spnn.RowParallelLinear(0, 4), "in_features: expected a positive int, got 0"),
        (lambda: spnn.LayerNorm.from_torch(nn.Linear(2, 2)), "module: expected no parameter but a weight"),  # type: ignore[arg-type]
        (lambda: spnn.DropoutAddNorm("8"), "normalized_shape: expected one positive size"),  # type: ignore[arg-type]
        (lambda: spnn.ColumnParallelLinear(4, 8, sections=3), "out_features: expected a multiple of its 3 packed"),
    ],
)
def test_bad_arguments(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_linear_layers_on_one_rank_are_nn_linear() -> None:
    twin = nn.Linear(6, 8)
    x = torch.randn(2, 3, 6)
    for cls in (spnn.ColumnParallelLinear, spnn.RowParallelLinear):
        ours = cls.from_torch(twin)
        assert ours.weight is twin.weight and ours.bias is twin.bias
        torch.testing.assert_close(ours(x), twin(x))
        torch.manual_seed(0)
        expected = nn.Linear(6, 8)
        torch.manual_seed(0)
        fresh = cls(6, 8)
        assert fresh.state_dict().keys() == twin.state_dict().keys()
        torch.testing.assert_close(fresh.weight, expected.weight)


def layer_case(seq_dim: int, length: int) -> None:
    """norm -> column -> row -> dropout + add + norm, built from one seed, against torch.nn on the whole sequence."""
    g = group()
    t, rank = g.size(), g.rank()
    hidden, wide = 8, 4 * t
    torch.manual_seed(3)
    norm, up, down = nn.LayerNorm(hidden), nn.Linear(hidden, wide), nn.Linear(wide, hidden)
    last = nn.RMSNorm(hidden, eps=1e-5)
    for p in norm.parameters():
        nn.init.normal_(p)
    shape = [2, 2, hidden]
    shape[seq_dim] = length
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(shape)
    z = down(torch.tanh(up(norm(x)))) + x
    last(z).backward(grad)

    s_norm = spnn.LayerNorm.from_torch(copy.deepcopy(norm), g, seq_dim=seq_dim)
    s_up = spnn.ColumnParallelLinear.from_torch(up, g, seq_dim=seq_dim)
    s_down = spnn.RowParallelLinear.from_torch(down, g, seq_dim=seq_dim)
    s_last = spnn.DropoutAddNorm.from_torch(copy.deepcopy(last), g, p=0.0, seq_dim=seq_dim)
    for p in (*s_norm.parameters(), *s_last.parameters()):
        p.grad = None
    shard = x.detach().tensor_split(t, seq_dim)[rank].clone().requires_grad_()
    for _ in range(2):  # gradients accumulate
        out = s_down(torch.tanh(s_up(s_norm(shard, seq_len=length), seq_len=length)))
        y, _ = s_last(out, shard, seq_len=length)
        y.backward(grad.tensor_split(t, seq_dim)[rank])
    torch.testing.assert_close(shard.grad / 2, x.grad.tensor_split(t, seq_dim)[rank])
    torch.testing.assert_close(s_norm.weight.grad / 2, norm.weight.grad)
    torch.testing.assert_close(s_norm.bias.grad / 2, norm.bias.grad)
    torch.testing.assert_close(s_last.weight.grad / 2, last.weight.grad)
    torch.testing.assert_close(s_down.bias.grad / 2, down.bias.grad)
    torch.testing.assert_close(s_up.weight.grad / 2, up.weight.grad.chunk(t)[rank])
    torch.testing.assert_close(s_down.weight.grad / 2, down.weight.grad.chunk(t, 1)[rank])


@pytest.mark.parametrize("length", [8, 5])
@pytest.mark.parametrize("seq_dim", [0, 1], ids=["SBH", "BSH"])
def test_a_block_of_modules_equals_torch(world: World, seq_dim: int, length: int) -> None:
    world.run(layer_case, seq_dim, length)


def initial_case() -> None:
    """A run on t ranks starts from the weights of a run on one."""
    g = group()
    t, rank = g.size(), g.rank()
    for cls, dim in ((spnn.ColumnParallelLinear, 0), (spnn.RowParallelLinear, 1)):
        torch.manual_seed(5)
        whole = cls(4 * t, 4 * t)
        torch.manual_seed(5)
        part = cls(4 * t, 4 * t, group=g)
        assert torch.equal(part.weight, whole.weight.chunk(t, dim)[rank])
        assert torch.equal(spnn.full_tensor(part.weight, part.sharded["weight"], g), whole.weight)
    with pytest.raises(ValueError, match="out_features: expected its size to be a multiple"):
        spnn.ColumnParallelLinear(4, 4 * t + 1, group=g)
    with pytest.raises(ValueError, match="in_features: expected its size to be a multiple"):
        spnn.RowParallelLinear(4 * t + 1, 4, group=g)
    full = torch.arange(6 * t).view(6 * t, 1)
    spec = spnn.ShardSpec(0, 3)
    local = spnn.local_part(full, spec, g)
    assert local.flatten().tolist() == [s * 2 * t + rank * 2 + i for s in range(3) for i in range(2)]
    assert torch.equal(spnn.full_tensor(local.float(), spec, g), full.float())


def test_initialisation_and_sharding(world: World) -> None:
    world.run(initial_case)


def dropout_case(seq_dim: int) -> None:
    g = group()
    x = torch.ones(2, 6, 8) if seq_dim == 1 else torch.ones(6, 2, 8)
    torch.manual_seed(4)
    whole = spnn.Dropout(0.5, seq_dim=seq_dim)(x)
    torch.manual_seed(4)
    module = spnn.Dropout.from_torch(nn.Dropout(0.5), g, seq_dim=seq_dim)
    part = module(x.tensor_split(g.size(), seq_dim)[g.rank()], seq_len=6)
    assert torch.equal(part, whole.tensor_split(g.size(), seq_dim)[g.rank()])
    assert torch.equal(module.eval()(part), part)


@pytest.mark.parametrize("seq_dim", [0, 1])
def test_dropout_mask_is_the_same_on_any_number_of_ranks(world: World, seq_dim: int) -> None:
    world.run(dropout_case, seq_dim)


def seeds_case() -> None:
    import os

    g = group()
    x = torch.ones(2, 4, 8)
    os.environ["SEQPAR_DEBUG"] = "1"
    try:
        torch.manual_seed(1)
        spnn.Dropout(0.5, group=g)(x)
        torch.manual_seed(g.rank())
        with pytest.raises(RuntimeError, match="seed: the ranks of a group must draw the same dropout seeds"):
            spnn.Dropout(0.5, group=g)(x)
    finally:
        del os.environ["SEQPAR_DEBUG"]


def half_debugged_case() -> None:
    """Only rank 0 compares seeds."""
    import os

    g = dist.new_group(list(range(group().size())))  # where nothing has been agreed on yet
    x, weight = torch.ones(2, 4, 8), torch.ones(8, 8)
    if g.rank() == 0:
        os.environ["SEQPAR_DEBUG"] = "1"
    try:
        with pytest.raises(RuntimeError, match=r"the ranks disagree, nothing was sent: .*SEQPAR_DEBUG=1"):
            spnn.Dropout(0.5, group=g)(x)
        with pytest.raises(RuntimeError, match=r"the ranks disagree, nothing was sent: .*SEQPAR_DEBUG=1"):
            linear_reduce_scatter_dropout_add_norm(x, weight, norm="rms", norm_weight=torch.ones(8), p=0.5, group=g)
    finally:
        os.environ.pop("SEQPAR_DEBUG", None)


def test_seeds_compared_by_some_ranks_alone_are_an_error(world2: World) -> None:
    world2.run(half_debugged_case)


def test_debug_check_finds_ranks_seeded_differently(world2: World) -> None:
    world2.run(seeds_case)
