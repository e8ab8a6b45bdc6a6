"""The operators: schema, shape rule and gradient of every format, defined once, whatever machine executes them.

The implementation for every device asks the table of kernels (registry.py); the native library, once it is loaded, replaces it on
the CPU. So a graph holds the same operator names with and without a compiler. All formats follow one rule: operator
`<format>_linear` takes `(x, *packed.tensors().values(), bias, *packed.scalars().values())`, and everything here is made from that.

Derivatives are for x and bias. Packed values are constants: a call whose values ask for a gradient is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from sparsec import private
from sparsec.arguments import checked
from sparsec.errors import KernelError
from sparsec.formats import kinds
from sparsec.formats.base import Packed
from sparsec.formats.seen import look_at
from sparsec.kernels import autocast
from sparsec.kernels.derivatives import Argument, Product, mapped, refuse_constants, transformed
from sparsec.kernels.library import loader
from sparsec.kernels.reference import check_call, reference_linear
from sparsec.kernels.registry import added_to, dispatch, foreign
from sparsec.private import OpOverload

# Operators live as long as the library object.
LIBRARY = torch.library.Library("sparsec", "DEF")  # type: ignore[no-untyped-call]


@checked
def operator(packed: Packed) -> OpOverload:
    """The operator that multiplies by a packed matrix. KernelError for a format without one."""
    return operator_of(packed.format)


def operator_of(format_name: str) -> OpOverload:
    """That of a format; the first question about a format that a package offers defines it."""
    if format_name not in OPERATORS:
        if format_name not in kinds():
            raise KernelError(f"format {format_name!r} has no operator; those with one: {', '.join(OPERATORS)}")
        OPERATORS[format_name] = _define(kinds()[format_name])
    if foreign(format_name, "cpu"):
        _ask_table(format_name)
    return OPERATORS[format_name]


def _by_table(format_name: str, x: Tensor, *args: Argument) -> Tensor:
    """What an operator does: the product by the kernel that the table names."""
    return dispatch(x, *packed_and_bias(format_name, args))


@functools.cache
def _ask_table(format_name: str) -> None:
    """From now on the table is asked at every call on a CPU too, before the native library."""

    torch.library.impl(LIBRARY, f"{format_name}_linear", "BackendSelect")(partial(_by_table, format_name))


@checked
def operator_args(packed: Packed, bias: Tensor | None) -> tuple[Argument, ...]:
    """What the operator takes after x."""
    return (*packed.tensors().values(), bias, *packed.scalars().values())


def packed_and_bias(format_name: str, args: Sequence[Argument]) -> tuple[Packed, Tensor | None]:
    """The inverse of `operator_args`; does not check."""
    kind = kinds()[format_name]
    at = len(kind.tensor_names)
    tensors = dict(zip(kind.tensor_names, cast(Sequence[Tensor], args[:at]), strict=True))
    scalars = dict(zip(kind.scalar_names, cast(Sequence[int], args[at + 1 :]), strict=True))
    return kind.from_parts(tensors, scalars), cast(Tensor | None, args[at])


def explain(format_name: str, error: RuntimeError, x: Tensor, args: Sequence[Argument]) -> None:
    """Raises KernelError where an operator failed because it refused its arguments; does nothing for other failures.

    The native library can only throw a RuntimeError that names its own source file; the reference's check says it better.
    """
    if isinstance(error, KernelError):
        return
    check_call(x, *packed_and_bias(format_name, args))
    before, name, reason = str(error).partition(f"{format_name}_linear: ")
    if name and "\n" not in before:
        raise KernelError(name + reason.partition("\n")[0])


def loads_native(x: Tensor, name: str) -> bool:
    """Whether this first call on a CPU brought a native implementation, which is then the one to call."""
    # Without the last question an operator that the library lacks would call itself for ever.
    return x.device.type == "cpu" and not loader.was_asked() and loader.status().built and loader.has_native(name)


def schema_of(kind: type[Packed]) -> tuple[str, str]:
    """A format's tensors and its scalars, as the schemas of its operators list them after the first argument."""
    return "".join(f", Tensor {n}" for n in kind.tensor_names), "".join(f", int {n}" for n in kind.scalar_names)


def _define(kind: type[Packed]) -> OpOverload:
    """Schema, reference, shape rule and gradient of one format's operator."""
    name = f"{kind.format}_linear"
    tensors, scalars = schema_of(kind)
    LIBRARY.define(  # type: ignore[no-untyped-call]
        f"{name}(Tensor x{tensors}, Tensor? bias{scalars}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )
    op: OpOverload = getattr(torch.ops.sparsec, name).default
    bias_at = len(kind.tensor_names) + 1  # from x on

    implementation = partial(_by_table, kind.format)

    def fake(x: Tensor, *args: Argument) -> Tensor:
        packed, bias = packed_and_bias(kind.format, args)
        check_call(x, packed, bias)
        return x.new_empty((*x.shape[:-1], packed.shape[0]))

    split = partial(packed_and_bias, kind.format)

    def with_derivatives(x: Tensor, *args: Argument) -> Tensor:
        *held, bias = cast(Sequence[Tensor], args[:bias_at])
        refuse_constants(name, held)
        look_at(split(args)[0], name, sizes=False)
        if transformed():
            return reference_linear(x, *split(args))
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias)):
            out: Tensor = Product.apply(x, bias, op, split, args)  # type: ignore[no-untyped-call]
            return out
        with private.below_autograd():
            return cast(Tensor, op(x, *args))

    torch.library.impl(LIBRARY, name, "CompositeExplicitAutograd")(implementation)
    torch.library.impl(LIBRARY, name, "CUDA")(implementation)
    torch.library.register_fake(f"sparsec::{name}", fake, lib=LIBRARY)
    autocast.follow(LIBRARY, name, op)
    torch.library.impl(LIBRARY, name, "Autograd")(with_derivatives)
    torch.library.register_vmap(
        f"sparsec::{name}", lambda info, dims, *args: mapped(op, info.batch_size, dims, args), lib=LIBRARY
    )
    return op


OPERATORS: dict[str, OpOverload] = {name: _define(kind) for name, kind in kinds().items()}
"""By the format's name."""


def _follow(format_name: str) -> None:
    if format_name in OPERATORS:
        operator_of(format_name)


added_to.append(_follow)
