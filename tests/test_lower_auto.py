"""lower(auto): what it chooses, what it says, and that no choice is predicted to be worse than doing nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import sparsec
import sparsec.passes.lower
from sparsec.cost.choice import CLOSE, MARGIN, OWN, TORCH, Choice, Setting, choose, dense_candidates, sparse_candidates
from sparsec.cost.constants import Constants, load_file
from sparsec.cost.model import KernelCost, Rate, RowsRate
from sparsec.errors import ConstantsError, FormatError
from sparsec.formats.layout import Layout
from sparsec.kernels import SparseLinear, status
from sparsec.kernels.modules.dense_linear import DenseLinear

FIXTURE = load_file(Path(__file__).parent / "calibration.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
native = pytest.mark.skipif(not status().built, reason="the choice by time needs native kernels")


@st.composite
def masked(draw: st.DrawFn) -> Tensor:
    """Masks with and without structure."""
    torch.manual_seed(draw(st.integers(0, 999)))
    density = draw(st.sampled_from([0.0, 0.02, 0.1, 0.3, 0.5, 0.9, 1.0]))
    match draw(st.sampled_from(["any", "blocks", "2:4"])):
        case "blocks":
            kept = torch.rand(draw(st.integers(1, 6)), draw(st.integers(1, 6))) < density
            return kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
        case "2:4":
            scores = torch.rand(draw(st.integers(1, 70)), draw(st.integers(1, 20)), 4)
            return (scores.argsort(-1).argsort(-1) < 2).flatten(1)
    return torch.rand(draw(st.integers(1, 200)), draw(st.integers(1, 200))) < density


@st.composite
def some_constants(draw: st.DrawFn) -> Constants:
    """The fixture, every kernel made faster or slower."""

    def scaled(k: KernelCost) -> KernelCost:
        f = draw(st.floats(0.05, 20))
        decode = Rate(k.decode.per_stored * f, k.decode.per_position * f)
        return replace(k, call=k.call * f, per_byte=k.per_byte * f, decode=decode)

    return replace(FIXTURE, kernels=tuple(scaled(k) for k in FIXTURE.kernels if k.dtype == "float32"))


@native
@given(
    mask=masked(),
    known=some_constants(),
    rows=st.sampled_from([1, 3, 8, 100]),
    workload=st.sampled_from([(0, 1), (64, 1), (512, 128)]),
)
def test_nothing_is_chosen_that_is_predicted_slower_than_dense(
    mask: Tensor, known: Constants, rows: int, workload: tuple[int, int]
) -> None:
    weight, (prompt, new) = mask.float(), workload
    setting = Setting("latency", rows, known, prompt_tokens=prompt, new_tokens=new)
    best = choose(weight, mask, setting, (TORCH, OWN)).best
    dense = {c.kernel: c.seconds for c in dense_candidates(weight, setting, (TORCH, OWN)) if c.predictions}
    sparse = [c for c in sparse_candidates(mask, weight.dtype, setting) if c.predictions]
    fastest = min(sparse, key=lambda c: c.seconds, default=None)
    if best.layout.format == "dense":
        assert best.seconds <= dense[TORCH]
        assert fastest is None or best.seconds <= MARGIN * fastest.careful(setting)
    else:
        assert fastest is not None
        assert best.seconds <= CLOSE * fastest.seconds
        assert best.seconds <= min(dense.values())
        assert best.careful(setting) <= MARGIN * min(dense.values())
        quick = [c for c in sparse if c.seconds < CLOSE * fastest.seconds and c.careful(setting) < min(dense.values())]
        assert best.nbytes <= min((c.nbytes for c in quick), default=best.nbytes), "the smallest of those as fast"


@native
def test_a_workload_weighs_prompt_and_decode() -> None:
    """A layout that decodes twice as fast as dense and reads a prompt at half its speed pays from enough new tokens on."""
    mask = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) < 0.5
    dense, bitmap = (
        next(k for k in FIXTURE.kernels if (k.kernel, k.dtype) == (n, "float32")) for n in (TORCH, "bitmap_cpu")
    )

    def seconds(k: KernelCost, one: float, many: float) -> KernelCost:
        rate = Rate(0.0, one / mask.numel())
        rows = (RowsRate(64, Rate(0.0, many / mask.numel())),)
        return replace(k, call=0.0, per_output=0.0, per_byte=0.0, decode=rate, rows=rows)

    known = replace(FIXTURE, kernels=(seconds(dense, 2.0, 10.0), seconds(bitmap, 1.0, 20.0)), member=None)
    for new, wanted in ((1, "dense"), (10, "dense"), (30, "bitmap"), (1000, "bitmap")):
        best = choose(mask.float(), mask, Setting("latency", 1, known, prompt_tokens=64, new_tokens=new))
        assert best.best.layout.format == wanted, f"{new} new tokens: {best.reason}"


@given(mask=masked(), dtype=st.sampled_from(DTYPES))
def test_the_bytes_objective_is_minimal_over_everything_that_can_be_packed(mask: Tensor, dtype: torch.dtype) -> None:
    weight = mask.to(dtype)
    best = choose(weight, mask, Setting("bytes")).best
    packings = ("csr8", "csr16", "csr32", "bitmap", "nm")
    possible = [weight.nbytes]
    for name in packings:
        try:
            possible.append(Layout.parse(name).pack(weight, mask).nbytes)
        except FormatError:
            continue
    held = weight if best.layout.format == "dense" else best.layout.pack(weight, mask)
    assert held.nbytes == best.nbytes <= min(possible)


@given(mask=masked(), dtype=st.sampled_from(DTYPES))
def test_a_candidate_knows_the_bytes_and_values_of_what_it_will_be(mask: Tensor, dtype: torch.dtype) -> None:
    rate = Rate(1.0, 0.0)  # a second per value: the prediction tells how many are counted
    known = replace(
        FIXTURE,
        kernels=tuple(
            replace(k, call=0.0, per_output=0.0, per_byte=0.0, decode=rate, rows=()) for k in FIXTURE.kernels
        ),
    )
    for candidate in sparse_candidates(mask, dtype, Setting("latency", 1, known)):
        packed = candidate.layout.pack(mask.to(dtype), mask)
        assert packed.nbytes == candidate.nbytes
        if candidate.prediction is not None:
            stored = packed.values.numel()
            assert candidate.prediction.decode == pytest.approx(
                stored, rel=0.06 if candidate.layout.format == "nm" else 0, abs=1
            )


def test_on_a_gpu_csr_is_laid_out_for_it() -> None:
    mask = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) < 0.3
    for dtype in (torch.float32, torch.bfloat16):
        found = {str(c.layout): c for c in sparse_candidates(mask, dtype, Setting("bytes", device="cuda"))}
        assert {"wcsr8", "wcsr16", "bitmap"} <= set(found)
        assert not [label for label in found if label.startswith("csr")]
        for candidate in found.values():
            assert candidate.kernel.startswith(f"{candidate.layout.format}_")
            assert candidate.nbytes == candidate.layout.pack(mask.to(dtype), mask).nbytes


def test_blocks_are_looked_at_where_the_mask_has_them() -> None:
    torch.manual_seed(0)
    kept = (torch.rand(8, 8) < 0.3).repeat_interleave(16, 0).repeat_interleave(16, 1)
    labels = {str(c.layout) for c in sparse_candidates(kept, torch.float32, Setting("bytes"))}
    assert {"bsr16x16", "bsr8x8", "bsr16x1"} <= labels
    assert choose(kept.float(), kept, Setting("bytes")).best.layout.format == "bsr"
    scattered = {str(c.layout) for c in sparse_candidates(torch.rand(128, 128) < 0.5, torch.float32, Setting("bytes"))}
    assert scattered == {"csr8", "csr16", "bitmap"}


def test_reasons_name_the_choice_what_binds_and_the_next_best() -> None:
    mask = torch.zeros(2048, 2048, dtype=torch.bool)
    mask[:, ::2] = True
    mask[::2] ^= True
    unlike = replace(FIXTURE, kernels=tuple(k for k in FIXTURE.kernels if k.kernel in (TORCH, OWN)))
    said = choose(mask.float(), mask, Setting("bytes")).reason
    assert said == "nm2:4: 53% of the dense bytes; bitmap 53%; csr8 63%"
    assert choose(mask.float(), mask, Setting("latency", 1, unlike)).reason == "dense"
    full = torch.ones(64, 64, dtype=torch.bool)
    assert (
        choose(full.float(), full, Setting("bytes")).reason == "dense: the smallest, bsr32x32, takes 100% of its bytes"
    )


@native
def test_reasons_by_time_give_speedups_over_linear() -> None:
    torch.manual_seed(0)
    mask = torch.rand(1536, 576) < 0.5
    choice = choose(mask.float(), mask, Setting("latency", 1, FIXTURE), (TORCH, OWN))
    said = r"bitmap: predicted 3\.00x of F\.linear, bound by bytes; csr16 2\.1\dx, csr8 1\.9\dx, dense_cpu 1\.47x"
    assert re.fullmatch(said, choice.reason)
    nearly = torch.rand(64, 16384) < 0.99
    kept = choose(nearly.float(), nearly, Setting("latency", 1, FIXTURE), (TORCH, OWN))
    assert kept.best.layout.format == "dense"
    assert kept.reason.endswith("; it is taken from 1.05x on")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(576, 1536), nn.ReLU(), nn.Linear(1536, 576), nn.Linear(576, 24))


@native
def test_parts_of_a_fused_product_share_a_call_whatever_their_formats() -> None:
    """A sparse kernel that is slow to call and quick to multiply: not worth it alone, worth it in company."""
    mask = torch.rand(192, 576, generator=torch.Generator().manual_seed(0)) < 0.1
    slow = tuple(replace(k, call=k.call if k.format == "dense" else 1e-3) for k in FIXTURE.kernels)
    setting = Setting("latency", 1, replace(FIXTURE, kernels=slow, member=1e-6))
    assert choose(mask.float(), mask, setting, (OWN,)).best.layout.format == "dense"
    assert choose(mask.float(), mask, replace(setting, fused=True), (OWN,)).best.layout.format != "dense"


@pytest.mark.parametrize("objective", ["latency", "bytes"])
def test_auto_compiles_to_what_it_says_and_computes_the_same(objective: str) -> None:
    x = torch.randn(3, 576)
    compiled = sparsec.compile(
        model(), f"magnitude(0.6, targets=('0', '2')),freeze,lower(auto, objective={objective})", example_inputs=x
    )
    frozen = sparsec.compile(model(), "magnitude(0.6, targets=('0', '2')),freeze", example_inputs=x)
    torch.testing.assert_close(compiled(x), frozen(x), rtol=1e-4, atol=1e-4)
    weights = compiled.sparsec.graph.weights
    for name in ("0.weight", "2.weight"):
        assert isinstance(compiled.get_submodule(name[0]), SparseLinear)
        assert weights[name].reason.startswith(weights[name].format)
    rows = {row.name: row for row in compiled.sparsec.report().layers}
    assert rows["0.weight"].reason == weights["0.weight"].reason
    assert rows["0.weight"].speedup_predicted > 1
    assert rows["0.weight"].binds in ("bytes", "decode", "call")
    unpruned = compiled.get_submodule("3")
    assert isinstance(unpruned, DenseLinear) == (objective == "latency")


def test_auto_without_native_kernels_chooses_by_bytes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import sparsec.lowering.setting as setting
    from sparsec.kernels import NativeStatus

    monkeypatch.setattr(setting, "status", lambda: NativeStatus(built=False, reason="none here"))
    monkeypatch.setattr(setting, "native_serves", lambda name: False)
    compiled = sparsec.compile(model(), "magnitude(0.6),freeze,lower(auto)", example_inputs=torch.randn(2, 576))
    assert any("chosen by bytes" in n and "none here" in n for n in compiled.sparsec.records[-1].notes)
    assert compiled.sparsec.graph.weights["0.weight"].format == "bitmap"


@native
def test_a_bad_file_of_constants_is_refused_before_anything_is_packed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    monkeypatch.setenv("SPARSEC_CALIBRATION", str(bad))
    with pytest.raises(ConstantsError, match="holds no constants of this version"):
        sparsec.compile(model(), "magnitude(0.6),freeze,lower(auto)", example_inputs=torch.randn(2, 576))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lower(bsr)", "0.weight: "),
        ("lower(nm)", "0.weight: "),
    ],
)
def test_a_format_that_cannot_hold_a_weight_is_refused_by_name(spec: str, message: str) -> None:
    odd = nn.Sequential(nn.Linear(18, 20))
    with pytest.raises(FormatError) as caught:
        sparsec.compile(odd, f"magnitude(0.3),freeze,{spec}", example_inputs=torch.randn(2, 18))
    assert str(caught.value).startswith(message)
    assert "ignore=('0',)" in str(caught.value)


def test_blocks_and_widths_reach_the_format() -> None:
    x = torch.randn(2, 576)
    for spec, format_name in (("bsr8x4", "bsr8x4"), ("csr8", "csr8"), ("csr", "csr16"), ("bitmap", "bitmap")):
        compiled = sparsec.compile(model(), f"magnitude(0.5),freeze,lower({spec})", example_inputs=x)
        assert compiled.sparsec.graph.weights["0.weight"].format == format_name


def generating() -> nn.Module:
    """A causal language model."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def encoding() -> nn.Module:
    """An encoder."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    return BertModel(BertConfig(**sizes, num_attention_heads=2))


@native
@pytest.mark.parametrize(
    ("make", "spec", "rows"),
    [(generating, "lower(auto)", 1), (encoding, "lower(auto)", 4096), (encoding, "lower(auto, tokens=3)", 3)],
)
def test_formats_are_chosen_for_what_the_model_is_used_for(
    make: Callable[[], nn.Module], spec: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[int] = set()

    def recorded(matrix: Tensor, mask: Tensor | None, setting: Setting, kernels: Sequence[str]) -> Choice:
        asked.add(setting.rows)
        return choose(matrix, mask, setting, kernels)

    monkeypatch.setattr(sparsec.passes.lower, "choose", recorded)
    compiled = sparsec.compile(make(), f"magnitude(0.9),freeze,{spec}")
    assert asked == {rows}
    notes = compiled.sparsec.records[-1].notes
    assert any("for 4096 tokens at a time" in note for note in notes) == (rows == 4096)


@native
def test_a_part_of_a_group_is_never_predicted_to_take_longer_than_a_call_of_its_own() -> None:
    """Regression: measured on a busy machine, a member cost more than a call, and groups were kept from the sparse kernels."""
    setting = Setting("latency", 1, replace(FIXTURE, member=1.0))
    matrix = torch.ones(64, 64)
    alone, fused = (list(dense_candidates(matrix, replace(setting, fused=f), (TORCH, OWN))) for f in (False, True))
    assert [c.prediction for c in fused] == [c.prediction for c in alone]
