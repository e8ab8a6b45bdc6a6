"""Constants by measuring: what is timed, in which order, on which memory, and what a fused product is predicted to take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.cost import trials
from sparsec.cost.constants import load_file
from sparsec.cost.measure import measure_kernels
from sparsec.cost.model import Work
from sparsec.cost.trials import dense_trial, packed_trial, time_cold, time_walk
from sparsec.formats.layout import Layout
from sparsec.kernels import status
from sparsec.report.predict import predict
from sparsec.timing.arena import Arena, last_level_cache

FIXTURE = Path(__file__).parent / "calibration.json"


class Three(nn.Module):
    """Three linears of one value."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) + self.b(x) + self.c(x)


@pytest.fixture(scope="module")
def fused():
    return sparsec.compile(Three(), "magnitude(0.5),freeze,fuse,lower(csr)", example_inputs=torch.ones(2, 32))


def test_the_arena_hands_out_memory_that_was_not_read_for_longest() -> None:
    arena = Arena()
    like = torch.empty(1 << 20, dtype=torch.float32)
    first, second = arena.take(like), arena.take(like)
    assert second.data_ptr() - first.data_ptr() == like.nbytes
    for _ in range(arena._memory.nbytes // like.nbytes - 2):
        arena.take(like)
    assert arena.take(like).data_ptr() == first.data_ptr()
    assert arena._memory.nbytes >= min(1 << 30, 4 * last_level_cache())
    assert torch.isfinite(first).all()


def test_every_call_of_a_cold_timing_has_weights_of_its_own() -> None:
    seen: list[int] = []

    class Layer(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = linear.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape == (3, 64)
            seen.append(self.weight.data_ptr())
            return x

    tried = dense_trial("k", Layer, 32, 64, torch.float32)
    (sample,) = time_cold([tried], rows=3, arena=Arena(), rounds=4, dtype=torch.float32)
    assert len(seen) == len(set(seen)) == 6
    assert sample.rows == 3
    assert sample.work == Work(32, 64, 2048, 8192)


def test_a_walk_goes_through_all_kernels_in_every_round_as_a_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []

    class Layer(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.weight = linear.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape == (1, self.weight.shape[1])
            seen.append((self.weight.shape[0], self.weight.data_ptr()))
            return x

    monkeypatch.setattr(trials, "last_level_cache", lambda: 40_000)
    sizes = (8, 16, 32)  # 14,336 bytes of weights in all
    tried = [dense_trial("k", Layer, n, 64, torch.float32) for n in sizes]
    samples = time_walk(tried, Arena(), rounds=10, dtype=torch.float32)
    assert [s.work.out_features for s in samples] == list(sizes)
    rounds = [seen[i : i + 3] for i in range(0, len(seen), 3)]
    assert len(rounds) == 12
    assert all({n for n, _ in turn} == set(sizes) for turn in rounds)
    assert len({turn[0][0] for turn in rounds}) == 3, "none is always the first"
    assert len({pointer for _, pointer in seen}) == 3 * 6, "as many copies as two caches hold"


@pytest.mark.skipif(not status().built, reason="times native kernels")
def test_a_member_of_a_group_costs_more_than_nothing_and_less_than_a_call_alone() -> None:
    assert 0 < trials.time_member(20, torch.float32, lambda: None) < 100e-6


@given(member=st.floats(0, 1e-3), call=st.floats(1e-6, 1e-4))
@settings(max_examples=10, deadline=None)
def test_a_fused_product_pays_one_call_and_its_members(fused, member: float, call: float) -> None:
    known = replace(load_file(FIXTURE), member=member)
    known = replace(known, kernels=tuple(replace(k, call=call) for k in known.kernels))
    graph = fused.sparsec.graph
    (found,) = predict(graph, known)
    works = [Work.of(graph.weights[name].packed) for name in found.weights]
    read = sum(w.nbytes for w in works)
    alone = [known.predict("csr_cpu", "csr16", torch.float32, w, working_set=read).seconds for w in works]
    assert len(alone) == 3
    assert found.seconds == pytest.approx(sum(alone) - 2 * call + 2 * min(member, call))


@pytest.mark.skipif(not status().built, reason="times native kernels")
def test_real_kernels_are_measured_and_bytes_cost_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsec.cost import measure

    monkeypatch.setattr(measure, "COLD", (((192, 576), 0.5), ((576, 576), 0.5), ((576, 576), 0.1), ((1536, 576), 0.3)))
    monkeypatch.setattr(measure, "WARM", (((64, 512), 0.5), ((64, 512), 0.1), ((128, 512), 0.3)))
    monkeypatch.setattr(measure, "MANY", (((192, 576), 0.5), ((192, 576), 0.1)))
    monkeypatch.setattr(measure, "MANY_ROWS", (4,))
    said: list[tuple[str, int, int]] = []
    found = measure_kernels([torch.float32], 1e-10, lambda *a: said.append(a))
    plain = {"dense_torch", "dense_cpu", "csr_cpu", "bitmap_cpu", "bsr_cpu", "nm_cpu"}
    assert plain | {"dense_int_cpu", "bitmap_int_cpu", "nm_int_cpu", "bsr_int_cpu"} == {k.kernel for k in found}
    assert {"csr8", "csr16"} <= {k.format for k in found}
    for cost in found:
        small, large = (cost.predict(Work.dense(n, n, torch.float32)).seconds for n in (64, 8192))
        assert 0 < small < large
    assert said[-1][1] == said[-1][2]


@pytest.mark.parametrize("layout", list(Layout.calibrated("cpu", 0.5)), ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_matrix_tried_in_16_bits_lies_as_one_that_was_packed_in_16_bits(layout: Layout, dtype: torch.dtype) -> None:
    """Its values alone were converted, and no kernel took them with the bits of another lane."""
    mask = layout.sample_mask((48, 64), 0.5, torch.Generator().manual_seed(0))
    trial = packed_trial("k", layout.pack(mask.float(), mask), dtype)
    module = trial.make(Arena())
    assert not module.packed.layout_faults()
    assert trial.work.nbytes == Work.of(layout.pack(mask.to(dtype), mask)).nbytes
    module(torch.ones(1, 64, dtype=dtype))
