"""A state is loaded into packed layers whole and valid, or refused before anything is copied."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from format_cases import LAYOUTS, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparsec
from sparsec.errors import FormatError
from sparsec.kernels import SparseLinear
from sparsec.kernels.reference import tolerance

State = dict[str, object]


def compiled(spec: str = "csr") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.ReLU(), nn.Linear(16, 16)), nn.Linear(16, 8)).eval()
    return sparsec.compile(model, f"magnitude(0.5,targets='*'),freeze,lower({spec})", example_inputs=torch.randn(2, 16))


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def index(state: State, value: int) -> None:
    state["2.col_idx"][::3] = value  # type: ignore[index]


def wrapped(state: State) -> None:
    """Differences in int32 wrap around to what looks ascending."""
    starts = state["2.row_ptr"]
    starts[3], starts[4] = 2**31 - 1, -2  # type: ignore[index]


SPOILED: dict[str, tuple[str, Callable[[State], object]]] = {
    "columns outside": ("col_idx", lambda s: index(s, 5000)),
    "starts that wrap around": ("row_ptr", wrapped),
    "starts that run past": ("row_ptr", lambda s: s["2.row_ptr"][-1].add_(1)),  # type: ignore[index]
    "another width": ("col_idx", lambda s: s.update({"2.col_idx": s["2.col_idx"].to(torch.int32)})),  # type: ignore[attr-defined]
    "fewer values": ("values", lambda s: s.update({"2.values": s["2.values"][1:]})),  # type: ignore[index]
    "integer values": ("values", lambda s: s.update({"2.values": s["2.values"].to(torch.int8)})),  # type: ignore[attr-defined]
    "values without indices": ("col_idx", lambda s: (s.pop("2.col_idx"), s.pop("2.row_ptr"))),
    "indices without values": ("values", lambda s: s.pop("2.values")),
    "no tensor": ("values", lambda s: s.update({"2.values": [1.0]})),
    "sparse": ("values", lambda s: s.update({"2.values": s["2.values"].to_sparse()})),  # type: ignore[attr-defined]
    "meta": ("values", lambda s: s.update({"2.values": s["2.values"].to("meta")})),  # type: ignore[attr-defined]
    "a short bias": ("bias", lambda s: s.update({"2.bias": torch.zeros(7)})),
    "a dense weight": ("weight", lambda s: s.update({"2.weight": torch.zeros(8, 16)})),
}


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize(("strict", "assign"), [(True, False), (False, False), (False, True)])
def test_a_refused_state_changes_nothing_in_the_whole_model(spoiled: str, strict: bool, assign: bool) -> None:
    """The last layer's part is wrong; those before it stay what they were."""
    model = compiled()
    before, held = state_of(model), dict(model.named_buffers())
    name, spoil = SPOILED[spoiled]
    state: State = {key: t * 2 if t.is_floating_point() else t.clone() for key, t in before.items()}
    spoil(state)
    for part, prefix in ((model, ""), (model[2], "2.")):
        own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        with pytest.raises(FormatError, match=rf"^2: .*{name}"):
            part.load_state_dict(own, strict=strict, assign=assign)
        assert dict(model.named_buffers()) == held
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def scale_of(value: float) -> Callable[[Tensor], Tensor]:
    """That of one row, in bits of bf16."""
    bits = int(torch.tensor(value, dtype=torch.bfloat16).view(torch.int16))
    return lambda scale: scale.index_put((torch.tensor(0),) * 4, torch.tensor(bits, dtype=torch.int16))


SPOILED_CODES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a scale that is NaN": ("scale", scale_of(float("nan"))),
    "a scale below 0": ("scale", scale_of(-1.0)),
    "an infinite scale": ("scale", scale_of(float("inf"))),
    "a scale that gives infinite weights": ("scale", scale_of(3e38)),
    "fewer scales": ("scale", lambda t: t[:-1]),
    "wide scales": ("scale", lambda t: t.to(torch.int32)),
    "scales as floats": ("scale", lambda t: t.view(torch.bfloat16).float()),
    "a smaller table": ("table", lambda t: t[:-1]),
    "a table of floats": ("table", lambda t: t.float()),
    "a number twice in the table": ("table", lambda t: t[:1].expand(len(t)).clone()),
    "fewer codes": ("values", lambda t: t[1:]),
    "codes of another type": ("values", lambda t: t.to(torch.int32)),
    "fewer positions": ("bits", lambda t: t[1:]),
}


@pytest.mark.parametrize("values", ["int4g64", "int4mg64"])
@pytest.mark.parametrize("spoiled", SPOILED_CODES)
@pytest.mark.parametrize(("strict", "assign"), [(True, False), (False, False), (False, True)])
def test_codes_that_are_refused_change_nothing(spoiled: str, values: str, strict: bool, assign: bool) -> None:
    model = compiled(f"bitmap, values='{values}'")
    before = state_of(model)
    name, spoil = SPOILED_CODES[spoiled]
    state = {key: t * 2 if t.is_floating_point() else t.clone() for key, t in before.items()}
    state[f"2.{name}"] = spoil(state[f"2.{name}"])
    with pytest.raises(FormatError, match=rf"^2: .*{name}"):
        model.load_state_dict(state, strict=strict, assign=assign)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
def test_a_part_of_the_model_loads_its_own_state(assign: bool) -> None:
    model, x = compiled(), torch.randn(3, 16)
    state = {key: t * 2 if t.is_floating_point() else t for key, t in model[1].state_dict().items()}
    want = model[1](x) * 2
    assert model[1].load_state_dict(state, assign=assign).missing_keys == []
    torch.testing.assert_close(model[1](x), want)
    bad = {**state, "1.col_idx": state["1.col_idx"] + 16}
    with pytest.raises(FormatError, match=r"^1\.1: .*col_idx must lie in"):
        model[1].load_state_dict(bad, assign=assign)


def test_values_are_rounded_and_parameters_are_no_buffers() -> None:
    model = compiled()
    state = model.state_dict()
    model.load_state_dict({key: t.double() if "values" in key else t for key, t in state.items()})
    assert model[2].values.dtype == torch.float32
    given = {key: nn.Parameter(t) if "values" in key else t for key, t in state_of(model).items()}
    model.load_state_dict(given, assign=True)
    assert "2.values" in dict(model.named_buffers())
    with pytest.raises(FormatError, match="values and bias"):
        model.load_state_dict({k: t.double() if "values" in k else t for k, t in state_of(model).items()}, assign=True)


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=12, deadline=None)
@given(st.data())
def test_any_damage_is_refused_with_the_layer_unchanged_or_makes_a_valid_matrix(name: str, data: st.DataObject) -> None:
    layout = LAYOUTS[name]
    packed, _ = some(
        layout, 16, 32, data.draw(st.sampled_from([0.1, 0.5, 1.0])), torch.float32, data.draw(st.integers(0, 9))
    )
    module = SparseLinear(packed)
    before = state_of(module)
    state = state_of(module)
    part = data.draw(st.sampled_from(list(state)))
    tensor = state[part]
    for _ in range(data.draw(st.integers(1, 3))):
        if tensor.numel():
            at = data.draw(st.integers(0, tensor.numel() - 1))
            if tensor.is_floating_point():
                tensor.view(-1)[at] = data.draw(st.sampled_from([0.0, -0.0, 3.0, float("nan")]))
            else:
                info = torch.iinfo(tensor.dtype)
                near = int(tensor.view(-1)[at])
                value = data.draw(
                    st.sampled_from([info.min, info.max, near - 1, near + 1, near + 8]) | st.integers(-40, 40)
                )
                tensor.view(-1)[at] = min(max(value, info.min), info.max)
    assign = data.draw(st.booleans())
    try:
        module.load_state_dict(state, assign=assign)
    except FormatError:
        assert all(t.equal(before[key]) for key, t in module.state_dict().items())
        return
    x = torch.randn(data.draw(st.sampled_from([1, 5])), module.in_features)
    with torch.no_grad():
        out, dense = module(x), module.packed.unpack()
        if dense.isfinite().all():
            assert ((out - x @ dense.T).abs() <= 2 * tolerance(x, dense)).all()
