"""Perplexity and top-1 agreement on a text.

Perplexity as in the SparseGPT and Wanda papers' code: the text is tokenised once as one string and cut into non-overlapping
windows, the rest is dropped; mean cross-entropy over the length - 1 shifted tokens of a window; exp of the mean over windows.
Top-1 agreement: the share of positions at which two models hold the same next token for the most likely one.
One window is in memory at a time; of its logits only the loss and the argmax are kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsec.data.text import Text
from sparsec.errors import DataError
from sparsec.progress import Progress

_ROWS = 256  # of logits turned into losses at once: 50 MB of float32 at a vocabulary of 49,152


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens to evaluate on, and where they come from: what has to be printed beside a perplexity."""

    tokens: Tensor  # int64 [count, length]
    text_name: str
    text_sha256: str
    tokens_in_text: int

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens of one window."""
        return self.tokens.shape[1]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model does on the windows."""

    losses: tuple[float, ...]  # per window: mean negative log-likelihood in nats
    predictions: Tensor  # int32 [count, length], the most likely next token at each position
    dtype: torch.dtype

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; inf where that overflows, nan where the model gives nan."""
        mean = sum(self.losses) / len(self.losses)
        return math.exp(mean) if mean < 700 or math.isnan(mean) else math.inf


def cut(text: Text, tokenizer: Any, length: int, count: int | None, limit: int | None = None) -> Windows:
    """Tokenises the text as one string and takes its first `count` windows of `length` tokens; None takes all.

    limit: the model's longest input. Raises DataError for a length that does not fit it and for a text that is too short.
    """
    if length < 2:
        raise DataError(
            f"evaluation length must be at least 2, since a window predicts its own next tokens, got {length}"
        )
    if count is not None and count < 1:
        raise DataError(f"the number of evaluation windows must be at least 1, got {count}")
    if limit is not None and length > limit:
        raise DataError(f"evaluation length {length} is more than the model's {limit} positions; take {limit} or less")
    tokens = torch.tensor(tokenizer(text.content, verbose=False)["input_ids"], dtype=torch.int64)
    available = len(tokens) // length
    wanted = available if count is None else count
    if available < max(1, wanted):
        raise DataError(
            f"{text.name}: the text has {len(tokens)} tokens, {max(1, wanted)} windows of {length} need "
            f"{max(1, wanted) * length}; take fewer or shorter windows, or a longer text"
        )
    return Windows(tokens[: wanted * length].view(wanted, length), text.name, text.sha256, len(tokens))


@torch.inference_mode()
def evaluate(model: Any, windows: Windows, progress: Progress | None = None, what: str = "evaluating") -> Evaluation:
    """Runs a causal language model (its call gives `.logits` [1, length, vocabulary]) over the windows."""
    device = next(model.parameters()).device
    losses, predictions = [], []
    for index, window in enumerate(windows.tokens):
        if progress is not None:
            progress(what, index, windows.count)
        logits = model(input_ids=window[None].to(device), use_cache=False).logits[0]
        loss, best = window_loss(logits, window.to(device))
        losses.append(loss)
        predictions.append(best.cpu())
        dtype = logits.dtype
        del logits
    if progress is not None:
        progress(what, windows.count, windows.count)
    return Evaluation(tuple(losses), torch.stack(predictions), dtype)


def window_loss(logits: Tensor, tokens: Tensor) -> tuple[float, Tensor]:
    """Mean negative log-likelihood of tokens[1:], in nats, and the argmax of every row (int32).

    logits [length, vocabulary] of any float dtype, tokens [length]. Losses are float32 per token and summed in float64.
    """
    total = 0.0
    best = torch.empty(len(tokens), dtype=torch.int32, device=logits.device)
    for start in range(0, len(tokens), _ROWS):
        rows = logits[start : start + _ROWS]
        best[start : start + _ROWS] = rows.argmax(dim=-1)
        targets = tokens[start + 1 : start + 1 + len(rows)]  # one short at the very end: nothing follows the last token
        each = F.cross_entropy(rows[: len(targets)].float(), targets, reduction="none")
        total += float(each.double().sum())
    return total / (len(tokens) - 1), best


def top1_agreement(first: Evaluation, second: Evaluation) -> float:
    """Share of positions at which the two predict the same next token; all positions of all windows count."""
    if first.predictions.shape != second.predictions.shape:
        raise ValueError(
            f"top-1 agreement needs the same windows, got {tuple(first.predictions.shape)} and "
            f"{tuple(second.predictions.shape)} predictions"
        )
    return float((first.predictions == second.predictions).double().mean())
