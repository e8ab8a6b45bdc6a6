"""A report as text: the summary on one screen, then all of it as wide as asked; plain ASCII, the same in a pipe and a log."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence

from sparsec.console.table import WIDTH, fitted, heading, mega, paragraph, percent, shorten, times
from sparsec.data.tiny import RANDOM
from sparsec.machine import Machine
from sparsec.report.depth import depth_table
from sparsec.report.layer import LayerRow, known_ratio, total
from sparsec.report.notes import all_notes, merged, said_under_layers
from sparsec.report.pruning import pruning_lines
from sparsec.report.records import GroupRow, ReportData
from sparsec.report.recovery import on_second_text, recovery_tables, recovery_texts
from sparsec.report.roles import by_role, middle, most
from sparsec.report.summary import summary_lines
from sparsec.report.variant import metrics
from sparsec.report.words import chosen_because, dense_bound, dense_reason, ends, slower, storage
from sparsec.timing.spread import Spread

_NAME = 30


def render(report: ReportData, layers: bool = False, width: int = WIDTH) -> str:
    """The summary, then all sections that the report has something for; no newline at the end.

    layers: every weight has a line of its own; else those of one role share one. width: columns, 80 at least; a table that is wider
    becomes several, and a name that no comma parts may be.
    """
    lines = summary_lines(report)
    lines += _passes(report, width) + _recovery(report, width)
    lines += _layers(report, layers, width) + pruning_lines(report.layers, layers, width)
    lines += (depth_table(report.layers, width) if layers else []) + _groups(report, width)
    if report.summary:
        lines += _compared(report, width)
    if report.sample is not None and not never_trained(report):
        lines += _sample(report, width)
    if notes := all_notes(report):
        lines += heading("Notes", width)
        lines += [line for note in notes for line in paragraph(note, "- ", width=width)]
    if report.model is not None:
        m = report.model
        lines += heading("Model", width)
        about = f"{m.name} ({m.architecture}), from {m.source}; weights stored as: {m.source_precision}"
        lines += paragraph(about, width=width)
        lines += [f"computes in {m.dtype}, {report.parameters:,} parameters"]
    if report.machine is not None:
        lines += machine_lines(report.machine, width)
    return "\n".join(lines)


def never_trained(report: ReportData) -> bool:
    """What a random model writes says nothing."""
    return report.model is not None and report.model.source.startswith(RANDOM)


def machine_rows(m: Machine) -> list[tuple[str, str]]:
    """The environment: what, and its value."""
    memory = f", {m.memory_bytes / 2**30:.0f} GiB" if m.memory_bytes else ""
    versions = ", ".join(f"{name} {version}" for name, version in m.versions.items())
    rows = [
        ("cpu", f"{m.cpu}, {m.isa}, {m.cores} cores{memory}; torch uses {m.threads} threads"),
        ("gpu", m.gpu or "none"),
        ("system", f"{m.system}, Python {m.python}"),
        ("versions", versions + (f"; commit {m.commit}" if m.commit else "")),
        ("native", m.native),
        *[("kernels", f"{state}: {', '.join(names)}") for state, names in _by_state(m.kernels).items()],
    ]
    if m.load is not None:
        rows.append(("load", f"{m.load:.1f} processes ran or waited over the last minute"))
    return rows


def _by_state(kernels: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of kernels by what is said of them."""
    return {state: [name for name, said in kernels.items() if said == state] for state in kernels.values()}


def machine_lines(m: Machine, width: int | None = None) -> list[str]:
    """The environment, also for bug reports."""
    rows = [line for key, text in machine_rows(m) for line in paragraph(text, f"{key:<9} ", width=width)]
    return heading("Machine", width) + rows


def _passes(report: ReportData, width: int) -> list[str]:
    if not report.passes:
        return []
    lines, names = heading("Passes", width), [row.name for row in report.layers]
    for p in report.passes:
        lines += paragraph(f"{p.spec}  [{p.effect.value}]  {p.seconds:.2f} s", f"{p.index:>2}  ", width=width)
        said = p.summary + ("" if p.changed else " (the computation is unchanged)")
        lines += paragraph(said, "      ", width=width)
        left, elsewhere = said_under_layers(report, p.notes)
        notes = merged(left, names)
        lines += [line for note in notes[:5] for line in paragraph(note, "      - ", width=width)]
        if notes[5:]:
            lines.append(f"      - and {len(notes) - 5} more (under Notes)")
        if elsewhere:
            lines.append("      - what stays dense says why under Layers")
    return lines


def _recovery(report: ReportData, width: int) -> list[str]:
    tables = recovery_tables(report)
    lines = heading("Recovery: before and after training", width) if tables else []
    for how, (header, rows) in tables:
        lines += [*paragraph(how, width=width), *fitted(header, rows, width)]
    return lines + [line for text in recovery_texts(report) for line in paragraph(text, width=width)]


def _layers(report: ReportData, every: bool, width: int) -> list[str]:
    legend: dict[str, str] = {}
    named = by_role(report.layers)
    if every:
        named = [(row.name.removesuffix(".weight"), [row]) for row in report.layers]
    body = [_layer(name, rows, legend, report.doubt) for name, rows in named]
    header = (
        "name",
        "group",
        "out x in",
        "zero",
        "MB held",
        "format[kernel]",
        "FLOPs",
        "bytes",
        "pred.",
        "roof",
        "meas.",
    )
    what = "one row per stored weight" if every else "those of one role in one row (--layers: all)"
    lines = heading(f"Layers: {what}; speedups: by FLOPs, by bytes, predicted, measured", width)
    lines += fitted(header, body, width, left=(0, 1, 5, 9), gap=1)
    for reason, mark in legend.items():
        lines += paragraph(f"dense because: {reason.removeprefix('dense: ')}", f"({mark}) ", width=width)
    said = [*chosen_because(report.layers), *slower(report.layers)]
    said += [f"tied, counted once: {row.name} = {', '.join(row.aliases)}" for row in report.layers if row.aliases]
    said += [*storage(report.layers), ends(report) or "", dense_bound(report) or ""]
    return lines + [line for text in said for line in paragraph(text, width=width)]


def _layer(name: str, rows: Sequence[LayerRow], legend: dict[str, str], doubt: str) -> tuple[str, ...]:
    """Sums and shares over the rows; of speedups and roofs the middle one."""
    first, count = rows[0], f" x{len(rows)}" if rows[1:] else ""
    parameters = sum(row.parameters for row in rows)
    measured = middle(row.speedup_measured for row in rows)
    return (
        shorten(name, _NAME - len(count)) + count,
        first.group,
        "x".join(map(str, (first.out_features, first.in_features) if first.in_features else first.shape)),
        percent(1 - sum(row.nnz for row in rows) / parameters if parameters else 0.0),
        mega(sum(row.bytes_held for row in rows)),
        most([_where(row, legend) for row in rows]),
        times(known_ratio(total([row.flops_dense for row in rows]), total([row.flops_per_token for row in rows]))),
        times(known_ratio(sum(row.bytes_dense for row in rows), sum(row.bytes_held for row in rows))),
        times(middle(row.speedup_predicted for row in rows)),
        most([row.binds or "-" for row in rows]).split(" ")[0],
        times(measured) + (doubt if measured is not None else ""),
    )


def _where(row: LayerRow, legend: dict[str, str]) -> str:
    """Format and kernel; of what is dense, why."""
    reason = dense_reason(row)
    if reason is None:
        return f"{row.format}[{row.kernel or '-'}]"
    return f"dense{f'[{row.kernel}]' if row.kernel else ''} ({legend.setdefault(reason, _mark(len(legend)))})"


def _mark(index: int) -> str:
    letters = string.ascii_lowercase
    return letters[index] if index < len(letters) else f"{letters[index % 26]}{index // 26}"


def _groups(report: ReportData, width: int) -> list[str]:
    whole = GroupRow(
        "all weights",
        report.parameters,
        report.nnz,
        report.flops_per_token,
        report.flops_dense,
        sum(r.bytes_dense for r in report.layers),
        sum(r.bytes_held for r in report.layers),
        1.0,
    )
    rows = [
        (
            g.group,
            f"{g.parameters:,}",
            percent(g.share),
            percent(g.sparsity, 2),
            mega(g.flops_dense),
            mega(g.flops_per_token),
            mega(g.bytes_dense),
            mega(g.bytes_held),
        )
        for g in (*report.groups, whole)
    ]
    header = ("group", "parameters", "share", "zero", "MFLOP dense", "MFLOP now", "MB dense", "MB held")
    lines = heading("Groups: FLOPs per token by what executes them, parameters by where they are stored", width)
    lines += fitted(header, rows, width)
    lines += paragraph(
        f"buffers beside the weights: {mega(report.bytes_buffers)} MB; masks still held: {mega(report.bytes_masks)} MB",
        width=width,
    )
    if report.decoding is not None:
        lines += paragraph(f"decoding: {report.decoding}", width=width)
    if report.flops_dense is None:
        lines.append("FLOPs are not counted: add the pass flops")
    elif report.flops_without_weights:
        work = f"{mega(report.flops_without_weights)} MFLOP per token are attention scores and values at the pass flops' context"
        lines += paragraph(f"{work}; they have no weights, so pruning leaves them as they are", width=width)
    return lines


def _compared(report: ReportData, width: int) -> list[str]:
    header = ("", *(name.replace("_", " ") for name in report.summary))
    lines = heading("Compared", width) + fitted(header, compared_rows(report), width)
    return lines + [line for text in _footnotes(report) for line in paragraph(text, width=width)]


def compared_rows(report: ReportData) -> list[tuple[str, ...]]:
    """Every figure of the compared models that is known of one: its title, and what each has."""
    variants = list(report.summary.values())
    rows: list[tuple[str, ...]] = []
    for name, (_, metric) in metrics().items():
        values = [getattr(v, name) for v in variants]
        if any(value is not None for value in values):
            shown = ["-" if value is None else metric.show(value) for value in values]
            if any(isinstance(value, Spread) for value in values):  # measured times and their ratios
                shown = [cell.replace(" (", f"{report.doubt} (", 1) for cell in shown]
            rows.append((metric.title, *shown))
    return rows


def _footnotes(report: ReportData) -> list[str]:
    notes = []
    if (e := report.evaluation) is not None:
        what = "cosine and error of embeddings" if report.encoder else "perplexity, agreement and KL"
        notes.append(
            f"{what} on {e.text} (sha256 {e.text_sha256[:16]}, {e.text_tokens:,} tokens): "
            f"{e.windows} windows of {e.window_length} tokens, {e.dtype}{'; ' * bool(e.protocol)}{e.protocol}"
        )
    if (second := on_second_text(report)) is not None:
        notes.append(second)
    if (t := report.latency) is not None:
        rest = f"{t.prefill_repeats} prefills of {t.prompt_tokens} tokens and of {t.decode_repeats} tokens decoded after them"
        if report.encoder:
            rest = f"{t.prefill_repeats} forwards of {t.prompt_tokens} tokens and {t.window_repeats} of a window, {t.window_tokens}"
        notes.append(f"latency at batch 1 with {t.threads} threads, models in turn: median (quartiles) of {rest}")
    if report.encoder:
        notes.append(
            "an encoder decodes nothing and sees the tokens that it would predict: decoding, perplexity and a sample have no "
            "meaning; an embedding is the mean of the last hidden state over a window's tokens"
        )
    if t is not None and t.disturbed:
        notes.append(
            f"?: the machine was busy: others kept {t.busy_cores or 0:.1f} cores from {t.threads} threads; measure again idle"
        )
    return notes


def _sample(report: ReportData, width: int) -> list[str]:
    sample = report.sample
    assert sample is not None
    template = " (through the chat template)" if sample.chat else ""
    lines = heading(f"Sample: greedy, up to {sample.new_tokens} new tokens{template}", width)
    room = min(24, max(map(len, sample.texts), default=0))  # for names, which are short, or those of other passes
    for name, text in {"prompt": sample.prompt, **sample.texts}.items():
        if len(name) > room:
            lines += paragraph(name, width=width)
        first = name if len(name) <= room else ""
        lines += paragraph(repr(text), f"{first:<{max(7, room)}}  ", width=width)
    return lines
