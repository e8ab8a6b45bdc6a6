"""The charts of a study: quality against zeros, bytes and time, and what theory and the cost model said beside the clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sparsec.console.table import percent, times
from sparsec.page.drawing import INK, Chart, points
from sparsec.report.variant import Variant, short_perplexity
from sparsec.sweep.frontier import pareto_front
from sparsec.sweep.run import DENSE, CellResult
from sparsec.sweep.series import series_of

Axis = tuple[str, Callable[[Variant], float | None], Callable[[float], str]]
"""Its title, what stands on it, and how a number on it is written."""
SPARSITY: Axis = ("zeros of all parameters, %", lambda v: 100 * v.sparsity, "{:.1f}".format)
PERPLEXITY: Axis = ("perplexity (less is better)", lambda v: v.perplexity, short_perplexity)
TOP1: Axis = ("top-1 agreement with dense, %", lambda v: None if v.top1 is None else 100 * v.top1, "{:.1f}".format)
COSINE: Axis = ("cosine of embeddings to dense", lambda v: v.cosine, "{:.4f}".format)
BYTES: Axis = ("MB", lambda v: v.bytes / 1e6, "{:.1f}".format)
TIME: Axis = (
    "time, % of dense",
    lambda v: None if v.speedup is None else 100 / v.speedup.median,
    "{:.0f}".format,
)
"""By turns with the dense model, so that cells measured at different hours can be compared."""


def study_charts(results: Iterable[CellResult]) -> list[Chart]:
    """Those that the cells have figures for; the dense model is a point of every line."""
    done = list(results)
    dense = next((r.figures for r in done if r.spec == DENSE), None)
    series, pruned = series_of(done), series_of(done, lowering=False)
    found = [
        _lines("perplexity", "Perplexity against zeros", pruned, dense, SPARSITY, PERPLEXITY, True),
        _lines("top1", "Top-1 agreement against zeros", pruned, dense, SPARSITY, TOP1),
        _lines("cosine", "Embeddings against zeros", pruned, dense, SPARSITY, COSINE),
        _lines("bytes", "Bytes against zeros", series, dense, SPARSITY, BYTES),
        _lines("time", "Time against zeros", series, dense, SPARSITY, TIME),
        _theory(series),
        _frontier("frontier-bytes", "Frontier: quality and bytes", series, dense, BYTES),
        _frontier("frontier-time", "Frontier: quality and time", series, dense, TIME),
    ]
    return [chart for chart in found if chart is not None]


Series = Mapping[str, Sequence[Variant]]
Points = dict[str, list[tuple[float, float]]]


def _points(series: Series, dense: Variant | None, x: Axis, y: Axis, with_dense: bool) -> Points:
    found: Points = {}
    for name, variants in series.items():
        at = []
        for variant in [*([dense] if dense is not None and with_dense else []), *variants]:
            left, up = x[1](variant), y[1](variant)
            if left is not None and up is not None:
                at.append((left, up))
        if len(at) > (1 if with_dense and dense is not None else 0):
            found[name] = sorted(set(at))
    return found


def _lines(
    name: str, title: str, series: Series, dense: Variant | None, x: Axis, y: Axis, log: bool = False
) -> Chart | None:
    at = _points(series, dense, x, y, with_dense=True)
    if not at:
        return None
    return Chart(
        name,
        title,
        "Every line begins at the dense model.",
        ("cells", x[0], y[0]),
        _rows(at, x, y),
        lambda axes: points(axes, at, x[0], y[0], log, joined=True),
        3.2 + 0.1 * len(at),
    )


def _rows(at: Points, x: Axis, y: Axis) -> tuple[tuple[str, ...], ...]:
    return tuple((name, x[2](left), y[2](up)) for name, found in at.items() for left, up in found)


def _theory(series: Series) -> Chart | None:
    """What was expected, against what the clock told."""
    kinds: dict[str, Callable[[Variant], float | None]] = {
        "by FLOPs": lambda v: v.speedup_theoretical,
        "by bytes": lambda v: v.speedup_theoretical_bytes,
        "by the cost model": lambda v: v.speedup_predicted,
    }
    at: Points = {}
    rows = []
    for name, variants in series.items():
        for v in variants:
            if v.speedup is None:
                continue
            clock = v.speedup.median
            said = {kind: of(v) for kind, of in kinds.items()}
            for kind, value in said.items():
                if value is not None:
                    at.setdefault(kind, []).append((value, clock))
            rows.append((name, percent(v.sparsity), *(times(value) for value in said.values()), times(clock)))
    if not at:
        return None

    def draw(axes: Any) -> None:
        points(axes, at, "expected speedup", "measured speedup")
        top = max(each for found in at.values() for p in found for each in p)
        axes.plot([0, top * 1.05], [0, top * 1.05], color=INK, linewidth=1, linestyle="--")
        axes.set_xlim(0, top * 1.05)
        axes.set_ylim(0, top * 1.05)

    return Chart(
        "theory-and-clock",
        "Theory against the clock",
        "On the dashed line the clock agrees. Below it a speedup was expected and did not come.",
        ("cells", "zeros", *kinds, "measured"),
        tuple(rows),
        draw,
        3.6,
    )


def _frontier(name: str, title: str, series: Series, dense: Variant | None, x: Axis) -> Chart | None:
    """Perplexity against what it costs; the line joins what nothing beats in both."""
    y = PERPLEXITY if dense is not None and dense.perplexity is not None else COSINE
    at = _points(series, None, x, y, with_dense=False)
    every = [p for found in at.values() for p in found]
    if dense is not None and x[1](dense) is not None and y[1](dense) is not None:
        at = {"dense": [(float(x[1](dense) or 0), float(y[1](dense) or 0))], **at}
        every += at["dense"]
    if len(every) < 3:
        return None
    sign = 1 if y is PERPLEXITY else -1
    ahead = pareto_front([(left, sign * up) for left, up in every])
    best = sorted({point for point, leads in zip(every, ahead, strict=True) if leads})

    def draw(axes: Any) -> None:
        axes.plot([p[0] for p in best], [p[1] for p in best], color=INK, linewidth=1, linestyle="--")
        points(axes, at, x[0], y[0], log=y is PERPLEXITY)

    rows = tuple(
        (kind, x[2](left), y[2](up), "yes" if (left, up) in best else "")
        for kind, found in at.items()
        for left, up in found
    )
    return Chart(
        name,
        title,
        f"Left and {'low' if y is PERPLEXITY else 'high'} is better. On the dashed line nothing is better in both.",
        ("cells", x[0], y[0], "on the front"),
        rows,
        draw,
        3.4 + 0.1 * len(at),
    )
