"""The notes of a report: equal ones told once, and the three that matter most put first."""

from __future__ import annotations

from collections.abc import Iterable

from sparsec.console.table import mega, times
from sparsec.program.told import NATIVE
from sparsec.report.records import ReportData
from sparsec.report.variant import Variant
from sparsec.report.words import dense_reason

TOY = 4_000_000
"""Parameters below which a model fits into a processor's cache and a token is all overhead."""
SHOWN = 3
LOST = 1.01
"""Times the dense perplexity from which something was lost at all."""
WORSE = 1.5
"""Times the dense perplexity from which quality is called lost."""
LESS = 0.999
"""Cosine of an encoder's embeddings to dense below which something was lost at all."""
FAR = 0.9
"""The same, below which quality is called lost."""


def all_notes(report: ReportData) -> list[str]:
    """What matters most first: what the figures say, doubts about them, what the passes left alone, how it was measured."""
    doubts = [text for text in report.remarks if text.startswith("quick:")]
    told = said_under_layers(report, (note for p in report.passes for note in p.notes))[0]
    rest = [text for text in report.remarks if text not in doubts]
    own = [f"decoding is {report.decoding}"] if report.decoding is not None and report.decoding != NATIVE else []
    return merged([*verdicts(report), *doubts, *own, *told, *report.notes, *rest], [row.name for row in report.layers])


def said_under_layers(report: ReportData, notes: Iterable[str]) -> tuple[list[str], int]:
    """The notes without those that say why weights are dense, as the table of layers does, and how many these are."""
    found = list(notes)
    reasons = tuple(f" dense: {reason}" for row in report.layers if (reason := dense_reason(row)) is not None)
    left = [note for note in found if not note.endswith(reasons)]
    return left, len(found) - len(left)


def merged(notes: Iterable[str], names: Iterable[str] = ()) -> list[str]:
    """Equal notes are one with a count, and so are those that differ in the weight that they begin with."""
    known = {alias for name in names for alias in (name, name.removesuffix(".weight"))}
    found: dict[str, list[str]] = {}
    for note in notes:
        name, colon, rest = note.partition(": ")
        named = bool(colon) and name in known
        found.setdefault(rest if named else note, []).append(name if named else "")
    return [_counted(text, owners) for text, owners in found.items()]


def _counted(text: str, owners: list[str]) -> str:
    if len(owners) == 1:
        return f"{owners[0]}: {text}" if owners[0] else text
    return f"{text} ({len(owners)} times{f', first {owners[0]}' if owners[0] else ''})"


def verdicts(report: ReportData) -> list[str]:
    """In words, where the result is worse than what went in."""
    lowered, dense = report.summary.get("lowered"), report.summary.get("dense")
    toy = 0 < report.parameters < TOY
    found = ["a toy this small cannot show a gain: it fits into the processor's cache"] if toy else []
    found += _quality(report)
    if (table := tied_table(report)) is not None:
        found.append(table)
    if lowered is None or dense is None:
        return found
    if lowered.bytes > dense.bytes:
        found.append(
            f"the lowered model is LARGER than the dense one, {mega(lowered.bytes)} MB against {mega(dense.bytes)}: at this "
            "sparsity the column numbers cost more than the zeros save; prune further, or leave it dense"
        )
    speedup, what = lowered.speedup_decode, "decodes"
    if report.encoder:
        speedup, what = lowered.speedup_prefill, "encodes"
    if speedup is not None and speedup.median < 1:
        speed = times(speedup.median) + report.doubt
        found.append(f"the lowered model {what} SLOWER than the dense one, {speed}{_why_slow(report, lowered)}")
    return found


def tied_table(report: ReportData) -> str | None:
    """Where a dense weight that embedding and head share is most of the model: how much of it, and the way out."""
    rows = [r for r in report.layers if r.kind == "embedding" and r.multiplied and not r.packed]
    row = max(rows, key=lambda r: r.bytes_held, default=None)
    if row is None or row.bytes_held <= report.bytes_dense / 2:
        return None
    halve = "load the model with dtype=torch.bfloat16 to halve it, or " if row.value_bytes > 2 else ""
    return (
        f"{row.name} is {mega(row.bytes_held)} of {mega(report.bytes_dense)} MB and stays dense: embedding and head share it; "
        f"{halve}pack it in 8 bits, for both: add the pass lower(dense, values='int8', targets=('lm_head',))"
    )


def _quality(report: ReportData) -> list[str]:
    pruned, dense = report.summary.get("masked"), report.summary.get("dense")
    if pruned is not None and pruned.cosine is not None and not pruned.cosine >= FAR:
        return [
            f"the pruned model encodes otherwise: its embeddings have a cosine of {pruned.cosine:.3f} to the dense ones"
        ]
    if pruned is None or dense is None or pruned.perplexity is None or not dense.perplexity:
        return []
    if pruned.perplexity <= WORSE * dense.perplexity:
        return []
    return [
        f"the pruned model predicts much worse: its perplexity is {pruned.perplexity / dense.perplexity:.3g} times the dense one"
    ]


def _why_slow(report: ReportData, lowered: Variant) -> str:
    kernels = {row.kernel for row in report.layers if row.packed and row.kernel}
    reference = sorted(k for k in kernels if k.endswith("_reference"))
    if reference:
        return f": it ran on {', '.join(reference)}, which is right but not fast; the native kernels did not serve it"
    if not report.encoder and lowered.speedup_theoretical_bytes is not None and lowered.speedup_theoretical_bytes < 1:
        return ": decoding reads every stored byte once a token, and there are more of them than before"
    return ""


def for_quality(report: ReportData) -> str | None:
    """What to add, where quality was lost and nothing but magnitude pruned."""
    pruned, dense = report.summary.get("masked"), report.summary.get("dense")
    if pruned is None or dense is None:
        return None
    encodes = pruned.cosine is not None and not pruned.cosine >= LESS
    known = pruned.perplexity is not None and dense.perplexity is not None
    predicts = known and not (pruned.perplexity or 0.0) <= LOST * (dense.perplexity or 0.0)
    if not encodes and not predicts:
        return None
    if any(p.name == "magnitude" for p in report.passes) and not any(
        p.name in ("wanda", "sparsegpt", "admm") for p in report.passes
    ):
        return "to lose less, prune with admm(...) instead of magnitude(...)"
    return None
