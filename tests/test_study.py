"""`sparsec study`: the grid, what is shared between cells, what is kept of a study that stops, and the tables."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from study_cells import LITTLE, figures_of, without_work

import sparsec.study.__main__ as study
from sparsec.errors import DataError, SpecError
from sparsec.pipeline import Pipeline
from sparsec.sweep import run, seminar, tables
from sparsec.sweep.energy import EnergyMeter
from sparsec.sweep.grid import axis, grid_cells, places
from sparsec.sweep.run import DENSE, CellResult

TEMPLATE = "magnitude({zeros}),freeze,lower({layout})"
GRID = ["--passes", TEMPLATE, "--grid", "zeros=0.5,0.9", "--grid", "layout=csr,bitmap"]


# --- the grid


@given(
    zeros=st.lists(st.sampled_from(["0.3", "0.5", "0.7", "0.9"]), min_size=1, unique=True),
    layouts=st.lists(st.sampled_from(["csr", "bitmap", "auto", "nm2:4"]), min_size=1, unique=True),
)
def test_every_combination_is_one_cell_and_those_that_prune_alike_stand_together(
    zeros: list[str], layouts: list[str]
) -> None:
    found = grid_cells(
        ["magnitude({zeros}),freeze,lower('{layout}')", "magnitude({zeros}),freeze"],
        {"zeros": zeros, "layout": layouts},
    )
    assert len(found) == len({cell.spec for cell in found}) == len(zeros) * (len(layouts) + 1)
    prunings = [str(cell.pruning) for cell in found]
    assert len([i for i, p in enumerate(prunings) if i == 0 or p != prunings[i - 1]]) == len(zeros)
    assert all(Pipeline.parse(cell.spec) == cell.pipeline for cell in found)
    assert all(value in cell.spec for cell in found for _, value in cell.values)


@given(st.lists(st.sampled_from(["0.3", "block(16, 16)", "'a,b'", "nm2:4", "[1, 2]"]), min_size=1))
def test_values_are_parted_by_the_commas_between_them(values: list[str]) -> None:
    assert axis("name=" + ",".join(values)) == ("name", values)


@pytest.mark.parametrize(
    ("templates", "axes", "said"),
    [
        (["magnitude({zero}),freeze"], {"zeros": ["0.5"]}, "did you mean 'zeros'"),
        (["magnitude({zeros}),freeze"], {}, "--grid zeros="),
        (["magnitude(0.5),freeze"], {"zeros": ["0.5"]}, "no passes have a placeholder"),
        (["magnitude({zeros}),freeze"], {"zeros": ["0.5", "lots"]}, "zeros=lots"),
        (["magnitude({zeros}),lower(csr)"], {"zeros": ["0.5"]}, "frozen"),
        (["magnitude({zeros}),freeze"], {"zeros": [f"0.{i:06d}" for i in range(10_001)]}, "at most 10,000"),
    ],
)
def test_a_grid_that_is_none_is_refused(templates: list[str], axes: dict[str, list[str]], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        grid_cells(templates, axes)


@pytest.mark.parametrize("text", ["zeros", "=0.5", "zeros=", "zeros=0.5,,0.7", "a b=1"])
def test_values_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="NAME=VALUE"):
        axis(text)


# --- measuring


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study")
    outputs = [word for name in ("json", "csv", "markdown") for word in (f"--{name}", str(place / name))]
    words = [
        "--passes",
        TEMPLATE,
        "--passes",
        "magnitude({zeros}),freeze",
        "--grid",
        "zeros=0.5",
        "--grid",
        "layout=csr,bitmap",
    ]
    assert study.main(["tiny", *words, *LITTLE, *outputs]) == 0
    return place


def test_every_cell_has_itsfigures_of(done: Path) -> None:
    found = {cell["spec"]: cell for cell in json.loads((done / "json").read_text())["cells"]}
    assert len(found) == 1 + 3
    dense = found[DENSE]["figures"]
    for spec, cell in found.items():
        assert cell["error"] == ""
        assert cell["figures"]["perplexity"] > 1
        assert cell["figures"]["speedup_decode"] > 0
        packed = "lower" in spec
        assert (cell["layouts"] != "") == packed
        assert (cell["figures"]["bytes"] < dense["bytes"]) == packed
        assert (cell["figures"]["sparsity"] > 0) == (spec != DENSE)
    by_pruning: dict[str, set[float]] = {}
    for spec, cell in found.items():
        by_pruning.setdefault(spec.partition(",lower")[0], set()).add(cell["figures"]["perplexity"])
    assert all(len(each) == 1 for each in by_pruning.values())  # measured once


def test_tables_hold_every_cell(done: Path) -> None:
    lines = (done / "markdown").read_text().splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + 4
    rows = list(csv.DictReader(io.StringIO((done / "csv").read_text())))
    assert len(rows) == 4
    assert rows[1]["zeros"] == "0.5"
    assert float(rows[1]["perplexity"]) > 1


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Cells that cost nothing, and how often each step of the work was taken."""
    return without_work(monkeypatch)


def test_a_study_that_was_stopped_goes_on_and_prunes_once_for_all_layouts(
    unmeasured: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = run._Run.cell

    def stopped(self: Any, cell: Any, *rest: Any) -> Any:
        if unmeasured["cell"] == 1:
            raise KeyboardInterrupt
        return measured(self, cell, *rest)

    words = ["tiny", *GRID, *LITTLE, "--json", str(tmp_path / "study.json")]
    with monkeypatch.context() as patched:
        patched.setattr(run._Run, "cell", stopped)
        assert study.main(words) == 130
    assert len(json.loads((tmp_path / "study.json").read_text())["cells"]) == 2
    assert study.main(words) == 0
    assert unmeasured == {"begin": 2, "dense": 1, "pruned": 1 + 2, "cell": 1 + 3, "known_machine": 2}
    assert "2 cells were taken over" in capsys.readouterr().out
    assert study.main(words) == 0
    assert unmeasured["begin"] == 2
    assert study.main([*words, "--windows", "2"]) == 2
    assert "of another study: windows is 1 there and 2 here" in capsys.readouterr().err


def test_a_cell_that_fails_costs_no_other_one(
    unmeasured: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["tiny", "--passes", "{how}(0.5),freeze,lower(csr)", "--grid", "how=magnitude,wanda", *LITTLE]
    words += ["--calibration-sequences", "2", "--calibration-length", "16", "--json", str(tmp_path / "s.json")]
    taken = run._Run.pruned

    def pruned(self: Any, pruning: Any) -> Any:
        if "wanda" in str(pruning):
            raise RuntimeError("no memory\nat all")
        return taken(self, pruning)

    with monkeypatch.context() as patched:
        patched.setattr(run._Run, "pruned", pruned)
        assert study.main(words) == 0
    assert "failed: wanda(0.5),freeze,lower(csr): no memory" in capsys.readouterr().out
    held = json.loads((tmp_path / "s.json").read_text())["cells"]
    assert [cell["error"] for cell in held] == ["", "", "no memory"]
    assert study.main(words) == 0  # what failed is tried again
    assert [cell["error"] for cell in json.loads((tmp_path / "s.json").read_text())["cells"]] == ["", "", ""]


# --- plans


def test_a_plan_is_the_same_options(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        'model: tiny\npasses: ["magnitude({zeros})"]\ngrid: {zeros: [0.3, 0.5]}\nwindows: 2\nno-bos: true\ntext: a b.txt\n'
    )
    words = study.plan_words(str(plan), study.parser())
    args = study.parser().parse_args(words)
    assert (args.model, args.passes, args.grid) == ("tiny", ["magnitude({zeros})"], ["zeros=0.3,0.5"])
    assert (args.windows, args.bos, args.text) == (2, False, "a b.txt")


def test_a_plan_takes_values_as_they_are_written(tmp_path: Path) -> None:
    """Regression: YAML reads 2:4 as 124, two minutes and four seconds."""
    plan = tmp_path / "plan.yaml"
    plan.write_text("preset: patterns\ngrid: {pattern: [2:4, block:16x16], method: magnitude}\nlength: 0x10\n")
    words = study.plan_words(str(plan), study.parser())
    assert words == [
        "--preset=patterns",
        "--grid=pattern=2:4,block:16x16",
        "--grid=method=magnitude",
        "--length=0x10",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("windows:", "windows must have one value"),
        ("gird: {zeros: [0.3]}", "did you mean 'grid'"),
        ("- a", "must be a mapping"),
        ("a: [", "cannot be read"),
        ("grid: [0.3]", "grid must be a mapping"),
        ("windows: [1, 2]", "windows must have one value"),
        ("no-bos: 3", "true or false"),
        ("plan: other.yaml", "no option of a study"),
    ],
)
def test_a_plan_that_is_none_is_refused(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plan.yaml").write_text(content)
    assert study.main(["--plan", str(tmp_path / "plan.yaml")]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny"], "nothing to measure"),
        (["tiny", "--preset", "seminar", "--passes", "freeze"], "has its own passes"),
        (["tiny", *GRID, "--grid", "zeros=0.1"], "given twice"),
        (["tiny", "--plan", "missing.yaml"], "missing.yaml"),
    ],
)
def test_words_that_make_no_study_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.main(words) == 2
    assert said in capsys.readouterr().err


# --- the seminar


def test_the_seminar_is_told_what_was_met_and_why_not() -> None:
    chosen = seminar.seminar_cells()
    assert len(chosen) == 12
    results = {DENSE: CellResult(DENSE, (), figures_of(1, 1, 20.0))}
    results |= {cell.spec: CellResult(cell.spec, cell.values, figures_of(0.65, 0.95, 21.0)) for cell in chosen}
    found = seminar.beside_expected(results)
    assert found is not None
    assert [each.missed for each in found.setups if each.name in ("CSR 50%", "CSR 70%")] == [(), ("bytes", "time")]
    lines = found.lines(results, 120)
    row = next(line for line in lines if line.startswith("CSR 50%"))
    assert row.split()[-1] == "yes"
    assert next(line for line in lines if line.startswith("CSR 30%")).endswith("not bytes")
    assert next(line for line in lines if line.startswith("CSR 70%")).endswith("not bytes, time")
    assert "not in it" in next(line for line in lines if line.startswith("Best 90%"))
    assert any("bytes of CSR 70%" in line for line in lines)
    worse = {s: r if s == DENSE else replace(r, figures=figures_of(0.65, 0.95, 400.0)) for s, r in results.items()}
    bad = seminar.beside_expected(worse)
    assert bad is not None
    assert any("20.0 times that of dense" in reason for each in bad.setups for reason in each.reasons)
    assert seminar.beside_expected({}) is None


def test_busy_times_are_marked() -> None:
    quiet = CellResult("a", (), figures_of(1, 1, 20.0))
    assert "1.00x?" in tables.text([replace(quiet, disturbed=True)], ())
    assert "?" not in tables.text([quiet], ())


# --- energy


class _Writes:
    def __init__(self, counter: Path) -> None:
        self.counter = counter

    def generate(self, prompt: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
        self.counter.write_text(str(int(self.counter.read_text()) + 5_000 * max_new_tokens))
        return torch.zeros(1, prompt.shape[1] + max_new_tokens, dtype=torch.int64)


def test_energy_is_read_where_the_machine_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.sweep.energy.LEAST", 0.01)
    for name in ("intel-rapl:0", "intel-rapl:0:0", "intel-rapl-mmio:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("1000")
    meter = EnergyMeter("cpu", tmp_path)
    assert meter.absent == ""
    counter = tmp_path / "intel-rapl:0" / "energy_uj"
    assert meter.per_token(_Writes(counter), torch.zeros(1, 3, dtype=torch.int64), 4) == pytest.approx(5.0)


def test_energy_is_not_guessed(tmp_path: Path) -> None:
    meter = EnergyMeter("cpu", tmp_path)
    assert "not available" in meter.absent
    assert meter.per_token(None, torch.zeros(1, 3), 4) is None


def test_placeholders_are_found_in_order() -> None:
    assert places("a({x},{y}),b({x})") == ["x", "y"]


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    from sparsec.machine import machine
    from sparsec.sweep.store import Store

    for content in ("{}", "[", '{"schema": "sparsec.study/1", "of": {}, "cells": [{"spec": 3}]}'):
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(DataError, match="no study"):
            Store({}, machine(), (), tmp_path / "s.json")
