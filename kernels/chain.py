"""The operator `chain`: products and the arithmetic between them (norms, activations, residual sums) in one call.

Why: at one row of x a small product takes less time than being called. A chain is one call for all products between two
attentions, and what stands between them never leaves the caches.

A chain computes registers: first its inputs, then what each instruction of its program defines. A register is [rows, width], or
one row that serves for all; width 1 goes with any width. The program is a list of integers:

- a product: 0, the register of x, how many tensors it takes (the next ones), how many entries its layout has, that layout
  (formats/parts.py). It defines a register for each part.
- another instruction: its number in `CODES`, the dtype of what it defines (its place in `DTYPES`), operands a and b. An operand
  -1 - i is the i-th constant; instructions of one operand are given it twice. Everything is computed in fp32 and rounded to the
  dtype; MEAN and VARIANCE (the population's) are those of each row.

results: for each result its register, how many sizes it has, and the sizes. `single_chain` has one result, and no list: see
kernels/fused.py. There are no gradients: chains are for compiled graphs, where autograd is done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.formats.parts import unflatten
from sparsec.kernels.derivatives import without_derivatives
from sparsec.kernels.fused import part_operator
from sparsec.kernels.ops import LIBRARY, loads_native
from sparsec.private import OpOverload

NAME = "chain"
SINGLE = "single_chain"
PRODUCT = 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "copy": lambda a, _: a,
    "neg": lambda a, _: -a,
    "exp": lambda a, _: a.exp(),
    "sigmoid": lambda a, _: a.sigmoid(),
    "tanh": lambda a, _: a.tanh(),
    "erf": lambda a, _: a.erf(),
    "sqrt": lambda a, _: a.sqrt(),
    "rsqrt": lambda a, _: a.rsqrt(),
    "relu": lambda a, _: a.relu(),
    "cos": lambda a, _: a.cos(),
    "sin": lambda a, _: a.sin(),
    "mean": lambda a, _: a.mean(-1, keepdim=True),
    "variance": lambda a, _: (a - a.mean(-1, keepdim=True)).square().mean(-1, keepdim=True),
}
CODES: dict[str, int] = {name: code for code, name in enumerate(_FUNCTIONS, start=1)}
"""Part of the operators' interface: the native library has the same numbers (native/kernels.h)."""
_FUNCTIONS_BY_CODE = dict(enumerate(_FUNCTIONS.values(), start=1))

for _name, _result in ((NAME, "Tensor[]"), (SINGLE, "Tensor")):
    LIBRARY.define(  # type: ignore[no-untyped-call]
        f"{_name}(Tensor[] inputs, Tensor[] tensors, int rows, int[] program, float[] constants, int[] results) -> {_result}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
chain: OpOverload = torch.ops.sparsec.chain.default
single_chain: OpOverload = torch.ops.sparsec.single_chain.default


def reference_chain(
    inputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    rows: int,
    program: Sequence[int],
    constants: Sequence[float],
    results: Sequence[int],
) -> list[Tensor]:
    """What a chain computes, by torch's operators. KernelError for a program that is none."""
    registers = [_rows(t, rows) for t in inputs]
    used = at = 0
    try:
        while at < len(program):
            code, *operands = program[at : at + 4]
            at += 4
            if code == PRODUCT:
                x, count, length = operands
                parts = unflatten(tensors[used : used + count], program[at : at + length])
                registers += [part_operator(part)(registers[x], *part.arguments) for part in parts]
                used += count
                at += length
            else:
                dtype, *places = operands
                a, b = (torch.tensor(constants[-1 - i]) if i < 0 else registers[i].float() for i in places)
                registers.append(_FUNCTIONS_BY_CODE[code](a, b).to(DTYPES[dtype]))
        if used != len(tensors):
            raise KernelError(f"chain: the program uses {used} tensors, got {len(tensors)}")
        found: list[Tensor] = []
        at = 0
        while at < len(results):
            register, dims = results[at : at + 2]
            found.append(registers[register].reshape(tuple(results[at + 2 : at + 2 + dims])).clone())
            at += 2 + dims
    except (IndexError, KeyError, ValueError) as error:
        raise KernelError(
            f"chain: what stands before entry {at} of the program, or of the results, is none: {error!r}"
        ) from error
    return found


def _rows(t: Tensor, rows: int) -> Tensor:
    width = t.shape[-1] if t.dim() else 1
    if t.dtype not in DTYPES or t.numel() not in (width, rows * width):
        raise KernelError(
            f"chain: an input must be float32, bfloat16 or float16 and have 1 or {rows} rows, got {t.dtype} {tuple(t.shape)}"
        )
    return t.reshape(t.numel() // width if width else rows, width)


def _implementation(inputs: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    if loads_native(inputs[0], NAME):
        out: list[Tensor] = chain(inputs, *rest)
        return out
    return reference_chain(inputs, *rest)


def _single(*args: Any) -> Tensor:
    (out,) = _implementation(*args)
    return out


torch.library.impl(LIBRARY, NAME, "CompositeExplicitAutograd")(_implementation)
torch.library.impl(LIBRARY, SINGLE, "CompositeExplicitAutograd")(_single)
torch.library.register_fake(f"sparsec::{NAME}", reference_chain, lib=LIBRARY)
torch.library.register_fake(f"sparsec::{SINGLE}", lambda *args: reference_chain(*args)[0], lib=LIBRARY)
for _op in (chain, single_chain):
    without_derivatives(LIBRARY, _op)
