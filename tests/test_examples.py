"""Every example runs as a newcomer would run it, on the small model, and does what its first line says."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from project import ROOT

from sparsec.data import load_model

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

Run = Callable[[str], Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs an example's main from another folder than the checkout, and gives what it returns."""
    monkeypatch.chdir(tmp_path)
    return lambda name: runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]()


def sparsities(compiled: Any, group: str) -> set[float]:
    """Of the lowered weights of one group, rounded."""
    weights = compiled.sparsec.graph.weights.values()
    return {round(w.sparsity, 2) for w in weights if w.group == group and w.packed is not None}


def test_prune_and_generate(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = run("prune_and_generate")
    graph = compiled.sparsec.graph
    pruned = [w for w in graph.weights.values() if w.packed is not None]
    assert {w.group for w in pruned} == {"attention", "mlp"}
    assert sum(w.nnz for w in pruned) == round(0.5 * sum(w.numel for w in pruned))
    said = capsys.readouterr().out
    assert str(compiled.sparsec.report()) in said
    assert all(w.owners[0].rpartition(".")[2] in said for w in pruned)  # one line for each role
    every = compiled.sparsec.report().text(layers=True)
    assert all(w.owners[0][-20:] in every for w in pruned)  # long names lose their beginning


def test_bring_your_own_mask(run: Run) -> None:
    compiled = run("bring_your_own_mask")
    assert sparsities(compiled, "mlp") == {0.5}
    assert sparsities(compiled, "attention") == set()
    up = next(m.weight for name, m in compiled.named_modules() if name.endswith("mlp.up_proj"))
    assert torch.equal((up != 0).reshape(up.shape[0], -1, 4).sum(-1).unique(), torch.tensor([2]))


def test_already_pruned(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = run("already_pruned")
    assert sparsities(compiled, "mlp") | sparsities(compiled, "attention") == {0.6}
    gap = float(capsys.readouterr().out.rpartition("any logit: ")[2].split()[0])
    assert gap < 1e-4


def test_write_a_pass(run: Run) -> None:
    compiled = run("write_a_pass")
    assert compiled.sparsec.records[0].spec == "random_mask(0.5, seed=1)"
    assert sparsities(compiled, "mlp") == {0.5}


def test_write_a_format(tmp_path: Path) -> None:
    """In a process of its own: what it adds to the tables would be there for all other tests."""
    example = ROOT / "examples" / "write_a_format.py"
    assert len(example.read_text().splitlines()) < 100
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "flat[flat_reference]" in done.stdout
    assert "flat, 90.0% zero, flat_sums)" in done.stdout
    assert float(done.stdout.rpartition("off by ")[2]) < 1e-5


def test_inspect_ir(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    graph = run("inspect_ir")
    said = capsys.readouterr().out
    assert {w.group for w in graph.weights.values() if w.packed is not None} == {"mlp"}
    titles = [line for line in said.splitlines() if line.startswith("# ")]
    assert [t.rpartition(": ")[2] for t in titles[1:]] == [
        "magnitude(0.5, targets=('mlp',))",
        "freeze",
        "sparsity",
        "flops",
        "lower(csr)",
    ]


@pytest.mark.skipif(find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install "sparsec[eval]"')
def test_lm_eval_task(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = run("lm_eval_task")
    assert list(found) == ["dense", "wanda(0.5),freeze,lower(auto)", "saved"]
    assert found["saved"] == found["wanda(0.5),freeze,lower(auto)"]
    assert all(value in {i / 8 for i in range(9)} for value in found.values())


def test_every_example_has_a_test() -> None:
    assert {f"test_{p.stem}" for p in EXAMPLES} <= globals().keys()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_is_a_script_that_says_how_to_run_it(path: Path) -> None:
    text = path.read_text("utf-8")
    assert f"python examples/{path.name}" in text
    assert text.endswith('if __name__ == "__main__":\n    main(*sys.argv[1:])\n')


def test_compare_pruning(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    found = run("compare_pruning")
    assert next(iter(found)) == "dense"
    lines = capsys.readouterr().out.splitlines()
    values = [float(line.split("perplexity")[1].split(",")[0]) for line in lines]
    assert values[1::2] == pytest.approx(values[2::2], rel=1e-4)  # on kernels as masked
    assert lines[3].startswith("wanda(0.5)")
    assert "layers err by 0." in lines[3]


def test_seminar_behaviour(run: Run, tmp_path: Path) -> None:
    top1 = run("seminar_behaviour")
    assert list(top1) == ["dense", "masked 30%", "CSR 30%"]
    assert top1["dense"] == 100
    assert top1["masked 30%"] == top1["CSR 30%"] > 50
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"global-sparsity.svg", "model-size.svg", "top-1.svg"}


def test_seminar_structure(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["groups-sparsity.svg", "groups-parameters.svg", "groups-flops.svg", "depth-sparsity.svg"]
    assert [path.name for path in run("seminar_structure")] == names
    said = capsys.readouterr().out
    assert "mlp" in said
    assert "embedding" in said


def test_finetune_trainer(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fast = run("finetune_trainer")
    lines = [line for line in capsys.readouterr().out.splitlines() if "zeros, loss" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["pruned", "fine-tuned", "on kernels"]
    assert all("50.0% zeros" in line for line in lines)
    before, after, lowered = (float(line.split("loss ")[1].split()[0]) for line in lines)
    assert after < before - 1
    assert lowered == pytest.approx(after, abs=0.002)
    assert sparsities(fast, "mlp") | sparsities(fast, "attention") == {0.5}


def test_train_sparse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(ROOT / "examples" / "train_sparse.py"))["main"]
    trained, models = main.__globals__["trained"], {}

    def watched(way: str, *given: Any) -> Any:
        models[way] = trained(way, *given)
        return models[way]

    monkeypatch.setitem(main.__globals__, "trained", watched)
    found = main("80", "1")
    assert list(found) == list(models) == ["dense", "static", "set", "rigl"]
    assert all(1 < loss < 3.5 for losses in found.values() for loss in losses)
    assert len({loss for losses in found.values() for loss in losses}) == 4
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["Nats", "dense", "seed", "mean"]
    kept = [
        [weight.mask for weight in model.sparsec.kept.weights.values() if weight.mask is not None]
        for way, model in models.items()
        if way != "dense"
    ]
    assert [len(masks) for masks in kept] == [3, 3, 3]
    for masks in zip(*kept, strict=True):
        assert {int(mask.sum()) for mask in masks} == {round(0.1 * masks[0].numel())}
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(masks, 2))


@pytest.mark.slow
def test_train_sparse_finds_masks_that_move_better_and_by_gradient_best(run: Run) -> None:
    """The mean of three seeds, as the example comes."""
    found = run("train_sparse")
    means = {way: sum(losses) / len(losses) for way, losses in found.items()}
    assert len(found["rigl"]) == 3
    assert means["dense"] < means["rigl"] < means["set"] - 0.01 < means["static"] - 0.04


def test_synthetic_checkpoint(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "synthetic_checkpoint.py"))["main"]
    main.__globals__["SHARD"], main.__globals__["PIECE"] = 100_000, 1000
    folder = main("tiny", str(tmp_path / "model"))
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 110_000 for file in files)
    loaded = load_model(folder, None)
    assert loaded.model.dtype == torch.bfloat16
    matrices = [p for p in loaded.model.parameters() if p.dim() == 2]
    assert all(abs(float(p.detach().float().std()) - 0.02) < 0.002 for p in matrices)
    assert all(bool((p == 1).all()) for p in loaded.model.parameters() if p.dim() == 1)
    assert loaded.model(torch.arange(8)[None]).logits.isfinite().all()
    assert len(loaded.tokenizer("abc").input_ids) == 3
    only = main("config", "tiny", str(tmp_path / "config"))
    assert not list(only.glob("*.safetensors"))
    assert (only / "config.json").read_text() == (folder / "config.json").read_text()
    assert run("synthetic_checkpoint").name == "random-tiny"
    with pytest.raises(SystemExit, match="no size '2B'; sizes: tiny, 135M"):
        main("2B")
    with pytest.raises(SystemExit, match="is there already; name a new folder"):
        main("tiny", str(folder))
    assert capsys.readouterr().out.count("MB in") == 2
