"""What is told of a folder once a model is saved in it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sparsec.checkpoint.folder import read_config
from sparsec.console.table import heading, mega, paragraph
from sparsec.report.collect import Report
from sparsec.report.notes import SHOWN, all_notes
from sparsec.report.words import zeros_of


def saved_facts(folder: str, report: Report) -> dict[str, Any]:
    """Of a folder that was saved: its bytes, those of the dense model, and how many layers lie in which layout."""
    _, record = read_config(Path(folder).expanduser())
    return {
        "folder": folder,
        "bytes": sum(int(facts["bytes"]) for facts in record.files.values()),
        "bytes_dense": report.bytes_dense,
        "layouts": dict(Counter(stored.layout for stored in record.layers.values())),
    }


def saved_lines(folder: str, report: Report, then: str) -> list[str]:
    """The same in words, with the command that comes next."""
    facts = saved_facts(folder, report)
    packed = Counter(facts["layouts"])
    layouts = ", ".join(f"{count} as {layout}" for layout, count in packed.most_common()) or "no matrix is packed"
    bytes_text = f"{mega(facts['bytes'])} MB of tensors, dense {mega(facts['bytes_dense'])} MB"
    zeros = zeros_of(report)
    return [
        *heading("Saved"),
        *paragraph(f"{folder}: {bytes_text}; {layouts}; {zeros}"),
        *([] if packed else paragraph(_kept_dense(report), "why: ")),
        *_notes(folder, report),
        f"next: sparsec {then} {folder}",
    ]


def _notes(folder: str, report: Report) -> list[str]:
    """Those that matter most, where no summary above has them."""
    notes = [] if report.summary else all_notes(report)
    lines = [line for note in notes[:SHOWN] for line in paragraph(note, "- ")]
    return lines + ([f"- and {len(notes) - SHOWN} more: sparsec report {folder}"] if notes[SHOWN:] else [])


def _kept_dense(report: Report) -> str:
    """Why lower packed nothing, and the way to pack all the same."""
    why = Counter(row.reason for row in report.layers if row.kind in ("linear", "conv1d") and row.reason)
    if not why:
        return "no matrix was pruned"
    reason, count = why.most_common(1)[0]
    return (
        f"lower(auto) found no layout that pays for any of the {sum(why.values())} pruned matrices. Of {count} of them it says: "
        f"{reason.removeprefix('dense: ')}. lower(bitmap) in its place packs them all the same"
    )
