"""The cost model of a GPU: measured (here through Triton's interpreter, on small sizes), kept, and chosen by."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.cost import __main__ as cli
from sparsec.cost import choice, measure_gpu
from sparsec.cost import constants as cal
from sparsec.cost.choice import TORCH, Setting, choose, sparse_candidates
from sparsec.cost.constants import Constants, Key, from_json, load_file, save_file, to_json
from sparsec.cost.fit import Timed, fit
from sparsec.cost.model import KernelCost, Rate, ReadRate, RowsRate, Work
from sparsec.errors import ConstantsError, KernelError
from sparsec.formats.layout import Layout
from sparsec.kernels import KERNELS, Kernel, Problem, gpu, status
from sparsec.lowering.setting import unpredicted
from sparsec.machine import gpu_clock
from sparsec.report.__main__ import main as report
from sparsec.timing import latency
from sparsec.timing.latency import PairTime, layer_times, replayed_time

FIXTURE = Path(__file__).parent / "calibration.json"
SMALL = measure_gpu.Sizes(
    layouts=tuple(each for each in Layout.calibrated("cuda", 0.5) if str(each) != "bsr64x64"),
    cold=((16, 64), (32, 32)),
    warm=((16, 32),),
    many=((16, 64),),
    densities=(0.5,),
    rows=(3,),
    reads=(1 << 12, 1 << 14),
    rotate_bytes=1,
    again=1,
    rounds=1,
)
BANDWIDTH, INSTRUCTIONS = 4.0e12, 20e12
"""Of an invented GPU: bytes and instructions of lanes a second."""


def invented() -> Constants:
    """Dense and 16-bit lists at the bandwidth; a bitmap that decodes 20 instructions a position."""

    def cost(kernel: str, layout: str, decode: Rate, per_byte: float = 1 / BANDWIDTH) -> KernelCost:
        rows = (RowsRate(64, Rate(1e-12, 0.0)),)
        return KernelCost(kernel, layout, "bfloat16", 3e-6, 0.0, per_byte, decode, rows, 0.1)

    kernels = (
        cost(TORCH, "dense", Rate(0.0, 0.0)),
        cost("wcsr_triton", "wcsr16", Rate(9.3 / INSTRUCTIONS, 0.0)),
        cost("wcsr_triton", "wcsr8", Rate(12.9 / INSTRUCTIONS, 0.0)),
        cost("bitmap_triton", "bitmap", Rate(0.0, 20 / INSTRUCTIONS)),
        cost("bsr_triton", "bsr64x64", Rate(0.0, 0.0)),
        cost("nm_triton", "nm", Rate(15 / INSTRUCTIONS, 0.0)),
    )
    key = Key("cuda", "A GPU", "sm_90", 1, "2.13.0", "0123")
    return Constants(key, 0.0, (ReadRate(1 << 30, 1 / BANDWIDTH),), None, kernels)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> tuple[Kernel, ...]:
    """As if there were a GPU."""
    here = tuple(replace(k, missing=list) if k.name.endswith("_triton") else k for k in KERNELS)
    monkeypatch.setattr(measure_gpu, "known", lambda: here)
    monkeypatch.setattr(choice, "select", lambda problem: sparsec.kernels.select(problem, here))
    return here


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")
def test_every_kernel_is_measured_by_cold_and_warm_and_many_rows(served: tuple[Kernel, ...]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reads = measure_gpu.measure_reads(device, SMALL)
    assert [r.nbytes for r in reads] == list(SMALL.reads)
    said = []
    progress = lambda what, done, total: said.append((done, total))  # noqa: E731
    found = measure_gpu.measure_kernels([torch.bfloat16], device, reads[-1].per_byte, SMALL, progress)
    names = {(k.kernel, k.format) for k in found}
    assert names == {
        (TORCH, "dense"),
        ("wcsr_triton", "wcsr8"),
        ("wcsr_triton", "wcsr16"),
        ("csr_triton", "csr32"),
        ("bitmap_triton", "bitmap"),
        ("bsr_triton", "bsr16x16"),
        ("nm_triton", "nm"),
    }
    assert said[-1] == (4, 4), "two cold shapes, a warm one, and one with three rows"
    for cost in found:
        assert cost.dtype == "bfloat16"
        assert [r.rows for r in cost.rows] == [3]
        assert cost.predict(measure_gpu.Work.dense(64, 64, torch.bfloat16)).seconds > 0
    known = Constants(Key.here("cuda"), 0.0, reads, None, tuple(found))
    assert from_json(to_json(known)) == known


@pytest.mark.parametrize("density", [0.5, 0.25, 0.1])
def test_matrices_of_a_calibration_keep_the_share_that_they_are_named_for(
    density: float, served: tuple[Kernel, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(128, 256, generator=generator)
    found = [packed for _, packed in measure_gpu._packed(weight, density, SMALL.layouts, generator)]
    assert len(found) == (len(SMALL.layouts) if density == 0.5 else len(SMALL.layouts) - 1)
    for packed in found:
        assert 1 - packed.sparsity == pytest.approx(density, abs=0.02), packed.describe()


@given(density=st.sampled_from([0.5, 0.3, 0.1]), rows=st.sampled_from([1, 4]))
def test_a_gpu_is_predicted_by_bytes_and_instructions(density: float, rows: int) -> None:
    here = tuple(replace(k, missing=list) if k.name.endswith("_triton") else k for k in KERNELS)
    mask = torch.rand(1024, 2048, generator=torch.Generator().manual_seed(0)) < density
    setting = Setting("latency", rows, invented(), device="cuda")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "select", lambda problem: sparsec.kernels.select(problem, here))
        found = {str(c.layout): c for c in sparse_candidates(mask, torch.bfloat16, setting)}
    assert {"wcsr8", "wcsr16", "bitmap"} <= set(found)
    sixteen = found["wcsr16"].prediction
    assert sixteen.read == pytest.approx(found["wcsr16"].nbytes / BANDWIDTH)
    assert sixteen.decode == pytest.approx(9.3 * 1024 * 2048 * density / INSTRUCTIONS, rel=0.05)
    assert found["bitmap"].prediction.decode == pytest.approx(20 * 1024 * 2048 / INSTRUCTIONS)


@pytest.mark.parametrize(("density", "label"), [(0.5, "dense"), (0.3, "wcsr8"), (0.1, "wcsr8"), (0.9, "dense")])
def test_dense_is_kept_where_it_wins(density: float, label: str, served: tuple[Kernel, ...]) -> None:
    mask = torch.rand(11008, 2048, generator=torch.Generator().manual_seed(0)) < density
    known = invented()
    slower = tuple(replace(k, per_byte=1.4 * k.per_byte) if k.kernel != TORCH else k for k in known.kernels)
    setting = Setting("latency", 1, replace(known, kernels=slower), device="cuda")
    best = choose(mask.bfloat16(), mask, setting)
    assert str(best.best.layout) == label, best.reason
    assert best.best.kernel == (TORCH if label == "dense" else "wcsr_triton")
    assert "F.linear" in best.reason or best.reason.startswith("dense")


def test_a_library_for_many_rows_is_never_taken_for_few(
    served: tuple[Kernel, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tuple(replace(k, missing=list) if k.name == "nm_cusparselt" else k for k in served)
    monkeypatch.setattr(choice, "select", lambda problem: sparsec.kernels.select(problem, here))
    scores = torch.rand(512, 256, 4, generator=torch.Generator().manual_seed(0))
    mask = (scores.argsort(2).argsort(2) < 2).view(512, 1024)
    known = invented()
    fast = replace(known.kernels[0], kernel="nm_cusparselt", format="nm", rows=(RowsRate(64, Rate(1e-13, 0.0)),))
    known = replace(known, kernels=(*known.kernels, fast))
    for rows, kernel in ((512, "nm_cusparselt"), (64, "nm_cusparselt"), (32, "nm_triton"), (1, "nm_triton")):
        setting = Setting("latency", rows, known, device="cuda")
        (found,) = (c for c in sparse_candidates(mask, torch.bfloat16, setting) if c.layout.format == "nm")
        assert (str(found.layout), found.kernel) == ("nm2:4", kernel)
        assert found.prediction is not None
    best = choose(mask.bfloat16(), mask, Setting("latency", 512, known, device="cuda"))
    assert best.best.kernel == "nm_cusparselt", best.reason


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True), st.floats(1e-12, 1e-11))
def test_a_kernel_for_many_rows_alone_is_what_it_takes_for_those(sizes: list[int], per_value: float) -> None:
    works = [Work(64 * n, 1024, 32 * n * 1024, 64 * n * 1024) for n in sizes]
    samples = [Timed(w, rows, rows / 64 * per_value * w.stored) for w in works for rows in (64, 512)]
    found = fit("nm_cusparselt", "nm", "bfloat16", samples, 1 / BANDWIDTH)
    for sample in samples:
        assert found.predict(sample.work, sample.rows).seconds == pytest.approx(sample.seconds)
    assert found.predict(works[0], 1024).seconds == pytest.approx(16 * per_value * works[0].stored)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_blocks_of_a_gpu_are_those_that_its_kernels_are_good_at(served: tuple[Kernel, ...]) -> None:
    kept = (torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.1).repeat_interleave(64, 0)
    kept = kept.repeat_interleave(64, 1)
    setting = Setting("latency", 1, invented(), device="cuda")
    labels = {str(c.layout) for c in sparse_candidates(kept, torch.bfloat16, setting)}
    assert {"bsr64x64", "bsr32x32", "bsr16x16"} <= labels
    assert not {"bsr16x1", "bsr8x8"} & labels
    assert choose(kept.bfloat16(), kept, setting).best.layout.format == "bsr"


def test_what_one_call_shares_on_a_cpu_is_several_calls_on_a_gpu(served: tuple[Kernel, ...]) -> None:
    mask = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) < 0.3
    for fused in (False, True):
        setting = Setting("latency", 1, invented(), device="cuda", fused=fused)
        assert all(c.prediction.call == 3e-6 for c in sparse_candidates(mask, torch.bfloat16, setting))


def test_a_gpu_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status()  # before: it builds the native kernels where there are none
    monkeypatch.delenv(cal.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu, "identity", lambda: ("A GPU", "sm_90"))
    monkeypatch.setattr(gpu, "digest", lambda: "0123")
    monkeypatch.setattr(cal, "load_average", lambda: 0.0)
    here = Key.here("cuda")
    assert (here.device, here.processor, here.isa, here.kernels) == ("cuda", "A GPU", "sm_90", "0123")
    assert here.file() != Key.here().file()
    monkeypatch.setattr(cal, "measure_machine", lambda key, dtypes, progress: replace(invented(), key=key))
    assert cal.machine_constants([torch.bfloat16], device="cuda", measuring=False) is None
    found = cal.machine_constants([torch.bfloat16], device="cuda")
    assert found.constants == replace(invented(), key=here)
    assert cal.machine_constants([torch.bfloat16], device="cuda", measuring=False).constants == found.constants
    poor = replace(found.constants, kernels=(replace(invented().kernels[0], error=0.9),))
    assert "sparsec cost --device cuda --force" in cal.remarks(poor)[0]


def test_a_calibration_of_the_other_device_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cal.VARIABLE, str(FIXTURE))
    with pytest.raises(ConstantsError, match=r"measured on cpu, and cuda is asked for; write it with .*--device cuda"):
        cal.machine_constants([torch.bfloat16], device="cuda")
    path = tmp_path / "gpu.json"
    save_file(invented(), path)
    monkeypatch.setenv(cal.VARIABLE, str(path))
    with pytest.raises(ConstantsError, match="was measured on cuda, and cpu is asked for"):
        cal.machine_constants([torch.bfloat16])
    taken = cal.machine_constants([torch.bfloat16], device="cuda")
    assert taken.constants == load_file(path) == invented()
    assert "was measured elsewhere (processor A GPU" in taken.notices[-1]
    shown = cli.lines(taken)
    assert ["cuda", "A", "GPU"] in [line.split() for line in shown]
    assert not any("fused product" in line for line in shown)
    content = json.loads(path.read_text())
    assert content["member"] is None


def test_where_times_cannot_be_predicted_it_is_said_why() -> None:
    assert unpredicted(["cpu", "cuda"]) == "weights are on cpu and cuda, and the cost model knows one device at a time"
    assert unpredicted(["xpu"]) == "the cost model knows the CPU and CUDA devices, and weights are on xpu"
    assert unpredicted(["cuda"]) == "; ".join(gpu.missing())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_is_not_there_is_not_measured() -> None:
    with pytest.raises(KernelError, match="no kernel can be measured on a GPU: "):
        cal.measure_machine(Key.here("cuda"), [torch.bfloat16])
    assert gpu_clock().startswith("unknown (")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_commands_name_the_device_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    for run in (cli.main, report):
        assert run(["--device", "cuda"]) == 2
        assert "--device cuda: torch sees no CUDA device" in capsys.readouterr().err


def test_layers_on_a_gpu_are_timed_by_replays_of_cold_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = nn.Linear(512, 2048), nn.Linear(512, 64)
    assert replayed_time([slow], [fast], rounds=5, rotate_bytes=1 << 22).speedup > 1
    assert layer_times({}, 2) == {}
    monkeypatch.setattr(latency, "take_turns", lambda cases, rounds, warm_up: [[3.0] * rounds, [1.5] * rounds])
    both = replayed_time([slow, slow], [fast], rounds=5, rotate_bytes=1 << 22)
    assert both == PairTime(4.0, 6000.0, 1500.0), "seconds a call, of two layers against one"


def test_a_problem_of_a_gpu_is_served_by_its_kernels(served: tuple[Kernel, ...]) -> None:
    assert sparsec.kernels.select(Problem("wcsr", 8, 8, device="cuda"), served).name == "wcsr_triton"
