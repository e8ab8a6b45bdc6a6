"""The model card of a saved model: what was done, what it gives, and the lines that load it."""

from __future__ import annotations

from collections import Counter

from sparsec.checkpoint.record import Record
from sparsec.report.records import ReportData
from sparsec.report.recovery import on_second_text
from sparsec.report.variant import VARIANTS, metrics

FIRST = "**This model loads with sparsec only"
"""The first words of a card."""


def is_card(text: str) -> bool:
    """Whether `card` wrote it."""
    return f"\n{FIRST}" in text


def card(record: Record, model: str, name: str, report: ReportData | None) -> str:
    """Markdown, with what the hub reads at its head. report: of the model that is saved."""
    packed = Counter(stored.layout for stored in record.layers.values())
    layouts = ", ".join(f"{count} as `{layout}`" for layout, count in packed.most_common()) or "none"
    held = sum(int(facts.get("bytes", 0)) for facts in record.files.values())
    auto = "AutoModelForCausalLM" if model.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel"
    lines = [
        "---",
        "library_name: transformers",
        "tags: [sparsec, sparse]",
        "---",
        "",
        f"{FIRST}: install it, and `import sparsec` before transformers reads it.** "
        "Without it transformers warns that every weight is missing, and the model says nothing that makes sense.",
        "",
        "```python",
        "import sparsec",
        "from transformers import " + auto,
        "",
        f"model = {auto}.from_pretrained({name!r})  # or sparsec.load({name!r})",
        "```",
        "",
        f"- **What it is**: `{model}`, {len(record.layers)} of its matrices packed: {layouts}.",
        f"- **Bytes**: {held:,} in {len(record.files)} file{'s' * (len(record.files) != 1)}.",
    ]
    if record.passes:
        lines.append(
            "- **What was done**: " + ", ".join(f"`{p.get('spec', p.get('name'))}`" for p in record.passes) + "."
        )
    if record.calibration:
        lines.append(f"- **Calibrated on**: {record.calibration.get('source', 'data of the user')}.")
    if record.unowned:
        names = ", ".join(f"`{name}`" for name in record.unowned[:20])
        more = f" and {len(record.unowned) - 20} more" if len(record.unowned) > 20 else ""
        lines.append(f"- **Not carried over**: {names}{more}, which the source holds and no module of this class owns.")
    if record.versions:
        lines.append("- **Made with**: " + ", ".join(f"{k} {v}" for k, v in record.versions.items()) + ".")
    return "\n".join([*lines, *_figures(report)]) + "\n"


def _figures(report: ReportData | None) -> list[str]:
    """Dense and lowered side by side: what was measured, or what was counted alone."""
    if report is None:
        return []
    counted = f"{report.sparsity:.1%} of {report.parameters:,} parameters are zero"
    lines = ["", "## Figures", "", f"{counted}; {report.bytes_held:,} bytes instead of {report.bytes_dense:,} dense."]
    shown = {name: title for name, title in VARIANTS.items() if name in report.summary}
    measured = [
        (n, m) for n, (_, m) in metrics().items() if any(getattr(report.summary[v], n) is not None for v in shown)
    ]
    if not report.summary or report.latency is None:
        return [*lines, "Speed and quality were not measured."]
    lines += ["", f"| | {' | '.join(shown.values())} |", "|---" * (1 + len(shown)) + "|"]
    for name, metric in measured:
        cells = [metric.show(v) if (v := getattr(report.summary[each], name)) is not None else "-" for each in shown]
        lines.append(f"| {metric.title.strip()} | {' | '.join(cells)} |")
    on, by = report.evaluation, report.latency
    if on is not None:
        lines += ["", f"Quality on {on.windows} windows of {on.window_length} tokens of {on.text}."]
    if (second := on_second_text(report)) is not None:
        lines += ["", f"The {second}."]
    if report.machine is not None:
        busy = "; the machine was busy, so times are doubtful" if by.disturbed else ""
        lines += [
            f"Times at batch 1 with {by.threads} threads on {report.machine.cpu}, prompts of {by.prompt_tokens} tokens{busy}."
        ]
    return lines
