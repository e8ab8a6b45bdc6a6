"""What training did, as a table: figures before and after, on what was held out and on a text that was not trained on."""

from __future__ import annotations

from sparsec.pipeline.base import PassRecord
from sparsec.report.records import ReportData
from sparsec.report.variant import short_perplexity

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


def recovery_tables(report: ReportData) -> list[tuple[str, Table]]:
    """For each pass that trained: how, and (header, rows)."""
    return [found for p in report.passes if (found := _recovery(p)) is not None]


def recovery_texts(report: ReportData) -> list[str]:
    """What the columns of the tables are, each text once."""
    found = []
    for trained in (p.training for p in report.passes if p.training is not None):
        found.append(
            f"held out: {trained.held_out.sequences} sequences of the text trained on, {trained.held_out.text}"
        )
        if trained.second is not None:
            found.append(f"second text, not trained on: {trained.second.text}")
    return list(dict.fromkeys(found))


def on_second_text(report: ReportData) -> str | None:
    """What the second text of an evaluation is, and what other passes have on it; None where there is none."""
    if (e := report.second) is None:
        return None
    shown = "cosine {:.4f}".format if report.encoder else lambda value: f"perplexity {short_perplexity(value)}"
    return (
        f"second text, not trained on: {e.text} (sha256 {e.text_sha256[:16]}, {e.text_tokens:,} tokens): "
        f"{e.windows} windows of {e.window_length} tokens"
        + "".join(f"; {shown(other)} by {spec}" for spec, other in report.beside_second.items())
    )


def _recovery(p: PassRecord) -> tuple[str, Table] | None:
    if (trained := p.training) is None:
        return None
    texts = {"held out": trained.held_out} | ({} if trained.second is None else {"second text": trained.second})
    changes = [text.changes() for text in texts.values()]
    titles = dict.fromkeys(title for found in changes for title in found)
    rows = [
        (title, *(f"{found[title][0]:.4g} -> {found[title][1]:.4g}" if title in found else "-" for found in changes))
        for title in titles
    ]
    how = f"{trained.steps:,} steps, {trained.tokens:,} tokens, {trained.seconds / 60:.1f} min, {trained.dtype}"
    return f"pass {p.index}, {trained.method}: {how}", (("", *texts), rows)
