"""One block of attention with every option by name: the kernels, the fp64 reference and plain PyTorch on the same
inputs."""

import math

import torch
import torch.nn.functional as F

from seqpar_kernels.kernels import attention_reference as reference
from seqpar_kernels.kernels.attention_spec import AttentionMasks, AttentionSpec
from seqpar_kernels.kernels.spec import dropout_scale

from .norm_cases import BF16, EPS, F16, F32, F64, within

DTYPES = [F32, BF16, F16, F64]
SEED = torch.tensor(-0x123456789ABCDEF)


def tensor(shape, dtype, generator, layout="rows"):
    """[B, S, H, D]: contiguous, a transpose of [B, H, S, D], or within wider memory that is full of NaN."""
    batch, rows, heads, cols = shape
    values = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
    if layout == "heads":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "wide":
        wide = torch.full((batch, rows + 2, heads + 1, cols + 3), float("nan"), dtype=dtype)
        wide[:, 1 : rows + 1, 1:, 2 : cols + 2] = values
        return wide[:, 1 : rows + 1, 1:, 2 : cols + 2]
    return values


class Case:
    """Inputs of one call, forward and backward."""

    def __init__(self, rows=(37, 53), heads=(4, 2), dims=(16, 16), dtype=F32, batch=2, layout="rows", **options):
        generator = torch.Generator().manual_seed(rows[0] * 131 + rows[1])
        self.dtype, self.wide = dtype, F64 if dtype == F64 else F32
        (q_rows, k_rows), (q_heads, kv_heads), (head_dim, value_dim) = rows, heads, dims
        self.q = tensor((batch, q_rows, q_heads, head_dim), dtype, generator, layout)
        self.k = tensor((batch, k_rows, kv_heads, head_dim), dtype, generator, layout)
        self.v = tensor((batch, k_rows, kv_heads, value_dim), dtype, generator, layout)
        self.dout = tensor((batch, q_rows, q_heads, value_dim), dtype, generator, layout)
        self.dlse = None
        if options.pop("dlse", False):
            self.dlse = torch.randn(batch, q_heads, q_rows, generator=generator, dtype=F64).to(self.wide)
        names = set(AttentionMasks._fields) & options.keys()
        self.masks = AttentionMasks(**{name: options.pop(name) for name in names})
        whole = dict(all_heads=q_heads, all_rows=max(q_rows, k_rows) + 64)
        self.spec = AttentionSpec(**{"scale": head_dim**-0.5, **whole, **options})

    def forward(self, backend, **options):
        return backend.attention_forward(self.q, self.k, self.v, self.spec, self.masks, **options)

    def backward(self, backend, out, lse, **options):
        inputs = (self.dout, self.q, self.k, self.v, out, lse, self.spec, self.masks)
        return backend.attention_backward(*inputs, dlse=self.dlse, **options)

    def to(self, device):
        """The same numbers there."""
        case = object.__new__(Case)
        case.__dict__.update(self.__dict__)
        for name in ("q", "k", "v", "dout", "dlse"):
            value = getattr(self, name)
            setattr(case, name, None if value is None else value.to(device))
        case.masks = AttentionMasks(*(None if t is None else t.to(device) for t in self.masks))
        return case

    def as_fp64(self):
        """The same numbers in fp64."""
        case = object.__new__(Case)
        case.__dict__.update(self.__dict__)
        case.dtype = case.wide = F64
        for name in ("q", "k", "v", "dout", "dlse"):
            value = getattr(self, name)
            setattr(case, name, None if value is None else value.double())
        if self.masks.bias is not None:
            case.masks = self.masks._replace(bias=self.masks.bias.double())
        return case

    def plain(self):
        """out, lse, dq, dk, dv of PyTorch in the same dtype: SDPA where it can, else operation by operation."""
        q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in (self.q, self.k, self.v))
        keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        see = reference.seen(self.spec, self.masks, q.shape[2], k.shape[2], q.device)
        see = see.expand(q.shape[0], q.shape[1], -1, -1)
        bias = torch.zeros(see.shape, dtype=q.dtype, device=q.device)
        if self.masks.bias is not None:
            bias = bias + self.masks.bias.to(q.dtype)
        bias = bias.masked_fill(~see, -math.inf)

        def scores(queries, keys):
            s = queries @ keys.transpose(-1, -2) * self.spec.scale
            if self.spec.softcap > 0:
                s = torch.tanh(s / self.spec.softcap) * self.spec.softcap
            return s + bias.to(s.dtype)

        lse = torch.logsumexp(scores(q.to(self.wide), keys.to(self.wide)), -1)
        if self.spec.softcap > 0 or self.masks.seed is not None or self.dlse is not None:
            weights = torch.softmax(scores(q, keys), -1).masked_fill(~see, 0)
            if self.masks.seed is not None:
                kept = reference.kept(self.spec, self.masks, tuple(see.shape), q.device)
                weights = torch.where(kept, weights * dropout_scale(self.spec.p), 0)
            out = weights @ values
        else:
            # Padded to one width, so that PyTorch takes its flash kernel, which makes the weights again as ours does.
            width = max(q.shape[-1], v.shape[-1])
            padded = (F.pad(t, (0, width - t.shape[-1])) for t in (q, keys, values))
            out = F.scaled_dot_product_attention(*padded, bias, scale=self.spec.scale)[..., : v.shape[-1]]
        blind = ~see.any(-1)
        results, upstream = [out], [self.dout.transpose(1, 2).masked_fill(blind[..., None], 0)]
        if self.dlse is not None:
            results, upstream = [out, lse], [*upstream, self.dlse.masked_fill(blind, 0)]
        grads = torch.autograd.grad(results, (q, k, v), upstream)
        back = [t.detach().nan_to_num(0).transpose(1, 2) for t in (out, *grads)]
        return back[0], lse.detach(), *back[1:]


def finite(lse):
    return lse.masked_fill(lse == -math.inf, 0)


def check(case, backend):
    """out, lse, dq, dk, dv: at most twice the error of PyTorch in the same dtype, plus one rounding."""
    out, lse, _ = case.forward(backend)
    exact = case.as_fp64()
    true_out, true_lse, _ = exact.forward(reference)
    blind = true_lse == -math.inf
    assert torch.equal(lse == -math.inf, blind), "rows that see no key"
    assert not out.transpose(1, 2)[blind].any()
    if case.dlse is not None:  # a row that sees no key has no lse to take a gradient of
        case.dlse, exact.dlse = case.dlse.masked_fill(blind, 0), exact.dlse.masked_fill(blind, 0)
    grads = case.backward(backend, out, lse)
    true = exact.backward(reference, true_out, true_lse)
    plain_out, plain_lse, *plain_grads = case.plain()
    within("out", out, true_out, plain_out.double() - true_out, case.dtype, 1.0)
    plain_lse = torch.where(blind, 0, plain_lse.double() - true_lse).nan_to_num(0)
    within("lse", finite(lse), finite(true_lse), plain_lse, case.wide, 1.0)
    # A weight is exp(score - lse): in fp64, where nothing is wider, it carries the rounding of both.
    magnitude = 16.0 if case.dtype == F64 else 4.0
    for name, got, want, plain in zip(("dq", "dk", "dv"), grads, true, plain_grads):
        within(name, got, want, plain.double() - want, case.dtype, magnitude)
    return out, lse, grads


def zigzag(rank, ranks, chunk):
    """Positions that a rank holds in zigzag layout, 2 * chunk of them."""
    return torch.cat([torch.arange(i * chunk, (i + 1) * chunk) for i in (rank, 2 * ranks - 1 - rank)])


__all__ = ["BF16", "DTYPES", "EPS", "F16", "F32", "F64", "SEED", "Case", "check", "finite", "tensor", "zigzag"]
