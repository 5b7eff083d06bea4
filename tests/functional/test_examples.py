"""The examples in the docstrings of attention over shards run and give what they say."""

from __future__ import annotations

import doctest

import pytest

import seqpar_kernels as sp

NAMES = (
    "PackingPlan",
    "SequenceParallelAttention",
    "SequenceShardedCache",
    "decode_attention",
    "degree_groups",
    "merge_attention",
    "next_token_labels",
    "pack_documents",
    "packed_attention",
    "sequence_parallel_attention",
    "sequence_positions",
    "shard_sequence",
    "unshard_sequence",
)


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    examples = doctest.DocTestFinder(recurse=False).find(getattr(sp, name), name, globs={})
    assert sum(len(example.examples) for example in examples) > 1
    for example in examples:
        assert doctest.DocTestRunner().run(example).failed == 0
