"""A weight gradient that is added to a buffer of a wider dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# The number of rows widened at a time on devices without a matmul from 16-bit factors to float32.
_ROWS_WIDENED = 1024


def add_weight_gradient(main_grad: Tensor, dy: Tensor, x: Tensor) -> None:
    """main_grad [N, K] += dy.T @ x for dy [rows, N], x [rows, K]; products and sums in main_grad's dtype."""
    if main_grad.dtype == x.dtype:
        main_grad.addmm_(dy.t(), x)
    elif x.is_cuda and "dtype_out" in torch.ops.aten.addmm.overloads():  # one kernel: 16-bit in, float32 in place
        torch.ops.aten.addmm.dtype_out(main_grad, dy.t(), x, main_grad.dtype, out=main_grad)
    else:
        for dy_rows, x_rows in zip(dy.split(_ROWS_WIDENED), x.split(_ROWS_WIDENED), strict=True):
            main_grad.addmm_(dy_rows.to(main_grad.dtype).t(), x_rows.to(main_grad.dtype))
