"""The page and its charts: complete, readable as text, the same every time, and safe whatever a model calls its layers."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_cases
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from page_cases import cells, page_of, views

from sparsec.errors import DataError, MissingExtraError
from sparsec.machine import machine
from sparsec.page.drawing import COLOURS, THEMED, Chart, save_charts, themed_svg
from sparsec.page.ir import KeptIR
from sparsec.page.pages import report_page, study_page
from sparsec.page.report_charts import report_charts
from sparsec.page.study_charts import study_charts
from sparsec.report.__main__ import main as report_main
from sparsec.study.__main__ import main as study_main
from sparsec.sweep.series import series_name

HOSTILE = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]) | st.sampled_from(list("<>&\"'$_{}%\\")),
    min_size=1,
    max_size=200,
)


class Read(HTMLParser):
    """What a browser makes of a page: elements with their attributes, and the text of each kind."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


def test_a_report_has_all_its_parts() -> None:
    read = Read(page_of(report_cases.report()))
    ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
    assert {"summary", "charts", "layers", "ir", "figures", "notes", "machine", "layer-table"} <= set(ids)
    text = "\n".join(read.texts)
    report = report_cases.report()
    assert all(row.name.removesuffix(".weight") in text for row in report.layers)
    assert all(p.spec in text for p in report.passes)
    charts = report_charts(report)
    assert {c.name for c in charts} >= {
        "groups-sparsity",
        "groups-parameters",
        "groups-flops",
        "bytes",
        "speedup",
        "latency",
    }
    assert all(cell in text for c in charts for row in c.rows for cell in row)


def test_a_page_asks_nothing_of_a_network() -> None:
    page = page_of(report_cases.report())
    links = [v for _, attrs in Read(page).elements for k, v in attrs.items() if k in ("src", "href", "xlink:href")]
    assert all(str(v).startswith(("#", "data:")) for v in links)
    assert "url(" not in re.sub(r"url\(#", "", page)
    assert "default-src 'none'" in page


def test_a_page_is_the_same_every_time() -> None:
    assert page_of(report_cases.report()) == page_of(report_cases.report())


def test_ids_of_a_page_are_given_once() -> None:
    ids = [attrs["id"] for _, attrs in Read(page_of(report_cases.report())).elements if "id" in attrs]
    defined = [
        each for each in ids if not each.startswith("m")
    ]  # markers of the pictures are equal where their names are
    assert len(defined) == len(set(defined))


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a page takes a second
)
@given(HOSTILE)
def test_names_of_any_letters_are_text(name: str) -> None:
    report = report_cases.report()
    assert report.model is not None
    rows = tuple(replace(row, name=f"{name}{i}", block=None) for i, row in enumerate(report.layers))
    found = replace(
        report,
        layers=rows,
        views=tuple(replace(view, name=row.name) for view, row in zip(views(), rows, strict=False)),
        model=replace(report.model, name=name),
        beside={name: 3.0},
    )
    read = Read(page_of(found))
    assert read.count("script") == 2  # the page's own, and what it knows of single layers
    seen = "".join(read.texts).replace("\r\n", "\n").replace("\r", "\n")
    assert name.replace("\r\n", "\n").replace("\r", "\n") in seen
    assert not any(k.startswith("on") for _, attrs in read.elements for k in attrs)


def test_a_report_of_nothing_measured_and_one_of_an_encoder_have_pages() -> None:
    report = report_cases.report()
    counted = replace(report, summary={}, evaluation=None, latency=None, sample=None, machine=None, model=None)
    assert "Nothing was measured" in page_of(counted)
    assert report.model is not None
    measured = {
        n: replace(v, perplexity=None, decode_ms=None, speedup_decode=None, cosine=0.987, cosine_min=0.9)
        for n, v in report.summary.items()
    }
    encoder = replace(report, model=replace(report.model, encoder=True), summary=measured, beside={"wanda(0.5)": 0.99})
    page = page_of(encoder)
    assert "Cosine" in page
    assert "0.9870" in page
    assert "Perplexity" not in page


def test_the_summary_says_that_the_machine_was_busy() -> None:
    report = report_cases.report()
    assert report.latency is not None
    busy = replace(report, latency=replace(report.latency, disturbed=True))
    page = page_of(busy)
    assert "0.25x?" in page
    assert "0.25x? (" in page.partition("<h2>All figures")[2]
    assert "The machine was busy" in page
    idle = page_of(report)
    assert "0.25x?" not in idle
    assert "The machine was busy" not in idle


def test_a_layer_of_an_encoder_stands_where_its_rows_put_it() -> None:
    """Regression: the time of a prompt was set against the FLOPs of one row."""
    report = report_cases.report()
    assert report.model is not None
    assert report.latency is not None
    layers = tuple(replace(row, ms=2.0) for row in report.layers)
    one = replace(report, layers=layers)
    many = replace(one, model=replace(report.model, encoder=True))
    points = []
    for found in (one, many):
        (chart,) = (chart for chart in report_charts(found) if chart.name == "roofline")
        points.append([tuple(map(float, row[2:])) for row in chart.rows])
        rows = "one row" if found is one else f"{report.latency.prompt_tokens} rows"
        assert rows in chart.says
    row = next(row for row in layers if row.flops_per_token)
    assert row.flops_per_token is not None
    assert points[1][0][0] == pytest.approx(16 * row.flops_per_token / row.bytes_held, abs=1e-3)
    assert all(b[0] == pytest.approx(16 * a[0], rel=0.1) for a, b in zip(*points, strict=True))


def test_a_study_has_all_its_cells_and_says_what_failed() -> None:
    found = cells()
    text = "\n".join(Read(study_page("a model", found, ["a note"], machine(), "told so")).texts)
    assert "failed: wanda(0.9),freeze: <no room>" in text
    assert all(part in text for part in ("a note", "told so", "12.3"))
    names = {chart.name for chart in study_charts(found)}
    assert names == {"perplexity", "top1", "bytes", "time", "theory-and-clock", "frontier-bytes", "frontier-time"}
    assert "No cell has figures" in study_page("a model", [c for c in found if c.error], [], machine())


@pytest.mark.parametrize(
    ("spec", "name", "pruned"),
    [
        ("magnitude(0.5),freeze", "magnitude, masked", "magnitude"),
        ("magnitude(0.7),freeze,lower(csr)", "magnitude, csr", "magnitude"),
        ("wanda(pattern='2:4'),freeze,fuse,lower(auto)", "wanda 2:4, fuse, auto", "wanda 2:4"),
        ("magnitude(0.5, scope='layer'),freeze,lower(csr)", "magnitude scope=layer, csr", "magnitude scope=layer"),
        (
            "wanda(0.5, allocation='owl'),freeze,sparsity,flops,lower(auto, tokens=64)",
            "wanda allocation=owl, auto tokens=64",
            "wanda allocation=owl",
        ),
        ("somebodys(1),freeze", "somebodys(1),freeze", "somebodys(1),freeze"),
    ],
)
def test_cells_of_one_series_differ_in_what_they_prune_alone(spec: str, name: str, pruned: str) -> None:
    assert series_name(spec) == name
    assert series_name(spec, lowering=False) == pruned


TEMPLATES = (
    "magnitude({}),freeze",
    "magnitude({}, scope='layer'),freeze",
    "magnitude({}, targets='mlp'),freeze",
    "wanda({}, pattern='2:4'),freeze",
    "wanda({}, pattern='4:8'),freeze",
    "wanda({}, allocation='owl'),freeze",
    "wanda({}),freeze,lower(csr)",
    "wanda({}),freeze,lower(bitmap)",
    "wanda({}),freeze,fuse,lower(bitmap)",
    "wanda({}),freeze,lower(auto)",
    "wanda({}),freeze,lower(auto, tokens=64)",
)


@given(*[st.tuples(st.sampled_from(TEMPLATES), st.sampled_from([0.3, 0.5, 0.7]))] * 2)
def test_a_series_is_what_differs_in_its_sparsity_alone(one: tuple[str, float], two: tuple[str, float]) -> None:
    names = [series_name(template.format(0.5 if ":" in template else share)) for template, share in (one, two)]
    assert (names[0] == names[1]) == (one[0] == two[0])


def test_pictures_follow_the_theme_and_keep_their_letters() -> None:
    chart = report_charts(report_cases.report())[0]
    svg = themed_svg(chart)
    assert not [colour for colour in THEMED if colour in svg]
    assert "var(--c0)" in svg
    assert "50.00" not in svg
    shown = set(re.findall(r">([^<>]+)</text>", svg))
    assert {cell for row in chart.rows for cell in row} <= shown


def test_files_for_a_paper(tmp_path: Path) -> None:
    charts = report_charts(report_cases.report())
    written = save_charts(charts, tmp_path / "new" / "folder", "svg") + save_charts(charts, tmp_path, "png")
    assert len(written) == 2 * len(charts)
    svg = written[0].read_text("utf-8")
    assert COLOURS[0] in svg
    assert 'width="241.2pt"' in svg  # 3.35 inches
    assert written[-1].read_bytes().startswith(b"\x89PNG")
    again = save_charts(charts, tmp_path / "again", "svg")
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in written[: len(charts)]]
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        save_charts(charts, file, "svg")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"sparsec\[page\]"):
        report_page(report_cases.report(), KeptIR())
    assert report_main(["tiny", "--quick", "--html", str(tmp_path / "a.html")]) == 2
    assert "sparsec[page]" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html", "--png", "--svg"])
@pytest.mark.parametrize("main", [report_main, study_main])
def test_what_cannot_be_written_is_said_before_anything_runs(
    main: Any, option: str, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    words = ["tiny"] if main is report_main else ["tiny", "--passes", "magnitude(0.5),freeze"]
    assert main([*words, option, str(file / "below")]) == 2
    assert "written" in capsys.readouterr().err
    if option == "--html":
        assert main([*words, option, "-"]) == 2
        assert "name one" in capsys.readouterr().err


def test_commands_write_pages_and_pictures(tmp_path: Path, capsys: Any) -> None:
    out = {"--html": tmp_path / "page.html", "--png": tmp_path / "png", "--svg": tmp_path / "svg"}
    words = [str(word) for pair in out.items() for word in pair]
    assert report_main(["tiny", "--quick", *words]) == 0
    page = out["--html"].read_text("utf-8")
    assert "%tokens" in page or "input" in page
    assert len(list(out["--png"].iterdir())) == len(list(out["--svg"].iterdir())) >= 8
    assert "charts in" in capsys.readouterr().out


def test_what_cannot_be_drawn_takes_nothing_else_along(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: the text and the JSON of a long measurement were lost where the page failed in the end."""

    def full(*_: Any) -> str:
        raise DataError("no room is left")

    monkeypatch.setattr("sparsec.report.__main__.report_page", full)
    words = ["--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    assert report_main(["tiny", "--no-measure", *words]) == 2
    said = capsys.readouterr()
    assert "== Summary" in said.out
    assert "no room is left" in said.err
    assert (tmp_path / "a.json").stat().st_size


def test_a_chart_with_no_bars_is_left_out() -> None:
    report = report_cases.report()
    empty = replace(report, layers=(), groups=(), summary={}, latency=None)
    assert report_charts(empty) == []
    assert all(isinstance(chart, Chart) for chart in report_charts(report))
