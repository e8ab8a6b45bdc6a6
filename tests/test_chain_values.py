"""Chains among values of any type and odd constants, and what is left to inductor."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_chains import ISAS, near
from test_inductor import WIDTH, member
from torch import Tensor, fx, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

import sparsec
from sparsec.errors import KernelError
from sparsec.inductor import FuseProducts
from sparsec.kernels import force_isa, status
from sparsec.kernels.chain import CODES, chain, reference_chain

pytestmark = pytest.mark.skipif(not status().built, reason="no native kernels")

ODD = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, 5e-324, 3.5e38, 2.0, 0.5, 3, 2**53 + 1, 2**63 - 1, True]
BINARY = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.pow,
    torch.maximum,
    torch.minimum,
    lambda a, b: torch.where(a > 0, a, b),
]
UNARY = [
    torch.neg,
    torch.relu,
    torch.sigmoid,
    torch.square,
    lambda a: a.mean(-1, keepdim=True),
    lambda a: a.var(-1, keepdim=True),
]


class Mixture(nn.Module):
    """A product of what random operators make of values of all types and of odd constants, twice."""

    def __init__(self, steps: list[tuple[int, int, int, Any]]) -> None:
        super().__init__()
        self.steps = steps
        self.first, self.second = (member(0, WIDTH, WIDTH, True, torch.float32, seed) for seed in (1, 2))

    def forward(self, x: Tensor, others: list[Tensor]) -> list[Tensor]:
        made = [self.first(x)]
        for a, op, b, constant in self.steps:
            value = made[a % len(made)]
            operands = [*others, *made]
            with contextlib.suppress(RuntimeError, TypeError):  # what does not go together
                if op < len(UNARY):
                    made.append(UNARY[op](value))
                elif constant is None:
                    made.append(BINARY[op - len(UNARY)](value, operands[b % len(operands)]))
                elif b % 2:
                    made.append(BINARY[op - len(UNARY)](operands[b % len(operands)], constant))
                else:
                    made.append(BINARY[op - len(UNARY)](constant, value))
        wide = [m.float().nan_to_num(1.0, 2.0, -2.0).sigmoid() for m in made if not m.is_complex()]
        return [*made, *(self.second(w.expand(x.shape)) for w in wide[-3:])]


@settings(max_examples=25, deadline=None)
@example(steps=[(0, len(UNARY) + 4, 1, 2.0), (0, len(UNARY) + 2, 8, None)], rows=2)
@given(
    steps=st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(0, len(UNARY) + len(BINARY) - 1),
            st.integers(0, 19),
            st.none() | st.sampled_from(ODD),
        ),
        min_size=1,
        max_size=8,
    ),
    rows=st.integers(1, 3),
)
def test_values_of_other_types_and_odd_constants_stay_what_they_are(steps, rows: int) -> None:
    """A power of integers, 2.0, once was taken for an instruction of a chain, and -0.0 for 0.0."""
    torch.manual_seed(0)
    module = Mixture(steps).eval()
    x = torch.randn(rows, WIDTH)
    others = [torch.randint(-3, 4, (rows, WIDTH)).to(t) for t in (torch.int64, torch.uint8, torch.bool, torch.int32)]
    others += [torch.randn(rows, WIDTH).to(t) for t in (torch.float64, torch.bfloat16, torch.float16, torch.complex64)]
    others += [torch.arange(WIDTH), torch.tensor(3), torch.tensor(2.5, dtype=torch.float64), torch.randn(rows, 1)]
    with torch.no_grad():
        traced = make_fx(module, decomposition_table=select_decomp_table())(x, others)
        try:
            expected = traced(x, others)
        except RuntimeError:  # it has what did not go together when it was traced
            return
        FuseProducts()(traced.graph)
        traced.graph.lint()
        traced.recompile()
        found = traced(x, others)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3, equal_nan=True)
        if not got.is_complex():
            far = wanted.abs() > 1e-3  # where the sign does not hang on rounding
            assert torch.equal(got.sign()[far], wanted.sign()[far])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CODES)
def test_the_sign_of_a_zero_and_of_what_it_divides_stays(isa: str, name: str, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: force_isa(None))
    force_isa(isa)
    if name in ("maximum", "minimum", "relu"):  # which zero is the larger one torch leaves open
        return
    x = torch.tensor([[1.0, -1.0, 0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, *range(9)]])
    pairs = [(0, -1), (-1, 0), (0, -2), (-2, 0)] if CODES[name] < CODES["copy"] else [(0, 0)]
    program = [n for a, b in pairs for n in (CODES[name], 0, a, b)]
    out = 1 if name in ("mean", "variance") else x.shape[1]
    arguments: Any = ([x], [], 1, program, [0.0, -0.0], [n for i in range(len(pairs)) for n in (1 + i, 2, 1, out)])
    for got, wanted in zip(chain(*arguments), reference_chain(*arguments), strict=True):
        near(got, wanted)
        near(1 / got, 1 / wanted)


def test_a_graph_that_no_chain_can_be_made_of_is_left_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect of the pass, here a planted one, once was a raw InductorError."""
    module = nn.Sequential(member(0, WIDTH, WIDTH, True, torch.float32, 1), nn.ReLU())
    x = torch.randn(1, WIDTH)

    def defect(graph: fx.Graph) -> None:
        raise KernelError("chain: no such thing")

    monkeypatch.setattr("sparsec.inductor.chains.make_chains", defect)
    torch.compiler.reset()
    faster = torch.compile(module, backend="sparsec", options={"force_disable_caches": True})
    with torch.no_grad():
        with pytest.warns(RuntimeWarning, match="leaves a graph to inductor, .* chain: no such thing"):
            found = faster(x)
        torch.testing.assert_close(found, module(x))


def test_integers_beside_a_chain_and_a_division_by_minus_zero_compile() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.sigmoid(self.a(x))
            return self.b(y * (n**2.0)), y / -0.0

    arguments = torch.randn(2, 8), torch.arange(16).view(2, 8)
    model = sparsec.compile(Model().eval(), "magnitude(0.5,targets='*'),freeze,lower(csr)", example_inputs=arguments)
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = torch.compile(model, backend="sparsec")(*arguments)
        torch.testing.assert_close(found, model(*arguments))
    assert found[1].eq(-torch.inf).all()
