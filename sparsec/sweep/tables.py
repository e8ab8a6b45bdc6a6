"""A study as a table: in the terminal, as Markdown, and whole as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sparsec.console.table import WIDTH, fitted, heading, mega, paragraph, percent, times
from sparsec.report.schema import VARIANT, variant_document
from sparsec.report.variant import Variant, short_perplexity
from sparsec.sweep.run import DENSE, CellResult

Column = tuple[str, Callable[[Variant], Any], Callable[[Any], str]]
TIMED = ("prefill ms", "window ms", "decode ms", "measured")
"""Titles of what the clock told: marked with `?` where the machine was busy."""
BUSY = "?: the machine was busy; measure again idle"
COLUMNS: tuple[Column, ...] = (
    ("sparsity", lambda v: v.sparsity, percent),
    ("kept M", lambda v: v.nnz, lambda n: mega(n, 1)),
    ("MB", lambda v: v.bytes, lambda n: mega(n, 1)),
    ("MFLOP", lambda v: v.flops_per_token, lambda n: mega(n, 0)),
    ("perplexity", lambda v: v.perplexity, short_perplexity),
    ("top-1", lambda v: v.top1, "{:.3f}".format),
    ("top-5", lambda v: v.top5, "{:.3f}".format),
    ("KL", lambda v: v.kl, "{:.3g}".format),
    ("cosine", lambda v: v.cosine, "{:.4f}".format),
    ("least", lambda v: v.cosine_min, "{:.4f}".format),
    ("prefill ms", lambda v: v.prefill_ms and v.prefill_ms.median, "{:.1f}".format),
    ("window ms", lambda v: v.window_ms and v.window_ms.median, "{:.1f}".format),
    ("decode ms", lambda v: v.decode_ms and v.decode_ms.median, "{:.2f}".format),
    ("by FLOPs", lambda v: v.speedup_theoretical, times),
    ("predicted", lambda v: v.speedup_predicted, times),
    ("measured", lambda v: v.speedup and v.speedup.median, times),
)
"""Title, value of a cell, how it is shown. The last three are speedups of decoding against dense; of an encoder, whose cosines are
those of its embeddings to dense, the measured one is of a window."""


def text(results: Iterable[CellResult], notes: Sequence[str], width: int = WIDTH) -> str:
    """For a terminal: plain lines of at most `width` columns, as far as words allow. What failed stands below with its reason."""
    done = list(results)
    header, rows = grid(done)
    keys = len(naming(done)[0])
    lines = fitted(header, rows, width, left=range(keys + 1), keys=keys)
    for result in done:
        if result.error:
            lines += paragraph(f"failed: {result.spec}: {result.error}", "", "  ", width)
    if any(result.disturbed for result in done):
        lines.append(BUSY)
    if notes:
        lines += heading("Notes", width)
        lines += [line for note in notes for line in paragraph(note, "- ", width=width)]
    return "\n".join(lines)


def markdown(results: Iterable[CellResult], notes: Sequence[str]) -> str:
    """The same as a Markdown page."""
    done = list(results)
    header, rows = grid(done)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    lines += [""] + [f"- failed: `{r.spec}`: {r.error}" for r in done if r.error] + [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"


def grid(results: Sequence[CellResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what names each cell; then the figures that are known of any cell."""
    keys, named = naming(results)
    columns = _columns(results)
    energy = _tells_energy(results)
    header = [*keys, "layouts", *(c[0] for c in columns), *(["mJ a token"] if energy else [])]
    rows = []
    for r, first in zip(results, named, strict=True):
        shown = [_shown(r, column) for column in columns]
        spent = ["-" if r.energy_mj is None else f"{r.energy_mj:.1f}"] if energy else []
        rows.append([*first, "failed" if r.error else r.layouts, *shown, *spent])
    return header, rows


def naming(results: Sequence[CellResult]) -> tuple[list[str], list[list[str]]]:
    """The columns that name cells, and what stands in them: the values of placeholders, and the passes where those differ."""
    places = list(dict.fromkeys(name for r in results for name, _ in r.values))
    templates = [(r.template if r.values else "") or r.spec for r in results]
    passes = len({t for r, t in zip(results, templates, strict=True) if r.spec != DENSE}) > 1 or not places
    rows = []
    for r, template in zip(results, templates, strict=True):
        values = dict(r.values)
        row = [*([template] if passes else []), *(values.get(name, "") for name in places)]
        rows.append([DENSE, *row[1:]] if r.spec == DENSE else row)
    return [*(["passes"] if passes else []), *places], rows


def _tells_energy(results: Sequence[CellResult]) -> bool:
    return any(r.energy_mj is not None for r in results)


def _shown(result: CellResult, column: Column) -> str:
    title, of, show = column
    value = None if result.figures is None else of(result.figures)
    return "-" if value is None else show(value) + ("?" if result.disturbed and title in TIMED else "")


def _columns(results: Sequence[CellResult]) -> list[Column]:
    known = [r.figures for r in results if r.figures is not None]
    return [column for column in COLUMNS if any(column[1](figures) is not None for figures in known)]


def as_csv(results: Iterable[CellResult]) -> str:
    """One line for every cell; the placeholders, then every figure that the JSON has, lists joined with spaces."""
    done = list(results)
    names = list(dict.fromkeys(name for result in done for name, _ in result.values))
    own = ("spec", *names, "error", "layouts", "energy_mj", "disturbed", "seconds")
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [*own, *VARIANT], lineterminator="\n")
    writer.writeheader()
    for r in done:
        figures = {} if r.figures is None else variant_document(r.figures)
        cells = {**dict(r.values), **{n: getattr(r, n) for n in own if n not in names}, **figures}
        writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in cells.items()})
    return stream.getvalue()
