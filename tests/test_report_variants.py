"""The compared models of a report: what they share, what they are, and how they fit into little memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from architectures import tiny_model

import sparsec
from sparsec import memory
from sparsec.data import LoadedModel, load_model, load_text
from sparsec.defaults import QUICK
from sparsec.errors import DataError
from sparsec.evaluate import Windows, compare
from sparsec.kernels import SparseLinear
from sparsec.kernels.modules.dense_linear import DenseLinear
from sparsec.pipeline import Pipeline
from sparsec.study import variants
from sparsec.study.clock import Clock
from sparsec.study.kept_logits import KeptLogits
from sparsec.study.layers import time_layers
from sparsec.study.measure import measured_report
from sparsec.study.plan import plan
from sparsec.timing.latency import PairTime

PASSES = "magnitude(0.6),freeze,sparsity,flops,fuse,lower(bitmap)"


def addresses(model: torch.nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("passes", ["magnitude(0.5)", "magnitude(0.5),freeze", "magnitude(0.5),freeze,fuse,lower(csr)"])
def test_a_model_that_shares_leaves_the_other_bit_identical_and_computes_the_same(name: str, passes: str) -> None:
    """`magnitude` alone: emission writes the zeros, and must not write them into the other model."""
    model, call = tiny_model(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    kept = addresses(model)
    shared, copied = (sparsec.compile(model, passes, copy=how) for how in ("changed", True))
    with torch.no_grad():
        assert torch.equal(shared(**call(2, 5)).logits, copied(**call(2, 5)).logits)
    assert addresses(model) == kept
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    own = {n for n, at in addresses(shared).items() if at != kept.get(n)}
    assert own <= {row.name for row in shared.sparsec.report().layers if row.nnz < row.parameters}
    assert memory.shared(model, shared) > 0
    assert not memory.shared(model, copied)


def test_extending_a_model_that_shares_takes_its_place_or_leaves_it() -> None:
    model, call = tiny_model("llama")
    pruned = sparsec.compile(model, "magnitude(0.5),freeze", copy="changed")
    kept = addresses(model)
    with torch.no_grad():
        wanted = pruned(**call(2, 5)).logits
        beside = sparsec.extend(pruned, "lower(csr)")
        assert torch.equal(pruned(**call(2, 5)).logits, wanted)
        instead = sparsec.extend(pruned, "lower(csr)", copy=False)
        assert instead is pruned
        assert torch.equal(instead(**call(2, 5)).logits, beside(**call(2, 5)).logits)
    assert addresses(model) == kept
    assert any(isinstance(module, SparseLinear) for module in instead.modules())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_masked_model_has_stock_modules_and_the_zeros_of_the_lowered_one(name: str) -> None:
    model, _ = tiny_model(name)
    lowered = sparsec.compile(model, PASSES, copy="changed")
    found = variants.masked_stock(model, lowered)
    assert not any(isinstance(m, SparseLinear | DenseLinear) for m in found.modules())
    frozen = dict(sparsec.compile(model, "magnitude(0.6),freeze").named_parameters())
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in found.named_parameters())


def test_what_several_passes_make_shares_its_pruning_where_they_lower_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, call = tiny_model("llama")
    compiled: list[str] = []
    compile_model = variants.compile
    monkeypatch.setattr(
        variants,
        "compile",
        lambda dense, passes, **rest: compiled.append(passes) or compile_model(dense, passes, **rest),
    )
    pruning = "magnitude(0.5),freeze"
    specs = {str(i): Pipeline.parse(f"{pruning}{rest}") for i, rest in enumerate(("", ",lower(csr)", ",lower(bitmap)"))}
    specs["other"] = Pipeline.parse("magnitude(0.6),freeze,lower(csr)")
    made = variants.compiled_by(specs, model)
    assert [str(p) for p in compiled] == [str(Pipeline.parse(pruning)), str(specs["other"])]
    assert [str(m.sparsec.pipeline) for m in made.values()] == [str(p) for p in specs.values()]
    with torch.no_grad():
        first, *others = (made[key](**call(2, 5)).logits for key in "012")
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)


def loaded() -> LoadedModel:
    return load_model("tiny")


def report() -> tuple[Any, LoadedModel]:
    model = loaded()
    effort = replace(QUICK, windows=2, length=16, prompt_tokens=4, new_tokens=2, repeats=2, seconds=20.0)
    return measured_report(model, Pipeline.parse(PASSES), plan(model, load_text(), effort))[0], model


@pytest.mark.slow
def test_with_little_memory_variants_come_one_after_another_with_the_same_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together, _ = report()
    monkeypatch.setattr(variants, "memory_bytes", lambda device: 1_000_000)
    apart, model = report()
    assert together.in_turn
    assert not apart.in_turn
    assert any("one after another" in remark for remark in apart.remarks)
    assert list(apart.summary) == list(together.summary)
    for name, variant in together.summary.items():
        other = apart.summary[name]
        for key in ("nnz", "bytes", "flops_per_token", "bytes_masks"):
            assert getattr(other, key) == getattr(variant, key), (name, key)
        for key in ("perplexity", "top1", "kl"):
            assert getattr(other, key) == pytest.approx(getattr(variant, key), rel=1e-3, abs=1e-5), (name, key)
        assert other.speedup_decode.median > 0
        assert (other.zeros_speedup_decode is None) == (name != "lowered")
    assert any(isinstance(module, SparseLinear) for module in model.model.modules())  # the dense one is gone
    assert all(row.speedup_measured for row in apart.layers if row.packed)
    assert {stage.name for stage in apart.stages} == {stage.name for stage in together.stages}


def test_kept_logits_come_again_in_order() -> None:
    model, _ = tiny_model("llama")
    tokens = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(0))
    windows = Windows(tokens, "a text", "00", 36)
    kept = KeptLogits(model)
    before = compare({"dense": kept}, windows)["dense"]
    again = compare({"dense": kept.forget(), "same": model}, windows)
    assert again["dense"] == before
    assert again["same"].kl == pytest.approx(0.0, abs=1e-9)
    assert again["same"].top1 == 1.0


def test_kept_logits_are_cut_as_they_are_asked_for_and_end_in_words() -> None:
    """Regression: other rows than at first were an IndexError."""
    model, _ = tiny_model("llama")
    window, kept = torch.arange(2, 14), KeptLogits(model)
    whole = torch.cat(list(kept.logits_in_parts(window, 12)))
    kept.forget()
    assert torch.equal(torch.cat(list(kept.logits_in_parts(window, 5))), whole)
    with pytest.raises(DataError, match="fewer windows"):
        next(kept.logits_in_parts(window, 12))


def test_equal_layers_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_model("llama")
    lowered = sparsec.compile(model, "magnitude(0.5, scope='layer'),freeze,lower(bitmap)")
    monkeypatch.setattr("sparsec.study.layers.COLD", 1)
    for dense in (model, None):
        found = time_layers(lowered, dense, rounds=2)
        assert found.timed < found.products
        assert set(found.speedups) == {row.name for row in lowered.sparsec.report().layers if row.packed}
        one, two = (found.speedups[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1))
        assert one == two > 0
        for ms in (found.ms_dense, found.ms):
            assert set(ms) == set(found.speedups)
            assert ms["model.layers.0.mlp.up_proj.weight"] == ms["model.layers.1.mlp.up_proj.weight"] > 0


def test_a_fused_products_time_is_shared_out_by_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny_model("llama")
    passes = (
        "magnitude(0.75, targets=('*.gate_proj',)),magnitude(0.5, targets=('*.up_proj',)),freeze,fuse,lower(bitmap)"
    )
    lowered = sparsec.compile(model, passes)
    monkeypatch.setattr(
        "sparsec.study.layers.layer_times", lambda pairs, *_: {n: PairTime(2.0, 9.0, 6.0) for n in pairs}
    )
    found, graph = time_layers(lowered, model, rounds=1), lowered.sparsec.graph
    names = [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up")]
    assert any(set(names) == set(op.members) for op in graph.ops.values()), "they are one product"
    assert [found.ms_dense[name] for name in names] == [4.5, 4.5]
    kept = [graph.kept(name) for name in names]
    assert [found.ms[name] for name in names] == pytest.approx([6.0 * own / sum(kept) for own in kept])
    assert found.speedups[names[0]] == found.speedups[names[1]] == 2.0


def test_what_does_not_fit_into_the_budget_is_sampled_and_said() -> None:
    model = loaded()
    effort = replace(QUICK, windows=3, length=16, prompt_tokens=4, new_tokens=2, repeats=9, seconds=0.0)
    found, _ = measured_report(model, Pipeline.parse(PASSES), plan(model, load_text(), effort))
    assert found.evaluation is not None
    assert found.latency is not None
    assert found.evaluation.windows == 1
    assert found.latency.prefill_repeats == 3
    stages = {stage.name: stage for stage in found.stages}
    assert (stages["evaluating"].done, stages["evaluating"].wanted) == (1, 3)
    assert any("evaluating: 1 of 3 windows" in remark for remark in found.remarks)


def test_a_clock_adds_up_stages_of_one_name_and_takes_from_the_budget() -> None:
    clock = Clock(100.0)
    for _ in range(2):
        with clock.stage("building"), clock.stage("timing", budgeted=True):
            pass
    assert [stage.name for stage in clock.stages] == ["timing", "building"]
    assert 0 < 100.0 - clock.seconds < 1
    clock.counted("timing", 3, 3, "rounds")
    assert clock.sampled() is None
    clock.counted("timing", 2, 3, "rounds")
    assert clock.sampled() == "sampled, to keep within the time budget: timing: 2 of 3 rounds"
