"""Evaluation on a text: perplexity, agreement with a reference, divergence from it, by window and by position; of encoders, how
near their embeddings are to a reference's."""

from sparsec.evaluate.compare import Evaluation, compare, evaluate
from sparsec.evaluate.embeddings import Encoding, compare_embeddings
from sparsec.evaluate.windows import Windows, cut, cut_second

__all__ = ["Encoding", "Evaluation", "Windows", "compare", "compare_embeddings", "cut", "cut_second", "evaluate"]
