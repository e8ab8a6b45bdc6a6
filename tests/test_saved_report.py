"""The report that is saved with a model: the same text after loading, and what was measured in the card."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from report_cases import model, report

import sparsec
import sparsec.report.__main__ as report_command
from sparsec.console.table import terminal_width
from sparsec.errors import CheckpointError, DataError
from sparsec.page.report_charts import report_charts
from sparsec.report.reread import reread
from sparsec.report.schema import document

SPEC = "wanda(0.5),freeze,sparsity,flops,fuse,lower(bitmap)"


@pytest.fixture(scope="module")
def compiled() -> Any:
    return sparsec.compile(model(), SPEC, calibration=torch.arange(64).view(2, 32))


@pytest.fixture(scope="module")
def folder(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("saved")
    compiled.save_pretrained(place)
    return place


def written(found: Any) -> Any:
    return json.loads(json.dumps(document(found), allow_nan=False))


def test_a_report_read_back_says_the_same() -> None:
    whole = report()
    back = reread(written(whole))
    assert (back.text(), back.text(layers=True)) == (whole.text(), whole.text(layers=True))
    assert document(back) == document(whole)


def _places(found: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    return [at, *(place for key, each in items for place in _places(each, (*at, key)))]


WHOLE = written(report())
PLACES = _places(WHOLE)[1:]


@given(place=st.sampled_from(PLACES), value=st.sampled_from([None, True, -1, 1.5, "text", [], [1], {}, {"a": 1}]))
def test_whatever_stands_in_a_document_a_report_or_an_error_comes_of_it(place: tuple[Any, ...], value: Any) -> None:
    found = copy.deepcopy(WHOLE)
    inside = found
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    try:
        back = reread(found)
    except DataError:
        return
    written(back)
    back.text()


def test_a_report_of_a_version_with_fewer_figures_is_read() -> None:
    """Regression: a model that was saved before a figure was added could not be saved again."""
    found = written(report())
    for row in found["layers"]:
        del row["ms_predicted"]
    assert {row.ms_predicted for row in reread(found).layers} == {None}
    del found["layers"][0]["parameters"]
    with pytest.raises(
        DataError, match=r"report\.layers\[0\] lacks parameters; read it with the version that wrote it"
    ):
        reread(found)


def test_a_loaded_model_has_the_report_of_the_saved_one(compiled: Any, folder: Path) -> None:
    loaded: Any = sparsec.load(folder)
    assert loaded.sparsec.report().text() == compiled.sparsec.report().text()
    assert copy.deepcopy(loaded).sparsec.report().text() == compiled.sparsec.report().text()
    again = folder.with_name("again")
    loaded.save_pretrained(again)
    assert sparsec.load(again).sparsec.report().text() == compiled.sparsec.report().text()  # type: ignore[union-attr]


def test_what_it_learnt_from_is_named(compiled: Any, folder: Path) -> None:
    loaded: Any = sparsec.load(folder)
    assert loaded.sparsec.record.calibration == compiled.sparsec.calibration
    assert loaded.sparsec.record.calibration["source"] == "2 sequences of 32 tokens"
    other = sparsec.compile(model(), SPEC, calibration=torch.arange(64).flip(0).view(2, 32))
    assert other.sparsec.calibration["sha256"] != compiled.sparsec.calibration["sha256"]  # type: ignore[union-attr]
    plain = sparsec.compile(model(), "magnitude(0.5),freeze,lower(csr)", calibration=torch.arange(64).view(2, 32))
    assert plain.sparsec.calibration == {}  # type: ignore[union-attr]
    assert "2 sequences of 32 tokens" in (folder / "README.md").read_text()


def test_measured_figures_stand_in_the_card_and_come_back(compiled: Any, tmp_path: Path) -> None:
    measured = report()
    compiled.save_pretrained(tmp_path, report=measured)
    loaded: Any = sparsec.load(tmp_path)
    assert loaded.sparsec.report().text() == measured.text()
    card = (tmp_path / "README.md").read_text()
    assert "| perplexity | 96.50 | 1234 |" in card
    assert measured.machine is not None
    assert measured.machine.cpu in card


def test_a_card_without_measurements_says_so(folder: Path) -> None:
    assert "Speed and quality were not measured." in (folder / "README.md").read_text()


def test_the_report_of_an_earlier_save_goes_and_other_files_stay(compiled: Any, tmp_path: Path) -> None:
    compiled.save_pretrained(tmp_path, report=report())
    (tmp_path / "report.json").write_text("mine")
    compiled.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("report-*.json"))) == 1
    assert (tmp_path / "report.json").read_text() == "mine"


def test_a_report_that_is_not_there_or_damaged_is_named(compiled: Any, tmp_path: Path) -> None:
    compiled.save_pretrained(tmp_path)
    file = next(tmp_path.glob("report-*.json"))
    whole = file.read_bytes()
    file.write_bytes(b"[" * len(whole))
    with pytest.raises(CheckpointError, match="report"):
        sparsec.load(tmp_path).sparsec.report()  # type: ignore[union-attr]
    file.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match="bytes"):
        sparsec.load(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="was not beside its weights"):
        sparsec.load(tmp_path).sparsec.report()  # type: ignore[union-attr]


def test_a_model_that_nobody_holds_any_more_is_saved(tmp_path: Path) -> None:
    """Python lets go of the model before its method runs."""
    sparsec.compile(model(), "magnitude(0.5),freeze,lower(csr)").save_pretrained(tmp_path)
    sparsec.load(tmp_path).save_pretrained(tmp_path / "again")  # type: ignore[operator]
    there: Any = sparsec.load(tmp_path / "again")
    ids = torch.arange(8)[None]
    here: Any = sparsec.compile(model(), "magnitude(0.5),freeze,lower(csr)")
    assert torch.equal(there(ids).logits, here(ids).logits)
    assert sparsec.compile(model(), "magnitude(0.5),freeze,lower(csr)").sparsec.report().bytes_held  # type: ignore[union-attr]


def test_a_loaded_model_is_freed_with_its_last_name(folder: Path) -> None:
    loaded = sparsec.load(folder)
    known = weakref.ref(next(t for n, t in loaded.named_buffers() if n.endswith("values")))
    gc.collect()
    gc.disable()
    try:
        del loaded
        assert known() is None
    finally:
        gc.enable()


def test_the_command_shows_the_report_that_was_saved(
    compiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: `sparsec report FOLDER` refused a saved model."""
    measured = report()
    compiled.save_pretrained(tmp_path / "model", report=measured)
    assert report_command.main([str(tmp_path / "model"), "--json", str(tmp_path / "out.json")]) == 0
    assert measured.text(width=terminal_width()) in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_bytes())["summary"] == written(measured)["summary"]
    assert report_command.main([str(tmp_path / "model"), "--quick", "--passes", "freeze"]) == 2
    assert "leave out --passes, --quick" in capsys.readouterr().err
    drawn = ["--html", str(tmp_path / "page.html"), "--svg", str(tmp_path / "svg"), "--png", str(tmp_path / "png")]
    assert report_command.main([str(tmp_path / "model"), *drawn]) == 0
    assert "it holds no text of the graph" in " ".join(capsys.readouterr().out.split())
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "it holds no text of the graph" in page
    assert "The text of the graph is not kept with this report." in page
    assert "No line of the graph is different" not in page
    assert all(row.name.removesuffix(".weight") in page for row in measured.layers)
    names = {chart.name for chart in report_charts(reread(written(measured)))}
    assert {path.stem for path in (tmp_path / "svg").iterdir()} == names >= {"bytes", "speedup", "groups-flops"}
    assert {path.stem for path in (tmp_path / "png").iterdir()} == names
    for path in (tmp_path / "model").glob("report-*.json"):
        path.unlink()
    assert report_command.main([str(tmp_path / "model")]) == 2
    assert "no report lies beside it" in capsys.readouterr().err
