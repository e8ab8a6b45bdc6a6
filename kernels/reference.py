"""The slow twin of every kernel, in plain torch: expand to dense, multiply, accumulate half types in fp32.

It runs on every device and is what a machine without a compiler uses; the fast kernels are tested against it. A pruned
weight counts as 0.0 here, so an x that holds inf or NaN spreads NaN to every output, as in the masked dense model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.formats.csr import INDEX_DTYPES, VALUE_DTYPES, csr_to_dense


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the half types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_csr_call(
    x: Tensor, values: Tensor, col_idx: Tensor, row_ptr: Tensor, bias: Tensor | None, in_features: int
) -> None:
    """Raises KernelError when the arguments of csr_linear do not fit each other; never looks at contents."""
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise KernelError(f"csr_linear: x must be [..., in_features={in_features}], got {list(x.shape)}")
    if values.dtype not in VALUE_DTYPES:
        raise KernelError(f"csr_linear: values must be float32, bfloat16, float16 or float64, got {values.dtype}")
    if x.dtype != values.dtype:
        raise KernelError(
            f"csr_linear: x must have the dtype of the weights, {values.dtype}, got {x.dtype}; convert x, or the model "
            f"before compiling it, model.to({x.dtype}), and leave torch.autocast off, which changes x and not packed weights"
        )
    if col_idx.dtype not in INDEX_DTYPES.values() or row_ptr.dtype != torch.int32:
        raise KernelError(
            f"csr_linear: col_idx must be int16 or int32 and row_ptr int32, got {col_idx.dtype} and {row_ptr.dtype}"
        )
    if values.ndim != 1 or col_idx.shape != values.shape or row_ptr.ndim != 1 or row_ptr.shape[0] < 1:
        raise KernelError(
            "csr_linear: values and col_idx must be [nnz] and row_ptr [out_features + 1], "
            f"got {list(values.shape)}, {list(col_idx.shape)} and {list(row_ptr.shape)}"
        )
    if not x.device == values.device == col_idx.device == row_ptr.device:
        raise KernelError(
            f"csr_linear: x and the packed weight must be on one device, got {x.device} and {values.device}; "
            "move the model with .to(device)"
        )
    out_features = row_ptr.shape[0] - 1
    if bias is not None and (bias.dtype != values.dtype or tuple(bias.shape) != (out_features,)):
        raise KernelError(
            f"csr_linear: bias must be {values.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}"
        )


def csr_linear_reference(
    x: Tensor, values: Tensor, col_idx: Tensor, row_ptr: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """x [..., in] @ W.T + bias -> [..., out], W [out, in] in CSR."""
    check_csr_call(x, values, col_idx, row_ptr, bias, in_features)
    wide = accumulation_dtype(x.dtype)
    weight = csr_to_dense(values.to(wide), col_idx, row_ptr, in_features)
    # Flat and not [..., in]: a matmul with a batch of zero-sized matrices takes other paths.
    tokens = math.prod(x.shape[:-1])
    out = x.reshape(tokens, in_features).to(wide) @ weight.t()
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(x.dtype).reshape(*x.shape[:-1], row_ptr.shape[0] - 1)


def tolerance(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bound [..., out] (fp64) on the error of x @ weight.T + bias, whatever the order of summation.

    A sum of k products in a type of unit roundoff u errs by at most k*u/(1-k*u) * sum|x||w| (Higham, Accuracy and
    Stability, section 3.1); k counts the bias. Rounding the sum to the result's type adds half an ulp, below eps * sum.
    """
    k = weight.shape[1] + 1
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        size = size + bias.double().abs()
    summing = k * torch.finfo(accumulation_dtype(x.dtype)).eps / 2
    # The smallest subnormal covers results that underflow.
    return size * (summing / (1 - summing) + torch.finfo(x.dtype).eps) + torch.finfo(x.dtype).smallest_normal * k
