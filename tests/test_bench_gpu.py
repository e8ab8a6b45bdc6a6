"""The GPU's benchmark, on small sizes: on a GPU where there is one, else through Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsec.bench import gpu as bench
from sparsec.bench import gpu_run
from sparsec.bench.__main__ import main
from sparsec.bench.cases import Format, cases
from sparsec.bench.gpu_models import decode
from sparsec.cost.calibration import Found, load_file
from sparsec.cost.model import KernelCost, Rate, RowsRate
from sparsec.errors import KernelError
from sparsec.kernels import gpu, gpu_launch
from sparsec.machine import machine
from sparsec.recorded import Decoder

FIXTURE = Path(__file__).parent / "calibration.json"
COST = (1e-4, 0.0, 1e-9, Rate(0.0, 0.0), (), 0.0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton")


@pytest.fixture(autouse=True)
def untuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    monkeypatch.setattr(gpu, "tuned_file", lambda: tmp_path / "cache" / "gpu.json")
    monkeypatch.setattr(bench, "select", lambda problem: next(k for k in gpu_kernels() if k.format == problem.format))
    gpu_launch.prefer({})
    gpu_launch.asked()
    yield
    gpu_launch.prefer({})


def gpu_kernels():  # type: ignore[no-untyped-def]
    from sparsec.kernels import KERNELS

    return [k for k in KERNELS if k.name.endswith("_triton")]


def test_every_kernel_is_checked_and_a_wrong_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(bench.check(["wcsr16", "nm2:4"], ["bf16"], [1, 9], DEVICE, size=16))
    assert [(c.layout, c.rows) for c in found] == [("wcsr16", 1), ("wcsr16", 9), ("nm2:4", 1), ("nm2:4", 9)]
    assert all(0 < c.error <= 1 for c in found)
    right = gpu.product
    for spoil in (lambda out: out * 1.1, lambda out: out.fill_(float("nan"))):
        monkeypatch.setattr(gpu, "product", lambda *args, spoil=spoil: spoil(right(*args)))
        assert all(c.error > 1 for c in bench.check(["wcsr16"], ["fp32"], [2], DEVICE, size=16))


def test_a_case_is_timed_with_the_fastest_of_its_configurations_which_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = cases({(16, 64): None}, [Format.parse(f) for f in ("wcsr16", "bitmap")], [0.5], ["bf16"], [1])
    lines, left_out = bench.measure(case, DEVICE, rounds=2, rotate_bytes=2000)
    assert left_out == []
    assert [(line.layout, line.kernel) for line in lines] == [
        ("wcsr16", "wcsr_triton"),
        ("bitmap", "bitmap_triton"),
    ]
    for line in lines:
        assert line.dense.median > 0
        assert line.sparse.repeats == 2
        assert line.bytes_per_second == pytest.approx(line.nbytes / line.sparse.median)
    assert set(gpu_launch.preferred()) == {"wcsr16 1", "bitmap 1"}
    assert [line.config for line in lines] == [gpu_launch.preferred()[b] for b in ("wcsr16 1", "bitmap 1")]
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
    todo = cases({(24, 20): None}, [Format.parse("bsr64x64")], [0.5], ["bf16"], [1])
    lines, left_out = bench.measure(todo[0], DEVICE, rounds=1)
    assert not lines
    assert "24x20 as bsr64x64" in left_out[0]
    lines, left_out = bench.table_all(todo * 3, DEVICE, 1, bench.Deadline(0), None)
    assert not lines
    assert left_out == ["no time was left for 3 of 3 cases; give more with --budget"]


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
    ids = torch.arange(7)[None] * 5
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
    found = decode("tiny", "fp32", [0.5], DEVICE, 2, 1, None, None, tiny, tokens=2, passes=spec)
    assert [m.variant for m in found] == ["dense", "50% zero"]
    assert all(m.seconds is not None and m.seconds.median > 0 and m.nbytes > 0 for m in found)
    assert found[0].speedup is not None
    assert found[0].speedup.median == 1
    (case,) = cases({(16, 32): None}, [Format.parse("wcsr8")], [0.5], ["bf16"], [1])
    report = gpu_run.Report(tmp_path, machine(), DEVICE)
    report.checked = list(bench.check(["wcsr8"], ["bf16"], [1], DEVICE, size=16))
    report.lines, report.left_out = bench.measure(case, DEVICE, 2, rotate_bytes=2000, tune=False)
    known = replace(load_file(FIXTURE), kernels=(KernelCost("wcsr_triton", "wcsr8", "bfloat16", *COST),))
    monkeypatch.setattr(gpu_run, "calibrate", lambda dtypes, **options: Found(known, "a test", ("it was busy",)))
    report.calibrate("bf16", None)
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


def test_a_cost_model_that_fails_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(dtypes: list[torch.dtype], **options: object) -> Found:
        raise KernelError("no kernel serves it\nand more")

    monkeypatch.setattr(gpu_run, "calibrate", fails)
    report = gpu_run.Report(tmp_path, machine(), DEVICE)
    report.calibrate("bf16", None)
    assert report.calibration is None
    assert report.left_out == ["the cost model: no kernel serves it"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cuda"]) == 2
    assert "--device cuda: torch sees no CUDA device; without --device" in capsys.readouterr().err
    for wrong, said in (
        (["--device", "cuda", "--end-to-end", "tiny"], "--end-to-end: leave it out with --device cuda"),
        (["--budget", "9"], "--budget: leave it in only with --device cuda"),
        (["--device", "cuda", "--budget", "0"], "--budget must be at least 1"),
        (["--formats", "wcsr32"], "--formats takes csr8"),
    ):
        assert main(wrong) == 2
        assert said in capsys.readouterr().err
