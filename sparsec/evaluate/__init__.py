"""Evaluation on a text: perplexity, agreement with a reference, divergence from it, by window and by position."""

from sparsec.evaluate.compare import Evaluation, compare, evaluate
from sparsec.evaluate.windows import Windows, cut

__all__ = ["Evaluation", "Windows", "compare", "cut", "evaluate"]
