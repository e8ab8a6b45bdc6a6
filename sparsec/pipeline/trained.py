"""What a pass that trains tells of it, as data."""

from __future__ import annotations

from dataclasses import dataclass

FIGURES = {
    "divergence": "KL from the dense model",
    "perplexity": "perplexity",
    "error": "relative error of the outputs",
}
"""Of a text, before and after, as they are shown."""


@dataclass(frozen=True)
class TextFigures:
    """How a model fares on one text before training and after it. None: not known, or without meaning for it."""

    text: str
    sequences: int
    divergence_before: float | None = None  # KL(dense || this) of the next token, in nats, mean over tokens
    divergence_after: float | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    error_before: float | None = None  # relative, of the outputs of a model that predicts no token
    error_after: float | None = None

    def changes(self) -> dict[str, tuple[float, float]]:
        """(before, after) of what is known, by its title in FIGURES."""
        found = {t: (getattr(self, f"{n}_before"), getattr(self, f"{n}_after")) for n, t in FIGURES.items()}
        return {title: both for title, both in found.items() if None not in both}


@dataclass(frozen=True)
class TrainingFigures:
    """How a pass trained, and what came of it."""

    method: str
    steps: int
    tokens: int
    seconds: float
    dtype: str  # of the products
    held_out: TextFigures  # of the text that was trained on
    second: TextFigures | None = None  # another text, which was not trained on
