"""Hugging Face decoders by the plans they carry: a fixed few of what ``bench coverage --models`` examines in full."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from seqpar_kernels.convert.hf.plan_from_config import PROVEN

from ..world import World

pytest.importorskip("transformers")

from bench.coverage_models import PAGE, examine, row

#: One of each kind of difficulty.
FEW: list[tuple[str, dict[str, Any]]] = [
    ("cohere", {"use_qk_norm": True}),  # parallel blocks, LayerNorm without bias, per-head norm weights
    ("gemma4_text", {}),  # zero-centred and post-norms, an argument with a row for each position
    ("gpt_neox", {}),  # fused interleaved q/k/v, LayerNorm with bias, partial rotary
    ("granite_swa", {}),  # attention sinks: a parameter entry for each head
    ("hrm_text", {}),  # two stacks, each called several times, partly without gradients
    ("minicpm3", {}),  # latent attention
    ("olmo2", {}),  # q/k norms across all heads
    ("phi3", {}),  # packed q|k|v of unequal sections, packed gate|up
    ("qwen3_5_text", {}),  # linear attention runs whole
    ("mixtral", {}),  # experts
    ("llama4_text", {}),  # experts that take scaled rows of all tokens for each of them
]


def model_case(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "options": options, **examine(kind, options, dist.group.WORLD)}


@pytest.mark.parametrize(("kind", "options"), FEW, ids=[kind for kind, _ in FEW])
def test_the_page_says_what_is_so(world2: World, kind: str, options: dict[str, Any]) -> None:
    results = world2.run(model_case, kind, options)
    assert [row(result) for result in results] == [row(results[0])] * 2
    assert row(results[0]) in PAGE.read_text().splitlines()


@pytest.mark.parametrize(
    ("kind", "options", "remark"),
    [
        ("llama", {}, ""),  # two key/value heads on four ranks
        ("granite_swa", {}, ""),
        ("cohere", {"use_qk_norm": True}, "what its k_norm does between colwise and rowwise is not known"),
        ("olmo2", {}, "k_norm normalizes over heads that are fewer than ranks"),
    ],
)
def test_fewer_key_value_heads_than_ranks(world4: World, kind: str, options: dict[str, Any], remark: str) -> None:
    for result in world4.run(model_case, kind, options):
        assert (
            result["status"] == "right" and result["reason"].endswith(remark) and bool(result["reason"]) == bool(remark)
        )


def test_proven_architectures_are_those_of_the_page() -> None:
    rows = [line.split("|")[1:3] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    plain = {name.strip(): result.strip() for name, result in rows if "(" not in name}
    assert {name for name, result in plain.items() if result == "right"} == PROVEN
    assert "wrong" not in plain.values()
