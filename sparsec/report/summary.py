"""The first screen of a report: what was pruned, bytes, speed, quality, three notes; at most 24 lines of 80 columns."""

from __future__ import annotations

import textwrap

from sparsec.console.table import mega, percent, table, times
from sparsec.report.depth import depth_lines
from sparsec.report.notes import SHOWN, all_notes, for_quality
from sparsec.report.records import ReportData
from sparsec.report.variant import short_perplexity
from sparsec.timing.spread import Spread

LINES, COLUMNS = 24, 80
LEAST = 2  # notes that bars leave room for


def summary_lines(report: ReportData) -> list[str]:
    """The screen."""
    lines = [f"== Summary {'=' * (COLUMNS - 11)}", *_what(report)]
    if report.summary:
        lines += ["", *_table(report)]
    lines += [*(_bytes(report) if not report.summary else ()), *_speed(report), *_quality(report)]
    notes, bars = all_notes(report), depth_lines(report.layers)
    count = SHOWN
    while len(lines) + len(bars) + min(count, len(notes)) + (len(notes) > count) > LINES:
        if count > LEAST or not bars:
            if count == 1:
                break
            count -= 1
        else:
            bars.pop()
    lines += bars
    shown = notes[:count]
    for i, note in enumerate(shown, 1):
        room = LINES - 1 - len(lines) - (len(shown) - i)
        lines += _wrapped(note, "- ", lines=max(1, min(2, room)))
    if notes[count:]:
        lines.append(f"- and {len(notes) - count} more under Notes")
    return lines


def _what(report: ReportData) -> list[str]:
    name = f"{report.model.name}, {report.model.dtype}: " if report.model is not None else ""
    lines = _wrapped(f"{name}{percent(report.sparsity)} of {report.parameters:,} weights are zero", lines=1)
    if report.passes:
        lines += _wrapped(", ".join(p.spec for p in report.passes), f"{'passes':<9}", lines=2)
    return lines


def _table(report: ReportData) -> list[str]:
    return table(("", *(name.replace("_", " ") for name in report.summary)), summary_rows(report))


def summary_rows(report: ReportData) -> list[tuple[str, ...]]:
    """A title and the figures of each compared model: bytes, speed, quality."""
    variants = list(report.summary.values())
    rows: list[tuple[str, ...]] = []

    def row(title: str, cells: list[str]) -> None:
        if any(cell != "-" for cell in cells):
            rows.append((title, *cells))

    prompt = f"{report.latency.prompt_tokens} tokens" if report.latency else "prompt"
    row("MB", [mega(v.bytes) for v in variants])
    dense = report.summary["dense"].bytes if "dense" in report.summary else 0
    row("  share of dense", [percent(v.bytes / dense, 0) if dense else "-" for v in variants])
    row("ms to decode a token", [_milliseconds(v.decode_ms, report.doubt) for v in variants])
    row("  speed against dense", [_times(v.speedup_decode, report.doubt) for v in variants])
    row(f"ms to read {prompt}", [_milliseconds(v.prefill_ms, report.doubt) for v in variants])
    row("  speed against dense", [_times(v.speedup_prefill, report.doubt) for v in variants])
    if report.latency is not None and report.latency.window_tokens is not None:
        row(
            f"ms to read {report.latency.window_tokens} tokens",
            [_milliseconds(v.window_ms, report.doubt) for v in variants],
        )
        row("  speed against dense", [_times(v.speedup_window, report.doubt) for v in variants])
    row("perplexity", [_perplexity(v.perplexity) for v in variants])
    row("perplexity, second text", [_perplexity(v.perplexity_second) for v in variants])
    row("cosine of embeddings", [_cosine(v.cosine) for v in variants])
    row("cosine, second text", [_cosine(v.cosine_second) for v in variants])
    return rows


def _bytes(report: ReportData) -> list[str]:
    if not report.bytes_dense or not any(row.packed for row in report.layers):
        return []
    share = report.bytes_held / report.bytes_dense
    return _wrapped(
        f"{mega(report.bytes_held)} MB of {mega(report.bytes_dense)}: {percent(share, 0)} of dense", f"{'bytes':<9}", 1
    )


def _speed(report: ReportData) -> list[str]:
    lowered, latency = report.summary.get("lowered"), report.latency
    of = "speedup_prefill" if report.encoder else "speedup_decode"
    if lowered is None or latency is None or (speedup := getattr(lowered, of)) is None:
        return []
    what = f"{latency.prompt_tokens} tokens" if report.encoder else "a token"
    text = f"{what} {_times(speedup, report.doubt)} as fast as the stock dense model"
    zeros, own = getattr(lowered, f"zeros_{of}"), report.summary.get("dense_on_sparsec")
    if zeros is not None and own is not None and getattr(own, of) is not None:
        kernels, part = _times(getattr(own, of), report.doubt), _times(zeros, report.doubt)
        text += f": {kernels} by sparsec's dense kernels, {part} over these by the zeros"
    said = [f"{report.doubt}{' ' * 8}the machine was busy; measure again idle"] if report.doubt else []
    return _wrapped(text, f"{'speed':<9}", lines=2) + said


def _quality(report: ReportData) -> list[str]:
    pruned, dense, on = report.summary.get("masked"), report.summary.get("dense"), report.evaluation
    lines = []
    if pruned is not None and pruned.cosine is not None and on is not None:
        text = f"cosine of the embeddings to dense {pruned.cosine:.4f}, the least {pruned.cosine_min or 0:.4f}"
        text += "".join(f"; {other:.4f} by {spec}" for spec, other in report.beside.items())
        lines += _wrapped(f"{text} ({on.windows} x {on.window_length} tokens of {on.text})", f"{'quality':<9}", lines=2)
    if pruned is not None and dense is not None and pruned.perplexity is not None and on is not None:
        text = f"perplexity {_perplexity(dense.perplexity)} before, {_perplexity(pruned.perplexity)} after"
        text += "".join(f"; {_perplexity(other)} by {spec}" for spec, other in report.beside.items())
        lines += _wrapped(f"{text} ({on.windows} x {on.window_length} tokens of {on.text})", f"{'quality':<9}", lines=2)
    if report.beside_second:
        shown = _cosine if report.encoder else _perplexity
        text = "; ".join(f"{shown(other)} by {spec}" for spec, other in report.beside_second.items())
        lines += _wrapped(f"on the second text {text}", " " * 9, lines=1)
    if (add := for_quality(report)) is not None:
        lines += _wrapped(add, " " * 9 if lines else f"{'quality':<9}", lines=2)
    return lines


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _perplexity(value: float | None) -> str:
    return "-" if value is None else short_perplexity(value)


def _milliseconds(spread: Spread | None, doubt: str) -> str:
    if spread is None:
        return "-"
    return f"{spread.median:.{2 if spread.median < 100 else 0}f}{doubt}"


def _times(spread: Spread | None, doubt: str) -> str:
    return "-" if spread is None else times(spread.median) + doubt


def _wrapped(text: str, first: str = "", lines: int = 2) -> list[str]:
    """At most so many lines; what does not fit is cut, and stands whole further down."""
    indent = " " * len(first)
    return textwrap.wrap(
        text, COLUMNS, initial_indent=first, subsequent_indent=indent, max_lines=lines, placeholder=" ..."
    )
