"""The instructions of a program that computes what a tape holds (kernels/program.py has their form).

A tensor of the tape is a view of a register: most that a model does to shapes costs nothing. Only what the logits need is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsec.formats.parts import Part, flatten
from sparsec.kernels.chain import CODES, DTYPES, PRODUCT
from sparsec.kernels.program import ATTEND, JOIN, LOOK_UP, TABLES, TENSOR, VIEW
from sparsec.program.products import ProductCalls
from sparsec.program.served import NotServedError
from sparsec.program.tape import Attention, Executed, Tape

_EXACT = (torch.int64, torch.int32)
"""Types whose numbers are held as fp32: tokens and positions, below 2 ** 24."""


_DECIDING = ("aten._local_scalar_dense.default", "aten.is_nonzero.default", "aten.equal.default")
"""Operators that tell Python a number."""


@dataclass(frozen=True)
class Seen:
    """A tensor of the tape: numbers of a register, `offset` and `strides` in numbers, by the tensor's own shape."""

    register: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def plain(self) -> bool:
        """Whether the numbers follow each other."""
        return _packed(self.shape, self.strides)


@dataclass
class Written:
    """What a program is made from."""

    tensors: list[Tensor]
    code: list[int]
    constants: list[float]
    result: int


class Writer:
    """Writes one tape. sources: tensors that the model holds, by id -> name; operators: what each is in a program."""

    def __init__(
        self, tape: Tape, sources: dict[int, str], operators: Mapping[str, Callable[[Writer, Executed], Seen | None]]
    ) -> None:
        self.tape, self.sources, self._operators = tape, sources, operators
        self.code: list[int] = []
        self.tensors: list[Tensor] = []
        self.constants: list[float] = []
        self._count = 2  # registers
        self._places: dict[str, int] = {}  # of constants
        self._views: dict[tuple[Any, ...], int] = {}
        self._made = {id(r): call for call in tape.calls for r in call.results if isinstance(r, Tensor)}
        self._seen: dict[int, Seen] = {}
        self._dynamic: dict[int, bool] = {}
        self._products = ProductCalls(tape.calls, self._made, sources)
        for register, given in enumerate((tape.ids, tape.positions)):
            shape = tuple(given.shape)
            self._seen[id(given)] = Seen(register, 0, shape, packed(shape), torch.float32)

    def write(self) -> Written:
        """All of it. NotServedError names the operator that no program has."""
        for call in self.needed():
            if self._varies(call):
                self._write(call)
        logits = self.plain(self.seen(self.tape.logits))
        return Written(self.tensors, self.code, self.constants, self._register(logits))

    def needed(self) -> list[Executed]:
        """The calls that the logits need, in order. NotServedError where a number that is computed decides what is done."""
        for call in self.tape.calls:
            if call.target in _DECIDING and any(self.varies(t) for t in tensors_in(call.args)):
                raise NotServedError("its step looks at what it has computed to decide what it does")
        wanted: set[int] = set()
        waiting: list[Tensor] = [self.tape.logits]
        while waiting:
            made = self._made.get(id(waiting.pop()))
            if made is None or id(made) in wanted:
                continue
            wanted.add(id(made))
            waiting += (
                [self._products.beside(made)[0]] if self._products.holds(made) else tensors_in((made.args, made.kwargs))
            )
        return [call for call in self.tape.calls if id(call) in wanted]

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor of the tape is computed in the program, or held by the model."""
        if id(tensor) in self._seen or id(tensor) in self.sources:
            return True
        call = self._made.get(id(tensor))
        return call is not None and self._varies(call)

    def _varies(self, call: Executed) -> bool:
        """Whether a call's results depend on the step, or on a tensor of the model, which may be written to."""
        known = self._dynamic.get(id(call))
        if known is None:
            given = tensors_in((call.args, call.kwargs))
            known = call.target == "attend" or any(
                id(t) in self._seen
                or id(t) in self.sources
                or (id(t) in self._made and self._varies(self._made[id(t)]))
                for t in given
            )
            self._dynamic[id(call)] = known
        return known

    def _write(self, call: Executed) -> None:
        if call.target == "attend":
            self._attend(call)
        elif self._products.holds(call):
            self._product(call)
        elif (operator := self._operators.get(call.target)) is None:
            raise NotServedError(f"the operator {call.target} is none that a program has")
        elif (result := operator(self, call)) is not None:
            self.put(call.results[0], result)

    # ---- values ---------------------------------------------------------------------------------------------------------------

    def put(self, tensor: Tensor, seen: Seen) -> None:
        """Says what a tensor of the tape is."""
        self._seen[id(tensor)] = seen

    def seen(self, tensor: Tensor) -> Seen:
        """What a tensor of the tape is; one that the model holds, or a constant, is brought in."""
        found = self._seen.get(id(tensor))
        if found is None:
            call = self._made.get(id(tensor))
            if call is not None and self._varies(call):
                raise NotServedError(f"a result of {call.target} is read that no program has")
            if tensor.dtype not in DTYPES:
                if tensor.dtype in _EXACT and id(tensor) not in self.sources:
                    tensor = tensor.float()
                else:
                    raise NotServedError(f"a tensor of {tensor.dtype} is computed with")
            shape = tuple(tensor.shape)
            held = tensor if tensor.is_contiguous() and not tensor.is_inference() else tensor.contiguous()
            if held is not tensor and id(tensor) in self.sources:
                raise NotServedError(f"{self.sources[id(tensor)]} is not contiguous")
            self.code.append(TENSOR)
            self.tensors.append(held)
            found = Seen(self._next(), 0, shape, packed(shape), tensor.dtype)
            # Not kept: what a tensor is used for lies near, and memory is reused.
        return found

    def constant(self, value: float) -> int:
        """The operand of a number."""
        place = self._places.setdefault(float(value).hex(), len(self._places))
        if place == len(self.constants):
            self.constants.append(float(value))
        return -1 - place

    def number(self, value: Any) -> float | None:
        """A Python number, or a tensor of one that nobody writes to; None for anything else."""
        if isinstance(value, bool | int | float):
            return float(value)
        if (
            isinstance(value, Tensor)
            and value.numel() == 1
            and id(value) not in self._seen
            and id(value) not in self.sources
        ):
            call = self._made.get(id(value))
            if call is None or not self._varies(call):
                return float(value)
        return None

    def element(self, name: str, dtype: torch.dtype, shape: Sequence[int], a: Any, b: Any = None) -> Seen:
        """One instruction on operands that are Seen or numbers, broadcast to a shape."""
        dtype = torch.float32 if dtype in _EXACT else dtype
        if dtype not in DTYPES:
            raise NotServedError(f"{name} gives {dtype}")
        given = [a, a if b is None else b]
        shape = tuple(shape)
        spread = [broadcast(x, shape) if isinstance(x, Seen) else None for x in given]
        sizes, strides = three_dims(shape, [s.strides for s in spread if s is not None])
        operands, of = [], iter(strides)
        for x, s in zip(given, spread, strict=True):
            if s is None:
                operands.append(self.constant(x))
            else:
                own = next(of)
                if own[2] not in (0, 1) and sizes[2] > 1:
                    return self.element(
                        name, dtype, shape, *[self.plain(x) if isinstance(x, Seen) else x for x in (a, b)]
                    )
                operands.append(self._view(s.register, s.offset, sizes, own))
        self.code += (CODES[name], DTYPES.index(dtype), *operands)
        return Seen(self._next(), 0, shape, packed(shape), dtype)

    def reduce(self, name: str, dtype: torch.dtype, x: Seen, keep: bool = True) -> Seen:
        """The mean, or the variance, of the last dimension."""
        x = x if not x.strides or x.strides[-1] == 1 or x.shape[-1] == 1 else self.plain(x)
        sizes, (strides,) = three_dims(x.shape, [x.strides], last=True)
        at = self._view(x.register, x.offset, sizes, strides)
        self.code += (CODES[name], DTYPES.index(dtype), at, at)
        shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
        return Seen(self._next(), 0, shape, packed(shape), dtype)

    def plain(self, x: Seen) -> Seen:
        """The same numbers, one after the other."""
        if x.plain:
            return x
        return self.join([x], len(x.shape) - 1)

    def join(self, parts: Sequence[Seen], dim: int) -> Seen:
        """Parts that lie beside each other in the last dimension, or in one that only ones come before."""
        shape = list(parts[0].shape)
        shape[dim] = sum(p.shape[dim] for p in parts)
        if dim != len(shape) - 1:
            if any(size != 1 for size in shape[:dim]):
                raise NotServedError(f"cat of dimension {dim} of {len(shape)}")
            parts = [view(self.plain(p), (math.prod(p.shape),)) for p in parts]
        registers, rows = [], set()
        for p in parts:
            sizes, (strides,) = three_dims(p.shape, [p.strides], last=True)
            rows.add(tuple(sizes[:2]))
            registers.append(self._view(p.register, p.offset, sizes, strides))
        if len(rows) > 1:
            raise NotServedError("cat of parts that lie in memory in different ways")
        self.code += (JOIN, len(registers), *registers)
        return Seen(self._next(), 0, tuple(shape), packed(shape), parts[0].dtype)

    def _register(self, x: Seen) -> int:
        """A register of just these numbers."""
        size = math.prod(x.shape)
        last = x.shape[-1] if x.shape else 1
        return self._view(x.register, x.offset, (1, size // last, last), (size, last, 1))

    def _view(self, register: int, offset: int, sizes: Sequence[int], strides: Sequence[int]) -> int:
        key = (register, offset, *sizes, *strides)
        found = self._views.get(key)
        if found is None:
            self.code += (VIEW, register, offset, *sizes, *strides)
            found = self._views[key] = self._next()
        return found

    def _next(self) -> int:
        self._count += 1
        return self._count - 1

    # ---- instructions of their own ---------------------------------------------------------------------------------------------

    def _product(self, call: Executed) -> None:
        """All products of the same rows, at the first of them."""
        if id(call.results[0]) in self._seen:
            return
        x, members = self._products.beside(call)
        rows = self.plain(self.seen(x))
        parts = [part for member in members for part in member.parts]
        tensors, layout = flatten(parts)
        self.tensors += tensors
        self.code += (PRODUCT, self._register(rows), len(tensors), len(layout), *layout)
        for member in members:
            for result in member.call.results:
                shape = tuple(result.shape)
                self.put(result, Seen(self._next(), 0, shape, packed(shape), result.dtype))

    def look_up(self, table: Part[Tensor], ids: Seen, shape: Sequence[int], dtype: torch.dtype) -> Seen:
        """Rows of a table."""
        if table.format not in TABLES:
            raise NotServedError(f"an embedding in {table.format} has no native kernel")
        tensors, layout = flatten([table])
        at = self._register(self.plain(ids))
        self.code += (LOOK_UP, at, len(tensors), len(layout), *layout)
        self.tensors += tensors
        return Seen(self._next(), 0, tuple(shape), packed(shape), dtype)

    def _attend(self, call: Executed) -> None:
        query, key, value, how = call.args
        assert isinstance(how, Attention)
        registers = [self._register(self.plain(self.seen(t))) for t in (query, key, value)]
        heads, shared, width, value_width = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
        numbers = (self.constant(how.scale), self.constant(how.cap))
        self.code += (ATTEND, *registers, how.layer, heads, shared, width, value_width, *numbers, how.window)
        shape = tuple(call.results[0].shape)
        self.put(call.results[0], Seen(self._next(), 0, shape, packed(shape), query.dtype))


# ---- shapes --------------------------------------------------------------------------------------------------------------------


def packed(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of numbers that follow each other."""
    strides: list[int] = []
    count = 1
    for size in reversed(shape):
        strides.insert(0, count)
        count *= size
    return tuple(strides)


def _packed(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return all(size == 1 or a == b for size, a, b in zip(shape, strides, packed(shape), strict=True))


def broadcast(x: Seen, shape: Sequence[int]) -> Seen:
    """x with ones in front, and sizes of 1 repeated."""
    missing = len(shape) - len(x.shape)
    sizes = (1,) * missing + x.shape
    strides = (0,) * missing + x.strides
    strides = tuple(0 if size == 1 else stride for size, stride in zip(sizes, strides, strict=True))
    return Seen(x.register, x.offset, tuple(shape), strides, x.dtype)


def three_dims(
    shape: Sequence[int], strides: Sequence[Sequence[int]], last: bool = False
) -> tuple[list[int], list[list[int]]]:
    """A shape as three dimensions, and the strides of each operand in them. last: the last dimension stays by itself.

    NotServedError where it takes more.
    """
    sizes: list[int] = []
    found: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        own = [s[d] for s in strides]
        alone = last and d == len(shape) - 1
        if size == 1 and not alone:
            continue
        if sizes and not alone and all(f[-1] == step * size for f, step in zip(found, own, strict=True)):
            sizes[-1] *= size
            for f, step in zip(found, own, strict=True):
                f[-1] = step
        else:
            sizes.append(size)
            for f, step in zip(found, own, strict=True):
                f.append(step)
    if len(sizes) > 3:
        raise NotServedError(f"a tensor of {list(shape)} is read in an order of more than three strides")
    missing = 3 - len(sizes)
    if not sizes:
        return [1, 1, 1], [[0, 0, 1] for _ in strides]
    return [1] * missing + sizes, [[0] * missing + f for f in found]


def view(x: Seen, shape: Sequence[int]) -> Seen:
    """Another shape of numbers that follow each other."""
    return Seen(x.register, x.offset, tuple(shape), packed(shape), x.dtype)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [t for each in value for t in tensors_in(each)] if isinstance(value, list | tuple) else []
