"""What ``bench memory`` counts: bytes that autograd keeps for one transformer layer, beside the paper's formula.

Two kinds of layers: ``nn.TransformerLayer`` with its fusions switched on one after the other, beside plain torch
whole, tensor-parallel and as Megatron keeps it; and Hugging Face models before and after ``parallelize``, whose bytes
are those of two layers less those of one, so that embedding, head and loss drop out. Each storage counts once,
parameters not at all. Attention never stores its scores here (PyTorch's fused kernel): the paper's "selective" row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import facts, layer, layer_rank
from .errors import BenchError, missing
from .ranks import run_ranks
from .report import number, table
from .schema import Row
from .session import Session

VOCABULARY = 64
MODELS = ("gpt2", "llama", "gemma3", "qwen3", "olmo2")
ALL_KEPT = "ours, recompute none"


@dataclass(frozen=True)
class Sizes:
    """Sequence, batch, hidden, heads: the paper's letters."""

    s: int
    b: int
    h: int
    a: int
    dtype: str


def hugging_face(kind: str, sizes: Sizes, layers: int, dropout: float) -> nn.Module:
    """Random weights; GPT-2 with PyTorch's fused GELU, which keeps one tensor like the paper's (its own keeps six)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    ends: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    config: Any
    if kind == "gpt2":
        config = GPT2Config(
            n_positions=sizes.s,
            n_embd=sizes.h,
            n_layer=layers,
            n_head=sizes.a,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",
            **ends,
        )
    else:
        config = AutoConfig.for_model(
            {"gemma3": "gemma3_text"}.get(kind, kind),
            head_dim=sizes.h // sizes.a,
            pad_token_id=0,
            max_position_embeddings=sizes.s,
            hidden_size=sizes.h,
            intermediate_size=sizes.h * 8 // 3 // 16 * 16,
            num_hidden_layers=layers,
            num_attention_heads=sizes.a,
            num_key_value_heads=sizes.a,
            **ends,
        )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(facts.DTYPES[sizes.dtype]).train()


Builder = Callable[[str, Sizes, int, float, Any], nn.Module]


def _plain(kind: str, sizes: Sizes, layers: int, dropout: float, group: Any) -> nn.Module:
    return hugging_face(kind, sizes, layers, dropout)


def _ours(kind: str, sizes: Sizes, layers: int, dropout: float, group: Any, recompute: str = "auto") -> nn.Module:
    from seqpar_kernels import parallelize

    return parallelize(hugging_face(kind, sizes, layers, dropout), group, recompute=recompute)


REGIMES: dict[str, Builder] = {
    "hugging-face": _plain,
    ALL_KEPT: partial(_ours, recompute="none"),
    "ours": _ours,
}


def _loss(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


def layer_bytes(regime: str, kind: str, sizes: Sizes, group: Any) -> dict[str, Any]:
    """Bytes of one layer on this rank, by module, and the loss without dropout."""
    from seqpar_kernels import activation_bytes

    ids = torch.randint(VOCABULARY, (sizes.b, sizes.s), generator=torch.Generator().manual_seed(1))
    totals, parts = [], []
    for layers in (1, 2):
        model = REGIMES[regime](kind, sizes, layers, 0.1, group)
        report = activation_bytes(lambda model=model: _loss(model, ids))
        report.result.backward()
        totals.append(report.total)
        parts.append(report.by_module)
    by_module = {name: size - parts[0].get(name, 0) for name, size in parts[1].items()}
    calm = REGIMES[regime](kind, sizes, 1, 0.0, group)
    return {
        "bytes": totals[1] - totals[0],
        "by_module": {name: size for name, size in by_module.items() if size > 0},
        "loss": _loss(calm, ids).item(),
    }


def on_rank(job: dict[str, Any], group: dist.ProcessGroup, step: Callable[[str], None]) -> dict[str, Any]:
    """The entry point of each rank."""
    return layer_bytes(job["regime"], job["kind"], Sizes(**job["sizes"]), group)


def paper_rows(sizes: Sizes, t: int) -> dict[str, float]:
    from seqpar_kernels.memory import paper_bytes_per_layer

    s, b, h, a = sizes.s, sizes.b, sizes.h, sizes.a
    return {
        "paper: unsharded, selective": paper_bytes_per_layer(s, b, h, a, selective=True),
        "paper: TP, selective": paper_bytes_per_layer(s, b, h, a, t, selective=True),
        "paper: TP+SP, selective": paper_bytes_per_layer(s, b, h, a, t, sequence_parallel=True, selective=True),
    }


def run(session: Session, sizes: Sizes, ranks: int) -> list[Row]:
    """All regimes of all layers; returns the rows added.

    Raises:
        BenchError: sizes that do not fit.
    """
    if sizes.h % sizes.a or (sizes.h // sizes.a) % 2:
        raise BenchError(f"--hidden {sizes.h}: expected an even multiple of --heads {sizes.a}")
    if sizes.a % ranks:
        raise BenchError(f"--heads {sizes.a}: expected a multiple of --ranks {ranks}")
    first = len(session.rows)
    _run_layers(session, sizes, ranks)
    reason = missing("transformers", "hf")
    if reason is not None:
        session.add(Row(op="memory.gpt2", provider="hugging-face", status="absent", reason=reason))
    else:
        _run_models(session, sizes, ranks)
    return session.rows[first:]


def _run_layers(session: Session, sizes: Sizes, ranks: int) -> None:
    """Every regime of both layers, each checked against fp64."""
    cases = {
        kind: layer.make_case(kind, sizes.s, sizes.b, sizes.h, sizes.a, ranks, sizes.dtype, 0.1)
        for kind in ("gpt", "llama")
    }
    job = {"cases": {kind: asdict(case) for kind, case in cases.items()}}
    answers: dict[int, list[Any]] = {}
    counts = sorted({1, ranks})
    session.progress.plan(len(counts))
    for t in counts:
        session.progress.step(f"memory of layers on {t} ranks")
        alone = t == 1
        answers[t] = (
            [layer_rank.count(job, None, lambda text: None)] if alone else run_ranks(".layer_rank:count", job, t)
        )
    for kind in cases:
        for t, of_rank in answers.items():
            for name in of_rank[0][kind]:
                on_ranks = [answer[kind][name] for answer in of_rank]
                row = _row(f"{kind}_layer", name, sizes, t, max(answer["bytes"] for answer in on_ranks))
                row.metrics["error"] = round(max(answer["error"] for answer in on_ranks), 3)
                wrong = next((answer["wrong"] for answer in on_ranks if answer["wrong"]), "")
                if wrong:
                    row.status, row.reason = "wrong", wrong
                session.add(row)
        if kind == "gpt":
            for name, size in paper_rows(sizes, ranks).items():
                session.add(_row("gpt_layer", name, sizes, 1 if "unsharded" in name else ranks, size))


def _run_models(session: Session, sizes: Sizes, ranks: int) -> None:
    """Hugging Face's layers, before and after ``parallelize``."""
    session.progress.plan(4 * len(MODELS))
    for kind in MODELS:
        oracle = _double_loss(kind, sizes)
        runs = [("hugging-face", 1), ("ours", 1), (ALL_KEPT, ranks), ("ours", ranks)]
        reference = None
        for regime, t in runs:
            session.progress.step(f"memory {kind} {regime} {t} ranks")
            job = {"regime": regime, "kind": kind, "sizes": asdict(sizes)}
            found = run_ranks(".memory_kept:on_rank", job, t) if t > 1 else [layer_bytes(regime, kind, sizes, None)]
            reference = found[0]["loss"] if reference is None else reference
            _add(session, kind, regime, sizes, t, found, (reference, oracle))


def _double_loss(kind: str, sizes: Sizes) -> float:
    ids = torch.randint(VOCABULARY, (sizes.b, sizes.s), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return _loss(hugging_face(kind, sizes, 1, 0.0).double(), ids).item()


def _row(kind: str, provider: str, sizes: Sizes, t: int, size: float) -> Row:
    unit = sizes.s * sizes.b * sizes.h / t
    return Row(
        op=f"memory.{kind}",
        provider=provider,
        shape=[sizes.s, sizes.b, sizes.h, sizes.a],
        dtype=sizes.dtype,
        ranks=t,
        bytes=round(size),
        metrics={"sbh_over_t": round(size / unit, 2)},
    )


def _add(
    session: Session, kind: str, regime: str, sizes: Sizes, t: int, found: list[Any], losses: tuple[float, float]
) -> None:
    """The most of any rank; wrong where the loss is not the unsharded model's."""
    reference, oracle = losses
    row = _row(kind, regime, sizes, t, max(answer["bytes"] for answer in found))
    row.metrics["by_module"] = found[0]["by_module"]
    budget = 2 * (abs(reference - oracle) + torch.finfo(facts.DTYPES[sizes.dtype]).eps * abs(oracle))
    error = max(abs(answer["loss"] - oracle) for answer in found)
    if not error <= budget:
        row.status, row.reason = "wrong", f"the loss errs by {error:.2e} where {budget:.2e} is allowed"
    session.add(row)


def show(rows: list[Row]) -> None:
    """Bytes of a rank and units of sbh/t."""
    lines = []
    for row in rows:
        if row.bytes is None:
            print(f"absent: {row.op} {row.provider}: {row.reason}")
            continue
        parts = sorted(row.metrics.get("by_module", {}).items(), key=lambda item: -item[1])[:3]
        unit = (row.bytes or 0) / row.metrics["sbh_over_t"] if row.metrics["sbh_over_t"] else 1
        most = ", ".join(f"{name.rsplit('.', 1)[-1]} {size / unit:.1f}" for name, size in parts)
        remark = f"{row.status}: {row.reason}" if row.status != "ok" else most
        if row.status == "ok" and "error" in row.metrics:
            remark = f"gradients err {row.metrics['error']} times as much as plain torch's"
        figures = [f"{row.bytes:,}", number(row.metrics["sbh_over_t"], 4)]
        lines.append([row.op.removeprefix("memory."), row.provider, str(row.ranks), *figures, remark])
    s, b, h, a = rows[0].shape
    title = f"bytes kept for one layer: s={s} b={b} h={h} a={a} {rows[0].dtype}, dropout 0.1"
    table(title, ["layer", "who", "ranks", "bytes a rank", "sbh/t", "most of it"], lines, left=2)
