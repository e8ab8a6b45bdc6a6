"""What must hold on a real pretrained model: SmolLM2-135M, float32, 30 % of all attention and MLP weights pruned by magnitude.

Its weights are de-quantised from 4 bits, so many are equal and some are zero: ties and zeros of its own are the normal case.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import sparsec
from sparsec.data import load_model, load_text
from sparsec.errors import DataError
from sparsec.evaluate import cut, evaluate
from sparsec.ir.tracer import trace
from sparsec.memory import held
from sparsec.patterns import prune_count

PRUNED = 106_168_320  # attention and MLP weights


@pytest.fixture(scope="module")
def loaded():
    try:
        return load_model(None, torch.float32)
    except DataError as error:
        pytest.skip(f"the packaged model is not installed: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def variants(loaded) -> dict[str, torch.nn.Module]:
    before = {name: p.detach().clone() for name, p in list(loaded.model.named_parameters())[:12]}
    frozen = sparsec.compile(loaded.model, "magnitude(0.3),freeze")
    built = {"frozen": frozen, "lowered": sparsec.extend(frozen, "sparsity,flops,lower(csr)")}
    for name, parameter in before.items():
        assert torch.equal(parameter, loaded.model.get_parameter(name)), f"{name} of the given model was changed"
    return built | {"dense": loaded.model}


@pytest.fixture(scope="module")
def windows(loaded):
    return cut(load_text(), loaded.tokenizer, length=128, count=3)


@pytest.fixture(scope="module")
def logits(loaded, variants, windows) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = {name: model(input_ids=windows.tokens, use_cache=False).logits for name, model in variants.items()}
        # The masked model is the dense one, its weights read through the masks.
        dense, graph = loaded.model, variants["frozen"].sparsec.graph
        masked = {w.name: torch.where(w.mask, dense.get_parameter(w.name), 0.0) for w in graph.masked()}
        call = {"input_ids": windows.tokens, "use_cache": False}
        found["masked"] = torch.func.functional_call(dense, masked, args=(), kwargs=call).logits
    return found


def test_zeros_are_counted_from_the_mask_and_exactly_although_the_model_has_zeros_of_its_own(loaded, variants) -> None:
    graph = variants["lowered"].sparsec.graph
    kept = sum(w.nnz for w in graph.weights.values() if w.packed is not None)
    assert kept == PRUNED - prune_count(0.3, PRUNED)
    own = sum(
        int((loaded.model.get_parameter(w.name) == 0).sum()) for w in graph.weights.values() if w.packed is not None
    )
    assert own > 0
    assert (
        len(torch.unique(loaded.model.get_parameter("model.layers.0.mlp.up_proj.weight").abs())) < 500_000
    )  # of 884,736


def test_report_names_the_precision_that_the_weights_were_stored_in(loaded) -> None:
    assert "Q4" in loaded.source_precision


def test_frozen_and_emitted_masked_models_are_bit_identical(logits) -> None:
    assert torch.equal(logits["masked"], logits["frozen"])


def test_lowered_and_masked_differ_by_rounding_alone(logits, variants, windows) -> None:
    masked, lowered = logits["masked"], logits["lowered"]
    changed = masked.argmax(-1) != lowered.argmax(-1)
    top = masked.topk(2).values
    gap = (masked - lowered).abs().max()
    assert gap < 1e-3 * masked.abs().max()
    assert bool(((top[..., 0] - top[..., 1])[changed] <= 2 * gap).all()), "a token changed that was no tie"
    results = [evaluate(variants[name], windows) for name in ("frozen", "lowered")]
    assert f"{results[0].perplexity:.4g}" == f"{results[1].perplexity:.4g}"


def test_generation_gives_the_same_tokens(loaded, variants) -> None:
    ids = loaded.tokenizer("The three laws of motion say that", return_tensors="pt")
    tokens = [variants[n].generate(**ids, max_new_tokens=24, do_sample=False) for n in ("frozen", "lowered")]
    assert torch.equal(*tokens)


def test_graph_and_emitted_model_agree_and_tracing_again_gives_the_lowered_graph(variants, windows) -> None:
    lowered = variants["lowered"]
    graph = lowered.sparsec.graph
    inputs = {"input_ids": windows.tokens[:2, :33], "attention_mask": torch.ones(2, 33, dtype=torch.int64)}
    with torch.no_grad():
        assert torch.equal(graph.run(**inputs).logits, lowered(**inputs, use_cache=False).logits)
    again = trace(lowered)
    assert [(op.kind, op.owner) for op in again.ops.values()] == [(op.kind, op.owner) for op in graph.ops.values()]


def test_bytes_are_those_of_all_tensors_and_words_say_that_csr_is_larger_at_thirty_percent(variants) -> None:
    lowered = variants["lowered"]
    report = lowered.sparsec.report()
    walked = sum(
        t.numel() * t.element_size() for t in {id(t): t for t in (*lowered.parameters(), *lowered.buffers())}.values()
    )
    assert report.bytes_held == walked == held(lowered).total
    packed = [w for w in lowered.sparsec.graph.weights.values() if w.packed is not None]
    ratio = sum(w.nbytes for w in packed) / sum(w.nbytes_dense for w in packed)
    assert ratio == pytest.approx(0.7 * (32 + 16) / 32, rel=0.005)  # bits per weight, and row pointers
    assert "LARGER than dense" in str(report)


def test_flops_of_pruned_linears_scale_with_nnz_and_nothing_else_changes(variants) -> None:
    graph = variants["lowered"].sparsec.graph
    by_group: dict[str, list[float]] = {}
    for op in graph.ops.values():
        sums = by_group.setdefault(f"{op.group} {op.kind}", [0.0, 0.0])
        sums[0] += op.flops_dense
        sums[1] += op.flops
    dense, kept = (sum(by_group[f"{g} sparse_linear"][i] for g in ("attention", "mlp")) for i in (0, 1))
    assert (dense, kept) == (2 * PRUNED, 2 * (PRUNED - prune_count(0.3, PRUNED)))
    assert by_group["lm_head linear"] == [2 * 49152 * 576] * 2
    assert by_group["embedding embedding"] == [0, 0]


_CHILD = """
import torch, sparsec
from sparsec.data import load_model
from sparsec.memory import resident
model = load_model(None, torch.float32).model
for p in model.parameters():
    p.data = p.data.clone()  # pages of our own, not of the file
before = resident()
compiled = sparsec.compile(model, "magnitude(0.9),freeze,lower(csr)", copy=False)
del model
print(before, resident())
"""


@pytest.mark.slow
def test_dense_weights_leave_resident_memory_when_packed(loaded) -> None:
    if sys.platform != "linux":
        pytest.skip("resident memory is read from /proc")
    run = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    before, after = map(int, run.stdout.split())
    # 361 MB of weights go; what tracing leaves in the process (imports, caches, the graph) stays
    expected = 4 * PRUNED - 0.1 * PRUNED * 6
    assert before - after > 0.7 * expected, (
        f"resident memory fell by {(before - after) / 1e6:.0f} MB of {expected / 1e6:.0f}"
    )
