"""``bench coverage --models``: every architecture with a tensor-parallel plan, sharded, beside the unsharded model."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import seqpar_kernels as sp
from seqpar_kernels.convert import conversion_of

from .report import table
from .zoo import VARIANTS, architectures, small_model

BATCH, LENGTH = 2, 13  # a length that does not divide
TOLERANCE = 1e-3  # largest difference, in units of the tensor's largest value; a lost sum over ranks gives about 1
PAGE = Path(__file__).resolve().parent.parent / "docs" / "models.md"

Result = dict[str, Any]


def batch() -> dict[str, Tensor]:
    """The second row is padded at its end, and its labels there are ignored."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 128, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def run(model: nn.Module) -> dict[str, Tensor]:
    """Logits and loss; the gradients are in the parameters."""
    out = model(**batch(), use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach(), "loss": out.loss.detach()}


def difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return (got - expected).abs().max().item() / max(expected.abs().max().item(), 1e-6)


def examine(kind: str, options: dict[str, Any], group: Any) -> Result:
    """``status`` is right, refused (by ``parallelize`` or the check of the first forward), wrong, or not run."""
    try:
        whole = small_model(kind, options)
        expected = run(whole)
    except Exception as error:
        return {"status": "not run", "reason": f"the small unsharded model fails: {_text(error)}"}
    expected |= {name: param.grad for name, param in whole.named_parameters() if param.grad is not None}
    found = compare(kind, options, group, expected, "auto")
    if found["status"] == "right" and found.pop("mixture", False):  # divided the other way too
        other = compare(kind, options, group, expected, "tp")
        found = {**found, "error": max(found["error"], other["error"])} if other["status"] == "right" else other
    return found


def compare(kind: str, options: dict[str, Any], group: Any, expected: dict[str, Tensor], experts: str) -> Result:
    """One conversion beside what the unsharded model gave."""
    model = small_model(kind, options)
    try:
        sp.parallelize(model, group, experts=experts)
        got = run(model)
    except Exception as error:
        return {"status": "refused", "reason": _text(error).removeprefix("plan: ")}
    got |= sp.gather_full_gradients(model)
    if got.keys() != expected.keys():
        return {
            "status": "wrong",
            "reason": f"gradients missing or not expected: {sorted(got.keys() ^ expected.keys())}",
        }
    errors = {name: difference(got[name], value) for name, value in expected.items()}
    bad = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
    if bad:
        return {"status": "wrong", "reason": ", ".join(bad[:6])}
    remarks = [f"{name} {why}" for name, why in conversion_of(model).plan.remarks.items()]
    found = {"status": "right", "reason": "; ".join(remarks), "error": max(errors.values())}
    return found | {"mixture": bool(conversion_of(model).expert_forms)}


def _text(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def cases(kinds: list[str] | None = None) -> list[tuple[str, dict[str, Any]]]:
    """(architecture, options) of every row."""
    return [(kind, options) for kind in kinds or architectures() for options in ({}, *VARIANTS.get(kind, ()))]


def on_rank(job: dict[str, Any], group: Any, step: Any) -> list[Result]:
    """Rank 0's view; every rank computes the same."""
    torch.set_num_threads(1)
    out = []
    for kind, options in job["cases"]:
        step(label(kind, options))
        out.append({"kind": kind, "options": options, **examine(kind, options, group)})
    return out


def label(kind: str, options: dict[str, Any]) -> str:
    return kind + (f" ({', '.join(f'{name}={value}' for name, value in options.items())})" if options else "")


def row(result: Result) -> str:
    """A line of the page. Rounding differs between machines, so no figure is in it."""
    reason = result["reason"].replace("|", "\\|")
    return f"| {label(result['kind'], result['options'])} | {result['status']} | {reason} |"


def write_page(results: list[Result], ranks: int, path: Path = PAGE) -> None:
    count = {status: sum(r["status"] == status for r in results) for status in ("right", "refused", "wrong", "not run")}
    version = importlib.metadata.version("transformers")
    text = f"""# Which Hugging Face models `parallelize` converts

Every architecture of transformers {version} whose configuration carries a tensor-parallel plan, and GPT-2: a small
random instance in fp32 on {ranks} ranks, {BATCH} x {LENGTH} tokens with padding, against the unsharded model. *Right*
means that logits, loss and the gradient of every parameter agree to {TOLERANCE:.0e} of the tensor's largest value.
*Refused* means that `parallelize`, or the check in the first forward, raises this error before any training step.
Written by `python -m bench coverage --models`; do not edit.

{count["right"]} right, {count["refused"]} refused, {count["wrong"]} wrong, {count["not run"]} not run.

| architecture | result | remark or reason |
|---|---|---|
"""
    path.write_text(text + "\n".join(map(row, results)) + "\n")


def show(results: list[Result], ranks: int) -> None:
    lines = [[label(r["kind"], r["options"]), r["status"], r["reason"]] for r in results]
    table(f"Hugging Face models on {ranks} ranks", ["architecture", "result", "remark or reason"], lines, left=3)
