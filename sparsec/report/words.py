"""What the tables do not say by themselves: where packing made a layer larger, and why what is dense is dense."""

from __future__ import annotations

from collections.abc import Sequence

from sparsec.console.table import mega, percent
from sparsec.report.layer import LayerRow
from sparsec.report.records import ReportData


def dense_reason(row: LayerRow) -> str | None:
    """Why a row is dense; None for a packed one."""
    if row.packed:
        return None
    if row.reason:
        return row.reason
    if row.kind in ("linear", "conv1d") and not row.executed:
        return "not executed in the traced call"
    if row.bytes_mask:
        return "it has a mask, but no pass lowered it"
    if row.nnz < row.parameters:
        return "its zeros are counted, but no pass lowered it"
    match row.kind:
        case "linear" | "conv1d":
            return "no pass pruned it"
        case "embedding" if row.multiplied:
            return "no pass pruned it; tied to a product's weight, so pruning one prunes the other"
        case "embedding":
            return "embedding: looked up, not multiplied"
        case "bias":
            return "bias: a vector"
        case "experts":
            return "fused experts: no pass pruned them"
    return "not a matrix of a linear layer"


def chosen_because(layers: Sequence[LayerRow]) -> list[str]:
    """Per format that was chosen by prediction, how many weights have it and the reason of the first; the JSON has them all."""
    paragraphs = []
    for name in dict.fromkeys(row.format for row in layers if row.packed and row.reason):
        rows = [row for row in layers if row.format == name and row.reason]
        what = f"{len(rows)} weights are {name}; {rows[0].name.removesuffix('.weight')} because:"
        paragraphs.append(f"{what} {rows[0].reason}")
    return paragraphs


def slower(layers: Sequence[LayerRow]) -> list[str]:
    """Weights measured slower than dense, by what explains it."""
    found: dict[str, list[str]] = {}
    for row in layers:
        if row.speedup_measured is None or row.speedup_measured >= 1:
            continue
        if row.kernel is not None and "_reference" in row.kernel:
            why = "reference kernels are not made to be fast"
        elif row.binds == "call":
            why = "so small a product is mostly the call of its kernel"
        elif row.speedup_predicted is not None and row.speedup_predicted > 1:
            why = "the cost model was wrong about them; measure the machine again while idle: sparsec cost --force"
        else:
            why = "no gain was predicted"
        found.setdefault(why, []).append(row.name.removesuffix(".weight"))
    return [
        f"measured slower than dense: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}"
        for why, names in found.items()
    ]


def storage(layers: Sequence[LayerRow]) -> list[str]:
    """Per format, one paragraph: bytes against dense, and from which sparsity on it pays. Larger is called larger."""
    paragraphs = []
    for name in dict.fromkeys(row.format for row in layers if row.packed):
        rows = [row for row in layers if row.format == name]
        larger = [row for row in rows if row.bytes_held > row.bytes_dense]
        held, dense = sum(r.bytes_held for r in rows), sum(r.bytes_dense for r in rows)
        parameters = sum(r.parameters for r in rows)
        sparsity = 1 - sum(r.nnz for r in rows) / parameters if parameters else 0.0
        text = (
            f"{name}: {len(rows)} weights, {percent(sparsity)} zero, {mega(held)} MB held against {mega(dense)} MB dense "
            f"({bits(held, parameters)} against {bits(dense, parameters)} bits per weight)."
        )
        if larger:
            few = ", ".join(row.name for row in larger[:3]) + (", ..." if len(larger) > 3 else "")
            verdict = (
                "so the packed weights are LARGER than dense" if held > dense else "though in all they are smaller"
            )
            text += (
                f" {len(larger)} of them are LARGER than dense ({few}), {verdict}: every kept weight carries a column number. "
                f"{name} takes less than dense from about {percent(pays_from(rows), 0)} zeros."
            )
        paragraphs.append(text)
    return paragraphs


def dense_bound(report: ReportData) -> str | None:
    """Which bytes no pass of this run can make fewer, and what that leaves at best; None where nothing is packed."""
    if not any(row.packed for row in report.layers):
        return None
    dense: dict[str, int] = {}
    for row in report.layers:
        if not row.packed:
            dense[row.group] = dense.get(row.group, 0) + row.bytes_held
    stays = sum(dense.values()) + report.bytes_buffers
    if not report.bytes_dense or not stays:
        return None
    most = ", ".join(f"{group} {mega(n)}" for group, n in sorted(dense.items(), key=lambda pair: -pair[1])[:3])
    return (
        f"bytes: {mega(stays)} MB stay dense ({most}), so however sparse the packed layers become, the model keeps "
        f"{percent(stays / report.bytes_dense, 0)} of its {mega(report.bytes_dense)} MB; it has "
        f"{percent(report.bytes_held / report.bytes_dense, 0)} now"
    )


def ends(report: ReportData) -> str | None:
    """What the tables at both ends of the model take, those that are shared once, in which layout; None without any."""
    found: dict[str, list[LayerRow]] = {}
    for row in report.layers:
        if row.kind == "embedding":
            found.setdefault("embedding and head" if row.multiplied else "embedding", []).append(row)
        elif row.group == "lm_head" and row.in_features is not None:
            found.setdefault("head", []).append(row)
    if not found or not report.bytes_held:
        return None
    parts = []
    for what, rows in found.items():
        held = sum(row.bytes_held for row in rows)
        formats = " and ".join(dict.fromkeys(row.format for row in rows))
        parts.append(
            f"{what}: {mega(held)} MB as {formats}, {percent(held / report.bytes_held, 0)} of the model's bytes"
        )
    return "; ".join(parts)


def zeros_of(report: ReportData) -> str:
    """How much of a model is zero, and that this counts what nobody pruned."""
    pruned = [row for row in report.layers if row.nnz < row.parameters]
    text = f"{percent(report.sparsity)} of all parameters are zero"
    if not pruned or len(pruned) == len(report.layers):
        return text
    inside = 1 - sum(row.nnz for row in pruned) / sum(row.parameters for row in pruned)
    return f"{text}, {percent(inside)} of those in the pruned matrices; the others, such as those of norms, are kept"


def bits(nbytes: int, parameters: int) -> str:
    """Per weight."""
    return f"{8 * nbytes / parameters:.1f}" if parameters else "-"


def pays_from(rows: Sequence[LayerRow]) -> float:
    """The sparsity at which packed and dense would take the same bytes, their cost per kept weight being what it is here."""
    held, dense = sum(r.bytes_held for r in rows), sum(r.bytes_dense for r in rows)
    density = sum(r.nnz for r in rows) / sum(r.parameters for r in rows)
    return max(0.0, 1.0 - density * dense / held) if held else 0.0
