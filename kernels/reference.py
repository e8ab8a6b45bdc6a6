"""The slow twin of every kernel, in plain torch: expand to dense, multiply, accumulate half types in fp32.

It runs on every device and is what a machine without a compiler uses; the fast kernels are tested against it. A pruned
weight counts as 0.0 here, so an x that holds inf or NaN spreads NaN to every output, as in the masked dense model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.arguments import checked, shown
from sparsec.errors import KernelError
from sparsec.formats.base import Packed
from sparsec.formats.quantised import Quantised


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the half types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def check_call(x: Tensor, packed: Packed, bias: Tensor | None) -> None:
    """Raises KernelError when the arguments of a product do not fit each other; never looks at contents."""
    name = f"{packed.format}_linear"
    out_features, in_features = packed.shape
    check_x(name, x, in_features)
    faults = packed.layout_faults()
    if faults:
        raise KernelError(f"{name}: {'; '.join(faults)}; pack the matrix again from its dense weight")
    check_operands(name, x, (packed.dtype, packed.values.device), bias, out_features)


def check_x(name: str, x: Tensor, in_features: int) -> None:
    """Raises KernelError unless x is a dense tensor [..., in_features]."""
    if not isinstance(x, Tensor):
        raise KernelError(f"{name}: x must be a Tensor [..., in_features={in_features}], got {shown(x)}")
    if x.layout != torch.strided:
        raise KernelError(f"{name}: x must be dense, got {x.layout}; use .to_dense()")
    if x.ndim == 0 or x.shape[-1] != in_features:
        raise KernelError(f"{name}: x must be [..., in_features={in_features}], got {list(x.shape)}")


def check_operands(
    name: str, x: Tensor, weight: tuple[torch.dtype, torch.device], bias: Tensor | None, out_features: int
) -> None:
    """Raises KernelError unless x and bias have the dtype and the device of the weight, and bias its size."""
    dtype, device = weight
    if x.dtype != dtype:
        raise KernelError(
            f"{name}: x must have the dtype of the weights, {dtype}, got {x.dtype}; convert x, or the model "
            f"before compiling it, model.to({x.dtype}); under torch.autocast x is converted by itself"
        )
    if x.device != device:
        raise KernelError(
            f"{name}: x and the packed weight must be on one device, got {x.device} and {device}; "
            "move the model with .to(device)"
        )
    if bias is None:
        return
    if bias.dtype != dtype or tuple(bias.shape) != (out_features,):
        raise KernelError(f"{name}: bias must be {dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")
    if bias.device != device:
        raise KernelError(
            f"{name}: bias and the packed weight must be on one device, got {bias.device} and {device}; "
            "move the model with .to(device)"
        )


def reference_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x [..., in] @ W.T + bias -> [..., out], W [out, in] packed in any format."""
    check_call(x, packed, bias)
    return dense_product(x, packed.exact(), bias)


def dense_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight.T + bias -> [..., out], weight [out, in], summed in the accumulation type."""
    wide = accumulation_dtype(x.dtype)
    # Flat and not [..., in]: a matmul with a batch of zero-sized matrices takes other paths.
    tokens = math.prod(x.shape[:-1])
    out = x.reshape(tokens, weight.shape[1]).to(wide) @ weight.to(wide).t()
    if bias is not None:
        out = out + bias.to(wide)
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


@checked
def tolerance(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Bound [..., out] (fp64) on the error of x @ weight.T + bias, whatever the order of summation.

    A sum of k products in a type of unit roundoff u errs by at most k*u/(1-k*u) * sum|x||w| (Higham, Accuracy and
    Stability, section 3.1); k counts the bias. Rounding the sum to the result's type adds half an ulp, below eps * sum.
    """
    fits = weight.ndim == 2 and x.ndim > 0 and x.shape[-1] == weight.shape[1] and x.dtype.is_floating_point
    if not fits or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
        shapes = [f"{t.dtype} {list(t.shape)}" for t in (x, weight, bias) if t is not None]
        raise KernelError(f"tolerance: x [..., in], weight [out, in] and bias [out] must fit, got {', '.join(shapes)}")
    k = weight.shape[1] + 1
    size = x.double().abs() @ weight.double().abs().t()
    if bias is not None:
        size = size + bias.double().abs()
    summing = k * torch.finfo(accumulation_dtype(x.dtype)).eps / 2
    # The smallest subnormal covers results that underflow.
    return size * (summing / (1 - summing) + torch.finfo(x.dtype).eps) + torch.finfo(x.dtype).smallest_normal * k


DIGIT_MOST = {1: 63, 2: 8127, 3: 1040319}
"""The largest number that so many digits of seven bits hold, by their count."""


@checked
def product_tolerance(x: Tensor, packed: Packed, bias: Tensor | None = None) -> Tensor:
    """Bound [..., out] (fp64) on the error of a kernel's product with a packed matrix, against that with `packed.exact()`.

    Where kernels make digits of x half a unit of the last digit of each number of x is added: the largest of its group of columns
    over DIGIT_MOST, at most 64 columns of a group.
    """
    weight = packed.exact()
    bound = tolerance(x, weight, bias)
    if not isinstance(packed, Quantised) or not packed.by_digits:
        return bound
    columns = 32 if packed.group % 64 else 64
    size = F.pad(x.double().abs(), (0, -x.shape[-1] % columns))
    groups = size.reshape(*x.shape[:-1], size.shape[-1] // columns, columns).amax(-1)
    units: Tensor = (groups / DIGIT_MOST[packed.digits]).repeat_interleave(columns, -1)[..., : x.shape[-1]]
    size = units @ weight.double().abs().t()
    return bound + 0.51 * size  # a hundredth for the rounding of the scales
