"""Charts drawn by matplotlib: as SVG inside a page, where they follow its light or dark theme, and as files for a paper."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sparsec.console.table import shorten
from sparsec.errors import DataError, MissingExtraError

INK, FAINT = "#1b1f24", "#d0d5db"
"""Text and axes; the grid."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
"""Told apart by the colour-blind (Okabe and Ito); every line has a marker of its own too."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
THEMED = {INK: "--ink", FAINT: "--faint", **{colour: f"--c{i}" for i, colour in enumerate(COLOURS)}}
"""What the page's style sheet calls each colour."""
COLUMN = 3.35
"""Inches of a paper's column."""
WIDTH = 5.0
"""Inches in a page: the letters are of a readable size on a phone."""
LONGEST = 34
"""Letters of a name in a chart; the table beside it has all of them."""
LINE = 60
"""Letters that fit above a chart."""
LETTERS = 12
"""Points of the letters in a page."""
Suffix = Literal["png", "svg"]


@dataclass(frozen=True)
class Chart:
    """One picture, with its numbers as a table beside it."""

    name: str  # of its file
    title: str
    says: str  # how to read it, in a sentence or two
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    draw: Callable[[Any], None]  # on matplotlib's axes
    height: float = 3.0  # inches at WIDTH


def need_library() -> None:
    """Raises MissingExtraError where there is no plotting library or no templates."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f'pages and charts need the packages matplotlib and jinja2; `pip install "sparsec[page]"` ({error})'
        ) from error


def themed_svg(chart: Chart) -> str:
    """For a page: its colours are variables of the page's style sheet, its letters are text."""
    with style(LETTERS, chart.name):
        return compact(_drawn(chart, WIDTH, chart.height, "svg").decode())


def save_charts(charts: Sequence[Chart], folder: Path, suffix: Suffix) -> list[Path]:
    """Files NAME.suffix for a paper's column: letters of 8 points, 300 dots an inch. DataError where they cannot be written."""
    written = []
    for chart in charts:
        with style(8, chart.name):
            data = _drawn(chart, COLUMN, chart.height * COLUMN / WIDTH * 1.15, suffix)
        path = folder / f"{chart.name}.{suffix}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error}); give another folder") from error
        written.append(path)
    return written


def bars(
    axes: Any, names: Sequence[str], series: Mapping[str, Sequence[float]], shown: Callable[[float], str], unit: str
) -> None:
    """Bars to the right, one of each series for every name, each with its number at the end."""
    height = 0.8 / max(1, len(series))
    for i, (title, values) in enumerate(series.items()):
        places = [at + (i - (len(series) - 1) / 2) * height for at in range(len(names))]
        drawn = axes.barh(places, values, height * 0.92, color=COLOURS[i % len(COLOURS)], label=title)
        axes.bar_label(drawn, [shown(value) for value in values], padding=3, fontsize="small")
    axes.set_yticks(range(len(names)), [plain_text(name) for name in names])
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlabel(unit)
    axes.grid(axis="x")
    if len(series) > 1:
        legend(axes)


def points(
    axes: Any,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x: str,
    y: str,
    log: bool = False,
    joined: bool = False,
) -> None:
    """The points of every series with a marker of its own. log: upwards. joined: by a line from left to right."""
    for i, (title, found) in enumerate(series.items()):
        at = sorted(found)
        axes.plot(
            [p[0] for p in at],
            [p[1] for p in at],
            linestyle="-" if joined else "",
            marker=MARKERS[i % len(MARKERS)],
            color=COLOURS[i % len(COLOURS)],
            label=plain_text(title),
            alpha=0.85,
        )
    if log:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid()
    if len(series) > 1:
        legend(axes)


def plain_numbers(axis: Any) -> None:
    """Ticks of a logarithmic axis as 20, 50, 100 and not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend(axes: Any) -> None:
    """Above the axes, in as many columns as the names have room for."""
    titles = [str(title) for title in axes.get_legend_handles_labels()[1]]
    columns = max(1, min(3, LINE // (max(map(len, titles), default=1) + 6)))
    axes.figure.legend(loc="outside upper center", ncols=columns, frameon=False, fontsize="small")


def plain_text(name: str) -> str:
    """A name as matplotlib shows it whatever it holds: a dollar would begin a formula, an underscore hide it from the legend."""
    shown = shorten("".join(sign if sign.isprintable() else "?" for sign in name), LONGEST)
    return (" " + shown if shown.startswith("_") else shown).replace("$", r"\$")


@contextmanager
def style(points: float, name: str) -> Iterator[None]:
    """Within it charts have letters of so many points, and the ids of an SVG are those of its name alone.

    Raises MissingExtraError where there is no plotting library.
    """
    need_library()
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.size": points,
                "font.family": "sans-serif",
                "svg.fonttype": "none",
                "svg.hashsalt": name,
                "text.color": INK,
                "axes.labelcolor": INK,
                "axes.edgecolor": INK,
                "xtick.color": INK,
                "ytick.color": INK,
                "grid.color": FAINT,
                "grid.linewidth": 0.6,
                "axes.axisbelow": True,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.titlesize": "medium",
                "lines.markersize": 5,
                "figure.constrained_layout.use": True,
            }
        )
        yield


def _drawn(chart: Chart, width: float, height: float, suffix: Suffix) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    chart.draw(figure.add_subplot())
    stream = io.BytesIO()
    about = {"Title": chart.title} | ({"Date": None} if suffix == "svg" else {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has others
        figure.savefig(stream, format=suffix, dpi=300, transparent=suffix == "svg", metadata=about)
    return stream.getvalue()


def compact(svg: str) -> str:
    """Without what a page does not need: declaration, metadata, fonts, sizes, names of groups, line ends, digits."""
    found = svg[svg.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.S)
    found = re.sub(r'<g id="[^"]*"', "<g", found)
    found = re.sub(r"\s*\n\s*", " ", found)
    found = re.sub(r" ?font-family: [^;\"]*;?", "", found)
    found = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", found)
    head, _, rest = found.partition(">")
    found = re.sub(r' (?:width|height|version|xmlns(?::xlink)?)="[^"]*"', "", head) + ">" + rest
    found = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), found)  # places, and no text
    found = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(?<=\d) L (?=[\d-])", " ", path[0]).strip(), found)
    for colour, variable in THEMED.items():
        found = found.replace(colour, f"var({variable})")
    return found.replace("> <", "><")
