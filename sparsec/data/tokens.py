"""Texts as token ids, the way a model is used: a tokenizer that begins every text with a BOS begins every window with it.

The SparseGPT and Wanda papers tokenise a text once, as one string, and cut it; then only the first window has a BOS. A model that
never saw a text without one is not itself there: Gemma 3 270M has a perplexity of 50.1 without it and of 23.3 with it (4 windows of
512 tokens of WikiText-2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsec.errors import DataError


@dataclass(frozen=True)
class Beginning:
    """What every window begins with. ids: none where the tokenizer adds none, or none is wanted."""

    ids: tuple[int, ...]
    token: str | None  # in the tokenizer's words
    protocol: str  # for the reader

    def __len__(self) -> int:
        return len(self.ids)


NOTHING = Beginning((), None, "the tokenizer adds no BOS")


@dataclass(frozen=True, eq=False)
class Cut:
    """A text in windows that do not overlap; what is left over at its end is dropped."""

    windows: Tensor  # int64 [all that there are, length]
    tokens: int  # of the text, without what its windows begin with
    beginning: Beginning
    each: int  # tokens of text in a window

    def need(self, count: int) -> int:
        """Tokens of text that so many windows take."""
        return count * self.each


def encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text. Raises DataError for what is no tokenizer of transformers."""
    if not callable(tokenizer) or isinstance(tokenizer, nn.Module):
        raise DataError(
            f"the tokenizer must be one of transformers, called with a text to give input_ids; got {type(tokenizer).__name__}; "
            "load it with transformers.AutoTokenizer.from_pretrained(...)"
        )
    try:
        ids = tokenizer(text, verbose=False, **options)["input_ids"]
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise DataError(
            f"the tokenizer ({type(tokenizer).__name__}) must give input_ids for a text, as those of transformers do: {error!r}"
        ) from error
    if isinstance(ids, Mapping) or not hasattr(ids, "__len__"):
        raise DataError(f"the tokenizer ({type(tokenizer).__name__}) must give a list of input_ids, got {ids!r:.60}")
    return [int(i) for i in ids]


def beginning(tokenizer: Any, bos: bool = True) -> Beginning:
    """What the tokenizer itself puts before every text: a BOS, a [CLS], nothing. bos=False: it is not put before windows."""
    if not isinstance(bos, bool):
        raise DataError(f"bos must be True or False, got {bos!r}; False is the papers' protocol")
    ids = _before(tokenizer)
    if not ids:
        return NOTHING
    token = "".join(map(str, tokenizer.convert_ids_to_tokens(list(ids))))
    if not bos:
        return Beginning((), None, f"cut from the text tokenised as one string, without a {token} for each window")
    return Beginning(ids, token, f"every window begins with {token}")


def without_beginning(ids: list[int], tokenizer: Any) -> list[int]:
    """What a tokenizer gave for a text, less what it put before it."""
    before = list(_before(tokenizer))
    return ids[len(before) :] if ids[: len(before)] == before else ids


def cut_text(text: str, tokenizer: Any, length: int, bos: bool) -> Cut:
    """All windows of `length` tokens; with a BOS each is that and length - 1 of the text.

    Raises DataError for windows that have no room for text.
    """
    start = beginning(tokenizer, bos)
    if length <= len(start):
        raise DataError(
            f"windows of {length} tokens begin with {start.token}, so none of the text fits; take longer ones"
        )
    ids = encode(tokenizer, text, **({"add_special_tokens": False} if start.ids else {}))
    each = length - len(start)
    count = len(ids) // each
    rows = torch.tensor(ids[: count * each], dtype=torch.int64).view(count, each if count else 0)
    before = torch.tensor(start.ids, dtype=torch.int64).expand(count, len(start))
    return Cut(torch.cat((before, rows), dim=1), len(ids), start, each)


def _before(tokenizer: Any) -> tuple[int, ...]:
    """Read off what it does to a short text: attributes such as bos_token tell what it has, not what it adds."""
    if not callable(getattr(tokenizer, "num_special_tokens_to_add", None)):
        return ()
    whole, plain = encode(tokenizer, "a"), encode(tokenizer, "a", add_special_tokens=False)
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start])
    return ()
