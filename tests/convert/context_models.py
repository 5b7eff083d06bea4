"""Small Transformers models over a shared sequence, beside the unsharded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import seqpar_kernels as sp
from seqpar_kernels.convert import conversion_of

pytest.importorskip("transformers")

from bench.zoo import small_model

VOCAB = 128  # of the zoo's
#: What the zoo leaves large.
SMALL: dict[str, dict[str, Any]] = {"gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}}
#: Units of a tensor's largest value. Rounding of fp32 gives about 1e-6, a lost mask or sum 1e-2 and more.
TOLERANCE = 2e-5


def plain_model(kind: str, options: dict[str, Any] | None = None) -> Any:
    """The unsharded model; eager attention honours all that an architecture has (SDPA drops Gemma 2's cap)."""
    model: Any = small_model(kind, {**SMALL.get(kind, {}), **(options or {})})
    model.config._attn_implementation = "eager"
    return model


def batch(rows: int = 2, length: int = 13, pad: bool = False, seed: int = 2) -> dict[str, Tensor]:
    """With ``pad`` the first entry is padded on the left, the second on the right.

    The row before the first token sees no key: eager attention makes of it what no other implementation makes, so
    that token is no label.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    if not pad:
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[1:, -2:] = 0
    labels = ids.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def mesh_of(cp: int, tp: int) -> Any:
    return init_device_mesh("cpu", (cp, tp), mesh_dim_names=("cp", "tp"))


def shared(kind: str, options: dict[str, Any] | None = None, *, mesh: Any = None, **context: Any) -> Any:
    """The same model over all ranks."""
    model = small_model(kind, {**SMALL.get(kind, {}), **(options or {})})
    where = dist.group.WORLD if mesh is None else mesh
    return sp.parallelize(model, where, **{"context_parallel": "auto", **context})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.grad for name, param in model.named_parameters() if param.grad is not None}


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return (got - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)


def assert_alike(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    errors = {name: difference(got[name], value) for name, value in expected.items()}
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not bad, bad


def assert_trains_alike(
    plain: Any, model: Any, given: dict[str, Tensor], times: int = 1, mine: dict[str, Tensor] | None = None
) -> None:
    """Loss, this rank's logits, and every gradient after ``times`` backwards."""
    seen = given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    context = conversion_of(model).context
    for _ in range(times):
        expected = plain(**given, use_cache=False)
        got = model(**(mine or given))
        whole = context.whole(got.logits)
        assert got.logits.shape[1] <= -(-whole.shape[1] // context.ranks)
        assert difference(whole[seen], expected.logits[seen]) <= TOLERANCE
        assert difference(got.loss, expected.loss) <= TOLERANCE
        expected.loss.backward()
        got.loss.backward()
    assert_alike(sp.gather_full_gradients(model), gradients(plain))
