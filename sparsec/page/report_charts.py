"""The charts of a report: zeros, parameters and FLOPs by group, bytes, time in theory and by the clock, the roofline, depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsec.console.table import mega, percent
from sparsec.page.drawing import INK, Chart, bars, plain_numbers, plain_text, points
from sparsec.report.layer import LayerRow
from sparsec.report.records import ReportData
from sparsec.report.roles import role
from sparsec.report.variant import short_perplexity
from sparsec.timing.spread import Spread

BAR = 0.23
"""Inches of a bar's height."""
Values = Mapping[str, Sequence[float]]


def report_charts(report: ReportData) -> list[Chart]:
    """Those that the report has figures for."""
    found = [
        *_groups(report),
        _bytes(report),
        _speedups(report),
        _decoding(report),
        _quality(report),
        _roofline(report),
    ]
    found += [_depth(report), _time_by_depth(report), _sensitivity(report)]
    return [chart for chart in found if chart is not None]


def bar_chart(
    name: str, title: str, says: str, names: Sequence[str], series: Values, shown: Callable[[float], str], unit: str
) -> Chart | None:
    """None where there is nothing to draw."""
    if not names or not series:
        return None
    rows = tuple((each, *(shown(values[i]) for values in series.values())) for i, each in enumerate(names))
    height = 1.0 + BAR * len(names) * len(series)
    return Chart(
        name,
        title,
        says,
        ("", *series),
        rows,
        lambda axes: bars(axes, names, series, shown, unit),
        max(2.0, height),
    )


def _groups(report: ReportData) -> list[Chart | None]:
    """The second seminar's three figures."""
    groups = [g for g in report.groups if g.parameters or g.flops_dense]
    names = [g.group for g in groups]
    lowered = any(row.packed for row in report.layers)
    stored = {g.group: 0 for g in groups}
    for row in report.layers:
        if row.group in stored:
            stored[row.group] += row.nnz if row.packed else row.parameters
    zeros: dict[str, list[float]] = {"dense": [0.0] * len(groups), "masked": [100 * g.sparsity for g in groups]}
    parameters: dict[str, list[float]] = {"dense": [g.parameters / 1e6 for g in groups]}
    parameters["masked"] = parameters["dense"]
    flops: dict[str, list[float]] = {"dense": [(g.flops_dense or 0.0) / 1e6 for g in groups]}
    flops["masked"] = flops["dense"]
    if lowered:
        zeros["lowered"] = zeros["masked"]
        parameters["lowered"] = [stored[name] / 1e6 for name in names]
        flops["lowered"] = [(g.flops_per_token or 0.0) / 1e6 for g in groups]
    counted = report.flops_dense is not None
    return [
        bar_chart(
            "groups-sparsity",
            "Zeros by group",
            "The share of a group's weights that are zero. A mask and its lowered form have the same.",
            names,
            zeros,
            "{:.1f}".format,
            "zeros, %",
        ),
        bar_chart(
            "groups-parameters",
            "Stored parameters by group",
            "A masked matrix still stores its zeros. A packed one stores the kept weights only.",
            names,
            parameters,
            _amount,
            "millions of stored parameters",
        ),
        bar_chart(
            "groups-flops",
            "FLOPs per token by group",
            "A dense kernel multiplies by the zeros of a mask too. A sparse one skips them.",
            names,
            flops,
            _amount,
            "MFLOP per token",
        )
        if counted
        else None,
    ]


def _bytes(report: ReportData) -> Chart | None:
    series: dict[str, list[float]] = {"dense": [g.bytes_dense / 1e6 for g in report.groups if g.bytes_dense]}
    series["now"] = [g.bytes_held / 1e6 for g in report.groups if g.bytes_dense]
    return bar_chart(
        "bytes",
        "Bytes by group",
        f"What the tensors take: {mega(report.bytes_held)} MB of the dense model's {mega(report.bytes_dense)}.",
        [g.group for g in report.groups if g.bytes_dense],
        series,
        _amount,
        "MB",
    )


def _speedups(report: ReportData) -> Chart | None:
    """Theory beside the clock."""
    if not report.summary:
        return None
    measured = "speedup_prefill" if report.encoder else "speedup_decode"
    kinds = {
        "by FLOPs": "speedup_theoretical",
        "by bytes": "speedup_theoretical_bytes",
        "predicted": "speedup_predicted",
        "measured": measured,
    }
    names = [name.replace("_", " ") for name in report.summary]
    series = {}
    for title, key in kinds.items():
        values = [_median(getattr(v, key)) for v in report.summary.values()]
        if all(value is not None for value in values):
            series[title] = [float(value or 0.0) for value in values]
    return bar_chart(
        "speedup",
        "Speedup: theory and the clock",
        "Against the stock dense model. By FLOPs and by bytes are bounds, predicted is the cost model's, measured is the "
        f"median over rounds by turns.{_busy(report)}",
        names,
        series,
        "{:.2f}".format,
        "times as fast as dense",
    )


def _decoding(report: ReportData) -> Chart | None:
    """The same as milliseconds."""
    dense = report.summary.get("dense")
    if dense is None or dense.decode_ms is None:
        return None
    whole = dense.decode_ms.median
    names, series = [], dict[str, list[float]](**{"by FLOPs": [], "predicted": [], "measured": []})
    for name, variant in report.summary.items():
        known = (variant.speedup_theoretical, variant.speedup_predicted, variant.decode_ms)
        if any(value is None for value in known):
            continue
        names.append(name.replace("_", " "))
        series["by FLOPs"].append(whole / (variant.speedup_theoretical or 1.0))
        series["predicted"].append(whole / (variant.speedup_predicted or 1.0))
        series["measured"].append(variant.decode_ms.median if variant.decode_ms else 0.0)
    return bar_chart(
        "latency",
        "Time of a decoded token",
        "By FLOPs: the dense time over the saved FLOPs. Predicted: the dense time less what the cost model saves. Measured: the "
        f"median over tokens.{_busy(report)}",
        names,
        series,
        "{:.2f}".format,
        "milliseconds a token",
    )


def _quality(report: ReportData) -> Chart | None:
    pruned, dense = report.summary.get("masked"), report.summary.get("dense")
    if pruned is None or dense is None:
        return None
    if report.encoder:
        values = {"these passes": pruned.cosine, **report.beside}
        title, unit = "Cosine of embeddings to dense", "cosine"
        says = "How near the embeddings stay to the dense model's: 1 is the same."
    else:
        values = {"dense": dense.perplexity, "these passes": pruned.perplexity, **report.beside}
        title, unit = "Perplexity", "perplexity (less is better)"
        says = "On the same windows of text; less is better."
        if pruned.top1 is not None:
            says += f" The most likely next token is the dense model's at {percent(pruned.top1)} of positions."
    shown: Callable[[float], str] = "{:.4f}".format if report.encoder else short_perplexity
    known = {name: value for name, value in values.items() if value is not None}
    return bar_chart(
        "quality", title, says, list(known), {"quality": list(known.values())} if known else {}, shown, unit
    )


def _roofline(report: ReportData) -> Chart | None:
    """The layers as points: how many FLOPs a byte, and how fast."""
    found: dict[str, list[tuple[float, float]]] = {}
    rows, tokens = [], _tokens(report)
    for row in report.layers:
        if row.ms and row.flops_per_token and row.bytes_held:
            flops = tokens * row.flops_per_token
            x, y = flops / row.bytes_held, flops / row.ms / 1e6
            found.setdefault(row.format, []).append((x, y))
            rows.append((row.name, row.format, f"{x:.3f}", f"{y:.2f}"))
    if not found:
        return None
    roofs = report.roofs

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        points(axes, found, "FLOPs per byte that the layer holds", "GFLOP/s", log=True)
        if roofs is not None:
            bandwidth, peak = roofs.bytes_per_second / 1e9, roofs.flops_per_second / 1e9
            xs = [x for at in found.values() for x, _ in at]
            left, knee = min(xs) / 2, peak / bandwidth
            right = max(max(xs), knee) * 2
            axes.plot([left, knee, right], [left * bandwidth, peak, peak], color=INK, linewidth=1.2)
            axes.annotate(
                f"{bandwidth:.0f} GB/s", (left * 1.1, left * bandwidth * 1.1), ha="left", va="bottom", fontsize="small"
            )
            axes.annotate(f"{peak:.0f} GFLOP/s", (right, peak), ha="right", va="bottom", fontsize="small")
        plain_numbers(axes.xaxis)

    under = "The line is what this machine reaches at reading and at multiplying. " if roofs is not None else ""
    return Chart(
        "roofline",
        "Roofline: the layers as points",
        f"{under}A point near the slope reads as fast as the memory gives, one near the flat part multiplies "
        "as fast as the cores do. "
        f"Times are those of {_rows_of(tokens)}, FLOPs those of kept weights.{_busy(report)}",
        ("layer", "layout", "FLOPs per byte", "GFLOP/s"),
        tuple(rows),
        draw,
        3.4,
    )


def _depth(report: ReportData) -> Chart | None:
    return _by_depth(
        report,
        "depth-sparsity",
        "Zeros by depth",
        "The share of zeros of each matrix, first block to last. Darker is denser.",
        lambda row: 100 * row.sparsity if row.criterion is not None else None,
        "zeros, %",
        "{:.1f}",
    )


def _time_by_depth(report: ReportData) -> Chart | None:
    return _by_depth(
        report,
        "depth-time",
        "Time by depth",
        f"Milliseconds of each layer for {_rows_of(_tokens(report))}, first block to last. Equal layers are timed "
        f"once.{_busy(report)}",
        lambda row: row.ms,
        "ms",
        "{:.4f}",
    )


def _sensitivity(report: ReportData) -> Chart | None:
    return _by_depth(
        report,
        "sensitivity",
        "Sensitivity",
        "The harm to the model's predictions where this matrix alone is pruned. Lighter hurts more.",
        lambda row: row.sensitivity,
        "1 - cosine" if report.encoder else "KL, nats a token",
        "{:.4g}",
    )


def _by_depth(
    report: ReportData,
    name: str,
    title: str,
    says: str,
    value: Callable[[LayerRow], float | None],
    unit: str,
    shown: str,
) -> Chart | None:
    """A map of roles by blocks."""
    blocks = list(dict.fromkeys(row.block for row in report.layers if row.block is not None))
    cells: dict[str, dict[str, float]] = {}
    for row in report.layers:
        found = value(row)
        if row.block is not None and found is not None:
            cells.setdefault(role(row), {})[row.block] = found
    if len(blocks) < 2 or not cells:
        return None

    def draw(axes: Any) -> None:
        grid = [[by_block.get(block, float("nan")) for block in blocks] for by_block in cells.values()]
        drawn = axes.pcolormesh(grid, cmap="cividis")
        axes.set_yticks([i + 0.5 for i in range(len(cells))], [plain_text(name) for name in cells], fontsize="small")
        axes.set_xticks([0.5, len(blocks) - 0.5], ["0", str(len(blocks) - 1)])
        axes.set_xlabel("block")
        axes.invert_yaxis()
        axes.figure.colorbar(drawn, ax=axes, label=unit)

    rows = tuple(
        (block, *(shown.format(by_block[block]) if block in by_block else "-" for by_block in cells.values()))
        for block in blocks
    )
    return Chart(name, title, says, ("block", *cells), rows, draw, max(2.2, 1.0 + BAR * len(cells)))


def _tokens(report: ReportData) -> int:
    """That a layer was timed with."""
    return report.latency.prompt_tokens if report.encoder and report.latency is not None else 1


def _rows_of(tokens: int) -> str:
    return "one row" if tokens == 1 else f"{tokens} rows"


def _busy(report: ReportData) -> str:
    return " The machine was busy: measure again idle." if report.doubt else ""


def _amount(value: float) -> str:
    return f"{value:,.2f}" if value >= 1 or value == 0 else f"{value:.2g}"


def _median(value: Spread | float | None) -> float | None:
    return value.median if isinstance(value, Spread) else value
