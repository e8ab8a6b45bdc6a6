"""For people who write passes, formats or kernels: random small models, random masks, and the contract every pass must keep.

from hypothesis import given
from sparsec.testing import check_pass, small_models

@given(small_models())
def test_my_pass_keeps_its_promises(case):
    check_pass(MyPass(), case.model, case.inputs, after="magnitude(0.5)")
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsec.calibrate import CalibrationData
from sparsec.errors import MissingExtraError
from sparsec.formats import Packed
from sparsec.formats.layout import Layout
from sparsec.formats.parts import DENSE
from sparsec.formats.quantised import Quantised
from sparsec.formats.values import Codes
from sparsec.ir.graph import Graph
from sparsec.ir.tracer import trace
from sparsec.kernels import Kernel, Problem
from sparsec.kernels.reference import product_tolerance
from sparsec.pipeline import Context, Effect, Pass, PassRecord, Pipeline

try:
    from hypothesis import strategies as st
except ImportError as error:  # pragma: no cover - the extra is installed where the tests run
    raise MissingExtraError('sparsec.testing needs hypothesis; run `pip install "sparsec[test]"`') from error

SPECIAL_VALUES = (0.0, -0.0, 1.0, -1.0, 0.25, -0.25, 1e-41, -1e-41, 3.0)
"""Few, so that ties abound; with both zeros and subnormals."""


@dataclass(eq=False)
class ModelCase:
    """A model and a call of it."""

    model: nn.Module
    inputs: tuple[Tensor, ...]

    def __repr__(self) -> str:
        return f"{self.model!r} on {[tuple(i.shape) for i in self.inputs]}"


class Chain(nn.Module):
    """Linears one after the other, by index into a list of modules: one that is listed twice is called twice."""

    def __init__(self, parts: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features of the first part]."""
        for i, index in enumerate(self.order):
            x = self.parts[index](x)
            if i + 1 < len(self.order):
                x = torch.relu(x)
        return x


@st.composite
def small_models(draw: st.DrawFn, special: bool = True) -> ModelCase:
    """Models of one to seven linears: with and without bias, reused, tied, sizes of 1; `special`: many equal values and zeros."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=2, max_size=5))
    parts: list[nn.Module] = [nn.Linear(a, b, bias=draw(st.booleans())) for a, b in pairwise(sizes)]
    order = list(range(len(parts)))
    if draw(st.booleans()):  # a square linear, called twice
        parts.append(nn.Linear(sizes[-1], sizes[-1]))
        order += [len(parts) - 1] * 2
    if draw(st.booleans()):  # a second module on the same parameter
        twin = nn.Linear(sizes[-2], sizes[-1], bias=False)
        original = parts[len(sizes) - 2]
        assert isinstance(original, nn.Linear)
        twin.weight = original.weight
        back = nn.Linear(sizes[-1], sizes[-2])
        parts += [back, twin]
        order += [len(parts) - 2, len(parts) - 1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    model = Chain(parts, order).eval()
    for parameter in model.parameters():
        if special and draw(st.booleans()):
            index = torch.randint(len(SPECIAL_VALUES), parameter.shape, generator=generator)
            parameter.data = torch.tensor(SPECIAL_VALUES)[index]
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    lead = draw(st.sampled_from([(2,), (2, 3), (5,)]))
    return ModelCase(model, (torch.randn(*lead, sizes[0], generator=generator),))


@st.composite
def masks(draw: st.DrawFn, out_features: int, in_features: int) -> Tensor:
    """Bool [out, in]: empty, full, one row, one column, checkerboard, or random at a random density."""
    shape = (out_features, in_features)
    mask = torch.zeros(shape, dtype=torch.bool)
    match draw(st.sampled_from(["empty", "full", "row", "column", "checkerboard", "random"])):
        case "full":
            mask[:] = True
        case "row" if out_features:
            mask[draw(st.integers(0, out_features - 1))] = True
        case "column" if in_features:
            mask[:, draw(st.integers(0, in_features - 1))] = True
        case "checkerboard":
            mask = (torch.arange(out_features)[:, None] + torch.arange(in_features)) % 2 == 0
        case "random":
            generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
            mask = torch.rand(shape, generator=generator) < draw(st.floats(0, 1))
    return mask


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in _tensors(model)}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Raises AssertionError when a tensor changed by a bit, left or came."""
    now = dict(_tensors(model))
    assert now.keys() == before.keys(), f"tensors came or went: {now.keys() ^ before.keys()}"
    for name, tensor in before.items():
        same = now[name].dtype == tensor.dtype and now[name].shape == tensor.shape
        assert same, name
        assert torch.equal(_bits(now[name]), _bits(tensor)), f"{name} was changed"


def masked_twin(graph: Graph, model: nn.Module) -> nn.Module:
    """The dense model that a graph means: a copy of `model`, the one it was traced from, with every mask written in."""
    twin = copy.deepcopy(model)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for weight in graph.weights.values():
            parameter = parameters[weight.name]
            if weight.packed is not None:
                dense = weight.packed.unpack()
                parameter.copy_(dense.t() if weight.transposed else dense)
            elif (mask := graph.mask(weight.name)) is not None:
                parameter.masked_fill_(~mask, 0)
    return twin


def check_pass(
    p: Pass, model: nn.Module, inputs: tuple[Tensor, ...], after: str = "", context: Context | None = None
) -> tuple[Graph, PassRecord]:
    """Runs a pass on a model and raises unless it keeps its contract; returns the graph and the pass's record.

    Held: the declared effect, on `inputs`; facts true when computed again; the given model untouched by a bit; masked weights
    zero when frozen; a second run changes no mask. `after`: passes to run first. A pass that needs calibration gets `inputs`,
    four times, and one that needs the dense model gets its parameters.
    """
    untouched = state_of(model)
    graph = trace(model, inputs)
    context = context or Context()
    if p.needs_calibration and context.calibration is None:
        context.calibration = CalibrationData(
            (tuple(graph.bind(inputs, {})),) * 4, "the example inputs, again and again"
        )
    if p.needs_dense and not context.dense:
        context.dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    context.probe = graph.bind(inputs, {}) if len(inputs) == len(graph.inputs) else graph.example  # type: ignore[assignment]
    if after:
        Pipeline.parse(after).run(graph, context, verify="probe")
    facts = graph.facts
    (record,) = Pipeline((p,)).run(graph, context, verify="probe")
    assert_untouched(model, untouched)
    assert graph.facts == (facts - p.invalidates) | p.produces, f"facts are {sorted(graph.facts)}"
    if p.effect is Effect.ANALYSIS:
        assert not record.changed
    if not p.excludes & graph.facts and p.requires <= graph.facts:
        before = {w.name: w.mask.clone() for w in graph.masked() if w.mask is not None}
        Pipeline((p,)).run(graph, context, verify="probe")
        for weight in graph.masked():
            assert weight.name in before
            assert torch.equal(before[weight.name], weight.mask), f"{weight.name}: a second run changed the mask"  # type: ignore[arg-type]
    return graph, record


def check_format(layout: Layout | str, weight: Tensor, mask: Tensor) -> Packed:
    """Packs weight [out, in] where mask [out, in] is True, and raises unless the format keeps its promises; returns what it holds.

    Held: what comes back is `where(mask, weight, 0)` bit for bit, or in codes, and 0.0 where nothing is kept, which packed again
    with the same scales are the same; bytes, number of values and parameters are those foretold; the
    tensors and scalars make the same matrix again; its own check finds nothing wrong.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    settled, plan = layout.planned(mask, weight.dtype)
    assert layout.misfits(weight, mask) == []
    packed = layout.pack(weight, mask)
    packed.check()
    assert Layout.of(packed) == settled, f"{packed.describe()} is not {settled}"
    assert (packed.nbytes, packed.values.numel()) == (plan.nbytes, plan.stored), f"foretold: {plan}"
    if layout.format == DENSE:
        mask = torch.ones_like(mask)
    assert packed.nnz == int(mask.sum())
    kept = torch.where(mask, weight, torch.zeros((), dtype=weight.dtype))
    if isinstance(packed, Quantised):
        again = layout.pack(weight, mask, Codes(packed.scatter(), packed.scale, packed.table))
        kept = torch.where(mask, again.unpack(), torch.zeros((), dtype=weight.dtype))
    for found in (packed, type(packed).from_parts(packed.tensors(), packed.scalars())):
        assert (found.shape, found.dtype) == (tuple(weight.shape), weight.dtype)
        assert torch.equal(_bits(found.unpack()), _bits(kept)), "other values came back"
    return packed


def check_kernel(
    kernel: Kernel, layout: Layout | str, shape: tuple[int, int] = (48, 96), rows: Sequence[int] = (0, 1, 2, 7, 65)
) -> None:
    """Raises unless a kernel's products with a random weight [out, in] are right within rounding, for every type that it serves.

    rows: of x. What the kernel refuses is left out; it must serve something.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    generator = torch.Generator().manual_seed(0)
    mask, served = layout.sample_mask(shape, 0.5, generator), 0
    for dtype in kernel.dtypes:
        weight = torch.randn(shape, generator=generator).to(dtype).masked_fill_(~mask, 0)
        packed = layout.pack(weight, mask)
        for count in rows:
            if kernel.unfit(Problem.of(packed, count)):
                continue
            served += 1
            x = torch.randn(count, shape[1], generator=generator).to(dtype)
            for bias in (None, torch.randn(shape[0], generator=generator).to(dtype)):
                found = kernel.run(x, packed, bias)
                assert (found.shape, found.dtype) == ((count, shape[0]), dtype)
                exact = x.double() @ packed.exact().double().t() + (0 if bias is None else bias.double())
                wrong = ~((found.double() - exact).abs() <= product_tolerance(x, packed, bias))
                assert not wrong.any(), f"{kernel.name}: {dtype}, {count} rows: {wrong.nonzero()[:5].tolist()}"
    assert served, f"{kernel.name} refuses every product with {layout}"


def _bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals itself, -0.0 differs from 0.0."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
