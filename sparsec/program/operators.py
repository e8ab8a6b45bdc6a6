"""What each operator of a tape is in a program: operator -> a function of the writer and the call that gives its first result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsec.formats import kinds
from sparsec.formats.parts import DENSE, Part, tensor_count
from sparsec.kernels.chain import DTYPES
from sparsec.program.served import NotServedError
from sparsec.program.tape import Executed
from sparsec.program.writer import Seen, Writer, broadcast, view

Operator = Callable[[Writer, Executed], Seen | None]

FP32 = torch.float32


def _operand(w: Writer, value: Any) -> Seen | float:
    number = w.number(value)
    return w.seen(value) if number is None else number


def _binary(name: str) -> Operator:
    def write(w: Writer, call: Executed) -> Seen:
        result = call.results[0]
        a, b = (_operand(w, value) for value in call.args[:2])
        alpha = call.kwargs.get("alpha", 1)
        if set(call.kwargs) - {"alpha"} or len(call.args) > 2:
            raise NotServedError(f"{call.target} with {call.kwargs or call.args[2:]}")
        if alpha != 1:
            b = b * alpha if isinstance(b, float) else w.element("mul", FP32, b.shape, b, float(alpha))
        return w.element(name, result.dtype, result.shape, a, b)

    return write


def _reversed(w: Writer, call: Executed) -> Seen:
    result = call.results[0]
    if call.kwargs or len(call.args) > 2:
        raise NotServedError(f"{call.target} with {call.kwargs or call.args[2:]}")
    return w.element("sub", result.dtype, result.shape, _operand(w, call.args[1]), _operand(w, call.args[0]))


def _unary(name: str) -> Operator:
    def write(w: Writer, call: Executed) -> Seen:
        return w.element(name, call.results[0].dtype, call.results[0].shape, w.seen(call.args[0]))

    return write


def _power(w: Writer, call: Executed) -> Seen:
    x, exponent = w.seen(call.args[0]), call.args[1]
    dtype, shape = call.results[0].dtype, call.results[0].shape
    if exponent == 2:
        return w.element("mul", dtype, shape, x, x)
    if exponent == 3:
        return w.element("mul", dtype, shape, w.element("mul", FP32, shape, x, x), x)
    if exponent in (0.5, -0.5):
        return w.element("sqrt" if exponent > 0 else "rsqrt", dtype, shape, x)
    raise NotServedError(f"{call.target} with the exponent {exponent}")


def _mean(w: Writer, call: Executed) -> Seen:
    x = call.args[0]
    dims = [d % x.dim() for d in call.args[1]]
    if dims != [x.dim() - 1]:
        raise NotServedError(f"{call.target} of the dimensions {dims}")
    keep = bool(call.args[2]) if len(call.args) > 2 else False
    return w.reduce("mean", call.results[0].dtype, w.seen(x), keep)


def _silu(w: Writer, call: Executed) -> Seen:
    x, result = w.seen(call.args[0]), call.results[0]
    return w.element("mul", result.dtype, result.shape, x, w.element("sigmoid", FP32, result.shape, x))


def _gelu(w: Writer, call: Executed) -> Seen:
    """x (1 + erf(x / sqrt 2)) / 2, or with tanh in the place of erf, as torch defines them."""
    x, result = w.seen(call.args[0]), call.results[0]
    shape = result.shape
    how = call.kwargs.get("approximate", call.args[1] if len(call.args) > 1 else "none")
    if how == "tanh":
        cube = w.element("mul", FP32, shape, w.element("mul", FP32, shape, x, x), x)
        inner = w.element("add", FP32, shape, x, w.element("mul", FP32, shape, cube, 0.044715))
        part = w.element("tanh", FP32, shape, w.element("mul", FP32, shape, inner, math.sqrt(2 / math.pi)))
    else:
        part = w.element("erf", FP32, shape, w.element("mul", FP32, shape, x, math.sqrt(0.5)))
    half = w.element("mul", FP32, shape, x, 0.5)
    return w.element("mul", result.dtype, shape, half, w.element("add", FP32, shape, part, 1.0))


def _affine(w: Writer, x: Seen, scale: Tensor | None, shift: Tensor | None, dtype: torch.dtype) -> Seen:
    """x * scale + shift, rounded once."""
    last = FP32 if shift is not None else dtype
    if scale is not None:
        x = w.element("mul", last, x.shape, x, w.seen(scale))
    if shift is not None:
        x = w.element("add", dtype, x.shape, x, w.seen(shift))
    return w.element("copy", dtype, x.shape, x) if x.dtype != dtype else x


def _layer_norm(w: Writer, call: Executed) -> Seen:
    given, shape, scale, shift, eps = call.args
    if len(shape) != 1:
        raise NotServedError(f"{call.target} of {len(shape)} dimensions")
    x = w.seen(given)
    centred = w.element("sub", FP32, x.shape, x, w.reduce("mean", FP32, x))
    deviation = w.element("add", FP32, (*x.shape[:-1], 1), w.reduce("variance", FP32, x), float(eps))
    deviation = w.element("rsqrt", FP32, deviation.shape, deviation)
    out = w.element("mul", FP32, x.shape, centred, deviation)
    return _affine(w, out, scale, shift, call.results[0].dtype)


def _rms_norm(w: Writer, call: Executed) -> Seen:
    given, shape, scale, eps = call.args
    if len(shape) != 1:
        raise NotServedError(f"{call.target} of {len(shape)} dimensions")
    x = w.seen(given)
    eps = torch.finfo(given.dtype).eps if eps is None else float(eps)
    mean = w.reduce("mean", FP32, w.element("mul", FP32, x.shape, x, x))
    root = w.element("rsqrt", FP32, mean.shape, w.element("add", FP32, mean.shape, mean, eps))
    return _affine(w, w.element("mul", FP32, x.shape, x, root), scale, None, call.results[0].dtype)


def _copy(w: Writer, call: Executed) -> Seen:
    x, dtype = w.seen(call.args[0]), call.results[0].dtype
    if dtype in (torch.int64, torch.int32) and call.args[0].dtype in (torch.int64, torch.int32):
        return x
    if dtype not in DTYPES:
        raise NotServedError(f"{call.target} to {dtype}")
    return x if x.dtype == dtype else w.element("copy", dtype, x.shape, x)


def _same(w: Writer, call: Executed) -> Seen:
    return w.seen(call.args[0])


def _view(w: Writer, call: Executed) -> Seen:
    return view(w.plain(w.seen(call.args[0])), call.results[0].shape)


def _restrided(change: Callable[[Seen, Executed], tuple[list[int], list[int], int]]) -> Operator:
    """change: shape, strides and offset of the result."""

    def write(w: Writer, call: Executed) -> Seen:
        x = w.seen(call.args[0])
        shape, strides, offset = change(x, call)
        assert tuple(shape) == tuple(call.results[0].shape), (call.target, shape, call.results[0].shape)
        return Seen(x.register, x.offset + offset, tuple(shape), tuple(strides), x.dtype)

    return write


def _swapped(x: Seen, call: Executed) -> tuple[list[int], list[int], int]:
    a, b = call.args[1:] if len(call.args) > 1 else (0, 1)
    shape, strides = list(x.shape), list(x.strides)
    for each in (shape, strides):
        each[a], each[b] = each[b], each[a]
    return shape, strides, 0


def _permuted(x: Seen, call: Executed) -> tuple[list[int], list[int], int]:
    order = [d % len(x.shape) for d in call.args[1]]
    return [x.shape[d] for d in order], [x.strides[d] for d in order], 0


def _unsqueezed(x: Seen, call: Executed) -> tuple[list[int], list[int], int]:
    at = call.args[1] % (len(x.shape) + 1)
    shape, strides = list(x.shape), list(x.strides)
    shape.insert(at, 1)
    strides.insert(at, 0)
    return shape, strides, 0


def _squeezed(x: Seen, call: Executed) -> tuple[list[int], list[int], int]:
    at = call.args[1] % len(x.shape)
    kept = [d for d in range(len(x.shape)) if d != at or x.shape[d] != 1]
    return [x.shape[d] for d in kept], [x.strides[d] for d in kept], 0


def _expanded(x: Seen, call: Executed) -> tuple[list[int], list[int], int]:
    wide = broadcast(x, tuple(call.results[0].shape))
    return list(wide.shape), list(wide.strides), 0


def _sliced(x: Seen, call: Executed) -> tuple[list[int], list[int], int]:
    given: list[Any] = [*call.args[1:], *(0, None, None, 1)[len(call.args) - 1 :]]
    dim, start, _, step = given
    dim %= len(x.shape)
    size = x.shape[dim]
    start = 0 if start is None else max(0, start + size if start < 0 else start)
    shape, strides = list(x.shape), list(x.strides)
    shape[dim] = call.results[0].shape[dim]
    strides[dim] *= step
    return shape, strides, min(start, size) * x.strides[dim]


def _selected(x: Seen, call: Executed) -> tuple[list[int], list[int], int]:
    dim, index = call.args[1:]
    dim %= len(x.shape)
    kept = [d for d in range(len(x.shape)) if d != dim]
    return [x.shape[d] for d in kept], [x.strides[d] for d in kept], index % x.shape[dim] * x.strides[dim]


def _split(w: Writer, call: Executed) -> None:
    x = w.seen(call.args[0])
    dim = (call.args[2] if len(call.args) > 2 else call.kwargs.get("dim", 0)) % len(x.shape)
    offset = 0
    for result in call.results:
        w.put(result, Seen(x.register, x.offset + offset * x.strides[dim], tuple(result.shape), x.strides, x.dtype))
        offset += result.shape[dim]


def _cat(w: Writer, call: Executed) -> Seen:
    given = [t for t in call.args[0] if t.numel()]
    dim = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % given[0].dim()
    parts = [w.seen(t) for t in given]
    dtype = call.results[0].dtype
    parts = [p if p.dtype == dtype else w.element("copy", dtype, p.shape, p) for p in parts]
    return parts[0] if len(parts) == 1 else w.join(parts, dim)


def _stack(w: Writer, call: Executed) -> Seen:
    """Parts side by side in a dimension of their own."""
    result = call.results[0]
    dim = (call.args[1] if len(call.args) > 1 else call.kwargs.get("dim", 0)) % result.dim()
    parts = []
    for x in (w.seen(t) for t in call.args[0]):
        shape, strides = list(x.shape), list(x.strides)
        shape.insert(dim, 1)
        strides.insert(dim, 0)
        parts.append(Seen(x.register, x.offset, tuple(shape), tuple(strides), x.dtype))
    return w.join(parts, dim)


def _embedding(w: Writer, call: Executed) -> Seen:
    table, ids = call.args[:2]
    if id(table) not in w.sources:
        raise NotServedError(f"{call.target} of a table that is computed at every call")
    return w.look_up(Part(DENSE, (table,)), w.seen(ids), call.results[0].shape, table.dtype)


def _packed_embedding(name: str) -> Operator:
    def write(w: Writer, call: Executed) -> Seen:
        ids, *rest = call.args
        count = tensor_count(name)
        result = call.results[0]
        part = Part(name, tuple(rest[:count]), None, tuple(rest[count:]))
        return w.look_up(part, w.seen(ids), result.shape, result.dtype)

    return write


def _outer(w: Writer, call: Executed) -> Seen:
    """A batched product of columns with rows, as rotary embeddings take it of positions."""
    a, b = call.args
    if a.shape[-1] != 1:
        raise NotServedError(f"{call.target} of {list(a.shape)} and {list(b.shape)}")
    return w.element("mul", call.results[0].dtype, call.results[0].shape, w.seen(a), w.seen(b))


def _no_product(w: Writer, call: Executed) -> Seen:
    """GPT-2's Conv1D keeps its weight [in, out]; where it is not packed, no product of a program reads it."""
    names = [w.sources[id(t)] for t in call.args if isinstance(t, Tensor) and id(t) in w.sources]
    raise NotServedError(
        f"{call.target} multiplies by {names[-1] if names else 'what is computed'}, which is no packed or [out, in] weight"
    )


OPERATORS: dict[str, Operator] = {
    **{f"aten.{name}.{kind}": _binary(name) for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")},
    "aten.rsub.Scalar": _reversed,
    "aten.rsub.Tensor": _reversed,
    "aten.maximum.default": _binary("maximum"),
    "aten.minimum.default": _binary("minimum"),
    **{
        f"aten.{name}.default": _unary(name)
        for name in ("neg", "exp", "sigmoid", "tanh", "erf", "sqrt", "rsqrt", "relu", "cos", "sin")
    },
    "aten.pow.Tensor_Scalar": _power,
    "aten.mean.dim": _mean,
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
    "aten.native_layer_norm.default": _layer_norm,
    "aten._fused_rms_norm.default": _rms_norm,
    "aten._to_copy.default": _copy,
    "aten.clone.default": _same,
    "aten.alias.default": _same,
    "aten.detach.default": _same,
    "aten.lift_fresh.default": _same,
    "aten.native_dropout.default": _same,
    "aten.view.default": _view,
    "aten._unsafe_view.default": _view,
    "aten.reshape.default": _view,
    "aten.t.default": _restrided(_swapped),
    "aten.transpose.int": _restrided(_swapped),
    "aten.permute.default": _restrided(_permuted),
    "aten.unsqueeze.default": _restrided(_unsqueezed),
    "aten.squeeze.dim": _restrided(_squeezed),
    "aten.expand.default": _restrided(_expanded),
    "aten.slice.Tensor": _restrided(_sliced),
    "aten.select.int": _restrided(_selected),
    "aten.split.Tensor": _split,
    "aten.split_with_sizes.default": _split,
    "aten.chunk.default": _split,
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.embedding.default": _embedding,
    **{f"sparsec.{name}_embedding.default": _packed_embedding(name) for name in kinds()},
    "aten.bmm.default": _outer,
    "aten.addmm.default": _no_product,
    "aten.mm.default": _no_product,
}
