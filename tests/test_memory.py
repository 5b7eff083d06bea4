"""Counting what autograd keeps."""

from __future__ import annotations

import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import seqpar_kernels as sp
from seqpar_kernels.memory import paper_bytes_per_layer


def test_each_storage_counts_once_and_parameters_do_not() -> None:
    x = torch.randn(4, 8)
    linear = nn.Linear(8, 16)
    report = sp.activation_bytes(lambda x: linear(x).exp().sum(), x)  # keeps x and exp's output
    assert report.total == x.nbytes + 4 * 16 * 4
    report = sp.activation_bytes(lambda: (lambda h: (h * h).sum() + (h.t() * 2.0).sin().sum())(linear(x).relu()))
    assert report.total == x.nbytes + 2 * 4 * 16 * 4  # x, relu's output (kept by three), the argument of sin


def test_fused_norm_keeps_z_and_statistics_only() -> None:
    x, r = (torch.randn(6, 32, requires_grad=True) for _ in range(2))
    w, b = torch.ones(32, requires_grad=True), torch.zeros(32, requires_grad=True)
    report = sp.activation_bytes(sp.dropout_add_layer_norm, x, r, w, b, p=0.1)
    w_bytes = w.nbytes + b.nbytes  # no Parameters, so they count
    assert report.total == 6 * 32 * 4 + 2 * 6 * 4 + 8 + w_bytes  # z, mean and rstd, the seed
    report = sp.activation_bytes(sp.dropout_add_layer_norm, x, None, w, b)
    assert report.total == x.nbytes + 2 * 6 * 4 + w_bytes


def test_by_module() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    report = sp.activation_bytes(lambda: model(torch.randn(2, 8)).sum())
    assert sum(report.by_module.values()) == report.total == 2 * 2 * 8 * 4
    assert set(report.by_module) == {"Sequential.Linear", "Sequential.Tanh"}
    assert "total" in str(report)
    report.result.backward()


def test_subclasses_count_what_they_wrap() -> None:
    """Parameters of parallelized models are DTensors, which have no storage of their own."""
    inner = torch.randn(4, 8)
    wrapped = TwoTensor(inner, inner.clone())
    module = nn.Module()
    module.weight = nn.Parameter(wrapped)
    module.forward = lambda x: (x * module.weight).sum()  # type: ignore[method-assign]
    x = torch.randn(4, 8, requires_grad=True)
    report = sp.activation_bytes(module, x)
    assert report.total == x.nbytes  # the weight's two parts are a parameter's
    report = sp.activation_bytes(lambda x: (x * wrapped).sum(), x)
    assert report.total == 2 * inner.nbytes


def test_paper_formula() -> None:
    """Table 2 of Korthikanti et al. 2022, for the 22B model: s=2048, b=4, h=6144, a=64, t=8."""
    s, b, h, a, t = 2048, 4, 6144, 64, 8
    sbh = s * b * h
    assert paper_bytes_per_layer(s, b, h, a) == sbh * (34 + 5 * a * s / h)
    assert paper_bytes_per_layer(s, b, h, a, t) == sbh * (10 + 24 / t + 5 * a * s / (h * t))
    assert paper_bytes_per_layer(s, b, h, a, t, sequence_parallel=True, selective=True) == sbh * 34 / t


def test_buffers_do_not_count_and_the_paper_stands_beside() -> None:
    norm = nn.BatchNorm1d(8).eval()
    x = torch.randn(4, 8, requires_grad=True)
    plain = sp.activation_bytes(norm, x)
    assert plain.total == x.nbytes
    text = plain.beside_paper(4, 1, 8, 2, t=2, layers=1)
    assert "measured" in text and "paper, 16 bit: TP + SP + selective" in text and "34.0 sbh/t" in text
