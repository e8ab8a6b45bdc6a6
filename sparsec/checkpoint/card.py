"""The model card of a saved model: what was done, what it gives, and the lines that load it."""

from __future__ import annotations

from collections import Counter

from sparsec.checkpoint.record import Record


def card(record: Record, model: str, name: str) -> str:
    """Markdown, with what the hub reads at its head."""
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
        "**This model loads with sparsec only (`pip install sparsec`): `import sparsec` before transformers reads it.** "
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
    if record.versions:
        lines.append("- **Made with**: " + ", ".join(f"{k} {v}" for k, v in record.versions.items()) + ".")
    return "\n".join(lines) + "\n"
