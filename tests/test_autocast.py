"""torch.autocast: around a lowered model, which then does what an nn.Linear does, and inside of a forward that is traced."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from architectures import tiny_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import sparsec
from sparsec.ir.tracer import trace
from sparsec.kernels import SparseLinear

HALF = torch.bfloat16


class Gated(nn.Module):
    """Two linears of one x, which can share a product, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.a(x)) * self.b(x))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Gated().eval()


def masked(model: nn.Module) -> nn.Module:
    return sparsec.compile(model, "magnitude(0.5, targets='*'),freeze", example_inputs=torch.randn(4, 32))


@pytest.mark.parametrize(
    "lowering", ["lower(csr)", "fuse,lower(csr)", "fuse,lower(bitmap, targets='a')", "lower(auto)"]
)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_lowered_model_under_autocast_gives_what_the_masked_one_gives(
    model: nn.Module, lowering: str, given: torch.dtype, gradients: bool
) -> None:
    twin = masked(model)
    lowered = sparsec.extend(twin, lowering)
    x = torch.randn(3, 32).to(given)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype=HALF):
        expected, found = twin(x), lowered(x)
    assert found.dtype == expected.dtype == HALF
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03)
    assert lowered(x.float()).dtype == torch.float32


def test_a_gradient_flows_through_a_lowered_layer_under_autocast(model: nn.Module) -> None:
    lowered = sparsec.extend(masked(model), "lower(csr)")
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=HALF):
        lowered(x).float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert bool(x.grad.any())


def test_what_autocast_leaves_alone_stays_alone() -> None:
    lowered = sparsec.compile(
        nn.Sequential(nn.Linear(8, 8)).double(),
        "magnitude(0.5, targets='*'),freeze,lower(csr)",
        example_inputs=torch.randn(2, 8, dtype=torch.float64),
    )
    with torch.autocast("cpu", dtype=HALF):
        assert lowered(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64


def test_a_lowered_model_compiles_under_autocast(model: nn.Module) -> None:
    lowered = sparsec.extend(masked(model), "fuse,lower(csr)")
    x = torch.randn(3, 32)
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", dtype=HALF):
        expected = lowered(x)
        found = torch.compile(lowered, backend="aot_eager", fullgraph=True)(x)
    assert found.dtype == HALF
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.03)


def test_compile_under_autocast_traces_the_model_and_not_its_casts(model: nn.Module) -> None:
    x = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=HALF):
        lowered = sparsec.compile(model, "magnitude(0.5, targets='*'),freeze,lower(csr)", example_inputs=x)
        assert torch.is_autocast_enabled("cpu")
    assert isinstance(lowered.a, SparseLinear)
    assert "aten.to" not in str(lowered.sparsec.graph.module.graph)


class Inside(nn.Module):
    """Regions of a forward with autocast, without it, one in the other, and with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = self.a(x.float())
        with torch.autocast("cpu", dtype=HALF):
            y = self.b(torch.relu(y)).softmax(-1)
            with torch.autocast("cpu", enabled=False):
                z = self.a(y.float())
            z = z + torch.cat([y, z.to(HALF)], 0).sum()
            with torch.enable_grad():
                z = self.b(z) * 2
        with torch.enable_grad():
            return self.a(z.float()) + y


def test_regions_with_and_without_autocast_are_traced_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = Inside().eval()
    graph = trace(model, torch.randn(4, 16))
    assert graph.rung == "dynamic"
    for batch in (1, 5):
        x = torch.randn(batch, 16)
        with torch.no_grad():
            assert torch.equal(graph.run(x), model(x))
            assert torch.equal(graph.module(x), model(x))
    assert [op.owner for op in graph.ops.values() if op.kind == "linear"] == ["a", "b", "a", "b", "a"]
    (note,) = graph.notes
    assert "b: its weight is cast to another type at every call, by torch.autocast" in note


def test_a_linear_in_a_region_without_autocast_is_lowered_and_one_in_a_region_with_it_stays() -> None:
    compiled = sparsec.compile(
        Inside().eval(), "magnitude(0.5, targets='*'),freeze,lower(csr)", example_inputs=torch.randn(4, 16)
    )
    assert isinstance(compiled.a, SparseLinear)
    assert type(compiled.b) is nn.Linear
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), compiled.sparsec.graph.run(x))
    assert "autocast" in str(compiled.sparsec.report())


class AllInside(nn.Module):
    """Nothing is left outside of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=HALF):
            return self.a(x)


def test_a_model_that_is_all_inside_of_autocast_is_refused_with_the_way_out() -> None:
    with pytest.raises(sparsec.SparsecError, match=r"run the compiled model under torch\.autocast instead"):
        sparsec.compile(AllInside(), "magnitude(0.5),freeze,lower(csr)", example_inputs=torch.randn(4, 16))


@pytest.fixture
def state_of_accelerate() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Ids(Dataset[dict[str, Tensor]]):
    """Four sequences of eight tokens."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.arange(i + 3, i + 11)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trained(model: nn.Module, folder: Path) -> nn.Module:
    options: dict[str, Any] = {
        "bf16": True,
        "use_cpu": True,
        "max_steps": 1,
        "learning_rate": 0.01,
        "save_strategy": "no",
    }
    args = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, per_device_train_batch_size=4, **options)
    Trainer(model=model, args=args, train_dataset=Ids()).train()
    return model.eval()


def test_a_trainer_in_bfloat16_trains_masked_and_lowered_models(tmp_path: Path, state_of_accelerate: None) -> None:
    """Regression: a model that the Trainer had trained could not be compiled: its forward runs under accelerate's autocast."""
    base, call = tiny_model("llama")
    pruned = sparsec.compile(base, "magnitude(0.5),freeze")
    lowered = sparsec.extend(pruned, "fuse,lower(csr)")
    head = lowered.lm_head.weight.detach().clone()
    trained(lowered, tmp_path)
    assert not torch.equal(lowered.lm_head.weight, head), "what is not packed is trained"
    grown = trained(copy.deepcopy(pruned), tmp_path)
    assert any("no longer zero" in note for note in grown.sparsec.report().notes)
    inputs = call(2, 8)
    dense = trained(base, tmp_path)
    fresh = sparsec.compile(dense, "zeros,freeze,lower(csr, targets='mlp')")  # nothing is zero
    with torch.no_grad():
        expected = grown(**inputs).logits
        torch.testing.assert_close(sparsec.extend(grown, "lower(csr)")(**inputs).logits, expected, rtol=0.05, atol=0.02)
        torch.testing.assert_close(fresh(**inputs).logits, dense(**inputs).logits, rtol=0.05, atol=0.02)
    assert sum(isinstance(m, SparseLinear) for m in fresh.modules()) == 6
    assert any("accelerate's autocast" in note for note in fresh.sparsec.notes)


def test_what_accelerate_prepared_compiles_and_what_is_compiled_is_prepared(
    model: nn.Module, state_of_accelerate: None
) -> None:
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    x = torch.randn(4, 32)
    spec = "magnitude(0.5, targets='*'),freeze,fuse,lower(csr)"
    again = accelerator.prepare(sparsec.compile(model, spec, example_inputs=x))
    prepared = accelerator.prepare(model)
    lowered = sparsec.compile(prepared, spec, example_inputs=x)
    assert "_original_forward" in vars(prepared), "the trace puts it back"
    assert vars(lowered)["_original_forward"].__self__ is lowered
    plain = accelerator.unwrap_model(copy.deepcopy(lowered), keep_fp32_wrapper=False)
    with torch.no_grad():
        assert torch.equal(again(x), lowered(x))
        assert not torch.equal(plain(x), lowered(x)), "accelerate's autocast is still around it"
        torch.testing.assert_close(plain(x), lowered(x), rtol=0.05, atol=0.03)
        torch.testing.assert_close(plain(x), lowered.sparsec.graph.run(x))
    assert lowered(x).dtype == torch.float32
