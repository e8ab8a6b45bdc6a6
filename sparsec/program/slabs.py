"""The cache that a program reads and writes: keys and values of a layer in one tensor each, with room for what comes.

A `DynamicCache` of transformers stays what it is; its layers become slabs where they stand, at the first step. Everything that
transformers does with such a cache, cropping, reordering, repeating, selecting, goes on as before: `keys` and `values` are views of
what is there, and what somebody puts in their place is taken over before the next token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from sparsec import private

LEAST = 64
"""Positions that a slab has room for at least."""


class _Slabs(DynamicLayer):  # type: ignore[misc]
    """What both kinds of layers have. `first` and `last`: the positions of the slabs that are there, last excluded."""

    slabs: tuple[Tensor, Tensor] | None
    given: list[Tensor | None]  # in the place of keys and values
    first: int
    last: int
    is_initialized: bool

    @property
    def keys(self) -> Tensor | None:
        """[batch, heads, positions, width]."""
        return self._held(0)

    @keys.setter
    def keys(self, tensor: Tensor | None) -> None:
        self._put(0, tensor)

    @property
    def values(self) -> Tensor | None:
        """[batch, heads, positions, width]."""
        return self._held(1)

    @values.setter
    def values(self, tensor: Tensor | None) -> None:
        self._put(1, tensor)

    def __getstate__(self) -> dict[str, Any]:
        """What is there, without room: no copy writes to the slabs of another."""
        held = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in (self.keys, self.values)]
        return vars(self) | {"slabs": None, "given": held, "first": 0, "last": 0}

    def _held(self, i: int) -> Tensor | None:
        if self.given[i] is not None or self.slabs is None:
            return self.given[i]
        return self.slabs[i][:, :, self.first : self.last]

    def _both(self) -> tuple[Tensor, Tensor]:
        keys, values = self._held(0), self._held(1)
        assert keys is not None
        assert values is not None
        return keys, values

    def _put(self, i: int, tensor: Tensor | None) -> None:
        if tensor is None:
            self.slabs, self.given, self.first, self.last = None, [None, None], 0, 0
        elif tensor.ndim == 4:  # else it is the [0] of a layer that begins
            self.given[i] = tensor

    @property
    def even(self) -> bool:
        """Whether there are as many keys as values."""
        return (
            self.given == [None, None]
            or len({None if t is None else t.shape[2] for t in (self.keys, self.values)}) == 1
        )

    def get_seq_length(self) -> int:
        """Positions that are there."""
        if self.given[0] is not None:
            return self.given[0].shape[-2]
        return self.last - self.first

    def room(self, count: int, like: tuple[Tensor, Tensor] | None = None) -> None:
        """Makes room for so many positions more; takes over what was put in the place of keys and values.

        like: keys and values to come, for a layer that is empty.
        """
        if self.given != [None, None]:
            self._take_over()
        length = self.last - self.first
        if self.slabs is None:
            assert like is not None
            self._make(like, max(LEAST, 2 * count))
        elif self.last + count > self.slabs[0].shape[2]:
            wanted = length + count
            held = [slab[:, :, self.first : self.last] for slab in self.slabs]
            fits = 2 * wanted <= self.slabs[0].shape[2] and self.first >= length  # nothing overlaps where it goes
            if fits and not self._seen_elsewhere(2):
                for slab, own in zip(self.slabs, held, strict=True):
                    slab[:, :, :length] = own
                self.first, self.last = 0, length
            else:
                self._make((held[0], held[1]), max(LEAST, 2 * wanted))
                self._fill(held)

    def _make(self, like: tuple[Tensor, Tensor], room: int) -> None:
        with torch.inference_mode(False):  # what is made there cannot be written to elsewhere
            made = [t.new_empty(*t.shape[:2], room, t.shape[3], requires_grad=False) for t in like]
        self.slabs, self.first, self.last = (made[0], made[1]), 0, 0

    def _fill(self, held: Any) -> None:
        assert self.slabs is not None
        for slab, own in zip(self.slabs, held, strict=True):
            slab[:, :, : own.shape[2]] = own
        self.last = held[0].shape[2]

    def _take_over(self) -> None:
        keys, values = self._both()
        places = [self._inside(i, t) for i, t in enumerate((keys, values))]
        self.given = [None, None]
        if places[0] is not None and places[0] == places[1] and not self._seen_elsewhere(2):
            self.first, self.last = places[0], places[0] + keys.shape[2]
            return
        self._make((keys, values), max(LEAST, 2 * keys.shape[2]))
        self._fill((keys, values))

    def _seen_elsewhere(self, here: int) -> bool:
        """Whether somebody else holds a view of the slabs, which must not change. here: how many tensors of each are ours."""
        assert self.slabs is not None
        return any(private.holders(slab) > here for slab in self.slabs)

    def _inside(self, i: int, tensor: Tensor) -> int | None:
        """Where a tensor begins in the slab that it is a view of: cropping makes such."""
        if self.slabs is None:
            return None
        slab = self.slabs[i]
        same = tensor.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr() and tensor.dtype == slab.dtype
        offset, step = tensor.storage_offset(), slab.stride(2)
        fits = same and tensor.shape[:2] == slab.shape[:2] and tensor.shape[3:] == slab.shape[3:]
        if (
            not fits
            or tensor.stride() != slab.stride()
            or offset % step
            or offset // step + tensor.shape[2] > slab.shape[2]
        ):
            return None
        return offset // step

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As transformers has it, in the same slabs."""
        if self.get_seq_length() == 0:
            return
        self.room(0)
        assert self.slabs is not None
        if len(beam_idx) != len(self.slabs[0]) or self._seen_elsewhere(1):
            super().reorder_cache(beam_idx)
            return
        for slab in self.slabs:
            held = slab[:, :, self.first : self.last]
            held.copy_(held.index_select(0, beam_idx.to(held.device)))

    def _append(self, keys: Tensor, values: Tensor) -> bool:
        """Writes more positions; False where they cannot stand in slabs."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # a derivative may want what was there
            return False
        if keys.shape[2] != values.shape[2] or not self.even:
            return False
        if not self.is_initialized:
            self.device, self.is_initialized = keys.device, True
        self.room(keys.shape[2], (keys, values))
        assert self.slabs is not None
        if any(t.shape[:2] != s.shape[:2] or t.shape[3] != s.shape[3] or t.dtype != s.dtype or t.device != s.device
               for t, s in zip((keys, values), self.slabs, strict=True)):  # fmt: skip
            return False
        for slab, own in zip(self.slabs, (keys, values), strict=True):
            slab[:, :, self.last : self.last + own.shape[2]] = own
        self.last += keys.shape[2]
        return True

    def _apart(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """What is there and more, in tensors of their own."""
        held, own = (self.keys, self.values), (keys, values)
        self.device, self.is_initialized = keys.device, True
        whole = [new if old is None else torch.cat([old, new], dim=-2) for old, new in zip(held, own, strict=True)]
        self.keys, self.values = whole
        return whole[0], whole[1]

    def advance(self) -> None:
        """One position more has been written."""
        self.last += 1


class SlabLayer(_Slabs):
    """A layer that keeps all positions."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers has it."""
        if not self._append(key_states, value_states):
            return self._apart(key_states, value_states)
        return self._both()


class SlidingSlabLayer(_Slabs, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that keeps the positions of a window, all but one."""

    get_seq_length = DynamicSlidingWindowLayer.get_seq_length  # of all that it has seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As transformers has it."""
        count = key_states.shape[2]
        if self._append(key_states, value_states):
            keys, values = self._both()
            self._slide(count)
        else:
            keys, values = self._apart(key_states, value_states)
            self.cumulative_length += count
            if not self.record_past:
                self.keys, self.values = (t[:, :, -self.sliding_window + 1 :] for t in (keys, values))
        if self.record_past:
            visible = self.sliding_window - 1 + count
            return keys[:, :, -visible:], values[:, :, -visible:]
        return keys, values

    def _slide(self, count: int) -> None:
        self.cumulative_length += count
        if not self.record_past:
            self.first = max(self.first, self.last - max(0, self.sliding_window - 1))

    def advance(self) -> None:
        """One position more has been written."""
        self.last += 1
        self._slide(1)


_KINDS: dict[type, type[_Slabs]] = {DynamicLayer: SlabLayer, DynamicSlidingWindowLayer: SlidingSlabLayer}


def slabs_of(cache: Any) -> list[Any] | None:
    """The layers of a cache, as slabs; None for a cache that is not transformers' own growing one, or that holds nothing yet."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return None
    for layer in cache.layers:
        if type(layer) in _KINDS and layer.is_initialized and layer.keys.ndim == 4:
            _become(layer)
        if not isinstance(layer, _Slabs) or not layer.is_initialized or not layer.even:
            return None
    return list(cache.layers)


def _become(layer: Any) -> None:
    keys, values = vars(layer).pop("keys"), vars(layer).pop("values")
    layer.__class__ = _KINDS[type(layer)]
    vars(layer).update(slabs=None, given=[keys, values], first=0, last=0)
