"""The GPU's benchmark, on small sizes: on a GPU where there is one, else through Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsec.bench import gpu as bench
from sparsec.bench import gpu_run
from sparsec.bench.__main__ import main
from sparsec.bench.cases import Case, asked, cases
from sparsec.bench.gpu_models import NO_TIME, Decoded, headlines, time_decoding
from sparsec.cost.constants import Found, load_file
from sparsec.cost.model import KernelCost, Rate, RowsRate
from sparsec.errors import KernelError
from sparsec.formats import Packed
from sparsec.formats.layout import Layout
from sparsec.kernels import gpu
from sparsec.kernels.gpu import launch as gpu_launch
from sparsec.machine import machine
from sparsec.timing import replay
from sparsec.timing.recorded import Decoder
from sparsec.timing.spread import Spread

FIXTURE = Path(__file__).parent / "calibration.json"
COST = (1e-4, 0.0, 1e-9, Rate(0.0, 0.0), (), 0.0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


def laid(*names: str) -> list[Layout]:
    """Layouts by their spelling."""
    return [Layout.parse(name) for name in names]


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(gpu, "tuned_file", lambda: tmp_path / "gpu.json")
    monkeypatch.setattr(bench, "select", lambda problem: next(k for k in gpu_kernels() if k.format == problem.format))
    monkeypatch.setattr(replay, "MAX_COPIES", 8)  # the interpreter takes milliseconds for one
    gpu_launch.prefer({})
    gpu_launch.take_asked()
    yield
    gpu_launch.prefer({})


def gpu_kernels():  # type: ignore[no-untyped-def]
    from sparsec.kernels import KERNELS

    return [k for k in KERNELS if k.name.endswith("_triton")]


def test_every_kernel_is_checked_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(bench.check_kernels(laid("wcsr16", "nm2:4"), ["bf16"], [1, 9], DEVICE, shape=(16, 32)))
    assert [(c.layout, c.rows) for c in found] == [("wcsr16", 1), ("wcsr16", 9), ("nm2:4", 1), ("nm2:4", 9)]
    assert all(c.error is not None and 0 < c.error <= 1 for c in found)
    right = gpu.product
    for spoil in (lambda out: out * 1.1, lambda out: out.fill_(float("nan"))):
        monkeypatch.setattr(gpu, "product", lambda *args, spoil=spoil: spoil(right(*args)))
        assert all(c.wrong for c in bench.check_kernels(laid("wcsr16"), ["fp32"], [2], DEVICE, shape=(16, 32)))


def test_a_case_is_timed_with_the_fastest_of_its_configurations_which_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases({(16, 64): None}, [asked(f) for f in ("wcsr16", "bitmap")], [0.5], ["bf16"], [1])
    found = bench.measure(case, DEVICE, rounds=2, rotate_bytes=2000)
    lines = found.lines
    assert found.left_out == []
    assert [c.layout.partition(",")[0] for c in found.checked] == ["wcsr16"] * 4 + ["bitmap"] * 4
    assert not any(c.wrong for c in found.checked)
    assert [(line.layout, line.kernel) for line in lines] == [
        ("wcsr16", "wcsr_triton"),
        ("bitmap", "bitmap_triton"),
    ]
    for line in lines:
        assert line.dense.median > 0
        assert line.sparse.repeats == 2
        assert line.bytes_per_second == pytest.approx(line.nbytes / line.sparse.median)
    buckets = ("wcsr16 1 256", "bitmap 1")
    assert set(gpu_launch.preferred()) == set(buckets)
    assert [line.config for line in lines] == [gpu_launch.preferred()[b] for b in buckets]
    # In another process they are found again.
    path = Path(bench.keep_tuned())
    assert path == gpu.tuned_file()
    kept = gpu_launch.preferred()
    gpu_launch.prefer({})
    gpu.take_tuned.__wrapped__()
    assert gpu_launch.preferred() == kept
    path.write_text("[1]")
    with pytest.warns(UserWarning, match=r"cannot be used: .*; delete it, or tune again"):
        gpu.take_tuned.__wrapped__()


def test_what_cannot_be_measured_is_named() -> None:
    todo = cases({(24, 20): None}, [asked("bsr64x64")], [0.5], ["bf16"], [1])
    found = bench.measure(todo[0], DEVICE, rounds=1)
    assert not found.lines
    assert "24x20 as bsr64x64, 1 rows: " in found.left_out[0]
    (found,) = bench.table_all(todo * 3, DEVICE, 1, bench.Deadline(0), None)
    assert not found.lines
    assert found.left_out == ["no time was left for 3 of 3 cases; give more with --budget"]


def tiny(name: str, dtype: torch.dtype, layers: int | None, device: torch.device | str = DEVICE) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers or 1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


@torch.no_grad()
def test_decoding_takes_the_tokens_that_the_model_takes() -> None:
    torch.manual_seed(0)
    model = tiny("", torch.float32, 2)
    ids = torch.arange(7, device=DEVICE)[None] * 5
    decoder = Decoder(model, ids, 3)
    # The step that warmed up, then three more; the first one is given the prompt's last token again.
    taken = torch.cat([ids, ids[:, -1:]], 1)
    for _ in range(4):
        taken = torch.cat([taken, model(taken).logits[:, -1:].argmax(-1)], 1)
    decoder.seconds(3)
    assert torch.equal(decoder._token, taken[:, -1:])
    assert int(decoder._position) == ids.shape[1] + 4


def test_models_are_timed_dense_and_sparse_and_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = "magnitude({sparsity}, scope='layer'),freeze,lower(csr)"
    found = time_decoding("tiny", "fp32", [0.5], DEVICE, 2, 1, model=tiny, tokens=2, passes=spec)
    assert [m.variant for m in found] == ["dense", "50% zero"]
    assert all(m.seconds is not None and m.seconds.median > 0 and m.nbytes > 0 for m in found)
    assert found[0].speedup is not None
    assert found[0].speedup.median == 1
    (case,) = cases({(16, 32): None}, [asked("wcsr8")], [0.5], ["bf16"], [1])
    report = gpu_run.GpuReport(tmp_path, machine(), DEVICE)
    report.checked = list(bench.check_kernels(laid("wcsr8"), ["bf16"], [1], DEVICE, shape=(16, 32)))
    report.add(bench.measure(case, DEVICE, 2, rotate_bytes=2000, tune=False))
    known = replace(load_file(FIXTURE), kernels=(KernelCost("wcsr_triton", "wcsr8", "bfloat16", *COST),))
    monkeypatch.setattr(
        gpu_run, "machine_constants", lambda dtypes, **options: Found(known, "a test", ("it was busy",))
    )
    report.measure_constants("bf16", bench.Deadline(99), None)
    many = replace(report.lines[0], case=replace(case, rows=8))
    eight = replace(known, kernels=(replace(known.kernels[0], rows=(RowsRate(8, Rate(1e-3, 0.0)),)),))
    (line,) = bench.predicted([many], eight)
    assert line.predicted == pytest.approx(1e-4 + 1e-3 * many.work.stored)
    report.models = [*found, replace(found[1], mode="compiled graph", seconds=None, speedup=None, note="it failed")]
    report.write()
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["schema"] == gpu_run.SCHEMA
    assert content["table"][0]["layout"] == "wcsr8"
    assert content["table"][0]["rows"] == 1
    assert [m["variant"] for m in content["models"]] == ["dense", "50% zero", "50% zero"]
    assert content["models"][2]["seconds"] is None
    text = (tmp_path / "bench.md").read_text()
    assert "1 products, 0 wrong" in text
    assert content["table"][0]["predicted"] == pytest.approx(1e-4 + 1e-9 * content["table"][0]["nbytes"])
    assert f"| {1e6 * content['table'][0]['predicted']:.1f} |" in text
    assert "The cost model is within 15% of" in text
    assert "- left out: it was busy" in text
    assert load_file(tmp_path / "cost.json") == known
    assert "| 16x32 | unstructured |" in text
    assert "| compiled graph | - | - | - |" in text
    report.checked = [replace(report.checked[0], error=2.0)]
    assert report.wrong()
    assert "- WRONG: wcsr8 bf16, 1 rows" in report.markdown()


def test_what_a_run_has_no_time_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(dtypes: list[torch.dtype], *, progress: Callable[[str, int, int], None], **options: object) -> None:
        progress("timing kernels", 0, 9)
        raise AssertionError("nothing more is begun")

    monkeypatch.setattr(gpu_run, "machine_constants", slow)
    report = gpu_run.GpuReport(tmp_path, machine(), DEVICE)
    report.measure_constants("bf16", bench.Deadline(0), None)
    assert report.left_out == ["the cost model: TimeoutError: no time was left for it; give more with --budget"]
    found = time_decoding(
        "tiny", "fp32", [0.5, 0.9], DEVICE, 1, 1, bench.Deadline(0), bench.Deadline(0), model=tiny, tokens=1
    )
    said = [(m.variant, m.mode, m.note) for m in found if m.seconds is None]
    assert said == [
        ("50% zero", "graph", NO_TIME),
        ("90% zero", "graph", NO_TIME),
        ("dense", "compiled graph", NO_TIME),
    ]
    report.models = found
    assert f"| 50% zero | graph | - | - | - | 0.00 | {NO_TIME} |" in report.markdown()


def test_without_a_dense_time_there_is_no_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: it was 1.00x."""
    models = []

    class Fails(Decoder):
        def __init__(self, model: torch.nn.Module, prompt: torch.Tensor, tokens: int, compiled: bool = False) -> None:
            models.append(model)
            if compiled and model is models[0]:
                raise MemoryError("no room\nat all")
            super().__init__(model, prompt, tokens)

    monkeypatch.setattr("sparsec.bench.gpu_models.Decoder", Fails)
    spec = "magnitude({sparsity}, scope='layer'),freeze,lower(csr)"
    late = bench.Deadline(99)
    found = time_decoding("tiny", "fp32", [0.5], DEVICE, 1, 1, late, late, model=tiny, tokens=1, passes=spec)
    assert [(m.variant, m.note, m.speedup is None) for m in found[2:]] == [
        ("dense", "MemoryError: no room", True),
        ("50% zero", "", True),
    ]
    assert found[3].seconds is not None


@pytest.mark.slow
def test_a_kernel_that_fails_or_gives_nan_is_wrong_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu.product

    def spoiled(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        if packed.format == "bitmap":
            raise MemoryError("out of shared memory\nand more")
        out = right(x, packed, bias)
        return out.fill_(float("nan")) if packed.format == "nm" else out

    monkeypatch.setattr(gpu, "product", spoiled)
    report = gpu_run.GpuReport(tmp_path, machine(), DEVICE)
    report.checked += bench.check_kernels(laid("bitmap", "nm2:4", "wcsr16"), ["bf16"], [1], DEVICE, (16, 32))
    assert [(c.error is None, c.note, c.wrong) for c in report.checked] == [
        (True, "MemoryError: out of shared memory", True),
        (True, "", True),
        (False, "", False),
    ]
    todo = cases({(16, 32): None}, [asked(f) for f in ("bitmap", "nm2:4", "wcsr16")], [0.5], ["bf16"], [1])
    for found in bench.table_all(todo, DEVICE, 1, bench.Deadline(99), None):
        report.add(found)
    assert {line.layout for line in report.lines} == {"wcsr16", "nm2:4"}
    assert "16x32 as bitmap, 1 rows: MemoryError: out of shared memory" in report.left_out
    report.write()
    text = (tmp_path / "bench.md").read_text()
    assert "- WRONG: bitmap bf16, 1 rows: MemoryError: out of shared memory" in text
    assert "- WRONG: nm2:4 bf16, 1 rows: NaN or infinite" in text
    assert json.loads((tmp_path / "bench.json").read_text())["checked"][1]["error"] is None


def test_a_case_that_fails_is_named_and_the_next_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case, *rest: object) -> bench.GpuMeasured:
        raise RuntimeError(f"the driver, at {case.rows}")

    monkeypatch.setattr(bench, "measure", fails)
    todo = cases({(16, 32): None}, [asked("wcsr16")], [0.5], ["bf16"], [1, 4])
    found = [m.left_out for m in bench.table_all(todo, DEVICE, 1, bench.Deadline(99), None)]
    assert found == [[f"16x32, {n} rows: RuntimeError: the driver, at {n}"] for n in (1, 4)]


def test_after_a_fault_of_the_device_what_was_found_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **options: object) -> None:
        raise RuntimeError("illegal access")

    (case,) = cases({(16, 32): None}, [asked("wcsr16")], [0.5], ["bf16"], [1])
    with monkeypatch.context() as patch:
        patch.setattr(bench, "take_turns", fails)
        found = bench.measure(case, DEVICE, 1, rotate_bytes=1)
    assert found.left_out == ["16x32, 1 rows: RuntimeError: illegal access"]
    assert len(found.checked) == 4
    monkeypatch.setattr(bench, "_packed", fails)
    notes = [c.note for c in bench.check_kernels(laid("wcsr16", "bitmap"), ["bf16"], [1, 2], DEVICE, (16, 32))]
    assert notes == ["RuntimeError: illegal access"] * 4


def test_a_sparsity_that_fails_costs_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = "magnitude({sparsity}, scope='layer'),freeze,lower(csr)"
    found = time_decoding("tiny", "fp32", [0.5, 2.0], DEVICE, 1, 1, model=tiny, tokens=1, passes=spec)
    assert [m.variant for m in found if m.seconds is not None] == ["dense", "50% zero"]
    (failed,) = (m for m in found if m.seconds is None)
    assert failed.variant == "200% zero"
    assert failed.note.startswith("SpecError: magnitude: sparsity")
    taken = Decoder.seconds

    def tired(decoder: Decoder, tokens: int = 1) -> float:
        if decoder is not tired.first:  # type: ignore[attr-defined]
            raise RuntimeError("illegal access")
        return taken(decoder, tokens)

    def named(decoder: Decoder, *rest: object) -> None:
        tired.first = getattr(tired, "first", decoder)  # type: ignore[attr-defined]
        began(decoder, *rest)  # type: ignore[arg-type]

    began = Decoder.__init__
    monkeypatch.setattr(Decoder, "__init__", named)
    monkeypatch.setattr(Decoder, "seconds", tired)
    found = time_decoding("tiny", "fp32", [0.5], DEVICE, 1, 1, model=tiny, tokens=1, passes=spec)
    assert {m.variant: m.note for m in found} == {"dense": "", "50% zero": "RuntimeError: illegal access"}


def test_a_configuration_that_fails_or_computes_something_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases({(16, 32): None}, [asked("wcsr16")], [0.5], ["bf16"], [1])
    right = gpu.product

    def spoiled(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None) -> torch.Tensor:
        number = gpu_launch.preferred().get("wcsr16 1 256")
        if number == 1:
            raise MemoryError("out of registers")
        out = right(x, packed, bias)
        return out if number == 3 else out * 1.5

    monkeypatch.setattr(gpu, "product", spoiled)
    found = bench.measure(case, DEVICE, 1, rotate_bytes=1)
    assert found.left_out == ["configuration 1 of 'wcsr16 1 256': MemoryError: out of registers"]
    assert [c.wrong for c in found.checked] == [True, True, False]
    assert gpu_launch.preferred() == {"wcsr16 1 256": 3}
    assert [line.config for line in found.lines] == [3]


def test_the_headline_is_the_best_sparse_mode_over_the_best_dense_one() -> None:
    times = {("dense", "graph"): 2.0, ("dense", "compiled graph"): 1.6, ("70% zero", "graph"): 1.0}
    times |= {("70% zero", "compiled graph"): 0.8, ("90% zero", "graph"): 0.5}
    found = [
        Decoded("m", 2, "bf16", variant, mode, "", Spread.of([1e-3 * t]), None, 1)
        for (variant, mode), t in times.items()
    ]
    found.append(Decoded("m", 2, "bf16", "90% zero", "compiled graph", NO_TIME, None, None, 0))
    found.append(Decoded("other", 2, "bf16", "90% zero", "graph", "", Spread.of([1.0]), None, 1))
    assert headlines(found) == [
        "- m, 70% zero: 2.00x, 0.800 ms a token (compiled graph) against 1.600 dense (compiled graph)",
        "- m, 90% zero: 3.20x, 0.500 ms a token (graph) against 1.600 dense (compiled graph)",
    ]


@pytest.mark.slow
def test_the_one_command_goes_through_all_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On sizes that the interpreter can do; what it writes is what a GPU's run would."""
    small = {"DEVICE": DEVICE.type, "CHECKED_ROWS": {"bf16": (1, 9)}, "SPLIT": laid("wcsr8")}
    small |= {"LONG_ROWS": (2, 64), "MODELS": ("tiny",), "MODEL_SPARSITIES": (0.5,), "MODEL_ROUNDS": 1}
    small |= {"FOR_COMPILING": 10**6}
    for name, value in small.items():
        monkeypatch.setattr(gpu_run, name, value)
    monkeypatch.setattr(Layout, "checked", classmethod(lambda cls: tuple(laid("bitmap"))))
    monkeypatch.setattr(gpu, "missing", list)
    monkeypatch.setattr(replay, "MAX_COPIES", 1)
    monkeypatch.setattr(gpu_run, "PASSES", "magnitude({sparsity}, scope='layer'),freeze,lower(csr)")
    monkeypatch.setattr(
        gpu_run, "check_kernels", lambda *args: bench.check_kernels(*args[:4], args[4] if args[4:] else (16, 32))
    )
    monkeypatch.setattr(gpu_run, "time_decoding", partial(time_decoding, model=tiny, tokens=1))
    monkeypatch.setattr(
        gpu_run, "machine_constants", lambda *args, **options: (_ for _ in ()).throw(KernelError("not here"))
    )
    monkeypatch.setenv("SPARSEC_NATIVE", "0")
    asked = ["--device", "cuda", "--shapes", "16x32", "--formats", "wcsr16,nm2:4", "--rows", "1,4", "--dtypes", "bf16"]
    assert main([*asked, "--sparsity", "0.5", "--repeats", "2", "--out", str(tmp_path / "found")]) == 0
    content = json.loads((tmp_path / "found" / "bench.json").read_text())
    own = [c for c in content["checked"] if "configuration" not in c["layout"]]
    assert [(c["layout"], c["rows"]) for c in own] == [("bitmap", 1), ("bitmap", 9), ("wcsr8", 1)]
    assert len(content["checked"]) > len(own)
    assert sorted((line["layout"], line["rows"]) for line in content["table"]) == [
        (layout, rows) for layout in ("nm2:4", "wcsr16") for rows in (1, 4)
    ]
    modes = [(m["variant"], m["mode"]) for m in content["models"]]
    assert modes[:2] == [("dense", modes[0][1]), ("50% zero", modes[0][1])]
    assert content["left_out"][0] == "the cost model: KernelError: not here"
    assert json.loads(Path(content["tuned"]).read_text()) == gpu_launch.preferred()
    shown = capsys.readouterr().out
    assert shown.startswith((tmp_path / "found" / "bench.md").read_text().strip())
    assert "- tiny, 50% zero: " in shown
    assert main([*asked, "--formats", "wcsr16,auto,dense"]) == 2
    assert (
        "--formats: with --device cuda leave out auto, dense: F.linear stands in every line" in capsys.readouterr().err
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "--device cuda: torch sees no CUDA device; without --device" in capsys.readouterr().err
    for wrong, said in (
        (["--device", "cuda", "--end-to-end", "tiny"], "--end-to-end: leave it out with --device cuda"),
        (["--budget", "9"], "--budget: leave it in only with --device cuda"),
        (["--device", "cuda", "--budget", "0"], "--budget must be at least 1"),
        (["--formats", "wcsr32"], "--formats takes layouts and auto, by commas: there is no wcsr32"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
