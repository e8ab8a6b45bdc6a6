"""The tokens that models are evaluated on: a text, tokenised once as one string and cut into windows that do not overlap.

Each window begins with the BOS that the tokenizer begins texts with, if it does, unless the papers' protocol is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sparsec.arguments import checked
from sparsec.data.text import Text
from sparsec.data.tokens import NOTHING, Beginning, cut_text
from sparsec.errors import DataError


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens to evaluate on, and where they come from: what has to be printed beside a perplexity."""

    tokens: Tensor  # int64 [count, length]
    text_name: str
    text_sha256: str
    tokens_in_text: int
    beginning: Beginning = NOTHING

    @property
    def count(self) -> int:
        """Number of windows."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens of one window."""
        return self.tokens.shape[1]


@checked
def cut(
    text: Text, tokenizer: Any, length: int, count: int | None, limit: int | None = None, bos: bool = True
) -> Windows:
    """Tokenises the text as one string and takes its first `count` windows of `length` tokens; None takes all.

    limit: the model's longest input. bos: where the tokenizer begins texts with a BOS, every window is that and length - 1 tokens;
    False is the papers' protocol. Raises DataError for a length that does not fit it and for a text that is too short.
    """
    if length < 2:
        raise DataError(
            f"evaluation length must be at least 2, since a window predicts its own next tokens, got {length}"
        )
    if count is not None and count < 1:
        raise DataError(f"the number of evaluation windows must be at least 1, got {count}")
    if limit is not None and length > limit:
        raise DataError(f"evaluation length {length} is more than the model's {limit} positions; take {limit} or less")
    found = cut_text(text.content, tokenizer, length, bos)
    available = len(found.windows)
    wanted = available if count is None else count
    if available < max(1, wanted):
        raise DataError(
            f"{text.name}: the text has {found.tokens} tokens, {max(1, wanted)} windows of {length} need "
            f"{found.need(max(1, wanted))}; take fewer or shorter windows, or a longer text"
        )
    return Windows(found.windows[:wanted], text.name, text.sha256, found.tokens, found.beginning)


@checked
def cut_second(
    text: Text, tokenizer: Any, length: int, most: int | None, limit: int | None = None, bos: bool = True
) -> Windows:
    """As `cut`, of a text that stands beside the one that was asked for: at most so many windows, however short it is."""
    if most is not None and most < 1:
        raise DataError(f"the number of evaluation windows must be at least 1, got {most}")
    every = cut(text, tokenizer, length, None, limit, bos)
    return replace(every, tokens=every.tokens[:most])
