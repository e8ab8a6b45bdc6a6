"""What a program's own instructions compute on every instruction set, and programs that are none: refused, never a crash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsec.errors import KernelError
from sparsec.formats.layout import Layout
from sparsec.formats.parts import DENSE, Part, flatten
from sparsec.kernels import force_isa, status
from sparsec.kernels.chain import CODES, DTYPES, chain
from sparsec.kernels.library.loader import library
from sparsec.kernels.program import ATTEND, JOIN, LOOK_UP, TENSOR, VIEW, Program

pytestmark = pytest.mark.skipif(not status().built, reason="no native kernels")
ISAS = library().usable if status().built else []


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    force_isa(request.param)
    yield request.param
    force_isa(None)


def run(
    code: list[int],
    result: int,
    tensors: Sequence[Tensor] = (),
    constants: Sequence[float] = (),
    ids: Sequence[float] = (0.0,),
    mask: Tensor | None = None,
    slabs: Sequence[Tensor] = (),
    spans: Sequence[int] = (),
) -> Tensor:
    """The result [batch, 1, numbers] of a program of len(ids) sequences."""
    given = torch.tensor(ids)
    out = Program(tensors, len(ids), code, constants, result).step(given, given + 10, mask, slabs, spans)
    assert out is not None
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_tensors_and_joins_put_numbers_where_they_belong(isa: str, dtype: torch.dtype) -> None:
    x = torch.arange(24).to(dtype)
    turned = [VIEW, 2, 1, 2, 3, 3, 12, 1, 4]  # [2, 3, 3] of x[1:]
    code = [TENSOR, *turned, JOIN, 3, 3, 3, 3]
    wanted = torch.as_strided(x, (2, 3, 3), (12, 1, 4), 1)
    assert torch.equal(run(code, 4, [x]).view(2, 3, 9), torch.cat([wanted] * 3, -1))
    repeated = [TENSOR, VIEW, 2, 3, 2, 1, 5, 0, 0, 1, CODES["mul"], 0, 3, -1]
    assert torch.equal(run(repeated, 4, [x], [2.0]).flatten(), x[3:8].float().mul(2).repeat(2))


def test_ids_and_positions_are_the_first_registers(isa: str) -> None:
    assert torch.equal(run([TENSOR, JOIN, 2, 0, 1], 3, [X], ids=[3.0, 7.0]).flatten(), torch.tensor([3.0, 13, 7, 17]))


TABLES = (
    "bitmap",
    "dense:int8",
    "dense:int4g32",
    "dense:int4mg32",
    "bitmap:int8",
    "bitmap:int4g32",
    "nm:int8",
    "nm2:4:int4g32",
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TABLES)
def test_rows_of_a_table_are_those_of_its_format(isa: str, name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 64, generator=generator).to(dtype)
    mask = torch.zeros(37, 64, dtype=torch.bool)
    mask.view(37, 16, 4)[..., :2] = True
    packed = Layout.parse(name).pack(weight * mask if "dense" not in name else weight, mask | ("dense" in name))
    tensors, layout = flatten(
        [Part(packed.format, tuple(packed.tensors().values()), None, tuple(packed.scalars().values()))]
    )
    ids = [0.0, 36.0, 17.0, 16.0]
    found = run([LOOK_UP, 0, len(tensors), len(layout), *layout], 2, tensors, ids=ids)
    assert found.dtype == dtype
    torch.testing.assert_close(found[:, 0], packed.rows(torch.tensor(ids).long()).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_dense_table(isa: str, dtype: torch.dtype) -> None:
    table = torch.randn(9, 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors, layout = flatten([Part(DENSE, (table,))])
    code = [LOOK_UP, 0, len(tensors), len(layout), *layout]
    assert torch.equal(run(code, 2, tensors, ids=[8.0, 0.0, 3.0])[:, 0], table[[8, 0, 3]])
    for bad in (9.0, -1.0, 1e9, float("nan")):
        with pytest.raises(RuntimeError, match="ids must lie from 0 to 8"):
            run(code, 2, tensors, ids=[bad])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3),
    shared=st.integers(1, 2),
    copies=st.integers(1, 3),
    first=st.integers(0, 5),
    length=st.integers(0, 70),
    width=st.sampled_from([1, 8, 16, 72]),
    value_width=st.sampled_from([4, 16]),
    window=st.sampled_from([0, 1, 3, 64, 100]),
    cap=st.sampled_from([0.0, 2.0]),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS) if ISAS else st.none(),
)
def test_attention_over_a_slab(
    batch, shared, copies, first, length, width, value_width, window, cap, masked, dtype, isa
) -> None:
    generator = torch.Generator().manual_seed(length)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    heads, last = shared * copies, first + length
    q, k, v = random(batch, heads, width), random(batch, shared, width), random(batch, shared, value_width)
    slabs = random(batch, shared, last + 4, width), random(batch, last + 4, shared, value_width).transpose(1, 2)
    before = [slab.clone() for slab in slabs]
    mask = None
    if masked:
        mask = torch.where(torch.rand(batch, length + 2, generator=generator) > 0.4, 0.0, -torch.inf)
        mask[:, -1] = 0
    code = [TENSOR, TENSOR, TENSOR, ATTEND, 2, 3, 4, 0, heads, shared, width, value_width, -1, -2, window]
    force_isa(isa)
    try:
        found = run(code, 5, [q, k, v], [width**-0.5, cap], [0.0] * batch, mask, slabs, [first, last])
    finally:
        force_isa(None)
    for slab, old, new in zip(slabs, before, (k, v), strict=True):
        assert torch.equal(slab[:, :, last], new)
        slab[:, :, last] = old[:, :, last]
        assert torch.equal(slab, old)
    keys, values = (
        torch.cat([old[:, :, first:last], new[:, :, None]], 2).float() for old, new in zip(before, (k, v), strict=True)
    )
    scores = torch.einsum("bhw,bhtw->bht", q.float(), keys.repeat_interleave(copies, 1)) * width**-0.5
    if cap:
        scores = cap * (scores / cap).tanh()
    if mask is not None:
        scores += mask[:, None, -(length + 1) :]
    if window:
        scores[..., : max(0, length + 1 - window)] = -torch.inf
    wanted = torch.einsum("bht,bhtw->bhw", scores.softmax(-1), values.repeat_interleave(copies, 1))
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(found.view(wanted.shape).float(), wanted, rtol=bound, atol=bound)


def test_registers_that_are_still_read_keep_their_memory(isa: str) -> None:
    """Sums of all earlier registers: each is read long after it was made, and others have come and gone between."""
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    code, wanted, registers = [TENSOR], [x], [2]
    for i in range(40):
        a, b = registers[i // 3], registers[-1]
        code += [CODES["add"], 0, a, b, CODES["mul"], 0, b + 1 if i else 3, -1]
        total = wanted[i // 3] + wanted[-1]
        wanted.append(total * 0.7)
        registers.append(registers[-1] + 2)
    torch.testing.assert_close(run(code, registers[-1], [x], [0.7]).flatten(), wanted[-1])


X = torch.ones(8)
TABLE = flatten([Part(DENSE, (torch.ones(4, 8),))])
HEADS = [TENSOR, TENSOR, TENSOR, ATTEND, 2, 3, 4, 0, 2, 1, 4, 8, -1, -1, 0]
BAD: dict[str, tuple[list[int], int, list[Tensor], str]] = {
    "no instruction": ([TENSOR, ATTEND + 1, 0, 0], 0, [X], "names no instruction"),
    "one below 0": ([TENSOR, -1], 0, [X], "names no instruction"),
    "a view that ends early": ([TENSOR, VIEW, 0, 0, 1], 0, [X], "ends early"),
    "a view beyond": ([TENSOR, VIEW, 2, 1, 1, 1, 8, 0, 0, 1], 3, [X], "a view ends at number 8 of 8"),
    "a view of more than there can be": ([TENSOR, VIEW, 2, 0, 1 << 62, 1 << 62, 4, 4, 4, 4], 3, [X], "numbers"),
    "a view whose end overflows": ([TENSOR, VIEW, 2, 0, 5, 1, 1, 1 << 62, 0, 1], 3, [X], "strides"),
    "a view before the first number": ([TENSOR, VIEW, 2, -1, 1, 1, 1, 0, 0, 1], 3, [X], "offset"),
    "a view of nothing": ([TENSOR, VIEW, 2, 0, 1, 1, 0, 0, 0, 1], 3, [X], "sizes above 0"),
    "a view of no register": ([TENSOR, VIEW, 9, 0, 1, 1, 1, 0, 0, 1], 2, [X], "there are 3 registers"),
    "a register that is too large": (
        [TENSOR, VIEW, 2, 0, 1, 1, 1 << 30, 0, 0, 0, VIEW, 2, 0, 1, 1 << 30, 1, 0, 0, 0, CODES["add"], 0, 3, 4],
        5,
        [X],
        "more than 1073741824 numbers",
    ),
    "a tensor that is not given": ([TENSOR, TENSOR], 2, [X], "more tensors than the 1"),
    "a tensor that is not used": ([TENSOR], 2, [X, X], "uses 1 tensors, got 2"),
    "a tensor of integers": ([TENSOR], 2, [X.long()], "dtype|float32"),
    "a tensor of doubles": ([TENSOR], 2, [X.double()], "float32, bfloat16 or float16"),
    "a tensor that is not contiguous": ([TENSOR], 2, [torch.ones(4, 2).t()], "contiguous"),
    "nothing joined": ([TENSOR, JOIN, 0], 2, [X], "nothing is joined"),
    "more joined than there is": ([TENSOR, JOIN, 1 << 62, 0], 2, [X], "ends early"),
    "dtypes joined": ([TENSOR, TENSOR, JOIN, 2, 2, 3], 4, [X, X.half()], "one dtype"),
    "a table that ends early": ([LOOK_UP, 0, 1, 1 << 40], 2, [X], "ends early"),
    "two tables": ([LOOK_UP, 0, 2, 2 * len(TABLE[1]), *TABLE[1] * 2], 2, [*TABLE[0] * 2], "one matrix"),
    "a table of as many tensors": ([LOOK_UP, 0, 3, len(TABLE[1]), *TABLE[1]], 2, [*TABLE[0]], "one matrix"),
    "a result that is none": ([TENSOR], 7, [X], "there are 3 registers"),
    "a result below 0": ([TENSOR], -1, [X], "registers"),
    "heads that do not fit": (HEADS, 5, [X, X, X], "heads do not go together"),
    "a scale that is a register": ([*HEADS[:12], 0, -1, 0], 5, [X, X[:4], X], "a scale must be a constant"),
    "a constant that is none": ([*HEADS[:12], -9, -1, 0], 5, [X, X[:4], X], "constants"),
    "a layer below 0": ([*HEADS[:7], -1, *HEADS[8:]], 5, [X, X[:4], X], "heads do not go together"),
    "a window below 0": ([*HEADS[:14], -1], 5, [X, X[:4], X], "heads do not go together"),
    "two attentions to a layer": (HEADS + HEADS[3:], 6, [X, X[:4], X], "layer 0 attends twice"),
    "attention of more sequences": (HEADS, 5, [torch.ones(16), X, torch.ones(16)], "has 2 sequences, the program 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_program_that_is_none_is_refused(case: str) -> None:
    code, result, tensors, message = BAD[case]
    with pytest.raises((RuntimeError, KernelError), match=message):
        Program(tensors, 1, code, [1.0], result)


def test_a_chain_attends_to_nothing() -> None:
    """Regression: attention in a chain, which has no cache, read memory that is none."""
    with pytest.raises(RuntimeError, match="there is no cache to attend to"):
        chain([X, X], [X, X[:4], X], 1, HEADS, [1.0], [5, 2, 1, 16])


def test_what_a_step_is_given_has_to_fit() -> None:
    program = Program([X, X[:4], X], 1, HEADS, [1.0], 5)
    one, slabs = torch.zeros(1), [torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 8)]
    good: dict[str, Any] = {"ids": one, "positions": one, "mask": None, "slabs": slabs, "spans": [0, 3]}
    assert program.step(**good) is not None
    for bad, message in (
        ({"ids": torch.zeros(2)}, r"float32 \[1\]"),
        ({"positions": one.long()}, r"float32 \[1\]"),
        ({"slabs": slabs[:1]}, "has 1 caches"),
        ({"spans": [0]}, "has 1 caches"),
        ({"spans": [0, 4]}, "cache 0 does not fit"),
        ({"spans": [-1, 3]}, "cache 0 does not fit"),
        ({"spans": [3, 2]}, "cache 0 does not fit"),
        ({"slabs": [slabs[0].half(), slabs[1]]}, "cache 0 does not fit"),
        ({"slabs": [torch.zeros(2, 1, 4, 4), slabs[1]]}, "cache 0 does not fit"),
        ({"slabs": [slabs[0], torch.zeros(1, 1, 8, 4).transpose(2, 3)]}, "cache 0 does not fit"),
        ({"mask": torch.zeros(1, 3)}, "the mask has 3 positions"),
        ({"mask": torch.zeros(2, 4)}, r"float32 \[1, positions\]"),
        ({"mask": torch.zeros(1, 4).double()}, r"float32 \[1, positions\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            program.step(**good | bad)
    with program.timed(torch.zeros(9, dtype=torch.int64)), pytest.raises(RuntimeError, match="times must be int64"):
        program.step(**good)
    number = program._number
    del program
    with pytest.raises(RuntimeError, match=f"there is no program {number}"):
        torch.ops.sparsec.step(number, one, one, None, slabs, [0, 3], None)
