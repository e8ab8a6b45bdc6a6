"""What a training made of a model: its figures on texts, before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparsec.pipeline.trained import TextFigures
from sparsec.recover.text import LENGTH, TrainingText
from sparsec.recover.whole import WholeModel

Figures = tuple[dict[str, float], dict[str, float]]
"""On what is held out, and on the second text."""


@dataclass
class Looking:
    """Looks at a model as it is. model: on what is held out and then on the second text. generates: it predicts the next token."""

    model: WholeModel
    text: TrainingText
    generates: bool

    def figures(self) -> Figures:
        """Of now."""
        held = len(self.text.held)
        return self._on(range(held)), self._on(range(held, held + len(self.text.second)))

    def on_texts(self, before: Figures, after: Figures) -> tuple[TextFigures, TextFigures | None]:
        """Of what is held out; of the second text, where there is one."""
        held, second = (dict(zip(("before", "after"), both, strict=True)) for both in zip(before, after, strict=True))
        text = self.text
        return (
            TextFigures(text.source, len(text.held), **_named(held)),
            TextFigures(text.second_source, len(text.second), **_named(second)) if text.second else None,
        )

    def missing(self, length: int | None) -> list[str]:
        """What was not looked at, and an option of the text that did nothing."""
        if self.text.stackable:
            return [] if self.text.second else [_NO_SECOND]
        cut = length not in (None, LENGTH)
        return [
            f"length={length} cuts sequences of token ids, and these calls are of other tensors; they stay whole"
        ] * cut

    def _on(self, numbers: range) -> dict[str, float]:
        if not numbers:
            return {}
        losses = self.model.losses(numbers)
        if self.model.stretches.head() is None:
            return {"error": losses.error}
        perplexity = {"perplexity": math.exp(min(losses.cross_entropy, 700.0))} if self.generates else {}
        return perplexity if self.model.teacher is None else {"divergence": losses.divergence, **perplexity}


_NO_SECOND = (
    "no second text was looked at, since token ids came without one; calibrate on a text with tokenizer= to see what training on "
    "it does to others"
)


def told(held: TextFigures, second: TextFigures | None) -> str:
    """In words."""
    text = f"{_changes(held)} on {held.sequences} sequences held out of {held.text}"
    return text if second is None else f"{text}; {_changes(second)} on {second.text}, which was not trained on"


def _named(figures: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{name}_{when}": value for when, found in figures.items() for name, value in found.items()}


def _changes(found: TextFigures) -> str:
    changes = [f"{what} {before:.4g} -> {after:.4g}" for what, (before, after) in found.changes().items()]
    return ", ".join(changes) or "no figures"
