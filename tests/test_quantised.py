"""Quantised values in every layout: what comes back, what is foretold, what is refused, and what their products are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsec.errors import FormatError
from sparsec.formats import QUANTISED
from sparsec.formats.layout import Layout
from sparsec.formats.quantised import Quantised
from sparsec.formats.values import LIMIT, ZERO, Codec
from sparsec.kernels import SparseLinear, operator, operator_args, tolerance
from sparsec.kernels.reference import reference_linear
from sparsec.testing import check_format

CODECS = ("int8", "int8g32", "int8g64", "int4g64", "int4mg64", "int4g96", "int4mg32")
POSITIONS = ("dense", "bitmap", "nm2:4", "nm4:8", "nm", "bsr16x16", "bsr8x4", "bsr8x3", "csr8", "csr16", "csr32")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HOLD_ONLY_KEPT = ("dense", "bitmap", "csr16", "csr32")
"""Those that store no place for what is not kept."""

every_codec = pytest.mark.parametrize("values", CODECS)
every_layout = pytest.mark.parametrize("positions", POSITIONS)


def columns_of(layout: Layout) -> int:
    return layout.pattern.block[1] if layout.pattern.block else layout.pattern.nm[1] if layout.pattern.nm else 1


def fitting(layout: Layout, rows: int, columns: int) -> tuple[int, int]:
    """The next sizes that a layout takes."""
    down, across = layout.pattern.block[0] if layout.pattern.block else 1, columns_of(layout)
    if layout.format == "nm":
        across = 8
    return -(-rows // down) * down, -(-columns // across) * across


def legal(layout: Layout, mask: Tensor) -> Tensor:
    """The mask, less what is too much for N:M."""
    if layout.pattern.nm is None or not mask.numel():
        return mask
    groups = mask.view(mask.shape[0], mask.shape[1] // columns_of(layout), columns_of(layout))
    return (groups & (groups.cumsum(2) <= layout.pattern.nm[0])).view(mask.shape)


def served(layout: Layout, mask: Tensor) -> bool:
    """Whether codes can be held, by rules told apart from the code's own: with gaps there must be a 0, and 4 bits fill lanes."""
    if layout.format == "bsr" and layout.codec.bits == 4 and columns_of(layout) % 4:
        return False
    return not layout.codec.middle or str(layout).split(":")[0] in HOLD_ONLY_KEPT or not gaps(layout, mask)


def gaps(layout: Layout, mask: Tensor) -> bool:
    """Whether places are stored that are not kept."""
    plain = Layout(layout.format, layout.parameters)
    settled, plan = plain.planned(mask, torch.float32)
    if layout.format == "nm":
        n, m = settled.pattern.nm or (1, 1)
        return bool((mask.view(mask.shape[0], mask.shape[1] // m, m).sum(2) != n).any())
    return plan.stored != int(mask.sum())


@st.composite
def weights_and_masks(draw: st.DrawFn, layout: Layout, largest: float = 6e4) -> tuple[Tensor, Tensor]:
    """Sizes that fill no lane, no panel and no group; rows and groups that keep nothing; weights of all sizes."""
    shape = fitting(layout, draw(st.integers(0, 40)), draw(st.sampled_from([0, 1, 3, 8, 31, 64, 65, 130, 300])))
    dtype, generator = draw(st.sampled_from(DTYPES)), torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(shape, generator=generator) * 10.0 ** draw(st.integers(-6, 3))
    if draw(st.booleans()):  # numbers of one size, zeros, the smallest and the largest
        special = torch.tensor([0.0, -0.0, 1e-41, -1e-7, 0.5, 0.5, -0.5, largest, -largest])
        weight = special[torch.randint(len(special), shape, generator=generator)]
    mask = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.02, 0.5, 0.9, 1.0]))
    if draw(st.booleans()):
        mask[torch.rand(shape[0], generator=generator) < 0.5] = False
    if draw(st.booleans()):
        mask[:, 64:] = False
    return weight.to(dtype), torch.ones(shape, dtype=torch.bool) if layout.format == "dense" else legal(layout, mask)


def some(name: str, shape: tuple[int, int] = (40, 150), dtype: torch.dtype = torch.float32, seed: int = 0) -> Quantised:
    """A random matrix that the layout holds; of middles one without gaps."""
    layout, generator = Layout.parse(name), torch.Generator().manual_seed(seed)
    shape = fitting(layout, *shape)
    mask = layout.sample_mask(shape, 0.5, generator)
    packed = layout.pack(torch.randn(shape, generator=generator).to(dtype), mask)
    assert isinstance(packed, Quantised)
    return packed


def names() -> list[str]:
    """Every layout and codec that go together, of a mask that is random or of the layout's own pattern."""
    found = []
    for positions in POSITIONS:
        for values in CODECS:
            if not (positions == "bsr8x3" and "4" in values) and not (positions == "csr8" and "m" in values):
                found.append(f"{positions}:{values}")
    return found


def multiplied(x: Tensor, packed: Quantised, bias: Tensor | None) -> Tensor:
    return reference_linear(x, packed, bias)


def table_of(packed: Quantised) -> Tensor:
    return packed.table if packed.table.numel() else torch.arange(1, 256, dtype=torch.uint8)


@every_layout
@settings(max_examples=30, deadline=None)
@given(values=st.sampled_from(CODECS), data=st.data())
def test_what_is_foretold_is_held_and_comes_back_in_the_nearest_codes(
    positions: str, values: str, data: st.DataObject
) -> None:
    layout = Layout.parse(f"{positions}:{values}")
    weight, mask = data.draw(weights_and_masks(layout))
    if not served(layout, mask):
        with pytest.raises(FormatError) as caught:
            layout.pack(weight, mask)
        assert layout.misfits(weight, mask) == [str(caught.value)]
        return
    packed = check_format(layout, weight, mask)
    assert isinstance(packed, Quantised)
    codes, exact = packed.scatter(), packed.exact()
    assert not exact[~mask].any()
    assert not packed.unpack()[~mask].any()
    scale, middle = packed.codec.spread(packed.scale, *mask.shape)
    width = layout.codec.group or max(mask.shape[1], 1)
    scale, middle = (t.repeat_interleave(width, 1)[:, : mask.shape[1]] for t in (scale, middle))
    wide = weight.float()
    error = (exact - wide).abs()
    if layout.codec.bits == 8:
        assert (error <= scale * 0.5001)[mask].all()
    assert torch.isin(codes[mask], table_of(packed)).all()
    # No other code is nearer, but for rounding.
    levels = table_of(packed).float() - ZERO
    for row in mask.any(1).nonzero()[:2, 0].tolist():
        others = (levels[:, None] * scale[row] + middle[row] - wide[row]).abs().amin(0)
        assert (error[row] <= others + 1e-4 * scale[row])[mask[row]].all()


@pytest.mark.parametrize("name", names())
def test_a_matrix_is_described_packed_and_taken_apart_as_its_layout_says(name: str) -> None:
    packed = some(name)
    packed.check()
    described = packed.describe()
    assert described == (name if "nm:" not in name else f"nm2:4{name[2:]}")
    assert Layout.of(packed).codec == Layout.parse(name).codec
    for twin in (
        type(packed).from_parts(packed.tensors(), packed.scalars()),
        copy.deepcopy(packed),
        pickle.loads(pickle.dumps(packed)),
    ):
        twin.check()
        assert (twin.shape, twin.nnz, twin.describe(), twin.dtype) == (
            packed.shape,
            packed.nnz,
            described,
            packed.dtype,
        )
        assert torch.equal(twin.exact(), packed.exact())


BESIDE = {"values": "col_idx", "col_idx": "values", "scale": "table", "table": "scale", "row_ptr": "scale"}
"""Which tensor is named too where the sizes of two do not fit each other."""


def broken(tensor: Tensor) -> list[Tensor]:
    """Of other sizes, types and contents."""
    wrong = [
        tensor[:-1] if len(tensor) else tensor.new_zeros(1),
        tensor.float() if tensor.dtype != torch.float32 else tensor.int(),
    ]
    wrong += [
        torch.stack([tensor, tensor]),
        torch.stack([tensor, tensor], -1)[..., 0] if tensor.numel() > 1 else tensor.double(),
    ]
    return wrong


@pytest.mark.parametrize("name", names())
def test_a_broken_tensor_is_named(name: str) -> None:
    packed = some(name)
    for field, tensor in packed.tensors().items():
        for wrong in broken(tensor):
            with pytest.raises(FormatError, match=rf"{field}|{BESIDE.get(field, field)}"):
                type(packed).from_parts({**packed.tensors(), field: wrong}, packed.scalars()).check()
    for field in ("group", "kept", "n", "m"):
        number = packed.scalars()[field]
        for wrong_number in (number + 1, -1, number + 64):
            with pytest.raises(FormatError):
                type(packed).from_parts(packed.tensors(), {**packed.scalars(), field: wrong_number}).check()


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(names()), data=st.data())
def test_any_byte_that_is_changed_is_refused_or_leaves_a_matrix_that_can_be_multiplied_by(
    name: str, data: st.DataObject
) -> None:
    packed = some(name, (20, 70))
    field = data.draw(st.sampled_from([n for n, t in packed.tensors().items() if t.numel()]))
    tensor = packed.tensors()[field].clone()
    flat = tensor.view(-1).view(torch.uint8)
    flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
    changed = type(packed).from_parts({**packed.tensors(), field: tensor}, packed.scalars())
    said = changed.layout_faults() or changed.content_faults()
    if said:
        assert field in said[0] or field in ("bits", "row_ptr", "col_idx", "table")
    else:
        assert changed.exact().isfinite().all()
        assert changed.codec == packed.codec


def test_what_lies_past_the_codes_must_be_zero() -> None:
    for name, at in (
        ("bitmap:int8", -1),
        ("bitmap:int4g64", -64),
        ("dense:int8", -1),
        ("dense:int4g64", -1),
        ("csr16:int4g64", -1),
    ):
        packed = some(name, (17, 33), seed=3)
        values = packed.values.clone()
        values.view(-1)[at] |= 0x80
        if name.startswith("csr") and packed.places["col_idx"].numel() % 2 == 0:
            continue
        with pytest.raises(FormatError, match="values must"):
            type(packed).from_parts({**packed.tensors(), "values": values}, packed.scalars()).check()


@every_codec
def test_a_weight_that_is_not_finite_is_refused_where_it_is_kept(values: str) -> None:
    mask = torch.rand(20, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[3, 5], mask[7, 9] = True, False
    for bad in (float("inf"), float("-inf"), float("nan"), 2 * LIMIT):
        weight = torch.ones(20, 70)
        weight[7, 9] = bad
        Layout.parse(f"bitmap:{values}").pack(weight, mask).check()
        weight[3, 5] = bad
        with pytest.raises(FormatError, match=r"row 3, column 5 is .*use plain values, or mend the weight"):
            Layout.parse(f"bitmap:{values}").pack(weight, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", names())
def test_products_are_those_of_the_exact_matrix(name: str, dtype: torch.dtype) -> None:
    packed = some(name, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for lead in ((), (1,), (5,), (2, 3), (0,)):
        x = torch.randn(*lead, packed.shape[1], generator=generator).to(dtype)
        for bias in (None, torch.randn(packed.shape[0], generator=generator).to(dtype)):
            exact = x.double() @ packed.exact().double().t() + (0 if bias is None else bias.double())
            found = multiplied(x, packed, bias)
            assert found.dtype == dtype
            assert ((found.double() - exact).abs() <= tolerance(x, packed.exact(), bias)).all()


@pytest.mark.parametrize("name", names())
def test_gradients_are_those_of_the_exact_matrix(name: str) -> None:
    packed = some(name)
    x, bias = torch.randn(3, packed.shape[1], requires_grad=True), torch.randn(packed.shape[0], requires_grad=True)
    toward = torch.randn(3, packed.shape[0])
    (operator(packed)(x, *operator_args(packed, bias)) * toward).sum().backward()
    twin, other = x.detach().clone().requires_grad_(), bias.detach().clone().requires_grad_()
    (nn.functional.linear(twin, packed.exact(), other) * toward).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", names())
def test_a_layer_is_converted_copied_pickled_and_loaded(name: str) -> None:
    packed = some(name)
    layer = SparseLinear(packed, torch.zeros(packed.shape[0]))
    assert f"{packed.describe()}, " in repr(layer)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    x = torch.randn(2, packed.shape[1])
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.packed.exact(), packed.exact())
    with pytest.raises(FormatError, match="float64"):
        half.to(torch.float64)
    with torch.no_grad():
        wanted = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), half.to(torch.float32)):
            assert torch.equal(twin(x), wanted)
        for assign in (False, True):
            other = SparseLinear(some(name, seed=0), torch.ones(packed.shape[0]))
            other.packed.scale.zero_()
            other.load_state_dict(layer.state_dict(), assign=assign)
            assert torch.equal(other(x), wanted)
    state = {**layer.state_dict(), "scale": torch.full_like(packed.scale, -1)}
    with pytest.raises(FormatError, match="scale must hold finite numbers"):
        layer.load_state_dict(state)


BITS = {"dense:int8": 8.0, "bitmap:int8": 5.0, "bitmap:int4g64": 3.25, "bitmap:int4mg64": 3.5, "nm2:4:int4g64": 3.25}


@pytest.mark.parametrize("name", BITS)
def test_bits_per_weight_are_those_of_the_table(name: str) -> None:
    layout = Layout.parse(name)
    mask = layout.sample_mask((2048, 2048), 0.5, torch.Generator().manual_seed(0))
    assert layout.plan(mask, torch.float32).nbytes * 8 / mask.numel() == pytest.approx(BITS[name], rel=0.03)


@pytest.mark.parametrize("name", [f"{positions}:int4g64" for positions in QUANTISED])
def test_unpack_can_be_traced(name: str) -> None:
    packed = some(name)
    kind, scalars = type(packed), packed.scalars()

    class Unpack(nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return kind.from_parts(dict(zip(kind.tensor_names, tensors, strict=True)), scalars).unpack()

    tensors = tuple(packed.tensors().values())
    program = torch.export.export(Unpack(), tensors, strict=False)
    assert torch.equal(program.module()(*tensors), packed.unpack())


@pytest.mark.parametrize("positions", QUANTISED)
def test_more_than_int32_bytes_are_refused(positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.parse(f"{positions}:int8")
    module = __import__(layout.kind.positions.__base__.__module__, fromlist=["MAX_COUNT"])
    if not hasattr(module, "MAX_COUNT"):
        assert positions == "dense"
        return
    monkeypatch.setattr(module, "MAX_COUNT", 0)
    mask = layout.sample_mask((16, 16), 0.5, torch.Generator().manual_seed(0))
    for refused in (lambda: layout.pack(torch.ones(16, 16), mask), lambda: layout.plan(mask, torch.float32)):
        with pytest.raises(FormatError, match=r"holds at most 0 .* split the matrix or leave it dense"):
            refused()


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_even_steps_keep_small_weights_small(count: int, seed: int) -> None:
    """Regression: a table that was fitted to what pruning left had no number near 0.0, and ruined small weights of large inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 16 * count, generator=generator)
    mask = weight.abs() > weight.abs().median()
    weight[:, ::16], mask[:, ::16] = 0.001 * weight[:, ::16], True
    codec = Codec.parse("int4g64")
    codes = codec.encode(weight, mask)
    assert ZERO in codes.table.tolist()
    found = codec.decode(codes)
    assert (found[:, ::16].abs() <= 0.01).all()
    step = 17 * codec.spread(codes.scale, *weight.shape)[0].repeat_interleave(64, 1)[:, : weight.shape[1]]
    below = (found - weight).abs() <= 0.51 * step
    assert below[mask & (weight <= 111 / 17 * step)].all(), "half a step, but past the largest positive number"
