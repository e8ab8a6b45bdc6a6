"""What users calibrate on, whatever its form, as sequences: token ids of real tokens, without padding.

The same sequences give the same masks, so every form ends here: what a tokenizer returns, tensors and arrays, lists of any
lengths, strings, and iterables of them. An attention mask cuts a sequence to its real tokens; neither statistics nor positions
ever see padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import IOBase
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsec.arguments import checked
from sparsec.data.tokens import encode, without_beginning
from sparsec.defaults import CALIBRATION_LENGTH
from sparsec.errors import DataError

MOST = 1 << 22
"""Tokens: more is a stream without an end, or a corpus that nobody means to calibrate on."""
FORMS = (
    "calibration must be token ids [sequences, length], what a tokenizer returns, strings with tokenizer=..., a text file's path, "
    "a list or an iterable of these, or calls, each a tuple of tensors"
)


@dataclass(frozen=True, eq=False)
class Sequences:
    """tokens: int64 vectors, none of them empty, or [sequences, length]. source: in words. notes: what the user should hear.

    text: of tokens drawn from one, all of its sequences [sequences, length] and what it is: what training uses. beside: gives some
    of another text, to tell what training on this one does to others.
    """

    tokens: Tensor | Sequence[Tensor]
    source: str
    notes: tuple[str, ...] = ()
    text: tuple[Tensor, str] | None = None
    beside: Callable[[], tuple[Tensor, str]] | None = None


@checked
def sequences(
    given: Any,
    tokenizer: Any = None,
    length: int | None = None,
    limit: int | None = None,
    bos: bool = True,
    pad: int | None = None,
) -> Sequences:
    """Reads any form. length: sequences are cut to so many tokens, strings always to 1024 or what the model takes (`limit`).

    bos: False takes off what the tokenizer puts before strings. pad: the id to look for where no attention mask was given. Raises
    DataError, naming the sequence, for what is no sequence of tokens.
    """
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 2):
        raise DataError(f"calibration strings are cut to at least 2 tokens, got a length of {length!r}; take more")
    reader = _Reader(tokenizer, length, limit, bos)
    if isinstance(given, Tensor | np.ndarray) and _is_numbers(given) and given.ndim < 2:
        raise DataError(
            f"calibration token ids must be [sequences, length], got {list(given.shape)}; one sequence alone is given in a list"
        )
    held = list(given) if isinstance(given, list | tuple) else []
    if held and all(_is_id(i) for i in held):
        raise DataError(
            f"{FORMS}; got {type(given).__name__} of {type(held[0]).__name__}; one sequence alone is given as [ids]"
        )
    reader.read(given)
    return reader.result(pad)


@checked
def strings(
    texts: Sequence[str], tokenizer: Any, length: int | None = None, limit: int | None = None, bos: bool = True
) -> list[Tensor]:
    """Token ids of each text, at most `length` of them (default: 1024, or what the model takes)."""
    return list(sequences(list(texts), tokenizer, length, limit, bos).tokens)


@dataclass
class _Reader:
    tokenizer: Any
    length: int | None
    limit: int | None
    bos: bool
    found: list[Tensor] = field(default_factory=list)
    total: int = 0
    texts: int = 0
    shortened: int = 0
    types: bool = False  # token types were given, and are not read

    def read(self, item: Any) -> None:
        """One sequence, a batch, or an iterable of either."""
        if isinstance(item, str):
            self._text(item)
        elif isinstance(item, Mapping):
            self._mapping(item)
        elif _is_numbers(item) and item.ndim <= 2:
            self._rows(item, None)
        elif isinstance(item, list | tuple) and item and all(_is_id(i) for i in item):
            self._add(_ids(item, len(self.found)), None)
        elif isinstance(item, list | tuple) and _is_pair(item):
            self._rows(item[0], item[1], more=len(item) - 2)
        elif isinstance(item, Iterable) and not isinstance(item, bytes | bytearray | IOBase | nn.Module):
            self._each(item)
        else:
            raise DataError(f"{FORMS}; got {type(item).__name__}")

    def _each(self, items: Iterable[Any]) -> None:
        for item in items:
            if not isinstance(item, Iterable) or isinstance(item, bytes | bytearray):
                raise DataError(f"{FORMS}; got {type(items).__name__} of {type(item).__name__}")
            if isinstance(item, list | tuple) and not item:
                raise _empty(len(self.found))
            self.read(item)

    def _text(self, text: str) -> None:
        if self.tokenizer is None:
            raise DataError(
                "calibration on strings needs a tokenizer: give tokenizer=..., or token ids [sequences, length]"
            )
        ids = encode(self.tokenizer, text, truncation=False)
        ids = ids if self.bos else without_beginning(ids, self.tokenizer)
        if not ids:
            raise DataError(f"calibration string {len(self.found)} has no tokens; leave it out")
        self.texts += 1
        most = min(self.length or CALIBRATION_LENGTH, self.limit or CALIBRATION_LENGTH)
        self._add(torch.tensor(ids, dtype=torch.int64), None, most)

    def _mapping(self, item: Mapping[Any, Any]) -> None:
        if item.get("input_ids") is not None:
            types = item.get("token_type_ids")
            self.types |= types is not None and any(bool(torch.as_tensor(t).any()) for t in types)
            self._rows(item["input_ids"], item.get("attention_mask"))
        elif "text" in item:  # a row of a dataset, or its column
            self.read(item["text"])
        else:
            raise DataError(
                "a calibration dict needs input_ids, and attention_mask where sequences are padded, or text; it has "
                f"{', '.join(map(str, item)) or 'nothing'}"
            )

    def _rows(self, ids: Any, mask: Any, more: int = 0) -> None:
        """A batch, or one sequence, with its attention mask."""
        if more:
            raise DataError(
                f"a calibration tuple has {2 + more} tensors; give (input_ids, attention_mask), labels and the like are not read"
            )
        rows, masks = _split(ids), None if mask is None else _split(mask)
        if masks is not None and len(masks) != len(rows):
            raise DataError(
                f"an attention mask of {len(masks)} rows stands beside {len(rows)} calibration sequences; it must have their shape"
            )
        if not rows:
            raise _empty(len(self.found))
        for i, row in enumerate(rows):
            self._add(_ids(row, len(self.found)), None if masks is None else masks[i])

    def _add(self, ids: Tensor, mask: Any, most: int | None = None) -> None:
        number = len(self.found)
        real = ids if mask is None else ids[_real(ids, mask, number)]
        if not len(real):
            raise _empty(number)
        most = self.length if most is None else most
        self.shortened += most is not None and len(real) > most
        self.found.append(real[:most].clone())
        self.total += len(self.found[-1])
        if self.total > MOST:
            raise DataError(
                f"calibration data goes on after {MOST:,} tokens in {len(self.found):,} sequences; some hundred thousand are "
                "enough: give fewer, of a stream itertools.islice(stream, 128)"
            )

    def result(self, pad: int | None) -> Sequences:
        """All that was read."""
        if not self.found:
            raise DataError("calibration data holds no sequence")
        sizes = [len(ids) for ids in self.found]
        lengths = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
        kind = "strings" if self.texts == len(self.found) else "sequences"
        counted = f"{len(sizes)} {kind if len(sizes) > 1 else kind[:-1]}"
        notes = []
        if self.shortened:
            notes.append(
                f"calibration: {self.shortened} of {len(sizes)} {kind} were cut to {max(sizes)} tokens; calibration_length= sets "
                "another length"
            )
        if self.types:
            notes.append("calibration: token_type_ids are not read, so every sequence is of type 0")
        padded = sum(_padded(ids, pad) for ids in self.found)
        if padded:
            notes.append(
                f"calibration: {padded} of {len(sizes)} sequences begin or end with token {pad} again and again, which is the "
                "model's padding; without an attention mask every token counts as real: give what the tokenizer returns, with its "
                "attention_mask"
            )
        return Sequences(tuple(self.found), f"{counted} of {lengths} tokens", tuple(notes))


def _is_numbers(item: Any) -> bool:
    """A tensor, or an array that is not one of objects or strings."""
    return isinstance(item, Tensor) or (isinstance(item, np.ndarray) and item.dtype.kind in "iufbc")


def _is_id(item: Any) -> bool:
    return isinstance(item, int | float | np.number) or (isinstance(item, Tensor | np.ndarray) and item.ndim == 0)


def _is_pair(item: Sequence[Any]) -> bool:
    """Whether it is ids with their attention mask: the second holds 0 and 1 alone, and the first more than that."""
    if len(item) < 2 or not all(_is_numbers(each) for each in item):
        return False
    ids, mask = (torch.as_tensor(each) for each in item[:2])
    return (
        mask.ndim > 0
        and _is_mask(mask)
        and not _is_mask(ids)
        and (ids.ndim == mask.ndim == 2 or ids.shape == mask.shape)
    )


def _is_mask(tensor: Tensor) -> bool:
    return bool(((tensor == 0) | (tensor == 1)).all())


def _split(given: Any) -> list[Any]:
    """The rows of a batch; one sequence is a batch of one."""
    if _is_numbers(given):
        if not 1 <= given.ndim <= 2:
            raise DataError(
                f"calibration token ids and attention masks must be [sequences, length], got {list(given.shape)}"
            )
        return list(given) if given.ndim == 2 else [given]
    rows = list(given) if isinstance(given, Iterable) and not isinstance(given, str | bytes) else [given]
    return [rows] if rows and all(_is_id(i) for i in rows) else rows


def _ids(row: Any, number: int) -> Tensor:
    """int64 [length]."""
    ids = _vector(row, f"calibration sequence {number}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        if not ids.numel():
            raise _empty(number)
        raise DataError(
            f"calibration token ids must be integers [sequences, length], got {ids.dtype} in sequence {number}"
        )
    return ids.to("cpu", torch.int64)


def _vector(row: Any, name: str) -> Tensor:
    try:
        found = row.detach() if isinstance(row, Tensor) else torch.as_tensor(row)
        found = found.cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError) as error:
        raise DataError(f"{name} must be a vector of token ids, got {type(row).__name__}: {error}") from error
    if found.layout != torch.strided or found.ndim != 1:
        raise DataError(f"{name} must be a vector of token ids, got a {found.layout} tensor {list(found.shape)}")
    return found


def _real(ids: Tensor, mask: Any, number: int) -> slice:
    """Where the real tokens stand."""
    kept = _vector(mask, f"the attention mask of calibration sequence {number}")
    if kept.shape != ids.shape:
        raise DataError(
            f"the attention mask of calibration sequence {number} has {len(kept)} places for {len(ids)} tokens; it must have the "
            "shape of input_ids"
        )
    if not _is_mask(kept):
        wrong = kept[(kept != 0) & (kept != 1)][0].item()
        raise DataError(
            f"the attention mask of calibration sequence {number} must be of 0 (padding) and 1 (real tokens), it holds {wrong}"
        )
    places = kept.nonzero()[:, 0]
    if not len(places):
        raise _empty(number)
    first, last = int(places[0]), int(places[-1])
    if last - first + 1 != len(places):
        hole = (
            first + int(kept[first:].argmin())
            if kept.dtype != torch.bool
            else first + int((~kept[first:]).nonzero()[0])
        )
        raise DataError(
            f"the attention mask of calibration sequence {number} has a hole at position {hole}, between real tokens; padding must "
            "stand before or after them: give each piece as a sequence of its own"
        )
    return slice(first, last + 1)


def _padded(ids: Tensor, pad: int | None) -> bool:
    """Two pad tokens in a row at an end are no accident; a single one may be the end of a text."""
    ends = [ids[:2].tolist(), ids[-2:].tolist()]
    return pad is not None and len(ids) > 2 and [pad, pad] in ends


def _empty(number: int) -> DataError:
    return DataError(f"calibration sequence {number} has no tokens; leave it out")
