"""Reports and studies for tests of the page, the same on every machine."""

from __future__ import annotations

from sparsec.page.ir import KeptIR
from sparsec.page.pages import report_page
from sparsec.report.records import ReportData
from sparsec.report.variant import Variant
from sparsec.report.views import LayerView
from sparsec.sweep.run import DENSE, CellResult
from sparsec.timing.spread import Spread


def page_of(report: ReportData) -> str:
    return report_page(report, KeptIR())


def view(name: str) -> LayerView:
    """Of a matrix 64 x 32, half of it zero, cut by size."""
    counts = tuple(2048 // 16 for _ in range(16))
    return LayerView(
        name=name,
        edges=tuple(i / 16 for i in range(17)),
        counts=counts,
        kept=tuple(count if i >= 8 else 0 for i, count in enumerate(counts)),
        threshold=0.5,
        zeros=tuple(tuple((i * j % 5) / 4 for j in range(32)) for i in range(32)),
        corner=tuple("#." * 16 for _ in range(64)),
        shape=(64, 32),
    )


def views(count: int = 3) -> tuple[LayerView, ...]:
    return tuple(view(f"layer{i}") for i in range(count))


def _variant(zeros: float, lowered: bool) -> Variant:
    return Variant(
        parameters=1000,
        nnz=round(1000 * (1 - zeros)),
        bytes=round(4000 * (1 - zeros / 2)) if lowered else 4000,
        bytes_masks=0,
        perplexity=20 * (1 + 4 * zeros**3),
        top1=1 - zeros / 2,
        top5=1 - zeros / 3,
        kl=zeros,
        decode_ms=Spread(12.3, 12.0, 12.6, 9),
        speedup_decode=Spread(1 + zeros * lowered, 1.0, 2.0, 9),
        speedup_theoretical=1 + 2 * zeros * lowered,
        speedup_theoretical_bytes=1 + zeros * lowered,
        speedup_predicted=1 + zeros * lowered,
    )


def cells() -> list[CellResult]:
    """The dense model, two methods at three sparsities masked and lowered, and one that failed."""
    found = [CellResult(DENSE, (), _variant(0.0, False))]
    for method in ("magnitude", "wanda"):
        masked, packed = (f"{method}({{zeros}}),freeze{rest}" for rest in ("", ",lower(bitmap)"))
        for zeros in (0.3, 0.5, 0.7):
            values = (("zeros", str(zeros)),)
            for template, layouts in ((masked, ""), (packed, "7 bitmap")):
                spec, figures = template.format(zeros=zeros), _variant(zeros, bool(layouts))
                found.append(CellResult(spec, values, figures, layouts=layouts, template=template))
    failed = CellResult("wanda(0.9),freeze", (("zeros", "0.9"),), None, "<no room>", template="wanda({zeros}),freeze")
    return [*found, failed]
