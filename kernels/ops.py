"""The operators: schema, shape rule and gradient, defined once, whatever machine executes them.

The reference is the implementation for every device; the native library replaces it on the CPU when it is loaded. So a
graph holds the same operator names with and without a compiler. All formats follow one rule: the arguments are
`(x, *packed.tensors().values(), bias, *packed.scalars().values())`.

Gradients are for x and bias. Packed values are constants: a call whose values ask for a gradient is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from sparsec.errors import KernelError
from sparsec.formats.base import Packed
from sparsec.formats.csr import csr_to_dense
from sparsec.kernels import loader
from sparsec.kernels.reference import accumulation_dtype, check_csr_call, csr_linear_reference

# Operators live as long as the library object.
LIBRARY = torch.library.Library("sparsec", "DEF")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "csr_linear(Tensor x, Tensor values, Tensor col_idx, Tensor row_ptr, Tensor? bias, int in_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
csr_linear: OpOverload = torch.ops.sparsec.csr_linear.default

OPERATORS: dict[str, OpOverload] = {"csr": csr_linear}
"""By the format's name."""

CHECKS: dict[str, Callable[..., None]] = {"csr": check_csr_call}
"""By the format's name: takes the operator's arguments and raises KernelError when they do not fit each other."""


def operator(packed: Packed) -> OpOverload:
    """The operator that multiplies by a packed matrix. KernelError for a format without one."""
    try:
        return OPERATORS[packed.format]
    except KeyError:
        raise KernelError(f"format {packed.format!r} has no operator; those with one: {', '.join(OPERATORS)}") from None


def operator_args(packed: Packed, bias: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """What the operator takes after x."""
    return (*packed.tensors().values(), bias, *packed.scalars().values())


def explain(format_name: str, error: RuntimeError, x: Tensor, args: Sequence[Tensor | int | None]) -> None:
    """Raises KernelError where an operator failed because it refused its arguments; does nothing for other failures.

    The native library can only throw a RuntimeError that names its own source file; the reference's check says it better.
    """
    if isinstance(error, KernelError):
        return
    CHECKS[format_name](x, *args)
    before, name, reason = str(error).partition(f"{format_name}_linear: ")
    if name and "\n" not in before:
        raise KernelError(name + reason.partition("\n")[0])


def _implementation(
    x: Tensor, values: Tensor, col_idx: Tensor, row_ptr: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """Serves every device; the first call on a CPU loads the native library, whose implementation then takes its place."""
    if x.device.type == "cpu" and not loader.asked() and loader.status().built:
        out: Tensor = csr_linear(x, values, col_idx, row_ptr, bias, in_features)
        return out
    return csr_linear_reference(x, values, col_idx, row_ptr, bias, in_features)


def _fake(x: Tensor, values: Tensor, col_idx: Tensor, row_ptr: Tensor, bias: Tensor | None, in_features: int) -> Tensor:
    check_csr_call(x, values, col_idx, row_ptr, bias, in_features)
    return x.new_empty((*x.shape[:-1], row_ptr.shape[0] - 1))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, values, col_idx, row_ptr, _bias, in_features = inputs
    if ctx.needs_input_grad[1]:
        raise KernelError(
            "csr_linear: packed values are constants and have no gradient; call requires_grad_(False) on them, "
            "or train before lowering"
        )
    ctx.save_for_backward(values, col_idx, row_ptr)
    ctx.in_features = in_features


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, col_idx, row_ptr = ctx.saved_tensors
    wide = accumulation_dtype(grad.dtype)
    out_features = row_ptr.shape[0] - 1
    flat = grad.reshape(math.prod(grad.shape[:-1]), out_features).to(wide)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = csr_to_dense(values.to(wide), col_idx, row_ptr, ctx.in_features)
        grad_x = (flat @ weight).to(grad.dtype).reshape(*grad.shape[:-1], ctx.in_features)
    if ctx.needs_input_grad[4]:
        grad_bias = flat.sum(0).to(grad.dtype)
    return grad_x, None, None, None, grad_bias, None


torch.library.impl(LIBRARY, "csr_linear", "CompositeExplicitAutograd")(_implementation)
torch.library.register_fake("sparsec::csr_linear", _fake, lib=LIBRARY)
torch.library.register_autograd("sparsec::csr_linear", _backward, setup_context=_setup_context, lib=LIBRARY)
