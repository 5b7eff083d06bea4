import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seqpar_kernels.layout import SequenceShard, resolve_group, row_map, shard_of
from seqpar_kernels.random import as_seed, draw_seed


@given(st.integers(0, 200), st.integers(1, 9))
def test_shards_are_those_of_tensor_split(length: int, ranks: int) -> None:
    parts = torch.arange(length).tensor_split(ranks)
    for rank, part in enumerate(parts):
        shard = SequenceShard(length, ranks, rank)
        assert (shard.size, shard.stop - shard.start) == (len(part), len(part))
        assert part.tolist() == list(range(shard.start, shard.stop))


@given(
    st.lists(st.integers(1, 5), min_size=0, max_size=2),
    st.integers(1, 11),
    st.lists(st.integers(1, 4), max_size=2),
    st.integers(1, 4),
)
def test_row_map_counts_rows_of_the_unsharded_tensor(lead: list[int], length: int, tail: list[int], ranks: int) -> None:
    seq_dim = len(lead)
    shape = (*lead, length, *tail)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    for rank, part in enumerate(numbers.tensor_split(ranks, seq_dim)):
        shard = SequenceShard(length, ranks, rank)
        block, stride, offset = row_map(torch.Size((*part.shape, 8)), seq_dim, shard)
        local = torch.arange(part.numel())
        rows = local // max(block, 1) * stride + local % max(block, 1) + offset
        assert rows.tolist() == part.flatten().tolist()


def test_shard_of_names_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"x: rank 0 of 1 holds 3 rows, but its shard of seq_len=4 has 4"):
        shard_of("x", 3, None, 4)


def test_group_of_the_wrong_kind() -> None:
    assert resolve_group(None) is None
    with pytest.raises(ValueError, match="group: expected a ProcessGroup, a 1-D DeviceMesh or None, got str"):
        resolve_group("tp")  # type: ignore[arg-type]


def test_seeds_follow_the_default_generator() -> None:
    device = torch.device("cpu")
    torch.manual_seed(7)
    first, second = draw_seed(device), draw_seed(device)
    torch.manual_seed(7)
    assert draw_seed(device) == first != second
    assert first.dtype == torch.int64 and first.dim() == 0


@pytest.mark.parametrize("value", [0, 5, 2**63 - 1, -(2**63), 2**64 - 1])
def test_seed_keeps_all_64_bits(value: int) -> None:
    assert int(as_seed(value, torch.device("cpu"))) % 2**64 == value % 2**64


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1, torch.tensor([1]), torch.tensor(1.0)])
def test_wrong_seed_values(value: object) -> None:
    with pytest.raises(ValueError, match="seed: expected"):
        as_seed(value, torch.device("cpu"))  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1.5, "1", True])
def test_wrong_seed_types(value: object) -> None:
    with pytest.raises(ValueError, match="seed: expected an int"):
        as_seed(value, torch.device("cpu"))  # type: ignore[arg-type]
