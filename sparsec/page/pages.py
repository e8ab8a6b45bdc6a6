"""A report or a study filled into its page: one file that holds its style, its script and its charts, and needs no network."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, resources
from typing import Any

from sparsec.console.table import mega, percent, times
from sparsec.machine import Machine
from sparsec.page.drawing import Chart, need_library, themed_svg
from sparsec.page.ir import KeptIR
from sparsec.page.pictures import corner_png, shown_to, sizes_svgs, zeros_png
from sparsec.page.report_charts import report_charts
from sparsec.page.sorted_table import CellText, Column, SortedTable, layer_table, sort_value
from sparsec.page.study_charts import study_charts
from sparsec.progress import Progress, stage
from sparsec.report.notes import all_notes
from sparsec.report.records import ReportData
from sparsec.report.recovery import on_second_text, recovery_tables, recovery_texts
from sparsec.report.summary import summary_rows
from sparsec.report.text import compared_rows, machine_rows, never_trained
from sparsec.report.variant import VARIANTS, short_perplexity
from sparsec.report.views import LayerView
from sparsec.sweep.run import DENSE, CellResult
from sparsec.sweep.tables import BUSY, COLUMNS, grid


@dataclass(frozen=True)
class Tile:
    """One figure of the summary, large."""

    name: str
    value: str
    more: str


def report_page(report: ReportData, ir: KeptIR | None, progress: Progress | None = None) -> str:
    """The HTML of a report; encoders have their own figures in it. ir: None where it was not kept, which the page says.

    Raises MissingExtraError where nothing can draw.
    """
    need_library()
    with stage(progress, "drawing the page"):
        charts = _drawn(report_charts(report))
        views = _views(report.views)
        numbers = {view.name: i for i, view in enumerate(report.views)}
        changed = {(p.index, p.spec): p.lines for p in (ir.passes if ir is not None else ())}
        return _filled(
            "report.html",
            title=f"{_name(report)}: sparsec report",
            heading=_name(report),
            about=_about(report),
            sections=[
                ("summary", "Summary"),
                ("charts", "Charts"),
                ("layers", "Layers"),
                ("ir", "Passes and IR"),
                ("figures", "All figures"),
                ("notes", "Notes"),
                ("machine", "Machine"),
            ],
            tiles=_report_tiles(report),
            compared=(("", *_variants(report)), summary_rows(report)) if report.summary else None,
            charts=charts,
            layers=layer_table(report.layers, numbers, report.doubt),
            views=views,
            passes=[
                asdict(p)
                | {
                    "says": f"{p.summary} ({p.effect.value}, {p.seconds:.2f} s)",
                    "notes": p.notes,
                    "lines": "\n".join(changed.get((p.index, p.spec), ())),
                }
                for p in report.passes
            ],
            kept=ir is not None,
            traced=ir.traced if ir is not None else "",
            final=ir.final if ir is not None else "",
            figures_table=_figures(report),
            recovery=recovery_tables(report),
            recovery_texts=recovery_texts(report),
            second=on_second_text(report),
            prompt=report.sample.prompt if report.sample else "",
            samples=list(report.sample.texts.items()) if report.sample and not never_trained(report) else [],
            notes=all_notes(report),
            machine=machine_rows(report.machine) if report.machine else [],
        )


def study_page(
    name: str,
    results: Sequence[CellResult],
    notes: Sequence[str],
    machine: Machine,
    told: str = "",
) -> str:
    """The HTML of a study. told: a preset's own findings, as text. MissingExtraError where nothing can draw."""
    need_library()
    header, rows = grid(results)
    columns = {title: of for title, of, _ in COLUMNS}
    cells = []
    for result, row in zip(results, rows, strict=True):
        found = []
        for title, text in zip(header, row, strict=True):
            value = columns[title](result.figures) if title in columns and result.figures is not None else None
            found.append(CellText(text, sort_value(value)))
        cells.append(found)
    return _filled(
        "study.html",
        title=f"{name}: sparsec study",
        heading=f"{name}: {len(results)} cells",
        about=notes[0] if notes else "",
        sections=[
            ("summary", "Summary"),
            ("charts", "Charts"),
            ("cells", "Cells"),
            ("notes", "Notes"),
            ("machine", "Machine"),
        ],
        tiles=_study_tiles(results),
        told=told,
        charts=_drawn(study_charts(results)),
        cells=SortedTable("cell-table", [Column(title) for title in header], cells),
        failed=[f"failed: {r.spec}: {r.error}" for r in results if r.error],
        notes=[*notes, BUSY] if any(r.disturbed for r in results) else notes,
        machine=machine_rows(machine),
    )


def _filled(template: str, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sparsec.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    from markupsafe import Markup

    templates = resources.files("sparsec.page") / "templates"
    own = {
        name: Markup((templates / f"page.{end}").read_text("utf-8")) for name, end in (("css", "css"), ("script", "js"))
    }
    return environment.get_template(template).render(**values, **own, version=metadata.version("sparsec"))


def _drawn(charts: Iterable[Chart]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [vars(chart) | {"svg": Markup(themed_svg(chart))} for chart in charts]


def _views(views: Sequence[LayerView]) -> str | None:
    """Base64 of the gzip of JSON: a script alone can show them, and so they are a fifth of the page and not two thirds."""
    if not views:
        return None
    found = [_view(view, svg) for view, svg in zip(views, sizes_svgs(views), strict=True)]
    text = json.dumps(found, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode("ascii")


def _view(view: LayerView, svg: str) -> dict[str, str]:
    shares = [share for row in view.zeros for share in row]
    all_of = sum(view.counts)
    cut = "no threshold: the method does not cut by size"
    if view.threshold is not None:
        cut = f"threshold {view.threshold:.4g}: smaller ones went, larger ones stayed"
    sampled = f" Counted on {view.sampled:,} sampled weights." if view.sampled is not None else ""
    beyond = ""
    if shown_to(view) < view.edges[-1] and all_of:
        beyond = f" ({percent(view.counts[-1] / all_of, 2)} are beyond {shown_to(view):.4g}, where the picture ends)"
    rows, columns = len(view.corner), len(view.corner[0]) if view.corner else 0
    cells = f"{len(view.zeros)}x{len(view.zeros[0]) if view.zeros else 0}"
    least, most = percent(min(shares, default=0.0)), percent(max(shares, default=0.0))
    return {
        "name": view.name,
        "says": f"{percent(view.sparsity)} of it is zero.",
        "corner": corner_png(view),
        "corner_says": f"The first {rows} rows and {columns} columns, one dot a weight: dark is kept.",
        "zeros": zeros_png(view),
        "zeros_says": f"The whole matrix in {cells} cells: lighter has more zeros, {least} to {most}.",
        "sizes": svg,
        "sizes_says": f"Sizes |w| from 0 to {view.edges[-1]:.4g}{beyond}; {cut}.{sampled}",
    }


def _name(report: ReportData) -> str:
    return report.model.name if report.model is not None else "a model"


def _about(report: ReportData) -> str:
    if report.model is None:
        return ""
    m = report.model
    return (
        f"{m.architecture}, {report.parameters:,} parameters, computes in {m.dtype}; from {m.source}; "
        f"its weights are stored as: {m.source_precision}"
    )


def _variants(report: ReportData) -> list[str]:
    return [VARIANTS[name] for name in report.summary]


def _report_tiles(report: ReportData) -> list[Tile]:
    tiles = [Tile("Zeros", percent(report.sparsity), f"of {report.parameters:,} parameters")]
    if report.bytes_dense:
        share = percent(report.bytes_held / report.bytes_dense, 0)
        tiles.append(Tile("Bytes", share, f"{mega(report.bytes_held)} MB, dense {mega(report.bytes_dense)}"))
    last = report.summary.get("lowered") or report.summary.get("masked")
    dense = report.summary.get("dense")
    if last is None or dense is None:
        return tiles
    speed = last.speedup_prefill if report.encoder else last.speedup_decode
    if speed is not None:
        what = "reading a prompt" if report.encoder else "a decoded token"
        tiles.append(Tile("Speed", times(speed.median) + report.doubt, f"{what}, against the stock dense model"))
    if last.perplexity is not None and dense.perplexity is not None:
        tiles.append(
            Tile("Perplexity", short_perplexity(last.perplexity), f"dense {short_perplexity(dense.perplexity)}")
        )
    if last.perplexity_second is not None and dense.perplexity_second is not None:
        value, before = short_perplexity(last.perplexity_second), short_perplexity(dense.perplexity_second)
        tiles.append(Tile("Perplexity, second text", value, f"not trained on; dense {before}"))
    if last.cosine is not None:
        tiles.append(Tile("Cosine", f"{last.cosine:.4f}", "of the embeddings to dense"))
    return tiles


def _study_tiles(results: Sequence[CellResult]) -> list[Tile]:
    done = [r for r in results if r.figures is not None]
    dense = next((r.figures for r in done if r.spec == DENSE), None)
    cells = [r for r in done if r.spec != DENSE]
    tiles = [Tile("Cells", str(len(cells)), f"{sum(bool(r.error) for r in results)} failed")]
    if dense is not None:
        first = f"{mega(dense.bytes, 1)} MB"
        if dense.perplexity is not None:
            first = short_perplexity(dense.perplexity)
        tiles.append(Tile("Dense", first, "perplexity" if dense.perplexity is not None else "bytes"))
    fast = [r for r in cells if _speed(r)]
    if fast:
        best = max(fast, key=_speed)
        tiles.append(Tile("Fastest", times(_speed(best)), best.spec))
    small = min(cells, key=lambda r: r.figures.bytes if r.figures else 0, default=None)
    if small is not None and small.figures is not None and dense is not None and dense.bytes:
        tiles.append(Tile("Smallest", percent(small.figures.bytes / dense.bytes, 0), small.spec))
    return tiles


def _speed(result: CellResult) -> float:
    """0 where it was not timed."""
    return 0.0 if result.figures is None or result.figures.speedup is None else result.figures.speedup.median


def _figures(report: ReportData) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    return (("", *_variants(report)), compared_rows(report)) if report.summary else None
