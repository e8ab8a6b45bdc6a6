"""Derivatives of a product with a packed matrix: each kind that torch has is right, or refused; none is zero in silence.

`backward()`, and through it double backward, is written out here, since it is what training asks for. Forward mode and the
transforms of torch.func (grad, jvp, vmap, jacrev, hessian, in any order) take the product in torch's own operators, over the
dense matrix: torch knows their derivatives, and such calls are rare. Under `vmap` with x alone mapped the operator goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsec import private
from sparsec.errors import KernelError
from sparsec.formats.base import Packed
from sparsec.kernels.reference import accumulation_dtype
from sparsec.private import OpOverload, pytree

Argument = Tensor | int | None
Split = Callable[[Sequence[Argument]], tuple[Packed, Tensor | None]]
"""From what an operator takes after x to the packed matrix and the bias."""

_transforms = private.peek_interpreter_stack


def transformed() -> bool:
    """Whether derivatives may be asked for that torch.no_grad() does not turn off: forward mode, or a transform of torch.func."""
    return forward_ad._current_level >= 0 or _transforms() is not None


def wants_gradient(tensor: Tensor) -> bool:
    """Whether any derivative with respect to a tensor is asked for here."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def refuse_constants(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises KernelError where a derivative with respect to packed tensors is asked for."""
    if any(t.is_floating_point() and wants_gradient(t) for t in tensors):
        raise KernelError(
            f"{name}: packed values are constants and have no gradient; call requires_grad_(False) on them, "
            "or train before lowering"
        )


def without_derivatives(library: torch.library.Library, op: OpOverload) -> None:
    """Makes an operator that is for compiled graphs, where autograd is done, refuse every derivative with a KernelError.

    Compiled graphs that ask for none pass this by (sparsec/inductor): in Python it would cost 5 us a call.
    """

    def check(*args: Any) -> Any:
        if (torch.is_grad_enabled() or transformed()) and (
            _transforms() is not None
            or any(wants_gradient(t) for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
        ):
            raise refused()
        with private.below_autograd():
            return op(*args)

    def mapped(info: Any, in_dims: Any, *args: Any) -> Any:
        raise refused()

    def refused() -> KernelError:
        return KernelError(
            f"{op._opname}: has no derivative and no torch.vmap, it is for compiled graphs where autograd is done; call it "
            "under torch.no_grad() and outside of torch.func, or leave torch.compile away"
        )

    torch.library.impl(library, op._opname, "Autograd")(check)
    torch.library.register_vmap(f"sparsec::{op._opname}", mapped, lib=library)


def product_gradients(grad: Tensor, packed: Packed, of_x: bool, of_bias: bool) -> tuple[Tensor | None, Tensor | None]:
    """Gradients [..., in] of x and [out] of bias, from the result's [..., out], where asked for."""
    wide = accumulation_dtype(grad.dtype)
    out_features, in_features = packed.shape
    flat = grad.reshape(math.prod(grad.shape[:-1]), out_features).to(wide)
    grad_x = grad_bias = None
    if of_x:
        grad_x = (flat @ packed.exact().to(wide)).to(grad.dtype).reshape(*grad.shape[:-1], in_features)
    if of_bias:
        grad_bias = flat.sum(0).to(grad.dtype)
    return grad_x, grad_bias


class Product(torch.autograd.Function):
    """x times a packed matrix, for `backward()`. Linear in x and bias, so that its gradient can be derived again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, op: OpOverload, split: Split, args: Sequence[Argument]
    ) -> Tensor:
        tensors = [a for a in args if isinstance(a, Tensor) and a is not bias]
        ctx.save_for_backward(*tensors)
        ctx.rest, ctx.split = [None if isinstance(a, Tensor) else a for a in args], split
        with private.below_autograd():
            out: Tensor = op(x, *args)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        packed, _ = ctx.split([*saved, *ctx.rest[len(saved) :]])
        return (*product_gradients(grad, packed, *ctx.needs_input_grad[:2]), None, None, None)


def mapped(op: Callable[..., Tensor], size: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Tensor, int]:
    """torch.vmap of an operator that takes x [..., in] first: one call where x alone is mapped, else one call a place."""
    if all(d is None for d in in_dims[1:]):
        return op(args[0].movedim(in_dims[0], 0), *args[1:]), 0
    outs = [op(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(size)]
    return torch.stack(outs), 0
