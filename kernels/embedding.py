"""The operators of a table that is packed: `<format>_embedding` gives the rows of token ids, and expands no others.

As every product they are made from what a format says of itself: `(ids, *packed.tensors().values(), *packed.scalars().values())`.
The table is a constant and ids have no derivative, so there is none; a table that asks for one is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sparsec import private
from sparsec.errors import KernelError
from sparsec.formats import kinds
from sparsec.formats.base import Packed
from sparsec.formats.seen import look_at
from sparsec.kernels.derivatives import Argument, mapped, refuse_constants, transformed
from sparsec.kernels.ops import LIBRARY, packed_and_bias, schema_of
from sparsec.private import OpOverload

NOWHERE = 1 << 40
"""A row that no table has: devices that tell of no bad id without waiting stop at it."""


def embedding_operator(packed: Packed) -> OpOverload:
    """The operator that looks rows of a packed matrix up."""
    return _operator_of(packed.format)


def embedding_args(packed: Packed) -> tuple[Argument, ...]:
    """What it takes after the ids."""
    return (*packed.tensors().values(), *packed.scalars().values())


def look_up(ids: Tensor, packed: Packed) -> Tensor:
    """Rows [..., in_features] of ids [...], int32 or int64. KernelError for other ids; IndexError for one that no row has, which on
    other devices than a CPU is found by the device."""
    check_ids(ids, packed)
    rows, columns = packed.shape
    flat = ids.reshape(-1).long()
    if ids.device.type != "cpu":
        flat = torch.where((flat < 0) | (flat >= rows), NOWHERE, flat)
    elif flat.numel():
        low, high = (int(end) for end in torch.aminmax(flat))
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise IndexError(f"{packed.format}_embedding: ids must lie from 0 to {rows - 1}, the last row, got {wrong}")
    return packed.rows(flat).view(*ids.shape, columns)


def check_ids(ids: Tensor, packed: Packed) -> None:
    """Raises KernelError for ids of a type or on a device that cannot be; looks at no contents."""
    name = f"{packed.format}_embedding"
    if ids.dtype not in (torch.int32, torch.int64):
        raise KernelError(f"{name}: ids must be int32 or int64, got {ids.dtype}; convert them with .long()")
    if ids.device != packed.values.device:
        raise KernelError(
            f"{name}: ids and the table must be on one device, got {ids.device} and {packed.values.device}; move the ids with "
            ".to(device)"
        )


def _split(format_name: str, args: Sequence[Argument]) -> Packed:
    at = len(kinds()[format_name].tensor_names)
    return packed_and_bias(format_name, (*args[:at], None, *args[at:]))[0]


@functools.cache
def _operator_of(format_name: str) -> OpOverload:
    """Schema, rows, shape rule and what is refused of one format's operator."""
    kind = kinds()[format_name]
    name = f"{format_name}_embedding"
    tensors, scalars = schema_of(kind)
    LIBRARY.define(  # type: ignore[no-untyped-call]
        f"{name}(Tensor ids{tensors}{scalars}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
    )
    op: OpOverload = getattr(torch.ops.sparsec, name).default

    def rows(ids: Tensor, *args: Argument) -> Tensor:
        return look_up(ids, _split(format_name, args))

    def fake(ids: Tensor, *args: Argument) -> Tensor:
        packed = _split(format_name, args)
        check_ids(ids, packed)
        if faults := packed.layout_faults():
            raise KernelError(f"{name}: {'; '.join(faults)}; pack the matrix again from its dense weight")
        return packed.values.new_empty((*ids.shape, packed.shape[1]), dtype=packed.dtype)

    def with_derivatives(ids: Tensor, *args: Argument) -> Tensor:
        refuse_constants(name, cast(Sequence[Tensor], args[: len(kind.tensor_names)]))
        look_at(_split(format_name, args), name)
        if transformed():
            return rows(ids, *args)
        with private.below_autograd():
            return cast(Tensor, op(ids, *args))

    torch.library.impl(LIBRARY, name, "CompositeExplicitAutograd")(rows)
    torch.library.register_fake(f"sparsec::{name}", fake, lib=LIBRARY)
    torch.library.impl(LIBRARY, name, "Autograd")(with_derivatives)
    torch.library.register_vmap(
        f"sparsec::{name}", lambda info, dims, *args: mapped(op, info.batch_size, dims, args), lib=LIBRARY
    )
    return op


EMBEDDINGS: dict[str, OpOverload] = {name: _operator_of(name) for name in kinds()}
"""Those of sparsec's own formats, by the format's name; another package's has one from its first table on."""
