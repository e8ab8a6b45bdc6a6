"""Pictures of single layers for a page: which weights a mask keeps, where the zeros lie, and how large the values are."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from itertools import pairwise

from sparsec.page.drawing import COLOURS, INK, LETTERS, WIDTH, compact, style
from sparsec.report.views import LayerView


def corner_png(view: LayerView) -> str:
    """As a data URI: one dot a weight, dark where it is kept."""
    return _png([[0 if sign == "#" else 255 for sign in row] for row in view.corner])


def zeros_png(view: LayerView) -> str:
    """As a data URI: the whole matrix in cells, the lighter the more zeros."""
    return _png([[round(255 * share) for share in row] for row in view.zeros])


def _png(rows: Sequence[Sequence[int]]) -> str:
    import numpy as np
    from PIL import Image

    stream = io.BytesIO()
    grey = Image.fromarray(np.array(rows, dtype=np.uint8))
    found = grey.convert("1", dither=Image.Dither.NONE) if {v for row in rows for v in row} <= {0, 255} else grey
    found.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def sizes_svgs(views: Sequence[LayerView]) -> Iterator[str]:
    """How many weights of each size a layer has, and how many of them stay. One figure is drawn anew for every layer."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with style(LETTERS, "sizes"), rc_context({"figure.constrained_layout.use": False}):
        figure = Figure(figsize=(WIDTH, 2.2))
        figure.subplots_adjust(0.03, 0.24, 0.97, 0.96)
        axes = figure.add_subplot()
        gone = axes.stairs([1], [0, 1], fill=True, color=COLOURS[4], label="pruned")
        kept = axes.stairs([1], [0, 1], fill=True, color=COLOURS[0], label="kept")
        cut = axes.axvline(0, color=INK, linestyle="--", linewidth=1, label="threshold")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.legend(frameon=False, fontsize="small", loc="upper right")
        axes.set_xlabel("|w|")
        axes.locator_params(axis="x", nbins=4)
        for view in views:
            gone.set_data(_heights(view.counts, view.edges), view.edges)
            kept.set_data(_heights(view.kept, view.edges), view.edges)
            cut.set_visible(view.threshold is not None)
            cut.set_xdata([view.threshold or 0.0] * 2)
            axes.set_xlim(0, 1.02 * max(shown_to(view), view.threshold or 0.0) or 1.0)
            axes.set_ylim(0, max(*_heights(view.counts, view.edges)) * 1.05 or 1.0)
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
            yield compact(stream.getvalue())


def shown_to(view: LayerView) -> float:
    """Where the picture of sizes ends: the last bin may be wide, so that a few large values do not press all into the first."""
    widths = [right - left for left, right in pairwise(view.edges)]
    return view.edges[-2] if len(widths) > 1 and widths[-1] > 1.5 * widths[0] else view.edges[-1]


def _heights(counts: Sequence[int], edges: Sequence[float]) -> list[float]:
    """By width: bins need not be equal."""
    return [
        count / (right - left) if right > left else 0.0
        for count, (left, right) in zip(counts, pairwise(edges), strict=True)
    ]
