"""The operator `fused_linear`: several products with the same x in one call, each matrix in a format of its own.

Why: on a small layer the call and the waking of the threads are the cost, and one parallel region serves all parts. The
reference calls each part's own operator, and so do the gradients: fusing changes who computes, never what.

`inference_linear` is the same without gradients, whatever is asked for: for compiled graphs, where autograd is done by then, and
where the way through an autograd function in Python would cost 10 us a call. `inference_single` is that of one part; its result
is no list, since torch 2.13's C++ wrapper for compiled graphs crashes on lists of one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsec import private
from sparsec.formats.parts import DENSE, Part, in_library, part_formats, unflatten
from sparsec.formats.seen import look_at
from sparsec.kernels.autocast import DEVICES
from sparsec.kernels.dense import dense_linear
from sparsec.kernels.derivatives import mapped, transformed, without_derivatives
from sparsec.kernels.ops import LIBRARY, loads_native, operator_of, packed_and_bias
from sparsec.kernels.registry import foreign
from sparsec.private import OpOverload

NAME = "fused_linear"
INFERENCE = "inference_linear"
SINGLE = "inference_single"

for _name, _result in ((NAME, "Tensor[]"), (INFERENCE, "Tensor[]"), (SINGLE, "Tensor")):
    LIBRARY.define(  # type: ignore[no-untyped-call]
        f"{_name}(Tensor x, Tensor[] tensors, int[] layout) -> {_result}", tags=(torch.Tag.pt2_compliant_tag,)
    )
fused_linear: OpOverload = torch.ops.sparsec.fused_linear.default
inference_linear: OpOverload = torch.ops.sparsec.inference_linear.default
inference_single: OpOverload = torch.ops.sparsec.inference_single.default


def part_operator(part: Part[Tensor]) -> OpOverload:
    """The operator that computes one part by itself."""
    return dense_linear if part.format == DENSE else operator_of(part.format)


def alone(format_name: str) -> bool:
    """Whether a part of this format computes by itself on a CPU: the native library does not know it, or would pass by another
    package's kernel."""
    return not in_library(format_name) or foreign(format_name, "cpu")


def _separately(x: Tensor, tensors: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor]:
    return [part_operator(part)(x, *part.arguments) for part in unflatten(tensors, layout)]


def _implementation(op: OpOverload, x: Tensor, tensors: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor]:
    if loads_native(x, op._opname):
        out: list[Tensor] = op(x, tensors, layout)
        return out
    return _separately(x, tensors, layout)


def _single(x: Tensor, tensors: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    if loads_native(x, SINGLE):
        out: Tensor = inference_single(x, tensors, layout)
        return out
    (out,) = _separately(x, tensors, layout)
    return out


def _with_gradients(x: Tensor, tensors: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor]:
    """Each part's own gradients: x and bias of a packed part, the weight too of a dense one."""
    if transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))):
        return _separately(x, tensors, layout)
    for part in unflatten(tensors, layout):
        if part.format != DENSE:
            look_at(packed_and_bias(part.format, part.arguments)[0], NAME, sizes=False)
    with private.below_autograd():
        out: list[Tensor] = fused_linear(x, tensors, layout)
    return out


def _whole_or_apart(x: Tensor, tensors: Sequence[Tensor], layout: Sequence[int]) -> list[Tensor]:
    """In one call of the native library, where it is the one that multiplies by every part."""
    if not x.is_cpu or any(alone(name) for name in part_formats(tuple(layout))):
        return _separately(x, tensors, layout)
    out: list[Tensor] = inference_linear(x, tensors, layout)
    return out


def _mapped(
    info: Any, in_dims: Any, x: Tensor, tensors: Sequence[Tensor], layout: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """torch.vmap: that of each part's own operator."""
    x_dim, dims = in_dims[:2]
    dims = dims if isinstance(dims, (list, tuple)) else [dims] * len(tensors)
    outs = []
    for part, own in zip(unflatten(tensors, layout), unflatten(dims, layout), strict=True):
        own_dims = (x_dim, *own.tensors, own.bias, *[None] * len(part.scalars))
        outs.append(mapped(part_operator(part), info.batch_size, own_dims, (x, *part.arguments))[0])
    return tuple(outs), (0,) * len(outs)


for _op in (fused_linear, inference_linear):
    torch.library.impl(LIBRARY, _op._opname, "CompositeExplicitAutograd")(partial(_implementation, _op))
    torch.library.register_fake(f"sparsec::{_op._opname}", _separately, lib=LIBRARY)
for _key in DEVICES.values():
    torch.library.impl(LIBRARY, NAME, _key)(_separately)
torch.library.impl(LIBRARY, SINGLE, "CompositeExplicitAutograd")(_single)
torch.library.register_fake(f"sparsec::{SINGLE}", _single, lib=LIBRARY)
torch.library.impl(LIBRARY, NAME, "Autograd")(_with_gradients)
torch.library.impl(LIBRARY, NAME, "BackendSelect")(_whole_or_apart)
torch.library.register_vmap(f"sparsec::{NAME}", _mapped, lib=LIBRARY)
for _op in (inference_linear, inference_single):
    without_derivatives(LIBRARY, _op)
