"""Pickles of compiled and loaded models run and save as they did; one that is damaged is refused before a kernel reads it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import tiny_model
from format_cases import LAYOUTS, some
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, multiprocessing, nn

import sparsec
from sparsec.errors import CheckpointError, CompileError, FormatError, SparsecError
from sparsec.kernels import SparseLinear

IDS = torch.arange(14).view(2, 7)
ON_CPU = [name for name, case in LAYOUTS.items() if case.kind.format != "wcsr"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def grouped(model: nn.Module) -> int:
    return sum(isinstance(m, SparseLinear) and m._group is not None for m in model.modules())


@pytest.fixture(scope="module")
def compiled() -> Any:
    return sparsec.compile(tiny_model("llama")[0].eval(), "magnitude(0.5),freeze,fuse,lower(bitmap)")


@pytest.mark.parametrize("through", [lambda m: pickle.loads(pickle.dumps(m)), through_torch], ids=["pickle", "torch"])
def test_a_lowered_model_is_pickled_as_it_is(compiled: Any, through: Callable[[Any], Any], tmp_path: Path) -> None:
    twin = through(compiled)
    assert torch.equal(logits(twin), logits(compiled))
    assert grouped(twin) == grouped(compiled) > 0
    assert twin.sparsec.whole() is twin
    assert [p["spec"] for p in twin.sparsec.passes] == [r.spec for r in compiled.sparsec.records]
    again = copy.deepcopy(through(twin))
    assert torch.equal(again.generate(IDS, max_new_tokens=2), compiled.generate(IDS, max_new_tokens=2))
    again.save_pretrained(tmp_path)
    loaded = through(sparsec.load(tmp_path))
    assert torch.equal(logits(loaded), logits(compiled))
    loaded.load_state_dict(compiled.state_dict())
    compiled.load_state_dict(loaded.state_dict())
    with pytest.raises(CompileError, match="lowered already"):
        sparsec.extend(loaded, "lower(csr)")
    with pytest.raises(CompileError, match="a part of a compiled model"):
        twin.model.save_pretrained(tmp_path)


def test_a_pruned_model_comes_back_with_its_zeros(tmp_path: Path) -> None:
    pruned = sparsec.compile(tiny_model("llama")[0].eval(), "magnitude(0.5),freeze")
    twin = through_torch(pruned)
    assert torch.equal(logits(twin), logits(pruned))
    with pytest.raises(CompileError, match=r"sparsec\.compile\(model, 'zeros,freeze,lower\(auto\)'\)"):
        sparsec.extend(twin, "lower(csr)")
    lowered = sparsec.compile(twin, "zeros,freeze,lower(csr)")
    assert {m.packed.nnz for m in lowered.modules() if isinstance(m, SparseLinear)} == {
        w.nnz for w in sparsec.extend(pruned, "sparsity").sparsec.graph.masked()
    }
    twin.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_what_sparsec_holds_of_a_model_that_is_gone_says_so(compiled: Any) -> None:
    alone = pickle.loads(pickle.dumps(copy.deepcopy(compiled))).sparsec
    with pytest.raises(CheckpointError, match="is gone"):
        alone.to_dense()


class Spoilt:
    """Pickles as a layer in whose state something was changed."""

    def __init__(self, layer: SparseLinear, change: Callable[[dict[str, Any]], Any]) -> None:
        self.layer, self.change = layer, change

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: copy.copy(v) for k, v in self.layer.__getstate__().items()}
        self.change(state)
        return SparseLinear.__new__, (SparseLinear,), state


def pointing_past_the_end(state: dict[str, Any]) -> None:
    state["_buffers"]["col_idx"] = torch.full_like(state["_buffers"]["col_idx"], 999)


SPOIL: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (pointing_past_the_end, "col_idx"),
    (lambda s: s["_buffers"].update(values=torch.zeros(3)), "stored = 3"),
    (lambda s: s["_buffers"].update(row_ptr=None), "not whole"),
    (lambda s: s["_scalars"].clear(), "not whole"),
    (lambda s: s.update(_packed_type=dict), "no packed format that is known"),
    (lambda s: s.update(out_features=5), "and the layer another"),
    (lambda s: s["_parameters"].update(bias=nn.Parameter(torch.zeros(3))), "bias must be"),
    (lambda s: s.update(order=9), "values in order 9"),
]


@pytest.mark.parametrize(("change", "message"), SPOIL, ids=[m for _, m in SPOIL])
def test_a_damaged_pickle_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    packed, _ = some(LAYOUTS["csr16"], 16, 32, 0.5, torch.float32)
    data = pickle.dumps(Spoilt(SparseLinear(packed, torch.zeros(16)), change))
    with pytest.raises(FormatError, match=message):
        pickle.loads(data)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_change_of_positions_is_refused_or_valid(data: st.DataObject) -> None:
    case = LAYOUTS[data.draw(st.sampled_from(ON_CPU))]
    packed, dense = some(case, 16, 32, 0.5, torch.float32, data.draw(st.integers(0, 3)))
    name = data.draw(st.sampled_from(packed.tensor_names))
    at, byte = data.draw(st.integers(0, 4000)), data.draw(st.integers(0, 255))

    def change(state: dict[str, Any]) -> None:
        tensor = state["_buffers"][name].clone()
        content = tensor.view(-1).view(torch.uint8)
        if len(content):
            content[at % len(content)] = byte
        state["_buffers"][name] = tensor

    try:
        layer = pickle.loads(pickle.dumps(Spoilt(SparseLinear(packed), change)))
    except SparsecError:
        return
    layer.packed.check()
    layer(torch.zeros(2, dense.shape[1]))


def answer(model: Any, queue: Any) -> None:
    queue.put(logits(model).numpy())


@pytest.mark.slow
def test_a_process_that_is_spawned_is_handed_the_model(compiled: Any) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(compiled, queue))
    process.start()
    try:
        assert torch.equal(torch.from_numpy(queue.get(timeout=120)), logits(compiled))
    finally:
        process.join(30)
