"""What compressing does to a model, at a glance: what it writes and how well it predicts, before and after, in seconds.

A sample alone shows a ruin and hides a loss. So a perplexity stands below it, on so short a text that it takes no longer than the
sample.
"""

from __future__ import annotations

from typing import Any

from sparsec.console.table import heading, paragraph
from sparsec.data import LoadedModel, load_text
from sparsec.defaults import Effort
from sparsec.errors import DataError, SparsecError
from sparsec.evaluate import Windows, cut, evaluate
from sparsec.generate import Told, says_little
from sparsec.pipeline import Pipeline
from sparsec.progress import Progress, stage
from sparsec.report.notes import LOST, WORSE
from sparsec.report.variant import short_perplexity
from sparsec.study.sample import Prompt, generated, read_prompt
from sparsec.study.variants import scarce

WARM_UP = 3
WINDOWS, LENGTH = 2, 256
"""That the perplexity is taken of: few tokens, the same ones before and after."""
LEARNS = ("wanda", "sparsegpt", "admm")


class Glance:
    """What one model writes and predicts `before` and `after`."""

    def __init__(self, loaded: LoadedModel, prompt: str | None, new_tokens: int, progress: Progress | None) -> None:
        self._loaded, self._new_tokens, self._progress = loaded, new_tokens, progress
        self._told: dict[str, Told] = {}
        self._perplexities: dict[str, float] = {}
        self._prompt: Prompt | None = None
        self._windows: Windows | None = None
        self._why = self._left_out()
        if self._why:
            return
        text = Effort().prompt if prompt is None else prompt
        self._prompt = read_prompt(loaded.tokenizer, text, new_tokens, loaded.positions)
        try:
            length = min(LENGTH, loaded.positions or LENGTH)
            self._windows = cut(load_text(), loaded.tokenizer, length, WINDOWS, loaded.positions)
        except DataError as error:  # a model is saved all the same
            self._why = f"no perplexity: {error}"

    def _left_out(self) -> str:
        """Why nothing is run; "" where it is."""
        if scarce(self._loaded.model):
            return "no sample: the dense model takes most of this machine's memory, and every word would read all of it"
        if not self._loaded.model.can_generate():
            kind = type(self._loaded.model).__name__
            return f"no sample: {kind} writes no text; --measure compares its embeddings"
        return f"no sample: {self._loaded.name} has no tokenizer" if self._loaded.tokenizer is None else ""

    def look(self, when: str, model: Any) -> None:
        """when: before or after."""
        if self._prompt is None:
            return
        tokenizer, tokens = self._loaded.tokenizer, self._prompt.tokens
        with stage(self._progress, f"what it writes {when}"):
            generated(model, tokenizer, tokens, WARM_UP)  # the first tokens pay for what is made once
            told = Told(tokenizer, shown=False)
            generated(model, tokenizer, tokens, self._new_tokens, told)
        self._told[when] = told
        if self._windows is not None:
            with stage(self._progress, f"how well it predicts {when}"):
                self._perplexities[when] = evaluate(model, self._windows).perplexity

    def lines(self) -> list[str]:
        """For a person."""
        lines = paragraph(self._why)
        if self._prompt is not None:
            lines += heading(f"Before and after, of {self._prompt.text!r}")
            lines += [line for name, told in self._told.items() for line in _written(name, told)]
        if self._windows is not None:
            before, after = (short_perplexity(self._perplexities[when]) for when in ("before", "after"))
            on = f"{self._windows.count} windows of {self._windows.length} tokens of {self._windows.text_name}"
            lines += paragraph(f"perplexity {before} before, {after} after; lower is better ({on})", "quality ")
        if "before" in self._told:
            little = says_little(self._loaded, self._told["before"].tokens)
            lines += [line for text in little for line in paragraph(text)]
        return lines

    def advice(self, pipeline: Pipeline) -> list[str]:
        """What loses less quality than these passes; nothing where little was lost."""
        if not self._perplexities:
            return lose_less(pipeline, None)
        return lose_less(pipeline, self._perplexities["after"] / self._perplexities["before"])


def lose_less(pipeline: Pipeline, worse: float | None) -> list[str]:
    """Lines of what to do about quality. worse: perplexity after against before, None where it is not known."""
    if worse is not None and worse <= LOST:  # not where it is NaN
        return []
    names = [each.name for each in pipeline.passes]
    ruined = worse is not None and not worse <= WORSE
    begin = "this model predicts MUCH WORSE than before: " if ruined else ""
    if "magnitude" in names and not set(names) & set(LEARNS):
        better = f"magnitude looks at no data; admm in its place takes minutes and loses far less{_with_admm(pipeline)}"
        return paragraph(f"{begin}{better}")
    if not ruined or not set(names) & {"magnitude", *LEARNS}:
        return []
    ways = ["take fewer zeros", *(["put recover(minutes=20) behind freeze"] if "recover" not in names else [])]
    return paragraph(f"{begin}{', or '.join(ways)}")


def _with_admm(pipeline: Pipeline) -> str:
    """The same passes with it, to be copied; "" where magnitude was given an option that admm has not."""
    try:
        better = Pipeline.parse(str(pipeline).replace("magnitude", "admm"))
    except SparsecError:
        return ""
    return f': --passes "{better}"'


def _written(name: str, told: Told) -> list[str]:
    doubt = "? tokens/s: the machine was busy" if told.disturbed else " tokens/s, one run"
    speed = "" if told.tokens_per_second is None else f" ({told.tokens_per_second:.1f}{doubt})"
    return paragraph(f"{told.text.strip()}{speed}", f"{name:<8}")
