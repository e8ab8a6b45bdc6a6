"""Which packed tensors have been looked at, so that kernels, which trust positions, read none that nobody has checked.

A matrix is known by its tensors as they are: the very objects, their versions, and where their memory is. Another tensor in the
place of one, other memory behind it (`.data = `, `swap_tensors`) or a write into it makes a matrix that is not known, and whose
contents are looked at before the next product. To ask that takes a tenth of a microsecond a tensor, and no contents are read.

`values` may be written to, and no contents are read again: no kernel takes a place from them.

What torch's counter of versions does not see is not seen here either: writes through `x.data.add_()`, numpy or another library, and
all writes into tensors that were made under torch.inference_mode, which have no version.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsec import private
from sparsec.errors import FormatError
from sparsec.formats.base import Packed

Mark = tuple[str, int, int, int]
"""Of a tensor: its name, id, version and address."""
_UNCOUNTED = -1
"""The version of a tensor that has none."""
_NEVER: tuple[Mark, ...] = (("", 0, 0, 0),)
_MOST = 10_000
"""Matrices that are remembered; one that is forgotten is looked at again."""


def _marks(names: Sequence[str], tensors: Sequence[Tensor]) -> tuple[Mark, ...]:
    return tuple(
        (name, id(t), _UNCOUNTED if t.is_inference() else t._version, t.data_ptr())
        for name, t in zip(names, tensors, strict=True)
    )


def _kinds(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors)


def _end(seen: weakref.ref[LookedAt]) -> None:
    if (ended := seen()) is not None:
        ended.end()


class LookedAt:
    """The tensors of a matrix that was valid, as they were then. It holds none of them."""

    __slots__ = ("__weakref__", "_kinds", "_known", "_memory", "marks")

    marks: tuple[Mark, ...]
    """What must be true still, for who asks at every call; where that does not tell all, something that never is."""

    def __init__(self, names: Sequence[str] = (), tensors: Sequence[Tensor] = ()) -> None:
        self._known = _marks(names, tensors)
        self._kinds = _kinds(tensors)
        counted = self._known and all(version != _UNCOUNTED for _, _, version, _ in self._known)
        self.marks = self._known if counted else _NEVER
        # Memory that is gone may come again, at the same address and with other contents.
        this = weakref.ref(self)
        self._memory = [weakref.ref(t.untyped_storage(), lambda _: _end(this)) for t in tensors]

    def end(self) -> None:
        """From now on it tells of nothing."""
        self._known, self._kinds, self.marks = (), (), _NEVER

    def holds(self, names: Sequence[str], tensors: Sequence[Tensor]) -> bool:
        """Whether these are the tensors that were looked at, as they were."""
        return bool(self._known) and self._known == _marks(names, tensors)

    def same_places(self, names: Sequence[str], tensors: Sequence[Tensor]) -> bool:
        """Whether all but `values` are as they were, and `values` of the same shape and type."""
        if not self._known or self._kinds != _kinds(tensors):
            return False
        return all(
            now == was or was[0] == "values" for now, was in zip(_marks(names, tensors), self._known, strict=True)
        )


NOTHING = LookedAt()
"""What is known of a matrix that nobody has looked at."""
_SEEN: dict[tuple[Any, ...], LookedAt] = {}
"""By the kind, the ids of the tensors, and the scalars."""
_WRITING = threading.Lock()


def remember(packed: Packed) -> LookedAt:
    """What is known from now on of a matrix that is valid as it is."""
    tensors = tuple(packed.tensors().values())
    if not _readable(tensors):
        return NOTHING
    key, seen = _key(packed), LookedAt(packed.tensor_names, tensors)
    with _WRITING:
        _SEEN.pop(key, None)
        _SEEN[key] = seen
        while len(_SEEN) > _MOST:
            _SEEN.pop(next(iter(_SEEN)))
    return seen


def recall(packed: Packed) -> LookedAt:
    """What is known of a matrix as it is; reads no contents."""
    seen = _SEEN.get(_key(packed), NOTHING)
    return seen if seen.holds(packed.tensor_names, tuple(packed.tensors().values())) else NOTHING


def look_at(packed: Packed, layer: str, *, sizes: bool = True) -> LookedAt:
    """What is known of a matrix, whose contents are read unless they were before. NOTHING where tensors only stand for others.

    Raises FormatError, naming the layer and the tensor, where it is not valid. sizes: False for an operator's arguments: it refuses
    wrong sizes and types itself.
    """
    tensors = tuple(packed.tensors().values())
    seen = _SEEN.get(_key(packed), NOTHING)
    if not _readable(tensors):
        return NOTHING
    if seen.holds(packed.tensor_names, tensors):
        return seen
    with private.no_transforms(), private.no_modes(), torch.no_grad():
        faults = packed.layout_faults()
        if faults and not sizes:
            return NOTHING
        if not faults and not seen.same_places(packed.tensor_names, tensors):
            faults = packed.content_faults()
    if faults:
        raise unsound(layer, packed.title, "; ".join(faults))
    return remember(packed)


def unsound(layer: str, title: str, why: str) -> FormatError:
    """The error of packed tensors that no kernel must read."""
    return FormatError(
        f"{layer or title}: {'' if not layer else f'{title}: '}{why}; its packed tensors were changed or put together by hand: put "
        "the right ones back, load the model again, or pack the matrix again from its dense weight"
    )


def _key(packed: Packed) -> tuple[Any, ...]:
    return (type(packed), *map(id, packed.tensors().values()), *packed.scalars().values())


def _readable(tensors: Sequence[Tensor]) -> bool:
    """Whether they have contents, and do not stand for others as those of a trace do."""
    return all(
        type(t).__torch_dispatch__ is Tensor.__torch_dispatch__
        and not (t.is_meta or private.is_functorch_wrapped_tensor(t))
        for t in tensors
    )
