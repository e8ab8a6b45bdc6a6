"""The operator `dense_linear`: x @ weight.T + bias with a plain weight [out, in], by a kernel of our own where there is one.

Why: at one row torch's product of half types is slow, on small layers most of all. The reference is torch's own
product, and so are the gradients.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec import private
from sparsec.errors import KernelError
from sparsec.kernels.autocast import DEVICES
from sparsec.kernels.derivatives import mapped, transformed
from sparsec.kernels.library import loader
from sparsec.kernels.ops import LIBRARY, loads_native
from sparsec.kernels.reference import check_operands, check_x
from sparsec.private import OpOverload

NAME = "dense_linear"

LIBRARY.define(  # type: ignore[no-untyped-call]
    f"{NAME}(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
dense_linear: OpOverload = torch.ops.sparsec.dense_linear.default


@functools.cache
def native_serves(name: str) -> bool:
    """Whether the native library implements the operator `sparsec::name`; loads it, and may build it, at the first call."""
    return loader.status().built and loader.has_native(name)


def check_dense_call(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raises KernelError when the arguments do not fit each other."""
    if weight.ndim != 2 or not weight.is_contiguous():
        raise KernelError(
            f"{NAME}: weight must be a matrix [out, in] stored row by row, got shape {list(weight.shape)} with strides "
            f"{list(weight.stride())}; call .contiguous() on it"
        )
    check_x(NAME, x, weight.shape[1])
    check_operands(NAME, x, (weight.dtype, weight.device), bias, weight.shape[0])


def _implementation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if loads_native(x, NAME):
        out: Tensor = dense_linear(x, weight, bias)
        return out
    check_dense_call(x, weight, bias)
    return F.linear(x, weight, bias)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    check_dense_call(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _with_gradients(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Derivatives of every kind, for x, weight and bias alike, by being torch's own product wherever one is asked for."""
    if transformed() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))):
        check_dense_call(x, weight, bias)
        return F.linear(x, weight, bias)
    with private.below_autograd():
        out: Tensor = dense_linear(x, weight, bias)
    return out


torch.library.impl(LIBRARY, NAME, "CompositeExplicitAutograd")(_implementation)
torch.library.impl(LIBRARY, NAME, "Autograd")(_with_gradients)
torch.library.register_fake(f"sparsec::{NAME}", _fake, lib=LIBRARY)
for _key in DEVICES.values():  # torch's own product knows what to cast
    torch.library.impl(LIBRARY, NAME, _key)(F.linear)
torch.library.register_vmap(
    f"sparsec::{NAME}", lambda info, dims, *args: mapped(dense_linear, info.batch_size, dims, args), lib=LIBRARY
)
